"""The scorer that is trained: a head on a CLIP of which all, a LoRA, or nothing else is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.keys import key
from t2i_align.rewards.heads import Cosine, Head, Readout
from t2i_align.rewards.tower import Tower
from t2i_align.rewards.trained import write_scorer
from t2i_align.scorer_training.blocks import OUTPUTS

if TYPE_CHECKING:
    from t2i_align.scorer_training.blocks import ScorerBlock, ScorerRun

ADAPTER = "scorer"  # peft's name of the LoRA


class Model(nn.Module):
    """Pictures and texts -> what a head takes of them.

    Args:
        tower: the CLIP it starts from; stays as it is.
        head: of the scorer.
        block: what is trained.
        seed: of the LoRA.
    """

    network: nn.Module

    def __init__(self, tower: Tower, head: Head, block: ScorerBlock, seed: int = 0) -> None:
        super().__init__()
        object.__setattr__(self, "tower", tower)  # not registered: others use it, too
        self.tower: Tower
        self.head, self.block = head, block
        if block.train == "head":
            object.__setattr__(self, "network", tower.network)
            return
        self.network = copy.deepcopy(tower.network)
        self.network.requires_grad_(block.train == "full")
        self.network.get_parameter("logit_scale").requires_grad_(False)  # the head has one of its own
        if block.train == "lora":
            add_lora(self.network, block, seed)

    def train(self, mode: bool = True) -> Model:
        """Dropout and batch norm stay as in use: a scorer's batches are small."""
        super().train(mode)
        self.network.eval()
        return self

    @property
    def frozen(self) -> bool:
        """Whether the CLIP stays as it is, so that pictures and texts are encoded once."""
        return self.block.train == "head"

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors (N, D) of pixels (N, 3, H, W) that `preprocessing.fit` made."""
        pixels = self.tower.preprocessing.normalise(pixels).to(self.tower.dtype)
        return F.normalize(self.tower.encode_image(self.network, pixels).float(), dim=-1)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Unit vectors (P, D) of token ids (P, context)."""
        return F.normalize(self.tower.encode_text(self.network, tokens).float(), dim=-1)

    def save(self, folder: Path, name: str, base: dict[str, Any], learns: str) -> None:
        """Write a folder that `load_reward` opens."""
        network = self.network if self.block.train == "full" else None
        adapter = lora_state(self.network) if self.block.train == "lora" else None
        write_scorer(folder, name, self.tower, self.head, base=base, learns=learns, network=network, adapter=adapter)


def make_head(config: ScorerRun, tower: Tower, merits: Sequence[float]) -> Head:
    """The head of a run at its start: a cosine, weights of 1, or a readout that gives the mean of the merits.

    The hidden layers of an mlp are drawn from the run's seed, the same for all members, whose weights can then be
    averaged.
    """
    block, width = config.scorer, tower.text_features(["a"]).shape[1]
    if block.head in ("cosine", "weighted"):
        return Cosine(width, block.scale or tower.scale, block.head == "weighted")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.train.seed, "head"))
        hidden = block.hidden if block.head == "mlp" else ()
        head = Readout(width, block.reads, hidden, OUTPUTS.get(config.objective.use, "regression"))
    if not config.comparing:
        said = torch.tensor(merits, dtype=torch.float64)
        head.offset.fill_(said.mean())
        head.factor.fill_(said.std(correction=0))
    return head


def add_lora(network: nn.Module, block: ScorerBlock, seed: int) -> None:
    """Put a LoRA into a CLIP: by default on the linear layers of its attention, or on all where there are none.

    open_clip's attention reads its weights without calling layers; what is left of its blocks is their MLPs.

    Raises:
        PolicyError: an ending that fits no layer.
    """
    from t2i_align.policy.lora import adaptable, find_targets, inject, same_for_all

    uncalled = tuple(
        f"{path}." for path, module in network.named_modules() if type(module).__name__ == "AttentionPool2d"
    )
    targets = find_targets(network, block.targets) if block.targets is not None else []
    if block.targets is None:
        found = [(n, a) for n, layer, a in adaptable(network) if isinstance(layer, nn.Linear)]
        found = [(name, attention) for name, attention in found if not name.startswith(uncalled or ("\0",))]
        some = any(attention for _, attention in found)
        targets = [name for name, attention in found if attention or not some]
        if not targets:
            find_targets(network)  # says what there is
    inject(network, ADAPTER, same_for_all(targets, block.rank, block.alpha), seed)


def lora_state(network: nn.Module) -> dict[str, Tensor]:
    """The weights of the LoRA, with the alpha of each layer."""
    from t2i_align.policy.lora import adapter_weights, layers_of

    alphas = {f"{path}.alpha": torch.tensor(float(alpha)) for path, (_, alpha) in layers_of(network, ADAPTER).items()}
    return {name: weight.detach() for name, weight in adapter_weights(network, ADAPTER).items()} | alphas


def parameters_of(model: nn.Module) -> tuple[int, int]:
    """How many numbers there are, and how many are trained."""
    every = [*model.parameters()]
    return sum(map(torch.Tensor.numel, every)), sum(p.numel() for p in every if p.requires_grad)


def start_eta() -> nn.Parameter:
    """The parameter whose softplus is Rao and Kupper's eta, which is log 2 at the start."""
    return nn.Parameter(torch.tensor(math.log(math.expm1(math.log(2)))))
