"""Steering by gradients against the closed form: DAS, guidance, and the optimisation of noise."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from t2i_align.keys import generator
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.grid import Level
from t2i_align.pipelines.kernels import ddim, ode
from t2i_align.pipelines.toy import ToyDenoiser, ToyPipeline, toy_pipeline
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.steering import Ctx, SteeringError, load_method, steer
from t2i_align.steering.das import Particles, propose
from t2i_align.steering.gradients import Queries, latent_gradient, pull, step_gradient
from t2i_align.steering.noise import adam, chi, chi_gradient, climb
from tests.test_steering import end_variance, moments

STEPS, C = 8, 1.0
M, S, LAM = 1.5, 0.7, 2.0  # the quadratic reward -(x - M)^2 / (2 S^2) and its inverse temperature


def units(images):
    """The toy's latents, from its pictures."""
    return 16 * (images - 0.5)


def linear(images, prompts):
    return C * units(images)[:, 0, 0, 0]


def quadratic(images, prompts):
    return -((units(images)[:, 0, 0, 0] - M) ** 2) / (2 * S**2)


def context(
    reward=linear, flow=False, size=1, steps=STEPS, kernel=None, differentiable=True, max_batch=4096, **options
):
    pipe = options.pop("pipe", None) or toy_pipeline(flow=flow, size=size)
    scorer = FunctionScorer(reward, differentiable=differentiable)
    return Ctx(Driver(pipe), scorer, steps, kernel, max_batch=max_batch, decode_batch=max_batch, **options)


def close(found, target, bound, slack=0.01):
    """Whether means of independent groups meet their targets within five standard errors and a slack."""
    error = float(found.std(correction=1)) / math.sqrt(len(found))
    print(f"{float(found.mean()):.4f} +- {error:.4f}, exactly {target:.4f}")
    return abs(float(found.mean()) - target) < bound * error + slack


# DAS


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 1.0}, {"clip": 0.05}],  # tempered, with full strength at once, with shorter proposals
)
def test_das_samples_the_tilt_of_a_linear_reward(flow, options):
    method = load_method("das", particles=1024, lam=1.0, lam_units="raw", **options)
    result = method(context(flow=flow), Prompts.of(["0"] * 6))
    v = end_variance(flow)
    mean, variance = moments(result)
    assert close(mean, C * v, 5)
    assert close(variance, v, 5)
    assert close((result.log_normaliser - C**2 * v / 2).exp(), 1.0, 5)


@pytest.mark.parametrize("flow", [False, True])
def test_das_reaches_a_quadratic_target(flow):
    v = end_variance(flow)
    method = load_method("das", particles=512, lam=LAM, lam_units="raw", ess=1.0)
    result = method(context(quadratic, flow), Prompts.of(["0"] * 6))
    mean, variance = moments(result)
    precision = 1 / v + LAM / S**2
    normaliser = math.exp(-LAM * M**2 / (2 * (S**2 + LAM * v))) / math.sqrt(1 + LAM * v / S**2)
    assert close(mean, LAM * M / S**2 / precision, 5)
    assert close(variance, 1 / precision, 5)
    assert close(result.log_normaliser.exp() / normaliser, 1.0, 5)


def test_one_step_of_das_has_the_weights_it_should():
    """With x_s = (alpha_t / alpha_s) x_t + s n and twists c alpha x, the log-weight is s n c (alpha_s - alpha_t).

    But for a constant. Its variance is the published c^2 beta (sqrt(abar_s) - sqrt(abar_t))^2 for s^2 = beta; in
    `ddim(1)` s^2 is the posterior's variance. FK's is c^2 alpha_s^2 s^2.
    """
    ctx, row, B = context(), 4, 20_000
    cond = ctx.encode(Prompts.of(["0"] * B))
    x = torch.randn(B, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    step, rewards, gradient = step_gradient(ctx, x, row, cond, ddim(1.0), cond.prompts)
    below, ratio = propose(ctx, step.q, gradient, torch.full((B,), 1.0), row, list(range(B)))
    alpha, s = ctx.driver.grid(STEPS).alpha, float(step.q.std)
    torch.testing.assert_close(rewards, C * alpha[row].float() * x[:, 0, 0, 0], rtol=1e-4, atol=1e-4)
    weight = ratio + C * alpha[row + 1] * below[:, 0, 0, 0] - rewards
    variance = C**2 * s**2 * float(alpha[row + 1] - alpha[row]) ** 2
    fk = C**2 * s**2 * float(alpha[row + 1]) ** 2
    print(f"variance {float(weight.var()):.5f}, exactly {variance:.5f}; of FK {fk:.5f}")
    assert float(weight.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / B))
    assert float(weight.exp().mean()) == pytest.approx(
        math.exp(C**2 * s**2 * float(alpha[row + 1]) ** 2 / 2), rel=5 * math.sqrt(variance / B)
    )


