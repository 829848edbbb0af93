"""What every training method promises for a LoRA of a real pipeline; an entry of `METHODS` without settings fails."""

import pytest
import torch

from t2i_align.config import TrainConfig
from t2i_align.methods import METHODS, read_method
from t2i_align.methods.base import Tools
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import fit
from tests.families.subject import Subject

SETTINGS = {
    "ddpo": {"min_count": 1},
    "grpo": {"beta": 0.01},
    "d3po": {"clip": None},
    "prdp": {"beta": 1.0},
    "vard": {"warmup": 1, "value": {"width": 8}},
    "refl": {"group": 1},
    "draft": {"group": 1, "keep": 2},
    "alignprop": {"group": 1},
    "diffusion_dpo": {"online": True},
    "nft": {"slope": 0.25},
    "rwr": {},
}
VARIANTS = {
    "vard-clip": {"value": {"net": "clip", "clip": "tiny_clip", "width": 8}},
    "vard-conv": {"value": {"net": "conv"}},
}
CASES = [*METHODS, *VARIANTS]
PROMPTS = ["a cat", "a dog"]


def run(case, folder, stop=None, resume=False):
    """Four rounds of a method on a tiny Stable Diffusion, or as many as come before `stop`."""

    def data(number):
        if number == stop:
            raise KeyboardInterrupt
        return Prompts.of(PROMPTS)

    subject = Subject("sd")
    name = case.partition("-")[0]
    found, options = read_method(
        {"use": name, "group": 2, "steps": 3, "batch_size": 2} | SETTINGS[name] | VARIANTS.get(case, {})
    )
    bright = FunctionScorer(lambda images, prompts: images.mean((1, 2, 3)), differentiable=True)
    method = found(options, Policy.lora(subject.pipe, rank=2), Tools(subject.driver, bright))
    updates = getattr(options, "epochs", 1) * getattr(options, "minibatches", 1)
    config = TrainConfig(steps=4 * updates, learning_rate=1e-2, checkpoint_every=updates, ema=0.9)
    return method, fit(method, data, config, folder, resume=resume), updates


@pytest.mark.parametrize("case", CASES)
def test_a_lora_learns_and_goes_on_bit_identically(case, tmp_path):
    """Weights, their average and what else the method keeps, an old policy or a value, come from the checkpoint."""
    torch.manual_seed(1)
    whole, state, updates = run(case, tmp_path / "whole")
    moved = [name for name, weight in state.weights.items() if "lora_B" in name and weight.any()]
    assert moved
    assert all(p.grad is None for p in whole.policy.network.parameters() if not p.requires_grad)
    with pytest.raises(KeyboardInterrupt):
        run(case, tmp_path / "parts", stop=2 * updates)
    torch.manual_seed(5)
    parts, resumed, _ = run(case, tmp_path / "parts", resume=True)
    assert state.step == resumed.step == 4 * updates
    for name, weight in state.weights.items():
        assert torch.equal(weight, resumed.weights[name])
        assert torch.equal(state.average[name], resumed.average[name])
    assert equal(whole.state(), parts.state())


def equal(one, other):
    """Whether two states, of tensors and numbers in mappings and lists, are the same."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other
