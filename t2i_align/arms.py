"""A pipeline as base and as tuned model: trained weights put into it for a comparison, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from t2i_align.policy import Policy


@contextmanager
def arms(pipe: DiffusionPipeline, lora: str | Path | None) -> Iterator[dict[str, AbstractContextManager[None]]]:
    """The contexts in which a pipeline is the base and, with a LoRA, the tuned model; then it is as it was."""
    if lora is None:
        yield {"base": nullcontext()}
        return
    flags = [(p, p.requires_grad) for p in parameters(pipe)]
    policy = open_policy(pipe, Path(lora))
    try:
        yield {"base": policy.reference(), "tuned": nullcontext()}
    finally:
        remove_policy(policy)
        for p, flag in flags:
            p.requires_grad_(flag)


def parameters(pipe: DiffusionPipeline) -> Iterator[torch.nn.Parameter]:
    """Of all networks of a pipeline."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            yield from part.parameters()


def open_policy(pipe: DiffusionPipeline, folder: Path) -> Policy:
    """A trained policy, or a LoRA of any origin."""
    from t2i_align.policy import Policy
    from t2i_align.policy.artefacts import NOTE

    return Policy.load(pipe, folder) if (folder / NOTE).is_file() else Policy.lora(pipe, start=folder)


def remove_policy(policy: Policy) -> None:
    """Leave the pipeline of a policy as it was before."""
    from diffusers.utils.peft_utils import delete_adapter_layers

    from t2i_align.policy.full import FullWeights
    from t2i_align.policy.lora import adapter_names
    from t2i_align.policy.path import exchange

    network: Any = policy.network
    if isinstance(policy.weights, FullWeights):
        with torch.no_grad():
            for p in policy.trainable():
                p.copy_(policy.weights.start[id(p)])
        return
    for name in policy.adapters.names:
        delete_adapter_layers(network, name)
        if name in adapter_names(network):  # it forgets the names for diffusers' own networks alone
            network.peft_config.pop(name)
    exchange(policy.adapters.path(policy.adapters.below))
