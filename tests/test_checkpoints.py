"""Checkpoints: complete, whole or not at all, verified, refused where they do not belong; runs survive being killed."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_align.config import TrainConfig
from t2i_align.keys import key
from t2i_align.methods.base import Tools
from t2i_align.methods.ddpo import DDPO, DDPOSettings
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer
from t2i_align.training import Method, State, Term, TrainingError, fit
from t2i_align.training.checkpoints import read_checkpoint, write_best
from t2i_align.training.loop import Observer

ROOT = Path(__file__).parents[1]
UPDATES = 48


class Large(Method):
    """Weights of 16 MB, so that writing a checkpoint takes its time."""

    def __init__(self, width=2000):
        super().__init__()
        self.linear = nn.Linear(width, 2000, bias=False)
        nn.init.zeros_(self.linear.weight)

    def losses(self, ctx, batch):
        x = torch.randn(2, self.linear.in_features, generator=ctx.generator("x"))
        yield Term((self.linear(x) - x[:, :1]).square().mean(), {})


def settings(**changes):
    return TrainConfig(
        **{"steps": 8, "learning_rate": 0.05, "checkpoint_every": 2, "ema": 0.9, "log_every": 1} | changes
    )


def first_pixel(images, prompts):
    return 16 * (images[:, 0, 0, 0] - 0.5)


def on_policy():
    """A method with a state of its own, on the toy."""
    pipe = toy_pipeline()
    options = DDPOSettings(steps=3, batch_size=8, group=2, min_count=2, epochs=2, clip=0.2)
    return DDPO(options, Policy.full(pipe), Tools(Driver(pipe), FunctionScorer(first_pixel)))


def run_to_the_end(kind, folder, resume):
    """A training that takes a second or two, most of it with checkpoints."""
    torch.set_num_threads(1)
    method = Large() if kind == "large" else on_policy()

    def data(number):
        time.sleep(0.04)  # so that a kill comes before the end
        return Prompts.of([f"0.{i}" for i in range(4)])

    fit(method, data, settings(steps=UPDATES), folder, resume=resume)


def lines(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def killed(kind, folder, resume, updates, delay):
    """Start the training in a process and kill it some seconds after so many updates; without a delay in the middle of
    the next checkpoint. Returns its exit code, and whether half a checkpoint was on the disk.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_checkpoints"])
    process = context.Process(target=run_to_the_end, args=(kind, folder, resume))
    process.start()
    while process.is_alive() and lines(folder) < updates:
        time.sleep(0.001)
    if delay is not None:
        time.sleep(delay)
    while process.is_alive() and delay is None and not list(folder.glob("checkpoints/*.tmp")):
        time.sleep(0.0005)
    half = bool(list(folder.glob("checkpoints/*.tmp")))
    process.kill()
    process.join()
    return process.exitcode, half


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("kind", ["large", "on_policy"])
def test_a_run_killed_at_ten_moments_ends_with_the_same_weights(kind, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_to_the_end(kind, whole, False)
    moments = random.Random(key(0, "kills", kind))
    ends = []
    for number in range(10):
        updates = lines(parts) // 2 * 2 + moments.randint(0, 3)  # from the newest checkpoint on
        delay = None if kind == "large" and number % 2 else moments.uniform(0, 0.04)
        ends.append(killed(kind, parts, number > 0, updates, delay))
    assert [code for code, _ in ends] == [-signal.SIGKILL] * 10
    if kind == "large":
        assert any(half for _, half in ends)
    run_to_the_end(kind, parts, True)
    one, other = (read_checkpoint(max((f / "checkpoints").glob("*.pt"))) for f in (whole, parts))
    assert one["step"] == other["step"] == UPDATES
    assert one["method"] == other["method"]
    for part in ("weights", "average"):
        for name, weight in one[part].items():
            assert torch.equal(weight, other[part][name])
    steps = [json.loads(line)["step"] for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, UPDATES + 1))


