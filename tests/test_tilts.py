"""KL-regularised methods on the closed form: trained to the end, they draw the law that their objective has.

Every row of the toy's grid has a free step here: its mean is A x + s (shift + gain x) with the base's A and std s, so
that optima over steps are exact. A step's std stays, as in any policy of these methods. With u = shift + gain x and
lam the strength of the objective, E[r] - KL / lam:

    grpo   u = lam s dR/dx',  R the expected reward under the later steps; the KL of a step counts for that step alone
    prdp   u = s dV/dx',      V = lam E[r] - later KLs: the optimum of the whole trajectory
    d3po   E[y tanh(beta u y / (2 D))] = 2 kappa / sqrt(pi),  y ~ N(0, 2), kappa the correlation of a step's noise with
           a linear reward, gain = 0: pairs are of the policy itself, and the better image always wins

For a linear reward grpo and prdp both draw the tilt exp(lam r) of the sampler's own law, but for the start's share of
it, which no step moves. For a quadratic one steps whose std stays end wider than the tilt. D3PO depends on the order of
rewards alone: its strength is 2 D / (beta sqrt(pi)) in units of their standard deviation, and more as tanh bends. Gains
would narrow its law even for a linear reward: a step matters less for pairs that earlier ones have decided.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from t2i_align.config import TrainConfig
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim, flow_sde, x0_eps_to_output
from t2i_align.pipelines.toy import Mixture, ToyDenoiser, ToyPipeline, toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import fit

N, D, LAM, SLOPE, CENTRE, PRECISION = 8, 3, 0.8, 1.0, 1.0, 1.5
ERROR = 0.06  # of means and variances, after updates on 256 images each; moments are of 16,384 points


class Chain(NamedTuple):
    """Per row, fp64: the base's factor of x, the std, and by how much x0 moves for the mean to move by the std."""

    factor: list[float]
    std: list[float]
    reach: list[float]

    def law(self, shift, gain):
        """Mean and variance of the end, of a start N(0, 1)."""
        mean, variance = 0.0, 1.0
        for a, s, u, k in zip(self.factor, self.std, shift, gain, strict=True):
            a = a + s * k
            mean, variance = a * mean + s * u, a * a * variance + s * s
        return mean, variance


def chain(flow):
    grid, kernel = Driver(toy_pipeline(flow=flow)).grid(N), flow_sde(0.7) if flow else ddim(1.0)
    like, rows = torch.zeros(1, dtype=torch.float64), []
    for row in range(N):
        at, to = grid.level(row, like), grid.level(row + 1, like)
        gain = at.alpha / (at.alpha**2 + at.sigma**2)
        q = kernel(gain, (1 - at.alpha * gain) / at.sigma, at, to)
        moves = float(kernel(torch.ones(()), -at.alpha / at.sigma, at, to).mean)
        rows.append((float(q.mean), float(q.std), float(q.std) / moves))
    return Chain(*(list(column) for column in zip(*rows, strict=True)))


def optimum(name, steps, reward):
    """Shifts and gains of all rows; see the module's text."""
    slope, curve = (SLOPE, 0.0) if reward == "linear" else (PRECISION * CENTRE, PRECISION)
    g, w, shift, gain = LAM * slope, LAM * curve, [], []  # of the objective's derivative g - w x at a row's end
    for a, s in reversed(list(zip(steps.factor, steps.std, strict=True))):
        u, k = s * g / (1 + s * s * w), -s * w * a / (1 + s * s * w)
        shift, gain = [u, *shift], [k, *gain]
        if name == "prdp":
            g, w = a * g / (1 + s * s * w), a * a * w / (1 + s * s * w)
        else:
            closed = a + s * k
            g, w = closed * (g - w * s * u), closed * closed * w
    return shift, gain


def preferred(steps, beta):
    """Shifts of all rows at which pairs of the policy, ordered by a linear reward, ask for no other."""
    y = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    weight = (-y.square() / 4).exp() / math.sqrt(4 * math.pi) * (y[1] - y[0])
    after = [math.prod(steps.factor[row + 1 :]) for row in range(N)]
    spread = math.sqrt(sum((b * s) ** 2 for b, s in zip(after, steps.std, strict=True)))  # pairs share their start
    shift = []
    for b, s in zip(after, steps.std, strict=True):
        low, high, asked = 0.0, 1e3, 2 * b * s / spread / math.sqrt(math.pi)
        for _ in range(60):
            u = (low + high) / 2
            low, high = (u, high) if (weight * y * (beta * u * y / 2 / D).tanh()).sum() < asked else (low, u)
        shift.append(low)
    return shift


class FreeSteps(ToyDenoiser):
    """The base N(0, 1) with a shift for every row and dimension, and a gain."""

    def __init__(self, steps, alphas, gains=True):
        super().__init__()
        self.register_buffer("alphas", alphas)
        self.register_buffer("reach", torch.tensor(steps.reach))
        self.shift, self.gain = (nn.Parameter(torch.zeros(N, D, 1, 1)) for _ in range(2))
        if not gains:
            del self.gain
            self.register_buffer("gain", torch.zeros(N, D, 1, 1))

    def forward(self, x, at, said, prediction):
        row = (self.alphas - at.alpha).abs().argmin()
        base = at.alpha / (at.alpha.square() + at.sigma.square()) * x
        x0 = base + self.reach[row] * (self.shift[row] + self.gain[row] * x)
        return x0_eps_to_output(x0, (x - at.alpha * x0) / at.sigma, at, prediction)


