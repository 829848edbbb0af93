"""Methods on finished images: Diffusion-DPO, DiffusionNFT and reward-weighted regression, by hand and on the toy."""

import json
import math

import pytest
import torch
from PIL import Image
from torch.nn.functional import logsigmoid

from t2i_align.config import ConfigError, TrainConfig
from t2i_align.data.tables import write_table
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.methods.diffusion_dpo import kto_loss, lead
from t2i_align.methods.forward import Noised, unguided
from t2i_align.methods.nft import adaptive, mixed
from t2i_align.methods.rwr import best_of, tilted
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.grid import Level
from t2i_align.pipelines.kernels import output_to_x0_eps
from t2i_align.pipelines.latents import LatentCache, LatentEncoder
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import Ctx, fit
from t2i_align.training.blocks import load_run
from t2i_align.training.prompts import make_pool
from t2i_align.training.run import train
from tests.families.subject import Subject
from tests.test_methods import linear


def make(use, flow=False, reward=linear, prediction=None, size=1, **settings):
    """A method on the toy."""
    pipe = toy_pipeline(flow=flow, size=size)
    if prediction is not None:
        pipe.scheduler.register_to_config(prediction_type=prediction)
    found, options = read_method({"use": use, "steps": 5, "batch_size": 8} | settings)
    return found(options, Policy.full(pipe), Tools(Driver(pipe), FunctionScorer(reward)))


def context(step=0, update=0):
    return Ctx(0, step, torch.device("cpu"), update)


def gradient(method, prompts, ctx=None):
    ctx = ctx or context()
    batch = method.collect(ctx, prompts)
    method.zero_grad()
    loss, stats = 0.0, []
    for term in method.losses(ctx, batch):
        term.loss.backward()
        loss += term.loss.item()
        stats.append({name: torch.as_tensor(value).detach() for name, value in term.stats.items()})
    (shift,) = method.policy.trainable()
    return shift.grad.clone(), loss, stats


def picture(folder, name, x):
    """A picture of the toy's latent (x, 0, 0), rounded to 256 levels."""
    Image.new("RGB", (1, 1), (round(255 * (0.5 + x / 16)), 128, 128)).save(folder / name)
    return str(folder / name)


def pairs(folder, count=4, gap=2.0):
    """Pairs of which the redder picture is better."""
    better = tuple(picture(folder, f"w{i}.png", 0.1 * i + gap / 2) for i in range(count))
    worse = tuple(picture(folder, f"l{i}.png", 0.1 * i - gap / 2) for i in range(count))
    return Prompts(("0",) * count, {"better": better, "worse": worse})


# The denoising error


@pytest.mark.parametrize(("flow", "prediction"), [(True, None), (False, "epsilon"), (False, "v_prediction")])
@pytest.mark.parametrize("times", ["uniform", "grid"])
def test_the_error_of_the_exact_network_is_the_posterior_variance(flow, prediction, times):
    """With unit data the best estimate of x0 leaves sigma^2 / (alpha^2 + sigma^2), whatever the network predicts."""
    method = make("rwr", flow, prediction=prediction, times=times)
    process, n = method.process, 1000
    cond = method.tools.driver.encode(["0"] * n)
    x0 = torch.randn(n, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noised = process.keyed(context(), x0, range(n), 0)
    with torch.no_grad():
        output = process.output(noised, cond)
    alpha, sigma = noised.level
    off = output_to_x0_eps(output, noised.x, noised.level, method.tools.driver.prediction)[0] - x0
    relative = off.square().mean((1, 2, 3)) / (sigma.square() / (alpha.square() + sigma.square())).flatten()
    assert float(relative.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / 3 / n))  # chi^2 of 3 numbers each
    error = process.error(noised, cond)
    assert torch.allclose(error, (output - noised.target).square().mean((1, 2, 3)))


