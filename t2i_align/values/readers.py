"""What a value function reads of a half-made image, from any pipeline that the driver drives.

    features  the network's own middle layer in one unguided call: mean and spread of each channel over all positions
    conv      the latent itself, at unit noise scale, and the mean of the prompt's embedding over its tokens
    clip      a CLIP's embeddings of the decoded x0 prediction of one unguided call and of the prompt

`features` costs a network call and sees what the network understands of the prompt; `conv` costs next to nothing;
`clip` costs a network call, a decode and an encoding, and is far better at telling a prompt's good images from its bad
ones (docs/training.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from t2i_align.errors import T2IError
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import Driver

if TYPE_CHECKING:
    from t2i_align.rewards.tower import Tower

OFF = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "distilled_guidance_scale": 1.0, "pag_scale": 0.0}


class ValueFunctionError(T2IError):
    """A value function that cannot be learned or used here."""


class Source(NamedTuple):
    """Where half-made images come from: a driver, the run's number of steps and keywords, and the path of the base.

    `tower`: the CLIP that `clip` reads by.
    """

    driver: Driver
    steps: int
    call: dict[str, Any]
    reference: Any = nullcontext  # () -> context in which the network is the base
    tower: Tower | None = None

    def angle(self, row: int, x: Tensor) -> Tensor:
        """The noise level (B,) of a row as an angle: 0 without noise, pi / 2 for noise alone."""
        at = self.driver.grid(self.steps, **self.call).level(row, x)
        return torch.atan2(at.sigma, at.alpha).flatten().expand(len(x))

    @property
    def unguided(self) -> dict[str, Any]:
        """The keywords without guidance, so that what is read does not hang on a user's scale."""
        given = {**self.driver.defaults, **self.call}
        named = {name: given.get(name) for name in OFF if name in self.driver.accepts}
        return self.call | {name: OFF[name] if v is None else min(OFF[name], v) for name, v in named.items()}

    def promised(self, x: Tensor, row: int, cond: Cond, guided: bool = True) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of the base's x0 prediction; below all rows of the latents themselves."""
        driver, steps, call = self.driver, self.steps, self.call if guided else self.unguided
        if row < driver.grid(steps, **call).steps:
            with self.reference():
                x = driver.step(x, row, cond, steps, **call).x0
        with torch.autocast(x.device.type, enabled=False):  # as reward gradients do
            return driver.decode(x, straight_through=x.requires_grad and bool(driver.clamps))


def read_latents(source: Source, x: Tensor, row: int, cond: Cond) -> tuple[Tensor, ...]:
    """Latents (B, C, ...) as if alpha^2 + sigma^2 = 1, and prompt vectors (B, P); fp32."""
    at = source.driver.grid(source.steps, **source.call).level(row, x)
    scaled = x.float() / (at.alpha.square() + at.sigma.square()).sqrt()
    scaled = scaled.movedim(-1, 1) if x.ndim == 3 else scaled  # packed latents (B, L, C)
    return scaled, prompt_vectors(cond).to(x.device)


def prompt_vectors(cond: Cond) -> Tensor:
    """(B, P): the mean over tokens of what the encoder says first of each prompt, fp32."""
    said = [cond.encoded[row] for row in cond.rows] if cond.encoded else list(cond.given)
    made = {id(tree): _mean_token(tree) for tree in {id(tree): tree for tree in said}.values()}
    return torch.stack([made[id(tree)] for tree in said])


def _mean_token(tree: Any) -> Tensor:
    tree = tree.get("prompt_embeds", tree) if isinstance(tree, dict) else tree
    first = next(_floats(tree), None)
    if first is None:
        raise ValueFunctionError("Expected prompts that are encoded to numbers but found none: use net=features.")
    tokens = first.reshape(-1, first.shape[-1]) if first.ndim > 1 else first.reshape(1, -1)
    return tokens.float().mean(0)


def _floats(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _floats(part)
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _floats(part)


def read_features(source: Source, x: Tensor, row: int, cond: Cond) -> tuple[Tensor, ...]:
    """Mean and standard deviation (B, 2 F) over positions of the base network's middle layer; fp32."""
    driver = source.driver
    with source.reference(), _outputs_of(middle_layer(driver.network)) as seen:
        driver.predict(x, row, cond, source.steps, **source.unguided)
    pooled = torch.cat([_pool(output) for output in seen])
    if len(pooled) % len(x):
        raise ValueFunctionError(
            f"Expected the middle layer of {driver.family} to have one row per sample but {len(x)} samples gave "
            f"{len(pooled)}: use net=conv."
        )
    return (pooled.reshape(-1, len(x), pooled.shape[1]).mean(0),)


def read_clip(source: Source, x: Tensor, row: int, cond: Cond) -> tuple[Tensor, ...]:
    """Embeddings of the promised image and the prompt, and their products (B, 3 D), at unit scale; fp32."""
    assert source.tower is not None
    images = source.promised(x, row, cond, guided=False)
    with torch.autocast(x.device.type, enabled=False):
        image, text = source.tower.image_features(images), source.tower.text_features(cond.prompts.text)
    image, text = (part * part.shape[1] ** 0.5 for part in (image, text))  # unit vectors: entries of size 1
    return (torch.cat([image, text, image * text], 1),)


def middle_layer(network: nn.Module) -> nn.Module:
    """A UNet's middle block; of other networks the middle of the list of blocks that has most of the weights.

    Raises:
        ValueFunctionError: the network has neither.
    """
    middle = getattr(network, "mid_block", None)
    if isinstance(middle, nn.Module):
        return middle
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList) and len(part)]
    stacks = [part for part in network.children() if isinstance(part, nn.ModuleList) and len(part)] or lists
    if not stacks:
        raise ValueFunctionError(f"{type(network).__name__} has no blocks to read the middle one of: use net=conv.")
    trunk = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    return trunk[len(trunk) // 2]


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[Any]]:
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _pool(output: Any) -> Tensor:
    """(B, 2 F) of the first tensor with positions in a layer's output: (B, L, F) or (B, F, h, w, ...)."""
    found = next((part for part in _floats(output) if part.ndim >= 3), None)
    if found is None:
        raise ValueFunctionError("Expected the middle layer to put out a tensor with positions: use net=conv.")
    features = (found if found.ndim == 3 else found.flatten(2).mT).float()
    spread = (features.var(1, correction=0) + 1e-6).sqrt()  # the gradient is finite where there is one position
    return torch.cat([features.mean(1), spread], 1)
