"""D3PO from a person's choices: the file, the chains drawn again, whole rounds, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from t2i_align.choices import Choice, read_choices, write_template
from t2i_align.config import ConfigError, TrainConfig
from t2i_align.data.preferences import read_preferences
from t2i_align.generation import chains, kernel_samples
from t2i_align.jobs import GenerateJob, image_name
from t2i_align.methods.base import Tools
from t2i_align.methods.d3po import D3PO, D3POSettings
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.prompts import Prompts
from t2i_align.training import Ctx, TrainingError, fit
from t2i_align.training.blocks import Source
from t2i_align.training.prompts import read_source
from t2i_align.training.run import train
from tests.families import FAMILIES

KERNEL = ("--kernel", "ddim(1.0)", "--steps", 3, "--particles", 3, "--choices")


def draw_toy(folder, prompts=("0", "0.5", "1"), particles=4, **changes):
    """A folder as `generate` leaves it, of the toy, whose weights are in no folder."""
    job = GenerateJob(prompts=prompts, particles=particles, steps=5, kernel="ddim(1.0)", pipeline="toy", **changes)
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(job.to_yaml())
    every = [(row, k) for row in range(len(prompts)) for k in range(particles)]
    made = kernel_samples(
        Driver(toy_pipeline(size=4)),
        Prompts(prompts),
        every,
        steps=5,
        kernel=ddim(1.0),
        seed=0,
        shared_start=job.shared_start,
        batch_size=len(every),
    )
    red = {}
    for sample in made:
        sample.image.save(folder / image_name(sample.row, sample.particle))
        red[sample.row, sample.particle] = torch.tensor(list(sample.image.getdata())).float()[:, 0].mean()
    write_template(folder, job)
    return job, red


def choose(folder, *entries):
    (folder / "choices.json").write_text(json.dumps(entries))


def d3po(folder, size=4, **settings):
    pipe = toy_pipeline(size=size)
    options = D3POSettings(**({"choices": str(folder), "batch_size": 12, "clip": None} | settings))
    return D3PO(options, Policy.full(pipe), Tools(Driver(pipe), None))


def test_choices_of_every_form_by_hand():
    assert Choice(row=0, best=2).edges(4) == [(2, 0), (2, 1), (2, 3)]
    assert Choice(row=0, best=(0, 1)).edges(3) == [(0, 2), (1, 2)]
    assert Choice(row=0, ranking=(3, (1, 2), 0)).edges(4) == [(3, 1), (3, 2), (3, 0), (1, 0), (2, 0)]
    assert Choice(row=0, pairs=((3, 0), (1, 0))).edges(4) == [(3, 0), (1, 0)]
    assert Choice(row=0, good=(0, 2), bad=(1,)).edges(4) == [(0, 1), (2, 1)]
    assert Choice(row=0, best=1, good=(1,), bad=(0,)).edges(2) == [(1, 0)]


def test_a_template_is_to_be_filled_in_and_never_written_over(tmp_path):
    job, _ = draw_toy(tmp_path / "a")
    with pytest.raises(ValueError, match="Nothing is chosen in .*choices.json yet"):
        read_choices(tmp_path / "a")
    entries = json.loads((tmp_path / "a" / "choices.json").read_text())
    entries[1]["best"], entries[2]["pairs"] = 3, [[0, 2]]
    choose(tmp_path / "a", *entries)
    write_template(tmp_path / "a", job)
    found = read_choices(tmp_path / "a")
    assert found.pairs == {1: [(3, 0), (3, 1), (3, 2)], 2: [(0, 2)]}
    assert found.prompts() == Prompts(("0.5", "1"), {"row": (1, 2)})


def test_choices_are_preferences_whatever_drew_the_images(tmp_path):
    """Offline methods need no chains: choices among images of a deterministic solver will do."""
    job, _ = draw_toy(tmp_path / "a")
    (tmp_path / "a" / "config.yaml").write_text(job.model_copy(update={"kernel": None}).to_yaml())
    choose(tmp_path / "a", {"row": 0, "best": 1}, {"row": 2, "ranking": [0, 3]})
    with pytest.raises(ValueError, match="drawn by the pipeline's own solver, which has no log-prob"):
        read_choices(tmp_path / "a")
    for source in (tmp_path / "a", tmp_path / "a" / "choices.json"):
        table = read_preferences(source).decided()
        assert table.text == ("0", "0", "0", "1")
        assert table.columns["better"] == tuple(
            str(tmp_path / "a" / image_name(*at)) for at in ((0, 1),) * 3 + ((2, 0),)
        )
        losers = ((0, 0), (0, 2), (0, 3), (2, 3))
        assert table.columns["worse"] == tuple(str(tmp_path / "a" / image_name(*at)) for at in losers)
    source = Source(use="pairs", path=str(tmp_path / "a"))
    assert read_source(source) == table


def test_all_that_is_wrong_with_choices_is_said_at_once(tmp_path):
    folder = tmp_path / "a"
    draw_toy(folder, ("0", "0.5", "1", "1.5", "2", "3"))
    (folder / image_name(4, 1)).unlink()
    (folder / image_name(5, 1)).write_bytes((folder / image_name(5, 0)).read_bytes())
    choose(
        folder,
        {"row": 0, "best": 4},
        {"row": 1, "ranking": [0, 1], "pairs": [[1, 2], [2, 0]]},
        {"row": 2, "good": [0, 1]},
        {"row": 3, "prompt": "1.6", "best": 0},
        {"row": 4, "pairs": [[0, 1]]},
        {"row": 5, "pairs": [[0, 1]]},
        {"row": 5, "best": 0},
        {"row": 6, "best": 0},
        {"row": 7, "bets": 0},
        {"row": 8, "pairs": [[1, 1]]},
    )
    with pytest.raises(ConfigError, match="have 10 problems") as refused:
        read_choices(folder)
    for said in (
        "row 0: no image 4: they are 0 to 3",
        "row 1: the choices contradict each other: by way of others, images 0, 1, 2 are better",
        "row 2: the choice says of no two images",
        "row 3: the prompt is '1.5', not '1.6'",
        "00004-001.png is missing",
        "row 5: the images 0 and 1 are the same picture",
        "row 5 comes twice",
        "row 6: there are prompts 0 to 5",
        "row 7: unknown key 'bets'. Did you mean 'best'?",
        "row 8: there are prompts 0 to 5",
    ):
        assert said in str(refused.value)


@pytest.mark.parametrize("shared_start", [True, False])
def test_chains_are_drawn_again_whatever_the_batch(tmp_path, shared_start):
    job, _ = draw_toy(tmp_path / "a", shared_start=shared_start)
    choose(tmp_path / "a", *({"row": row, "best": 0} for row in range(3)))
    every = [(row, k) for row in range(3) for k in range(4)]
    options = {"steps": 5, "kernel": ddim(1.0), "seed": 0, "shared_start": shared_start}
    whole = chains(Driver(toy_pipeline(size=4)), Prompts(job.prompts), every, **options)
    assert (whole.x[0, 0] == whole.x[1, 0]).all() == shared_start
    assert (whole.x[0, -1] != whole.x[1, -1]).any()
    method = d3po(tmp_path / "a", batch_size=4)
    assert (method.settings.steps, method.settings.group, method.settings.shared_start) == (5, 4, shared_start)
    again = method.replay.chains([2, 0])
    torch.testing.assert_close(again.x, torch.cat([whole.x[8:], whole.x[:4]]), rtol=0, atol=1e-5)


def test_the_preferred_pictures_become_likelier(tmp_path):
    """A person who likes red best: the toy's red rises, as with a reward."""
    _, red = draw_toy(tmp_path / "a", ("0", "0.5", "1", "0.2"), shared_start=True)
    rankings = [sorted(range(4), key=lambda k, row=row: -float(red[row, k])) for row in range(4)]
    choose(tmp_path / "a", *({"row": row, "ranking": ranking} for row, ranking in enumerate(rankings)))
    method = d3po(tmp_path / "a", batch_size=16)
    prompts = read_choices(tmp_path / "a").prompts()
    data, pairs, before = method.collect(Ctx(0, 0, torch.device("cpu")), prompts)
    assert pairs.shape == (4 * 6, 2)
    torch.testing.assert_close(before, data.traj.log_prob, rtol=0, atol=1e-4)  # both are the base's
    config = TrainConfig(steps=20, learning_rate=0.05, weight_decay=0.0, log_every=1)
    fit(method, lambda number: prompts, config, tmp_path / "run")
    (shift,) = method.policy.trainable()
    assert shift[0] > 0.2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["gap"] == 0
    assert rows[-1]["gap"] > 0
    assert rows[-1]["agreed"] > 0.6
    assert rows[-1]["pairs"] == 24