def test_noise_is_keyed_by_place_and_shared_where_it_should_be():
    process = make("rwr").process
    x0 = torch.zeros(4, 3, 1, 1)
    first = process.keyed(context(), x0, [7, 8, 7, 8], 0)
    assert torch.equal(first.x[:2], first.x[2:])
    assert not torch.equal(first.x[0], first.x[1])
    alone = process.keyed(context(), x0[:1], [8], 0)
    assert torch.equal(alone.x[0], first.x[1])
    for other in (process.keyed(context(1), x0, [7, 8, 7, 8], 0), process.keyed(context(), x0, [7, 8, 7, 8], 1)):
        assert not torch.equal(other.x[0], first.x[0])


def test_guidance_is_off_in_the_loss():
    assert unguided(Driver(toy_pipeline())) == {"guidance_scale": 1.0}
    dev = Subject("flux-dev").driver
    assert unguided(dev) == {}  # built into the network
    assert unguided(Subject("qwen-image").driver) == {"true_cfg_scale": 1.0}
    assert unguided(Subject("sd-pag").driver) == {"guidance_scale": 1.0, "pag_scale": 0.0}


@pytest.mark.parametrize("use", ["nft", "rwr"])
def test_one_image_of_a_prompt_teaches_nothing(use):
    with pytest.raises(ValueError, match="group"):
        make(use, group=1)


def test_what_a_run_learns_from():
    assert make("diffusion_dpo", online=True, group=4).learns_reward
    assert make("nft", group=4).learns_reward
    assert not make("diffusion_dpo").learns_reward
    with pytest.raises(ValueError, match="Expected no drop_captions with online"):
        make("diffusion_dpo", online=True, drop_captions=0.2)


# Images as latents


@pytest.mark.parametrize(
    "name", ["toy", "sd", "sdxl-upcast", "kandinsky3", "sd3", "flux-dev", "flux2", "qwen-image", "sana"]
)
def test_images_are_latents_for_every_kind_of_family(name):
    """Scaled, shifted, packed, standardised: what the decoder is given for the result is what the encoder said."""
    s = Subject(name)
    s.cond  # noqa: B018  # what ready embeddings there are
    encoder = LatentEncoder(s.driver)
    x = torch.randn(2, *encoder.like.shape[1:], generator=torch.Generator().manual_seed(0)).to(encoder.like)
    z = encoder.given(x)
    encoder.encoded = lambda images, like: z
    half = 2e-3 if x.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(encoder(torch.zeros(2, 3, *encoder.size)), x, rtol=half, atol=half)


def test_a_decoded_image_encodes_to_its_latent():
    s = Subject("toy")
    encoder = LatentEncoder(s.driver)
    x = torch.randn(2, *encoder.like.shape[1:])
    torch.testing.assert_close(encoder(s.driver.decode(x)), x, rtol=1e-4, atol=1e-5)


def test_cached_latents_are_those_of_the_file_cropped_to_the_pipelines_size(tmp_path):
    image = Image.new("RGB", (6, 2), "red")
    image.paste("lime", (2, 0, 4, 2))  # the centre
    image.save(tmp_path / "a.png")
    cache = LatentCache(Driver(toy_pipeline(size=2)))
    found = cache([str(tmp_path / "a.png"), str(tmp_path / "no.png")])
    assert list(found) == [str(tmp_path / "a.png")]
    torch.testing.assert_close(found[str(tmp_path / "a.png")][:, 0, 0], torch.tensor([-8.0, 8.0, -8.0]))
    assert "No such image" in cache.problems[str(tmp_path / "no.png")]
    (tmp_path / "a.png").unlink()
    assert cache([str(tmp_path / "a.png")])


# Diffusion-DPO


def test_preference_losses_by_hand():
    errors = torch.tensor([0.0999, 0.1001], dtype=torch.float64, requires_grad=True)
    base = torch.full((1,), 0.1, dtype=torch.float64)
    ahead = lead(errors[:1], errors[1:], base, base, 5000)
    assert ahead.item() == pytest.approx(0.5)
    assert -logsigmoid(ahead).item() == pytest.approx(0.474077, abs=1e-6)
    assert lead(errors[1:], errors[:1], base, base, 5000).item() == pytest.approx(-0.5)
    same = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    loss = -logsigmoid(lead(same[:1], same[1:], base, base, 5000))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert same.grad.tolist() == pytest.approx([1250, -1250])
    gain = torch.zeros(2, requires_grad=True)
    kto_loss(gain, torch.tensor([1.0, 0.0]), 0.0).sum().backward()
    assert gain.grad.tolist() == pytest.approx([-0.25, 0.25])
    assert kto_loss(torch.tensor([1.0]), torch.ones(1), 1.0).item() == 0.5


