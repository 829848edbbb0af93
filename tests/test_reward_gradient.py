"""ReFL, DRaFT and AlignProp: the linear chain in closed form, equivalences, checkpointing, refusals."""

import math
from collections import Counter

import pytest
import torch
from PIL import Image

from t2i_align.config import ConfigError, TrainConfig
from t2i_align.data.tables import write_table
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.methods.reward_gradient import shaped
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ode
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, Scorer, load_reward
from t2i_align.rewards.constraints import Constraint, Limited
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.blocks import load_run
from t2i_align.training.honest import drift_from_base
from tests.families import FAMILIES

STEPS = 5
PLAIN = {"loss": "linear", "scale": 1.0, "kernel": "ode"}


def red(images, prompts):
    """Of the toy the first number of a latent."""
    return 16 * (images[:, 0] - 0.5).mean((1, 2))


def make(use, flow=False, pipe=None, policy=None, reward=red, **settings):
    pipe = pipe or toy_pipeline(flow=flow)
    found, options = read_method({"use": use, "steps": STEPS, "batch_size": 2} | PLAIN | settings)
    scorer = FunctionScorer(reward, differentiable=True)
    return found(options, policy or Policy.full(pipe), Tools(Driver(pipe), scorer))


def context(step=0):
    return Ctx(0, step, torch.device("cpu"))


def gradients(method, prompts=("0", "1"), step=0):
    batch = method.collect(context(step), Prompts.of(list(prompts)))
    method.zero_grad()
    losses = []
    for term in method.losses(context(step), batch):
        term.loss.backward()
        losses.append(term.loss.item())
    return [p.grad.clone() for p in method.policy.trainable()], sum(losses), batch


def chain(grid, keep):
    """d x_N / d shift through the last steps of the toy's deterministic sampler, in its first dimension.

    With unit data x0 = g x + shift, g = alpha / (alpha^2 + sigma^2), and x' = a' x0 + s' (x - a x0) / s is linear.
    """
    total = 0.0
    levels = list(zip(grid.alpha[:-1], grid.sigma[:-1], grid.alpha[1:], grid.sigma[1:], strict=True))
    for a, s, a_next, s_next in levels[-keep:]:
        move = a_next - s_next * a / s
        total = (move * a / (a * a + s * s) + s_next / s) * total + move
    return float(total)


