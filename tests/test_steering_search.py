"""Candidates, searches, chains and joint guidance against what can be computed by hand on the toy."""

import math

import pytest
import torch

from t2i_align.config import ConfigError
from t2i_align.pipelines import load_pipeline
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim, flow_sde, ode
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.steering import Ctx, SteeringError, load_method, method_name
from t2i_align.steering.best_of_n import expected_best
from t2i_align.steering.expanded import JointDriver, joint_guidance
from t2i_align.steering.noise_search import neighbour

STEPS = 8
LARGE = {"max_batch": 1 << 15, "decode_batch": 1 << 15}


def first(images, prompts):
    """The toy's first coordinate at its first pixel."""
    return 16 * (images[:, 0, 0, 0] - 0.5)


def context(flow=False, reward=first, kernel=None, seed=0, size=1, **options):
    driver = Driver(toy_pipeline(flow=flow, size=size))
    return Ctx(driver, FunctionScorer(reward), STEPS, kernel, seed, **(LARGE | options))


def chain_of_the_sampler(flow):
    """Each row's x_next = a x + std noise on a prior N(0, 1): [(a, std)], from the driver itself."""
    driver = Driver(toy_pipeline(flow=flow))
    kernel, cond = (flow_sde(0.7) if flow else ddim(1.0)), driver.encode("0")
    with torch.no_grad():
        qs = [driver.step(torch.ones(1, 3, 1, 1), row, cond, STEPS, kernel).q for row in range(STEPS)]
    return [(float(q.mean[0, 0, 0, 0]), float(q.std)) for q in qs]


def end_variance(flow):
    variance = 1.0
    for a, std in chain_of_the_sampler(flow):
        variance = a**2 * variance + std**2
    return variance


def moments(result):
    x = result.latents[..., 0, 0, 0].double().flatten()
    return float(x.mean()), float(x.var()), math.sqrt(float(x.var()) / len(x))


# svdd


def test_one_candidate_is_the_base_bit_for_bit():
    ctx = context()
    ids = ctx.ids(Prompts.of(["0", "1"]), 3)
    base = ctx.driver.rollout(ctx.driver.encode(["0", "1"]).repeat(3), STEPS, ddim(1.0), ids=ids, batch_size=1 << 15)
    result = load_method("svdd", particles=3, candidates=1)(context(), Prompts.of(["0", "1"]))
    assert torch.equal(result.latents.flatten(0, 1), base.x[:, -1])
    assert result.cost.forwards == 6 * STEPS


@pytest.mark.parametrize("candidates", [4, 64])
def test_svdd_nears_the_tilt_as_candidates_grow(candidates):
    """With lam = 1 / alpha the plug-in value is exact but for a constant: mean and variance v of the tilt exp(x)."""
    result = load_method("svdd", particles=600, candidates=candidates, lam=1.0)(context(), Prompts.of("0"))
    v, (mean, variance, error) = end_variance(False), moments(result)
    print(f"M={candidates}: mean {mean:.3f} +- {error:.3f}, variance {variance:.3f}; the tilt has {v:.3f}")
    if candidates == 64:
        assert abs(mean - v) < 4 * error + 0.02
        assert variance == pytest.approx(v, rel=4 * math.sqrt(2 / 600))
    else:
        assert 0.5 * v < mean < v - 4 * error  # biased towards the base


@pytest.mark.parametrize("flow", [False, True])
def test_svdd_by_an_exact_value_function(flow):
    """The sampler's own value of exp(x0), log E[exp(x_N) | x_row] = (product of the later a) x + const."""
    chain = chain_of_the_sampler(flow)
    value = lambda x, row, cond: math.prod(a for a, _ in chain[row:]) * x[:, 0, 0, 0]  # noqa: E731
    method = load_method("svdd", particles=600, candidates=64, lam=1.0, value=value)
    result = method(context(flow), Prompts.of("0"))
    v, (mean, variance, error) = end_variance(flow), moments(result)
    print(f"mean {mean:.3f} +- {error:.3f}, variance {variance:.3f}; the tilt has {v:.3f}")
    assert abs(mean - v) < 4 * error + 0.02
    assert result.cost.forwards == 600 * STEPS  # a value function saves the candidates' network calls


def test_the_highest_value_shifts_each_step_by_the_expected_maximum():
    """Candidates differ by std noise: the best of M moves a step by std E[max of M normals], however far that goes."""
    M, shift, scale = 8, 0.0, 1.0
    normal = torch.randn(200_000, M, generator=torch.Generator().manual_seed(0))
    highest = float(normal.max(1).values.mean())
    for a, std in reversed(chain_of_the_sampler(False)):
        shift, scale = shift + scale * std * highest, scale * a
    result = load_method("svdd", particles=2000, candidates=M)(context(), Prompts.of("0"))
    mean, _, error = moments(result)
    print(f"mean {mean:.3f} +- {error:.3f}, exactly {shift:.3f}; the tilt has {end_variance(False):.3f}")
    assert mean == pytest.approx(shift, abs=4 * error + 0.01)
    noisy = sum(std > 0 for _, std in chain_of_the_sampler(False))
    assert result.cost.forwards == 2000 * (1 + 8 * noisy)  # the step after the kept candidate is not made again


