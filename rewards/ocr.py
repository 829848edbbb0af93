"""Text in pictures, as Flow-GRPO rewards it (Liu et al., arXiv 2505.05470).

    r = 1 - min(Levenshtein(read, wanted), |wanted|) / |wanted|,   and 1 where `read` contains `wanted`

`wanted` is what stands between the first pair of double quotes of the prompt; both are lower-cased and lose their
spaces. Departures: the reader is RapidOCR (PP-OCRv4's networks, whose files are in its wheel) instead of PaddleOCR 2;
as there, small pictures are not enlarged. A prompt without quoted text is refused instead of an index error, an engine
that fails gives NaN instead of 0, curly quotes count. Text that merely contains the target scores 1, which invites
spam: `strict` is 1 - Levenshtein(read, wanted) / max(|read|, |wanted|).
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from t2i_align.data.images import to_tensors, to_uint8
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer
from t2i_align.rewards.expression import RewardError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "rapidocr_onnxruntime"
QUOTED = re.compile('["“]([^"”]*)["”]')

Engine = "Callable[[NDArray[Any]], str]"  # uint8 (H, W, 3) RGB -> the text it reads, lines joined


class OCR(Scorer):
    """How much of the prompt's quoted text can be read in the picture.

    Args:
        engine: `rapidocr`, or a callable: uint8 RGB array (H, W, 3) -> text.
        strict: count what is read besides the wanted text.

    Raises:
        RewardError: an unknown engine, or RapidOCR is not installed.
    """

    name = "ocr"
    needs_prompt = True
    range = (0.0, 1.0)
    without_std = True
    unit: ClassVar[str] = "share"
    source: ClassVar[str] = f"the package {PACKAGE.replace('_', '-')}"
    summary: ClassVar[str] = "how much of the prompt's quoted text can be read in the picture"

    def __init__(self, engine: str | Callable[..., str] = "rapidocr", strict: bool = False) -> None:
        super().__init__()
        if isinstance(engine, str) and engine != "rapidocr":
            raise RewardError(f"Expected the engine of ocr to be 'rapidocr' or a callable but got {engine!r}.")
        self.strict = strict
        self.engine = rapidocr() if isinstance(engine, str) else engine

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        if callable(options.get("engine")) or importlib.util.find_spec(PACKAGE):
            return None
        return "the text reader is not installed; install it with `pip install 't2i-align[ocr]'`."

    def refuse(self, prompt: str) -> str | None:
        return None if wanted_text(prompt) else "it has no text between double quotes."

    def explain(self, image: Any, prompt: str) -> str | None:
        (picture,) = to_tensors(image)
        (pixels,) = to_uint8(picture[None])
        return f"wanted {wanted_text(prompt)!r}, read {self.engine(pixels)!r}"

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        rows = zip(to_uint8(images), prompts.text, strict=True)
        return torch.tensor([self._score(pixels, prompt) for pixels, prompt in rows], device=images.device)

    def _score(self, pixels: NDArray[Any], prompt: str) -> float:
        try:
            read = self.engine(pixels)
        except Exception as error:  # of any engine; a failure is no low score
            warnings.warn(f"The text reader failed: {error}", RuntimeWarning, stacklevel=2)
            return float("nan")
        return match(read, wanted_text(prompt), self.strict)


def wanted_text(prompt: str) -> str:
    """What stands between the first pair of double quotes, or ""."""
    found = QUOTED.search(prompt)
    return found.group(1).strip() if found else ""


def match(read: str, wanted: str, strict: bool = False) -> float:
    """The formula above, in [0, 1]; NaN where nothing is wanted."""
    read, wanted = ("".join(text.lower().split()) for text in (read, wanted))
    if not wanted:
        return float("nan")
    if strict:
        return 1 - levenshtein(read, wanted) / max(len(read), len(wanted))
    return 1.0 if wanted in read else 1 - min(levenshtein(read, wanted), len(wanted)) / len(wanted)


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def rapidocr() -> Callable[..., str]:
    """RapidOCR as an engine. Raises RewardError where it is not installed or cannot start."""
    if missing := OCR.missing():
        raise RewardError(f"The scorer 'ocr' cannot be used: {missing}")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:  # a system library that OpenCV wants, say
        raise RewardError(f"The scorer 'ocr' cannot start its text reader: {error}") from error
    reader = RapidOCR(det_limit_type="max")

    def engine(pixels: NDArray[Any]) -> str:
        lines, _ = reader(pixels[:, :, ::-1])  # it takes BGR
        return " ".join(line[1] for line in lines or ())

    return engine
