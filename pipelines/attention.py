"""Attention back-ends: switched on the denoiser, and checked that the switch took.

diffusers has two mechanisms. Newer networks send every attention through a dispatcher whose back-end each processor
names; `set_attention_backend` sets it, and says nothing where no processor has one (SD 1.x, SDXL, SD3, PixArt, Sana,
Lumina2, ...). Of those older ones some can be given xformers processors instead.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from t2i_align.config import nearest
from t2i_align.pipelines.models import PipelineError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin

# back-end without its `_varlen` and `_hub` endings -> the package it calls and how to get it
PACKAGES = {
    "xformers": ("xformers", "pip install 't2i-align[xformers]'"),
    "flash": ("flash_attn", "pip install flash-attn"),
    "sage": ("sageattention", "pip install sageattention"),
}
HUB_KERNELS = ("kernels", "pip install kernels")
# Processors that `enable_xformers_memory_efficient_attention` replaces by an equal; others it replaces by a wrong one.
XFORMERS = {"AttnProcessor2_0": "XFormersAttnProcessor", "JointAttnProcessor2_0": "XFormersJointAttnProcessor"}


def check_attention(name: str, device: torch.device) -> None:
    """Refuse an unknown back-end, and one whose package or device is not here, before anything is loaded.

    Raises:
        PipelineError: with the back-ends there are.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if name not in known:
        shown = ", ".join(sorted(backend for backend in known if not backend.startswith("_")))
        raise PipelineError(f"Unknown attention {name!r}.{nearest(name, known)} Available: {shown}.")
    package = HUB_KERNELS if name.endswith("_hub") else PACKAGES.get(name.removesuffix("_varlen"))
    if package is None:
        return
    if device.type != "cuda":
        raise PipelineError(f"Expected a GPU for attention={name!r} but got the device {str(device)!r}.")
    if find_spec(package[0]) is None:
        raise PipelineError(f"attention={name!r} needs {package[0]}: `{package[1]}`.")


def set_attention(pipe: DiffusionPipeline, name: str) -> None:
    """Switch a pipeline's denoiser (and its ControlNets) to a back-end; other pipelines keep theirs.

    Raises:
        PipelineError: a network that cannot be switched to it, or that did not change when it was.
    """
    from diffusers import ModelMixin

    networks = [
        net
        for part, net in pipe.components.items()
        if isinstance(net, ModelMixin) and part != "vae" and _processors(net)
    ]
    if not networks:
        raise PipelineError(f"{type(pipe).__name__} has no network whose attention could be switched to {name!r}.")
    for net in networks:
        _switch(net, name)


def _switch(net: ModelMixin, name: str) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    before = {type(processor).__name__ for processor in _processors(net)}
    try:
        if any(_dispatches(processor) for processor in _processors(net)):
            with attention_backend("native"):  # the switch also sets the process-wide default; leaving puts it back
                net.set_attention_backend(name)
            done = all(p._attention_backend == name for p in _processors(net) if _dispatches(p))
        elif name == "native":
            done = not any(kind.startswith("XFormers") for kind in before)  # the others call PyTorch's own attention
        elif name == "xformers" and before <= set(XFORMERS):
            net.enable_xformers_memory_efficient_attention()
            done = {type(processor).__name__ for processor in _processors(net)} == {XFORMERS[kind] for kind in before}
        else:
            choices = "native or xformers" if before <= set(XFORMERS) else "native"
            raise PipelineError(
                f"Expected attention={choices} for {type(net).__name__} ({', '.join(sorted(before))}) but got {name!r}."
            )
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise PipelineError(f"attention={name!r} cannot be used here: {' '.join(str(error).split())}.") from error
    if not done:
        raise PipelineError(f"{type(net).__name__} did not change when its attention was switched to {name!r}.")


def _processors(net: ModelMixin) -> list[Any]:
    """The processor of every attention of a network."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    modules = [module for module in net.modules() if isinstance(module, (Attention, AttentionModuleMixin))]
    return [module.processor for module in modules if module.processor is not None]


def _dispatches(processor: Any) -> bool:
    """Whether a processor names the back-end of its attention."""
    return hasattr(processor, "_attention_backend")
