"""Alias, hub id, folder or object -> a diffusers pipeline."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.pipelines import hub, parts
from t2i_align.pipelines.attention import check_attention, set_attention
from t2i_align.pipelines.catalog import (
    ALIASES,
    WEIGHTS,
    call_defaults,
    call_keywords,
    card_of,
    check_call,
    check_pipeline,
    find_pipeline,
    pipeline_class,
    place_of,
)
from t2i_align.pipelines.models import PipelineError, find_model
from t2i_align.pipelines.weights import INDEX, choose_variant, pickled, shown_variants, variant_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = [
    "ALIASES",
    "WEIGHTS",
    "PipelineError",
    "call_defaults",
    "call_keywords",
    "card_of",
    "check_call",
    "check_pipeline",
    "default_dtype",
    "find_pipeline",
    "load_pipeline",
    "preview_pipeline",
]
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OFFLOAD = ("model", "sequential")


def load_pipeline(
    pipeline: str | Path | DiffusionPipeline,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    offload: str | None = None,
    vae_slicing: bool = False,
    vae_tiling: bool = False,
    vae: Any = None,
    lora: Any = None,
    quantize: str | None = None,
    attention: str | None = None,
    channels_last: bool = False,
    in_memory: bool = False,
    local_files_only: bool = False,
) -> DiffusionPipeline:
    """Open a text-to-image pipeline; weights are read from safetensors only.

    Args:
        pipeline: an alias (`tiny-sd`, `sdxl-turbo`), a hub id, a folder that diffusers wrote, or a pipeline, which is
            returned as it is. Hub ids come from the local cache, else from the hub.
        device: where its networks go.
        dtype: their number type (fp32, bf16, fp16); see `default_dtype`.
        variant: of the weight files (`fp16`); by default what suits `dtype` and is there.
        revision: branch, tag or commit of a hub id.
        offload: `model` or `sequential`: weights stay in main memory and visit the accelerator when they are called.
        vae_slicing: decode a batch image by image.
        vae_tiling: decode large images in tiles.
        vae: another autoencoder: a folder, a hub id or the module. SDXL in fp16 gets one that does not overflow.
        lora: a path or hub id, or a pair (path or hub id, weight), or a list of these, which add up.
        quantize: `4bit` for 4-bit denoisers and large text encoders by bitsandbytes.
        attention: back-end of the denoiser's attention: `native`, `xformers`, `flash`, ...
        channels_last: lay convolutions out so that they are a quarter faster on a CPU; pictures change by rounding.
        in_memory: leave its networks in main memory; the caller moves them to `device`.
        local_files_only: leave the network alone.

    Raises:
        PipelineError: unknown, without weights, or an option it cannot serve; raised before weights are read where
            that can be told.
    """
    import torch
    from diffusers import DiffusionPipeline

    from t2i_align.devices import resolve_device

    if isinstance(pipeline, DiffusionPipeline):
        given = {"dtype": dtype, "variant": variant, "revision": revision, "offload": offload, "vae": vae, "lora": lora}
        given |= {"vae_slicing": vae_slicing, "vae_tiling": vae_tiling, "quantize": quantize, "attention": attention}
        given |= {"channels_last": channels_last, "in_memory": in_memory}
        if laid := [name for name, value in given.items() if value]:
            raise PipelineError(f"Expected {', '.join(laid)} for a pipeline to open but got one that is already open.")
        return pipeline
    if not isinstance(pipeline, (str, Path)):
        raise PipelineError(
            f"Expected a pipeline to be an alias, a hub id, a folder or a DiffusionPipeline but got {pipeline!r:.80}."
        )
    place, target = place_of(pipeline), resolve_device(str(device))
    number = _dtype(dtype or default_dtype(pipeline, target.type))
    _check_options(target, offload, quantize, attention)
    loras = [(parts.find_lora(one.source, local_files_only), one.weight) for one in parts.read_loras(lora)]
    vae = _find_vae(pipeline, vae, number, local_files_only)
    skip = () if vae is None else ("vae",)
    preferred = _preferred_variant(pipeline, number)
    folder, variant = _fetch(place, revision, variant, preferred, skip, local_files_only)
    if loras:
        parts.check_takes_lora(pipeline_class(folder), folder)
    replaced = {} if vae is None else {"vae": parts.open_vae(vae, folder, number)}
    if quantize:
        replaced["quantization_config"] = parts.quantization(folder, number)
    loaded = _open(folder, dtype=number, variant=variant, **replaced)
    if isinstance(place, str):
        loaded.register_to_config(_name_or_path=place)  # as `from_pretrained` does; call settings go by it
    if vae is None and _overflows(pipeline, number):
        loaded.vae.register_to_config(force_upcast=True)  # the pipeline then decodes in fp32
    parts.add_loras(loaded, loras)
    if attention:
        set_attention(loaded, attention)
    if channels_last:
        for part in loaded.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(memory_format=torch.channels_last)
    return _settle(loaded, torch.device("cpu") if in_memory else target, offload, vae_slicing, vae_tiling)


def preview_pipeline(pipe: DiffusionPipeline, decoder: Any, local_files_only: bool = False) -> DiffusionPipeline:
    """A copy of an open pipeline, its networks shared, that decodes by another, smaller autoencoder.

    Args:
        pipe: left as it is.
        decoder: a folder or hub id of a diffusers autoencoder, such as `madebyollin/taesd` (an `AutoencoderTiny`
            trained on SD 1.x latents; each latent space has its own), or the module.
        local_files_only: leave the network alone.

    Raises:
        PipelineError: a pipeline without an autoencoder, no such autoencoder, or one of other latents.
    """
    own = getattr(pipe, "vae", None)
    if own is None:
        raise PipelineError(f"{type(pipe).__name__} has no autoencoder, so that no other can decode its latents.")
    source = parts.find_vae(decoder, local_files_only) if isinstance(decoder, (str, Path)) else decoder
    small = parts.open_autoencoder(source, own.config.get("latent_channels"), own.dtype)
    made = copy.copy(pipe)
    made.__dict__["vae"] = small.to(pipe._execution_device).eval().requires_grad_(False)
    return made


def default_dtype(pipeline: str | Path, device_type: str) -> str:
    """The number type that the table of models says on an accelerator; fp32 elsewhere and for any other pipeline."""
    model = find_model(str(pipeline))
    return "fp32" if model is None or device_type == "cpu" else model.dtype


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    for short, name in DTYPES.items():
        number = getattr(torch, name)
        if dtype in (short, number):
            return number
    raise PipelineError(f"Unknown dtype {dtype!r}. Available: {', '.join(DTYPES)}.")


def _check_options(target: torch.device, offload: str | None, quantize: str | None, attention: str | None) -> None:
    """Refuse what this machine cannot do."""
    if offload is not None:
        if offload not in OFFLOAD:
            raise PipelineError(f"Unknown offload {offload!r}. Available: {', '.join(OFFLOAD)}.")
        if target.type == "cpu":
            raise PipelineError(f"offload={offload!r} needs an accelerator but the device is {str(target)!r}.")
    if quantize is not None:
        parts.check_quantize(quantize, target)
    if attention is not None:
        check_attention(attention, target)


def _overflows(pipeline: str | Path, number: torch.dtype) -> str | None:
    """The autoencoder to take instead of one whose activations do not fit into the number type."""
    model = find_model(str(pipeline))
    return model.vae if model is not None and number == _dtype("fp16") else None


def _find_vae(pipeline: str | Path, vae: Any, number: torch.dtype, local_files_only: bool) -> Any:
    """The folder of the autoencoder to lay over a pipeline, the module that was given, or None."""
    if isinstance(vae, (str, Path)):
        return parts.find_vae(vae, local_files_only)
    safe = _overflows(pipeline, number)
    if vae is not None or safe is None:
        return vae
    try:
        return parts.find_vae(safe, local_files_only)
    except PipelineError as error:
        warnings.warn(
            f"The autoencoder of {pipeline} overflows in fp16, and one that does not is missing, so images are decoded "
            f"in fp32, which takes more memory: {error}",
            stacklevel=3,
        )
        return None


def _preferred_variant(pipeline: str | Path, number: torch.dtype) -> str | None:
    """The weight files made for a number type, where the table of models knows them."""
    model = find_model(str(pipeline))
    return model.variant if model is not None and number == _dtype(model.dtype) else None


def _fetch(
    place: Path | str,
    revision: str | None,
    variant: str | None,
    preferred: str | None,
    skip: Collection[str],
    local_files_only: bool,
) -> tuple[Path, str | None]:
    """The folder of a pipeline, downloaded if it must be, and the variant of its weights."""
    if isinstance(place, Path):
        if revision is not None:
            raise PipelineError(f"Expected a hub id for the revision {revision!r} but got the folder {place}.")
        return place, choose_variant(place, variant, preferred, skip)
    why, folder = hub.offline(local_files_only), hub.snapshot(place, revision)
    if folder is not None and (folder / INDEX).is_file():
        try:
            return folder, choose_variant(folder, variant, preferred, skip)
        except PipelineError:  # part of it was downloaded
            if why:
                raise
    elif why:
        raise hub.absent(place, why)
    folder = hub.fetch(place, revision, lambda files: _download(place, revision, variant, preferred, files))
    return folder, choose_variant(folder, variant, preferred, skip)


def _download(
    repo: str, revision: str | None, variant: str | None, preferred: str | None, files: Collection[str]
) -> str | Path:
    from diffusers import DiffusionPipeline

    there = {variant_of(Path(file).name) for file in files if file.endswith(".safetensors")}
    if variant is not None and variant not in there:
        raise PipelineError(f"{repo} has no weights of the variant {variant!r}; it has {shown_variants(there)}.")
    wanted = variant or (preferred if preferred in there else None)
    try:
        return DiffusionPipeline.download(repo, revision=revision, variant=wanted, use_safetensors=True)
    except OSError as error:
        if "necessary `safetensors` weights" in str(error):
            raise pickled(repo, repo) from error
        raise


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of the libraries: they would draw over ours."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = [bar for bar in (diffusers_logging, transformers_logging) if bar.is_progress_bar_enabled()]
    for bar in bars:
        bar.disable_progress_bar()
    try:
        yield
    finally:
        for bar in bars:
            bar.enable_progress_bar()


def _open(folder: Path, **options: Any) -> DiffusionPipeline:
    """Read the weights."""
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    with _no_bars():
        try:
            loaded = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
        except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
            raise PipelineError(f"Cannot open the pipeline {folder}: {' '.join(str(error).split())}.") from error
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _settle(
    pipe: DiffusionPipeline, target: torch.device, offload: str | None, slicing: bool, tiling: bool
) -> DiffusionPipeline:
    """Put a pipeline where it works."""
    try:
        if slicing:
            pipe.vae.enable_slicing()
        if tiling:
            pipe.vae.enable_tiling()
        if offload == "model":
            pipe.enable_model_cpu_offload(device=target)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=target)
        else:
            pipe.to(target)
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise PipelineError(f"{type(pipe).__name__} cannot do that: {' '.join(str(error).split())}.") from error
    return pipe
