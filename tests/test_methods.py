"""On-policy methods: hand-computed values, equivalences, and the exact toy."""

import math

import pytest
import torch

from t2i_align.config import TrainConfig
from t2i_align.keys import key
from t2i_align.methods.base import Tools, surrogate
from t2i_align.methods.d3po import D3PO, D3POSettings, preference_loss
from t2i_align.methods.ddpo import DDPO, DDPOSettings
from t2i_align.methods.grpo import GRPO, GRPOSettings, guarded
from t2i_align.methods.prdp import PRDP, PRDPSettings, proximal
from t2i_align.pipelines.driver import Driver, noise_of
from t2i_align.pipelines.kernels import Gaussian, per_dim
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.health import Health

METHODS = {
    "ddpo": (DDPO, DDPOSettings),
    "grpo": (GRPO, GRPOSettings),
    "d3po": (D3PO, D3POSettings),
    "prdp": (PRDP, PRDPSettings),
}


def linear(images, prompts):
    return 16 * (images[:, 0, 0, 0] - 0.5)


def make(name, flow=False, reward=linear, size=1, dtype=torch.float32, **settings):
    pipe = toy_pipeline(flow=flow, size=size)
    pipe = pipe if dtype == torch.float32 else pipe.to(dtype)
    policy = Policy.full(pipe)
    cls, options = METHODS[name]
    defaults = {"group": 8, "steps": 5, "batch_size": 16}
    return cls(options(**(defaults | settings)), policy, Tools(Driver(pipe), FunctionScorer(reward)))


def context(step=0, update=0):
    return Ctx(0, step, torch.device("cpu"), update)


def gradient(method, prompts=("0", "1"), ctx=None):
    ctx = ctx or context()
    batch = method.collect(ctx, Prompts.of(list(prompts)))
    method.zero_grad()
    stats = []
    for term in method.losses(ctx, batch):
        term.loss.backward()
        stats.append({name: torch.as_tensor(value).detach() for name, value in term.stats.items()})
    (shift,) = method.policy.trainable()
    return shift.grad.clone(), stats, batch


def test_surrogate_by_hand():
    ratio = torch.tensor([1.0002, 1.0002], requires_grad=True)
    loss = surrogate(ratio, torch.tensor([1.0, -1.0]), 1e-4)
    assert loss.tolist() == pytest.approx([-1.0001, 1.0002], abs=1e-7)
    loss.sum().backward()
    assert ratio.grad.tolist() == [0, 1]


def test_preference_loss_by_hand():
    gap = torch.zeros(1, requires_grad=True)
    loss = preference_loss(gap, 0.1)
    loss.sum().backward()
    assert float(loss) == pytest.approx(0.693147, abs=1e-6)
    assert float(gap.grad) == pytest.approx(-0.05)
    by_hand = {(1.05, 0.95): 0.688156, (1.1, 0.9): 0.683164, (1.3, 0.5): 0.683164}
    method = make("d3po")
    for (win, lose), value in by_hand.items():
        log_ratio = torch.tensor([math.log(win), math.log(lose)], requires_grad=True)
        loss = preference_loss(method.gap(log_ratio), 0.1)
        assert float(loss) == pytest.approx(value, abs=1e-6)
    loss.sum().backward()
    assert not log_ratio.grad.any()  # both are clamped


def test_prdp_by_hand():
    """Overshoot is still corrected; a pair that is clipped on its way has loss but no gradient."""
    old, pairs = torch.zeros(2, 2), torch.tensor([[0, 1]])
    rewards = torch.tensor([1.0, 0.5])
    over = proximal(torch.tensor([[0.6, 0.6], [-0.2, -0.2]]), old, rewards, pairs, beta=2.0, eps=0.15)
    assert float(over.loss) == pytest.approx(0.3025)
    assert over.slope[0].tolist() == pytest.approx([0.55, 0.55])
    on_its_way = proximal(torch.tensor([[0.3, 0.3], [0.0, 0.0]]), old, rewards, pairs, beta=0.5, eps=0.15)
    assert float(on_its_way.loss) == pytest.approx(0.7225)
    assert not on_its_way.slope[0].any()
    exact = proximal(
        torch.tensor([[math.log(0.731059 / 0.5)], [math.log(0.268941 / 0.5)]]),
        old[:, :1],
        torch.tensor([1.0, 0.0]),
        pairs,
        1.0,
        9.0,
    )
    assert float(exact.loss) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("flow", [False, True])
