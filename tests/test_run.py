"""Runs from a config: blocks, refusals, the run folder, the honest stop, resume."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from PIL import Image

from t2i_align.config import ConfigError
from t2i_align.keys import generator
from t2i_align.methods.grpo import GRPO
from t2i_align.pipelines.driver import DriverError
from t2i_align.pipelines.toy import ToyDenoiser, ToyPipeline, toy_pipeline
from t2i_align.policy import Policy, PolicyError
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, Scorer, load_reward, scorer_class
from t2i_align.runs import FolderError
from t2i_align.training import Ctx, Term, TrainingError, World
from t2i_align.training.blocks import load_run
from t2i_align.training.checks import problems
from t2i_align.training.curves import plot_curves, title_of
from t2i_align.training.health import Health
from t2i_align.training.honest import look_of, pairwise_distance
from t2i_align.training.loop import beside
from t2i_align.training.prompts import Pool, make_pool
from t2i_align.training.run import move_others, read_config, train
from t2i_align.training.trackers import Trackers
from tests.families import FAMILIES
from tests.test_methods import make

CONFIG = {
    "method": {"use": "grpo", "group": 4, "steps": 3, "batch_size": 8, "clip": 0.2},
    "policy": {"use": "full"},
    "reward": "tests.test_run:Red",
    "prompts": {"use": "file", "path": "prompts.txt", "per_round": 4},
    "train": {"steps": 6, "learning_rate": 0.1, "weight_decay": 0.0, "log_every": 2, "checkpoint_every": 2},
    "evaluate": {
        "every": 2,
        "steps": 3,
        "prompts": {"use": "file", "path": "heldout.txt"},
        "watch": ["tests.test_run:Blue"],
        "kl_images": 4,
    },
    "log": {"tensorboard": False},
}


class Channel(Scorer):
    which = 0

    def forward(self, images, prompts):
        return images[:, self.which].mean((1, 2))


class Red(Channel):
    name = "red"


class Blue(Channel):
    name, which = "blue", 2


class Broken(Red):
    """Half and more of all images have no reward."""

    name, share = "broken", 0.75

    def forward(self, images, prompts):
        scores = super().forward(images, prompts)
        scores[: int(self.share * len(scores))] = float("nan")
        return scores


class Partly(Broken):
    name, share = "partly", 0.25


class Flat(Red):
    name = "flat"

    def forward(self, images, prompts):
        return torch.ones(len(images))


class Telling(Red):
    name, columns = "telling", ("answer",)


class Unfetched(Red):
    name = "unfetched"

    @classmethod
    def missing(cls):
        return "the weights of unfetched are not on this disk"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(f"0.{i}" for i in range(9)))
    Path("heldout.txt").write_text("0.11\n0.55\n0.77")
    Path("prompts.md").write_text("0.1")
    return tmp_path


def run(out="run", changes=None, size=8, **options):
    return train(CONFIG, pipeline=toy_pipeline(size=size), out=out, **options, **(changes or {}))


def content(folder, name):
    name = name if isinstance(name, str) else f"step-{name:08d}"
    return torch.load(f"{folder}/checkpoints/{name}.pt", weights_only=True)


def assert_same(one, other, step):
    """That two runs are the same at a step: weights and average, evaluations but for their time, steps of metrics."""
    for kind in ("weights", "average"):
        mine, theirs = content(one, step)[kind], content(other, step)[kind]
        assert (mine is None) == (theirs is None)
        for name in mine or ():
            assert torch.equal(mine[name], theirs[name])
    looks = [[row | {"seconds": 0} for row in rows(folder, "evaluations")] for folder in (one, other)]
    assert looks[0] == looks[1]
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]


def assert_result(folder, checkpoint):
    """That the full weights of a result are those of a checkpoint."""
    saved, kept = ToyPipeline.from_pretrained(f"{folder}/model").denoiser, content(folder, checkpoint)["weights"]
    for name, value in kept.items():
        assert torch.equal(dict(saved.named_parameters())[name.rpartition("network.")[2]], value)


def rows(folder, name="metrics"):
    return [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(here):
    done = run()
    assert done.step == 6
    assert done.weights == Path("run/model")  # all weights; a LoRA would be in lora/
    names = {path.relative_to("run").as_posix() for path in Path("run").rglob("*") if path.is_file()}
    wanted = {"config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "curves.png", "README.md"}
    assert wanted | {f"samples/step-{step:06d}.png" for step in (0, 2, 4, 6)} <= names
    assert [row["step"] for row in rows("run", "evaluations")] == [0, 2, 4, 6]
    first, last = rows("run", "evaluations")[0], rows("run", "evaluations")[-1]
    assert first["kl"] == 0 < last["kl"]
    assert last["reward"] > first["reward"]
    assert {"tests.test_run:Blue", "sharpness", "saturation", "invalid", "seconds"} <= set(last)
    metrics = rows("run")
    assert [row["step"] for row in metrics] == [2, 4, 6]
    assert metrics[0]["images"] == 16
    assert {"reward", "reward_spread", "ratio", "clipped", "images_per_second", "loss"} <= set(metrics[0])
    card = Path("run/README.md").read_text()
    assert "| reward |" in card
    assert "from_pretrained" in card
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["method"]["advantage_clip"] == 5.0  # all settings, not those given alone
    with Image.open("run/samples/step-000006.png") as sheet:
        assert sheet.width > 3 * 128


def test_evaluations_do_not_change_the_weights(here):
    run("often")
    run("seldom", {"evaluate.every": 6, "evaluate.kl_images": 1})
    often, seldom = (
        torch.load(f"{name}/checkpoints/step-00000006.pt", weights_only=True)["weights"] for name in ("often", "seldom")
    )
    for name, weight in often.items():
        assert torch.equal(weight, seldom[name])


def test_a_stopped_run_resumes_to_the_same_weights_and_rows(here):
    run("whole", {"train.ema": 0.5})
    run("parts", {"train.ema": 0.5}, minutes=0)
    done = run("parts", {"train.ema": 0.5}, resume=True)
    assert done.step == 6
    whole, parts = (torch.load(f"{n}/checkpoints/step-00000006.pt", weights_only=True) for n in ("whole", "parts"))
    for kind in ("weights", "average"):
        for name, weight in whole[kind].items():
            assert torch.equal(weight, parts[kind][name])
    without = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(n, "evaluations")] for n in ("whole", "parts")
    ]
    assert without[0] == without[1]
    with pytest.raises(ValueError, match="other settings"):
        run("parts", {"train.ema": 0.9}, resume=True)


def test_a_finished_run_cannot_end_earlier(here, capsys):
    run(changes={"train.steps": 4})
    with pytest.raises(ConfigError, match="train.steps of 4 or more, the updates that run has made, but got 2"):
        run(changes={"train.steps": 2}, resume=True)
    assert yaml.safe_load(Path("run/config.yaml").read_text())["train"]["steps"] == 4
    capsys.readouterr()
    assert run(changes={"train.steps": 6}, resume=True).step == 6
    assert "going on at update 4 of 6" in capsys.readouterr().err
    card = Path("run/README.md").read_text()
    assert "| scorer | before | at update 6 | gain |" in card
    assert "the base above, update 6 below" in card


def test_a_run_goes_on_beyond_its_first_end(here):
    run("whole")
    run("parts", {"train.steps": 4})
    assert run("parts", {"train.log_every": 1}, resume=True).step == 6
    whole, parts = (torch.load(f"{n}/checkpoints/step-00000006.pt", weights_only=True) for n in ("whole", "parts"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name])
    assert yaml.safe_load(Path("parts/config.yaml").read_text())["train"]["steps"] == 6


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_run_that_crashes_in_its_middle_resumes_to_the_same_weights(here, policy):
    """With an average, and evaluations before and after the crash."""
    changes = {"train.ema": 0.5, "reward": "tests.test_run:Falling", "policy.use": policy}
    if policy == "full":

        def go(out, **options):
            return run(out, changes, **options)

    else:
        torch.manual_seed(0)
        FAMILIES["sd"]().pipe.save_pretrained("base")
        changes |= {"model.use": "base", "policy.rank": 2, "method.batch_size": 4, "prompts.per_round": 1}
        changes |= {"evaluate.images": 1, "evaluate.kl_images": 1, "evaluate.steps": 1, "method.steps": 2}

        def go(out, **options):
            return train(CONFIG, out=out, **changes, **options)

    scorer_class("tests.test_run:Falling").left = (
        3 + 5
    )  # three evaluations and five rounds: the crash is after update 4
    with pytest.raises(RuntimeError, match="a crash"):
        go("parts")
    assert max(Path("parts/checkpoints").glob("step-*.pt")).name == "step-00000004.pt"
    scorer_class("tests.test_run:Falling").left = 1000
    assert go("parts", resume=True).step == go("whole").step == 6
    assert_same("parts", "whole", 6)


def test_a_run_never_resumes_from_before_its_best_weights(here):
    watched = {"evaluate.stop": {"watch": "reward", "patience": 3}, "train.checkpoint_every": 1000}
    scorer_class("tests.test_run:Falling").left = 20
    with pytest.raises(RuntimeError, match="a crash"):
        run(changes=watched | {"train.steps": 40, "reward": "tests.test_run:Falling"})
    best = torch.load("run/checkpoints/best.pt", weights_only=True)["step"]
    assert 0 < best <= max(int(path.stem.removeprefix("step-")) for path in Path("run/checkpoints").glob("step-*.pt"))


class Falling(Red):
    """Red, until the run crashes."""

    left = 0  # calls

    def forward(self, images, prompts):
        type(self).left -= 1
        if self.left < 0:
            raise RuntimeError("a crash")
        return super().forward(images, prompts)


def test_weights_that_diverge_end_the_run_with_advice(here):
    with pytest.raises(TrainingError, match="the weights have diverged: use a lower train.learning_rate"):
        run(changes={"train.learning_rate": 1e38, "train.max_norm": None, "evaluate.every": 6})


def test_images_that_are_no_numbers_are_left_out():
    method = make("grpo", size=8)
    latents = torch.zeros(3, 3, 8, 8)
    latents[1, 0, 2, 2] = torch.nan
    assert method.score(latents, Prompts.of(["0"] * 3)).total.isnan().tolist() == [False, True, False]


def test_the_config_of_a_run_means_that_run(here, cli, capsys):
    run("place", minutes=0)
    again = load_run("place/config.yaml")
    assert again.folder == Path("place")
    assert load_run("place/config.yaml", ["out=elsewhere"]).folder == Path("elsewhere")
    shutil.copy("place/config.yaml", "config.yaml")  # no run's
    assert load_run("config.yaml").folder == Path("runs/grpo")
    capsys.readouterr()
    run("nowhere", resume=True)
    assert "note: nowhere has no checkpoint to resume from; the run starts" in capsys.readouterr().err


def test_a_run_says_why_it_ended(here):
    paused = run("paused", minutes=0)
    assert paused.note.startswith("Stopped at update 0 of 6: its time is up")
    done = run("paused", resume=True)
    assert done.note == ""
    stop = {"evaluate.stop": {"watch": "tests.test_run:Cyan", "patience": 2}, "train.steps": 40}
    given_up = run("given-up", stop | {"evaluate.watch": ["tests.test_run:Cyan"]})
    assert "Stopped at update 4 of 40: `tests.test_run:Cyan` has not risen for 2 evaluations" in given_up.note
    assert "the weights are those that the run began with" in given_up.note
    assert given_up.note in Path("given-up/README.md").read_text()
    far = run("far", {"evaluate.budget": {"kl": 1e-9}})
    assert "further from the base than evaluate.budget allows" in far.note


def test_a_pause_between_evaluations_says_whose_scores_it_has(here):
    paused = run("paused", {"evaluate.every": 4}, minutes=1e-9)
    assert (paused.step, paused.kept_step, paused.kept["step"]) == (1, 1, 0)
    assert "Its last evaluation, and the scores here, are those of update 0." in paused.note
    assert paused.note in Path("paused/README.md").read_text()
    stop = {"evaluate.stop": {"watch": "tests.test_run:Cyan", "patience": 2}, "evaluate.watch": ["tests.test_run:Cyan"]}
    done = run("stopped", stop)
    assert (done.step, done.kept_step, done.kept["step"]) == (4, 0, 0)


def test_an_open_pipeline_is_the_base_of_its_run(here, cli):
    """Not the one that configs have where they say nothing, whose scorers would be watched."""
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    pipe.save_pretrained("base")
    changes = {
        "policy": {"use": "lora", "rank": 2, "targets": ["attn1.to_q"]},
        "method": CONFIG["method"] | {"group": 2, "steps": 2},
        "evaluate": {"steps": 1, "images": 1, "kl_images": 1, "prompts": CONFIG["evaluate"]["prompts"]},
    }
    train({**CONFIG, **changes}, pipeline=pipe, out="open", **{"train.steps": 1})
    stored = load_run("open/config.yaml")
    assert (stored.model.use, stored.evaluate.watch, stored.evaluate.features) == (None, (), None)
    assert "grpo on an open StableDiffusionPipeline" in Path("open/README.md").read_text()
    code, _, err = cli("train", "open/config.yaml", "--resume")
    assert code == 2
    assert "Expected model.use to name a pipeline but got null" in err
    named = StableDiffusionPipeline.from_pretrained("base")
    train({**CONFIG, **changes}, pipeline=named, out="named", **{"train.steps": 1})
    assert load_run("named/config.yaml").model.use == "base"


class Smooth(Red):
    name, differentiable = "smooth", True


VALUE = {"net": "clip", "clip": "tiny_clip", "width": 8}
PACKED = {
    "grpo": {"use": "grpo", "group": 2, "steps": 2, "batch_size": 2},
    "draft": {"use": "draft", "group": 2, "steps": 2, "batch_size": 2},
    "vard": {"use": "vard", "group": 2, "steps": 2, "batch_size": 2, "warmup": 0, "value": VALUE},
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_latents_are_trained_at_any_size(here, name):
    """Their shape does not say the picture's: whatever decodes them must know what size the run draws."""
    changes = {
        "model": {"call": {"height": 16, "width": 48, "max_sequence_length": 16}},
        "policy": {"use": "lora", "rank": 2, "targets": ["attn.to_q"]},
        "method": PACKED[name],
        "reward": "tests.test_run:Smooth",
        "prompts": CONFIG["prompts"] | {"per_round": 1},
        "evaluate": {"steps": 1, "images": 1, "kl_images": 1, "prompts": CONFIG["evaluate"]["prompts"]},
    }
    done = train({**CONFIG, **changes}, pipeline=FAMILIES["flux-dev"]().pipe, out="run", **{"train.steps": 1})
    assert done.step == 1