def test_preferences_of_two_actions_lead_to_the_exact_tilt():
    """pi_ref = (1/2, 1/2), r = (1, 0), beta = 1: labels with P(a > b) = sigmoid(1) end at (.731059, .268941)."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)
    p, half = 1 / (1 + math.exp(-1)), torch.full((1,), math.log(2), dtype=torch.float64)

    def loss():
        optimizer.zero_grad()
        error = -logits.log_softmax(0)  # beta = 2 of `lead` is beta = 1 on log-ratios
        one, other = (lead(error[a : a + 1], error[b : b + 1], half, half, 2.0) for a, b in ((0, 1), (1, 0)))
        value = -(p * logsigmoid(one) + (1 - p) * logsigmoid(other)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert logits.softmax(0).tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)


@pytest.mark.parametrize(("flow", "prediction"), [(True, None), (False, "epsilon"), (False, "v_prediction")])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto"])
def test_the_first_update_moves_towards_the_winners(tmp_path, loss, flow, prediction):
    noisy = {"times": "grid", "trained_rows": 0.2}  # the noisiest row, where the network knows least of the image
    method = make("diffusion_dpo", flow, prediction=prediction, loss=loss, beta=2.0, **noisy)
    grad, value, stats = gradient(method, pairs(tmp_path, 8))
    assert grad[0] < 0
    assert grad[0].abs() > 5 * grad[1:].abs().max()  # winners and losers differ in red alone
    if loss == "dpo":  # at the base
        assert value == pytest.approx(math.log(2), abs=1e-6)
        assert all(not row["lead"].any() for row in stats)
    if loss == "kto":
        assert value == pytest.approx(0.5, abs=1e-6)


def test_swapped_pairs_have_the_opposite_gradient(tmp_path):
    table = pairs(tmp_path)
    swapped = Prompts(table.text, {"better": table.columns["worse"], "worse": table.columns["better"]})
    one, other = (gradient(make("diffusion_dpo"), rows)[0] for rows in (table, swapped))
    torch.testing.assert_close(one, -other)


def test_gradients_of_dpo_at_the_base_are_half_beta_times_the_difference_of_errors(tmp_path):
    """dL = (beta / 4) (dM_w - dM_l), whatever the networks say: checked against the errors themselves."""
    method = make("diffusion_dpo", beta=10.0, batch_size=2)
    table = pairs(tmp_path, 1)
    grad, _, _ = gradient(method, table)
    data, _ = method.collect(context(), table)
    noised, cond = method._noised(context(), data, torch.tensor([0, 1]), [0, 0], 0)
    win, lose = method.process.error(noised, cond)
    (shift,) = method.policy.trainable()
    (expected,) = torch.autograd.grad(10 / 4 * (win - lose), shift)
    torch.testing.assert_close(grad, expected)


def test_options_of_dpo(tmp_path):
    table = pairs(tmp_path)
    plain, simpo = (gradient(make("diffusion_dpo", loss=loss, beta=2.0), table)[1] for loss in ("dpo", "simpo"))
    margin = gradient(make("diffusion_dpo", loss="simpo", beta=2.0, margin=1.0), table)[1]
    assert simpo < plain < margin  # the base itself prefers winners here, but not by a margin of 1
    tuned, error = gradient(make("diffusion_dpo", sft=0.5), table)[1], gradient(make("diffusion_dpo"), table)[2]
    assert tuned == pytest.approx(
        math.log(2) + 0.5 * float(torch.cat([row["error"] for row in error]).mean()), rel=1e-5
    )
    method = make("diffusion_dpo", drop_captions=0.5)
    many = Prompts(tuple(map(str, range(1, 201))))
    dropped = sum(not text for text in method._captions(context(), many, 0).text)
    assert dropped == pytest.approx(100, abs=4 * math.sqrt(50))


def test_pairs_whose_images_cannot_be_opened_are_left_out_and_told_once(tmp_path, capsys):
    table = pairs(tmp_path)
    (tmp_path / "w1.png").write_bytes(b"no image")
    method = make("diffusion_dpo")
    for step in range(2):
        _, found = method.collect(context(step), table)
        assert found.tolist() == [[0, 1], [4, 5], [6, 7]]
    assert capsys.readouterr().err.count("w1.png") == 1
    assert method.report(method.collect(context(), table)) == {"pairs": 3}


def test_terms_add_up_to_the_same_whatever_the_batch_size(tmp_path):
    table = pairs(tmp_path)
    for use, settings in (
        ("diffusion_dpo", {}),
        ("diffusion_dpo", {"loss": "kto", "beta": 2.0}),
        ("nft", {"group": 4}),
        ("rwr", {"group": 4}),
    ):
        rows = table if use == "diffusion_dpo" else Prompts.of(["0", "1"])
        large, small = (gradient(make(use, batch_size=size, **settings), rows)[0] for size in (8, 2))
        torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-7)


def test_single_images_train_kto(tmp_path):
    names = [picture(tmp_path, f"{i}.png", x) for i, x in enumerate((2.0, -2.0))]
    write_table(
        [{"prompt": "0", "image": name, "label": int(i == 0)} for i, name in enumerate(names)], tmp_path / "l.jsonl"
    )
    config = {"method": {"use": "diffusion_dpo", "loss": "kto", "group": 1, "batch_size": 2}, "reward": "tiny_clip"}
    config |= {"prompts": {"use": "pairs", "path": str(tmp_path / "l.jsonl"), "per_round": 2}, "train": {"steps": 1}}
    run = load_run(config)
    table = make_pool(run.prompts).draw(0, 0, 2)
    method = make("diffusion_dpo", loss="kto", group=1, beta=2.0)
    grad, value, _ = gradient(method, table)
    assert grad[0] < 0
    assert value == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="use method.loss=kto"):
        load_run(config | {"method": {"use": "diffusion_dpo", "group": 1, "batch_size": 2}})


def test_what_dpo_cannot_learn_from_is_refused_before_anything_is_loaded(tmp_path):
    config = {"method": {"use": "diffusion_dpo"}, "reward": "tiny_clip", "train": {"steps": 1}}
    with pytest.raises(ConfigError, match="use: pairs with path, or method.online=true"):
        load_run(config)
    assert load_run(config, ["method.online=true"]).method["online"]
    with pytest.raises(ConfigError, match="expected 0 for given preferences, which have no std"):
        load_run(config, ["method.discount=1"])
    with pytest.raises(ConfigError, match="No such file or folder"):
        load_run(config, ["prompts.use=pairs", "prompts.path=nowhere.jsonl"])
    with pytest.raises(ConfigError, match="columns and root beside use: pairs"):
        load_run(config, ["prompts.root=x"])


# DiffusionNFT


def test_nft_by_hand():
    """x0 = 1, e = -1, t = .5 (x_t = 0), v_old = -1, v = -1.5, b = .5, r = .8: .375, .625, .85."""
    method = make("nft", flow=True, b=0.5, group=2)
    one, half = torch.ones(1, 1, 1, 1), torch.tensor(0.5)
    noised = Noised(0 * one, 0, Level(half, half), one, -2 * one)
    plus, minus = method.branches(noised, -1.5 * one, -1.0 * one)
    assert (plus.item(), minus.item()) == pytest.approx((0.375, 0.625))
    assert mixed(plus, minus, torch.tensor([0.8]), 0.5, 1.0).item() == pytest.approx(0.85)
    assert mixed(plus, minus, torch.tensor([0.8]), 0.5, 5.0).item() == pytest.approx(4.25)
    assert adaptive(torch.ones(1, 2), torch.ones(1, 2)).item() == 0


@pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
def test_fixed_points_of_nft(b):
    """Targets +-1, equally likely, with r = 1 and 0, and v_old = 0: v* = (2 / b) alpha (v^+ - v_old) = 1 / b."""
    method = make("nft", b=b, adaptive=False)
    target = torch.tensor([1.0, -1.0], dtype=torch.float64)[:, None, None, None]
    noised = Noised(target, 0, Level(target, target), target, target)

    def slope(v, good):
        v = torch.tensor(v, dtype=torch.float64, requires_grad=True)
        plus, minus = method.branches(noised, v.expand_as(target), torch.zeros_like(target))
        mixed(plus, minus, torch.tensor(good, dtype=torch.float64), b, 1.0).mean().backward()
        return float(v.grad)

    assert slope(1 / b, [1.0, 0.0]) == pytest.approx(0, abs=1e-12)
    assert slope(0.0, [0.5, 0.5]) == pytest.approx(0, abs=1e-12)  # no preference: the old policy
    # first gradient 2 b (2 r - 1) (v_old - v) per sample, over b
    assert slope(0.0, [0.8, 0.4]) == pytest.approx(2 * (0.6 * (0 - 1) + -0.2 * (0 + 1)) / 2)


def test_nft_with_r_1_and_b_1_is_flow_matching_on_its_own_images():
    method = make("nft", flow=True, adaptive=False, kl=0.0, group=4, advantage_clip=1.0, batch_size=4)
    ctx = context()
    data, _ = method.collect(ctx, Prompts.of(["0"]))
    (shift,) = method.policy.trainable()
    grad = torch.zeros(3)
    for term in method.losses(ctx, (data, torch.ones(4))):
        grad += torch.autograd.grad(term.loss, shift)[0]
    by_hand = torch.zeros(3)
    for row in range(method.process.rows):
        eps = [torch.randn(3, 1, 1, generator=ctx.generator("forward", i, row)) for i in range(4)]
        noised = method.process.noised(data.traj.x[:, -1], row, torch.stack(eps))
        loss = method.process.error(noised, data.traj.cond).mean() / method.process.rows
        by_hand += torch.autograd.grad(loss, shift)[0]
    torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-6)


def test_equal_rewards_leave_nft_where_it_is():
    flat = lambda images, prompts: torch.ones(len(images))  # noqa: E731
    grad, _, _ = gradient(make("nft", flow=True, reward=flat, adaptive=False, group=8), Prompts.of(["0", "1"]))
    # v+ and v- at v_old have opposite gradients: r = 1/2 cancels them exactly
    assert grad.abs().max() < 1e-5


def test_the_old_policy_follows_by_its_schedule(tmp_path):
    method = make("nft", group=4, slope=0.25, most=0.5, after=1)
    (shift,), old = method.policy.trainable(), []
    expected = None
    for number, decay in enumerate((0.0, 0.0, 0.25, 0.5, 0.5)):
        with torch.no_grad():
            shift.fill_(0.1 * number)
        method.collect(context(number), Prompts.of(["0"]))
        old.append(float(method._old()[0][0]))
        expected = 0.0 if expected is None else decay * expected + (1 - decay) * 0.1 * number
        assert old[-1] == pytest.approx(expected)
    state = method.state()
    other = make("nft", group=4)
    other.restore(state)
    assert torch.equal(other._old()[0], method._old()[0])


def test_nft_draws_by_the_old_policy_without_guidance():
    made = make("nft", group=4)
    guided = Tools(made.tools.driver, made.tools.reward, {"guidance_scale": 7.0})
    assert type(made)(made.settings, made.policy, guided).drawing == {"guidance_scale": 1.0}


# Reward-weighted regression


def test_weights_by_hand():
    nan = float("nan")
    weights = tilted(torch.tensor([[0.0, math.log(3.0)], [nan, 2.0], [nan, nan]]), 1.0)
    assert weights.tolist() == [pytest.approx([0.5, 1.5]), [0.0, 2.0], [0.0, 0.0]]
    chosen = best_of(torch.tensor([[1.0, 3.0, 2.0, nan], [nan, nan, nan, 1.0]]), 2)
    assert chosen.tolist() == [[0, 2, 2, 0], [0, 0, 0, 2]]


def test_the_minimum_on_the_bases_images_is_the_exact_tilt():
    """At one noise level: exp(r / beta) moves unit data by 1 / beta, and the estimate of x0 by sigma^2 / beta.

    The loss is quadratic in the shift, so that two gradients give its minimum. `linear` is the first number of x0.
    """
    n, beta = 2048, 2.0
    method = make(
        "rwr", images="base", beta=beta, times="grid", trained_rows=0.2, group=n, batch_size=n, solver="ode", steps=20
    )
    method.process.rows = 1
    prompts, (shift,) = Prompts.of(["0"]), method.policy.trainable()
    at_zero = gradient(method, prompts)[0]
    with torch.no_grad():
        shift.fill_(1.0)
    at_one = gradient(method, prompts)[0]
    minimum = -at_zero / (at_one - at_zero)
    sigma = float(method.tools.driver.grid(20).sigma[0])
    ess = n / math.exp(1 / beta**2)  # of weights exp(r / beta), r ~ N(0, 1)
    # a discretised ODE of 20 steps spreads the images a little differently: 3 % of the shift, beside the sampling error
    assert float(minimum[0]) == pytest.approx(sigma**2 / beta, abs=5 / math.sqrt(ess) + 0.03 / beta)
    assert minimum[1:].tolist() == pytest.approx([0, 0], abs=5 / math.sqrt(ess))


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    ("use", "settings"),
    [
        ("diffusion_dpo", {"online": True, "group": 4, "beta": 20.0, "pairs": "all"}),
        ("diffusion_dpo", {"online": True, "group": 4, "beta": 5.0, "loss": "kto"}),
        ("nft", {"group": 8}),
        ("rwr", {"group": 8, "beta": 0.5}),
        ("rwr", {"group": 8, "select": "best", "best": 2, "solver": "ode"}),
    ],
)
def test_every_one_raises_the_reward_of_the_toy(use, settings, flow, tmp_path):
    # Noisy levels: where x_t says what x0 is, the denoising error is noise to a single number such as `shift`.
    rows = {} if use == "nft" else {"times": "grid"}
    method = make(use, flow, batch_size=32, trained_rows=0.6, **rows, **settings)
    many = Prompts.of(["0"] * 20)

    def reward():
        with torch.no_grad():
            return float(method.rollout(context(99), many).scores.total.mean())

    before = reward()
    fit(method, lambda number: Prompts.of(["0"] * 4), TrainConfig(steps=15, learning_rate=0.07, log_every=1), tmp_path)
    after = reward()
    print(f"{use}: {before:.3f} -> {after:.3f}")
    assert after > before + 0.2
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward", "images", "loss"} <= set(row)


def test_a_run_on_given_pairs_from_its_config(tmp_path, capsys):
    """The redder of two pictures is better; the run reads them, trains, evaluates and says what it was trained on."""
    for side, red in (("w", 200), ("l", 60)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (red, 100 + number, 128)).save(tmp_path / "pairs" / side / f"{number}.png")
            (tmp_path / "pairs" / side / f"{number}.txt").write_text(f"0.{number}")
    (tmp_path / "pairs" / "w" / "alone.png").write_bytes(b"")
    (tmp_path / "heldout.txt").write_text("0.1\n0.5")
    config = {
        "out": str(tmp_path / "run"),
        "method": {"use": "diffusion_dpo", "batch_size": 4, "beta": 20.0, "times": "grid", "steps": 3, "levels": 2},
        "policy": {"use": "full"},
        "reward": "tests.test_run:Red",
        "prompts": {"use": "pairs", "path": str(tmp_path / "pairs"), "per_round": 4},
        "train": {"steps": 4, "learning_rate": 0.1, "weight_decay": 0.0, "log_every": 2},
        "evaluate": {"every": 4, "steps": 3, "images": 1, "watch": [], "kl_images": 2}
        | {"prompts": {"use": "file", "path": str(tmp_path / "heldout.txt")}},
        "log": {"tensorboard": False},
    }
    done = train(config, pipeline=toy_pipeline(size=8))
    first, last = (json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines())
    assert done.step == 4
    assert last["reward"] > first["reward"]
    assert last["kl"] > 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["pairs"] == 4
    assert metrics["accuracy"] > 0
    assert "trained on given preferences by diffusion_dpo" in (tmp_path / "run" / "README.md").read_text()
    assert capsys.readouterr().err.count("alone: it is in w/ alone") == 1
