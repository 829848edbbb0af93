"""VARD and value functions: hand-computed values, the exact toy, resume, every pipeline family, steering by them."""

import json
import math

import pytest
import torch
from torch.nn.functional import softmax

from t2i_align.config import ConfigError, TrainConfig
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import Gaussian, ddim
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.rewards.outputs import HEADS, SMEAR, HLGauss
from t2i_align.rewards.tiny import TinyCLIP
from t2i_align.steering import Ctx as Steer
from t2i_align.steering import load_method
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.run import train
from t2i_align.values import Served, Value, ValueBlock, load_value
from t2i_align.values.calibration import calibrate, plot_calibration, within_prompts
from t2i_align.values.critic import Critic
from t2i_align.values.readers import Source, ValueFunctionError, middle_layer
from t2i_align.values.value import READ, dims_of
from tests.families import FAMILIES
from tests.families.subject import Subject

# One family for each kind of network and of latents.
FAMILY = ["sd", "sdxl", "kandinsky3", "sd-controlnet", "sd3", "flux-dev", "flux2", "chroma", "aura-flow", "hidream"]
FAMILY += ["qwen-image", "z-image-turbo", "pixart-sigma", "sana", "lumina2", "cogview4", "hunyuan-image", "kandinsky5"]
CONV = {"net": "conv", "width": 16, "batch_size": 64}
CLIP = {"net": "clip", "clip": "tiny_clip"}
QUICK = CONV | {"epochs": 2, "learning_rate": 5e-3, "batch_size": 128}


def linear(images, prompts):
    """The toy's first coordinate, the mean of its points."""
    return 16 * (images[:, 0] - 0.5).mean((1, 2))


def make(flow=False, reward=linear, differentiable=False, size=1, **settings):
    pipe = toy_pipeline(flow=flow, size=size)
    found, options = read_method({"use": "vard", "group": 8, "steps": 5, "value": CONV} | settings)
    tools = Tools(Driver(pipe), FunctionScorer(reward, differentiable=differentiable))
    return found(options, Policy.full(pipe), tools)


def context(step=0):
    return Ctx(0, step, torch.device("cpu"))


class Slope(Critic):
    """The value w . x of the first coordinate, at every row."""

    def __init__(self, w):
        super().__init__(ValueBlock(), None, None, 1)
        self.w = w

    def scaled(self, x, row, cond):
        return self.w * x[:, 0, 0, 0]

    def observe(self, ctx, data, learn=True):
        return {}


# the objective


def test_a_linear_value_moves_a_gaussian_by_hand():
    """s = .5, eta = 2, w = 3: the mean moves by (s^2 / eta) w = .375, which gains s^2 w^2 / (2 eta) = .5625."""
    std, eta, w = torch.tensor(0.5), 2.0, 3.0
    moved = torch.full((1, 1), 0.375, requires_grad=True)
    base = Gaussian(torch.zeros(1, 1), std)
    q = Gaussian(moved, std)
    loss = (eta * q.kl(base) - w * q.sample(torch.zeros(1, 1))[:, 0]).sum()
    loss.backward()
    assert float(moved.grad) == pytest.approx(0, abs=1e-6)
    assert loss.item() == pytest.approx(-0.5625, abs=1e-6)
    # the exact tilt of N(0, s^2) by exp(w x / eta)
    x = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    shares = softmax(-x.square() / (2 * 0.25) + w * x / eta, 0)
    assert float(shares @ x) == pytest.approx(0.375, abs=1e-6)


@pytest.mark.parametrize("flow", [False, True])
def test_the_optimum_of_a_step_is_the_tilt_of_the_base(flow):
    """One row, V = w x: the trained mean is the base's plus (s^2 / eta) w exactly, by the method's own losses."""
    w, eta = 1.5, 2.0
    method = make(flow, eta=eta, warmup=0, trained_rows=0.2)
    method.critic = Slope(w)
    batch = method.collect(context(), Prompts.of("0"))
    data = batch[0]
    (shift,) = method.policy.trainable()
    q = method.step(data.traj, slice(0, 8), 0)
    with method.policy.reference(), torch.no_grad():
        base = method.step(data.traj, slice(0, 8), 0)
    (slope,) = torch.autograd.grad(q.mean[0, 0].sum(), shift)  # of the mean by the shift of x0, a constant
    wanted = float(q.std.square() / eta * w)
    with torch.no_grad():
        shift[0] = wanted / float(slope[0])
    terms = list(method.losses(context(), batch))
    assert len(terms) == 1
    terms[0].loss.backward()
    assert shift.grad.abs().max() < 1e-5 * w
    moved = method.step(data.traj, slice(0, 8), 0).mean - base.mean
    torch.testing.assert_close(moved[:, 0], torch.full_like(moved[:, 0], wanted), rtol=1e-4, atol=1e-6)
    assert terms[0].stats["kl_penalty"].mean().item() == pytest.approx(wanted**2 / (2 * float(q.std) ** 2), rel=1e-3)


