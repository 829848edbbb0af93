"""What may be laid over a pipeline as it is opened: another autoencoder, LoRAs, 4-bit weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from t2i_align.pipelines.hub import absent, fetch, is_hub_id, offline, snapshot
from t2i_align.pipelines.models import PipelineError
from t2i_align.pipelines.weights import pickled, read_index

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin, PipelineQuantizationConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
QUANTIZE = ("4bit",)


class Lora(NamedTuple):
    """A LoRA and the weight it is added with."""

    source: str
    weight: float = 1.0


def read_loras(lora: Any) -> list[Lora]:
    """One LoRA or several, each a path or hub id, or a pair (path or hub id, weight) -> a list of pairs.

    Raises:
        PipelineError: anything else.
    """
    if lora is None:
        return []
    several = isinstance(lora, Sequence) and not isinstance(lora, str) and not _is_pair(lora)
    loras = []
    for one in lora if several else [lora]:
        if isinstance(one, (str, Path)):
            loras.append(Lora(str(one)))
        elif _is_pair(one) and math.isfinite(one[1]):
            loras.append(Lora(str(one[0]), float(one[1])))
        else:
            raise PipelineError(f"Expected a LoRA as a path, a hub id, or a pair of one and a weight but got {one!r}.")
    return loras


def find_lora(source: str, local_files_only: bool) -> Path:
    """The file of a LoRA, downloaded if it must be.

    Raises:
        PipelineError: no such file, folder or repository, or one without a LoRA in safetensors.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise PipelineError(f"Expected a LoRA in safetensors but got {path}; pickled weights are never opened.")
        return path
    if path.is_dir():
        return _lora_in(path)
    if not is_hub_id(source):
        raise PipelineError(f"There is no LoRA {source}: expected a .safetensors file, a folder with one, or a hub id.")
    folder = snapshot(source)
    if folder is None or not any(folder.glob("*.safetensors")):
        why = offline(local_files_only)
        if why:
            raise absent(source, why)
        from huggingface_hub import snapshot_download

        folder = fetch(source, None, lambda _: snapshot_download(source, allow_patterns="*.safetensors"))
    return _lora_in(folder)


def _lora_in(folder: Path) -> Path:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if LORA_FILE in files:
        return folder / LORA_FILE
    if len(files) == 1:
        return folder / files[0]
    found = f"several ({', '.join(files)}): name the file" if files else "none"
    run = f": of a run take {folder / 'lora'}" if (folder / "lora").is_dir() else ""
    raise PipelineError(f"Expected {LORA_FILE} or a single .safetensors file in {folder} but found {found}{run}.")


def check_takes_lora(kind: type[DiffusionPipeline] | None, folder: Path) -> None:
    """Refuse LoRAs for a pipeline without `load_lora_weights`, before its weights are read.

    Raises:
        PipelineError: such a pipeline.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin

    if kind is None or not issubclass(kind, LoraBaseMixin):
        name = kind.__name__ if kind else f"the class of {folder}"
        raise PipelineError(f"{name} has no load_lora_weights, so it takes no LoRA files.")


def add_loras(pipe: DiffusionPipeline, files: Sequence[tuple[Path, float]]) -> None:
    """Load LoRAs as adapters `lora_0`, `lora_1`, ... and switch all of them on with their weights.

    Raises:
        PipelineError: a file that holds no LoRA for this pipeline.
    """
    names = [f"lora_{index}" for index in range(len(files))]
    for name, (file, _) in zip(names, files, strict=True):
        try:
            with quiet_loading():
                pipe.load_lora_weights(str(file), adapter_name=name, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, IndexError) as error:
            raise PipelineError(f"Cannot load the LoRA {file}: {' '.join(str(error).split())[:300]}.") from error
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise PipelineError(f"{file} holds no LoRA for {type(pipe).__name__}: no weight of it fits.")
    if names:
        pipe.set_adapters(names, [weight for _, weight in files])


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without diffusers' log of errors that are raised too, and of text encoders that a LoRA leaves alone."""

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR and not record.getMessage().startswith("No LoRA keys associated to")

    loggers = [logging.getLogger(f"diffusers.loaders.{name}") for name in ("peft", "lora_base")]
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(passes)