class Exact(Red):
    """Refuses to compute in another number type than its own."""

    def forward(self, images, prompts):
        assert images.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return super().forward(images, prompts)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_scorers_compute_in_their_own_number_type(here, precision):
    assert run(changes={"reward": "tests.test_run:Exact", "train.precision": precision}).step == 6


def test_all_weights_are_not_trained_in_half_precision(here):
    with pytest.raises(PolicyError, match="Expected a denoiser in fp32.*bfloat16"):
        train(CONFIG, pipeline=toy_pipeline(size=8).to(torch.bfloat16), out="run")


def test_latents_that_are_no_numbers_are_told_from_a_wrong_policy():
    health = Health()
    health.term(Ctx(0, 0, torch.device("cpu")), {"ratio": torch.tensor([1.0, torch.nan])})
    with pytest.raises(TrainingError, match="latents are not finite: use precision=bf16"):
        health.check_terms()


def test_an_offloaded_pipeline_is_refused_before_anything_is_drawn(here):
    pipe = FAMILIES["sd"]().pipe
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(network, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="it is offloaded: open it without offload"):
        train(CONFIG, pipeline=pipe, out="run")
    assert not Path("run").exists()


def test_an_average_is_written_without_another_copy_of_all_weights(here, monkeypatch):
    monkeypatch.setattr(Policy, "update_average", None)
    run(changes={"train.ema": 0.5})
    assert json.loads(Path("run/model/policy.json").read_text())["averaged"]
    written = ToyDenoiser.from_pretrained("run/model", subfolder="denoiser").shift
    saved = torch.load("run/checkpoints/step-00000006.pt", weights_only=True)
    ((name, mean),) = saved["average"].items()
    assert torch.equal(written, mean)
    assert not torch.equal(written, saved["weights"][name])