def test_without_a_kl_the_plug_in_value_of_the_last_step_is_the_reward_of_a_deterministic_sampler():
    """Exact V, one step, eta = 0: DRaFT-1, the gradient of r(x0)."""
    method = make(differentiable=True, value={"net": "plugin"}, eta=0.0, warmup=0, steps=1)
    batch = method.collect(context(), Prompts.of("0"))
    data, steps = batch[0], method.settings.steps
    (shift,) = method.policy.trainable()
    method.critic.mean, method.critic.std = 0.0, 1.0
    value, _ = method.ahead(context(), data, slice(0, 8), steps - 1)
    (mine,) = torch.autograd.grad(value.mean(), shift)
    step = method.tools.driver.step(data.traj.x[:, -2], steps - 1, data.traj.cond, steps, ddim(0.0))
    images = method.tools.driver.decode(step.q.mean)
    (draft,) = torch.autograd.grad(linear(images, None).mean(), shift)
    torch.testing.assert_close(mine, draft)
    assert mine.any()


def test_looking_ahead_pays_the_kl_of_each_step_and_reaches_further():
    method = make(lookahead=3, warmup=0)
    method.critic = Slope(1.0)
    data, _ = method.collect(context(), Prompts.of("0"))
    (shift,) = method.policy.trainable()
    with torch.no_grad():
        shift[0] = 0.1
    kls = [float(method.ahead(context(), data, slice(0, 8), 3)[1].mean())]  # one step is left before the end
    for steps in (1, 2, 3):
        method.settings = method.settings.model_copy(update={"lookahead": steps})
        kls.append(float(method.ahead(context(), data, slice(0, 8), 0)[1].mean()))
    method.settings = method.settings.model_copy(update={"lookahead": 1})
    alone = float(method.ahead(context(), data, slice(0, 8), 3)[1].mean())
    assert kls[0] == pytest.approx(alone)
    assert kls[1] < kls[2] < kls[3]
    # a constant shift of x0 has the same KL wherever the latents are
    each = [float(method.ahead(context(), data, slice(0, 8), row)[1].mean()) for row in range(3)]
    assert kls[3] == pytest.approx(sum(each), rel=1e-4)


def test_a_large_eta_leaves_the_base(tmp_path):
    method = make(eta=1e4, warmup=0, trained_rows=0.6)
    method.critic = Slope(1.0)
    config = TrainConfig(steps=10, learning_rate=1e-3, weight_decay=0.0)
    fit(method, lambda step: Prompts.of(["0"] * 2), config, tmp_path)
    assert method.policy.trainable()[0].abs().max() < 2e-3  # Adam's own jitter


# the value function


def test_skipped_steps_are_not_trained():
    """Of five steps the last has no value below it; of the others the two noisiest are left out."""
    method = make(group=8, batch_size=8, warmup=0, skip=2)
    method.critic = Slope(1.0)
    data = method.rollout(context(), Prompts.of("0"))
    assert len(list(method.losses(context(), (data, {})))) == 2
    method = make(group=8, batch_size=8, warmup=0, skip=4)
    method.critic = Slope(1.0)
    with pytest.raises(TrainingError, match="skip=4 leaves none"):
        next(method.losses(context(), (data, {})))


@pytest.mark.parametrize("name", HEADS)
def test_heads_learn_the_mean(name):
    """Of targets 0 and 2 in shares .75 and .25: .5, whatever the head; quantiles at (i + 1/2) / 16 have it exactly."""
    torch.manual_seed(0)
    head = HEADS[name](1)
    assert head.mean(head(torch.randn(4, 1))).abs().max() < 1e-5  # before it has learned: the mean of all rewards
    features, targets = torch.ones(64, 1), torch.tensor([0.0, 0.0, 0.0, 2.0]).repeat(16)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(600):
        optimizer.zero_grad()
        head.loss(head(features), targets).mean().backward()
        optimizer.step()
    assert float(head.mean(head(features))[0]) == pytest.approx(0.5, abs=0.06)