def find_vae(source: str | Path, local_files_only: bool) -> Path:
    """The folder of an autoencoder: its own, or the `vae` of a pipeline; downloaded if it must be.

    Raises:
        PipelineError: no such folder or repository, or no autoencoder in safetensors there.
    """
    path = Path(source)
    if path.is_dir():
        return _vae_in(path) or _no_vae(path)
    repo = str(source)
    if not is_hub_id(repo):
        raise PipelineError(f"There is no autoencoder {repo}: expected a folder of one, a pipeline folder or a hub id.")
    folder = snapshot(repo)
    found = _vae_in(folder) if folder else None
    if found is None:
        why = offline(local_files_only)
        if why:
            raise absent(repo, why)
        from huggingface_hub import snapshot_download

        wanted = [*VAE_FILES, *(f"vae/{file}" for file in VAE_FILES)]
        folder = fetch(repo, None, lambda _: snapshot_download(repo, allow_patterns=wanted))
        found = _vae_in(folder) or _no_vae(folder)
    return found


def _vae_in(folder: Path) -> Path | None:
    places = (folder / "vae", folder)
    return next((place for place in places if all((place / file).is_file() for file in VAE_FILES)), None)


def _no_vae(folder: Path) -> Path:
    place = folder / "vae" if (folder / "vae").is_dir() else folder
    if (place / "diffusion_pytorch_model.bin").is_file():
        raise pickled(f"The autoencoder {place}", folder)
    raise PipelineError(f"Expected an autoencoder ({' and '.join(VAE_FILES)}) in {place}.")


def open_vae(vae: Any, folder: Path, dtype: torch.dtype) -> ModelMixin:
    """The autoencoder to use in a pipeline folder's place of its own; read from a folder, or as it was given.

    Raises:
        PipelineError: a pipeline without an autoencoder, one of another number of latent channels, or no autoencoder.
    """
    if "vae" not in read_index(folder):
        raise PipelineError(f"The pipeline {folder} has no autoencoder that could be replaced.")
    return open_autoencoder(vae, _config(folder / "vae").get("latent_channels"), dtype)


def open_autoencoder(vae: Any, channels: int | None, dtype: torch.dtype) -> ModelMixin:
    """An autoencoder from its folder, or as it was given.

    Raises:
        PipelineError: another number of latent channels than `channels`, or no autoencoder.
    """
    from diffusers import AutoModel, ModelMixin
    from safetensors import SafetensorError

    if not isinstance(vae, (Path, ModelMixin)):
        raise PipelineError(f"Expected vae to be a folder, a hub id or a diffusers autoencoder but got {vae!r:.80}.")
    config = vae.config if isinstance(vae, ModelMixin) else _config(vae)
    if config.get("latent_channels") != channels:
        found = f"{type(vae).__name__ if isinstance(vae, ModelMixin) else vae} has {config.get('latent_channels')}"
        raise PipelineError(f"Expected an autoencoder of {channels} latent channels but {found}.")
    if isinstance(vae, ModelMixin):
        return vae
    try:
        return AutoModel.from_pretrained(str(vae), dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PipelineError(f"Cannot open the autoencoder {vae}: {' '.join(str(error).split())}.") from error


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def check_quantize(quantize: str, device: torch.device) -> None:
    """Refuse 4-bit weights where they cannot be had, before anything is loaded.

    Raises:
        PipelineError: an unknown kind, no GPU, or no bitsandbytes.
    """
    if quantize not in QUANTIZE:
        raise PipelineError(f"Unknown quantize {quantize!r}. Available: {', '.join(QUANTIZE)}.")
    if device.type != "cuda":
        raise PipelineError(f"quantize={quantize!r} needs a GPU but the device is {str(device)!r}.")
    if find_spec("bitsandbytes") is None:
        raise PipelineError(f"quantize={quantize!r} needs bitsandbytes: `pip install 't2i-align[bnb]'`.")


def quantization(folder: Path, dtype: torch.dtype) -> PipelineQuantizationConfig:
    """4-bit NF4 (QLoRA, arXiv 2305.14314) for the denoisers and the large text encoders of a pipeline.

    Autoencoders and CLIP stay as they are: they are small, and lose more.
    """
    import diffusers
    import transformers

    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    mapping: dict[str, Any] = {}
    for name, kind in read_index(folder).items():
        library, made = kind if isinstance(kind, list) else ("", "")
        if name.startswith(("transformer", "unet")):
            mapping[name] = diffusers.BitsAndBytesConfig(**options)
        elif library == "transformers" and name.startswith("text_encoder") and not made.startswith("CLIP"):
            mapping[name] = transformers.BitsAndBytesConfig(**options)
    return diffusers.PipelineQuantizationConfig(quant_mapping=mapping)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and isinstance(value[0], (str, Path))
        and isinstance(value[1], (int, float))
    )