def test_weights_of_a_whole_run_of_das():
    """Without resampling: c^2 (alpha_0^2 + sum of s^2 (alpha_s - alpha_t)^2), the first term x_T's own chances."""
    method = load_method("das", particles=8192, lam=1.0, lam_units="raw", gamma=1.0, ess=0.0)
    ctx = context(max_batch=8192)
    found = float(method(ctx, Prompts.of("0")).log_weight.var())
    alpha = ctx.driver.grid(STEPS).alpha
    level = [Level(a, (1 - a**2).sqrt()) for a in alpha]
    stds = torch.stack([ddim(1.0)(a, a, a_, b_).std for a, a_, b_ in zip(alpha, level[:-1], level[1:], strict=False)])
    target = C**2 * float(alpha[0] ** 2 + (stds.square() * (alpha[1:] - alpha[:-1]).square()).sum())
    print(f"{found:.5f}, exactly {target:.5f}; of FK {C**2 * end_variance(False):.3f}")
    assert found == pytest.approx(target, rel=5 * math.sqrt(2 / 8192))


def test_all_of_a_particle_is_resampled():
    """Ancestors (0, 0): slot 1 goes on with the mean, the gradient and the twist of slot 0."""
    made = Particles(torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1), torch.tensor([1.0, 2.0])).take(
        torch.zeros(2).long()
    )
    assert made.twist.tolist() == [1.0, 1.0]
    assert torch.equal(made.mean[1], made.mean[0])
    assert torch.equal(made.gradient[1], made.gradient[0])


def test_tempering_is_the_published_schedule():
    from t2i_align.steering.das import DAS

    assert DAS().temper(100) == pytest.approx([min(1.008**i - 1, 1.0) for i in range(100)] + [1.0], abs=5e-3)
    assert DAS().temper(8) == pytest.approx([min(1.1**i - 1, 1.0) for i in range(8)] + [1.0], abs=0.06)
    assert DAS(gamma=0.001).temper(5)[-1] == 1.0