SETTINGS = {
    "grpo": {"group": 64, "spread": "none", "advantage_clip": 1e9, "clip": 1e9, "beta": (1 - 1 / 64) / LAM},
    "prdp": {"group": 64, "eps": 1e9},
    "d3po": {"group": 2, "clip": None, "beta": 4.0},
}


def reward_of(kind):
    def reward(images, prompts):
        x = 16 * (images[:, 0, 0, 0] - 0.5)
        return SLOPE * x if kind == "linear" else -PRECISION / 2 * (x - CENTRE).square()

    return FunctionScorer(reward)


def trained(name, flow, kind, folder, updates, gains=True):
    """Means and variances (3,) of the end per dimension, before and after training."""
    steps, bare = chain(flow), toy_pipeline(flow=flow)
    network = FreeSteps(steps, Driver(bare).grid(N).alpha[:-1].float(), gains)
    pipe = ToyPipeline(network, bare.scheduler)
    common = {"use": name, "steps": N, "trained_rows": 1.0, "batch_size": 256}
    if name == "prdp":  # log-ratios are means over the trained rows and dimensions
        common["beta"] = sum(std > 0 for std in steps.std) * D / LAM
    found, options = read_method(common | SETTINGS[name])
    method = found(options, Policy.full(pipe), Tools(Driver(pipe), reward_of(kind)))
    before = moments(network, bare.scheduler)
    config = TrainConfig(steps=updates, learning_rate=0.05, schedule="cosine", weight_decay=0.0, max_norm=None)
    fit(method, lambda step: Prompts.of(["0"] * (256 // options.group)), config, folder)
    return before, moments(network, bare.scheduler)


def moments(network, scheduler):
    """Of drawn points: every pixel of a picture is one."""
    driver = Driver(ToyPipeline(network, scheduler, size=64))
    kernel = flow_sde(0.7) if driver.grid(N).linear else ddim(1.0)
    x = driver.rollout(driver.encode(["0"] * 4), N, kernel, seed=7).x[:, -1]
    return torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3))])


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
@pytest.mark.parametrize("name", ["grpo", "prdp"])
def test_the_law_of_the_end_is_the_optimum_of_the_objective(name, kind, flow, tmp_path):
    steps = chain(flow)
    _, own = steps.law([0.0] * N, [0.0] * N)
    base = Mixture.normal(1, 0.0, own**0.5)
    if kind == "linear":
        tilt, _ = base.tilt_linear(torch.tensor([LAM * SLOPE]))
    else:
        tilt, _ = base.tilt_quadratic(torch.tensor([CENTRE]), LAM * PRECISION)
    mean, variance = steps.law(*optimum(name, steps, kind))
    # how far the optimum is from the tilt: by the start's share, and by stds that stay
    assert abs(mean - tilt.mean().item()) < {"linear": 0.07, "quadratic": 0.09}[kind]
    assert abs(variance - tilt.variance().item()) < {"linear": 1e-6, "quadratic": 0.09}[kind]
    before, after = trained(name, flow, kind, tmp_path, updates=60)
    print(f"{name}: mean {after[0, 0]:.3f} of {mean:.3f}, variance {after[1, 0]:.3f} of {variance:.3f}")
    torch.testing.assert_close(before, torch.tensor([[0.0] * D, [own] * D]), rtol=0, atol=ERROR / 2)
    torch.testing.assert_close(after, torch.tensor([[mean, 0, 0], [variance, own, own]]), rtol=0, atol=ERROR)


@pytest.mark.parametrize("flow", [False, True])
def test_d3po_draws_the_law_that_ordered_pairs_ask_for(flow, tmp_path):
    steps, beta = chain(flow), SETTINGS["d3po"]["beta"]
    mean, own = steps.law(preferred(steps, beta), [0.0] * N)
    spread = math.sqrt(own - math.prod(steps.factor) ** 2)
    assert 1 < mean / (2 * D / beta / math.sqrt(math.pi) * spread) < 1.2  # the module's text, and how much tanh bends
    _, after = trained("d3po", flow, "linear", tmp_path, updates=100, gains=False)
    print(f"d3po: mean {after[0, 0]:.3f} of {mean:.3f}, variance {after[1, 0]:.3f} of {own:.3f}")
    torch.testing.assert_close(after, torch.tensor([[mean, 0, 0], [own] * D]), rtol=0, atol=ERROR)


@pytest.mark.parametrize("flow", [False, True])
def test_d3po_narrows_for_a_quadratic_reward(flow, tmp_path):
    """There the order of rewards has no closed form: mean and variance go the tilt's way, other dimensions stay."""
    before, after = trained("d3po", flow, "quadratic", tmp_path, updates=40)
    print(before, after)
    assert after[0, 0] > before[0, 0] + 0.3
    assert after[1, 0] < 0.7 * before[1, 0]
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=ERROR)
