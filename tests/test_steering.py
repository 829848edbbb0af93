"""Particle steering against the closed form: the sampler's own law, tilted.

On the toy with prior N(0, 1) every kernel is linear and Gaussian, so the law of the sampler's end, N(m, v), is known
exactly at any number of steps, and so are its tilts: what is tested is the steering, not the discretisation.
"""

import itertools
import math

import pytest
import torch

from t2i_align.errors import T2IError
from t2i_align.pipelines import Driver, PipelineError, load_pipeline, preview_pipeline
from t2i_align.pipelines.kernels import ddim, flow_sde, ode
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, RewardError, load_reward
from t2i_align.steering import Ctx, SteeringError, load_method, method_name, steer
from t2i_align.steering.best_of_n import BestOfN, chi_squared, expected_best, kl
from t2i_align.steering.checks import gradient_free
from t2i_align.steering.fk import State
from t2i_align.steering.job import read_method

STEPS, C = 8, 1.0


def linear(images, prompts):
    """C times the toy's first coordinate at its only pixel."""
    return C * 16 * (images[:, 0, 0, 0] - 0.5)


def context(flow=False, reward=linear, kernel=None, seed=0, **options):
    return Ctx(
        Driver(toy_pipeline(flow=flow)),
        FunctionScorer(reward),
        STEPS,
        kernel,
        seed,
        max_batch=4096,
        decode_batch=4096,
        **options,
    )


def end_variance(flow):
    """Variance of the sampler's end for a prior N(0, 1), from its own coefficients: x_next = a x + std noise."""
    driver = Driver(toy_pipeline(flow=flow))
    kernel, variance = (flow_sde(0.7) if flow else ddim(1.0)), 1.0
    cond = driver.encode("0")
    for row in range(STEPS):
        with torch.no_grad():
            q = driver.step(torch.ones(1, 3, 1, 1), row, cond, STEPS, kernel).q
        variance = float(q.mean[0, 0, 0, 0]) ** 2 * variance + float(q.std) ** 2
    return variance


def moments(result):
    x, w = result.latents[..., 0, 0, 0].double(), result.log_weight.exp()
    mean = (w * x).sum(1)
    return mean, (w * (x - mean[:, None]).square()).sum(1)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(("potential", "along"), [("diff", None), ("max", 0.5), ("sum", None)])
@pytest.mark.parametrize("ess", [0.5, 1.0])
def test_fk_samples_the_tilt_of_a_linear_reward(flow, potential, along, ess):
    K, prompts = 1024, Prompts.of(["0"] * 6)
    method = load_method(
        "fk", particles=K, lam=1.0, lam_units="raw", potential=potential, along=along, every=2, ess=ess
    )
    result = method(context(flow), prompts)
    v = end_variance(flow)
    mean, variance = moments(result)
    ratio = (result.log_normaliser - C**2 * v / 2).exp()
    error = [float(t.std(correction=1)) / math.sqrt(len(prompts)) for t in (mean, variance, ratio)]
    found = [float(t.mean()) for t in (mean, variance, ratio)]
    print([f"{f:.3f} +- {e:.3f}" for f, e in zip(found, error, strict=True)])
    for value, bound, target in zip(found, error, (C * v, v, 1.0), strict=True):
        assert abs(value - target) < 5 * bound + 0.01


def test_fk_reaches_a_quadratic_target():
    """-(x - m)^2 / (2 s^2): mean v m l / (s^2 + v l), variance v s^2 / (s^2 + v l) for the sampler's N(0, v)."""
    m, s, lam, v = 1.5, 0.7, 2.0, end_variance(False)
    reward = lambda images, prompts: -((16 * (images[:, 0, 0, 0] - 0.5) - m) ** 2) / (2 * s**2)  # noqa: E731
    method = load_method("fk", particles=2048, lam=lam, lam_units="raw", every=1, ess=1.0)
    mean, variance = moments(method(context(reward=reward), Prompts.of(["0"] * 6)))
    precision = 1 / v + lam / s**2
    for found, target in ((mean, lam * m / s**2 / precision), (variance, 1 / precision)):
        error = float(found.std(correction=1)) / math.sqrt(6)
        print(f"{float(found.mean()):.4f} +- {error:.4f}, exactly {target:.4f}")
        assert abs(float(found.mean()) - target) < 5 * error + 0.003


