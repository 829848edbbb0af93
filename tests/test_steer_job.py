"""`generate --steer` as a user types it: tables, pictures, pairs, resume after a kill, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from t2i_align.data.preferences import read_preferences
from t2i_align.jobs import call_notes
from t2i_align.rewards import Scorer, load_reward
from t2i_align.training import fit
from t2i_align.training.blocks import load_run
from t2i_align.training.distributed import ALONE
from t2i_align.training.run import make_parts

PROMPTS = ["a red circle", "two green stars", "a blue square", "a red circle"]
TINY = ["--pipeline", "tiny-sd", "--steps", "4", "--rewards", "verifier"]


class Asked(Scorer):
    """How near the mean level is to the prompt's column `level`."""

    name, columns = "asked", ("level",)

    def forward(self, images, prompts):
        return -(images.mean((1, 2, 3)) - torch.tensor([float(level) for level in prompts.columns["level"]])).abs()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def steer(cli, prompts, out, *more, method=("fk", "particles=3")):
    return cli("generate", prompts, "--out", out, *TINY, "--steer", *method, *more)


def table(out):
    return pyarrow.parquet.read_table(out / "results.parquet").to_pylist()


def test_a_steered_folder(cli, prompts, tmp_path):
    out, pairs = tmp_path / "out", tmp_path / "pairs"
    reward = ("--rewards", "2 * verifier + jpeg_compressibility")
    code, said, err = steer(
        cli, prompts, out, *reward, "--max-batch", 6, "--save-pairs", pairs, "--kernel", "ddim(1.0)"
    )
    assert code == 0, err
    assert "12 images of 4 prompts" in said
    assert "[4/4] a red circle: step 4, ESS" in err
    assert "best reward so far" in err
    rows = table(out)
    assert [(row["prompt"], row["particle"]) for row in rows] == [(text, k) for text in PROMPTS for k in range(3)]
    for row in rows:
        assert row["reward"] == pytest.approx(2 * row["verifier"] + row["jpeg_compressibility"], rel=1e-5)
        assert Image.open(out / row["image"]).size == (64, 64)
        assert (row["seed"], row["forwards"]) == (0, 3 * 4)
        assert row["seconds"] > 0
    for start in range(0, 12, 3):
        group = rows[start : start + 3]
        assert sum(row["is_best"] for row in group) == 1
        assert max(group, key=lambda row: row["reward"])["reward"] == next(r["reward"] for r in group if r["is_best"])
    for name in ("contact_sheet.png", "best.png", "history/00000.png", "history/00003.png"):
        assert Image.open(out / name).width > 100
    first, again = ((out / f"images/0000{row}-000.png").read_bytes() for row in (0, 3))
    assert first != again  # the same prompt in another window has particles of its own
    made = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    assert {pair["prompt"] for pair in made} <= set(PROMPTS)
    for pair in made:
        assert pair["label_0"] + pair["label_1"] == 1
        assert pair["gap"] > 0
        assert (pair["score_0"] > pair["score_1"]) == bool(pair["label_0"])
        assert pair["reward"] == "2 * verifier + jpeg_compressibility"
        for side in ("image_0", "image_1"):
            assert Image.open(pairs / pair[side]).size == (64, 64)
    assert made
    code, _, err = cli("score", out / "results.parquet", "--rewards", "verifier", "--out", tmp_path / "s.jsonl")
    assert code == 0, err


def test_pairs_may_go_to_the_folder_of_the_images(cli, tmp_path):
    out = tmp_path / "out"
    words = ("generate", "a red circle", "--out", out, "--pipeline", "tiny-sd", "--steps", 2, "--save-pairs", out)
    code, _, err = cli(*words, "--rewards", "jpeg_compressibility", "--steer", "best_of_n", "particles=3")
    assert code == 0, err
    (pair,) = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    rewards = {row["image"]: row["reward"] for row in table(out)}
    assert len(rewards) == 3
    assert [rewards[pair[f"image_{side}"]] for side in (0, 1)] == [pair["score_0"], pair["score_1"]]
    assert pair["gap"] == pytest.approx(max(rewards.values()) - min(rewards.values()))


