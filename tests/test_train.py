import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_align.config import TrainConfig
from t2i_align.keys import generator
from t2i_align.training import Ctx, Method, Term, TrainingError, fit, learning_rate
from t2i_align.training.checkpoints import State
from t2i_align.training.health import Health
from t2i_align.training.loop import Observer, _update
from t2i_align.training.metrics import Metrics, read
from t2i_align.training.precision import autocast

TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


class Regression(Method):
    def __init__(self, split=False, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(dropout)
        self.split = split
        nn.init.constant_(self.linear.weight, 0.1)
        nn.init.zeros_(self.linear.bias)

    def losses(self, ctx, batch):
        x, y = batch
        x = self.dropout(x) + 0.01 * torch.randn(x.shape, generator=ctx.generator("jitter"))
        error = (self.linear(x) - y).square()
        if self.split:
            yield Term(error[:4].sum() / len(x), {"first": error[0].mean()})
            yield Term((self.linear(x) - y).square()[4:].sum() / len(x), {})
        else:
            yield Term(error.mean(), {"first": error[0].mean()})


def rows(step):
    x = torch.randn(8, 3, generator=generator("rows", step))
    return x, x @ TRUTH.T + 0.25


def stop_at(step):
    def data(now):
        if now == step:
            raise KeyboardInterrupt
        return rows(now)

    return data


def settings(**changes):
    return TrainConfig(
        **{"steps": 40, "learning_rate": 0.05, "ema": 0.9, "checkpoint_every": 6, "log_every": 4} | changes
    )


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same(one, other):
    assert one.step == other.step
    assert one.weights.keys() == other.weights.keys()
    for name in one.weights:
        assert torch.equal(one.weights[name], other.weights[name])
        assert torch.equal(one.average[name], other.average[name])


def train_slowly(folder, resume):
    """The body of the process that gets killed."""

    def data(step):
        time.sleep(0.01)
        return rows(step)

    fit(Regression(dropout=0.2), data, settings(steps=150, checkpoint_every=5), folder, resume=resume)


def test_loss_falls_and_weights_are_found(tmp_path):
    method = Regression()
    state = fit(method, rows, settings(steps=200, learning_rate=0.1, schedule="cosine"), tmp_path)
    losses = [row["loss"] for row in logged(tmp_path)]
    assert losses[0] > 2
    assert losses[-1] < 0.01
    assert torch.allclose(method.linear.weight, TRUTH, atol=0.05)
    assert state.step == 200
    assert not method.training


def test_same_seed_same_weights_other_seed_others(tmp_path):
    runs = [
        fit(Regression(dropout=0.5), rows, settings(seed=seed), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))
    ]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0].weights["linear.weight"], runs[2].weights["linear.weight"])


@pytest.mark.parametrize("stop", [7, 12, 23])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_resume_is_bit_identical(tmp_path, stop, schedule):
    config = settings(schedule=schedule, warmup=5)
    whole = fit(Regression(dropout=0.3), rows, config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(dropout=0.3), stop_at(stop), config, tmp_path / "parts")
    torch.manual_seed(stop)  # whatever the second process draws elsewhere
    seen = []
    resumed = fit(
        Regression(dropout=0.3), lambda step: seen.append(step) or rows(step), config, tmp_path / "parts", resume=True
    )
    assert seen[0] == stop // 6 * 6
    assert_same(whole, resumed)


def test_resume_with_the_same_method_after_a_failure_within_an_update(tmp_path):
    class Failing(Regression):
        broken = False

        def losses(self, ctx, batch):
            for term in super().losses(ctx, batch):
                yield term
                if self.broken and ctx.step == 13:
                    raise RuntimeError("out of memory")

    whole = fit(Failing(split=True), rows, settings(), tmp_path / "whole")
    method = Failing(split=True)
    method.broken = True
    with pytest.raises(RuntimeError):
        fit(method, rows, settings(), tmp_path / "parts")
    method.broken = False
    assert_same(whole, fit(method, rows, settings(), tmp_path / "parts", resume=True))