def test_the_last_step_pays_the_final_reward_whatever_was_paid_before():
    """Two states: rewards (2, 0) along the way, (0, 1) at the end, lam 1: weights are (e^0, e^1) normalised."""
    from t2i_align.steering.fk import FK, State

    for potential in ("diff", "max", "sum"):
        state = State(FK(particles=2, lam=1.0, lam_units="raw", potential=potential), 1, 1)
        state.weigh(torch.tensor([[2.0, 0.0]]))
        state.finish(torch.tensor([[0.0, 1.0]]))
        assert state.weights.normalised.exp()[0].tolist() == pytest.approx([0.268941, 0.731059], abs=1e-6)


def test_rewards_near_22_still_select():
    """PickScore's size: weights of exp(lam r) itself would saturate."""
    shifted = lambda images, prompts: 22 + 0.1 * linear(images, prompts)  # noqa: E731
    method = load_method("fk", particles=1024, lam=10.0, lam_units="raw", ess=1.0)
    moved = float(moments(method(context(reward=shifted), Prompts.of("0")))[0])
    assert moved == pytest.approx(C * end_variance(False), abs=0.25)


def test_lam_counts_in_the_rewards_own_spread():
    """A reward a hundred times as large is steered by just as much."""
    small, large = (
        load_method("fk", particles=64, lam=2.0)(context(reward=reward, seed=3), Prompts.of("0"))
        for reward in (linear, lambda images, prompts: 100 * linear(images, prompts))
    )
    torch.testing.assert_close(small.latents, large.latents, rtol=1e-3, atol=1e-3)


def test_one_particle_or_lam_0_is_the_base_sampler_bit_for_bit():
    ctx = context()
    ids = ctx.ids(Prompts.of(["0", "1"]), 3)
    base = ctx.driver.rollout(ctx.driver.encode(["0", "1"]).repeat(3), STEPS, ddim(1.0), seed=0, ids=ids).x[:, -1]
    for options in ({"lam": 0.0}, {"lam": 0.0, "ess": 1.0, "lam_units": "raw"}):
        result = load_method("fk", particles=3, **options)(context(), Prompts.of(["0", "1"]))
        assert torch.equal(result.latents.flatten(0, 1), base)
    alone = load_method("fk", particles=1, lam=5.0)(context(), Prompts.of(["0", "1"]))
    assert torch.equal(alone.latents[:, 0], base[[0, 3]])


def test_a_prompt_is_steered_alike_alone_and_among_others():
    method = load_method("fk", particles=4)
    alone, among = method(context(), Prompts.of("1")), method(context(), Prompts.of(["0", "1", "1"]))
    torch.testing.assert_close(alone.latents[0], among.latents[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(among.latents[1], among.latents[2])  # the same prompt again gets new particles


def test_adaptive_resampling_carries_its_weights():
    """With resampling off, the particles are the base's and the weights alone make the target."""
    method = load_method("fk", particles=4096, lam=1.0, lam_units="raw", ess=0.0)
    result = method(context(), Prompts.of("0"))
    v = end_variance(False)
    assert float(result.latents[0, :, 0, 0, 0].mean()) == pytest.approx(0, abs=5 / 64)
    assert float(moments(result)[0]) == pytest.approx(C * v, abs=0.12)


def test_nan_rewards_weigh_nothing_and_all_nan_is_an_error():
    def broken(images, prompts):
        values = linear(images, prompts)
        values[::3] = math.nan
        return values

    with pytest.warns(UserWarning, match="are no numbers"):
        result = load_method("fk", particles=6)(context(reward=broken), Prompts.of("0"))
    assert torch.isneginf(result.log_weight[0, ::3]).all()
    assert int(result.best) % 3
    nothing = lambda images, prompts: torch.full((len(images),), math.nan)  # noqa: E731
    with pytest.raises(SteeringError, match="All 4 particles of '0'"):
        load_method("fk", particles=4)(context(reward=nothing), Prompts.of("0"))


@pytest.mark.filterwarnings("ignore:.*are no numbers")
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "options"),
    [("best_of_n", {}), ("best_of_n", {"lam": 1.0}), ("fk", {}), ("svdd", {}), ("noise_search", {})],
)
def test_infinite_rewards_are_no_numbers(name, options, infinite):
    def steered(value):
        reward = lambda images, prompts: torch.where(linear(images, prompts) > 0.5, value, linear(images, prompts))  # noqa: E731
        return load_method(name, particles=6, **options)(context(reward=reward), Prompts.of("0"))

    expected, result = steered(math.nan), steered(infinite)
    assert torch.equal(result.best, expected.best)
    assert torch.equal(result.log_weight, expected.log_weight)
    assert torch.equal(result.images, expected.images)
    assert result.totals[0, result.best].isfinite()