def test_other_weights_than_those_that_drew_are_refused(tmp_path):
    draw_toy(tmp_path / "a")
    choose(tmp_path / "a", {"row": 1, "best": 0})
    method = d3po(tmp_path / "a")
    method.replay.chains([1])
    other = d3po(tmp_path / "a")
    for p in other.policy.weights.start.values():
        p.add_(0.1)
    with pytest.raises(TrainingError, match="00001-000.png comes out as another picture"):
        other.replay.chains([1])
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / image_name(1, 2))
    with pytest.raises(TrainingError, match="00001-002.png comes out as another picture"):
        d3po(tmp_path / "a").replay.chains([1])


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """Two rounds on a small Stable Diffusion by the command line: the folder of both."""
    place = tmp_path_factory.mktemp("rounds")
    torch.manual_seed(0)
    FAMILIES["sd"]().pipe.save_pretrained(place / "base")
    (place / "prompts.txt").write_text("0.1\n0.2\n0.3\n0.2")
    (place / "heldout.txt").write_text("0.9\n0.8")
    config = {
        "model": {"use": "base", "call": {"guidance_scale": 2.0}},
        "policy": {"rank": 2},
        "method": {"use": "d3po", "batch_size": 6, "choices": "round1"},
        "prompts": {"per_round": 2},
        "train": {"steps": 4, "learning_rate": 0.01, "log_every": 1},
        "evaluate": {
            "every": 4,
            "steps": 2,
            "images": 1,
            "kl_images": 2,
            "prompts": {"use": "file", "path": "heldout.txt"},
            "watch": ["tests.test_run:Red"],
        },
        "log": {"tensorboard": False},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    return place


def words(out, *more):
    return ("generate", "prompts.txt", "--pipeline", "base", "--guidance", "2", "--out", out, *KERNEL, *more)


def fill(folder, **choice):
    entries = json.loads(Path(folder, "choices.json").read_text())
    for entry in entries[1:]:
        entry |= choice
    Path(folder, "choices.json").write_text(json.dumps(entries))


def test_two_rounds_by_the_command_line(rounds, cli, monkeypatch):
    monkeypatch.chdir(rounds)
    code, said, err = cli(*words("round1", "--shared-start", "--batch-size", 5))
    assert code == 0, err
    assert "method.choices=round1" in said
    code, _, err = cli("train", "run.yaml", "out=run1")
    assert (code, "Nothing is chosen in round1/choices.json yet" in err) == (2, True)
    fill("round1", best=1)
    code, _, err = cli("train", "run.yaml", "out=run1")
    assert code == 0, err
    rows = [json.loads(line) for line in Path("run1/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["gap"] == pytest.approx(0, abs=1e-6)
    assert (rows[0]["images"], rows[0]["pairs"]) == (6, 4)
    assert rows[-1]["gap"] != 0
    card = Path("run1/README.md").read_text()
    assert "on a person's choices in `round1`" in card
    assert "None of these was trained on." in card

    code, _, err = cli(*words("round2", "--lora", "run1/lora", "--seed", 1))
    assert code == 0, err
    fill("round2", pairs=[[0, 2]])
    second = ("train", "run.yaml", "policy.rank=null", "method.choices=round2")
    code, _, err = cli(*second, "out=run2")
    assert (code, "policy.start: expected run1/lora, the LoRA that round2 was drawn with" in err) == (2, True)
    start = ("policy.start=run1/lora", "method.reference=previous")
    code, _, err = cli(*second, *start, "out=run2", "--minutes", "0")
    assert code == 0, err
    code, _, err = cli(*second, *start, "out=run2", "--resume")  # draws by the LoRA it started from, not by its own
    assert code == 0, err
    rows = [json.loads(line) for line in Path("run2/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["gap"] == pytest.approx(0, abs=1e-6)
    code, _, err = cli(*second, "policy.start=run2/lora", "out=run3")
    assert (code, "policy.start: expected run1/lora" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method.choices": "nowhere"}, "Expected nowhere to be a folder that"),
        ({"method.discount": 1.0}, "expected 0 for a person's choices, which have no std"),
        ({"method.steps": 9}, "The images of round0 have steps 3, not 9"),
        ({"method.kernel": "ddim(0.5)"}, "have kernel ddim(1.0), not ddim(0.5)"),
        ({"model.call": {}}, "guidance_scale: round0 was drawn with 2.0, but here it is None"),
        ({"model.use": "tiny-sd"}, "model.use: round0 was drawn with"),
        ({"prompts.size": 9}, "expected per_round alone, since the prompts are those of round0"),
        ({"prompts.per_round": 4}, "at least the 4 prompts or pairs of a round but got 3"),
        ({"reward": "tests.test_run:Red"}, "Expected a reward, or method.choices"),
        ({"method.choices": None}, "Expected a reward, or method.choices"),
        ({"evaluate.stop": {"watch": "reward"}}, "expected one of tests.test_run:Red but got 'reward'"),
    ],
)
def test_a_run_that_does_not_fit_its_images_is_refused(rounds, changes, said, monkeypatch):
    monkeypatch.chdir(rounds)
    if not Path("round0").exists():
        drawn = {"pipeline": "base", "guidance": 2.0, "steps": 3, "particles": 3, "kernel": "ddim(1.0)"}
        job = GenerateJob(prompts=("a", "b", "c"), **drawn)
        Path("round0/images").mkdir(parents=True)
        Path("round0/config.yaml").write_text(job.to_yaml())
        for row in range(3):
            for k in range(3):
                Image.new("RGB", (8, 8), (row, k, 0)).save(Path("round0") / image_name(row, k))
        choose(Path("round0"), *({"row": row, "best": 0} for row in range(3)))
    monkeypatch.setattr("t2i_align.training.run.load_pipeline", None)
    config = yaml.safe_load(Path("run.yaml").read_text())
    with pytest.raises(ConfigError, match="problem") as refused:
        train(config, **({"method.choices": "round0", "out": "run0"} | changes))
    assert said in str(refused.value)
    assert not Path("run0").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--choices",),
        ("--choices", "--kernel", "ode"),
        ("--shared-start",),
        ("--choices", "--kernel", "ddim(1.0)", "--steer", "fk", "--rewards", "verifier"),
    ],
)
def test_choices_need_a_kernel_with_noise(cli, tmp_path, flags):
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "x", *flags)
    assert code == 2
    assert 'with a stochastic --kernel such as "ddim(1.0)"' in err
    assert not (tmp_path / "x").exists()
