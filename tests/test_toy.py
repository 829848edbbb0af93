"""The oracle against numbers computed another way: quadrature, sampling, hand calculation."""

import math

import numpy as np
import pytest
import torch

from t2i_align.pipelines.grid import Level, read_grid
from t2i_align.pipelines.kernels import ddim, ode, output_to_x0_eps
from t2i_align.pipelines.toy import Mixture, ToyPipeline, toy_pipeline

D = torch.float64
TWO = Mixture(
    torch.tensor([0.3, 0.7], dtype=D), torch.tensor([[-2.0], [1.0]], dtype=D), torch.tensor([0.5, 0.8], dtype=D)
)
AT = Level(torch.tensor(0.6, dtype=D), torch.tensor(0.8, dtype=D))
LINE = torch.linspace(-12, 12, 40001, dtype=D)[:, None]


def integrate(values):
    return values.sum(0) * (LINE[1, 0] - LINE[0, 0])


def posterior_density(x_t):
    log = TWO.log_prob(LINE) - 0.5 * ((x_t - AT.alpha * LINE[:, 0]) / AT.sigma).square()
    density = log.exp()
    return density / integrate(density)


def test_posterior_mean_is_that_of_quadrature():
    for x_t in (-1.5, 0.0, 2.0):
        expected = integrate(posterior_density(x_t) * LINE[:, 0])
        torch.testing.assert_close(
            TWO.denoise(torch.tensor([[x_t]], dtype=D), AT)[0, 0], expected, rtol=1e-8, atol=1e-8
        )