def test_an_infinite_value_does_not_spoil_the_spread():
    x = torch.linspace(-1, 1, 6)
    state = State(load_method("fk", particles=6), 1, 1)
    state.weigh(torch.where(x > 0.5, math.inf, x)[None])
    known = x[x <= 0.5].double()
    assert float(state.lam) == pytest.approx(2 / float(known.std(correction=0)))


def test_an_infinite_reward_does_not_spoil_the_spread():
    def reward(images, prompts):
        values = linear(images, prompts)
        values[0] = -math.inf
        return values

    lam = load_method("guidance", pilot=64).per_reward(context(reward=reward), Prompts.of("0"))
    assert float(lam) == pytest.approx(2 / (C * math.sqrt(end_variance(False))), rel=0.3)


def test_deterministic_kernels_are_refused():
    with pytest.raises(SteeringError, match="stochastic kernel for fk but got ode"):
        load_method("fk")(context(kernel=ode()), Prompts.of("0"))


def test_best_of_n_keeps_the_best_and_its_weights_say_so():
    result = load_method("best_of_n", particles=16)(context(), Prompts.of(["0", "1"]))
    assert torch.equal(result.best, result.totals.argmax(1))
    assert torch.equal(result.draw(), result.best)
    assert result.cost.forwards == 2 * 16 * STEPS
    assert result.cost.decodes == result.cost.scored == 32


def test_soft_best_of_n_is_the_tilt():
    method = load_method("best_of_n", particles=4096, lam=1.0)
    result = method(context(kernel=ddim(1.0)), Prompts.of("0"))
    v = end_variance(False)  # lam counts in standard deviations: the tilt moves the mean by one of them
    assert float(moments(result)[0]) == pytest.approx(math.sqrt(v), abs=0.15)


def test_best_of_n_identities():
    assert [kl(n) for n in (2, 4, 16, 64)] == pytest.approx([0.1931, 0.6363, 1.8351, 3.1745], abs=1e-4)
    assert [chi_squared(n) for n in (2, 4, 16)] == pytest.approx([0.333, 1.286, 7.258], abs=1e-3)
    rewards = torch.rand(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in range(1, 8):
        every = torch.stack([rewards[list(c)].max() for c in itertools.combinations(range(7), n)])
        assert float(expected_best(rewards, n)) == pytest.approx(float(every.mean()))
    normal = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    found = [float(expected_best(normal, n).mean()) for n in (2, 4, 16)]
    assert found == pytest.approx([0.5642, 1.0294, 1.7660], abs=0.04)


def test_steering_a_real_pipeline_raises_the_reward():
    """tiny-sd by the verifier, against the same kernel without steering."""
    prompts = ["a red circle left of a blue square", "three green stars"]
    result = steer("tiny-sd", prompts, "verifier", "fk", particles=4, steps=10, seed=1)
    base = steer("tiny-sd", prompts, "verifier", "best_of_n", particles=4, steps=10, seed=1, kernel="ddim(1.0)")
    assert result.images.shape == (2, 4, 3, 64, 64)
    print(result.totals, base.totals)
    assert result.totals.mean() > base.totals.mean()
    assert len(result.pil()) == 2
    assert result.cost.seconds > 0


def test_rewards_on_the_scale_of_the_pipeline(tmp_path, monkeypatch):
    """As `generate --steer` takes them: what they are calibrated on is looked for by its name."""
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path))
    with pytest.raises(RewardError, match="not calibrated on tiny-sd"):
        steer("tiny-sd", ["a red circle"], "calibrated(verifier)", "best_of_n", particles=1, steps=1)


