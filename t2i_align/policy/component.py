"""The network of a pipeline that a policy trains."""

from __future__ import annotations

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pag.pag_utils import PAGMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from t2i_align.policy.path import PolicyError, switch_of

DENOISERS = ("unet", "transformer", "denoiser")


def trainable_network(
    pipe: DiffusionPipeline, component: str | None, gradient_checkpointing: bool
) -> tuple[str, nn.Module]:
    """Name and network of a component, by default the denoiser.

    Raises:
        PolicyError: there is no such network, or it cannot be trained as it is.
    """
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    component = component or next((name for name in DENOISERS if name in networks), DENOISERS[0])
    if component not in networks:
        raise PolicyError(f"{type(pipe).__name__} has no network {component!r}; it has {', '.join(networks)}.")
    network = networks[component]
    if is_compiled_module(network):
        raise PolicyError(f"Expected a {component} that is not compiled: call torch.compile after the policy is made.")
    if gradient_checkpointing and not (isinstance(network, ModelMixin) and network._supports_gradient_checkpointing):
        raise PolicyError(f"{type(network).__name__} has no gradient checkpointing: leave it off.")
    if gradient_checkpointing and isinstance(pipe, PAGMixin):  # it changes the attention for the length of a call
        raise PolicyError(f"{type(pipe).__name__} has no gradient checkpointing: leave it off.")
    switch_of(network).refuse_open("a new policy")
    return component, network
