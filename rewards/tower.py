"""CLIP towers: image and text encoder with their preprocessing, shared by every scorer that names the same weights.

A tower is frozen but not cut off: gradients reach the pixels. It encodes a batch of images once for all scorers of a
composed reward, and a text once. `checkpoints.py` opens them.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from t2i_align.rewards.pillow import SUPPORT, pillow_resize

TEXTS = 4096  # texts whose features a tower remembers
CPU_PIXELS = 4 * 224**2  # that a CPU encodes together: the activations of more pictures fall out of its cache
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's CLIP


class Preprocessing(NamedTuple):
    """How pictures of any size become the network's input.

    `resize`: "shortest" side to `size` (or to `before_crop`), then a centre crop; "longest" side to `size`, then
    centred on `fill`; "squash" to `size` whatever the shape; "none" takes pictures as they are.

    `eight_bit`: the recipe resizes 8-bit pictures, as Pillow does, and gradients pass through the rounding; False where
    it resizes floats and keeps what bicubic interpolation overshoots.
    """

    size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "shortest"
    interpolation: str = "bicubic"
    fill: float = 0.0  # in [0, 1]
    antialias: bool = True
    eight_bit: bool = True
    before_crop: int = 0  # pixels of the shortest side before the crop, where that is not `size`
    floor_crop: bool = False  # an odd margin's half is cut, as transformers does, not rounded to even, as torchvision

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, *size), normalised, differentiable."""
        return self.normalise(self.fit(images))

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean of each channel and divide by its standard deviation."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return (images - mean) / std

    def fit(self, images: Tensor) -> Tensor:
        """Resized, cropped or padded to (B, 3, *size), still in [0, 1] but for what an interpolation overshoots."""
        height, width = images.shape[-2:]
        if self.resize == "none" or ((height, width) == self.size and not self.before_crop):
            return images
        target = self._target(height, width)
        if target != (height, width):
            images = self._resize(images, target)
        if self.resize == "longest":
            top, left = ((goal - side) // 2 for goal, side in zip(self.size, target, strict=True))
            bottom, right = self.size[0] - target[0] - top, self.size[1] - target[1] - left
            return F.pad(images, (left, right, top, bottom), value=self.fill)
        if not self.floor_crop:
            return V.center_crop(images, list(self.size))
        top, left = ((side - goal) // 2 for goal, side in zip(self.size, target, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]

    def _resize(self, images: Tensor, target: tuple[int, int]) -> Tensor:
        if self.eight_bit and self.antialias and self.interpolation in SUPPORT:
            return pillow_resize(images, target, self.interpolation)
        return V.resize(images, list(target), V.InterpolationMode(self.interpolation), antialias=self.antialias)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before crop or padding."""
        if self.resize == "squash":
            return self.size
        goal = (self.before_crop,) * 2 if self.before_crop else self.size
        scales = goal[0] / height, goal[1] / width
        if self.resize == "shortest":  # cut to whole pixels; 1e-6 for what should be whole but is not in floats
            sides = [max(1, int(side * max(scales) + 1e-6)) for side in (height, width)]
        else:
            sides = [max(1, round(side * min(scales))) for side in (height, width)]
        return sides[0], sides[1]


class TowerSpec(NamedTuple):
    """What a tower is opened from; equal specs share one module.

    `name`: an open_clip model name, `local-dir:FOLDER`, `hf-hub:REPO`, or the folder or hub id of a transformers
    `CLIPModel`. `weights`: open_clip's tag or checkpoint file for a model name. `processor`: folder or hub id of
    tokenizer and image processor, where a transformers checkpoint has none; `clip` for those that all
    published CLIPs share. `preprocessing`: instead of its own. `adapter`: a LoRA that was added to its weights.
    """

    name: str
    weights: str = ""
    processor: str = ""
    preprocessing: Preprocessing | None = None
    adapter: str = ""


class Tower(nn.Module):
    """A frozen CLIP in eval mode. Make towers by `checkpoints.load_tower`.

    Args:
        spec: what it was opened from.
        network: the CLIP.
        preprocessing: of pictures.
        encode_image: `(network, pixels) -> (B, D)`.
        encode_text: `(network, token ids) -> (B, D)`.
        tokenise: texts -> token ids (B, context), cut at the context.
        length: tokens of one text before the cut, start and end included.
    """

    def __init__(
        self,
        spec: TowerSpec,
        network: nn.Module,
        preprocessing: Preprocessing,
        encode_image: Callable[[nn.Module, Tensor], Tensor],
        encode_text: Callable[[nn.Module, Tensor], Tensor],
        tokenise: Callable[[list[str]], Tensor],
        length: Callable[[str], int],
    ) -> None:
        super().__init__()
        self.spec, self.network, self.preprocessing = spec, network, preprocessing
        self.encode_image, self.encode_text, self.tokenise, self.length = encode_image, encode_text, tokenise, length
        self.texts: dict[str, Tensor] = {}
        self.seen: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # last images, their version, their features
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return next(self.network.parameters()).dtype

    @property
    def scale(self) -> float:
        """exp(logit_scale) of the checkpoint, about 100."""
        return math.exp(float(self.network.get_parameter("logit_scale")))

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D), fp32, of images (B, 3, H, W) in [0, 1].

        The features of the last tensor are kept, so that scorers called in a row on the same images run the network
        once: until the images change or go, or until a backward pass has used up the features' graph.
        """
        wanted = torch.is_grad_enabled() and images.requires_grad
        if images.is_inference():  # such tensors do not count their changes
            return self._encode_images(images)
        if self.seen is not None:
            last, version, features = self.seen
            if last() is images and version == images._version and features.requires_grad == wanted:
                return features
        features = self._encode_images(images)
        me = weakref.ref(self)
        if features.requires_grad:
            features.register_hook(lambda gradient: _forget(me))
        self.seen = (weakref.ref(images, lambda _: _forget(me)), images._version, features)
        return features

    def _encode_images(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images.float()).to(self.dtype)
        together = max(1, CPU_PIXELS // pixels[0, 0].numel()) if pixels.device.type == "cpu" else len(pixels)
        features = torch.cat([self.encode_image(self.network, part) for part in pixels.split(together)])
        return F.normalize(features.float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D), fp32; each different text is encoded once, and remembered. Warns of texts it cuts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.texts]
        if new:
            # They are remembered: they must not depend on who asks first, nor on a CPU, whose results depend on the
            # size of a batch, on which others are new.
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                tokens = self.tokenise(new)
                for text in new:
                    if self.length(text) > tokens.shape[1]:
                        warnings.warn(
                            f"{self.spec.name} reads {tokens.shape[1]} tokens; the rest of {text!r:.80} is not seen.",
                            stacklevel=2,
                        )
                parts = tokens.split(1 if self.device.type == "cpu" else len(tokens))
                features = torch.cat([self.encode_text(self.network, part.to(self.device)) for part in parts])
                self.texts |= dict(zip(new, F.normalize(features.float(), dim=-1), strict=True))
        found = torch.stack([self.texts[text] for text in texts])
        for text in list(self.texts)[:-TEXTS]:
            del self.texts[text]
        return found

    def on(self, device: torch.device, dtype: torch.dtype) -> Tower:
        """This tower on another device or in another number type, shared like any; self stays as it is."""
        key = (self.spec, device, dtype)
        tower = TOWERS.get(key)
        if tower is None:
            network = copy.deepcopy(self.network).to(device, dtype)
            functions = (self.encode_image, self.encode_text, self.tokenise, self.length)
            tower = TOWERS[key] = Tower(self.spec, network, self.preprocessing, *functions)
        return tower


TOWERS: weakref.WeakValueDictionary[tuple[TowerSpec, torch.device, torch.dtype], Tower] = weakref.WeakValueDictionary()


def _forget(tower: weakref.ref[Tower]) -> None:
    alive = tower()
    if alive is not None:
        alive.seen = None
