"""Guard rails of training: uncertain rewards, Elastic Reset, budgets, constraints, reward clipping."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_align.calibration import calibrate
from t2i_align.config import TrainConfig
from t2i_align.errors import T2IError
from t2i_align.methods import read_method
from t2i_align.methods.base import Tools
from t2i_align.methods.prdp import proximal
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, Scorer, load_reward
from t2i_align.rewards.constraints import Constraint, Limited
from t2i_align.rewards.ensemble import LowerBound
from t2i_align.rewards.expression import RewardError
from t2i_align.rewards.mixing import Clamp
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.blocks import load_run
from t2i_align.training.checkpoints import State
from t2i_align.training.honest import Honest
from t2i_align.training.method import Method
from t2i_align.training.run import train
from tests.test_run import here, rows, run  # noqa: F401 (a fixture)
from tests.test_train import Regression, settings, stop_at
from tests.test_train import rows as regression_rows

METHODS = {
    "ddpo": {"use": "ddpo", "group": 4, "min_count": 3, "clip": 0.2},
    "grpo": {"use": "grpo", "group": 4, "clip": 0.2},
    "d3po": {"use": "d3po", "group": 4, "clip": None, "pairs": "all"},
    "prdp": {"use": "prdp", "group": 4, "beta": 1.0, "eps": 0.2},
    "nft": {"use": "nft", "group": 4, "kl": 0.0},
    "rwr": {"use": "rwr", "group": 4},
    "dpo": {"use": "diffusion_dpo", "group": 4, "online": True},
    "kto": {"use": "diffusion_dpo", "group": 4, "online": True, "loss": "kto"},
    "vard": {"use": "vard", "group": 4, "warmup": 0, "value": {"net": "conv", "width": 8}},
}


def channel(number):
    return lambda images, prompts: 16 * (images[:, number, 0, 0] - 0.5)


class Doubtful(Scorer):
    """The first coordinate, with a std: large where the second one is."""

    name = "doubtful"

    def __init__(self, std=None):
        super().__init__()
        self.std = std

    def forward(self, images, prompts):
        std = channel(1)(images, None).abs() if self.std is None else torch.full((len(images),), self.std)
        return channel(0)(images, None), std


def make(name, reward, **changes):
    pipe = toy_pipeline()
    found, options = read_method({"steps": 3, "batch_size": 8} | METHODS[name] | changes)
    return found(options, Policy.full(pipe), Tools(Driver(pipe), reward))


def context(step=0):
    return Ctx(0, step, torch.device("cpu"))


def gradient(method, step=0):
    batch = method.collect(context(step), Prompts.of(["0", "1"]))
    method.zero_grad()
    for term in method.losses(context(step), batch):
        term.loss.backward()
    (shift,) = method.policy.trainable()
    return shift.grad.clone(), batch[0]


# uncertainty


def test_trust_by_hand():
    """exp(-discount std / spread): rewards 1, 3 | 0, 4 are off their means by 1 and 2, a spread of sqrt(2.5)."""
    _, data = gradient(make("grpo", Doubtful(0.5), group=2))
    scores = data.scores._replace(
        total=torch.tensor([1.0, 3.0, 0.0, 4.0]), std=torch.tensor([0.0, 0.5, 1.0, float("nan")])
    )
    data = replace(data, scores=scores, group=2, discount=2.0)
    wanted = [1.0, math.exp(-1 / math.sqrt(2.5)), math.exp(-2 / math.sqrt(2.5)), 0.0]
    assert data.trust.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", ["ddpo", "grpo", "d3po", "prdp", "nft", "rwr", "dpo", "kto"])
def test_equal_doubt_scales_the_gradient_of_every_method(name):
    """U is the same for all images: losses of one image count exp(-U), those of pairs exp(-2 U)."""
    plain, data = gradient(make(name, Doubtful(0.3)))
    doubted, _ = gradient(make(name, Doubtful(0.3), discount=1.0))
    groups = data.scores.total.reshape(2, 4)
    u = 0.3 / float((groups - groups.mean(1, keepdim=True)).square().mean().sqrt())
    factor = math.exp(-u * (2 if name in ("d3po", "prdp", "dpo") else 1))
    assert plain.abs().max() > 0
    torch.testing.assert_close(doubted, factor * plain, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_doubtful_images_count_less_in_every_method(name):
    """They change the gradient, or, of VARD, what the value function learns; a lower bound goes with it."""
    reward = LowerBound(Doubtful(), k=0.5)
    methods = [make(name, reward, discount=discount) for discount in (0.0, 2.0)]
    found = [gradient(method, 0) for method in methods]
    assert found[0][1].scores.std is not None
    torch.testing.assert_close(found[0][1].scores.total, found[1][1].scores.total)
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-3, atol=0)
    logged = methods[1].report((found[1][1], {}))
    assert 0 < logged["trust"] < 1
    assert logged["reward_std"] > 0


def test_a_pair_counts_by_its_trust():
    now, old = torch.zeros(4, 2), torch.zeros(4, 2)
    rewards, pairs = torch.tensor([1.0, 0.0, 3.0, 0.0]), torch.tensor([[0, 1], [2, 3]])
    found = proximal(now, old, rewards, pairs, 1.0, 0.1, torch.tensor([1.0, 0.0]))
    assert float(found.loss) == pytest.approx(0.5)  # (1 + 0 * 9) / 2
    assert found.slope[0, 0] != 0
    assert not found.slope[2:].any()


def test_a_discount_needs_a_std():
    with pytest.raises(TrainingError, match="Expected a reward with a std"):
        gradient(make("grpo", FunctionScorer(channel(0)), discount=1.0))


# Elastic Reset


def test_elastic_reset_by_hand(tmp_path):
    """After a reset the weights are the average, and after two in a row the start."""
    method = Regression()
    state = State(method, settings(elastic_reset=2, elastic_decay=0.5))
    start = method.linear.weight.detach().clone()
    with torch.no_grad():
        method.linear.weight.add_(1.0)
    state.elastic.follow()
    state.elastic.reset(state.optimizer)
    torch.testing.assert_close(method.linear.weight, start + 0.5)
    state.elastic.reset(state.optimizer)
    assert torch.equal(method.linear.weight, start)
    due = [[step for step in range(1, 13) if state.elastic.due(step, updates)] for updates in (1, 3, 4)]
    assert due == [[2, 4, 6, 8, 10, 12], [3, 6, 9, 12], [4, 8, 12]]


def test_a_run_falls_back_and_goes_on(tmp_path):
    """Right after the reset at step 6 the weights are the average; the optimiser starts anew."""
    seen, method = [], Regression()
    config = settings(steps=8, elastic_reset=6, elastic_decay=0.8, ema=None)

    def data(step):
        seen.append(method.linear.weight.detach().clone())
        return regression_rows(step)

    state = fit(method, data, config, tmp_path)
    average = seen[0].clone()
    plain = Regression()
    before = fit(plain, regression_rows, settings(steps=6, ema=None), tmp_path / "plain")
    for weight in [*seen[1:6], before.weights["linear.weight"].detach()]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(seen[6], average, rtol=1e-4, atol=1e-6)
    steps = {int(moments["step"]) for moments in state.optimizer.state_dict()["state"].values()}
    assert steps == {2}


@pytest.mark.parametrize("stop", [13, 20])
def test_elastic_reset_resumes_bit_identically(tmp_path, stop):
    config = settings(elastic_reset=9, elastic_decay=0.9)
    whole = fit(Regression(), regression_rows, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), stop_at(stop), config, tmp_path / "parts")
    resumed = fit(Regression(), regression_rows, config, tmp_path / "parts", resume=True)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, resumed.weights[name])
        assert torch.equal(whole.elastic.average[name], resumed.elastic.average[name])


# shaped rewards


def test_shaped_rewards_train(tmp_path, monkeypatch):
    """PAR and a clamp in a run of tiny-sd: refused before anything is loaded while a prompt is not calibrated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("T2I_ALIGN_CACHE", str(tmp_path / "cache"))
    prompts = ["a red circle", "a blue star", "a green cross"]
    Path("train.txt").write_text("\n".join(prompts[:2]))
    Path("heldout.txt").write_text(prompts[2])
    config = {
        "model": {"use": "tiny-sd", "guidance": 1.0},
        "method": {"use": "grpo", "group": 2, "steps": 2, "batch_size": 4},
        "reward": {"par": {"use": "par(tiny_pick)"}, "small": {"use": "clamp(jpeg_compressibility, high=-10)"}},
        "prompts": {"use": "file", "path": "train.txt", "per_round": 2},
        "evaluate": {"prompts": {"use": "file", "path": "heldout.txt"}, "images": 2, "watch": [], "every": 1},
        "train": {"steps": 1, "learning_rate": 1e-3},
        "out": "run",
    }
    with pytest.raises(T2IError, match="not calibrated on tiny-sd: run `t2i-align rewards calibrate"):
        train(config)
    assert not Path("run").exists()
    calibrate("tiny-sd", [load_reward("tiny_pick")], prompts, particles=2, steps=2)
    assert train(config).step == 1
    assert -10 < rows("run")[0]["reward"] < -9  # what is clamped is -10 for every image, the PAR between 0 and 1
    seen = rows("run", "evaluations")[-1]["scores"]["reward"]
    assert all(-10 < score < -9 for score in seen[0])


