"""Training of scorers: what is read, learnt, combined, written and opened again, on tiny_clip and drawn scenes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from t2i_align.config import ConfigError, load_config
from t2i_align.judging.drawn import draw_rankings
from t2i_align.playground.pick import PickRecipe
from t2i_align.rewards import RewardError, load_reward
from t2i_align.rewards.clip import CLIP
from t2i_align.rewards.heads import Cosine, Readout
from t2i_align.rewards.trained import average_scorers
from t2i_align.runs import read_jsonl
from t2i_align.scorer_training.blocks import ScorerBlock, ScorerRun, load_scorer_run
from t2i_align.scorer_training.data import Examples, Pictures, bootstrap, read, split
from t2i_align.scorer_training.model import Model, lora_state
from t2i_align.scorer_training.run import make_plan, train_scorer
from tests.tiny_scorers import hf_clip

CONFIGS = Path(__file__).parents[1] / "configs" / "scorer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn scenes as files: `pairs.jsonl` with a tie, `scores.csv`, and one row whose image is not there."""
    here = tmp_path_factory.mktemp("data")
    pairs, scores = [], ["prompt,image,score"]
    for number, (prompt, pictures, merits) in enumerate(draw_rankings(16, seed=3, images=3)):
        names = [f"{number}-{n}.png" for n in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(here / name)
        scores += [f"{prompt},{name},{merit}" for name, merit in zip(names, merits, strict=True)]
        for other in (1, 2):
            label = 0.5 if merits[0] == merits[other] else float(merits[0] > merits[other])
            row = {"prompt": prompt, "image_0": names[0], "image_1": names[other], "label_0": label}
            pairs.append(row | {"label_1": 1 - label})
    tie = {"label_0": 0.5, "label_1": 0.5}
    pairs += [pairs[0] | tie, pairs[0] | {"image_0": "gone.png"}]
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (here / "scores.csv").write_text("\n".join(scores) + "\n")
    return here


def config(folder, out, **blocks):
    """A run of a few updates."""
    base = {
        "out": str(out),
        "scorer": {"use": "tiny_clip", "device": "cpu"},
        "data": {"path": str(folder / "pairs.jsonl"), "batch": 8},
        "train": {"steps": 4, "learning_rate": 1e-4, "checkpoint_every": 2, "log_every": 2},
        "evaluate": {"every": 2, "share": 0.3},
    }
    return {name: base.get(name, {}) | blocks.get(name, {}) if name != "out" else base[name] for name in base | blocks}


HEAD = {"train": "head", "head": "weighted"}


def weights(folder):
    return {path.relative_to(folder): load_file(path) for path in sorted(Path(folder).rglob("*.safetensors"))}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[file][name], other[file][name]) for file in one for name in one[file]
    )