def test_of_several_processes_none_may_name_its_gpu(here):
    config = load_run(CONFIG)
    for device, count, refused in (("cuda:0", 2, True), ("cuda:0", 1, False), ("cuda", 2, False)):
        asked = config.model_copy(update={"model": config.model.model_copy(update={"device": device})})
        found = " ".join(problems(asked, World(0, count)))
        assert ("each of 2 processes takes its own, but got cuda:0" in found) == refused


def test_a_network_to_be_dealt_out_stays_where_it_is():
    pipe = FAMILIES["sd"]().pipe
    move_others(pipe, pipe.unet, torch.device("meta"))
    places = {name: pipe.components[name].device.type for name in ("unet", "vae", "text_encoder")}
    assert places == {"unet": "cpu", "vae": "meta", "text_encoder": "meta"}


def test_stop_keeps_the_best_honest_weights(here):
    """The reward is red; a watched score that only falls ends the run, and its best weights are the base's."""
    changes = {
        "evaluate.stop": {"watch": "tests.test_run:Cyan", "patience": 2},
        "evaluate.watch": ["tests.test_run:Cyan"],
    }
    done = run(changes=changes | {"train.steps": 40})
    assert done.step == 4
    assert done.kept["step"] == 0
    weights = torch.load("run/checkpoints/best.pt", weights_only=True)
    assert weights["step"] == 0
    again = run(changes=changes | {"train.steps": 40}, resume=True)
    assert (again.step, again.kept["step"]) == (4, 0)
    assert "step 0, the best by" in Path("run/README.md").read_text()