@pytest.mark.parametrize(
    ("method", "options"), [("das", {"particles": 1}), ("guidance", {}), ("guidance", {"form": "dps"})]
)
@pytest.mark.parametrize("pipeline", ["toy", "toy-flow", "tiny-sd"])
def test_lam_0_is_the_base_sampler_bit_for_bit(method, options, pipeline):
    from t2i_align.pipelines import load_pipeline

    pipe = load_pipeline("tiny-sd") if pipeline == "tiny-sd" else toy_pipeline(flow=pipeline == "toy-flow")
    prompts, steps = Prompts.of(["a red circle", "1"]), 3
    ctx = context(lambda images, prompts: images.mean((1, 2, 3)), pipe=pipe, steps=steps)
    result = load_method(method, lam=0.0, **options)(ctx, prompts)
    ids = ctx.ids(prompts, result.log_weight.shape[1])
    cond = ctx.driver.encode(prompts).repeat(len(ids) // 2)
    assert torch.equal(result.latents.flatten(0, 1), ctx.driver.rollout(cond, steps, ctx.noisy, ids=ids).x[:, -1])


def test_lam_counts_in_the_spread_of_plain_samples():
    prompts = Prompts.of("0")
    small, large, given = (
        load_method("das", particles=4, **options)(context(reward), prompts)
        for reward, options in (
            (linear, {}),
            (lambda images, prompts: 100 * linear(images, prompts), {}),
            (linear, {"lam_units": "raw"}),
        )
    )
    torch.testing.assert_close(small.latents, large.latents, rtol=1e-3, atol=1e-3)
    assert small.cost.forwards == given.cost.forwards + 8 * STEPS  # the pilot
    with pytest.warns(UserWarning, match="score alike"):
        load_method("guidance")(context(lambda images, prompts: 0 * linear(images, prompts)), prompts)


# Guidance


def fine(steps):
    """A toy whose grid has abar = exp(-12 (1 - i / steps)^3): from noise to data, with small steps near the data."""
    abar = torch.exp(-12 * (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** 3)
    betas = (1 - abar[:-1] / abar[1:]).flip(0)
    scheduler = DDIMScheduler(num_train_timesteps=steps, trained_betas=betas.tolist(), clip_sample=False)
    pipe = ToyPipeline(ToyDenoiser(), scheduler, 32)  # 3072 coordinates, each a draw
    pipe.set_progress_bar_config(disable=True)
    return pipe, abar.tolist()


def law(abar, kernel, slope, curve):
    """Mean and variance of guidance's end, from coefficients, when lam dr/dx0 is slope - curve x0.

    x0hat = alpha x, so the gradient with respect to x is alpha (slope - curve alpha x).
    """
    mean, variance, one, zero = 0.0, 1.0, torch.ones(()), torch.zeros(())
    for a, b in zip(abar[:-1], abar[1:], strict=True):
        here, there = (Level(torch.tensor(v**0.5), torch.tensor((1 - v) ** 0.5)) for v in (a, b))
        alpha, sigma = a**0.5, (1 - a) ** 0.5
        of_x0, of_eps = (kernel(*pair, here, there) for pair in ((one, zero), (zero, one)))
        push = float(of_x0.mean) * sigma**2 / alpha - float(of_eps.mean) * sigma
        gain = float(of_x0.mean) * alpha + float(of_eps.mean) * sigma - push * curve * a
        mean = gain * mean + push * slope * alpha
        variance = gain**2 * variance + float(of_x0.std) ** 2
    return mean, variance


SQUARE, LINE = (LAM * M / S**2, LAM / S**2), (C, 0.0)


@pytest.mark.parametrize(
    ("kernel", "reward", "golden"),
    [
        (ddim(1.0), SQUARE, (1.475, 0.1225)),  # the target has mean 1.2048 and variance 0.1968
        (ode(), SQUARE, (1.920, 0.0169)),
        (ddim(1.0), LINE, (C, 1.0)),
        (ode(), LINE, (C * (1 - math.exp(-6)), 1.0)),  # the start itself is not tilted, by c sqrt(abar)
    ],
)
def test_guidance_ends_where_theory_says(kernel, reward, golden):
    """The law of its end at 60 steps, and that law's limit (extrapolated) against published numbers."""
    coarse, finer = (law(fine(n)[1], kernel, *reward) for n in (400, 800))
    limit = [2 * b - a for a, b in zip(coarse, finer, strict=True)]
    assert limit == pytest.approx(golden, abs=1.5e-3)
    pipe, abar = fine(60)
    slope, curve = reward
    ctx = context(
        lambda images, prompts: (slope * units(images) - curve * units(images) ** 2 / 2).sum((1, 2, 3)),
        pipe=pipe, steps=60, kernel=kernel,
    )  # fmt: skip
    x = load_method("guidance", lam=1.0, lam_units="raw")(ctx, Prompts.of("0")).latents.flatten()
    mean, variance = law(abar, kernel, *reward)
    print(f"{float(x.mean()):.4f} {float(x.var()):.4f}, exactly {mean:.4f} {variance:.4f}, limit {limit}")
    assert float(x.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / len(x)) + 1e-3)
    assert float(x.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / len(x)) + 1e-3)


@pytest.mark.parametrize("jacobian", ["exact", "cheap"])
def test_guidance_shifts_flow_models_by_the_tilt(jacobian):
    def total(images, prompts):
        return C * units(images).sum((1, 2, 3))

    ctx = context(total, flow=True, size=32, steps=100)
    x = load_method("guidance", lam=1.0, lam_units="raw", jacobian=jacobian)(ctx, Prompts.of("0")).latents.flatten()
    print(float(x.mean()))
    assert float(x.mean()) == pytest.approx(C, abs=5 / math.sqrt(len(x)) + 0.02)