def test_a_checkpoint_has_everything(tmp_path):
    method = on_policy()
    fit(method, lambda number: Prompts.of(["0", "1", "0", "1"]), settings(precision="fp32"), tmp_path)
    content = read_checkpoint(tmp_path / "checkpoints" / "step-00000008.pt")
    assert content["step"] == 8
    assert content["method"]["tracker"]["0"]
    assert content["config"] == settings().model_dump(mode="json")
    assert content["method_name"] == "DDPO"
    assert {"weights", "average", "optimizer", "scaler", "seconds"} <= content.keys()


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_written_once_and_outlives_the_others(tmp_path, monkeypatch, links):
    written = []
    save = State.save

    class Best(Observer):
        def look(self, state):
            if state.step in (3, 4):
                write_best(tmp_path, state)
            return False

    def refuse(*paths):
        raise OSError("no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(State, "save", lambda state, *rest: written.append(state.step) or save(state, *rest))
    whole = fit(Large(width=4), lambda number: None, settings(keep=1), tmp_path, observer=Best())
    assert written == [2, 3, 4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.pt", "step-00000008.pt"]
    assert read_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 4
    last = {name: p.detach().clone() for name, p in whole.weights.items()}
    whole.load_weights(tmp_path / "checkpoints" / "best.pt", 4)
    assert not any(torch.equal(p, last[name]) for name, p in whole.weights.items())


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_one_flipped_bit_is_found(tmp_path, where):
    fit(Large(), lambda number: None, settings(steps=2), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000002.pt"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 4
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"cannot be read \(the checksum of .* is wrong\); delete it"):
        fit(Large(), lambda number: None, settings(steps=2), tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "other"])
def test_foreign_files_are_refused(tmp_path, content):
    fit(Large(), lambda number: None, settings(steps=2), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000002.pt"
    if content == "other":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match="cannot be read"):
        fit(Large(), lambda number: None, settings(steps=2), tmp_path, resume=True)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    fit(Large(), lambda number: None, settings(steps=2), tmp_path)
    with pytest.raises(TrainingError, match="other weights"):
        fit(Large(width=10), lambda number: None, settings(steps=2), tmp_path, resume=True)
    with pytest.raises(TrainingError, match="written by Large, not DDPO"):
        fit(on_policy(), lambda number: None, settings(steps=2), tmp_path, resume=True)
    with pytest.raises(TrainingError, match=r"other settings \(seed, learning_rate\)"):
        fit(Large(), lambda number: None, settings(steps=2, seed=1, learning_rate=0.1), tmp_path, resume=True)
    assert fit(Large(), lambda number: None, settings(steps=4, keep=5), tmp_path, resume=True).step == 4


def fill_the_disk(folder, small):
    """Train until no checkpoint fits any more: files are limited in size, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def data(number):
        if number == 4 and small:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))

    try:
        fit(Large(), data, settings(), folder)
    except TrainingError as error:
        Path(folder, "said.txt").write_text(str(error))


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(tmp_path):
    code = "import sys; from tests.test_checkpoints import fill_the_disk; fill_the_disk(sys.argv[1], True)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=200)
    said = (tmp_path / "said.txt").read_text()
    assert "step-00000006.pt cannot be written" in said
    assert "earlier ones are kept: make room, then resume" in said
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000002.pt", "step-00000004.pt"]
    assert fit(Large(), lambda number: None, settings(), tmp_path, resume=True).step == 8


def test_fp16_scales_the_loss_skips_infinite_gradients_and_keeps_its_scale(tmp_path):
    class Narrow(Large):
        def losses(self, ctx, batch):
            for term in super().losses(ctx, batch):
                yield Term(term.loss * (float(2**120) if ctx.step == 1 else 1.0), {})

    method = Narrow()
    weights = []
    state = fit(
        method,
        lambda number: weights.append(method.linear.weight.detach().clone()),
        settings(steps=4, precision="fp16", checkpoint_every=4),
        tmp_path,
    )
    assert torch.equal(weights[1], weights[2])  # the update of step 1 was skipped
    assert not torch.equal(weights[2], weights[3])
    saved = read_checkpoint(tmp_path / "checkpoints" / "step-00000004.pt")
    assert saved["scaler"]["scale"] == state.scaler.get_scale() == 2**15


class HalfBase(Method):
    """A trained weight in fp32 over a frozen one in fp16, in which its gradient of 2e-8 is 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.full((1,), 2e-2, dtype=torch.float16), requires_grad=False)

    def losses(self, ctx, batch):
        yield Term((self.weight.half() * self.frozen).float().sum() * 1e-6, {})


def test_gradients_through_frozen_fp16_weights_are_scaled_too(tmp_path):
    method = HalfBase()
    fit(method, lambda number: None, settings(steps=3, ema=None, weight_decay=0.0), tmp_path)
    assert float(method.weight) == pytest.approx(-0.1, rel=0.1)  # 3 steps of Adam, whose eps is half of it


def test_an_8_bit_optimizer_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TrainingError, match=r"pip install 't2i-align\[bnb\]'"):
        State(Large(), settings(optimizer="adamw_8bit"))


def test_weights_are_taken_from_the_checkpoint_of_their_step_alone(tmp_path):
    state = fit(Large(), lambda number: None, settings(steps=4), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000002.pt"
    before = {name: p.detach().clone() for name, p in state.weights.items()}
    with pytest.raises(TrainingError, match="to be of update 4 but it is of 2: delete it and resume"):
        state.load_weights(path, 4)
    assert all(torch.equal(before[name], p) for name, p in state.weights.items())
    state.load_weights(path, 2)
    assert not all(torch.equal(before[name], p) for name, p in state.weights.items())
    path.write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"cannot be read .*; delete it and resume, to keep the best"):
        state.load_weights(path, 2)
