"""JPEG (in)compressibility, DDPO's rewards (Black et al., arXiv 2305.13301): size in kB at quality 95."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from t2i_align.data.images import to_uint8
from t2i_align.prompts import Prompts
from t2i_align.rewards.base import Scorer

QUALITY = 95  # of libjpeg, with its default 4:2:0 chroma subsampling


class JpegIncompressibility(Scorer):
    """Size of the JPEG file in kB (1,000 bytes); comparable between images of one size and one libjpeg build."""

    name = "jpeg_incompressibility"
    range = (0.0, float("inf"))
    without_std = True
    unit = "kB"
    summary = "size of the JPEG file at quality 95"
    tolerance = 0.0
    sign = 1.0

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        sizes = [_jpeg_bytes(Image.fromarray(pixels)) for pixels in to_uint8(images)]
        return torch.tensor([self.sign * size / 1000 for size in sizes], device=images.device)


class JpegCompressibility(JpegIncompressibility):
    """Minus the size of the JPEG file in kB."""

    name = "jpeg_compressibility"
    range = (-float("inf"), 0.0)
    summary = "minus the size of the JPEG file at quality 95"
    sign = -1.0


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.tell()
