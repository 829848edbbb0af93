"""Opening CLIP checkpoints of open_clip and transformers as towers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_align.rewards import encoders
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import absent_weights
from t2i_align.rewards.tower import CLIP_MEAN, CLIP_STD, TOWERS, Preprocessing, Tower, TowerSpec

SCHEMES = ("local-dir:", "hf-hub:")
WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
CLIP_WORDS = "clip"  # as a tower's processor: `clip_tokenizer`, and pictures as OpenAI's CLIP takes them
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as image processors write them


def missing_weights(repo: str) -> str | None:
    """How to get a transformers checkpoint that is neither a folder nor in the hub's cache, or None if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(repo).is_dir():
        return None
    try:
        if any(isinstance(try_to_load_from_cache(repo, file), str) for file in WEIGHT_FILES):
            return None
    except HFValidationError:
        return f"{repo} is neither a folder nor a hub id."
    return absent_weights(f"hf download {repo}")


def load_tower(spec: TowerSpec) -> Tower:
    """The tower of a spec, fp32 on the CPU: read from disk unless a scorer already uses it.

    Raises:
        RewardError: weights that are missing or cannot be read, or an activation that is not theirs.
    """
    cached = (spec, torch.device("cpu"), torch.float32)
    tower = TOWERS.get(cached)
    if tower is None:
        tower = TOWERS[cached] = _open(spec)
    return tower


def _open(spec: TowerSpec) -> Tower:
    is_open_clip = spec.name.startswith(SCHEMES) or bool(spec.weights)
    if not is_open_clip and (missing := missing_weights(spec.name)):
        raise RewardError(f"Cannot open the CLIP {spec.name!r}: {missing}")
    try:
        return _open_clip(spec) if is_open_clip else _transformers(spec)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RewardError(f"Cannot open the CLIP {spec.name!r}: {' '.join(str(error).split())}") from error


def _open_clip(spec: TowerSpec) -> Tower:
    import open_clip

    quick = needs_quick_gelu(spec)
    network = open_clip.create_model(
        spec.name, pretrained=spec.weights or None, force_quick_gelu=quick, require_pretrained=True
    )
    tokenise = open_clip.get_tokenizer(spec.name)
    words = tokenise.encode if isinstance(tokenise, open_clip.SimpleTokenizer) else None

    def length(text: str) -> int:
        return len(tokenise.tokenizer(text).input_ids) if words is None else len(words(text)) + 2

    how = network.visual.preprocess_cfg
    size, fill = how["size"], how["fill_color"]
    preprocessing = Preprocessing(
        (size, size) if isinstance(size, int) else tuple(size),
        tuple(how["mean"]),
        tuple(how["std"]),
        how["resize_mode"],
        how["interpolation"],
        (fill if isinstance(fill, int) else fill[0]) / 255,
    )
    return Tower(
        spec, network, spec.preprocessing or preprocessing, encoders.open_clip_image, encoders.open_clip_text, tokenise,
        length,
    )  # fmt: skip


def needs_quick_gelu(spec: TowerSpec) -> bool:
    """Whether weights of open_clip's table were trained with x * sigmoid(1.702 x), as OpenAI's were.

    open_clip builds exact GELU for its plain model names and only warns; the features would be wrong.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    trained = get_pretrained_cfg(spec.name, spec.weights)
    if spec.name.startswith(SCHEMES) or not trained:  # the folder's config says it; of a file only the user knows
        return False
    built = (open_clip.get_model_config(spec.name) or {}).get("quick_gelu", False)
    if built and not trained.get("quick_gelu", False):
        raise RewardError(
            f"The weights {spec.weights!r} were trained with GELU but {spec.name!r} is built with QuickGELU; use the "
            "name without -quickgelu."
        )
    return trained.get("quick_gelu", False)


def _transformers(spec: TowerSpec) -> Tower:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    processor = spec.processor or spec.name
    network = CLIPModel.from_pretrained(spec.name, local_files_only=True)
    for part in (network.config.text_config, network.config.vision_config):
        if spec.name.startswith("openai/") and part.hidden_act != "quick_gelu":
            raise RewardError(f"The weights {spec.name!r} need quick_gelu but their config says {part.hidden_act!r}.")
    own = spec.processor == CLIP_WORDS
    tokeniser = clip_tokenizer() if own else AutoTokenizer.from_pretrained(processor, local_files_only=True)
    context = network.config.text_config.max_position_embeddings

    def tokenise(texts: list[str]) -> Tensor:
        options = {"padding": "max_length", "max_length": context, "truncation": True, "return_tensors": "pt"}
        return tokeniser(texts, **options).input_ids

    def length(text: str) -> int:
        return len(tokeniser(text, verbose=False).input_ids)  # the tower warns itself

    side = network.config.vision_config.image_size
    published = Preprocessing((side, side), CLIP_MEAN, CLIP_STD, floor_crop=True)
    if spec.preprocessing is not None:
        preprocessing = spec.preprocessing
    else:
        preprocessing = published if own else _read_processor(CLIPImageProcessor.from_pretrained(processor))
    encode = encoders.transformers_image, encoders.transformers_text
    return Tower(spec, network, preprocessing, *encode, tokenise, length)


@lru_cache(1)
def clip_tokenizer() -> Any:
    """The CLIP tokenizer of transformers with the vocabulary of OpenAI's and LAION's CLIPs, which open_clip carries.

    Context 77, padded with the end token, as the published repositories configure it.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = dict(words.encoder)
    vocabulary[start], vocabulary[end] = (vocabulary.pop(name) for name in ("<start_of_text>", "<end_of_text>"))
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(words.bpe_ranks), bos_token=start, eos_token=end, pad_token=end, unk_token=end,
        model_max_length=77,
    )  # fmt: skip


def _read_processor(processor: Any) -> Preprocessing:
    crop, shortest = processor.crop_size, processor.size["shortest_edge"]
    if not processor.do_center_crop or shortest != crop["height"] or shortest != crop["width"]:
        raise RewardError(
            f"Expected an image processor that resizes the shortest side and crops to the same size but got "
            f"{processor.size} and {crop}; pass a `preprocessing`."
        )
    return Preprocessing(
        (crop["height"], crop["width"]), tuple(processor.image_mean), tuple(processor.image_std), "shortest",
        RESAMPLE[int(processor.resample)], floor_crop=True,
    )  # fmt: skip