def test_a_reward_by_name_goes_where_the_pipeline_computes(monkeypatch):
    """One that the user opened stays where it is."""
    seen = []

    class Stop(Exception):
        """All is made."""

    def made(driver, judge, *rest):
        seen.append(judge.tower.device.type)
        raise Stop

    monkeypatch.setattr("t2i_align.steering.Ctx", made)
    pipe = load_pipeline("tiny-sd").to("meta")
    for reward in ("tiny_clip", load_reward("tiny_clip")):
        with pytest.raises(Stop):
            steer(pipe, "a red circle", reward)
    assert seen == ["meta", "cpu"]


def test_previews_by_a_small_decoder():
    """Rewards along the way see its pictures, final ones the pipeline's; decoders of other latents are refused."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    small = AutoencoderTiny(latent_channels=8, **shape, **blocks)
    seen = []

    def first_red(images):
        seen.append(images)
        return images[:, 0].mean((1, 2))

    pipe = load_pipeline("tiny-sd")
    vae = pipe.vae
    results = [
        steer(pipe, "two green stars", first_red, "fk", particles=2, steps=4, rows=(1,), decoder=decoder)
        for decoder in (small, None)
    ]
    assert pipe.vae is vae
    with torch.no_grad():
        final = Driver(pipe).decode(results[0].latents.flatten(0, 1))
    torch.testing.assert_close(results[0].images.flatten(0, 1), final)
    assert (seen[0] - seen[2]).abs().mean() > 0.05  # previews of the same latents by the small decoder and by its own
    with torch.no_grad():
        small.decoder.layers[-1].weight.mul_(50)  # glaring colours
    ctx = Ctx(Driver(pipe), FunctionScorer(first_red), decoder=Driver(preview_pipeline(pipe, small)))
    x = results[0].latents.flatten(0, 1).requires_grad_()
    preview = ctx.decode(x, preview=True)
    saturated = (preview == 0) | (preview == 1)
    assert saturated.any()
    assert torch.autograd.grad(preview[saturated].sum(), x)[0].any()  # the clamp lets gradients through
    with pytest.raises(PipelineError, match="Expected an autoencoder of 8 latent channels"):
        steer(pipe, "two green stars", first_red, "fk", decoder=AutoencoderTiny())
    with pytest.raises(PipelineError, match="There is no autoencoder nowhere"):
        steer(pipe, "two green stars", first_red, "fk", decoder="nowhere")


class Mine(BestOfN):
    """A method of one's own."""

    extra: int = 0


def test_a_method_of_ones_own_is_named_by_its_module():
    method = load_method("tests.test_steering:Mine", extra=3)
    assert type(method).__name__ == "Mine"
    assert method.extra == 3
    chain = load_method("chain", stages=[method, "noise_search"])
    assert [method_name(stage) for stage in chain.methods] == ["tests.test_steering:Mine", "noise_search"]
    assert read_method("tests.test_steering:Mine", ["extra=2"])[0] == "tests.test_steering:Mine"
    with pytest.raises(SteeringError, match="subclass of"):
        load_method("tests.test_steering:Ctx")


def test_methods_without_gradients_are_named_where_one_is_asked_for():
    assert gradient_free() == ["best_of_n", "fk", "svdd", "noise_search"]
    for name in gradient_free():
        assert not load_method(name).needs_gradient


def test_unknown_methods_and_settings_are_refused():
    with pytest.raises(SteeringError, match="Did you mean 'best_of_n'"):
        load_method("best_of_m")
    with pytest.raises(T2IError, match="particle"):
        load_method("fk", particle=3)