def test_loss_shapes_by_hand():
    rewards = torch.tensor([0.5, 3.0], requires_grad=True)
    loss = 1e-3 * shaped(rewards, "margin", 2.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(7.5e-4)
    assert rewards.grad.tolist() == pytest.approx([-5e-4, 0])
    assert shaped(rewards.detach(), "target", 2.0).tolist() == [1.5, 1.0]
    assert shaped(rewards.detach(), "linear", 2.0).tolist() == [-0.5, -3.0]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("keep", [1, 2, STEPS])
def test_draft_is_the_closed_form_of_the_linear_chain(keep, flow):
    method = make("draft", flow, keep=keep)
    (grad,), loss, batch = gradients(method)
    driver = method.tools.driver
    expected = -chain(driver.grid(STEPS), keep)
    assert grad.tolist() == pytest.approx([expected, 0, 0], rel=1e-4, abs=1e-6)
    with torch.no_grad():
        x = driver.unroll(batch.x, batch.cond, STEPS, ode())
    assert loss == pytest.approx(-float(x[:, 0].mean()), rel=1e-5)


@pytest.mark.parametrize("flow", [False, True])
def test_all_steps_are_finite_differences_of_the_whole_sampler(flow):
    method = make("draft", flow, keep=STEPS, kernel=None, reward=lambda images, prompts: red(images, prompts).square())
    (grad,), _, _ = gradients(method)
    (shift,), ends = method.policy.trainable(), []
    for move in (1e-2, -1e-2):
        with torch.no_grad():
            shift[0] += move
        ends.append(gradients(method)[1])
        with torch.no_grad():
            shift[0] -= move
    # quadratic in the shift: central differences are exact but for fp32 rounding, 1e-7 of the loss / 2e-2
    assert float(grad[0]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-3)


@pytest.mark.parametrize("flow", [False, True])
def test_the_three_are_one_method_at_the_last_step(flow):
    (draft,), loss, _ = gradients(make("draft", flow))
    for use, settings in (("refl", {"window": 0.01}), ("alignprop", {"keep": 1})):
        (grad,), value, _ = gradients(make(use, flow, **settings))
        torch.testing.assert_close(grad, draft, rtol=1e-5, atol=1e-7)
        assert value == pytest.approx(loss, rel=1e-5)
    (whole,), _, _ = gradients(make("draft", flow, keep=STEPS))
    (fixed,), _, _ = gradients(make("alignprop", flow, keep=99))
    assert torch.equal(whole, fixed)


def test_the_kl_of_one_step_counts_for_the_chain():
    """A shift moves every step alike wherever it starts from, so that the rows' KLs add up to the chain's exactly."""
    method = make("draft", kernel=None, kl=2.0, reward=lambda images, prompts: 0 * red(images, prompts))
    (shift,) = method.policy.trainable()
    (at_base,), _, _ = gradients(method)
    assert at_base.abs().max() < 1e-6
    with torch.no_grad():
        shift[0] += 0.5
    found = {}
    for step in range(40):
        batch = method.collect(context(step), Prompts.of(["0"]))
        nats = float(method.drift(context(step), batch, slice(0, 1)).detach())
        found[f"{nats:.3g}"] = nats
    expected = drift_from_base(method, Prompts.of(["0", "1"]), 0)
    assert len(found) == STEPS  # of the last step, which adds no noise, 0
    assert sum(found.values()) / STEPS == pytest.approx(expected["kl"], rel=1e-3)
    chi2 = sum(math.expm1(2 * nats / STEPS) for nats in found.values())  # of Gaussians of one std
    assert expected["chi2"] == pytest.approx(chi2, rel=1e-3)
    (grad,), loss, _ = gradients(method)
    assert float(grad[0]) == pytest.approx(2 * loss / 0.5, rel=1e-4)  # quadratic in the shift


def test_lv_from_the_chains_own_last_latent_is_draft_1():
    method = make("draft", lv=1, kernel=None)
    own = type(method)

    class Replayed(own):
        def noised(self, ctx, batch, part, x, number):
            with torch.no_grad():
                return self.sampled(batch, part, batch.x[part], range(STEPS - 1))

    method.__class__ = Replayed
    (grad,), loss, _ = gradients(method)
    (draft,), value, _ = gradients(make("draft", kernel=None))
    torch.testing.assert_close(grad, draft)
    assert loss == pytest.approx(value)


def test_lv_averages_its_draws():
    square = {"reward": lambda images, prompts: -red(images, prompts).square()}
    method = make("draft", lv=3, **square)
    grads, first = [], gradients(method)[0][0]
    noised = type(method).noised

    for number in range(3):
        one = make("draft", lv=1, **square)
        one.noised = lambda ctx, batch, part, x, n, number=number, one=one: noised(one, ctx, batch, part, x, number)
        grads.append(gradients(one)[0][0])
    assert not torch.equal(grads[0], grads[1])
    torch.testing.assert_close(first, torch.stack(grads).mean(0), rtol=1e-5, atol=1e-6)


def test_kept_steps_are_drawn_per_batch_and_keyed():
    method = make("alignprop", steps=50)
    drawn = [method.kept(context(step), 0) for step in range(200)]
    assert {1, 50} <= set(drawn) <= set(range(1, 51))
    assert drawn == [method.kept(context(step), 0) for step in range(200)]
    assert sum(drawn) / 200 == pytest.approx(25.5, abs=4 * 14.43 / math.sqrt(200))
    method = make("alignprop", steps=50, keep="gaussian")
    drawn = [method.kept(context(step), 0) for step in range(200)]
    assert set(drawn) <= set(range(1, 50))
    assert sum(drawn) / 200 == pytest.approx(8.5 + 0.4, abs=4 * 5 / math.sqrt(200))  # 50 - int(N(42, 5)), cut at 1
    stops = {gradients(make("refl", steps=8, window=0.5), step=step)[1] for step in range(6)}
    assert len(stops) == 6


@pytest.mark.parametrize("use", ["refl", "draft"])
def test_checkpointing_changes_nothing_and_only_the_policy_gets_gradients(use):
    """Nor does it lack anything: decoder and scorer run once more than without."""
    found, calls = {}, {}
    scorer = load_reward("tiny_clip")
    for on in (False, True):
        torch.manual_seed(0)
        pipe = FAMILIES["sd"]().pipe
        policy = Policy.lora(pipe, rank=2, gradient_checkpointing=on)
        for p in policy.trainable():
            with torch.no_grad():
                p.add_(0.02)
        keep = {"keep": 2} if use == "draft" else {"kernel": None}
        method = make(use, pipe=pipe, policy=policy, checkpointing=on, **keep)
        method.tools.scorer = scorer
        counts = calls.setdefault(on, Counter())
        watched = {"decoder": pipe.vae.decoder, "scorer": scorer.tower.network.visual}
        hooks = [
            network.register_forward_hook(lambda *_, name=name, counts=counts: counts.update([name]))
            for name, network in watched.items()
        ]
        found[on], _, _ = gradients(method, ("a cat", "a dog"))
        for hook in hooks:
            hook.remove()
        assert all(p.grad is None for network in (pipe.vae, scorer.tower.network) for p in network.parameters())
    assert calls[False] == {"decoder": 1, "scorer": 1}
    assert calls[True] == {"decoder": 2, "scorer": 2}
    norm = torch.cat([g.flatten() for g in found[False]]).norm()
    assert norm > 0
    for plain, again in zip(found[False], found[True], strict=True):
        assert float((plain - again).norm() / norm) < 1e-6


def test_the_gradient_is_that_of_one_graph():
    """Taken apart at the pixels and at the latents, it is what plain backpropagation through all of it gives."""
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    method = make("draft", pipe=pipe, policy=Policy.lora(pipe, rank=2), keep=STEPS, checkpointing=False)
    found, loss, batch = gradients(method, ("a cat", "a dog"))
    method.zero_grad()
    driver = method.tools.driver
    x = driver.unroll(batch.x, batch.cond, STEPS, ode(), checkpointing=False)
    whole = -red(driver.decode(x, straight_through=True), None).mean()
    whole.backward()
    assert whole.item() == pytest.approx(loss, rel=1e-5)
    norm = torch.cat([g.flatten() for g in found]).norm()
    for p, mine in zip(method.policy.trainable(), found, strict=True):
        assert float((p.grad - mine).norm() / norm) < 1e-5


class Unsure(Scorer):
    """The toy's reward with a std of 0.7."""

    name, differentiable = "unsure", True

    def forward(self, images, prompts):
        return red(images, prompts), torch.full((len(images),), 0.7)


def test_doubt_discounts_the_loss():
    """l exp(-U) + U, with one U for all images: gradients count exp(-U)."""
    pipe, margin = toy_pipeline(), {"loss": "margin", "goal": 9.0}
    found = []
    for discount in (0.0, 2.0):
        method = make("draft", pipe=pipe, discount=discount, **margin)
        method.tools.scorer = Unsure()
        found.append(gradients(method)[:2])
    (plain,), (doubted,) = found[0][0], found[1][0]
    torch.testing.assert_close(doubted, math.exp(-1.4) * plain)
    assert found[1][1] == pytest.approx(math.exp(-1.4) * found[0][1] + 1.4, rel=1e-4)
    with pytest.raises(TrainingError, match="Expected a reward with a std"):
        gradients(make("draft", pipe=pipe, discount=2.0, **margin))


class Doubting(Scorer):
    """The toy's reward from another zero; its std is the third number of a latent."""

    name, differentiable = "doubting", True

    def __init__(self, zero):
        super().__init__()
        self.zero = zero

    def forward(self, images, prompts):
        return self.zero + red(images, prompts), 16 * (images[:, 2] - 0.5).mean((1, 2)).relu()


@pytest.mark.parametrize("loss", ["margin", "target"])
def test_doubt_is_not_learned_near_the_goal_wherever_zero_is(loss):
    """Of -r it would be where r < -exp(U), here with U = 0.5."""
    found = {}
    for zero in (0.0, -5.0):
        for shape in (loss, "linear"):
            method = make("draft", pipe=toy_pipeline(), discount=1.0, loss=shape, goal=zero + 0.5)
            method.tools.scorer = Doubting(zero)
            latents = torch.zeros(2, 3, 1, 1)
            latents[:, 2] = 0.5
            found[shape, zero] = method.slope(latents, Prompts.of(["0", "1"]))[1][:, 2]
    torch.testing.assert_close(found[loss, 0.0], found[loss, -5.0])
    assert (found[loss, 0.0] > 0).all()
    assert (found["linear", 0.0] > 0).all()
    assert (found["linear", -5.0] < 0).all()


@pytest.mark.parametrize("use", ["refl", "draft", "alignprop"])
def test_doubt_wants_a_loss_with_a_goal(use):
    config = {"method": {"use": use, "discount": 1.0, "loss": "linear"}, "reward": "tiny_pick", "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"method.loss: expected target or margin with discount, .*but got linear"):
        load_run(config)
    assert load_run(config, ["method.loss=margin"]).method["discount"] == 1
    assert load_run(config, ["method.discount=0"]).method["loss"] == "linear"


class Doubtful(Unsure):
    """The same with a std of its own for every image: the square of the toy's second number."""

    def forward(self, images, prompts):
        return red(images, prompts), red(images[:, 1:], prompts).square()


def test_doubt_has_a_gradient_of_its_own():
    """Of l exp(-U) + U by the policy, U's share as well as l's: central differences."""
    method = make("draft", keep=STEPS, loss="target", goal=3.0, discount=0.5)
    method.tools.scorer = Doubtful()
    (grad,), _, _ = gradients(method)
    (shift,) = method.policy.trainable()
    for at in range(2):
        ends = []
        for move in (1e-2, -1e-2):
            with torch.no_grad():
                shift[at] += move
            ends.append(gradients(method)[1])
            with torch.no_grad():
                shift[at] -= move
        assert float(grad[at]) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2)
    assert grad[1].abs() > 0.01  # the reward itself knows nothing of it


def test_constraints_move_with_the_images_of_an_update():
    method = make("draft")
    limit = Constraint(FunctionScorer(red, "limit", differentiable=True), "at_least", 9.0)
    method.tools.scorer = Limited(FunctionScorer(red, "red", differentiable=True), [limit])
    before = float(method.tools.scorer.multipliers())
    gradients(method)
    assert float(method.tools.scorer.multipliers()) > before  # rewards are around 0, far below 9


def test_rewards_that_are_no_numbers_are_left_out():
    def broken(images, prompts):
        return red(images, prompts) / torch.tensor([float(text) for text in prompts])

    method = make("draft", reward=broken)
    batch = method.collect(context(), Prompts.of(["0", "1"]))
    (term,) = method.losses(context(), batch)
    term.loss.backward()
    assert term.stats["invalid"] in (0, 1)
    (shift,) = method.policy.trainable()
    assert shift.grad.isfinite().all()


def test_images_that_are_no_numbers_are_left_out():
    """A decoder that overflows on one of two images: the other's gradient stays. Latents must be numbers."""
    method = make("draft")
    latents = method.collect(context(), Prompts.of(["0", "1"])).x
    whole = method.slope(latents.clone(), Prompts.of(["0", "1"]))
    decode = method.tools.driver.decode
    broken = torch.tensor([1.0, math.nan])[:, None, None, None]
    method.tools.driver.decode = lambda *args, **options: decode(*args, **options) * broken
    loss, slope, scores = method.slope(latents.clone(), Prompts.of(["0", "1"]))
    assert scores.total.isnan().tolist() == [False, True]
    assert all(part.isnan().tolist() == [False, True] for part in scores.parts.values())
    torch.testing.assert_close(slope[0], whole[1][0])
    assert not slope[1].any()
    assert loss == pytest.approx(-float(whole[2].total[0]))
    latents[0] = math.nan
    with pytest.raises(TrainingError, match="the weights have diverged"):
        method.slope(latents, Prompts.of(["0", "1"]))


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    ("use", "settings"), [("refl", {"kernel": None, "window": 0.5}), ("draft", {"lv": 2}), ("alignprop", {})]
)
def test_every_one_raises_the_reward_of_the_toy(use, settings, flow, tmp_path):
    method = make(use, flow, batch_size=4, **settings)
    before = gradients(method, ["0"] * 4, 99)[1]
    fit(method, lambda number: Prompts.of(["0"] * 4), TrainConfig(steps=10, learning_rate=0.05), tmp_path)
    assert gradients(method, ["0"] * 4, 99)[1] < before - 0.05


