"""HPSv3 (Ma et al., arXiv 2508.03789): human preference by Qwen2-VL-7B with a head that says how sure it is.

    (mu, log sigma) = head(h);  r = mu, std = sigma
    P(a > b) = E sigmoid(z),  z ~ N(mu_a - mu_b, sigma_a^2 + sigma_b^2)

h is the last hidden state at the token `<|Reward|>`, which stands once behind the picture, the instruction and the
prompt (`hpsv3_prompt.py`). Two things are unlike Qwen2-VL and silent where missed: positions are 0 1 2 ... along all
three axes, not the picture's rows and columns; and a picture of any size is resized to about 448 x 448 = 256 tokens.

Departure: gradients reach the pixels along the path of 8-bit pictures; the published path for gradients resizes
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from t2i_align.prompts import Prompts
from t2i_align.rewards.assemble import assemble, found_folder, missing_folders, number_type
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.blip import MEAN, STD
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights, join_missing, read_weights
from t2i_align.rewards.hpsv3_prompt import INSTRUCTION, REWARD, SUFFIX
from t2i_align.rewards.pillow import pillow_resize

PUBLISHED = WeightFile("HPSv3.safetensors", "MizzenAI/HPSv3")
BACKBONE = "Qwen/Qwen2-VL-7B-Instruct"  # of which the configuration and the tokenizer are read, no weights
CONFIG = ("config.json",)
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
PIXELS = 256 * 28 * 28  # of a resized picture, at most; what is smaller is enlarged to at least that
MOST_ELONGATED = 200  # sides' ratio
PATCH, MERGED, FRAMES = 14, 2, 2  # pixels of a patch; patches a side that become one token; copies of the picture


class HPSv3(Scorer):
    """Human preference by Qwen2-VL, with a std; about -0.2 (SD 2) to 10.6 for today's models.

    Args:
        weights: HPSv3.safetensors, or a folder that holds it; "" is the hub's cache.
        backbone: folder of Qwen2-VL-7B-Instruct's config.json and tokenizer; "" is the hub's cache.
        dtype: bfloat16 as published, float32 or float16; of all but the head.

    Raises:
        RewardError: files that are missing or of another model, or an unknown dtype.
    """

    name = "hpsv3"
    differentiable = True
    needs_prompt = True
    unit: ClassVar[str] = "log-odds"
    license: ClassVar[str] = "MIT code; Apache-2.0 weights"
    source: ClassVar[str] = PUBLISHED.repo
    files: ClassVar[tuple[WeightFile, ...]] = (PUBLISHED,)
    summary: ClassVar[str] = "human preference by Qwen2-VL, with its own std"

    def __init__(self, weights: str = "", backbone: str = "", dtype: str = "bfloat16") -> None:
        super().__init__()
        kind = number_type(dtype, self.name)
        if missing := missing_folders(_wanted(), {"backbone": backbone}):
            raise RewardError(f"The scorer {self.name!r} cannot be used: {missing}")
        file = find_weights(weights, PUBLISHED, self.name)
        from transformers import AutoTokenizer

        folder = found_folder(backbone, BACKBONE, CONFIG)
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        words.add_special_tokens({"additional_special_tokens": [REWARD]})
        self.network, self.head = _load(file, folder, len(words), kind)
        self.tokenise = lambda text: torch.tensor(words(text, add_special_tokens=False).input_ids)
        self.reward, self.own_tokens = int(words.convert_tokens_to_ids(REWARD)), tuple(words.get_added_vocab())

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        weights = None if options.get("weights") else PUBLISHED.missing()
        return join_missing(weights, missing_folders(_wanted(), options))

    def refuse(self, prompt: str) -> str | None:
        own = next((token for token in self.own_tokens if token in prompt), None)
        return f"it contains {own}, which is a mark of the model's own and not text." if own else None

    def forward(self, images: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        seen = self._see(images)  # (B, tokens, d)
        embed = self.network.language_model.get_input_embeddings()
        before = self.tokenise(BEFORE).to(images.device)
        after = [self.tokenise(question(prompt)).to(images.device) for prompt in prompts.text]
        rows = [torch.cat((embed(before), one, embed(text))) for one, text in zip(seen, after, strict=True)]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        read = self.network.language_model(
            inputs_embeds=pad_sequence(rows, batch_first=True),
            attention_mask=mask.to(images.device),
            position_ids=torch.arange(mask.shape[1], device=images.device).expand(3, len(rows), -1),
            use_cache=False,
        ).last_hidden_state
        place = torch.tensor([len(before) + seen.shape[1] + int((text == self.reward).nonzero()) for text in after])
        at = read[torch.arange(len(rows)), place.to(read.device)]
        mu, log_sigma = self.head(at.to(next(self.head.parameters()).dtype)).float().unbind(1)
        return mu, log_sigma.exp()

    def _see(self, images: Tensor) -> Tensor:
        height, width = smart_size(*images.shape[-2:])
        grid = torch.tensor([[1, height // PATCH, width // PATCH]] * len(images), device=images.device)
        patches = patchify(pillow_resize(images, (height, width))).to(self.network.dtype)
        seen = self.network.visual(patches.flatten(0, 1), grid_thw=grid)
        merged = seen if isinstance(seen, Tensor) else seen.pooler_output
        return merged.unflatten(0, (len(images), -1))


def question(prompt: str) -> str:
    """What follows the picture."""
    return AFTER.format(INSTRUCTION.format(text_prompt=prompt) + SUFFIX)


def smart_size(height: int, width: int) -> tuple[int, int]:
    """Sides that are whole tokens with an area near `PIXELS`, and nearly the picture's shape.

    Raises:
        RewardError: a side more than 200 times the other.
    """
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise RewardError(
            f"Expected a picture at most {MOST_ELONGATED} times as long as it is short but got {height} x {width}."
        )
    token = PATCH * MERGED
    sides = [max(token, round(side / token) * token) for side in (height, width)]
    if sides[0] * sides[1] > PIXELS:
        shrink = math.sqrt(height * width / PIXELS)
        sides = [math.floor(side / shrink / token) * token for side in (height, width)]
    elif sides[0] * sides[1] < PIXELS:
        grow = math.sqrt(PIXELS / (height * width))
        sides = [math.ceil(side * grow / token) * token for side in (height, width)]
    return sides[0], sides[1]


def patchify(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, patches, 1176): normalised patches, the four of a token together, in two frames."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (MEAN, STD))
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH // MERGED, width // PATCH // MERGED
    grid = ((images - mean) / std).reshape(batch, channels, rows, MERGED, PATCH, columns, MERGED, PATCH)
    patches = grid.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, row, column, row and column in the token, channel, y, x
    frames = patches[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, FRAMES, -1, -1)
    return frames.reshape(batch, rows * columns * MERGED**2, channels * FRAMES * PATCH**2)


def _wanted() -> dict[str, tuple[str, Sequence[str]]]:
    return {"backbone": (BACKBONE, CONFIG)}


def _load(file: Path, folder: Path, words: int, dtype: torch.dtype) -> tuple[Any, nn.Sequential]:
    """Qwen2-VL without its language head, and the reward head."""
    from transformers import AutoConfig, Qwen2VLModel

    state = read_weights(file)
    rows = state["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in state else 0
    if rows != words:
        raise RewardError(f"Expected {file} to have a row for each of {words} tokens of {BACKBONE} but it has {rows}.")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.text_config.vocab_size = rows
    body = {
        name.replace("model.", "language_model.", 1) if name.startswith("model.") else name: value.to(dtype)
        for name, value in state.items()
        if not name.startswith(("rm_head.", "lm_head."))
    }
    network = assemble(lambda: Qwen2VLModel(config), body, "HPSv3", dtype)
    own = {name.removeprefix("rm_head."): value for name, value in state.items() if name.startswith("rm_head.")}
    return network, assemble(lambda: _head(config.text_config.hidden_size), own, "HPSv3's head", torch.float32)


def _head(width: int) -> nn.Sequential:
    """Width -> 1024 -> 16 -> 2 with ReLU; the published indices count a dropout layer."""
    first, second = (nn.Linear(width, 1024), nn.ReLU(), nn.Identity()), (nn.Linear(1024, 16), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Linear(16, 2))