class Peak(Red):
    """Red enough: best at update 2 of a run that makes pictures redder."""

    name = "peak"

    def forward(self, images, prompts):
        return -(super().forward(images, prompts) - 0.553).square()


PEAK = {"evaluate.stop": {"watch": "tests.test_run:Peak", "patience": 9}, "evaluate.watch": ["tests.test_run:Peak"]}


def test_the_result_is_the_best_weights_not_the_last(here):
    done = run(changes=PEAK)
    assert (done.step, done.kept_step, done.kept["step"], content("run", "best")["step"]) == (6, 2, 2, 2)
    assert_result("run", "best")
    with pytest.raises(AssertionError):
        assert_result("run", 6)
    assert "step 2, the best by" in Path("run/README.md").read_text()


def test_the_result_is_of_the_evaluation_that_it_says_where_the_newest_checkpoint_is_gone(here, capsys):
    """Its best weights are of a later update than the run has now."""
    rising = {"evaluate.stop": {"watch": "reward", "patience": 3}}
    run("run", rising)
    assert content("run", "best")["step"] == 6
    Path("run/checkpoints/step-00000006.pt").unlink()
    done = run("run", rising, resume=True, minutes=0)
    assert (done.step, done.kept["step"], content("run", "best")["step"]) == (4, 4, 4)
    assert_result("run", 4)
    assert run("run", rising, resume=True).kept["step"] == 6
    run("whole", rising)
    assert_same("run", "whole", 6)
    assert_result("run", "best")
    assert "no other checkpoint" not in capsys.readouterr().err


def test_best_weights_that_are_gone_are_taken_from_their_checkpoint(here, capsys):
    kept = PEAK | {"train.keep": 9}
    run(changes=kept)
    Path("run/checkpoints/best.pt").unlink()  # it is one file with the step's
    Path("run/checkpoints/best.pt").write_bytes(b"half")
    done = run(changes=kept, resume=True)
    assert (done.kept["step"], content("run", "best")["step"]) == (2, 2)
    assert_result("run", 2)
    assert "no other checkpoint" not in capsys.readouterr().err


def test_best_weights_that_are_lost_are_said_to_be_and_others_are_kept(here, capsys):
    run(changes=PEAK)
    Path("run/checkpoints/best.pt").unlink()
    done = run(changes=PEAK, resume=True)
    assert "has not the weights of update 2, the best evaluation, and no other" in capsys.readouterr().err
    assert (done.kept["step"], content("run", "best")["step"]) == (6, 6)
    assert_result("run", 6)
    longer = PEAK | {"train.steps": 10}
    done = run(changes=longer, resume=True)  # what was lost stays so, and is said once
    assert (done.kept["step"], content("run", "best")["step"]) == (6, 6)
    assert_result("run", "best")
    assert "no other checkpoint" not in capsys.readouterr().err


class Cyan(Red):
    name = "cyan"

    def forward(self, images, prompts):
        return -super().forward(images, prompts)


def test_rewards_that_are_no_numbers_are_counted_and_too_many_stop_the_run(here):
    run("some", {"reward": "tests.test_run:Partly"})
    assert [row["invalid"] for row in rows("some")] == [4, 4, 4]
    with pytest.raises(TrainingError, match="12 of 16 rewards of the round at step 0 are no numbers"):
        run("most", {"reward": "tests.test_run:Broken"})


class Failing(Red):
    """Red, until most images have no reward."""

    healthy = 0  # calls

    def forward(self, images, prompts):
        type(self).healthy -= 1
        scores = super().forward(images, prompts)
        return scores if self.healthy >= 0 else scores.where(torch.arange(len(scores)) == 0, torch.nan)


def test_rewards_that_fail_later_leave_the_last_good_checkpoint(here):
    changes = {"reward": "tests.test_run:Failing", "evaluate.every": 100, "train.steps": 8}
    failing = scorer_class("tests.test_run:Failing")  # pytest may have this module under another name, too
    failing.healthy = 1 + 5  # an evaluation and five rounds
    with pytest.raises(TrainingError, match="15 of 16 rewards of the round at step 5 .* the last checkpoint is kept"):
        run(changes=changes)
    assert max(Path("run/checkpoints").glob("*.pt")).name == "step-00000004.pt"
    failing.healthy = 1000
    assert run(changes=changes, resume=True).step == 8
    failing.healthy = 1000
    run("whole", changes)
    assert_same("run", "whole", 8)