@pytest.mark.parametrize("flow", [False, True])
def test_the_cheap_jacobian_is_exact_for_normal_data(flow):
    ctx = context(quadratic, flow)
    cond = ctx.encode(Prompts.of(["0"] * 5))
    x = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    exact, cheap = (step_gradient(ctx, x, 3, cond, ctx.noisy, cond.prompts, j)[2] for j in ("exact", "cheap"))
    torch.testing.assert_close(exact, cheap, rtol=1e-4, atol=1e-5)
    at = ctx.driver.grid(STEPS).level(3, x)
    slope = -(ctx.driver.step(x, 3, cond, STEPS, ctx.noisy).x0[:, 0, 0, 0] - M) / S**2
    factor = at.alpha if not flow else at.alpha / (at.alpha**2 + at.sigma**2)  # 1 / alpha times abar
    torch.testing.assert_close(cheap[:, 0, 0, 0], slope * factor, rtol=1e-4, atol=1e-5)
    assert ctx.cost.backwards == 5
    assert ctx.cost.decode_backwards == 10


def test_dps_moves_the_draw_and_clips_each_sample():
    ctx = context(quadratic)
    cond = ctx.encode(Prompts.of(["0"] * 2))
    step, _, gradient = step_gradient(
        ctx, torch.tensor([[[[0.1]]] * 3, [[[-9.0]]] * 3]), 3, cond, ddim(1.0), cond.prompts
    )
    lam = torch.full((2,), 0.3)
    moved = load_method("guidance", form="dps").guide(ctx, step, gradient, lam, 3, ddim(1.0))
    torch.testing.assert_close(moved.mean, step.q.mean + 0.3 * gradient)
    clipped = (
        load_method("guidance", form="dps", clip=0.5).guide(ctx, step, gradient, lam, 3, ddim(1.0)).mean - step.q.mean
    )
    torch.testing.assert_close(clipped[0], 0.3 * gradient[0])
    assert float(clipped[1].square().mean().sqrt()) == pytest.approx(0.5, rel=1e-4)


def test_recurrence_puts_fresh_noise_back():
    """Unsteered, a step done twice is still the kernel applied to the noising process: its law is known."""
    ctx = context(lambda images, prompts: images.mean((1, 2, 3)), size=64, kernel=ddim(1.0))
    x = load_method("guidance", lam=0.0, recurrence=2)(ctx, Prompts.of("0")).latents.flatten()
    grid, variance = ctx.driver.grid(STEPS), 1.0
    cond = ctx.driver.encode("0")
    for row in range(STEPS):
        q = ctx.driver.step(torch.ones(1, 3, 64, 64), row, cond, STEPS, ddim(1.0)).q
        gain, std = float(q.mean.detach()[0, 0, 0, 0]) ** 2, float(q.std) ** 2
        ratio = float(grid.alpha[row] / grid.alpha[row + 1]) ** 2
        below = gain * variance + std
        again = ratio * below + float(grid.sigma[row]) ** 2 - ratio * float(grid.sigma[row + 1]) ** 2
        variance = gain * again + std
    print(float(x.var()), variance)
    assert float(x.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / len(x)))


# Noise


def test_reno_finds_least_squares_on_a_linear_generator():
    A = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    y = torch.randn(20, generator=torch.Generator().manual_seed(1))
    reward = lambda images, prompts: -0.0015 * (units(images).flatten(1) @ A.T - y).square().sum(1)  # noqa: E731
    ctx = context(reward, size=2, steps=1)
    result = load_method("reno", particles=2, regularise=0.0, iterations=200)(ctx, Prompts.of(["0", "0"]))
    target = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    torch.testing.assert_close(result.latents.reshape(4, 12), target.expand(4, 12), rtol=1e-3, atol=1e-3)
    assert result.cost.forwards == result.cost.backwards == 4 * 200