def test_credit_by_step_has_the_same_gradient_with_less_noise(flow):
    """On the toy an x0 estimate says all that can be known of the reward before a step."""
    found = {}
    for decay in (None, 0.0, 1.0):
        method = make("grpo", flow=flow, gae=decay, spread="none", clip=10.0, group=16)
        found[decay] = torch.stack([gradient(method, ctx=context(step))[0].flatten() for step in range(20)])
    for decay in (0.0, 1.0):
        means, errors = zip(*((g.mean(0), g.std(0) / 20**0.5) for g in (found[None], found[decay])), strict=True)
        assert ((means[0] - means[1]).abs() < 3 * (errors[0].square() + errors[1].square()).sqrt()).all()
        assert means[1].abs().max() > 5 * errors[1].max()
    noise = {decay: g.var(0).sum() for decay, g in found.items()}
    assert noise[0.0] < noise[1.0] < 0.2 * noise[None]


def test_the_slope_of_prdp_is_its_derivative():
    g = torch.Generator().manual_seed(0)
    now, old = (0.2 * torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(6, generator=g, dtype=torch.float64)
    pairs = torch.tensor([[a, b] for a in range(6) for b in range(6) if rewards[a] > rewards[b]])
    now.requires_grad_()
    clipped = now.clamp(old - 0.1, old + 0.1)
    target = rewards[pairs[:, 0]] - rewards[pairs[:, 1]]
    plain, near = (rh.mean(1)[pairs[:, 0]] - rh.mean(1)[pairs[:, 1]] - target for rh in (now, clipped))
    loss = torch.maximum(plain.square(), near.square()).mean()
    (exact,) = torch.autograd.grad(loss, now)
    mine = proximal(now.detach(), old, rewards, pairs, beta=1.0, eps=0.1)
    torch.testing.assert_close(mine.slope, exact)
    torch.testing.assert_close(mine.loss, loss.detach())


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_two_passes_of_prdp_have_the_gradient_of_its_loss_in_one_graph(flow, minibatches):
    """After an update, where some log-ratios are clipped and others are not."""
    settings = {"beta": 5.0, "eps": 0.02, "minibatches": minibatches, "batch_size": 4, "group": 8, "epochs": 2}
    method, ctx = make("prdp", flow, **settings), context(minibatches, minibatches)
    data, old = method.collect(context(), Prompts.of(["0", "1"]))
    (shift,) = method.policy.trainable()
    with torch.no_grad():
        shift.add_(torch.tensor([0.1, -0.05, 0.2]))
    loss = sum(term.loss for term in method.losses(ctx, (data, old)))
    (mine,) = torch.autograd.grad(loss, shift)

    rows = method.rows(data.traj)
    now = torch.stack([old[:, row] + method.moved(data, slice(0, 16), row) for row in rows], 1)
    eps, rewards = settings["eps"], data.scores.total
    near = now.clamp(old[:, rows] - eps, old[:, rows] + eps)
    assert 0.1 < (near != now).float().mean() < 0.9
    parts = method.chunks(ctx, 16)
    used = [i for part in parts for i in range(part.start, part.stop)]
    pairs = [(a, b) for a in used for b in used if a // 8 == b // 8 and rewards[a] > rewards[b]]
    assert len(pairs) == 56 // minibatches
    a, b = torch.tensor(pairs).T
    target = (rewards[a] - rewards[b]) / settings["beta"]
    plain, clipped = ((rh.mean(1)[a] - rh.mean(1)[b] - target).square() for rh in (now, near))
    whole = torch.maximum(plain, clipped).mean()
    (exact,) = torch.autograd.grad(whole, shift)
    assert exact.abs().min() > 1e-5
    torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss, whole)


@pytest.mark.parametrize(("group", "batch", "every"), [(2, 1, 8), (16, 8, 480), (6, 4, 90), (4, 8, 24)])
def test_minibatches_of_prdp_have_whole_groups(group, batch, every):
    """All pairs of a round are in one of its updates, however small the batches are."""
    count = {2: 8, 16: 4, 6: 6, 4: 4}[group]
    method = make("prdp", group=group, batch_size=batch, minibatches=2, steps=2)
    data, old = method.collect(context(), Prompts.of([str(i) for i in range(count)]))
    found, covered = 0, []
    for update in range(2):
        ctx = context(update, update)
        parts = method.chunks(ctx, len(data))
        assert all(part.stop - part.start <= batch for part in parts)
        some = [i for part in parts for i in range(part.start, part.stop)]
        assert len(list(method.losses(ctx, (data, old)))) == len(parts)
        covered += some
        found += sum(a // group == b // group for a in some for b in some if a < b)
    assert sorted(covered) == list(range(count * group))
    assert found == every


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", ["ddpo", "grpo"])
def test_ratios_start_at_exactly_1(name, flow):
    _, stats, _ = gradient(make(name, flow))
    assert all((row["ratio"] == 1).all() for row in stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flow", [False, True])
def test_guarded_ratios_start_at_exactly_1(flow, dtype):
    """Whatever latents are rounded to: rounding squared, over the variance, would be beyond the clip."""
    _, stats, _ = gradient(make("grpo", flow, dtype=dtype, guard=True, steps=10))
    assert all((row["ratio"] == 1).all() for row in stats)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_guarded_ratios_by_hand(std):
    """eps = (1, -2, .5) and a move by (.1, .2, -.3): the mean of eps times the move, -.45 / 3, at any std."""
    old, noise, move = (
        torch.tensor([[3.0, 4.0, 5.0]]),
        torch.tensor([[1.0, -2.0, 0.5]]),
        torch.tensor([[0.1, 0.2, -0.3]]),
    )
    x, then, q = old + std * noise, Gaussian(old, torch.tensor(std)), Gaussian(old + move, torch.tensor(std))
    gap = per_dim(q.log_prob(x) - then.log_prob(x), q)
    assert float(gap) == pytest.approx(-0.15 / std - 0.14 / 6 / std**2, abs=1e-6)  # neither centred nor in one scale
    assert float(guarded(gap, q, old)) == pytest.approx(-0.15, abs=1e-6)


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("flow", [False, True])
def test_guarded_ratios_of_another_policy_are_noise_times_the_move(flow, guard):
    """At every step and in every batch, where plain ones are (noise move - move^2 / (2 std)) / std."""
    method = make("grpo", flow, guard=guard)
    data, advantages = method.collect(context(), Prompts.of(["0", "1", "2", "3"]))
    rows, parts = method.rows(data.traj), [slice(0, 16), slice(16, 32)]
    with torch.no_grad():
        old = [method.step(data.traj, part, row).mean for row in rows for part in parts]
        method.policy.trainable()[0].add_(torch.tensor([0.5, -0.2, 0.1]))
        terms = list(method.losses(context(update=1), (data, advantages)))
    for term, then, (row, part) in zip(terms, old, [(row, part) for row in rows for part in parts], strict=True):
        q = method.step(data.traj, part, row)
        move, noise = q.mean.detach() - then, noise_of(then, key(0, "rollout", 0), range(part.start, part.stop), row)
        expected = noise * move if guard else (noise * move - move.square() / (2 * q.std)) / q.std
        torch.testing.assert_close(term.stats["ratio"].log(), expected.flatten(1).mean(1), rtol=1e-4, atol=2e-6)


def test_a_run_is_refused_where_noise_decides_what_is_clipped(tmp_path):
    """5e-4 off is within the tolerance of ratios, but all images would be clipped at 1e-4."""
    for clip, fine in ((1e-4, False), (2e-3, True)):
        method = make("grpo", clip=clip, batch_size=8, group=8)
        collect = method.collect

        def elsewhere(ctx, prompts, collect=collect):
            data, advantages = collect(ctx, prompts)
            data.traj.log_prob.sub_(5e-4 * 3)  # nats of three dimensions
            return data, advantages

        method.collect = elsewhere
        config = TrainConfig(steps=1)
        if fine:
            fit(method, lambda step: Prompts.of("0"), config, tmp_path / str(clip))
            continue
        with pytest.raises(TrainingError, match=r"to be 1 before the first update on them, to 5e-05, .* by 0\.0005"):
            fit(method, lambda step: Prompts.of("0"), config, tmp_path / str(clip))


def test_a_clip_within_rounding_allows_rounding():
    """Of fp32 log-probs, for the 1e-6 of PRDP's small scale."""
    assert make("prdp", eps=1e-6).clip == 1e-6
    health = Health(1e-6)
    health.term(context(), {"log_ratio": torch.tensor([2.4e-7])})
    health.check_terms()
    health.term(context(), {"log_ratio": torch.tensor([2e-6])})
    with pytest.raises(TrainingError, match="to 1e-06"):
        health.check_terms()


@pytest.mark.parametrize("flow", [False, True])
def test_first_gradients_are_those_of_one_policy_gradient(flow):
    """At theta = old = ref: PRDP is GRPO without its std, D3PO of all pairs ranks, DDPO is GRPO by other statistics."""
    same = {"group": 8, "beta": 1.0}
    prdp, _, (data, _) = gradient(make("prdp", flow, **same), ["0"])
    grpo, _, _ = gradient(make("grpo", flow, group=8, spread="none", advantage_clip=1e9), ["0"])
    # dL/drh_i = -(4 / (beta (B - 1))) (r_i - mean): twice that of a mean over pairs a > b, counted once
    torch.testing.assert_close(prdp, 4 * 8 / 7 * grpo, rtol=1e-4, atol=1e-6)
    ddpo, _, _ = gradient(make("ddpo", flow, group=8, min_count=99, buffer=99, advantage_clip=1e9), ["0"])
    spread = data.scores.total.std(correction=0)
    torch.testing.assert_close(ddpo * spread, grpo, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flow", [False, True])
def test_first_gradient_of_d3po_is_half_beta_times_the_difference(flow):
    """-(beta / 2) (g_w - g_l) per pair: that of GRPO with advantages 1 and -1, times beta / 2 times two samples."""
    d3po, _, (data, pairs, _) = gradient(make("d3po", flow, group=2, clip=None, beta=0.1), ["0"])
    grpo, _, _ = gradient(make("grpo", flow, group=2, shared_start=True), ["0"])  # advantages of two are +-1
    assert len(pairs) == 1
    torch.testing.assert_close(d3po, 0.05 * 2 * grpo, rtol=5e-3, atol=1e-7)


def test_equal_rewards_give_no_gradient():
    same = lambda images, prompts: torch.ones(len(images))  # noqa: E731
    for name in ("ddpo", "grpo"):
        grad, _, _ = gradient(make(name, reward=same))
        assert not grad.any()
    for name in ("d3po", "prdp"):
        method = make(name, reward=same)
        batch = method.collect(context(), Prompts.of("0"))
        assert not list(method.losses(context(), batch))


def test_terms_add_up_to_the_same_whatever_the_batch_size():
    for name in METHODS:
        large, small = (gradient(make(name, batch_size=size))[0] for size in (16, 4))
        torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-7)


def test_minibatches_share_a_round_and_cover_it():
    method = make("grpo", batch_size=4, minibatches=2, epochs=2)
    parts = [method.chunks(context(step, step % 4), 16) for step in range(4)]
    for first, second in ((0, 1), (2, 3)):
        covered = sorted(part.start for part in parts[first] + parts[second])
        assert covered == [0, 4, 8, 12]
    assert method.updates == 4


def test_a_window_trains_its_rows_alone():
    method = make("grpo", window=2)
    for step, rows in ((0, (0, 1)), (1, (2, 3)), (2, (0, 1))):
        assert method.rollout(context(step), Prompts.of("0")).traj.stochastic == rows


@pytest.mark.parametrize(
    ("steps", "share", "width"), [(10, 0.99, 5), (10, 0.99, 2), (20, 0.99, 5), (4, 1.0, 1), (4, 0.5, 9)]
)
def test_a_window_comes_to_every_trained_row(steps, share, width):
    method = make("grpo", steps=steps, trained_rows=share, window=width)
    rounds = [method.kernels(context(step)) for step in range(-(-steps // width))]
    seen = [{row for row, kernel in enumerate(kernels) if kernel.stochastic} for kernels in rounds]
    assert set(range(min(int(share * steps), steps - 1))) <= set.union(*seen)
    assert {len(rows) for rows in seen} == {min(width, steps)}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_without_a_step_to_train_is_refused(name):
    with pytest.raises(TrainingError, match="None of the 1 steps of a run has noise"):
        gradient(make(name, steps=1))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("grpo", {"group": 1}), ("prdp", {"group": 1}), ("d3po", {"group": 1}), ("ddpo", {"buffer": 8})],
)
def test_settings_that_teach_nothing_are_refused(name, settings):
    with pytest.raises(ValueError, match="group|buffer of min_count=16"):
        make(name, **settings)


def test_published_kl_leaves_out_the_step_length():
    method = make("grpo", flow=True, beta=1.0)
    data, _ = method.collect(context(), Prompts.of("0"))
    with torch.no_grad():
        method.policy.trainable()[0].add_(0.3)
    exact, published = [], []
    for form, out in (("exact", exact), ("published", published)):
        method.settings = method.settings.model_copy(update={"kl_form": form})
        q = method.step(data.traj, slice(0, 8), 1)
        out.append(method.kl(data.traj, slice(0, 8), 1, q))
    sigma = method.tools.driver.grid(5).sigma
    torch.testing.assert_close(published[0], exact[0] * float(sigma[1] - sigma[2]))
    assert (exact[0] > 0).all()


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(
    ("name", "settings", "rate"),
    [
        ("grpo", {"clip": 0.2, "epochs": 2}, 0.05),
        ("ddpo", {"clip": 0.2, "epochs": 2}, 0.05),
        ("d3po", {"clip": None, "group": 8, "pairs": "all"}, 0.05),
        ("prdp", {"beta": 1.0, "eps": 0.2, "epochs": 2}, 0.05),
    ],
)
def test_every_method_raises_the_reward_of_the_toy(name, settings, rate, flow, tmp_path):
    method = make(name, flow, trained_rows=0.6, **settings)
    with torch.no_grad():
        before = method.rollout(context(99), Prompts.of(["0"] * 40)).scores.total.mean()
    config = TrainConfig(steps=20, learning_rate=rate, weight_decay=0.0)
    fit(method, lambda step: Prompts.of(["0"] * 4), config, tmp_path)
    after = method.rollout(context(99), Prompts.of(["0"] * 40)).scores.total.mean()
    print(f"{name}: {before:.3f} -> {after:.3f}")
    assert after > before + 0.2


def clipped_share(name, moved, **settings):
    """The logged share of clipped ratios after the shift has moved, at the second update on a round."""
    method = make(name, epochs=2, **settings)
    (shift,) = method.policy.trainable()
    batch = method.collect(context(), Prompts.of(["0", "1"]))
    with torch.no_grad():
        shift += moved
    terms = list(method.losses(context(update=1), batch))
    stats = [term.stats["clipped"] for term in terms]
    return sum(float(torch.as_tensor(value).mean()) for value in stats) / len(stats)


@pytest.mark.parametrize("name", ["d3po", "prdp"])
def test_the_share_of_clipped_ratios_is_logged(name):
    clip = "clip" if name == "d3po" else "eps"
    assert clipped_share(name, 0.0, **{clip: 0.1}) == 0
    assert clipped_share(name, 0.01, **{clip: 0.5}) == 0
    assert 0 < clipped_share(name, 0.3, **{clip: 0.3}) < 1
    assert clipped_share(name, 3.0, **{clip: 1e-6}) > 0.9


def test_an_unclipped_d3po_has_no_share_that_is_clipped():
    assert all("clipped" not in stats for stats in gradient(make("d3po", clip=None))[1])
