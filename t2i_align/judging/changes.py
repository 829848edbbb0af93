"""Changes of a picture that should not change which one is better, and one that should not help: written words."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageOps

QUALITY = 80  # of JPEG
SHRUNK = 0.9  # of each side, before it is enlarged again
SIDED = re.compile(r"\b(left|right)\b")  # prompts that a mirrored picture no longer fits


def jpeg(image: Image.Image) -> Image.Image:
    """Through a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return Image.open(buffer).convert("RGB")


def shift(image: Image.Image) -> Image.Image:
    """One pixel right and down, the edge repeated."""
    width, height = image.size
    moved = image.copy()
    moved.paste(image.crop((0, 0, width - 1, height - 1)), (1, 1))
    return moved


def resize(image: Image.Image) -> Image.Image:
    """Smaller and back."""
    small = [max(1, round(SHRUNK * side)) for side in image.size]
    return image.resize((small[0], small[1]), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": jpeg,
    "shift": shift,
    "resize": resize,
    "flip": ImageOps.mirror,
}


def allowed(change: str, prompt: str) -> bool:
    """Whether a change leaves a prompt as true as it was."""
    return change != "flip" or not SIDED.search(prompt.lower())


def write_words(image: Image.Image, text: str) -> Image.Image:
    """The typographic attack: the prompt in white on a black strip along the lower edge."""
    attacked = image.copy()
    draw = ImageDraw.Draw(attacked)
    height = max(8, image.height // 8)
    draw.rectangle((0, image.height - height, image.width, image.height), fill="black")
    size = max(6.0, min(0.8 * height, 1.8 * image.width / max(1, len(text))))  # a letter is about half as wide as high
    draw.text((1, image.height - height), text, fill="white", font_size=size)
    return attacked
