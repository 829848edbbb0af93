"""BLIP reward networks (Li et al., arXiv 2201.12086): a prompt reads the picture, a head reads its first token.

    score = head(BERT([CLS] prompt [SEP]; ViT(picture))[0])

ViT-L/16 at 224 pixels and BERT-base with cross-attention in every layer, of transformers, under the names of the
published state dicts (`blip.visual_encoder.*`, `blip.text_encoder.*`, `mlp.layers.*`). Every size is read off the
tensors; attention heads are 64 wide. The text starts with [CLS], not with [ENC] as in BLIP's own matching head, and is
read in both directions.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from t2i_align.rewards.assemble import assemble
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights, read_weights
from t2i_align.rewards.pillow import center_crop, pillow_resize, shortest_side

VOCABULARY = WeightFile(
    "vocab.txt", "google-bert/bert-base-uncased", revision="86b5e0934494bd15c9632b12f734a8a67f723594"
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
HEAD_WIDTH = 64
Head = Callable[[int], nn.Sequential]  # from BERT's width
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\..*|blip\.text_encoder\.embeddings\.position_ids")

# published name -> transformers' name
VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
    (r"blocks\.(\d+)\.attn\.qkv", r"encoder.layers.\1.self_attn.qkv"),
    (r"blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.projection"),
    (r"blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
    (r"norm", "post_layernorm"),
)


class Blip(nn.Module):
    """Picture and prompt -> (B,).

    Args:
        state: tensors of a published file, under its names.
        head: class of the head, made from BERT's width.
        vocabulary: BERT's vocab.txt.
        context: tokens of a prompt, start and end included.
        what: the network is, for messages.

    Raises:
        RewardError: tensors that are missing, too many or of another shape, or a vocabulary of another size.
    """

    def __init__(self, state: Mapping[str, Tensor], head: Head, vocabulary: Path, context: int, what: str) -> None:
        super().__init__()
        own = {_rename(name): value for name, value in state.items() if not UNUSED.fullmatch(name)}
        sizes = _sizes(own, what)
        self.context, self.preprocessing = context, Middle(sizes["image_size"])
        network = assemble(lambda: _Parts(sizes, head), own, what, torch.float32)
        self.vision, self.text, self.head = network.vision, network.text, network.head
        self.tokenise = _tokeniser(vocabulary)
        rows = self.text.config.vocab_size
        if len(self.tokenise) > rows:
            raise RewardError(
                f"Expected a vocabulary of at most {rows} tokens but {vocabulary} has {len(self.tokenise)}."
            )

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) fp32."""
        pixels = self.pixels(images).to(next(self.head.parameters()).dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state  # (B, patches + 1, width)
        tokens = self.tokens(prompts).to(images.device)
        read = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            is_decoder=False,  # the configuration says True, or there would be no cross-attention
        ).last_hidden_state
        return self.head(read[:, 0]).squeeze(1).float()

    def pixels(self, images: Tensor) -> Tensor:
        """CLIP's preprocessing on Pillow's picture."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
        return (self.preprocessing.fit(images) - mean) / std

    def tokens(self, prompts: Sequence[str]) -> Any:
        """Token ids and mask, padded to the longest; warns of prompts that are cut."""
        for prompt in dict.fromkeys(prompts):
            if len(self.tokenise(prompt, verbose=False).input_ids) > self.context:
                warnings.warn(f"Only the first {self.context} tokens of {prompt!r:.80} are read.", stacklevel=2)
        return self.tokenise(list(prompts), padding=True, truncation=True, max_length=self.context, return_tensors="pt")


class Middle(NamedTuple):
    """The middle of a picture whose shortest side is resized, all in 8 bits."""

    size: int

    def fit(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
        resized = pillow_resize(images, shortest_side(images.shape[-2], images.shape[-1], self.size))
        return center_crop(resized, self.size)


class _Parts(nn.Module):
    """The network as `assemble` makes it."""

    def __init__(self, sizes: Mapping[str, int], head: Head) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=sizes["vision_width"],
                intermediate_size=sizes["vision_hidden"],
                num_hidden_layers=sizes["vision_layers"],
                num_attention_heads=sizes["vision_width"] // HEAD_WIDTH,
                image_size=sizes["image_size"],
                patch_size=sizes["patch_size"],
                layer_norm_eps=1e-6,  # transformers' default is 1e-5
            )
        )
        text = BlipTextConfig(
            vocab_size=sizes["words"],
            hidden_size=sizes["text_width"],
            encoder_hidden_size=sizes["vision_width"],
            intermediate_size=sizes["text_hidden"],
            num_hidden_layers=sizes["text_layers"],
            num_attention_heads=sizes["text_width"] // HEAD_WIDTH,
            max_position_embeddings=sizes["positions"],
            bos_token_id=None,
            is_decoder=True,  # cross-attention is built for decoders alone
        )
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = head(sizes["text_width"])


def load_blip(weights: str, vocabulary: str, published: WeightFile, head: Head, context: int, name: str) -> Blip:
    """The network of a scorer; both files are looked for before either is read.

    Args:
        weights: file, folder, or "" for the hub's cache.
        vocabulary: likewise; a folder of weights may hold it, too.
        published: the weights' hub file.
        head: class of the head.
        context: tokens of a prompt.
        name: of the scorer.

    Raises:
        RewardError: a file is missing, or is not what it should be.
    """
    beside = weights if not vocabulary and weights and (Path(weights) / VOCABULARY.file).is_file() else vocabulary
    file, words = find_weights(weights, published, name), find_weights(beside, VOCABULARY, name)
    return Blip(read_weights(file), head, words, context, name)


def _rename(name: str) -> str:
    part, _, rest = name.removeprefix("blip.").partition(".")
    if part == "visual_encoder":
        for old, new in VISION:
            if re.match(old, rest):
                return f"vision.{re.sub(f'^{old}', new, rest)}"
    if part == "text_encoder":
        return f"text.{rest}"
    if name.startswith("mlp.layers."):
        return f"head.{name.removeprefix('mlp.layers.')}"
    return name


def _sizes(state: Mapping[str, Tensor], what: str) -> dict[str, int]:
    """The architecture, read off the tensors."""
    try:
        patch = state["vision.embeddings.patch_embedding.weight"]
        places = state["vision.embeddings.position_embedding"].shape[1] - 1
        words = state["text.embeddings.word_embeddings.weight"]
        return {
            "vision_width": patch.shape[0],
            "patch_size": patch.shape[-1],
            "image_size": round(places**0.5) * patch.shape[-1],
            "vision_hidden": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "vision_layers": _layers(state, r"vision\.encoder\.layers\.(\d+)\."),
            "words": words.shape[0],
            "text_width": words.shape[1],
            "text_hidden": state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "text_layers": _layers(state, r"text\.encoder\.layer\.(\d+)\."),
            "positions": state["text.embeddings.position_embeddings.weight"].shape[0],
        }
    except KeyError as error:
        raise RewardError(f"These are not the weights of {what}: missing {error.args[0]}.") from error


def _layers(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for name in state if (found := re.match(pattern, name)))


def _tokeniser(vocabulary: Path) -> Any:
    from transformers import BertTokenizer

    words = vocabulary.read_text(encoding="utf-8").splitlines()
    made = BertTokenizer(vocab={word: row for row, word in enumerate(words)}, do_lower_case=True)
    made.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return made