def test_minutes_stop_with_a_checkpoint_and_resume_goes_on(tmp_path):
    whole = fit(Regression(), rows, settings(), tmp_path / "whole")
    assert fit(Regression(), rows, settings(), tmp_path / "parts", minutes=0).step == 0

    def slow(step):
        time.sleep(0.02)
        return rows(step)

    half = fit(Regression(), slow, settings(), tmp_path / "parts", minutes=0.1 / 60, resume=True)
    assert 0 < half.step < 40
    assert checkpoints(tmp_path / "parts")[-1] == f"step-{half.step:08d}.pt"
    assert fit(Regression(), rows, settings(), tmp_path / "parts", minutes=0.1 / 60, resume=True).step == half.step
    assert_same(whole, fit(Regression(), rows, settings(), tmp_path / "parts", resume=True))


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    fit(Regression(), rows, settings(steps=6), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run"):
        fit(Regression(), rows, settings(steps=6), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_of_nothing_starts(tmp_path):
    assert fit(Regression(), rows, settings(steps=6), tmp_path / "new", resume=True).step == 6


def test_resume_of_a_finished_run_changes_nothing(tmp_path):
    done = fit(Regression(), rows, settings(), tmp_path)
    before = logged(tmp_path)
    again = fit(Regression(), stop_at(40), settings(), tmp_path, resume=True)
    assert_same(done, again)
    assert logged(tmp_path) == before


def test_damaged_checkpoint_is_named(tmp_path):
    fit(Regression(), rows, settings(steps=12), tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000012.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    with pytest.raises(TrainingError, match="step-00000012.pt cannot be read"):
        fit(Regression(), rows, settings(steps=12), tmp_path, resume=True)
    newest.unlink()  # what the message says to do
    assert fit(Regression(), rows, settings(steps=12), tmp_path, resume=True).step == 12


def test_checkpoint_of_another_network_is_refused(tmp_path):
    class Wider(Method):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

    fit(Regression(), rows, settings(steps=6), tmp_path)
    with pytest.raises(TrainingError, match="written by Regression, not Wider"):
        fit(Wider(), rows, settings(steps=6), tmp_path, resume=True)


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(Regression().requires_grad_(False), rows, settings(), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, value):
    def data(step):
        x, y = rows(step)
        return (x, y * value) if step == 15 else (x, y)

    method = Regression()
    with pytest.raises(TrainingError, match="loss of update 15"):
        fit(method, data, settings(), tmp_path)
    assert all(torch.isfinite(p).all() for p in method.parameters())
    assert checkpoints(tmp_path) == ["step-00000006.pt", "step-00000012.pt"]
    whole = fit(Regression(), rows, settings(), tmp_path / "whole")
    assert_same(whole, fit(Regression(), rows, settings(), tmp_path, resume=True))


def test_metrics_have_no_duplicate_steps_after_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), stop_at(17), settings(), tmp_path)
    assert [row["step"] for row in logged(tmp_path)] == [4, 8, 12, 16]  # and the newest checkpoint is of step 12
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # a line cut short by a kill
    fit(Regression(), rows, settings(), tmp_path, resume=True)
    assert [row["step"] for row in logged(tmp_path)] == list(range(4, 41, 4))


def test_metrics_are_means_over_the_updates_between_rows(tmp_path):
    fit(Regression(), rows, settings(steps=4, log_every=1, learning_rate=1e-9), tmp_path / "each")
    fit(Regression(), rows, settings(steps=4, log_every=4, learning_rate=1e-9), tmp_path / "mean")
    each, (mean,) = logged(tmp_path / "each"), logged(tmp_path / "mean")
    assert len(each) == 4
    assert each[0]["loss"] != each[1]["loss"]
    for name in ("loss", "first", "gradient_norm"):
        assert mean[name] == pytest.approx(sum(row[name] for row in each) / 4, rel=1e-4)


@pytest.mark.parametrize(("keep", "left"), [(1, [14]), (2, [12, 14]), (3, [6, 12, 14]), (9, [6, 12, 14])])
def test_number_of_checkpoints_kept(tmp_path, keep, left):
    fit(Regression(), rows, settings(steps=14, keep=keep), tmp_path)
    assert checkpoints(tmp_path) == [f"step-{step:08d}.pt" for step in left]


def test_two_terms_train_like_their_sum(tmp_path):
    one = fit(Regression(), rows, settings(max_norm=0.5), tmp_path / "one")
    two = fit(Regression(split=True), rows, settings(max_norm=0.5), tmp_path / "two")
    for name, weight in one.weights.items():
        assert torch.allclose(weight, two.weights[name], atol=1e-5)
    assert logged(tmp_path / "one")[0]["loss"] == pytest.approx(logged(tmp_path / "two")[0]["loss"], rel=1e-4)


def test_each_term_is_backpropagated_before_the_next_is_asked_for(tmp_path):
    gradients = []

    class Watching(Regression):
        def losses(self, ctx, batch):
            for term in super().losses(ctx, batch):
                grad = self.linear.weight.grad
                gradients.append(None if grad is None else grad.abs().sum().item())
                yield term

    method = Watching(split=True)
    fit(method, rows, settings(steps=1), tmp_path)
    assert gradients[0] in (None, 0.0)
    assert gradients[1] > 0


def test_no_gradients_are_kept_between_updates(tmp_path):
    method, seen = Regression(), []

    class Looking(Observer):
        def look(self, state):
            seen.append([p.grad for p in method.parameters()])
            return False

    fit(method, rows, settings(steps=3), tmp_path, observer=Looking())
    assert seen == [[None, None]] * 4


def test_numbers_of_all_terms_are_read_at_once(tmp_path):
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    class Many(Regression):
        terms = 1

        def losses(self, ctx, batch):
            for _ in range(self.terms):
                loss = (self.linear(batch[0]) - batch[1]).square().mean()
                yield Term(loss, {"ratio": torch.ones(3), "log_ratio": torch.zeros(3), "loss_of_term": loss})

    counts = []
    for terms in (1, 7):
        method, config = Many(), settings(steps=1)
        method.terms = terms
        metrics = Metrics(tmp_path / "metrics.jsonl")
        state, ctx = State(method, config), Ctx(0, 0, torch.device("cpu"))
        with Reads() as reads:
            _update(method, rows(0), ctx, config, state, metrics, Health())
        counts.append(reads.count)
        assert metrics.counts["loss_of_term"] == terms
        assert metrics.sums["loss"] == pytest.approx(metrics.sums["loss_of_term"])
    assert counts[0] == counts[1]


def test_numbers_of_several_kinds_are_read_in_their_order():
    values = [torch.tensor(1.5), torch.tensor([2.0], dtype=torch.float64), torch.tensor(3), torch.tensor(0.1)]
    assert read(values) == [1.5, 2.0, 3, float(torch.tensor(0.1))]
    assert read([]) == []


def test_a_wrong_ratio_is_found_before_the_update_that_has_it(tmp_path):
    class Off(Regression):
        def losses(self, ctx, batch):
            for term in super().losses(ctx, batch):
                yield term._replace(stats={"ratio": torch.tensor([1.0, 1.5 if ctx.step == 2 else 1.0])})

    method = Off()
    with pytest.raises(TrainingError, match="to be 1 before the first update on them, to 0.001, but it is off by 0.5"):
        fit(method, rows, settings(checkpoint_every=2), tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "step-00000002.pt", weights_only=True)
    assert torch.equal(method.linear.weight, saved["weights"]["linear.weight"])


def test_collect_runs_without_gradients_and_feeds_the_losses(tmp_path):
    class Collecting(Regression):
        def collect(self, ctx, rows):
            x, y = rows
            predicted = self.linear(x)
            assert not predicted.requires_grad
            return x, predicted + 1 if ctx.step == 0 else y

    method = Collecting()
    fit(method, rows, settings(steps=1, log_every=1), tmp_path)
    assert logged(tmp_path)[0]["loss"] == pytest.approx(1, rel=0.05)  # what the jitter leaves of it


def test_weights_read_without_gradients_first_have_them_later():
    """In one block of autocast, whatever older torches remember of a cast."""
    layer = torch.nn.Linear(2, 2)
    with autocast(torch.device("cpu"), settings(precision="bf16")):
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.any()


def test_the_last_updates_have_a_row_of_their_own(tmp_path):
    fit(Regression(), rows, settings(steps=3, log_every=2), tmp_path)
    assert [row["step"] for row in logged(tmp_path)] == [2, 3]


def test_a_process_without_a_term_has_a_scale_of_gradients_all_the_same(tmp_path):
    """In fp16, in its first update."""

    class Idle(Regression):
        def losses(self, ctx, batch):
            return iter(())

    class Two:  # this process, and another with a term
        first, count, total = True, 2, staticmethod(lambda value: value + 1)

        def sum_gradients(self, weights):
            for weight in weights:
                weight.grad = torch.ones_like(weight)

    method, config = Idle(), settings(steps=1, precision="fp16")
    state = State(method, config)
    ctx = Ctx(0, 0, torch.device("cpu"), 0, Two())
    before = method.linear.weight.detach().clone()
    _update(method, rows(0), ctx, config, state, Metrics(tmp_path / "metrics.jsonl"), Health())
    assert not torch.equal(method.linear.weight, before)


def test_gradient_norm_is_clipped(tmp_path):
    class Spy(Regression):
        def losses(self, ctx, batch):
            yield Term(1000 * self.linear.bias.sum(), {})

    method = Spy()
    state = fit(method, rows, settings(steps=1, log_every=1, max_norm=0.5), tmp_path)
    assert logged(tmp_path)[0]["gradient_norm"] == pytest.approx(1000)
    moments = [value["exp_avg"] for value in state.optimizer.state_dict()["state"].values()]
    assert max(float(m.abs().max()) for m in moments) == pytest.approx(0.05, rel=1e-4)  # (1 - 0.9) * 0.5


def test_average_follows_its_formula(tmp_path):
    weights, method = [], Regression()
    state = fit(
        method, lambda step: weights.append(method.linear.weight.detach().clone()) or rows(step), settings(), tmp_path
    )
    weights.append(state.weights["linear.weight"].detach())
    mean = weights[0].clone()
    for step, weight in enumerate(weights[1:]):
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
    assert torch.allclose(state.average["linear.weight"], mean, atol=1e-6)


def test_averaged_makes_no_copy_of_all_weights_and_survives_failures(tmp_path):
    class Wide(Method):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    state = State(Wide(), settings())
    for mean in state.average.values():
        mean.add_(1)
    mine, means = ({n: p.detach().clone() for n, p in part.items()} for part in (state.weights, state.average))
    alive, seen = Alive([*state.weights.values(), *state.average.values()]), []

    def fail():
        with alive, state.averaged():
            seen.append((alive.bytes(), all(torch.equal(p, means[name]) for name, p in state.weights.items())))
            raise KeyError

    pytest.raises(KeyError, fail)
    assert seen == [(0, True)]
    assert alive.made  # one weight at a time was copied, and let go
    assert all(torch.equal(p, mine[name]) for name, p in state.weights.items())
    assert all(torch.equal(p, means[name]) for name, p in state.average.items())
    *_, last = state.average
    kept, state.average[last] = state.average[last], torch.zeros(3)  # fails halfway in
    with pytest.raises(RuntimeError), state.averaged():
        pass
    state.average[last] = kept
    assert all(torch.equal(p, mine[name]) for name, p in state.weights.items())
    assert all(torch.equal(p, means[name]) for name, p in state.average.items())


class Alive(TorchDispatchMode):
    """Tensors made besides those that were there, and how many bytes of them are still there."""

    def __init__(self, there):
        super().__init__()
        self.there, self.made = {tensor.data_ptr() for tensor in there}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.data_ptr() not in self.there:
            self.made.append(weakref.ref(found))
        return found

    def bytes(self):
        return sum(tensor.nbytes for tensor in (ref() for ref in self.made) if tensor is not None)


def test_averaged_swaps_the_weights_and_back(tmp_path):
    method = Regression()
    state = fit(method, rows, settings(), tmp_path)
    mine, mean = method.linear.weight.detach().clone(), state.average["linear.weight"].clone()
    with state.averaged():
        assert torch.equal(method.linear.weight, mean)
        assert not torch.equal(method.linear.weight, mine)
    assert torch.equal(method.linear.weight, mine)
    assert torch.equal(state.average["linear.weight"], mean)


def test_without_ema_there_is_no_average(tmp_path):
    method = Regression()
    state = fit(method, rows, settings(ema=None), tmp_path)
    mine = method.linear.weight.detach().clone()
    with state.averaged():
        assert torch.equal(method.linear.weight, mine)
    assert state.average is None


def test_learning_rate_warms_up_linearly():
    config = TrainConfig(steps=100, learning_rate=2.0, warmup=3)
    assert [learning_rate(config, step) for step in (0, 1, 2, 3, 4, 99)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_learning_rate_is_constant_without_warmup():
    assert {learning_rate(TrainConfig(steps=9, learning_rate=0.3), step) for step in range(9)} == {0.3}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 2.0), (25, 2 * 0.8535533906), (50, 1.0), (75, 2 * 0.1464466094), (99, 2 * 0.0002467198), (100, 0.0)],
)
def test_learning_rate_of_a_full_cosine(step, expected):
    config = TrainConfig(steps=100, learning_rate=2.0, schedule="cosine")
    assert learning_rate(config, step) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (40, 1.0), (80, 1.0), (85, 0.8535533906), (90, 0.5), (95, 0.1464466094)],
)
def test_learning_rate_of_a_cosine_over_the_last_fifth(step, expected):
    config = TrainConfig(steps=100, learning_rate=1.0, schedule="cosine", decay=0.2, warmup=3)
    assert learning_rate(config, step) == pytest.approx(expected, abs=1e-9)