def test_values_that_are_no_numbers_are_not_picked():
    def broken(images, prompts):
        values = first(images, prompts)
        values[1::2] = math.nan
        return values

    method = load_method("svdd", particles=1, candidates=4, lam=1.0, every=2)
    picked = [row["picked"][0][0] for row in method(context(reward=broken), Prompts.of("0")).history[:-1]]
    assert len(picked) == 4
    assert all(number % 2 == 0 for number in picked)
    with pytest.raises(SteeringError, match="stochastic kernel for svdd"):
        method(context(kernel=ode()), Prompts.of("0"))


# noise search


def test_neighbours_keep_the_norm_at_the_cosine_asked_for():
    g = torch.Generator().manual_seed(0)
    z, direction = (torch.randn(50, 4, 8, 8, generator=g, dtype=torch.float64) for _ in range(2))
    for cosine in (0.95, 0.5, -0.3):
        moved = neighbour(z, direction, cosine).flatten(1)
        flat = z.flatten(1)
        torch.testing.assert_close(moved.norm(dim=1), flat.norm(dim=1), rtol=1e-14, atol=0)
        found = (moved * flat).sum(1) / flat.square().sum(1)
        torch.testing.assert_close(found, torch.full_like(found, cosine), rtol=0, atol=1e-14)


def test_a_zero_order_round_improves_by_the_expected_maximum():
    """A reward along u: cos' = c rho + sqrt(1 - c^2) sqrt(1 - rho^2) E[max of m] / sqrt(d - 1) on average."""
    m, c, size, prompts = 4, 0.95, 5, Prompts.of(["0"] * 1000)
    d = 3 * size**2
    result = load_method("noise_search", rounds=1, neighbours=m, cosine=c)(context(size=size, **LARGE), prompts)
    z = context(size=size).start(Driver(toy_pipeline(size=size)).encode(prompts), context().ids(prompts, 1))
    norm, before = z.flatten(1).norm(dim=1), torch.tensor(result.history[0]["rewards"])[:, 0, 0]
    scale = float((before / z[:, 0, 0, 0]).median())  # of the sampler's linear map from noise to x0
    rho = before / (scale * norm)
    tried = torch.tensor(result.history[1]["rewards"])[:, 0] / (scale * norm[:, None])
    normal = torch.randn(200_000, m, generator=torch.Generator().manual_seed(0))
    gain = math.sqrt((1 - c**2) / (d - 1)) * float(normal.max(1).values.mean())
    expected = c * rho + gain * (1 - rho.square()).sqrt()
    found = tried.max(1).values - expected
    error = float(found.std()) / math.sqrt(len(prompts))
    print(f"improvement off by {float(found.mean()):.5f} +- {error:.5f}, gain {gain:.5f}")
    assert abs(float(found.mean())) < 4 * error + 0.01 * gain
    highest = torch.tensor(result.history[1]["rewards"])[:, 0].max(1).values
    assert torch.equal(result.totals[:, 0], torch.maximum(before, highest))
    torch.testing.assert_close(result.start.flatten(2).norm(dim=2)[:, 0], norm)


def test_random_search_is_nested_best_of_2_to_the_rounds():
    searches = [load_method("noise_search", search="random", particles=2, rounds=r) for r in range(5)]
    totals = [search(context(), Prompts.of(["0", "1"])).totals for search in searches]
    assert all((later >= earlier).all() for earlier, later in zip(totals, totals[1:], strict=False))
    final = searches[4](context(), Prompts.of(["0", "1"]))
    for r, earlier in enumerate(totals):
        assert torch.equal(torch.tensor(final.history[r]["best"]), earlier)
    tried = torch.cat([torch.tensor(row["rewards"]) for row in final.history], 2)
    assert tried.shape == (2, 2, 16)
    assert torch.equal(tried.max(2).values, final.totals)
    assert final.cost.forwards == 2 * 2 * 16 * STEPS
    many = load_method("noise_search", search="random", rounds=4)(context(), Prompts.of(["0"] * 400))
    every = torch.cat([torch.tensor(row["rewards"]) for row in many.history], 2)[:, 0]
    found, expected = many.totals.mean(), expected_best(every, 16).mean()
    assert float(found) == pytest.approx(float(expected), abs=1e-5)
    assert float(found / every.std()) == pytest.approx(1.766, abs=0.12)