def test_saved_pairs_are_preferences_to_train_on(cli, prompts, tmp_path):
    pairs = tmp_path / "pairs"
    words = ("--rewards", "jpeg_compressibility", "--save-pairs", pairs, "--steps", 2)
    code, _, err = steer(cli, prompts, tmp_path / "out", *words, method=("best_of_n", "particles=3"))
    assert code == 0, err
    found = read_preferences(pairs)
    assert not found.problems
    assert [ranking.prompt for ranking in found.rankings] == PROMPTS[:3]  # the last one is the first again
    rewards = load_reward("jpeg_compressibility")
    for better, worse in zip(*found.decided().columns.values(), strict=True):
        scores = rewards.scores([Image.open(better), Image.open(worse)]).total
        assert scores[0] > scores[1]

    config = {
        "method": {"use": "diffusion_dpo", "batch_size": 6, "beta": 20.0},
        "prompts": {"use": "pairs", "path": str(pairs), "per_round": 3},
        "reward": "jpeg_compressibility",
        "train": {"steps": 1, "learning_rate": 0.001},
        "evaluate": {"watch": []},
    }
    parts = make_parts(load_run(config), ALONE)
    before = [p.detach().clone() for p in parts.method.policy.trainable()]
    fit(parts.method, lambda number: parts.pool.draw(0, number, 3), parts.config.train, tmp_path / "run")
    assert any(not torch.equal(p, q) for p, q in zip(parts.method.policy.trainable(), before, strict=True))
    (row,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row["pairs"] == 3
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-3)  # of the base itself


def test_dollars_in_a_prompt_are_no_formula(cli, tmp_path):
    out = tmp_path / "out"
    words = ("generate", "a shirt that was $20, 50% off, now $10", "--out", out, "--pipeline", "tiny-sd")
    words = (*words, "--steps", 2, "--rewards", "jpeg_compressibility", "--steer", "fk", "particles=2")
    code, _, err = cli(*words)
    assert code == 0, err
    picture = out / "history/00000.png"
    drawn = picture.read_bytes()
    picture.unlink()  # a picture that was lost is drawn again from the prompt's record
    code, _, err = cli(*words, "--resume")
    assert code == 0, err
    assert picture.read_bytes() == drawn


def test_a_plot_that_fails_loses_no_work(cli, prompts, tmp_path, monkeypatch):
    from t2i_align.steering import plots

    out = tmp_path / "out"
    monkeypatch.setattr(plots, "_finish", None)
    with pytest.raises(TypeError):
        cli("generate", prompts, "--out", out, *TINY, "--steer", "fk", "particles=2")
    assert len(list((out / "prompts").glob("*.json"))) == len(PROMPTS)


def test_results_do_not_depend_on_the_window(cli, prompts, tmp_path):
    for name, size in (("one", 3), ("all", 64)):
        assert steer(cli, prompts, tmp_path / name, "--max-batch", size)[0] == 0
    one, both = table(tmp_path / "one"), table(tmp_path / "all")
    for mine, theirs in zip(one, both, strict=True):
        assert mine["reward"] == pytest.approx(theirs["reward"], abs=1e-5)
        assert mine["log_weight"] == pytest.approx(theirs["log_weight"], abs=1e-3)
        assert mine["forwards"] == theirs["forwards"]


