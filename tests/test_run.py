"""Runs from a config: blocks, refusals, the run folder, the honest stop, resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from t2i_align.config import ConfigError
from t2i_align.methods.grpo import GRPO
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import PolicyError
from t2i_align.prompts import Prompts
from t2i_align.rewards import FunctionScorer, Scorer
from t2i_align.runs import FolderError
from t2i_align.training import Ctx, Term, TrainingError
from t2i_align.training.blocks import load_run
from t2i_align.training.curves import plot_curves
from t2i_align.training.health import Health
from t2i_align.training.honest import look_of, pairwise_distance
from t2i_align.training.prompts import make_pool
from t2i_align.training.run import read_config, train
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


def test_a_run_goes_on_beyond_its_first_end(here):
    run("whole")
    run("parts", {"train.steps": 4})
    assert run("parts", {"train.log_every": 1}, resume=True).step == 6
    whole, parts = (torch.load(f"{n}/checkpoints/step-00000006.pt", weights_only=True) for n in ("whole", "parts"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, parts["weights"][name])
    assert yaml.safe_load(Path("parts/config.yaml").read_text())["train"]["steps"] == 6


def test_a_run_never_resumes_from_before_its_best_weights(here):
    watched = {"evaluate.stop": {"watch": "reward", "patience": 3}, "train.checkpoint_every": 1000}
    Falling.calls = 0
    with pytest.raises(RuntimeError, match="a crash"):
        run(changes=watched | {"train.steps": 40, "reward": "tests.test_run:Falling"})
    best = torch.load("run/checkpoints/best.pt", weights_only=True)["step"]
    assert 0 < best <= max(int(path.stem.removeprefix("step-")) for path in Path("run/checkpoints").glob("step-*.pt"))


class Falling(Red):
    """Red, until the run crashes."""

    calls = 0

    def forward(self, images, prompts):
        Falling.calls += 1
        if Falling.calls > 20:
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
    with pytest.raises(TrainingError, match="latents are not finite: use precision=bf16"):
        Health().term(Ctx(0, 0, torch.device("cpu")), {"ratio": torch.tensor([1.0, torch.nan])})


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


class Cyan(Red):
    name = "cyan"

    def forward(self, images, prompts):
        return -super().forward(images, prompts)


def test_rewards_that_are_no_numbers_are_counted_and_too_many_stop_the_run(here):
    run("some", {"reward": "tests.test_run:Partly"})
    assert [row["invalid"] for row in rows("some")] == [4, 4, 4]
    with pytest.raises(TrainingError, match="12 of 16 rewards of the round at step 0 are no numbers"):
        run("most", {"reward": "tests.test_run:Broken"})


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
        ({"method.batch_size": 6}, ["neither divides nor is a multiple of the group of 4"]),
        ({"method.batch_size": 32}, ["expected to divide the 16 images of a round"]),
        ({"method.minibatches": 3, "train.steps": 5}, ["method.minibatches", "train.steps"]),
        ({"prompts.per_round": 20}, ["at least the 20 prompts"]),
        ({"prompts.path": None}, ["use: file with path"]),
        ({"prompts.path": "prompt"}, ["No such file of prompts: prompt"]),
        ({"prompts.path": "prompts.md"}, ["ending in .txt"]),
        ({"method.kernel": "ddim(0.0)"}, ["method.kernel: expected a stochastic kernel"]),
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