def test_rewards_that_never_differ_stop_the_run(here):
    with pytest.raises(TrainingError, match="same reward in 5 rounds up to step 4"):
        run(changes={"reward": "tests.test_run:Flat", "train.steps": 20})
    assert Path("run/checkpoints/step-00000004.pt").exists()


def test_one_image_a_round_has_no_spread_and_ddpo_learns_from_its_prompt_s_others(here):
    Path("prompts.txt").write_text("0\n")
    ddpo = {"use": "ddpo", "group": 1, "steps": 3, "batch_size": 1, "min_count": 4}
    done = run(changes={"method": ddpo, "prompts.per_round": 1, "train.steps": 8})
    assert done.step == 8
    assert all("reward_spread" not in row for row in rows("run"))


def test_a_policy_that_draws_otherwise_than_it_trains_is_found(here):
    pipe = toy_pipeline(size=8)
    true = pipe.denoiser.forward

    def shifted(x, at, said, prediction):
        return true(x, at, said, prediction) + 0.5 * torch.is_grad_enabled()

    pipe.denoiser.forward = shifted
    with pytest.raises(TrainingError, match="Expected the ratio of the policy .* not the same function"):
        train(CONFIG, pipeline=pipe, out="run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.gruop": 4, "reward": "verifer", "train.stpes": 3}, ["'gruop'", "'verifer'", "'train.stpes'"]),
        ({"method.use": "grop"}, ["Did you mean 'grpo'"]),
        (
            {"method.use": "rwr", "method.clip": 1},
            ["unknown key 'clip'", "method has clip: method='{use: rwr}' starts"],
        ),
        ({"method.batch_size": 6}, ["neither divides nor is a multiple of the group of 4"]),
        ({"method.batch_size": 32}, ["expected to divide the 16 images of a round"]),
        ({"method.minibatches": 3, "train.steps": 5}, ["method.minibatches", "train.steps"]),
        (
            {"method": {"use": "prdp", "group": 4, "batch_size": 1, "minibatches": 8}, "train.steps": 8},
            ["expected to divide the 4 batches of whole groups, 4 images each, of a round but got 8"],
        ),
        ({"prompts.per_round": 20}, ["at least the 20 prompts"]),
        ({"prompts.path": None}, ["use: file with path"]),
        ({"prompts.path": "prompt"}, ["No such file of prompts: prompt"]),
        ({"prompts.path": "prompts.md"}, ["ending in .txt"]),
        ({"method.kernel": "ddim(0.0)"}, ["method.kernel: expected a stochastic kernel"]),
        (
            {"method.kernel": "flow_sde(0.7)"},
            ["method.kernel: flow_sde(0.7) is for flow-matching", "of tiny-sd is not"],
        ),
        (
            {"method": {"use": "rwr", "group": 4, "batch_size": 8, "solver": "dance_sde"}},
            ["method.solver: dance_sde(0.3) is for flow-matching"],
        ),
        ({"train.learning_rate": float("inf")}, ["train.learning_rate"]),
        ({"policy": {"use": "lora", "start": "nothing", "rank": 4}}, ["policy.rank=null"]),
        ({"reward": "tests.test_run:Telling"}, ["prompts: the scorer telling reads the columns answer"]),
        ({"out": "prompts.txt/run"}, ["prompts.txt is a file"]),
        ({"out": "/proc/t2i-align/run"}, ["out: the folder /proc cannot be written"]),
        ({"reward": "tests.test_run:Unfetched"}, ["the weights of unfetched are not on this disk"]),
        ({"evaluate.watch": ["tests.test_run:Unfetched"]}, ["the weights of unfetched are not on this disk"]),
        ({"reward": None}, ["Expected a reward"]),
        ({"policy.shard": True}, ["policy.shard: expected several processes, as by `torchrun"]),
        ({"policy": {"use": "lora", "shard": True}}, ["Expected use: full with shard"]),
        ({"policy.shard": True, "train.precision": "fp16"}, ["train.precision: expected bf16 or fp32"]),
        ({"policy": {"use": "lora", "start": "nothing"}}, ["policy.start: no such file or folder: nothing"]),
        ({"model.use": "tiny-sx"}, ["Did you mean 'tiny-sd'"]),
        ({"policy.use": "lora", "policy.targets": ["to_x"]}, ["ends in 'to_x'", "to_q"]),
        ({"policy.rank": 4}, ["Expected no rank where all weights are trained"]),
        ({"model.dtype": "fp16"}, ["model.dtype: expected fp32 with policy.use: full", "train.precision=bf16"]),
        ({"evaluate.stop": {"watch": "blue"}}, ["evaluate.stop.watch"]),
        ({"train.optimizer": "adamw_9bit"}, ["train.optimizer"]),
        ({"log.wandb": "project"}, ["pip install 't2i-align[wandb]'"]),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_loaded(here, changes, said, monkeypatch):
    monkeypatch.setattr("t2i_align.training.run.load_pipeline", None)
    monkeypatch.setattr("t2i_align.training.run.load_reward", None)
    with pytest.raises(ValueError, match="problem") as refused:
        train(CONFIG, **changes)
    assert isinstance(refused.value, ConfigError)
    for text in said:
        assert text in str(refused.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "already holds files"),
        ({"resume": True, "changes": {"train.ema": 0.9}}, "other settings"),
        ({"resume": True, "overwrite": True}, "got both"),
    ],
)
def test_a_folder_that_is_in_the_way_is_refused_before_weights_are_loaded(here, options, said, monkeypatch):
    run(minutes=0)
    monkeypatch.setattr("t2i_align.training.run.make_parts", None)
    with pytest.raises(FolderError, match=said):
        run(**options)