def test_the_logged_learning_rate_is_the_schedules(tmp_path):
    config = settings(steps=8, log_every=1, schedule="cosine", warmup=2)
    fit(Regression(), rows, config, tmp_path)
    expected = [learning_rate(config, step) for step in range(8)]
    assert [row["learning_rate"] for row in logged(tmp_path)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_resumes_bit_identically(tmp_path, number):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_train; test_train.train_slowly(sys.argv[2], False)"
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)
    folder = tmp_path / "killed" / "checkpoints"
    try:
        while process.poll() is None and not (folder / "step-00000020.pt").exists():
            time.sleep(0.01)
        process.send_signal(getattr(signal, number))
        _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    newest = max(path.name for path in folder.glob("step-*.pt"))
    assert "step-00000020.pt" <= newest < "step-00000150.pt"
    if number == "SIGKILL":
        assert process.returncode == -signal.SIGKILL, complaint.decode()
    else:  # as after Ctrl-C: a checkpoint of the update that it was in, and a word
        said = f"stopped at update {int(newest[5:13])} of 150; --resume goes on"
        assert process.returncode == -signal.SIGINT, complaint.decode()
        assert said in complaint.decode()

    train_slowly(tmp_path / "killed", resume=True)
    train_slowly(tmp_path / "whole", resume=False)
    killed, whole = (
        torch.load(tmp_path / name / "checkpoints" / "step-00000150.pt", weights_only=True)
        for name in ("killed", "whole")
    )
    for part in ("weights", "average"):
        for name in whole[part]:
            assert torch.equal(killed[part][name], whole[part][name])
    assert [row["step"] for row in logged(tmp_path / "killed")] == [*range(4, 150, 4), 150]


def test_ctrl_c_waits_for_the_update_and_leaves_a_checkpoint(tmp_path, capsys):
    def data(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return rows(step)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyboardInterrupt):
        fit(Regression(), data, settings(), tmp_path / "a")
    assert [signal.getsignal(number) for number in numbers] == before
    assert checkpoints(tmp_path / "a") == ["step-00000004.pt"]
    assert "stopped at update 4 of 40; --resume goes on" in capsys.readouterr().err
    resumed, unbroken = Regression(), Regression()
    states = [
        fit(resumed, rows, settings(), tmp_path / "a", resume=True),
        fit(unbroken, rows, settings(), tmp_path / "b"),
    ]
    assert_same(*states)
