"""Pillow's resize on tensors: bit for bit, and its gradient."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from t2i_align.rewards.pillow import _weights, center_crop, pillow_resize, shortest_side

MODES = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("old", "new"), [((64, 64), (224, 224)), ((300, 211), (97, 224)), ((31, 77), (31, 20))])
def test_every_bit_is_pillows(mode, old, new):
    pixels = noise(*old)
    narrow = Image.fromarray(pixels).resize((new[1], old[0]), MODES[mode])  # in one call Pillow 13 may swap the passes
    theirs = np.asarray(narrow.resize(new[::-1], MODES[mode]))
    ours = (255 * pillow_resize(tensor(pixels), new, mode))[0].permute(1, 2, 0)
    assert torch.equal(ours.round().to(torch.uint8), torch.from_numpy(theirs.copy()))
    torch.testing.assert_close(ours, ours.round(), rtol=0, atol=1e-4)


def test_weights_are_taken_to_a_device_once():
    _weights.cache_clear()
    images = torch.zeros(2, 3, 40, 50, device="meta")
    for _ in range(3):
        assert pillow_resize(images, (20, 30)).shape == (2, 3, 20, 30)
    assert _weights.cache_info()[:2] == (4, 2)  # hits, misses
    assert _weights(50, 30, "bicubic", images.device, torch.float64).device.type == "meta"


@pytest.mark.parametrize("old", [(333, 512), (512, 333), (225, 224), (64, 64)])
def test_shortest_side_and_crop_are_torchvisions(old):
    pixels = noise(*old)
    recipe = transforms.Compose(
        [transforms.Resize(224, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    ours = center_crop(pillow_resize(tensor(pixels), shortest_side(*old, 224)), 224)
    assert torch.equal(ours, transforms.functional.to_tensor(recipe(Image.fromarray(pixels)))[None])


def test_rounding_and_clamping_let_the_gradient_through():
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (ours,) = torch.autograd.grad((pillow_resize(x, (16, 16)) * weight).sum(), x)
    plain = torch.nn.functional.interpolate(x, (16, 16), mode="bicubic", antialias=True)
    (smooth,) = torch.autograd.grad((plain * weight).sum(), x)
    torch.testing.assert_close(ours, smooth, rtol=0, atol=1e-4)  # weights of 22 binary places
    (kept,) = torch.autograd.grad(pillow_resize(x, (8, 8)).sum(), x)
    assert torch.equal(kept, torch.ones_like(x))
