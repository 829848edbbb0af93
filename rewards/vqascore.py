"""VQAScore (Lin et al., arXiv 2404.01291): how surely CLIP-FlanT5 answers "Yes" to whether a picture shows the prompt.

    s = exp(mean_i log P(label_i | picture, question)),  labels = "Yes", "</s>"

so s = sqrt(P(Yes) P(end | Yes)), about sqrt(P(Yes)). The encoder reads `BEFORE`, the 576 patches of CLIP ViT-L/14 at
336 pixels (last layer but one, through two linear layers), then the question; each of the two texts ends with its own
end token, as published. The picture is padded to a square with CLIP's mean colour.

Departures: gradients reach the pixels (published: none); the number type is an option (published: bfloat16).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from t2i_align.config import nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards.assemble import (
    CHECKPOINTS,
    assemble,
    found_folder,
    missing_folders,
    number_type,
    read_checkpoint,
    weight_file,
)
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.blip import MEAN, STD
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.pillow import pillow_resize

# Lin et al.'s t2v_metrics (Apache-2.0); the system sentence is LLaVA v1's
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
BEFORE = f"{SYSTEM} USER: "
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
AFTER = "\n{} ASSISTANT: "
ANSWER = "Yes"
CONTEXT = 2048  # tokens of both texts, the picture counted as one

Model = Literal["xxl", "xl"]
EYE = "openai/clip-vit-large-patch14-336"


class VQAScore(Scorer):
    """Root of the probability that a picture shows its prompt, by CLIP-FlanT5.

    Args:
        model: `xxl` (11 billion weights) or `xl` (3 billion).
        weights: folder of the checkpoint (config.json and weight files); "" is the hub's cache.
        tokenizer: folder of the FlanT5 tokenizer; "" is the hub's cache.
        vision: folder of the CLIP; "" is the hub's cache.
        dtype: bfloat16 as published, float32 or float16.

    Raises:
        RewardError: an unknown model or dtype, or files that are missing or of another model.
    """

    name = "vqascore"
    differentiable = True
    needs_prompt = True
    range = (0.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "root of a probability"
    source: ClassVar[str] = "zhiqiulin/clip-flant5-xxl"
    summary: ClassVar[str] = "how surely CLIP-FlanT5 says that the picture shows the prompt"
    preprocessing: Padded

    def __init__(
        self, model: Model = "xxl", weights: str = "", tokenizer: str = "", vision: str = "", dtype: str = "bfloat16"
    ) -> None:
        super().__init__()
        if model not in get_args(Model):
            raise RewardError(
                f"Unknown model {model!r} of vqascore.{nearest(model, get_args(Model))} Expected xxl, xl."
            )
        kind = number_type(dtype, self.name)
        given = {"weights": weights, "tokenizer": tokenizer, "vision": vision}
        if missing := missing_folders(_wanted(model), given):
            raise RewardError(f"The scorer {self.name!r} cannot be used: {missing}")
        folders = {part: found_folder(given[part], *files) for part, files in _wanted(model).items()}
        from transformers import AutoTokenizer

        words = AutoTokenizer.from_pretrained(folders["tokenizer"], local_files_only=True)
        self.start = int(words.pad_token_id)  # T5 starts its answers with it
        self.words, self.tokenise = len(words), lambda text: torch.tensor(words(text).input_ids)
        self.network, self.projector, self.eye = _load(folders["weights"], folders["vision"], kind)
        self.preprocessing = Padded(int(self.eye.config.image_size))

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        return missing_folders(_wanted(str(options.get("model", "xxl"))), options)

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        seen = self.projector(self.patches(images))  # (B, 576, d)
        before = self.tokenise(BEFORE).to(images.device)
        after = [self._question(prompt, len(before)).to(images.device) for prompt in prompts.text]
        embed = self.network.get_input_embeddings()
        rows = [torch.cat((embed(before), patch, embed(text))) for patch, text in zip(seen, after, strict=True)]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        labels = self.tokenise(ANSWER).to(images.device).repeat(len(rows), 1)  # (B, 2)
        logits = self.network(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            attention_mask=mask.to(images.device),
            decoder_input_ids=F.pad(labels[:, :-1], (1, 0), value=self.start),
        ).logits[..., : self.words]  # the published code drops the rows that no token has
        return F.log_softmax(logits.float(), -1).gather(2, labels[:, :, None]).squeeze(2).mean(1).exp()

    def patches(self, images: Tensor) -> Tensor:
        """(B, 576, width) features of the patches, of the last layer but one, without the class token."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
        pixels = ((self.preprocessing.fit(images) - mean) / std).to(next(self.projector.parameters()).dtype)
        return self.eye(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    def _question(self, prompt: str, taken: int) -> Tensor:
        tokens = self.tokenise(AFTER.format(QUESTION.format(prompt)))
        left = CONTEXT - taken - 1
        if len(tokens) > left:
            warnings.warn(f"Only the first {left} tokens of the question with {prompt!r:.80} are read.", stacklevel=2)
        return tokens[:left]


class Padded(NamedTuple):
    """The picture as the middle of a square, resized in 8 bits."""

    size: int

    def fit(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
        return pillow_resize(_to_square(images), (self.size, self.size))


def _to_square(images: Tensor) -> Tensor:
    """Centred on CLIP's mean colour, cut to 8 bits."""
    height, width = images.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = torch.tensor([int(255 * level) / 255 for level in MEAN], device=images.device, dtype=images.dtype)
    square = colour[None, :, None, None].repeat(len(images), 1, side, side)
    square[..., top : top + height, left : left + width] = images
    return square


def _wanted(model: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {
        "weights": (f"zhiqiulin/clip-flant5-{model}", CHECKPOINTS),
        "tokenizer": (f"google/flan-t5-{model}", ("spiece.model", "tokenizer.json")),
        "vision": (EYE, CHECKPOINTS),
    }


def _load(folder: Path, vision: Path, dtype: torch.dtype) -> tuple[Any, nn.Sequential, Any]:
    """FlanT5, the projector, and the CLIP, whose weights the checkpoint may hold, too."""
    from transformers import CLIPVisionModel, T5Config, T5ForConditionalGeneration

    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = T5Config(**{name: value for name, value in facts.items() if name not in ("model_type", "torch_dtype")})
    state = {name: value.to(dtype) for name, value in read_checkpoint(weight_file(folder)).items()}
    parts: dict[str, dict[str, Tensor]] = {"": {}, "mm_projector.": {}, "vision_tower.vision_tower.": {}}
    for name, value in state.items():
        part = next((start for start in parts if start and name.startswith(start)), "")
        parts[part][name.removeprefix(part)] = value
    words, seen = parts[""], parts["vision_tower.vision_tower."]
    words.pop("embed_tokens.weight", None)
    words |= {f"{side}.embed_tokens.weight": words["shared.weight"] for side in ("encoder", "decoder")}
    network = assemble(lambda: T5ForConditionalGeneration(config), words, "CLIP-FlanT5", dtype)
    network.set_input_embeddings(network.shared)  # not `tie_weights`, which throws FlanT5's own output matrix away
    eye = CLIPVisionModel.from_pretrained(vision, local_files_only=True, dtype=dtype).eval().requires_grad_(False)
    if seen:
        named = {name.removeprefix("vision_model."): value for name, value in seen.items()}
        named.pop("embeddings.position_ids", None)
        eye = assemble(lambda: CLIPVisionModel(eye.config), named, "CLIP-FlanT5's CLIP", dtype)
    width, inner = eye.config.hidden_size, config.d_model
    projector = assemble(
        lambda: nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner)),
        parts["mm_projector."], "CLIP-FlanT5's projector", dtype,
    )  # fmt: skip
    return network, projector, eye
