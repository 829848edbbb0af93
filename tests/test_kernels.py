"""Kernels against hand-computed values, limit cases and diffusers' own steps."""

import math

import diffusers
import pytest
import torch

from t2i_align.errors import T2IError
from t2i_align.pipelines.grid import Level, read_grid
from t2i_align.pipelines.kernels import (
    PREDICTIONS,
    Gaussian,
    cps,
    dance_sde,
    ddim,
    flow_sde,
    load_kernel,
    ode,
    output_to_x0_eps,
    per_dim,
    x0_eps_to_output,
)


def scalar(value):
    return torch.tensor([[value]])


def vp(square):
    return Level(torch.tensor(math.sqrt(square)), torch.tensor(math.sqrt(1 - square)))


def linear(t):
    return Level(torch.tensor(1 - t), torch.tensor(t))


def flow_step(kernel, x, v, t, s):
    x0, eps = output_to_x0_eps(scalar(v), scalar(x), linear(t), "flow")
    return kernel(x0, eps, linear(t), linear(s))


def test_ddpm_step_by_hand():
    """specs: alpha_bar .25 -> .64, eta 1, x 1, eps .5."""
    x0, eps = output_to_x0_eps(scalar(0.5), scalar(1.0), vp(0.25), "epsilon")
    q = ddim(1.0)(x0, eps, vp(0.25), vp(0.64))
    assert x0.item() == pytest.approx(1.133975, abs=1e-6)
    assert q.std.item() == pytest.approx(0.540833, abs=1e-6)
    assert q.mean.item() == pytest.approx(1.037083, abs=1e-6)
    assert q.mean.item() == pytest.approx(0.65 * x0.item() + 0.3, abs=1e-6)  # the DDPM posterior mean
    assert q.log_prob(q.mean).item() == pytest.approx(-0.304293, abs=1e-6)


def test_flow_grpo_step_by_hand():
    """specs: t .5 -> .4, x 1, v 2, level .7."""
    q = flow_step(flow_sde(0.7), 1.0, 2.0, 0.5, 0.4)
    assert q.mean.item() == pytest.approx(0.702, abs=1e-6)
    assert q.std.item() == pytest.approx(0.221359, abs=1e-6)
    other = flow_step(flow_sde(0.7), 1.0, 2.1, 0.5, 0.4)
    assert q.kl(other).item() == pytest.approx(1.58166e-3, rel=1e-4)
    dance = flow_step(dance_sde(0.7), 1.0, 2.0, 0.5, 0.4)
    assert dance.mean.item() == pytest.approx(0.702, abs=1e-6)
    assert flow_step(flow_sde(0.0), 1.0, 2.0, 0.5, 0.4).mean.item() == pytest.approx(0.8, abs=1e-6)


def test_flow_grpo_step_at_the_start_uses_the_next_level():
    q = flow_step(flow_sde(0.7), 1.0, 2.0, 1.0, 0.9)
    assert q.std.item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), abs=1e-5)


def test_flow_sde_keeps_the_marginal_variance():
    """specs: x0 ~ N(0, .25) has v = 1.2 x at t .5; a step of -.01 takes variance .3125 to .305123."""
    q = flow_step(flow_sde(0.7), 1.0, 1.2, 0.5, 0.49)
    assert 0.3125 * q.mean.item() ** 2 + q.std.item() ** 2 == pytest.approx(0.305123, abs=2e-6)
    q = flow_step(ode(), 1.0, 1.2, 0.5, 0.49)
    assert 0.3125 * q.mean.item() ** 2 == pytest.approx(0.305045, abs=2e-6)


