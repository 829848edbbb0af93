"""LoRA (arXiv 2106.09685) in a network, by peft: which layers get it, and how it starts.

A layer W becomes W + (alpha / rank) B A; B starts at zero, so a new adapter changes nothing.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.keys import generator
from t2i_align.policy.path import PolicyError

Layers = dict[str, tuple[int, float]]  # name of a layer -> (rank, alpha)


def adaptable(
    module: nn.Module, prefix: str = "", attention: bool = False
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d, bool]]:
    """The linear and convolution layers below a module: (name, layer, whether it is part of an attention module).

    A layer that has LoRA already comes under its own name.
    """
    attention = attention or type(module).__name__.endswith("Attention")
    for key, child in module.named_children():
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if isinstance(base, nn.Linear | nn.Conv2d):
            yield prefix + key, base, attention
        elif not isinstance(child, nn.MultiheadAttention):  # reads its projections' weights without calling them
            yield from adaptable(child, f"{prefix}{key}.", attention)


def find_targets(network: nn.Module, endings: Sequence[str] | None = None) -> list[str]:
    """Names of the layers to adapt: those that end so, or by default the linear layers of all attention modules.

    Raises:
        PolicyError: there is none, or an ending fits none; with what there is.
    """
    found = list(adaptable(network))
    ends = {_ending(name) for name, _, _ in found}
    there = f"its linear and convolution layers end in {', '.join(sorted(ends))}" if ends else "it has no linear layer"
    if endings is None:
        targets = [name for name, layer, attention in found if attention and isinstance(layer, nn.Linear)]
        if not targets:
            advice = "choose targets=" if ends else "train it with Policy.full"
            raise PolicyError(
                f"Expected a {type(network).__name__} with linear layers in attention modules but found none; {there}: "
                f"{advice}."
            )
        return targets
    if isinstance(endings, str):
        raise PolicyError(f"Expected targets= to be a list of endings but got {endings!r}.")
    for ending in endings:
        if not any(name == ending or name.endswith(f".{ending}") for name, _, _ in found):
            hint = nearest(ending, ends)
            raise PolicyError(f"No layer of {type(network).__name__} ends in {ending!r}; {there}.{hint}")
    wanted = tuple(f".{ending}" for ending in endings)
    return [name for name, _, _ in found if f".{name}".endswith(wanted)]


def _ending(name: str) -> str:
    """The last part of a layer's name, with the one before if it is a number: `to_q`, `to_out.0`."""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def same_for_all(targets: Sequence[str], rank: int | None, alpha: float | None) -> Layers:
    """`Layers` of one rank (16 if None) and alpha (the rank if None). Raises PolicyError unless both are positive."""
    rank = 16 if rank is None else rank
    alpha = rank if alpha is None else alpha
    if not isinstance(rank, int) or rank < 1:
        raise PolicyError(f"Expected a rank of 1 or more but got {rank!r}.")
    if not 0 < alpha < math.inf:
        raise PolicyError(f"Expected a positive alpha but got {alpha!r}.")
    return dict.fromkeys(targets, (rank, alpha))


def lora_config(layers: Layers) -> LoraConfig:
    """What peft is told of an adapter: the commonest rank and alpha, and the layers that have others."""
    (rank, alpha) = Counter(layers.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": pair for name, pair in layers.items() if pair != (rank, alpha)}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(layers),
        rank_pattern={name: pair[0] for name, pair in others.items()},
        alpha_pattern={name: pair[1] for name, pair in others.items()},
    )


def inject(network: nn.Module, name: str, layers: Layers, seed: int = 0) -> None:
    """Put an fp32 adapter into the network: A uniform in +-1/sqrt(inputs), keyed by seed and layer; B zero."""
    at = {f"{path}.lora_A.weight": torch.empty(0) for path in layers}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws weights that we replace
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(lora_config(layers), network, name, state_dict=at)
    if isinstance(network, PeftAdapterMixin):
        network._hf_peft_config_loaded = True  # as its own add_adapter does
    for path, layer in lora_layers(network, name).items():
        layer.lora_A[name].float()
        layer.lora_B[name].float()
        weight = layer.lora_A[name].weight
        bound = 1 / math.sqrt(weight[0].numel())
        values = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator(seed, "lora", path))
        weight.data.copy_(values)


def adapter_names(network: nn.Module) -> list[str]:
    """All adapters in a network, whoever put them there."""
    return list(getattr(network, "peft_config", {}))


def lora_layers(network: nn.Module, name: str) -> dict[str, LoraLayer]:
    """The layers that an adapter has, by name."""
    modules = network.named_modules()
    return {path: layer for path, layer in modules if isinstance(layer, LoraLayer) and name in layer.lora_A}


def adapter_weights(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's weights: `<layer>.lora_A.weight` (rank, in, ...) and `<layer>.lora_B.weight` (out, rank, ...)."""
    weights = {}
    for path, layer in lora_layers(network, name).items():
        weights[f"{path}.lora_A.weight"] = layer.lora_A[name].weight
        weights[f"{path}.lora_B.weight"] = layer.lora_B[name].weight
    return weights


@torch.no_grad()
def put_weights(network: nn.Module, name: str, values: Mapping[str, Tensor]) -> None:
    """Set an adapter's weights."""
    for key, weight in adapter_weights(network, name).items():
        weight.copy_(values[key])


def layers_of(network: nn.Module, name: str) -> Layers:
    """The layers of an adapter, with rank and alpha."""
    return {path: (layer.r[name], _alpha(layer, name)) for path, layer in lora_layers(network, name).items()}


def _alpha(layer: LoraLayer, name: str) -> float:
    """The alpha whose ratio to the rank is the scale in use, which may have been set otherwise."""
    rank, alpha, scale = layer.r[name], layer.lora_alpha[name], layer.scaling[name]
    return alpha if scale == alpha / rank else scale * rank