def test_values_are_those_of_quadrature():
    for x_t in (-1.5, 0.0, 2.0):
        x = torch.tensor([[x_t]], dtype=D)
        density = posterior_density(x_t)
        linear = integrate(density * (1.3 * LINE[:, 0]).exp()).log()
        torch.testing.assert_close(
            TWO.value_linear(x, AT, torch.tensor([1.3], dtype=D))[0], linear, rtol=1e-8, atol=1e-8
        )
        quadratic = integrate(density * (-0.5 * 2.5 * (LINE[:, 0] - 0.4).square()).exp()).log()
        mine = TWO.value_quadratic(x, AT, torch.tensor([0.4], dtype=D), 2.5)[0]
        torch.testing.assert_close(mine, quadratic, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_tilts_are_those_of_quadrature(reward):
    if reward == "linear":
        tilted, log_z = TWO.tilt_linear(torch.tensor([1.3], dtype=D))
        weight = (1.3 * LINE[:, 0]).exp()
    else:
        tilted, log_z = TWO.tilt_quadratic(torch.tensor([0.4], dtype=D), 2.5)
        weight = (-0.5 * 2.5 * (LINE[:, 0] - 0.4).square()).exp()
    target = TWO.log_prob(LINE).exp() * weight
    torch.testing.assert_close(log_z, integrate(target).log(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(tilted.log_prob(LINE).exp(), target / integrate(target), rtol=1e-7, atol=1e-10)


def test_unit_gaussian_by_hand():
    """specs/steering B0: linear reward c x tilts N(0, 1) to N(c, 1), log Z = c^2 / 2."""
    unit = Mixture.normal(1)
    tilted, log_z = unit.tilt_linear(torch.tensor([1.5]))
    assert tilted.mean().item() == pytest.approx(1.5)
    assert tilted.variance().item() == pytest.approx(1.0, rel=1e-5)
    assert log_z.item() == pytest.approx(1.125)
    x, at = torch.tensor([[0.7]]), Level(torch.tensor(0.6), torch.tensor(0.8))
    assert unit.denoise(x, at).item() == pytest.approx(0.6 * 0.7)
    assert unit.value_linear(x, at, torch.tensor([1.5])).item() == pytest.approx(1.5 * 0.42 + 1.125 * 0.64)
    tilted, _ = unit.tilt_quadratic(torch.tensor([2.0]), 3.0)  # m = 2, lambda / s^2 = 3
    assert tilted.mean().item() == pytest.approx(3 * 2 / 4)
    assert tilted.variance().item() == pytest.approx(1 / 4)


def test_flow_twin_by_hand():
    """specs/steering B0: x0hat = (1 - t) x / S and v = (2 t - 1) x / S, S = (1 - t)^2 + t^2."""
    pipe = toy_pipeline(flow=True)
    pipe.scheduler.set_timesteps(10)
    x, t = torch.full((1, 3, 1, 1), 0.9), torch.tensor(300.0)
    v = pipe.denoiser(x, pipe.level(t, x), torch.zeros(1), "flow")
    torch.testing.assert_close(v, (2 * 0.3 - 1) * x / (0.7**2 + 0.3**2))


def test_samples_have_the_moments_of_the_mixture():
    draws = TWO.sample(200_000, torch.Generator().manual_seed(0))
    assert draws.mean().item() == pytest.approx(TWO.mean().item(), abs=0.01)
    assert draws.var().item() == pytest.approx(TWO.variance().item(), abs=0.02)


def three(mixture):
    """A mixture of one dimension as one of three equal ones."""
    return Mixture(mixture.weights.float(), mixture.means.float().repeat(1, 3), mixture.stds.float())


@pytest.mark.parametrize("flow", [False, True])
def test_the_pipeline_samples_its_prior(flow):
    pipe = toy_pipeline(three(TWO), flow, size=24)
    images = pipe(["0"] * 16, 200, generator=torch.Generator().manual_seed(0), output_type="pt").images
    x = (images - 0.5) * 16
    expected = three(TWO)
    assert x.mean().item() == pytest.approx(expected.mean()[0].item(), abs=0.05)
    assert x.var().item() == pytest.approx(expected.variance()[0].item(), abs=0.08)


def test_a_prompt_moves_the_prior_and_guidance_moves_it_further():
    pipe = toy_pipeline(size=16)
    means = [
        (pipe(text, 50, scale, torch.Generator().manual_seed(0), output_type="pt").images.mean().item() - 0.5) * 16
        for text, scale in (("0", 1.0), ("1.5", 1.0), ("a red circle", 1.0), ("1.5", 2.0))
    ]
    pipe.scheduler.set_timesteps(50)
    _, alpha, sigma, *_ = read_grid(pipe.scheduler)
    gain = (alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]).prod()  # of the start, through all DDIM steps
    kept = (1 - alpha[0] * gain).item()  # the start is N(0, 1), not the marginal of a moved prior
    assert means[1] - means[0] == pytest.approx(1.5 * kept, abs=1e-4)
    assert means[2] == means[0]
    assert means[3] - means[0] == pytest.approx(3.0 * kept, abs=1e-4)


@pytest.mark.parametrize("flow", [False, True])
def test_our_kernels_reproduce_the_pipeline(flow):
    pipe = toy_pipeline(three(TWO), flow, size=4)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    theirs = pipe(["0.5"] * 2, 10, latents=x, output_type="latent").images
    pipe.scheduler.set_timesteps(10)
    grid, said = read_grid(pipe.scheduler), torch.full((2,), 0.5)
    for row in range(grid.steps):
        at = grid.level(row, x)
        x0, eps = output_to_x0_eps(pipe.denoiser(x, at, said, pipe.prediction), x, at, pipe.prediction)
        x = (ode() if flow else ddim(0))(x0, eps, at, grid.level(row + 1, x)).mean
    torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


def test_levels_may_differ_between_samples():
    pipe = toy_pipeline(three(TWO), size=2)
    x, t = torch.randn(2, 3, 2, 2), torch.tensor([700, 100])
    together = pipe.denoiser(x, pipe.level(t, x), torch.zeros(2), "epsilon")
    for i in range(2):
        alone = pipe.denoiser(x[i : i + 1], pipe.level(t[i], x), torch.zeros(1), "epsilon")
        torch.testing.assert_close(together[i : i + 1], alone)


def test_the_pipeline_is_a_diffusers_pipeline(tmp_path):
    pipe = toy_pipeline(three(TWO), size=2)
    pipe.save_pretrained(tmp_path)
    again = ToyPipeline.from_pretrained(tmp_path)
    images = [p("1", 5, generator=torch.Generator().manual_seed(0), output_type="np").images for p in (pipe, again)]
    assert np.array_equal(*images)
    assert again.config.size == 2
    assert pipe("1", 2).images[0].size == (2, 2)


def test_the_unsteered_ddpm_variance_follows_its_recursion():
    """specs/steering B0: the small posterior variance of DDPM under-disperses at finite steps."""
    pipe = toy_pipeline(size=48)
    pipe.scheduler.set_timesteps(10)
    grid = read_grid(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    x, expected = torch.randn(1, 3, 48, 48, generator=generator), 1.0
    for row in range(grid.steps):
        at, to = grid.level(row, x), grid.level(row + 1, x)
        eps = pipe.denoiser(x, at, torch.zeros(1), "epsilon")
        q = ddim(1.0)((x - at.sigma * eps) / at.alpha, eps, at, to)
        x = q.sample(torch.randn(x.shape, generator=generator))
        expected = expected * _gain(at, to) ** 2 + q.std.item() ** 2
    assert expected < 1
    assert x.var().item() == pytest.approx(expected, abs=0.03)


def _gain(at, to):
    """Of one ancestral step on a unit Gaussian, where x0hat = alpha x and eps = sigma x."""
    std = ddim(1.0)(torch.zeros(1), torch.zeros(1), at, to).std.item()
    return (to.alpha * at.alpha + math.sqrt(max(to.sigma.item() ** 2 - std**2, 0)) * at.sigma).item()