def test_the_regulariser_alone_drives_the_norm_to_its_mode():
    ctx = context(lambda images, prompts: 0 * images.sum((1, 2, 3)), size=2, steps=1)
    load_method("reno", particles=3, regularise=1.0, lr=0.5)(ctx, Prompts.of("0"))
    assert ctx.history[-1]["energy"][0] == pytest.approx([11 / 12] * 3, rel=1e-3)
    z = torch.randn(2, 16_384, generator=torch.Generator().manual_seed(0))
    z = z / z.norm(dim=1, keepdim=True) * 127.996094
    torch.testing.assert_close(chi_gradient(z), torch.zeros_like(z), rtol=0, atol=1e-6)
    z = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(chi_gradient(z.float()), torch.autograd.grad(chi(z).sum(), z)[0].float())


def test_dno_finds_the_ridge_solution():
    """-|x - y|^2 / 2 - gamma |z|^2 / 2 with x = a z has its maximum at a y / (a^2 + gamma)."""
    ctx, gamma, seen = context(size=2, kernel=ode()), 0.7, []
    y = torch.randn(12, generator=torch.Generator().manual_seed(1))
    ctx.reward = FunctionScorer(
        lambda images, prompts: -(units(images).flatten(1) - y).square().sum(1) / 2, differentiable=True
    )
    prompts = Prompts.of(["0"] * 2)
    cond, ids = ctx.encode(prompts), ctx.ids(prompts, 1)

    def prior(z, number):
        seen.append(z.clone())
        return -gamma * z

    method = load_method("dno", particles=1, iterations=150, lr=0.05)
    climb(ctx, method, prompts, ids, ctx.start(cond, ids), lambda z, who: ctx.unroll(z, cond[who], ode()), prior, adam)
    with torch.no_grad():
        a = float(ctx.driver.unroll(torch.ones(1, 3, 2, 2), cond[:1], STEPS, ode()).mean())
    torch.testing.assert_close(seen[-1].flatten(1), (a * y / (a**2 + gamma)).expand(2, 12), rtol=0, atol=5e-3)


def test_dno_over_all_noises_begins_at_the_plain_sample_and_climbs():
    prompts = Prompts.of(["0", "1"])
    ctx = context(quadratic, size=2)
    result = load_method("dno", particles=2, iterations=15, lr=0.05, permutations=2)(ctx, prompts)
    ids = ctx.ids(prompts, 2)
    base = ctx.driver.rollout(ctx.driver.encode(prompts).repeat(2), STEPS, ddim(1.0), ids=ids).x[:, -1]
    first = torch.tensor(ctx.history[0]["rewards"]).flatten()
    torch.testing.assert_close(first, ctx.rewards(base, prompts.repeat(2)), rtol=1e-4, atol=1e-4)
    assert (result.totals.flatten() > first).all()
    assert result.totals.flatten().tolist() == pytest.approx(
        torch.tensor(ctx.history[-1]["best"]).flatten().tolist(), abs=1e-4
    )
    assert result.cost.forwards == 2 * result.cost.backwards == 2 * 15 * 4 * STEPS  # checkpointing computes twice