def test_a_run_that_cannot_start_leaves_the_earlier_one(here):
    run(minutes=0)
    with pytest.raises(DriverError, match="for flow-matching schedulers"):
        run(changes={"method.kernel": "flow_sde(0.7)"}, overwrite=True)
    assert Path("run/README.md").exists()


def red(images):
    return images[:, 0].mean((1, 2))


def test_a_reward_may_be_an_object_that_going_on_needs_again(here, cli):
    made = train(CONFIG | {"reward": red}, pipeline=toy_pipeline(size=8), out="run", **{"train.steps": 2})
    assert yaml.safe_load(Path("run/config.yaml").read_text())["reward"] == "from Python: red"
    assert "`from Python: red`" in (made.folder / "README.md").read_text()
    code, _, err = cli("train", "run/config.yaml", "--resume")
    assert code == 2
    assert "reward: expected red, an object that no config holds, to be passed again" in err
    with pytest.raises(FolderError, match="'from Python: red' there, 'from Python: blue' here"):
        run("run", {"reward": Blue(), "train.steps": 4}, resume=True)
    assert run("run", {"reward": FunctionScorer(red), "train.steps": 4}, resume=True).step == 4


def test_an_object_is_checked_as_a_name_is(here):
    with pytest.raises(ConfigError, match="differentiable one for draft but red is not.*differentiable=True"):
        run(changes={"reward": red, "method": {"use": "draft", "steps": 3, "batch_size": 4}})
    with pytest.raises(ConfigError, match="prompts: the scorer telling reads the columns answer"):
        run(changes={"reward": Telling()})
    with pytest.raises(ConfigError, match="a sum of two rewards or more"):
        run(changes={"reward": red, "method.select": "pareto"})


def test_prompts_are_asked_for_where_those_of_the_playground_do_not_suit(here):
    bare = {name: block for name, block in CONFIG.items() if name not in ("prompts", "evaluate")}
    with pytest.raises(
        ConfigError, match="an open pipeline without a name is no pipeline of the playground"
    ) as refused:
        train(bare | {"evaluate": {"watch": []}}, pipeline=toy_pipeline(size=8))
    assert "; evaluate.prompts: expected a file of prompts" in str(refused.value)
    named = bare | {"prompts": {"use": "playground"}, "evaluate": {"prompts": {"use": "playground"}}}
    assert read_config(named, {}, toy_pipeline(size=8)).prompts.use == "playground"
    own = load_run(bare | {"model": {"use": "tiny-sd"}, "policy": {"use": "lora"}, "prompts": {"per_round": 4}})
    assert (own.prompts.use, own.evaluate.prompts.use, own.evaluate.prompts.split) == (*["playground"] * 2, "heldout")


def test_prompts_of_a_round_are_keyed_and_differ(here):
    pool = make_pool(load_run({**CONFIG, "prompts": {"per_round": 4, "size": 40, "kinds": ["pair"]}}).prompts)
    assert set(pool.prompts.columns["kind"]) == {"pair"}
    assert len(set(pool.prompts.text)) == 40
    assert pool.draw(0, 3, 4).text == pool.draw(0, 3, 4).text != pool.draw(0, 4, 4).text
    assert len(set(pool.draw(0, 3, 40).text)) == 40
    # The rows that runs of one source have always drawn.
    even = torch.full((40,), 1 / 40, dtype=torch.float64)
    for size in (1, 4, 40):
        rows = torch.multinomial(even, size, replacement=False, generator=generator(0, "prompts", 3))
        assert pool.draw(0, 3, size).text == pool.prompts[rows.tolist()].text


def test_train_and_held_out_captions_are_different(here):
    config = load_run({"method": {"use": "grpo"}, "reward": "verifier", "train": {"steps": 1}})
    train_pool, held_out = make_pool(config.prompts), make_pool(config.evaluate.prompts)
    assert not set(train_pool.prompts.text) & set(held_out.prompts.text)
    assert set(held_out.prompts.columns["split"]) == {"heldout"}


def test_mixtures_are_drawn_by_weight(here):
    Path("a.jsonl").write_text('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": 2}\n')
    mix = [{"use": "file", "path": "a.jsonl", "weight": 3}, {"use": "file", "path": "prompts.txt", "weight": 1}]
    pool = make_pool(load_run({**CONFIG, "prompts": {"per_round": 2, "mix": mix}}).prompts)
    drawn = [pool.draw(0, number, 1).text[0] for number in range(800)]
    assert sum(text in "ab" for text in drawn) / 800 == pytest.approx(0.75, abs=0.05)
    assert not pool.prompts.columns  # the second part has none
    for number in range(20):  # two prompts three times each, and two different ones of the nine
        drawn = pool.draw(0, number, 8).text
        assert drawn == pool.draw(0, number, 8).text
        assert (drawn.count("a"), drawn.count("b"), len(set(drawn))) == (3, 3, 4)
    assert len({pool.draw(0, number, 8).text[0] in "ab" for number in range(20)}) == 2  # in any order