def test_the_command_trains_measures_saves_and_opens(cli, folder, tmp_path):
    path = tmp_path / "run.yaml"
    run = config(folder, tmp_path / "run", scorer={"scale": 8.0, "name": "mine"}, evaluate={"every": 2, "keep": "best"})
    path.write_text(yaml.dump(run))
    code, out, err = cli("train", path, "--dry-run", "--json")
    assert code == 0, err
    assert "gone.png" in json.loads(out)["left out"]
    assert not (tmp_path / "run").exists()
    code, out, err = cli("train", path)
    assert code == 0, err
    assert {"config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "README.md", "scorer"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| before |" in card
    assert "| after |" in card
    assert "gone.png" in card
    assert load_scorer_run(tmp_path / "run" / "config.yaml").folder == tmp_path / "run"
    scorer = load_reward(tmp_path / "run")
    assert scorer.name == "mine"
    picture, prompt = str(folder / "0-0.png"), "a red circle"
    mine = scorer.scores(picture, prompt).total
    assert mine == load_reward(f"2 * {tmp_path / 'run' / 'scorer'}").scores(picture, prompt).total / 2
    plain = CLIP(f"local-dir:{tmp_path / 'run' / 'scorer'}")  # as open_clip alone opens it
    assert plain.tower.scale * plain.scores(picture, prompt).total == pytest.approx(mine.item(), rel=1e-5)
    code, _, err = cli("train", path)
    assert code == 2
    assert "--resume" in err


@pytest.mark.parametrize("scorer", [{}, HEAD])
def test_a_run_that_was_killed_ends_with_the_same_weights(folder, tmp_path, scorer):
    """A frozen CLIP's features too, of which a resumed run has others to encode."""
    noisy = {"path": str(folder / "pairs.jsonl"), "batch": 8, "noise": 0 if scorer else 0.05, "micro_batch": 3}
    often = {"steps": 4, "ema": 0.5, "checkpoint_every": 2, "learning_rate": 0.01 if scorer else 1e-4}
    whole = config(folder, tmp_path / "whole", scorer=scorer, data=noisy, train=often)
    train_scorer(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "step-00000004.pt").unlink()
    shutil.rmtree(tmp_path / "parts" / "scorer")
    train_scorer(whole | {"out": str(tmp_path / "parts")}, resume=True)
    assert same(weights(tmp_path / "whole" / "scorer"), weights(tmp_path / "parts" / "scorer"))
    rows = [[row["step"] for row in read_jsonl(tmp_path / run / "evaluations.jsonl")] for run in ("whole", "parts")]
    assert rows == [[0, 2, 4]] * 2


def test_micro_batches_change_nothing_but_rounding(folder, tmp_path):
    for name, size in (("a", None), ("b", 3)):
        data = {"path": str(folder / "pairs.jsonl"), "batch": 8, "micro_batch": size}
        train_scorer(config(folder, tmp_path / name, data=data, scorer=HEAD, train={"steps": 3, "learning_rate": 0.01}))
    one, other = (load_file(tmp_path / name / "scorer" / "head.safetensors")["weight"] for name in "ab")
    assert not torch.equal(one, torch.ones_like(one))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bootstrapped_members_differ_come_again_and_give_a_std(folder, tmp_path):
    for name in ("a", "b"):
        ensemble = {"members": 2, "bootstrap": True}
        train_scorer(config(folder, tmp_path / name, scorer=HEAD, ensemble=ensemble))
    assert same(weights(tmp_path / "a" / "scorer"), weights(tmp_path / "b" / "scorer"))
    first, second = (load_file(tmp_path / "a" / "scorer" / f"member-{n}" / "head.safetensors") for n in (0, 1))
    assert not torch.equal(first["weight"], second["weight"])
    scorer = load_reward(tmp_path / "a" / "scorer")
    images = [str(folder / f"{n}-0.png") for n in range(3)]
    scores = scorer.scores(images, "a red circle")
    members = [load_reward(tmp_path / "a" / "scorer" / f"member-{n}") for n in (0, 1)]
    values = torch.stack([member.scores(images, "a red circle").total for member in members])
    torch.testing.assert_close(scores.total, values.mean(0))
    torch.testing.assert_close(scores.std, values.std(0), rtol=1e-4, atol=1e-5)
    assert members[0].tower is members[1].tower  # heads on one CLIP: it runs once
    cautious = load_reward(f"lcb({tmp_path / 'a'}, k=1)").scores(images, "a red circle").total
    torch.testing.assert_close(cautious, scores.total - scores.std)


def test_warm_is_the_mean_of_the_weights(cli, folder, tmp_path):
    ensemble = {"members": 2, "combine": "warm", "learning_rates": [1e-4, 3e-4], "bootstrap": False}
    train_scorer(config(folder, tmp_path / "run", ensemble=ensemble, train={"steps": 2, "checkpoint_every": 2}))
    mean = weights(tmp_path / "run" / "scorer")
    members = [weights(tmp_path / "run" / f"member-{n}" / "scorer") for n in (0, 1)]
    for file, tensors in mean.items():
        for name, value in tensors.items():
            if value.is_floating_point():
                both = torch.stack([member[file][name].double() for member in members])
                torch.testing.assert_close(value, both.mean(0).float())
    text = Path("head.safetensors")
    assert not torch.equal(members[0][text]["log_scale"], members[1][text]["log_scale"])
    one = tmp_path / "run" / "member-0"
    code, _, err = cli("rewards", "average", one, one / "scorer", "--out", tmp_path / "twice")
    assert code == 0, err
    assert same(weights(tmp_path / "twice"), members[0])
    with pytest.raises(RewardError, match="2 or more"):
        average_scorers([one / "scorer"], tmp_path / "none")


def test_a_merged_lora_is_the_adapter_and_learns(folder, tmp_path):
    block = {"train": "lora", "rank": 2, "alpha": 6.0, "device": "cpu", "targets": ["c_fc", "conv2"]}
    train_scorer(config(folder, tmp_path / "run", scorer=block, train={"steps": 2, "learning_rate": 0.01}))
    files = weights(tmp_path / "run" / "scorer")
    adapter = files[Path("adapter.safetensors")]
    assert all(adapter[name].any() for name in adapter if "lora_B" in name)
    model = Model(CLIP(f"local-dir:{Path(load_reward('tiny_clip').tower.spec.name.removeprefix('local-dir:'))}").tower,
                  Cosine(128), ScorerBlock(**block))  # fmt: skip
    from t2i_align.policy.lora import put_weights

    put_weights(model.network, "scorer", {name: v for name, v in adapter.items() if not name.endswith("alpha")})
    assert lora_state(model.network).keys() == adapter.keys()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scorer = load_reward(tmp_path / "run")
    with torch.no_grad():
        unmerged = model.encode_images(images)
    torch.testing.assert_close(scorer.tower.image_features(images), unmerged, rtol=1e-4, atol=1e-5)
    base = load_reward("tiny_clip").tower.image_features(images)
    assert not torch.allclose(base, unmerged, atol=1e-4)  # and the base is as it was


def test_scores_are_regressed_and_quantiles_give_a_std(folder, tmp_path):
    data = {"path": str(folder / "scores.csv"), "batch": 16}
    train = {"steps": 40, "learning_rate": 0.01}
    for objective in ("regression", "quantile", "hl_gauss"):
        head = {"train": "head", "head": "mlp", "hidden": [16]}
        run = config(folder, tmp_path / objective, data=data, scorer=head, train=train, objective={"use": objective},
                     evaluate={"every": 40, "share": 0.3})  # fmt: skip
        done = train_scorer(run)
        rows = read_jsonl(tmp_path / objective / "evaluations.jsonl")
        assert rows[-1]["rmse"] < rows[0]["rmse"]  # of the mean of all scores
        assert done.measured["after"]["rmse"] == pytest.approx(rows[-1]["rmse"], rel=1e-4)  # as opened again
        scores = load_reward(tmp_path / objective).scores(str(folder / "0-0.png"), "a red circle")
        assert (scores.std is not None) == (objective != "regression")
        assert ("within_std" in rows[-1]) == (objective != "regression")


def test_a_transformers_clip_is_trained_and_opened_by_transformers(folder, tmp_path):
    from transformers import CLIPModel

    hf_clip(tmp_path / "base", words=True)
    block = {"use": "clip", "options": {"name": str(tmp_path / "base")}}
    train_scorer(config(folder, tmp_path / "run", scorer=block, train={"steps": 1}, objective={"use": "plackett_luce"}))
    saved = CLIPModel.from_pretrained(tmp_path / "run" / "scorer").state_dict()
    scorer = load_reward(tmp_path / "run")
    assert torch.equal(saved["visual_projection.weight"], scorer.tower.network.visual_projection.weight)
    again = {"use": str(tmp_path / "run"), "train": "lora", "rank": 2}  # its attention has layers of its own
    train_scorer(config(folder, tmp_path / "second", scorer=again, train={"steps": 1}))
    adapter = load_file(tmp_path / "second" / "scorer" / "adapter.safetensors")
    assert {name.split(".")[-3] for name in adapter if name.endswith("lora_A.weight")} == {
        "q_proj", "k_proj", "v_proj", "out_proj",
    }  # fmt: skip
    assert load_reward(tmp_path / "second").scores(str(folder / "0-0.png"), "a red circle").total.isfinite().all()


def test_splits_and_bootstraps_go_by_prompt(folder):
    run = load_scorer_run(config(folder, "runs/none"))
    train, held_out = split(read(run.data), run)
    assert not set(train.prompts) & set(held_out.prompts)
    assert len(train) + len(held_out) == 33
    assert len(train.problems) == 1
    examples = Examples(("a", "a", "b"), ((0,), (1,), (2,)), ((1.0,), (0.0,), (1.0,)), ["x"] * 3)
    for number in range(6):
        rows = bootstrap(examples, 0, number)
        assert rows.count(0) == rows.count(1)
        assert rows.count(0) + rows.count(2) == 2
        assert rows == bootstrap(examples, 0, number)


def test_an_image_that_cannot_be_read_is_left_out(folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    tower = load_reward("tiny_clip").tower
    pictures = Pictures([str(tmp_path / "broken.png"), str(folder / "0-0.png")], tower.preprocessing)
    got = pictures.get([0, 1, 0])
    assert got.isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert capsys.readouterr().err.count("broken.png") == 1
    rows = [{"prompt": "a red circle", "better": "0-0.png", "worse": "broken.png"} for _ in range(4)]
    shutil.copy(tmp_path / "broken.png", folder / "broken.png")
    (folder / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = {"path": str(folder / "pairs.jsonl")}
    run = config(folder, tmp_path / "run", data={"path": str(folder / "broken.jsonl")}, scorer=HEAD,
                 evaluate={"data": good}, train={"steps": 1})  # fmt: skip
    done = train_scorer(run)  # nothing to learn: the weights stay, and nothing is NaN
    assert done.finished
    assert "broken.png" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({"objective": {"use": "regression"}}, "expected linear or mlp"),
        ({"scorer": {"train": "head"}}, "a cosine has no weights"),
        ({"scorer": {"use": "verifier"}}, "scorer on one CLIP"),
        ({"scorer": {"use": "tiny_clop"}}, "Did you mean"),
        ({"scorer": {"options": {"colour": 1}}}, "no option 'colour'"),
        ({"data": {"path": "nowhere.jsonl"}}, "No such file"),
        ({"data": {"path": "{folder}/scores.csv"}}, "pairs of which one image is better"),
        ({"data": {"path": "{folder}/ties.jsonl"}}, "ties"),
        (
            {"data": {"path": "{folder}/pairs.jsonl", "label_noise": 0.2}, "objective": {"use": "plackett_luce"}},
            "turns",
        ),
        ({"ensemble": {"members": 1, "combine": "warm"}}, "2 or more members"),
        ({"ensemble": {"members": 2, "learning_rates": [1e-4]}}, "learning_rates for the 2 members"),
        ({"data": {"use": "scenes"}}, "use: scenes"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_load(folder, tmp_path, blocks, said, monkeypatch):
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0]) | {"label_0": 0.5, "label_1": 0.5}
    (folder / "ties.jsonl").write_text((json.dumps(row) + "\n") * 3)
    monkeypatch.setattr("t2i_align.rewards.checkpoints._open", lambda spec: pytest.fail("weights were loaded"))
    blocks = yaml.safe_load(yaml.dump(blocks).replace("{folder}", str(folder)))
    with pytest.raises(ConfigError, match=said):
        train_scorer(config(folder, tmp_path / "run", **blocks))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_scorer_is_told(tmp_path):
    with pytest.raises(RewardError, match=r"no scorer\.json"):
        load_reward(str(tmp_path))
    (tmp_path / "scorer.json").write_text("{}")
    with pytest.raises(RewardError, match="Cannot read"):
        load_reward(tmp_path)


def test_a_readout_starts_at_the_mean_and_reads_what_it_is_told():
    head = Readout(8, "image", (), "regression")
    assert not head.reads_prompt
    assert head(torch.randn(3, 8), None).tolist() == [0, 0, 0]
    assert Readout(8, "both", (4,), "quantile").outputs(torch.randn(2, 8), torch.randn(2, 8)).shape == (2, 16)


def test_the_config_of_tiny_pick_has_the_settings_of_its_recipe():
    recipe = PickRecipe()
    tower, heads = (load_config(ScorerRun, CONFIGS / f"tiny_pick{part}.yaml") for part in ("", "_siblings"))
    assert (tower.train, heads.train) == (recipe.train, recipe.train_siblings)
    data = tower.data
    assert (data.prompts, data.batch, data.noise, data.label_noise) == (
        recipe.prompts, recipe.batch, recipe.noise, recipe.label_noise,
    )  # fmt: skip
    assert (tower.scorer.scale, heads.ensemble.members) == (recipe.scale, recipe.siblings)


def test_a_plan_draws_nothing_of_the_playground(tmp_path):
    run = load_scorer_run(CONFIGS / "tiny_pick.yaml", [
        f"out={tmp_path / 'run'}", "data.prompts=8", "evaluate.data.prompts=3", "train.precision=fp32",
    ])  # fmt: skip
    assert "tiny-sd" in make_plan(run)["data"]
    assert not (tmp_path / "run").exists()