# budgets


def test_a_run_beyond_its_budget_ends_and_keeps_what_was_within(here):  # noqa: F811
    done = run(changes={"evaluate.budget": {"kl": 1e-6}})
    assert (done.step, done.kept["step"]) == (2, 0)
    last = rows("run", "evaluations")[-1]
    assert 0 < 2 * last["kl"] <= last["chi2"]  # exp(2 KL) - 1 >= 2 KL at every step
    assert torch.load("run/checkpoints/best.pt", weights_only=True)["step"] == 0
    assert "step 0, the last within the budget" in Path("run/README.md").read_text()


class Patient(Method):
    """A method whose first updates leave the weights alone."""

    def __init__(self, updates):
        super().__init__()
        self.first = updates

    @property
    def still(self):
        return self.first


@pytest.mark.parametrize(
    ("budget", "stop", "still", "kept", "stopped"),
    [
        ({}, None, 0, None, False),
        ({"kl": 5}, None, 0, 4, False),
        ({"kl": 3}, None, 0, 2, True),
        ({"chi2": 30}, None, 0, 2, True),
        ({"kl": 9, "chi2": 5}, None, 0, 0, True),
        ({"kl": 5}, {"watch": "reward", "patience": 3}, 0, 2, False),
        ({"kl": 1.5}, {"watch": "reward", "patience": 3}, 0, 0, True),
        ({}, {"watch": "reward", "patience": 1}, 0, 2, True),
        ({}, {"watch": "reward", "patience": 1}, 4, 2, False),  # nothing has moved yet
    ],
)
def test_what_is_kept_within_a_budget(budget, stop, still, kept, stopped):
    config = {"method": {"use": "grpo"}, "reward": "verifier", "train": {"steps": 9}}
    block = load_run(config | {"evaluate": {"budget": budget, "stop": stop, "watch": []}})
    drift = ((0, 0.0, 0.0, 1.0), (2, 2.0, 20.0, 3.0), (4, 4.0, 60.0, 2.0))
    seen = [{"step": step, "kl": kl, "chi2": chi2, "reward": reward} for step, kl, chi2, reward in drift]
    watcher = Honest(block, Path(), None, Patient(still), None, {}, None, None, seen)
    assert (watcher.best or {}).get("step") == kept
    assert watcher.stopped == stopped