def test_fresh_noise_is_likely_and_constants_are_not():
    method = load_method("dno", permutations=20)
    fresh = torch.randn(4, 2, 2048, generator=torch.Generator().manual_seed(0))
    floor = -4 * math.log(2)
    bound = method.log_probability(fresh, 0, 0)
    print(bound / floor)
    assert (bound <= floor + 1e-5).all()
    assert (bound > 1.2 * floor).all()
    for unlikely in (torch.ones_like(fresh), 1.3 * fresh, fresh.sort(-1).values):
        assert (method.log_probability(unlikely, 0, 0) < 5 * floor).all()
        assert method.log_probability_gradient(unlikely, 0, 0).any()
    some = (0.5 * fresh[:2, :, :20]).double().requires_grad_()
    (slope,) = torch.autograd.grad(method.log_probability(some, 0, 3).sum(), some)
    torch.testing.assert_close(method.log_probability_gradient(some, 0, 3), slope)
    orders = method._orders(torch.zeros(1, 20), 0, 3)
    assert torch.equal(next(orders), torch.randperm(20, generator=generator(0, "order", 3, 0)))  # one at a time
    with pytest.raises(SteeringError, match="at least 4 numbers"):
        load_method("dno", noises="start", iterations=2)(context(size=1), Prompts.of("0"))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("das", {}),
        ("guidance", {"clip": 0.5, "recurrence": 2}),
        ("reno", {"iterations": 5}),
        ("dno", {"iterations": 5, "permutations": 2}),
        ("dno", {"iterations": 3, "permutations": 2, "gradient": "hybrid", "noises": "start", "width": 3}),
    ],
)
def test_a_prompt_is_steered_alike_alone_and_among_others(method, options):
    chosen, exact = load_method(method, particles=2, **options), options.get("gradient") != "hybrid"
    far = lambda images, prompts: 1e3 ** torch.tensor([float(p) for p in prompts]) * quadratic(images, prompts)  # noqa: E731
    alone, among = (
        chosen(context(far, size=2, max_batch=size, differentiable=exact), Prompts.of(prompts))
        for prompts, size in ((["0"], 8), (["1", "0", "0"], 3))
    )
    torch.testing.assert_close(alone.latents[0], among.latents[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(among.latents[1], among.latents[2], atol=1e-2)


def test_finished_samples_leave_the_batch():
    plateau = lambda images, prompts: quadratic(images, prompts).clamp(max=-0.5)  # noqa: E731
    ctx = context(plateau, size=2, steps=1)
    load_method("reno", particles=4, target=-0.5)(ctx, Prompts.of("0"))
    active = [row["active"] for row in ctx.history]
    print(active)
    assert active[0] == 4
    assert active == sorted(active, reverse=True)
    assert ctx.cost.forwards == sum(active) < 4 * 50
    flat = context(lambda images, prompts: 0 * quadratic(images, prompts), size=2, steps=1)
    load_method("reno", patience=3)(flat, Prompts.of("0"))
    assert flat.cost.forwards == 4 * 4


def test_a_sample_whose_reward_is_no_number_stops_at_its_best_iterate():
    cliff = lambda images, prompts: torch.where(quadratic(images, prompts) < -0.3, quadratic(images, prompts), math.nan)  # noqa: E731
    ctx = context(cliff, size=2, steps=1)
    result = load_method("reno")(ctx, Prompts.of("0"))
    assert torch.equal(result.totals[0].isfinite(), torch.tensor(ctx.history[0]["rewards"][0]).isfinite())
    assert ctx.history[0]["active"] == 4
    assert ctx.history[-1]["active"] < 4


def test_particles_without_a_reward_weigh_nothing():
    def broken(images, prompts):
        return torch.where(units(images)[:, 1, 0, 0] > 0.3, math.nan, quadratic(images, prompts))

    with pytest.warns(UserWarning, match="are no numbers"):
        guided = load_method("guidance", particles=16, lam_units="raw")(context(broken), Prompts.of("0"))
    assert torch.isneginf(guided.log_weight[~guided.totals.isfinite()]).all()
    das = load_method("das", particles=64, lam_units="raw", ess=0.0)(context(broken), Prompts.of("0"))
    assert torch.isneginf(das.log_weight[~das.totals.isfinite()]).all()
    assert float(das.log_weight.exp().sum()) == pytest.approx(1)
    assert das.latents.isfinite().all()


def test_the_best_iterate_is_kept():
    """Steps far too long lead astray: what is returned is still the best that was seen."""
    ctx = context(quadratic, size=2, steps=1)
    result = load_method("reno", lr=20.0, regularise=0.0, iterations=4)(ctx, Prompts.of("0"))
    rewards = torch.tensor([row["rewards"][0] for row in ctx.history])
    torch.testing.assert_close(result.totals[0], rewards.amax(0), rtol=1e-4, atol=1e-4)
    assert (rewards[-1] < rewards.amax(0)).any()


def test_few_step_samplers_keep_their_noise_from_iteration_to_iteration():
    ctx = context(quadratic, size=2, steps=4, kernel=ddim(1.0))
    result = load_method("reno", lr=1e-6, regularise=0.0, iterations=3)(ctx, Prompts.of("0"))
    rewards = torch.tensor([row["rewards"][0] for row in ctx.history])
    torch.testing.assert_close(rewards, rewards[:1].expand(3, 4), rtol=1e-3, atol=1e-3)
    assert result.start.shape == (1, 4, 3, 2, 2)
    assert result.streams.shape == (1, 4, 4)


def test_an_optimised_sample_is_made_again_from_its_noise():
    from t2i_align.steering.base import Line

    ctx, prompts = context(quadratic, size=2, steps=4, kernel=ddim(1.0)), Prompts.of("0")
    result = load_method("reno", iterations=4)(ctx, prompts)
    ids = ctx.ids(prompts, 4)
    lines = {i: Line(z, tuple(s.tolist())) for i, z, s in zip(ids, result.start[0], result.streams[0], strict=True)}
    again = context(quadratic, size=2, steps=4, kernel=ddim(1.0), lines=lines)
    made = again.sample(again.encode(prompts).repeat(4), ids)
    torch.testing.assert_close(made, result.latents[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_images", [False, True])
def test_the_hybrid_gradient_is_the_gradient_in_expectation(of_images):
    ctx = context(quadratic, size=2, max_batch=64)
    latents = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    prompts = Prompts.of(["0"] * 3)
    _, exact = latent_gradient(ctx, latents, prompts)
    size = 0.01 if of_images else 0.1
    rewards, found = latent_gradient(ctx, latents, prompts, Queries(1000, size, of_images, [1, 2, 3], 0))
    torch.testing.assert_close(rewards, ctx.rewards(latents, prompts))
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    print(error)
    assert (error < 5 * math.sqrt(12 / 1000) / math.sqrt(2)).all()  # E|u u' g - g|^2 = (d + 1) |g|^2


def test_small_gradients_survive_half_precision():
    x = torch.ones(2, 4, dtype=torch.float16, requires_grad=True)
    slope = torch.tensor([[1e-9], [1e6]]).expand(2, 4)
    torch.testing.assert_close(pull(2 * x, x, slope), 2 * slope, rtol=1e-3, atol=0)
    assert not pull(2 * x, x, torch.full((2, 4), math.nan)).any()


def test_half_precision_has_the_same_gradient():
    """A reward so weak that its gradient is no fp16 number, through network and decoder in fp16."""
    from t2i_align.pipelines import load_pipeline

    found = []
    for dtype in (torch.float32, torch.float16):
        pipe = load_pipeline("tiny-sd").to(dtype)
        ctx = context(lambda images, prompts: 1e-7 * images[:, 0].mean((1, 2)), pipe=pipe, steps=10, kernel=ddim(1.0))
        cond = ctx.encode(Prompts.of(["a blue circle"] * 2))
        x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        found.append(step_gradient(ctx, x.to(dtype), 6, cond, ddim(1.0), cond.prompts)[2].flatten(1))
    assert found[0].abs().max() < 6e-8  # the smallest fp16 number
    cosine = torch.cosine_similarity(*(gradient / gradient.norm(dim=1, keepdim=True) for gradient in found))
    print(cosine)
    assert (cosine > 0.999).all()


def test_reno_raises_the_reward_of_a_real_pipeline():
    rewards = FunctionScorer(lambda images: images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)), "red", True)
    result = steer("tiny-sd", "a blue circle", rewards, "reno", particles=2, steps=4, iterations=8, lr=0.3)
    base = steer("tiny-sd", "a blue circle", rewards, "best_of_n", particles=2, steps=4, kernel="ode")
    print(result.totals, base.totals)
    assert (result.totals > base.totals + 0.001).all()
    assert result.totals.mean() > base.totals.mean() + 0.005


def test_what_cannot_be_done_is_refused():
    for method in ("das", "guidance", "reno", "dno"):
        with pytest.raises(SteeringError, match="differentiable reward"):
            steer("no-such-pipeline", "0", "verifier", method)
    with pytest.raises(SteeringError, match="stochastic kernel for dno"):
        load_method("dno")(context(kernel=ode()), Prompts.of("0"))
    with pytest.raises(SteeringError, match="stochastic kernel for das"):
        load_method("das")(context(kernel=ode()), Prompts.of("0"))
    detached = lambda images, prompts: linear(images, prompts).detach()  # noqa: E731
    with pytest.raises(SteeringError, match="have no gradient"):
        load_method("reno")(context(detached), Prompts.of("0"))
    ctx = context()
    ctx.reward.groupwise = True
    with pytest.raises(SteeringError, match="compares the images"):
        load_method("reno")(ctx, Prompts.of("0"))