def test_a_killed_job_goes_on_where_it_was(cli, prompts, tmp_path):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    words = [
        str(w) for w in ("generate", prompts, "--out", out, *TINY, "--max-batch", 2, "--steer", "fk", "particles=2")
    ]
    words[words.index("--steps") + 1] = "12"
    process = subprocess.Popen([sys.executable, "-m", "t2i_align", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (out / "prompts/00000.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = sorted((out / "prompts").glob("*.json"))
    assert 1 <= len(finished) < 4
    assert not (out / "results.parquet").exists()
    before = {path: path.stat().st_mtime_ns for path in finished}
    assert cli(*words, "--resume")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    words[words.index(str(out))] = str(whole)
    assert cli(*words)[0] == 0
    for mine, theirs in zip(table(out), table(whole), strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}
        assert (out / mine["image"]).read_bytes() == (whole / theirs["image"]).read_bytes()
    code, _, err = cli(*words, "--resume", "particles=3")
    assert code == 2
    assert "particles" in err


@pytest.mark.parametrize("method", [("best_of_n", "lam=2.0"), ("svdd", "candidates=2"), ("noise_search", "rounds=1")])
def test_other_methods_make_the_same_folder(cli, tmp_path, method):
    out = tmp_path / "out"
    words = ("generate", "a red circle", "--out", out, *TINY, "--particles", 2, "--steer", *method)
    code, _, err = cli(*words)
    assert code == 0, err
    assert len(table(out)) == 2
    assert Image.open(out / "history/00000.png").width > 100


def test_a_chain_on_the_command_line(cli, tmp_path):
    stages = "stages=[{method: fk, particles: 3}, {method: noise_search, rounds: 1}]"
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "out", *TINY, "--steer", "chain", stages)
    assert code == 0, err
    assert [row["particle"] for row in table(tmp_path / "out")] == [0, 1]


def test_a_chain_of_two_resampling_stages_is_drawn(cli, tmp_path):
    stages = "stages=[{method: fk, particles: 4, ess: 1}, {method: fk, particles: 2, ess: 1}]"
    words = ("generate", "a red circle", "--out", tmp_path / "out", *TINY, "--steps", 5, "--steer", "chain", stages)
    code, _, err = cli(*words)
    assert code == 0, err
    assert len(table(tmp_path / "out")) == 3
    assert Image.open(tmp_path / "out/history/00000.png").width > 100


def test_stages_are_drawn_one_after_the_other():
    from t2i_align.steering.plots import _draw_ancestry, _stages

    one = [{"row": row, "ancestors": [0, 0, 2, 2]} for row in (1, 3)]
    stages = _stages([*one, {"row": 5}, *({"row": row, "ancestors": [1, 1]} for row in (1, 2)), {"row": 5}])
    assert [[row["row"] for row in stage] for stage in stages] == [[1, 3, 5], [6, 7, 10]]
    axes = Figure().subplots()
    _draw_ancestry(axes, stages[1][:2])
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(7, 8), (7, 8), (6, 7), (6, 7)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steer", "fk"], "Expected --rewards with --steer"),
        (["--rewards", "verifier"], "Expected --steer METHOD with --rewards"),
        (["particles=3"], "Expected --steer METHOD with particles=3"),
        (["--steer", "fkk", "--rewards", "verifier"], "Did you mean 'fk'"),
        (["--steer", "fk", "--rewards", "verifier", "particle=3"], "unknown key 'particle'"),
        (["--steer", "fk", "--rewards", "verifier", "particles=3", "--particles", "3"], "but got both"),
        (["--steer", "fk", "--rewards", "verifer"], "Did you mean 'verifier'"),
        (["--steer", "fk", "--rewards", "verifier", "--kernel", "dim"], "Expected a kernel"),
        (["--steer", "fk", "--rewards", "tests.test_steer_job:Asked"], "reads the prompt columns level"),
        (["--steer", "das", "--rewards", "verifier"], "differentiable reward for DAS but verifier is none"),
        (["--steer", "reno", "--rewards", "2 * verifier + tiny_clip"], "or one of clip, pickscore, hpsv2"),
        (["--steer", "chain", "--rewards", "verifier", "stages=[fk, reno]"], "but verifier is none"),
        (["--steer", "chain", "--rewards", "tiny_clip", "stages=[guidance, best_of_n]"], "but got Guidance"),
    ],
)
def test_bad_steering_is_refused_before_anything_is_loaded(cli, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("t2i_align.jobs.load_pipeline", None)
    code, out, err = cli("generate", "a red circle", "--out", "x", *words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_the_columns_of_a_table_of_prompts_reach_the_reward(cli, tmp_path):
    out, file = tmp_path / "out", tmp_path / "prompts.csv"
    file.write_text("prompt,level,note\na red circle,0.1,x\ntwo green stars,0.9,y\n")
    words = ("generate", file, "--out", out, *TINY, "--rewards", "tests.test_steer_job:Asked", "--steer", "fk")
    code, _, err = cli(*words, "particles=2")
    assert code == 0, err
    rows = table(out)
    for row in rows:
        level = np.asarray(Image.open(out / row["image"])).mean() / 255
        assert row["reward"] == pytest.approx(-abs(level - (0.1, 0.9)[row["row"]]), abs=0.01)
    assert yaml.safe_load((out / "config.yaml").read_text())["columns"] == {"level": ["0.1", "0.9"]}
    (out / "prompts/00001.json").unlink()
    code, _, err = cli(*words, "particles=2", "--resume")
    assert code == 0, err
    assert [row["reward"] for row in table(out)] == pytest.approx([row["reward"] for row in rows])
    file.write_text("prompt,level\na red circle,0.1\ntwo green stars,0.2\n")
    code, _, err = cli(*words, "particles=2", "--resume")
    assert code == 2
    assert "other settings (columns" in err


def test_a_prompt_that_the_reward_cannot_read_is_refused(cli, tmp_path):
    code, _, err = cli("generate", "a red dog", "--out", tmp_path / "out", *TINY, "--steer", "fk")
    assert code == 2
    assert "cannot score 'a red dog'" in err
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_says_nothing_of_its_steps_is_steered_in_20_and_told_so(tmp_path, capsys):
    from t2i_align.pipelines import load_pipeline
    from t2i_align.steering.job import SteerJob

    load_pipeline("tiny-sd").save_pretrained(tmp_path / "bare")
    job = SteerJob(prompts=("a red circle",), pipeline=str(tmp_path / "bare"), rewards="verifier").resolved()
    assert (job.steps, job.call()["num_inference_steps"]) == (20, 20)
    (line, *_) = call_notes(job, job.open())
    assert "bare: 20 steps" in line
    assert "(defaults from diffusers, and 20 steps of steering's own; --steps" in line


def test_steer_is_a_lazy_name_of_the_package():
    code = "import t2i_align, sys; assert 'torch' not in sys.modules; print(t2i_align.steer.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "t2i_align.steering"
