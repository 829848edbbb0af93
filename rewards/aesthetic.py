"""LAION's aesthetic predictor v2: a head on CLIP ViT-L/14's image embedding (Schuhmann, 2022; no paper).

    s = head(e / |e|); the `linear` heads have no activation, so that s = b + w e: affine, and trivially hacked

Heads, by their published names: `sac` is sac+logos+ava1-l14-linearMSE (DDPO, Flow-GRPO, DAS; s = 5.2366 + w e with
|w| = 17.9956), `ava` is ava+logos-l14-linearMSE (ReNO's README), `ava_relu` is ava+logos-l14-reluMSE. Their offsets
differ: do not compare across heads. Departure: fp32 embeddings, where the published script has fp16 on CUDA.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.config import nearest
from t2i_align.prompts import Prompts
from t2i_align.rewards import clip
from t2i_align.rewards.checkpoints import missing_weights
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import WeightFile, find_weights, join_missing, load_strictly, read_weights
from t2i_align.rewards.tower import TowerSpec

REPOSITORY = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"


def _published(name: str, sha256: str) -> WeightFile:
    return WeightFile(f"{name}.pth", url=f"{REPOSITORY}{name.replace('+', '%2B')}.pth", sha256=sha256)


HEADS = {
    "sac": _published(
        "sac+logos+ava1-l14-linearMSE", "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    ),
    "ava": _published("ava+logos-l14-linearMSE", "390a3aaf"),
    "ava_relu": _published("ava+logos-l14-reluMSE", "0af3254c"),
}
ACTIVATED = ("layers.0", "layers.3", "layers.6", "layers.9", "layers.11")  # where a head's layers lie with activations


class Aesthetic(clip.TowerScorer):
    """How much people like the look of the picture, about 1 to 10; 4 to 7 for most pictures. Reads no prompt.

    Args:
        head: `sac`, `ava` or `ava_relu`.
        weights: the head as a local file, or a folder that has it; "" for the published one.
        name: folder or hub id of the CLIP.

    Raises:
        RewardError: an unknown head, weights that are missing or cannot be opened, or a head of another CLIP.
    """

    name = "aesthetic"
    without_std = True
    unit: ClassVar[str] = "points"
    license: ClassVar[str] = "Apache-2.0; CLIP MIT"
    source: ClassVar[str] = "github.com/christophschuhmann/improved-aesthetic-predictor"
    files: ClassVar[tuple[WeightFile, ...]] = (HEADS["sac"], *clip.CLIP.files)
    summary: ClassVar[str] = "LAION's aesthetic predictor v2"

    def __init__(self, head: str = "sac", weights: str = "", name: str = clip.PUBLISHED) -> None:
        published = _head(head)
        path = find_weights(weights, published, self.name)
        state = read_weights(path)
        super().__init__(TowerSpec(name))
        self.layers = head_layers(state)
        load_strictly(self, state, path)
        wanted = self.layers[0].in_features
        width = self.tower.text_features([""]).shape[1]
        if wanted != width:
            raise RewardError(f"Expected a head for the {width} features of {name} but {path} takes {wanted}.")

    @classmethod
    def missing(cls, **options: Any) -> str | None:
        head = None if options.get("weights") else _head(options.get("head") or "sac").missing()
        return join_missing(head, missing_weights(options.get("name") or clip.PUBLISHED))

    def forward(self, images: Tensor, prompts: Prompts) -> Tensor:
        return score_features(self.layers, self.tower.image_features(images))


def _head(name: str) -> WeightFile:
    if name not in HEADS:
        raise RewardError(f"Unknown head {name!r} of aesthetic.{nearest(name, HEADS)} Expected {', '.join(HEADS)}.")
    return HEADS[name]


def score_features(layers: nn.Sequential, features: Tensor) -> Tensor:
    """A head on unit vectors (B, D), in fp32 whatever the network's number type -> (B,)."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            features = F.linear(features, layer.weight.float(), layer.bias.float())
        else:
            features = layer(features)
    return features[:, 0]


def head_layers(state: dict[str, Tensor]) -> nn.Sequential:
    """The modules of a published head at their published places; dropout, which does nothing here, keeps the count."""
    shapes = {key.removesuffix(".weight"): value.shape for key, value in state.items() if key.endswith(".weight")}
    places = sorted(shapes, key=lambda key: int(key.rpartition(".")[2]))
    gap: type[nn.Module] = nn.ReLU if tuple(places) == ACTIVATED else nn.Identity
    modules: list[nn.Module] = []
    for place in places:
        while len(modules) < int(place.rpartition(".")[2]):
            modules.append(gap() if isinstance(modules[-1], nn.Linear) else nn.Identity())
        outputs, inputs = shapes[place]
        modules.append(nn.Linear(inputs, outputs))
    return nn.Sequential(*modules)
