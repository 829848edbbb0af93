"""Images in and out: whatever a user holds -> float tensors (3, H, W) in [0, 1], and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2i_align.errors import T2IError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

LABEL_HEIGHT = 16  # px above a row of a contact sheet

OneImage = "Image.Image | str | Path | NDArray[Any] | Tensor"
Images = "OneImage | Sequence[OneImage]"


class ImageError(T2IError):
    """An image that cannot be read; the message says which and why."""


def open_image(path: str | Path) -> Image.Image:
    """Read an image file whole, as RGB; transparency is laid on white.

    Raises:
        ImageError: missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ImageError(f"No such image: {path}.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"Cannot read the image {path}: {' '.join(str(error).split())}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB; transparency is laid on white, as a viewer shows it."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def pil_to_tensor(image: Image.Image) -> Tensor:
    """PIL -> float32 (3, H, W) in [0, 1]."""
    pixels = torch.from_numpy(np.array(to_rgb(image), dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def tensor_to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> PIL, rounded to the nearest of 256 levels (not truncated)."""
    return Image.fromarray(to_uint8(image[None])[0])


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """(B, 3, H, W) in [0, 1] -> uint8 array (B, H, W, 3), clamped and rounded."""
    levels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_tensors(images: Any) -> Tensor | list[Tensor]:  #  Images
    """Whatever a user holds -> (B, 3, H, W) in [0, 1], or a list of (3, H, W) where the sizes differ.

    Args:
        images: one or many of: PIL image, path, uint8 array (H, W), (H, W, 3 or 4), float tensor or array
            (3, H, W) in [0, 1]; or a float tensor (B, 3, H, W) in [0, 1], passed through with its graph.

    Raises:
        ImageError: an image that cannot be read.
        TypeError: something that is not an image.
        ValueError: a tensor of another shape or range.
    """
    if isinstance(images, Tensor) and images.ndim == 4:
        return _checked(images)
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    if isinstance(images, (Image.Image, str, Path, np.ndarray, Tensor)):
        images = [images]
    if not isinstance(images, Sequence):
        raise TypeError(f"Expected images to be PIL images, paths, arrays or a tensor but got {type(images).__name__}.")
    tensors = [_one(image) for image in images]
    same = len({tensor.shape for tensor in tensors}) == 1
    return torch.stack(tensors) if same else tensors


def _one(image: Any) -> Tensor:
    if isinstance(image, (str, Path)):
        return pil_to_tensor(open_image(image))
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        return pil_to_tensor(Image.fromarray(image))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if isinstance(image, Tensor):
        return _checked(image[None])[0]
    raise TypeError(f"Expected an image to be a PIL image, path, array or tensor but got {type(image).__name__}.")


def _checked(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"Expected a float tensor (B, 3, H, W) or (3, H, W) in [0, 1] but got {images.dtype} of shape "
            f"{tuple(images.shape)}."
        )
    low, high = (float(edge) for edge in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= -0.01 and high <= 1.01):  # rounding of fp16 and bicubic overshoot pass, [-1, 1] and [0, 255] do not
        raise ValueError(f"Expected pixel values in [0, 1] but got [{low:.3g}, {high:.3g}]; rescale the images.")
    return images


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def contact_sheet(
    images: Sequence[Image.Image], columns: int, *, labels: Sequence[str] = (), gap: int = 2, zoom: int = 1
) -> Image.Image:
    """Lay images of one size out in rows, with a line of text above each row if `labels` has one for it."""
    from PIL import ImageDraw

    width, height = (zoom * side for side in images[0].size)
    rows = -(-len(images) // columns)
    head = LABEL_HEIGHT if labels else 0
    pitch = head + height + gap
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * pitch - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels[:rows]):
        draw.text((2, row * pitch + 1), label, fill="black", font_size=12)
    for index, image in enumerate(images):
        cell = image.resize((width, height), Image.Resampling.NEAREST) if zoom > 1 else image
        sheet.paste(cell, ((index % columns) * (width + gap), (index // columns) * pitch + head))
    return sheet
