"""Images in and out: whatever a user holds -> float tensors (3, H, W) in [0, 1], and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from t2i_align.data.files import open_bytes, walk
from t2i_align.errors import T2IError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# EXIF orientation -> what brings the picture upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LABEL_HEIGHT = 16  # px above a row of a contact sheet

OneImage = "Image.Image | str | Path | NDArray[Any] | Tensor"
Images = "OneImage | Sequence[OneImage]"


class ImageError(T2IError):
    """An image that cannot be read; the message says which and why."""


class Decoded(NamedTuple):
    """An image as RGB, and what a reader should know of how it came about (None: nothing)."""

    image: Image.Image
    note: str | None = None


def open_image(path: str | Path, max_pixels: int | None = None) -> Image.Image:
    """Read an image file whole, as a viewer shows it: RGB, upright, first frame, transparency laid on white.

    Args:
        path: a file, or `SHARD.tar/MEMBER`.
        max_pixels: larger ones are refused before they are decoded; None is Pillow's limit.

    Raises:
        ImageError: missing, truncated, too large or not an image.
    """
    return decode_image(path, max_pixels).image


def decode_image(
    path: str | Path, max_pixels: int | None = None, before: Callable[[int], None] | None = None
) -> Decoded:
    """`open_image`, with a note where the picture is one frame of many or was turned.

    `before` is called with the number of pixels once the header is read, before the pixels take memory.
    """
    try:
        with Image.open(open_bytes(path)) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
            if limit is not None and pixels > limit:
                raise ImageError(f"The image {path} has {image.width} x {image.height} pixels; the limit is {limit}.")
            if before is not None:
                before(pixels)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # still formats lack the attribute
            image.load()
            turn = _TURNS.get(_orientation(image))
            notes = [f"first of {frames} frames"] * (frames > 1) + ["turned as its EXIF says"] * (turn is not None)
            rgb = to_rgb(image)
            return Decoded(rgb if turn is None else rgb.transpose(turn), ", ".join(notes) or None)
    except T2IError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"No such image: {path}.") from error
    except UnidentifiedImageError as error:  # its own message has an address in memory
        raise ImageError(f"Cannot read the image {path}: it is empty, or in no format that Pillow knows.") from error
    except Exception as error:  # on damaged files Pillow's readers raise struct, index, zlib, memory and more errors
        said = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"Cannot read the image {path}: {said}.") from error


def _orientation(image: Image.Image) -> int:
    """EXIF tag 274; 1 (upright) where the block is absent or damaged, as viewers take it."""
    try:
        return int(image.getexif().get(274, 1))
    except Exception:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB; transparency is laid on white, as a viewer shows it; of 16 bits the upper 8 are kept.

    Raises:
        ValueError: 32-bit integers or floating-point numbers, whose black and white points nothing states.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow 10 reads these as I
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel but got the mode {image.mode!r}")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
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
        ValueError: a tensor of another shape or range, or an image without pixels.
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
    empty = next((tuple(tensor.shape) for tensor in tensors if not tensor.numel()), None)
    if empty:
        raise ValueError(f"Expected images with pixels but got one of shape {empty}.")
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
    if not images[:1].numel() and len(images):
        raise ValueError(f"Expected images with pixels but got some of shape {tuple(images.shape[1:])}.")
    low, high = (float(edge) for edge in images.detach().aminmax()) if images.numel() else (0.0, 1.0)
    if not (low >= -0.01 and high <= 1.01):  # rounding of fp16 and bicubic overshoot pass, [-1, 1] and [0, 255] do not
        raise ValueError(f"Expected pixel values in [0, 1] but got [{low:.3g}, {high:.3g}]; rescale the images.")
    return images


def walk_images(folder: Path) -> Iterator[Path]:
    """Image files below `folder`, sorted by path, one directory in memory at a time."""
    return (path for path in walk(folder) if path.suffix.lower() in SUFFIXES)


def find_images(folder: Path) -> list[Path]:
    """Image files below `folder`, sorted by path."""
    return list(walk_images(folder))


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