def test_hl_gauss_spreads_a_target_over_bins_and_back():
    head = HLGauss(1)
    targets = torch.tensor([-3.3, 0.0, 0.17, 4.0, 99.0])
    shares = head.shares(targets)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert head.mean(shares.log())[:4].tolist() == pytest.approx(targets[:4].tolist(), abs=2e-3)
    width = float(head.edges[1] - head.edges[0])
    centres = (head.edges[1:] + head.edges[:-1]) / 2
    variance = float(shares[1] @ centres.square())  # that of the Gaussian, and a uniform one's within a bin
    assert variance == pytest.approx((SMEAR * width) ** 2 + width**2 / 12, rel=1e-2)
    assert float(head.mean(shares.log())[4]) < 10  # beyond the last bin counts as the last bin
    assert head.loss(torch.zeros(1, 51), targets[:1]).item() == pytest.approx(math.log(51), abs=1e-5)


def exact_values(method, data):
    """E[x0 | x_t] under the sampler's chain: x_next = a x + std noise on the toy."""
    traj, out = data.traj, []
    for row in range(traj.steps):
        a = 1.0
        for later in range(row, traj.steps):
            with torch.no_grad():
                ones = torch.ones(1, 3, 1, 1)
                a *= float(method._step(ones, later, traj.cond[:1]).q.mean[0, 0, 0, 0])
        out.append(a * traj.x[:, row, 0, 0, 0])
    return torch.stack(out, 1)


@pytest.mark.parametrize(("flow", "head"), [*((False, head) for head in HEADS), (True, "regression")])
def test_the_regression_recovers_the_exact_value_of_the_toy(flow, head):
    method = make(flow, group=64, batch_size=64, value=QUICK | {"head": head})
    for number in range(8):
        data, _ = method.collect(context(number), Prompts.of(["0"] * 2))
    fresh = method.rollout(context(99), Prompts.of(["0"] * 2))
    critic = method.critic
    with torch.no_grad():
        rows = [critic.served(fresh.traj.x[:, row], row, fresh.traj.cond) for row in range(5)]
    found, exact = torch.stack(rows, 1), exact_values(method, fresh)
    error, spread = (found - exact).square().mean().sqrt(), exact.std()
    print(f"{head}: error {error:.3f} of values with standard deviation {spread:.3f}")
    assert error < 0.25 * spread


def test_a_run_learns_its_value_then_follows_it(tmp_path):
    """The reward has no gradient; the policy moves only after the warm-up, and then upwards."""
    method = make(group=8, batch_size=32, warmup=4, eta=0.02, trained_rows=0.6)
    before = method.rollout(context(99), Prompts.of(["0"] * 16)).scores.total.mean()
    config = TrainConfig(steps=16, learning_rate=0.05, weight_decay=0.0, log_every=1)
    moved = []
    fit(
        method,
        lambda step: moved.append(float(method.policy.trainable()[0].abs().max())) or Prompts.of(["0"] * 4),
        config,
        tmp_path,
    )
    assert moved[:5] == [0] * 5
    assert moved[5] > 0
    after = method.rollout(context(99), Prompts.of(["0"] * 16)).scores.total.mean()
    print(f"{before:.3f} -> {after:.3f}")
    assert after > before + 0.3
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"value_r2", "value_correlation", "value_loss"} <= logged[0].keys()
    assert {"value", "kl_penalty"} <= logged[-1].keys()


