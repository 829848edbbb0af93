"""A whole run, killed at any moment, ends as one that was not."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2i_align.rewards import Scorer
from t2i_align.training.run import train
from tests.test_run import CONFIG, assert_same, rows

STEPS = 12
CHANGES = {
    "reward": "tests.test_run_killed:Slow",
    "train": {"steps": STEPS, "learning_rate": 0.1, "ema": 0.5, "log_every": 1, "checkpoint_every": 2, "keep": 2},
    "evaluate.every": 4,
    "evaluate.stop": {"watch": "reward", "patience": 9},
    "log.pictures": 1,
}
MOMENTS = {  # what a folder has when the kill comes, in the order in which a run comes to them
    "folder": lambda folder: folder.is_dir(),
    "environment": lambda folder: any(folder.glob("environment.json*")),
    "config": lambda folder: any(folder.glob("config.yaml*")),
    "first evaluation": lambda folder: (folder / "evaluations.jsonl").exists(),
    "half a checkpoint": lambda folder: any(folder.glob("checkpoints/*.tmp")),
    "update 6": lambda folder: (folder / "checkpoints" / "step-00000006.pt").exists(),
    "best weights of update 8": lambda folder: (folder / "checkpoints" / "step-00000008.pt").exists(),
    "half a result": lambda folder: any(folder.glob(".model.*.new")),
}


class Slow(Scorer):
    """Red, after a while, so that a kill comes before the end."""

    name = "slow"

    def forward(self, images, prompts):
        time.sleep(0.02)
        return images[:, 0].mean((1, 2))


def whole_run(home, out, slowly=False):
    """A run, or what is left of it."""
    from t2i_align.pipelines.toy import toy_pipeline
    from t2i_align.policy import artefacts

    os.chdir(home)
    torch.set_num_threads(1)
    if slowly:  # as large weights are written: half a file is there for a while
        note, sync = artefacts.write_note, os.fsync
        artefacts.write_note = lambda *args, **options: (time.sleep(0.3), note(*args, **options))
        os.fsync = lambda file: (time.sleep(0.02), sync(file))
    train(CONFIG, pipeline=toy_pipeline(size=8), out=out, resume=True, **CHANGES)


def killed(home, moment):
    """Start or resume the run in a process, and kill it at a moment; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_run_killed"])
    process = context.Process(target=whole_run, args=(home, "parts", True))
    process.start()
    while process.is_alive() and not MOMENTS[moment](home / "parts"):
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_whole_run_killed_at_many_moments_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"0.{i}" for i in range(9)))
    Path("heldout.txt").write_text("0.11\n0.55\n0.77")
    ends = {moment: killed(tmp_path, moment) for moment in MOMENTS}
    assert set(ends.values()) == {-signal.SIGKILL}, ends
    whole_run(tmp_path, "parts")
    whole_run(tmp_path, "whole")
    assert_same("parts", "whole", STEPS)
    assert [row["step"] for row in rows("parts")] == list(range(1, STEPS + 1))
    one, other = (load_file(next(Path(name, "model", "denoiser").glob("*.safetensors"))) for name in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    left = [path.name for path in Path("parts").rglob("*") if path.suffix in (".tmp", ".new", ".old")]
    assert left == []
