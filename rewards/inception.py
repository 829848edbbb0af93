"""FID's Inception-v3: torchvision's modules with the pooling of the TensorFlow graph, for pytorch-fid's weight file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception

from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.files import read_weights

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # github.com/mseitzer/pytorch-fid, release fid_weights
CLASSES = 1008


def _average(x: Tensor) -> Tensor:
    """The pooling branch: an average over what lies inside the image, without the padding's zeros."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(inception.InceptionA):
    """35x35 blocks."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:3], self.branch_pool(_average(x))]


class BlockC(inception.InceptionC):
    """17x17 blocks."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:3], self.branch_pool(_average(x))]


class BlockE(inception.InceptionE):
    """8x8 blocks; the last of the graph has a maximum in its pooling branch."""

    last = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _average(x)
        return [*super()._forward(x)[:3], self.branch_pool(pooled)]


class Inception(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> pool3 features (B, 2048); resized to 299x299, bilinear, as pytorch-fid does."""

    def __init__(self) -> None:
        super().__init__()
        net = inception.inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
        net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        net.Mixed_6b, net.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        net.Mixed_6d, net.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        net.Mixed_7b, net.Mixed_7c = BlockE(1280), BlockE(2048)
        net.Mixed_7c.last = True
        self.network = net.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = 2 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) - 1
        for name, layer in self.network.named_children():
            if name == "dropout":
                break
            x = layer(x)
        return x.flatten(1)


def load_inception(file: str) -> Inception:
    """The network with the weights of a file.

    Raises:
        RewardError: no such file, or other weights.
    """
    if not Path(file).is_file():
        raise RewardError(
            f"Expected {file} to be FID's Inception weights: download {WEIGHTS} from pytorch-fid's releases on GitHub "
            "and name it as inception:FILE."
        )
    made, state = Inception(), read_weights(Path(file))
    try:
        made.network.load_state_dict(state)
    except RuntimeError as error:
        raise RewardError(f"Cannot read {file} as FID's Inception weights: {' '.join(str(error).split())}") from error
    return made