def test_resume_is_bit_identical(tmp_path):
    """The value function, its optimiser, the rewards' scale and its record are in the checkpoint."""

    def run(folder, stop=None, resume=False):
        def data(number):
            if number == stop:
                raise KeyboardInterrupt
            return Prompts.of(["0", "0.5"])

        method = make(group=4, batch_size=4, warmup=2, minibatches=2)
        config = TrainConfig(steps=12, learning_rate=0.05, checkpoint_every=2, ema=0.9)
        return method, fit(method, data, config, tmp_path / folder, resume=resume)

    whole, state = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=4)
    torch.manual_seed(5)
    parts, resumed = run("parts", resume=True)
    assert state.step == resumed.step == 12
    for name, weight in state.weights.items():
        assert torch.equal(weight, resumed.weights[name])
        assert torch.equal(state.average[name], resumed.average[name])
        assert weight.any()
    mine, theirs = whole.critic.state(), parts.critic.state()
    for name, weight in mine["value"].items():
        assert torch.equal(weight, theirs["value"][name])
    moments = (critic["optimizer"]["state"] for critic in (mine, theirs))
    for one, other in zip(*(group.values() for group in moments), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (mine["mean"], mine["std"]) == (theirs["mean"], theirs["std"])
    assert all(torch.equal(a["predicted"], b["predicted"]) for a, b in zip(mine["seen"], theirs["seen"], strict=True))


def test_calibration_by_hand(tmp_path):
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0, math.nan])
    predicted = torch.stack([rewards, 2 * rewards, torch.full((5,), 1.5), rewards + 1], 1)
    right, twice, blind, biased = calibrate(predicted, rewards)
    assert right[1:] == pytest.approx((1, 1, 1, 0, 0))
    assert twice[1:] == pytest.approx((1, 1 - 3.5 / 1.25, 0.5, 1.5, 1.5))
    assert blind[1:-1] == pytest.approx((0, 0, 0, 0))
    assert biased[1:] == pytest.approx((1, 1 - 1 / 1.25, 1, 1, 1))
    many = torch.arange(32.0)  # in eight groups, of which the first is told 1 too much
    assert calibrate((many + (many < 4))[:, None], many)[0].error == pytest.approx(1 / 8)
    predicted[:, 1] = math.nan  # a row at which no prediction is a number; of the next row one is none
    predicted[0, 2] = math.inf
    right, none, blind, _ = calibrate(predicted, rewards)
    assert right[1:] == pytest.approx((1, 1, 1, 0, 0))
    assert all(math.isnan(value) for value in none[1:])
    assert blind.bias == pytest.approx(-0.5)
    assert [math.isnan(value) for value in within_prompts(predicted[:4], rewards[:4], 2)] == [False, True, False, False]
    plot_calibration(predicted, rewards, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_correlation_within_prompts_by_hand():
    """Of three prompts of two images; the last has an image without a reward."""
    rewards = torch.tensor([0.0, 1.0, 6.0, 9.0, 5.0, math.nan])
    means = torch.tensor([0.5, 0.5, 7.5, 7.5, 0.0, 0.0])
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    columns = torch.stack([means, means + signs, means - signs, rewards], 1)
    # Differences (-1/2, 1/2, -3/2, 3/2) of the rewards against signs of equal size: 1 / sqrt(1.25).
    assert within_prompts(columns, rewards, 2) == pytest.approx([0, 1.25**-0.5, -(1.25**-0.5), 1])
    assert calibrate(columns[:4], rewards[:4])[0].correlation == pytest.approx(3.5 / 13.5**0.5)


# every pipeline


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_is_read(name):
    """All readers: a row per sample, of its own sample alone, with a gradient to the latent."""
    subject = Subject(name)
    x = subject.trajectory.x[:, 0]
    for block in (ValueBlock(width=8), ValueBlock(net="conv", width=8), ValueBlock(**CLIP, width=8)):
        if "d/dx" in subject.family.cannot and block.net != "conv":
            continue
        read, source = READ[block.net], block.connect(Source(subject.driver, subject.steps, {}), torch.device("cpu"))
        some = x[:2].clone().float().requires_grad_()
        seen = read(source, some, 0, subject.cond[:2])
        value = Value(block, dims_of(seen))
        hidden = value.trunk(torch.zeros(2, 16), *seen)
        (slope,) = torch.autograd.grad(hidden[0].square().sum(), some)
        assert slope[0].any()
        assert not slope[1].any()
        with torch.no_grad():
            again = read(source, x[1:2], 0, subject.cond[1:2])
            for part, alone in zip(seen, again, strict=True):
                torch.testing.assert_close(part[1:2].detach(), alone, rtol=1e-2, atol=1e-3)


def test_the_middle_of_a_network():
    sd, sd3 = FAMILIES["sd"]().pipe.unet, FAMILIES["sd3"]().pipe.transformer
    assert middle_layer(sd) is sd.mid_block
    assert middle_layer(sd3) is sd3.transformer_blocks[len(sd3.transformer_blocks) // 2]
    with pytest.raises(ValueFunctionError, match="no blocks to read"):
        middle_layer(toy_pipeline().denoiser)


def test_what_a_clip_sees():
    """The products' mean is the cosine of picture and prompt: below all rows, what the scorer says of the image."""
    subject, scorer = Subject("sd"), TinyCLIP()
    source = ValueBlock(**CLIP).connect(Source(subject.driver, subject.steps, {}), torch.device("cpu"))
    for row, x0 in ((0, None), (subject.steps, subject.trajectory.x[:, -1])):
        with torch.no_grad():
            if x0 is None:
                x0 = subject.driver.step(
                    subject.trajectory.x[:, row], row, subject.cond, subject.steps, guidance_scale=1.0
                ).x0
            (seen,) = READ["clip"](source, subject.trajectory.x[:, row], row, subject.cond)
            images = subject.driver.decode(x0)
            picture, prompt, products = seen.chunk(3, 1)
            torch.testing.assert_close(products.mean(1), scorer.scores(images, subject.cond.prompts).total)
        assert picture.square().mean(1).tolist() == pytest.approx([1] * len(x0))
        assert prompt.square().mean(1).tolist() == pytest.approx([1] * len(x0))


@pytest.mark.parametrize("net", [{}, CLIP])
def test_guidance_does_not_change_what_is_read(net):
    subject = Subject("sd")
    block, x = ValueBlock(**net), subject.trajectory.x[:, 0]
    seen = []
    for scale in (1.0, 6.0):
        source = Source(subject.driver, subject.steps, {"guidance_scale": scale})
        with torch.no_grad():
            seen += READ[block.net](block.connect(source, torch.device("cpu")), x, 0, subject.cond)
    torch.testing.assert_close(*seen)


def test_readings_that_are_no_numbers_are_not_learned_from(tmp_path):
    method = make()
    method.collect(context(), Prompts.of(["0"] * 2))
    critic = method.critic
    critic.memory[0]["seen0"][3, 1] = math.nan
    method.collect(context(1), Prompts.of(["0"] * 2))
    assert all(weight.isfinite().all() for weight in critic.served.value.parameters())
    found = torch.tensor([[0.5], [math.nan], [1.5]])
    assert calibrate(found, torch.tensor([0.0, 9.0, 1.0]))[0].bias == pytest.approx(0.5)


@pytest.mark.parametrize("net", [{}, CLIP])
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_a_lora_follows_what_the_base_promises(family, net, tmp_path):
    """The value reads the base whatever the policy does, and its gradient reaches the policy alone."""
    subject = Subject(family)
    policy = Policy.lora(subject.pipe, rank=2)
    found, options = read_method(
        {"use": "vard", "group": 2, "steps": 3, "batch_size": 2, "warmup": 1, "value": {"width": 8} | net}
    )
    bright = FunctionScorer(lambda images, prompts: images.mean((1, 2, 3)))
    method = found(options, policy, Tools(subject.driver, bright))
    state = fit(method, lambda number: Prompts.of(["a", "b"]), TrainConfig(steps=2, learning_rate=1e-2), tmp_path)
    assert any(weight.any() for name, weight in state.weights.items() if "lora_B" in name)
    assert all(p.grad is None for p in policy.network.parameters() if not p.requires_grad)
    data = method.rollout(context(), Prompts.of("a"))
    with torch.no_grad():
        mine = method.critic.served(data.traj.x[:, 1], 1, data.traj.cond)
        with policy.reference():
            base = method.critic.served(data.traj.x[:, 1], 1, data.traj.cond)
    assert torch.equal(mine, base)
    method.save(tmp_path)
    with policy.reference(), torch.no_grad():
        opened = Served.open(tmp_path / "value", subject.driver, 3)
        assert torch.equal(opened(data.traj.x[:, 1], 1, data.traj.cond), base)
    assert (opened.calls, opened.decodes) == (1, int(bool(net)))


# steering by it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The value of the toy's base: a run that is all warm-up."""
    method = make(group=64, batch_size=64, steps=8, warmup=99, value=QUICK)
    for number in range(8):
        method.collect(context(number), Prompts.of(["0"] * 2))
    place = tmp_path_factory.mktemp("run")
    method.save(place)
    return place / "value"


def steering(**options):
    driver = Driver(toy_pipeline())
    return Steer(driver, FunctionScorer(linear), 8, max_batch=1 << 15, decode_batch=1 << 15, **options)


def test_a_saved_value_is_opened_again(folder):
    value = load_value(folder)
    assert {path.name for path in folder.iterdir()} == {
        "value.safetensors",
        "value.json",
        "calibration.json",
        "calibration.png",
    }
    rows = json.loads((folder / "calibration.json").read_text())
    assert len(rows) == 8
    assert rows[0]["r2"] < rows[-1]["r2"]  # less is known at higher noise
    assert value.block.net == "conv"
    assert not any(p.requires_grad for p in value.parameters())
    served = Served.open(folder, Driver(toy_pipeline()), 20)  # another grid than the one it was learned on
    x = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    late = served(x, 19, Driver(toy_pipeline()).encode(["0"] * 64))
    assert float((late - x[:, 0, 0, 0]).square().mean().sqrt()) < 0.35  # x is nearly x0 there


@pytest.mark.parametrize("name", ["svdd", "fk"])
def test_the_learned_value_steers(folder, name):
    """As well as the exact plug-in value does, without its network calls and pictures."""
    extra = {"svdd": {"candidates": 16}, "fk": {"lam_units": "raw"}}[name]
    options = {"particles": 300, "lam": 1.0} | extra
    prompts = Prompts.of("0")
    plug, learned, base = steering(), steering(), steering()
    by_rule = load_method(name, **options)(plug, prompts)
    by_value = load_method(name, **options, value=str(folder))(learned, prompts)
    weight = by_value.log_weight.exp()[0], by_rule.log_weight.exp()[0]
    means = [float(w @ made.totals[0].double()) for w, made in zip(weight, (by_value, by_rule), strict=True)]
    start = float(load_method("best_of_n", particles=300)(base, prompts).totals.mean())
    print(f"{name}: base {start:.3f}, plug-in {means[1]:.3f}, learned {means[0]:.3f}")
    assert means[0] == pytest.approx(means[1], abs=0.3)  # 4 errors: sd .75, 100 effective
    assert means[0] > start + 0.25  # the tilt moves the mean by the variance, .55
    assert learned.cost.decodes < plug.cost.decodes


def test_what_is_no_value_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="Expected a folder with a value function"):
        load_method("svdd", value=str(tmp_path))
    with pytest.raises(ValueFunctionError, match=r"to be a value function \(value.json"):
        load_value(tmp_path)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "value.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueFunctionError, match="cannot be read"):
        load_value(tmp_path)
    served = Served.open(folder, Subject("sd").driver, 3)
    with pytest.raises(ValueFunctionError, match="Expected a pipeline like that of the value function"):
        served(Subject("sd").trajectory.x[:, 0], 0, Subject("sd").cond)
    assert issubclass(ValueFunctionError, ValueError)


def test_a_value_that_sees_needs_a_clip(tmp_path):
    for value in ({"net": "clip"}, {"clip": "tiny_clip"}):
        with pytest.raises(ValueError, match="Expected value.clip to name a scorer on a CLIP"):
            ValueBlock(**value)
    run = {"reward": "verifier", "model": {"use": "tiny-sd"}, "out": str(tmp_path / "run"), "train": {"steps": 1}}
    run |= {"prompts": {"use": "playground"}, "method": {"use": "vard", "value": CLIP | {"clip": "verifier"}}}
    with pytest.raises(
        ConfigError, match="method.value.clip: The scorer 'verifier' has no image features; use one on a CLIP"
    ):
        train(run)


def test_all_steps_cannot_be_skipped(tmp_path):
    run = {"reward": "verifier", "model": {"use": "tiny-sd"}, "out": str(tmp_path / "run"), "train": {"steps": 1}}
    with pytest.raises(ConfigError, match="method.skip: expected fewer than the 4 steps that are trained but got 4"):
        train(run | {"method": {"use": "vard", "steps": 8, "trained_rows": 0.5, "skip": 4}})


def test_the_plug_in_value_needs_a_gradient():
    with pytest.raises(TrainingError, match="differentiable reward for value.net=plugin"):
        make(value={"net": "plugin"})