def test_a_search_keeps_its_pivot_where_nothing_is_better():
    from itertools import count

    numbers = count()
    worse = lambda images, prompts: torch.tensor([-float(next(numbers)) for _ in images])  # noqa: E731
    result = load_method("noise_search", rounds=3)(context(reward=worse), Prompts.of("0"))
    ctx = context()
    assert torch.equal(result.start[0], ctx.start(ctx.encode(Prompts.of("0")), ctx.ids(Prompts.of("0"), 1)))


# lines and chains


@pytest.mark.parametrize("name", ["fk", "svdd", "best_of_n", "noise_search"])
def test_particles_can_be_made_again_from_their_lines(name):
    """Starting latents and streams say how each particle came about, whatever resampling copied."""
    from t2i_align.steering.base import Line

    prompts = Prompts.of(["0", "1"])
    result = load_method(name, particles=5)(context(kernel=ddim(1.0)), prompts)
    ctx = context(kernel=ddim(1.0))
    ids = ctx.ids(prompts, 5)
    starts, streams = result.start.flatten(0, 1), result.streams.flatten(0, 1)
    ctx.lines = {name: Line(starts[i], tuple(streams[i].tolist())) for i, name in enumerate(ids)}
    again = ctx.sample(ctx.encode(prompts).repeat(5), ids)
    torch.testing.assert_close(again, result.latents.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_chain_starts_from_the_winners_and_never_loses_them():
    prompts = Prompts.of(["0", "1"])
    stages = [{"method": "fk", "particles": 8}, {"method": "noise_search", "rounds": 2}]
    chain = load_method("chain", stages=stages)
    result = chain(context(), prompts)
    fk = load_method("fk", particles=8)(context(), prompts)
    winners = fk.totals.gather(1, fk.best[:, None])
    rows = [row for row in result.history if "best" in row]
    torch.testing.assert_close(torch.tensor(rows[0]["best"]), winners, rtol=1e-4, atol=1e-4)
    assert result.log_weight.shape == (2, 2)
    assert torch.isneginf(result.log_weight[:, 1]).all()
    assert torch.equal(result.totals[:, 1:], winners)
    assert (result.totals[:, 0] >= winners[:, 0] - 1e-5).all()
    later = load_method("noise_search", rounds=2)
    assert result.cost.forwards == fk.cost.forwards + 2 * STEPS * (1 + later.rounds * later.neighbours)


def test_chains_are_read_from_texts_and_methods():
    chain = load_method("chain", stages=["best_of_n", load_method("fk", particles=6)], particles=3)
    assert [method.particles for method in chain.methods] == [3, 6]
    assert [method_name(method) for method in chain.methods] == ["best_of_n", "fk"]
    assert type(chain)(**chain.model_dump(mode="json")) == chain
    with pytest.raises(ConfigError, match="at least 2"):
        load_method("chain", stages=["fk"])
    with pytest.raises(ConfigError, match="stage such as"):
        load_method("chain", stages=[{"particles": 3}, "fk"])


# joint guidance


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline("tiny-sd")


def test_joint_guidance_without_an_expansion_is_classifier_free_guidance(tiny):
    driver = Driver(tiny)
    texts = ["a red circle", "two green stars"]
    original, null = driver.encode(texts), driver.encode(["", ""])
    expanded = driver.encode(["a red circle on a white background", "two green stars on a black background"])
    x = driver.start(original, 10)
    with torch.no_grad():
        usual = driver.predict(x, 3, original, 10, guidance_scale=4.0)
        joint = joint_guidance(driver, x, 3, original, expanded, null, 4.0, 0.0, 10)
        torch.testing.assert_close(joint, usual, rtol=1e-4, atol=1e-4)
        both = joint_guidance(driver, x, 3, original, expanded, null, 4.0, 2.0, 10)
        longer = driver.predict(x, 3, expanded, 10, guidance_scale=2.0)
        blind = driver.predict(x, 3, null, 10, guidance_scale=1.0)
    torch.testing.assert_close(both, usual + longer - blind, rtol=1e-4, atol=1e-4)


def test_steering_by_prompt_and_expansion(tiny):
    prompt, longer = "a red circle", "a red circle on a white background"
    joint, base = JointDriver(tiny, {prompt: longer}, 2.0, 2.0), Driver(tiny, guidance_scale=4.0)
    bright = FunctionScorer(lambda images: images.flatten(1).mean(1))
    results = []
    for driver in (joint, base):
        ctx = Ctx(driver, bright, 6, seed=1)
        results.append(load_method("fk", particles=4, lam=0.0)(ctx, Prompts.of([prompt, "a blue star"])))
    assert results[0].totals[0].mean() > results[1].totals[0].mean()  # the expansion asks for white
    torch.testing.assert_close(results[0].latents[1], results[1].latents[1], rtol=1e-3, atol=1e-3)  # 2 + 2 = 4