@pytest.mark.parametrize(
    ("kernel", "steps", "variance"),
    [
        *((flow_sde(0.7), n, v) for n, v in [(10, 0.9313), (20, 0.9781), (50, 1.0025), (100, 1.0079)]),
        *((ode(), n, v) for n, v in [(10, 0.7726), (20, 0.8793), (50, 0.9499), (100, 0.9746)]),
    ],
)
def test_final_variance_of_a_flow_of_unit_gaussians(kernel, steps, variance):
    """specs/steering B0: exact velocity v = (2t - 1) x / S, S = (1 - t)^2 + t^2, x0 ~ N(0, 1)."""
    times = [1 - i / steps for i in range(steps + 1)]
    var = 1.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        q = flow_step(kernel, 1.0, (2 * t - 1) / ((1 - t) ** 2 + t**2), t, s)
        var = var * q.mean.item() ** 2 + q.std.item() ** 2
    assert var == pytest.approx(variance, abs=6e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers_ddim(eta, prediction):
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(10)
    grid = read_grid(scheduler)
    g = torch.Generator().manual_seed(0)
    x, output, noise = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    for row in range(grid.steps):
        at, to = (Level(grid.alpha[i], grid.sigma[i]) for i in (row, row + 1))
        x0, eps = output_to_x0_eps(output, x, at, prediction)
        q = ddim(eta).gaussian(x0, eps, at, to)
        theirs = scheduler.step(output, grid.t[row], x, eta=eta, variance_noise=noise if eta else None)
        torch.testing.assert_close(q.sample(noise if eta else 0 * noise), theirs.prev_sample, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-9, atol=1e-9)


def test_ode_is_the_flow_euler_step():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    grid = read_grid(scheduler)
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for row in range(5):
        at, to = grid.level(row, x), grid.level(row + 1, x)
        x0, eps = output_to_x0_eps(v, x, at, "flow")
        mine = ode()(x0, eps, at, to).mean
        torch.testing.assert_close(mine, scheduler.step(v, grid.t[row], x).prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_are_round_trips(prediction):
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.02, 0.4, 0.9, 0.999], dtype=torch.float64).reshape(4, 1, 1, 1)
    at = Level(1 - sigma if prediction == "flow" else (1 - sigma.square()).sqrt(), sigma)
    output = x0_eps_to_output(x0, eps, at, prediction)
    back = output_to_x0_eps(output, at.alpha * x0 + at.sigma * eps, at, prediction)
    torch.testing.assert_close(back[0], x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back[1], eps, rtol=1e-10, atol=1e-10)


def test_unknown_predictions_are_refused():
    with pytest.raises(T2IError, match="'score'"):
        output_to_x0_eps(scalar(0.0), scalar(0.0), vp(0.5), "score")
    with pytest.raises(T2IError, match="'score'"):
        x0_eps_to_output(scalar(0.0), scalar(0.0), vp(0.5), "score")


def test_every_kernel_ends_on_x0_without_noise():
    x0, eps = torch.randn(2, 3), torch.randn(2, 3)
    for kernel in (ddim(1.0), ddim(0.5), ode(), cps(0.7)):
        q = kernel(x0, eps, vp(0.9), vp(1.0))
        assert torch.equal(q.mean, x0)
        assert not q.std.any()


def test_cps_keeps_the_coefficients():
    q = flow_step(cps(0.5), 1.0, 2.0, 0.5, 0.4)
    std = 0.4 * math.sin(math.pi / 4)
    assert q.std.item() == pytest.approx(std, abs=1e-6)
    assert q.mean.item() == pytest.approx(0.0 * 0.6 + 2.0 * math.sqrt(0.16 - std**2), abs=1e-6)


def test_gaussian_against_torch():
    g = torch.Generator().manual_seed(0)
    mean, other, x = (torch.randn(3, 2, 4, generator=g) for _ in range(3))
    std, wide = torch.rand(3, 2, 4, generator=g) + 0.5, torch.rand(3, 1, 1, generator=g) + 0.5
    q, p = Gaussian(mean, std), Gaussian(other, wide)
    theirs = torch.distributions.Normal(mean, std), torch.distributions.Normal(other, wide.expand_as(mean))
    torch.testing.assert_close(q.log_prob(x), theirs[0].log_prob(x).sum((1, 2)))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(*theirs).sum((1, 2)))
    torch.testing.assert_close(per_dim(q.log_prob(x), q), theirs[0].log_prob(x).mean((1, 2)))


def test_a_gaussian_without_noise_has_log_prob_and_kl_of_zero_and_finite_gradients():
    mean = torch.randn(2, 3, requires_grad=True)
    q = Gaussian(mean, torch.zeros(()))
    total = q.log_prob(torch.randn(2, 3)).sum() + q.kl(Gaussian(torch.zeros(2, 3), torch.zeros(()))).sum()
    total.backward()
    assert total == 0
    assert mean.grad.isfinite().all()


@pytest.mark.parametrize("made", [lambda: ddim(1.5), lambda: cps(-1), lambda: flow_sde(-1), lambda: dance_sde(-0.1)])
def test_impossible_strengths_are_refused(made):
    with pytest.raises(T2IError, match="Expected"):
        made()


def test_kernels_say_what_they_are():
    assert ddim(1).stochastic
    assert not ddim(0).stochastic
    assert not ode().stochastic
    assert flow_sde().linear_only
    assert not cps().linear_only


@pytest.mark.parametrize("text", ["ddim(0.5)", "ode", "cps(0.7)", "flow_sde(0.3)", "dance_sde(0.3)"])
def test_kernels_are_read_from_their_names(text):
    kernel = load_kernel(text)
    assert kernel.name == text
    assert load_kernel(kernel) is kernel
    assert load_kernel(" ddim ").name == "ddim(1)"


@pytest.mark.parametrize("text", ["native", "ddim(a)", "ode(1)", "ddim(1)(2)", "ddim(2)", ""])
def test_other_names_are_refused(text):
    with pytest.raises(T2IError):
        load_kernel(text)