@pytest.mark.parametrize(("weights", "size"), [((3, 1), 64), ((3, 1), 10), ((0.3, 0.3, 0.1), 9), ((1, 1, 5), 2)])
def test_every_source_of_a_mixture_has_its_share_of_a_round(weights, size):
    sizes = (100, 40, 70)[: len(weights)]
    names = [f"{source}-{row}" for source, length in enumerate(sizes) for row in range(length)]
    pool, counts = Pool(Prompts(tuple(names)), sizes, weights), torch.zeros(400, len(weights))
    for number in range(400):
        drawn = pool.draw(1, number, size).text
        assert len(set(drawn)) == size
        for text in drawn:
            counts[number, int(text[0])] += 1
    share = size * torch.tensor(weights) / sum(weights)
    assert ((counts - share).abs() < 1).all()
    # A count is floor or ceil of its share, so that its standard deviation is 1/2 at most: 4.5 sd of the mean.
    torch.testing.assert_close(counts.mean(0), share, rtol=0, atol=4.5 * 0.5 / 20)


def test_a_lora_of_a_run_is_opened_by_its_stock_pipeline(here, tmp_path):
    torch.manual_seed(0)
    pipe = FAMILIES["sd"]().pipe
    pipe.save_pretrained("base")
    changes = {"model.use": "base", "policy": {"use": "lora", "rank": 2}, "train.steps": 2, "train.learning_rate": 0.01}
    changes |= {"method.batch_size": 4, "prompts.per_round": 1, "evaluate.every": 2, "evaluate.images": 1}
    done = train(CONFIG, out="run", **changes, **{"train.ema": 0.9})
    assert 0 < done.kept["kl"] < 1e4
    stock = type(pipe).from_pretrained("base", safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np"}
    images = [stock("0.1", generator=torch.Generator().manual_seed(0), **call).images]
    stock.load_lora_weights("run/lora")
    images.append(stock("0.1", generator=torch.Generator().manual_seed(0), **call).images)
    assert abs(images[0] - images[1]).max() > 0
    assert json.loads(Path("run/lora/policy.json").read_text())["averaged"]
    again = train(CONFIG, out="more", **changes | {"policy": {"use": "lora", "start": "run/lora"}, "train.steps": 2})
    assert rows("more", "evaluations")[0]["kl"] > 0  # it starts from the LoRA, not from the base
    assert again.step == 2
    assert 'load_lora_weights("lora")' in Path("run/README.md").read_text()


def test_measures_of_images():
    flat = torch.full((2, 3, 8, 8), 0.5)
    assert look_of(flat) == {"sharpness": 0, "saturation": 0}
    striped = flat.clone()
    striped[..., ::2] = 1.0
    red = flat * torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert look_of(striped)["sharpness"] == pytest.approx(1.0)
    assert look_of(red)["saturation"] == pytest.approx(0.5)
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    assert float(pairwise_distance(features, 2)) == pytest.approx(0.5)


def test_the_command_plans_trains_and_refuses(here, cli):
    torch.manual_seed(0)
    FAMILIES["sd"]().pipe.save_pretrained("base")
    config = {
        **CONFIG,
        "model": {"use": "base"},
        "policy": {"rank": 2},
        "prompts": CONFIG["prompts"] | {"per_round": 1},
    }
    config["method"] = CONFIG["method"] | {"group": 2, "batch_size": 2, "steps": 2}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    words = ("train.steps=2", "evaluate.steps=1", "evaluate.images=1", "evaluate.kl_images=1", "out=run")
    code, out, _ = cli("train", "run.yaml", *words, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["images"] == 2
    assert not Path("run").exists()
    code, out, _ = cli("train", "run.yaml", *words)
    assert code == 0
    assert "the weights of step 2 are in run/lora" in out
    code, _, err = cli("train", "run.yaml", *words)
    assert (code, "--resume" in err) == (2, True)
    code, _, err = cli("train", "run.yaml", "method.gruop=3")
    assert (code, "Did you mean 'group'" in err) == (2, True)


class Leaky(GRPO):
    def losses(self, ctx, batch):
        for term in super().losses(ctx, batch):
            with self.policy.reference():
                yield Term(term.loss.detach().requires_grad_(), term.stats)


def test_a_term_yielded_inside_a_context_is_refused(here):
    with pytest.raises(PolicyError, match="the yield of a loss term"):
        run(changes={"method.use": "tests.test_run:Leaky"})


def test_curves_take_a_scorers_name_as_it_is(tmp_path):
    plot_curves([{"step": 0, "$5_^ and $6": 1.0}], ["$5_^ and $6"], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").width > 100


def test_what_is_watched_where_nothing_is_said(here, capsys):
    def watched(reward, **more):
        blocks = {"method": {"use": "grpo"}, "reward": reward, "train": {"steps": 1}}
        found = load_run(blocks | more).evaluate.watch
        return found, "is watched: set evaluate.watch" in capsys.readouterr().err

    assert watched("tiny_pick") == (("verifier",), False)
    assert watched("verifier") == ((), True)
    assert watched("0.1 * jpeg_compressibility + mean(verifier, tiny_pick)") == ((), True)
    assert watched({"gold": {"use": "t2i_align.rewards.verifier:Verifier"}, "tiny_pick": 1}) == ((), True)
    assert watched("verifier", evaluate={"watch": ["verifier"]}) == (("verifier",), False)
    assert watched("verifier", evaluate={"watch": []}) == ((), False)
    stop = {"stop": {"watch": "verifier", "patience": 3}}
    assert watched("verifier", evaluate=stop) == (("verifier",), False)
    captions = {"use": "playground"}
    off = {"model": {"use": None}, "prompts": captions, "evaluate": {"prompts": captions}}
    assert watched("tiny_pick", **off) == ((), True)
    blocks = {"method": {"use": "grpo"}, "reward": "from Python: verifier", "train": {"steps": 1}}
    assert load_run(blocks, scorer=load_reward("2 * verifier + 0.1 * jpeg_compressibility")).evaluate.watch == ()


@pytest.mark.parametrize(
    ("reward", "watch", "said"),
    [
        ("Red", ["Blue"], "Only the first scorer was trained on."),
        ("Red", [], "The scorer was trained on; no other was watched."),
        ("Red", ["Red"], "with it `tests.test_run:Red`, which shares scorers with it. Not trained on: none."),
        (
            "2 * tests.test_run:Cyan + tests.test_run:Red",
            ["Red", "Blue"],
            "with it `tests.test_run:Red`, which shares scorers with it. Not trained on: `tests.test_run:Blue`.",
        ),
    ],
)
def test_the_card_says_which_scorers_were_trained_on(here, reward, watch, said):
    reward = reward if "." in reward else f"tests.test_run:{reward}"
    changes = {"reward": reward, "evaluate.watch": [f"tests.test_run:{name}" for name in watch], "train.steps": 2}
    run(changes=changes | {"evaluate.every": 2})
    assert said in Path("run/README.md").read_text().replace("\n", " ")


def test_curves_say_which_scorers_are_in_the_reward():
    titles = [title_of("reward", True, False), title_of("a", True, False), title_of("a", True, True)]
    assert titles == ["trained reward", "watched: a", "in the reward: a"]
    assert title_of("sharpness", False, False) == "sharpness"


def test_evaluation_prompts_that_are_trained_on_are_counted(here, capsys):
    run("apart", minutes=0)
    assert "evaluation prompts" not in capsys.readouterr().err
    assert "Held-out prompts: 3; images of each: 2" in Path("apart/README.md").read_text()
    Path("heldout.txt").write_text("0.11\n0.3\n0.7\n0.77")
    run("some", minutes=0)
    assert "note: 2 of the 4 evaluation prompts are trained on as well" in capsys.readouterr().err
    card = Path("some/README.md").read_text()
    assert "Prompts: 4, of which 2 were trained on; images of each: 2" in card
    assert "Held-out" not in card


def test_the_penalty_of_grpo_has_a_name_of_its_own(here):
    """It is in nats per dimension; beside the progress bar stands the KL of evaluations, nats per image."""
    run(changes={"method.beta": 0.1})
    assert all("kl_penalty" in row and "kl" not in row for row in rows("run"))


def test_rewards_that_are_no_numbers_stand_beside_the_progress_bar():
    row = {"step": 4, "reward": 0.5, "kl": 2.0, "kl_penalty": 0.1, "loss": 0.0}
    assert beside(row | {"invalid": 0.0}) == {"reward": 0.5, "kl": 2.0, "loss": 0.0}
    assert beside(row | {"invalid": 2.0})["invalid"] == 2


def test_event_files_have_the_numbers_of_a_run(here):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"log.tensorboard": True}
    run("run", changes | {"train.steps": 4})
    run("run", changes, resume=True)
    events = EventAccumulator("run/tensorboard").Reload()
    names = {"metrics": ("train", {"reward", "loss", "images"}), "evaluations": ("evaluate", {"reward", "kl", "vendi"})}
    for file, (group, wanted) in names.items():
        written = rows("run", file)
        assert [row["step"] for row in written] == ([2, 4, 6] if group == "train" else [0, 2, 4, 6])
        for name in wanted & written[0].keys():
            found = [(event.step, event.value) for event in events.Scalars(f"{group}/{name}")]
            assert found == [(row["step"], pytest.approx(row[name], rel=1e-5)) for row in written]
    assert "evaluate/tests.test_run:Blue" in events.Tags()["scalars"]
    assert not [tag for tag in events.Tags()["scalars"] if "scores" in tag]


class Wandb:
    """Stands in for the library, which is not installed: what `init` and `log` were given."""

    def __init__(self):
        self.inits, self.logged = [], []

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.logged.append("finished")


def test_a_resumed_run_is_one_run_at_weights_and_biases(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", library := Wandb())
    config = load_run(CONFIG)
    config = config.model_copy(update={"log": config.log.model_copy(update={"wandb": "project"})})
    for folder in ("one", "one", "other"):
        Path(folder).mkdir(exist_ok=True)
        trackers = Trackers(config, Path(folder))
        trackers.write(2, {"step": 2, "reward": 0.5}, "train")
        trackers.write(4, {"step": 4, "reward": 0.6}, "train")
        trackers.close()
    ids = [options["id"] for options in library.inits]
    assert ids[0] == ids[1] != ids[2]
    assert {options["resume"] for options in library.inits} == {"allow"}
    assert library.logged[:3] == [(2, {"train/reward": 0.5}), (4, {"train/reward": 0.6}), "finished"]


@pytest.mark.parametrize("policy", ["lora", "full"])
def test_the_code_of_a_card_opens_the_result(here, policy, monkeypatch):
    torch.manual_seed(0)
    FAMILIES["sd"]().pipe.save_pretrained("base")
    changes = {"model.use": "base", "policy.use": policy, "train.steps": 2, "train.learning_rate": 0.01}
    changes |= {"method.batch_size": 4, "prompts.per_round": 1, "evaluate.images": 1, "evaluate.kl_images": 1}
    train(CONFIG, out="run", **changes)
    code = Path("run/README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    monkeypatch.chdir("run")
    names = {}
    exec(code, names)
    base = StableDiffusionPipeline.from_pretrained("../base").unet
    pipe = names["pipe"]
    if policy == "lora":
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    moved = [not torch.equal(p, q) for p, q in zip(pipe.unet.parameters(), base.parameters(), strict=True)]
    assert any(moved)
