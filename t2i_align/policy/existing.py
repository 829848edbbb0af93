"""Existing LoRA from disk, to go on from: our own folders, peft's, and what a stock pipeline opens."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from t2i_align.pipelines.parts import quiet_loading
from t2i_align.policy.artefacts import NOTE, PEFT, PORTABLE, PREFIX, is_portable, read_note, times_scale
from t2i_align.policy.lora import Layers, adaptable, adapter_weights, layers_of
from t2i_align.policy.path import PolicyError

# Weights of LoRA variants (DoRA, LoKr, biases), which are more than A and B.
VARIANTS = ("lora_magnitude_vector", "dora_scale", "lokr_", "hada_", "lora_B.bias", "lora_up.bias", "lora.up.bias")
Weights = Mapping[str, Tensor]  # see adapter_weights


def existing_lora(
    pipe: DiffusionPipeline, component: str, network: nn.Module, path: str | Path
) -> tuple[Layers, Weights]:
    """Read a LoRA from disk; the network is not touched.

    Args:
        pipe: the pipeline.
        component: name of its network.
        network: what the LoRA is for.
        path: a folder that `Policy.save` wrote, peft's folder, or a file (or its folder) that the pipeline's
            `load_lora_weights` opens.

    Raises:
        PolicyError: nothing of the sort is there, or it does not fit the network.
    """
    path = Path(path)
    if (path / NOTE).is_file():
        layers, weights = _own(read_note(path), component, path)
    elif (path / "adapter_config.json").is_file():
        layers, weights = _peft(path)
    else:
        layers, weights = _stock(pipe, component, network, path / PORTABLE if path.is_dir() else path)
    there = {name: layer for name, layer, _ in adaptable(network)}
    for name, (rank, _) in layers.items():
        shapes = [weights[f"{name}.lora_{which}.weight"].shape[:2] for which in "AB"]
        if name not in there or shapes != [(rank, _inputs(there[name])), (_outputs(there[name]), rank)]:
            raise PolicyError(f"Expected a LoRA of {type(network).__name__} but {name!r} in {path} does not fit it.")
    return layers, weights


def _own(note: Mapping[str, Any], component: str, folder: Path) -> tuple[Layers, Weights]:
    if note["kind"] != "lora" or note["component"] != component:
        raise PolicyError(
            f"Expected {folder} to hold a LoRA of {component} but it holds the {note['kind']} weights of "
            f"{note['component']}."
        )
    layers: Layers = dict.fromkeys(note["targets"], (note["rank"], note["alpha"]))
    layers |= {name: tuple(pair) for name, pair in note["other_layers"].items()}
    weights = _load(folder / note["weights"], PREFIX.get(note["weights"], f"{component}."))
    return layers, times_scale(weights, layers, -1) if note["weights"] == PORTABLE else weights


def _peft(folder: Path) -> tuple[Layers, Weights]:
    weights, config = _load(folder / PEFT, PREFIX[PEFT]), LoraConfig.from_pretrained(folder)
    layers: Layers = {}
    for name in dict.fromkeys(key.rpartition(".lora_")[0] for key in weights):
        rank = len(weights[f"{name}.lora_A.weight"])
        found = (alpha for part, alpha in config.alpha_pattern.items() if re.match(rf"(.*\.)?({part})$", name))
        alpha = next(found, config.lora_alpha)
        layers[name] = (rank, alpha * math.sqrt(rank) if config.use_rslora else alpha)
    return layers, weights


def _stock(pipe: DiffusionPipeline, component: str, network: nn.Module, file: Path) -> tuple[Layers, Weights]:
    """What the pipeline's own `load_lora_weights` makes of a file, in a network without weights."""
    if any(key.startswith(("text_encoder", "lora_te")) for key in _keys(file)):
        raise PolicyError(
            f"Expected a LoRA of {component} alone but {file} has text encoder weights too: open it with "
            "pipe.load_lora_weights and train a new LoRA on top of it."
        )
    if not is_portable(pipe, component, network):
        raise PolicyError(
            f"Expected a folder of peft's (adapter_config.json), since {type(pipe).__name__} opens no other LoRA of "
            f"its {component}, but got {file}."
        )
    trial, blank = copy.copy(pipe), _blank(network)
    trial.__dict__.update({name: None for name, part in pipe.components.items() if isinstance(part, nn.Module)})
    trial.__dict__[component] = blank
    try:
        with quiet_loading():
            trial.load_lora_weights(file, adapter_name="start")
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise PolicyError(f"Cannot open the LoRA {file}: {' '.join(str(error).split())[:300]}.") from error
    layers = layers_of(blank, "start")
    if not layers:
        raise PolicyError(f"Expected a LoRA of {type(network).__name__} but {file} has no weights for it.")
    return layers, {key: weight.detach().float() for key, weight in adapter_weights(blank, "start").items()}


def _blank(network: Any) -> nn.Module:
    """A network of the same shape whose weights take no memory."""
    with torch.device("meta"):
        blank = type(network).from_config(network.config)
    for module in blank.modules():
        for name, p in module._parameters.items():
            if p is not None:  # peft puts adapters where the weights are, so they must not stay on "meta"
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return blank


def _inputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, "pt") as content:
            keys = list(content.keys())
    except (OSError, SafetensorError) as error:
        raise PolicyError(
            f"Expected a LoRA (a .safetensors file, or a folder with {PORTABLE} or peft's adapter_config.json) but "
            f"{file} cannot be read ({error})."
        ) from error
    variant = next((key for key in keys if any(part in key for part in VARIANTS)), None)
    if variant:
        raise PolicyError(f"Expected plain LoRA weights, A and B alone, but {file} has {variant}.")
    return keys


def _load(file: Path, prefix: str) -> dict[str, Tensor]:
    """Weights of A and B in fp32. Raises PolicyError for a damaged file, and for others among them."""
    keys = {key.removeprefix(prefix) for key in _keys(file)}
    names = {key.rpartition(".lora_")[0] for key in keys}
    if keys != {f"{name}.lora_{which}.weight" for name in names for which in "AB"}:
        raise PolicyError(f"Expected {file} to hold two weights for each layer, A and B, but it does not.")
    return {key.removeprefix(prefix): value.float() for key, value in load_file(file).items()}
