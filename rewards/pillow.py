"""Pillow's resize on tensors: the 8-bit pictures that published scorers were measured on, bit for bit, with a gradient.

Pillow resamples the width, rounds to 8 bits, resamples the height and rounds again, with weights of 22 binary places.
Resampling a float tensor in one go gives pixels up to 2/255 away, enough to move a score by 1e-3 of itself. Pillow 13
resamples the height first where it shrinks more than the width; all published numbers are older than that.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half width of the filter, in pixels of the coarser grid
PLACES = 1 << 22


def pillow_resize(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """`PIL.Image.resize` of a batch.

    Args:
        images: (B, 3, H, W) in [0, 1]; brought to 8 bits first.
        size: height and width.
        mode: bicubic or bilinear.

    Returns:
        (B, 3, *size): multiples of 1/255 in [0, 1]. In the backward pass rounding and clamping are the identity.
    """
    images = _round(255 * images.float())
    height, width = images.shape[-2:]
    exact = torch.float32 if images.device.type == "mps" else torch.float64  # fp64 sums of these integers are exact
    if width != size[1]:
        images = _round(images.to(exact) @ _weights(width, size[1], mode, images.device, exact).T)
    if height != size[0]:
        images = _round(_weights(height, size[0], mode, images.device, exact) @ images.to(exact))
    return images.float() / 255


def shortest_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after torchvision's resize of the shortest side to `size`: the other is cut to an integer."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def center_crop(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W), both at least `size` -> (B, 3, size, size); halves round to even, as torchvision rounds them."""
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


@lru_cache(maxsize=32)
def _weights(old: int, new: int, mode: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new, old): what each old pixel adds to each new one; computed on the CPU, once for each device."""
    scale = old / new
    stretch = max(scale, 1.0)  # the filter widens where pixels get fewer: Pillow always antialiases
    support = SUPPORT[mode] * stretch
    center = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).trunc().clamp(min=0)
    last = (center + support + 0.5).trunc().clamp(max=old)
    pixel = torch.arange(old, dtype=torch.float64)
    inside = (pixel >= first[:, None]) & (pixel < last[:, None])
    weights = _filter((pixel - center[:, None] + 0.5).abs() / stretch, mode) * inside
    fixed = weights / weights.sum(1, keepdim=True) * PLACES
    return ((fixed + 0.5 * fixed.sign()).trunc() / PLACES).to(device, dtype)


def _filter(x: Tensor, mode: str) -> Tensor:
    """Weight at a distance of x >= 0 pixels; the cubic is Keys' with a = -1/2."""
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _round(levels: Tensor) -> Tensor:
    with torch.no_grad():
        error = (levels + 0.5).floor().clamp(0, 255) - levels
    return levels + error