def test_the_pretraining_term_learns_the_data(tmp_path):
    """Without a reward to gain, the gradient points to where pictures of x0 = (3, 0, 0) want the shift."""
    level = round(255 * (0.5 + 3 / 16))
    Image.new("RGB", (1, 1), (level, 128, 128)).save(tmp_path / "a.png")
    write_table([{"prompt": "0", "image": "a.png"}], tmp_path / "data.jsonl")
    flat = {"reward": lambda images, prompts: 0 * red(images, prompts)}
    method = make("refl", pretrain=1.0, pretrain_data=str(tmp_path / "data.jsonl"), **flat)
    (grad,), loss, _ = gradients(method)
    assert loss > 0
    assert grad[0] < -0.1
    assert grad[1:].abs().max() < -grad[0] * 0.9
    with pytest.raises(ConfigError, match="expected a weight and pretrain_data"):
        load_run({"method": {"use": "refl", "pretrain": 1.0}, "reward": "tiny_clip", "train": {"steps": 1}})


@pytest.mark.parametrize("use", ["refl", "draft", "alignprop"])
def test_a_reward_without_gradients_is_refused_before_anything_is_loaded(use):
    config = {"method": {"use": use}, "reward": "tiny_clip + verifier", "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=rf"differentiable one for {use} but verifier is not: use .*tiny_pick"):
        load_run(config)
    assert load_run(config | {"reward": "tiny_clip"}).method["use"] == use
    with pytest.raises(ConfigError, match=r"method.lv: expected keep: 1"):
        load_run(config | {"reward": "tiny_clip", "method": {"use": "draft", "lv": 2, "keep": 3}})
