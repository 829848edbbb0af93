"""Image features for scores of sets: a CLIP's, a vision transformer's by hub id or folder, Inception's, or yours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_align.config import nearest
from t2i_align.data.images import to_tensors
from t2i_align.rewards.checkpoints import RESAMPLE, missing_weights
from t2i_align.rewards.clip import CLIP, TowerScorer
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.tower import Preprocessing, Tower

Extract = Callable[[Tensor], Tensor]

INCEPTION = "inception:"


def load_features(spec: str | Extract) -> Extract:
    """A feature extractor: images (B, 3, H, W) in [0, 1] -> (B, D).

    Args:
        spec: a callable, which is returned as it is; a scorer on a CLIP (`tiny_clip`, `clip`); the hub id or folder of
            a transformers CLIP or vision transformer (`facebook/dinov2-base`: the last layer's class token); or
            `inception:FILE`, pytorch-fid's weights, for FID as published.

    Raises:
        RewardError: unknown, or weights that cannot be opened.
    """
    if callable(spec):
        return spec
    from t2i_align.rewards import SCORERS

    known = spec.lower().replace("-", "_")
    if known in SCORERS:
        return TowerFeatures(on_a_clip(spec)())  # type: ignore[call-arg]
    if spec.startswith(INCEPTION):
        from t2i_align.rewards.inception import load_inception

        return load_inception(spec.removeprefix(INCEPTION))
    if missing := missing_weights(spec):
        raise RewardError(f"Cannot open the features {spec!r}: {missing}{nearest(known, SCORERS)}")
    return _open(spec)


def on_a_clip(name: str) -> type[TowerScorer]:
    """The class of a scorer on a CLIP whose weights are there. Raises RewardError for any other."""
    from t2i_align.rewards import scorer_class

    found = scorer_class(name)
    if not issubclass(found, TowerScorer):
        raise RewardError(f"The scorer {name!r} has no image features; use one on a CLIP, such as 'tiny_clip'.")
    if missing := found.missing():
        raise RewardError(f"The CLIP of {name!r} cannot be opened: {missing}")
    return found


def load_clip(name: str, device: torch.device) -> Tower:
    """The CLIP of a scorer on one. Raises RewardError as `on_a_clip`."""
    scorer: TowerScorer = on_a_clip(name)()  # type: ignore[call-arg]
    return scorer.to(device).tower


def _open(name: str) -> Extract:
    from transformers import AutoConfig

    try:
        if AutoConfig.from_pretrained(name, local_files_only=True).model_type == "clip":
            return TowerFeatures(CLIP(name))
        return Vision(name)
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(f"Cannot open the features {name!r}: {' '.join(str(error).split())}") from error


class TowerFeatures(nn.Module):
    """Unit image embeddings of a scorer's CLIP tower, which scorers on the same tower share."""

    def __init__(self, scorer: TowerScorer) -> None:
        super().__init__()
        self.scorer = scorer  # moves with us, and takes us to the tower that is shared where it goes

    def networks(self) -> list[nn.Module]:
        """The modules whose weights decide the features; a tower is nobody's submodule."""
        return self.scorer.networks()

    def forward(self, images: Tensor) -> Tensor:
        return self.scorer.tower.image_features(images)


class Vision(nn.Module):
    """The class token of a transformers vision transformer (DINO, DINOv2, ViT).

    Args:
        name: hub id or folder.
        preprocessing: instead of its processor's.
    """

    def __init__(self, name: str, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        from transformers import AutoModel

        self.network = AutoModel.from_pretrained(name, local_files_only=True).eval().requires_grad_(False)
        self.preprocessing = preprocessing or _read_vision_processor(name)

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.preprocessing(images.float()).to(self.network.dtype)
        return self.network(pixel_values=pixels).last_hidden_state[:, 0].float()


def _read_vision_processor(name: str) -> Preprocessing:
    from transformers import AutoImageProcessor

    how: Any = AutoImageProcessor.from_pretrained(name, local_files_only=True)
    size, crop = dict(how.size), dict(getattr(how, "crop_size", None) or {})
    shortest = size.get("shortest_edge") or 0
    target = crop if crop and shortest else size
    return Preprocessing(
        (target["height"], target["width"]), tuple(how.image_mean), tuple(how.image_std),
        "shortest" if shortest else "squash", RESAMPLE[int(how.resample)], before_crop=shortest,
        floor_crop=True,
    )  # fmt: skip


def networks_of(extract: Extract) -> list[nn.Module]:
    """The modules whose weights decide an extractor's features; none of a plain function's are known."""
    if isinstance(extract, TowerFeatures):
        return extract.networks()
    return [extract] if isinstance(extract, nn.Module) else []


@torch.no_grad()
def extract_features(images: Any, extract: Extract, batch_size: int = 64) -> Tensor:
    """Features (n, D) of images of any kind and size, or of all images of a folder."""
    if isinstance(images, (str, Path)) and Path(images).is_dir():
        from t2i_align.data.images import find_images

        images = find_images(Path(images))
    tensors = to_tensors(images)
    if not len(tensors):
        raise RewardError("Expected one or more images to take features of but got none.")
    place = next((weight.device for network in networks_of(extract) for weight in network.parameters()), None)
    rows = [tensor if place is None else tensor.to(place) for tensor in tensors]
    if len({row.shape for row in rows}) > 1:
        return torch.cat([extract(row[None]) for row in rows])
    return torch.cat([extract(torch.stack(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)])