# constraints


def limited():
    reward = FunctionScorer(channel(0), "up")
    return Limited(reward, [Constraint(FunctionScorer(channel(2), "held"), "at_most", -0.2)], rate=0.5)


def test_a_run_moves_the_multipliers_and_resumes_with_them(tmp_path):
    def go(folder, stop=None, resume=False):
        def data(number):
            if number == stop:
                raise KeyboardInterrupt
            return Prompts.of(["0", "0.5"])

        method = make("ddpo", limited())
        config = TrainConfig(steps=8, learning_rate=0.05, checkpoint_every=2, log_every=1)
        return method, fit(method, data, config, tmp_path / folder, resume=resume)

    whole, state = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("parts", stop=5)
    parts, resumed = go("parts", resume=True)
    raw = [method.tools.reward.multipliers.raw for method in (whole, parts)]
    assert torch.equal(*raw)
    for name, weight in state.weights.items():
        assert torch.equal(weight, resumed.weights[name])
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["reward/held.slack"] < 0  # violated at the start
    assert logged[0]["multiplier/held"] < logged[3]["multiplier/held"]


def test_a_constraint_is_met_where_it_was_violated(tmp_path):
    """The multiplier climbs until the constrained coordinate is where it must be, then falls."""
    method = make("grpo", limited(), group=16, batch_size=32)
    config = TrainConfig(steps=15, learning_rate=0.05, weight_decay=0.0, log_every=1)
    fit(method, lambda number: Prompts.of(["0"] * 2), config, tmp_path)
    held = [
        (row["reward/held"], row["multiplier/held"])
        for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    ]
    assert held[0][0] > -0.2 > held[-1][0]
    assert max(multiplier for _, multiplier in held) > held[-1][1]


# reward clipping


def test_clamp_by_hand():
    reward = Clamp(Doubtful(0.3), low=-1.0, high=0.5)
    images = torch.full((3, 3, 1, 1), 0.5)
    images[:, 0, 0, 0] = torch.tensor([-2.0, 0.25, 3.0]) / 16 + 0.5
    scores = reward.scores(images, ["0"] * 3)
    assert scores.total.tolist() == [-1.0, 0.25, 0.5]
    assert scores.std.tolist() == pytest.approx([0.0, 0.3, 0.0])
    assert reward.name == "clamp(doubtful, low=-1, high=0.5)"
    assert scores.parts["doubtful"][0] == -2.0  # parts stay raw
    with pytest.raises(RewardError, match="low < high"):
        Clamp(Doubtful(), low=1.0, high=1.0)
