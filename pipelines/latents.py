"""Images -> the latents that a pipeline's loop would end with: the inverse of `Driver.decode`, for any family.

A pipeline packs, scales and shifts latents in its own way before it gives them to its decoder, always element by
element: z = d * P x + b with a permutation P. That map is read off the pipeline's own decoding, with the decoder
itself held back, and inverted by its derivative J, without knowing the family:

    d * P 1 = z(1) - z(0),   x = J^T (z - z(0)) / J^T (z(1) - z(0)),   z = the mean of the encoder's posterior

That z(x) comes out as z is checked. A pipeline without an autoencoder has its pictures for z.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.data.images import ImageError, open_image, pil_to_tensor
from t2i_align.pipelines.calling import DriverError
from t2i_align.pipelines.driven import no_rows
from t2i_align.pipelines.driver import Driver

AUTOENCODERS = ("vae", "movq", "vqvae")  # their names in pipelines
OFF = {torch.float32: 1e-4, torch.float64: 1e-4}  # largest relative error of the inverse
OFF_HALF = 3e-2


class _Held(Exception):
    """The decoder was called."""


class LatentEncoder:
    """Images as latents of a driver's pipeline.

    Args:
        driver: of the pipeline.
        call: keywords of its `__call__` that decide the size of its images.

    Raises:
        DriverError: latents cannot be read off the pipeline's decoding.
    """

    def __init__(self, driver: Driver, **call: Any) -> None:
        self.driver, self.call = driver, call
        self.name = next((name for name in AUTOENCODERS if getattr(driver.pipe, name, None) is not None), None)
        self.vae: Any = None if self.name is None else getattr(driver.pipe, self.name)
        if driver._upcasts():
            driver.exact_vae = driver.exact_vae or copy.deepcopy(driver.pipe.vae).float()
            self.vae = driver.exact_vae
        with torch.no_grad():
            self.like = driver.start(driver._blank(), 1, **call)  # (1, ...)
            self.size = tuple(driver.decode(self.like, **call).shape[-2:])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Latents (B, ...) of images (B, 3, H, W) in [0, 1] of the pipeline's size."""
        x = self.like.expand(len(images), *self.like.shape[1:])
        with torch.enable_grad():
            start = torch.zeros_like(x).requires_grad_()
            zero = self.given(start)
        z = self.encoded(images, zero)
        gain = self.given(torch.ones_like(x)) - zero.detach()
        up, scale = (_pulled(zero, start, value) for value in (z - zero.detach(), gain))
        if not bool((scale > 0).all()):
            raise DriverError(self._complaint("gives its decoder not all numbers of a latent"))
        x = (up / scale).to(x.dtype)
        off = float((self.given(x) - z).abs().max() / z.abs().max().clamp(min=1e-6))
        if not off <= OFF.get(x.dtype, OFF_HALF):
            raise DriverError(self._complaint(f"does not give its decoder what was put in (off by {off:.2g})"))
        return x

    def fitted(self, image: Any) -> Tensor:
        """A PIL image as (3, H, W) of the pipeline's size: scaled to cover it, then cropped to its centre."""
        height, width = self.size
        scale = max(height / image.height, width / image.width)
        if scale != 1:
            size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            image = image.resize(size, resample=3)  # bicubic
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return pil_to_tensor(image.crop((left, top, left + width, top + height)))

    def given(self, x: Tensor) -> Tensor:
        """What the decoder is given for latents x: z (B, ...); without an autoencoder the pictures."""
        if self.name is None:
            return self.driver.decode(x, len(x), **self.call)
        driver = self.driver
        pipe, caught = driver._copy(no_rows), list[Tensor]()
        pipe.__dict__[self.name] = held_back(self.vae, caught)
        x = x.float() if driver._upcasts() else x
        told = driver._tell(pipe, driver._blank()[[0] * len(x)]) | driver._give(pipe, x.contiguous())
        try:
            driver._run(pipe, 1, {**told, **self.call, "output_type": "pt"})
        except _Held:
            return caught[0].float()
        raise DriverError(self._complaint(f"does not decode by its {self.name}"))

    def encoded(self, images: Tensor, like: Tensor) -> Tensor:
        """The mean of the encoder's posterior, shaped like what the decoder is given."""
        if self.name is None:
            return images.to(like)
        weight = next(self.vae.parameters())
        pixels = (2 * images - 1).to(weight.device, weight.dtype)
        found = self.vae.encode(pixels.unsqueeze(2) if like.ndim == 5 else pixels)
        if hasattr(found, "latent_dist"):
            z = found.latent_dist.mode()
        else:
            z = found.latent if hasattr(found, "latent") else found.latents
        if z.shape != like.shape:
            raise DriverError(
                self._complaint(f"decodes latents of shape {tuple(like.shape)} but encodes to {tuple(z.shape)}")
            )
        return z.float()

    def _complaint(self, what: str) -> str:
        return f"Images cannot be turned into latents for {self.driver.family}: it {what}."


def held_back(vae: nn.Module, caught: list[Tensor]) -> nn.Module:
    """A shallow copy of an autoencoder whose `decode` keeps its input and goes no further."""

    def decode(z: Tensor, *args: Any, **options: Any) -> None:
        caught.append(z)
        raise _Held

    held = copy.copy(vae)
    held.__dict__["decode"] = decode
    return held


def _pulled(output: Tensor, at: Tensor, gradient: Tensor) -> Tensor:
    return torch.autograd.grad(output, at, gradient.to(output), retain_graph=True)[0].float()


class LatentCache:
    """Latents of images by their names, each encoded once while they fit into `limit` bytes of main memory.

    Args:
        driver: of the pipeline.
        batch_size: images that are encoded together.
        limit: bytes of latents that are kept, the first ones; others are encoded again whenever they are asked for.
        call: as for `LatentEncoder`.
    """

    def __init__(self, driver: Driver, batch_size: int = 16, limit: int = 2**31, **call: Any) -> None:
        self.driver, self.call, self.batch_size, self.limit = driver, call, batch_size, limit
        self.encoder: LatentEncoder | None = None
        self.kept: dict[str, Tensor] = {}
        self.used = 0
        self.problems: dict[str, str] = {}

    def __call__(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Latents (...) on the CPU, of those that can be opened; `problems` says of the others why not."""
        wanted = [name for name in dict.fromkeys(names) if name not in self.problems]
        found = {name: self.kept[name] for name in wanted if name in self.kept}
        missing = [name for name in wanted if name not in found]
        for first in range(0, len(missing), self.batch_size):
            found |= self._encode(missing[first : first + self.batch_size])
        for name, latent in found.items():
            size = latent.numel() * latent.element_size()
            if name not in self.kept and self.used + size <= self.limit:
                self.kept[name], self.used = latent, self.used + size
        return found

    def _encode(self, names: list[str]) -> dict[str, Tensor]:
        self.encoder = self.encoder or LatentEncoder(self.driver, **self.call)
        pictures = {}
        for name in names:
            try:
                pictures[name] = self.encoder.fitted(open_image(name))
            except ImageError as error:
                self.problems[name] = str(error)
        if not pictures:
            return {}
        latents = self.encoder(torch.stack(list(pictures.values()))).cpu()
        return {name: latent.clone() for name, latent in zip(pictures, latents, strict=True)}
