import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pydantic import ValidationError

from t2i_align.config import ConfigError, Settings, TrainConfig, load_config

ROOT = Path(__file__).parents[1]


class Inner(Settings):
    rank: int = 4
    scale: float = 1.0


class Outer(Settings):
    name: str = "run"
    inner: Inner = Inner()
    train: TrainConfig


def messages(*args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    return str(caught.value)


def test_unknown_key_suggests_the_nearest_name():
    text = messages(TrainConfig, {"steps": 1, "learning_rat": 0.1})
    assert "learning_rat" in text
    assert "Did you mean 'learning_rate'?" in text


def test_unknown_nested_key_suggests_from_its_own_block():
    text = messages(Outer, {"inner": {"rnak": 3}, "train": {"steps": 1}})
    assert "unknown key 'inner.rnak'. Did you mean 'rank'? Known: rank, scale" in text


def test_a_name_far_from_all_known_ones_gets_no_suggestion():
    text = messages(TrainConfig, {"steps": 1, "qqqqqqqq": 1})
    assert "Did you mean" not in text
    assert "weight_decay" in text  # the list of known names


def test_all_problems_come_in_one_message():
    text = messages(Outer, {"nmae": "x", "inner": {"rank": "many"}, "train": {"learning_rate": -1}}, ["oops"])
    assert "5 problems" in text
    for part in ("'nmae'", "'many'", "train.steps is required", "train.learning_rate", "'oops'"):
        assert part in text


def test_file_is_named_in_the_message(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: 0\n")
    text = messages(TrainConfig, path)
    assert str(path) in text
    assert "greater than 0, but got 0" in text


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "0.0001", "1.e-4", ".1e-3"])
def test_scientific_notation_is_a_number(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"steps: 10\nlearning_rate: {text}\n")
    from_file = load_config(TrainConfig, path).learning_rate
    from_word = load_config(TrainConfig, None, ["steps=10", f"learning_rate={text}"]).learning_rate
    assert from_file == from_word == 1e-4
    assert isinstance(from_word, float)


def test_quoted_scientific_notation_stays_text():
    assert load_config(Outer, {"train": {"steps": 1}}, ["name='1e-4'"]).name == "1e-4"


def test_overrides_reach_nested_values_and_later_words_win():
    config = load_config(
        Outer, {"train": {"steps": 5, "seed": 3}}, ["train.steps=7", "inner.rank=16", "train.steps=9", "name=a=b"]
    )
    assert (config.train.steps, config.train.seed, config.inner.rank, config.name) == (9, 3, 16, "a=b")
    assert config.inner.scale == 1.0


def test_overrides_make_blocks_that_the_source_lacks():
    assert load_config(Outer, None, ["train.steps=2", "train.betas=[0.5, 0.6]"]).train.betas == (0.5, 0.6)


def test_override_can_set_null():
    assert load_config(TrainConfig, {"steps": 1}, ["max_norm=null"]).max_norm is None


def test_override_below_a_value_is_refused():
    assert "name is a value, not a block" in messages(Outer, {"name": "x", "train": {"steps": 1}}, ["name.a=1"])


def test_override_with_broken_yaml_is_a_config_error():
    assert "betas" in messages(TrainConfig, {"steps": 1}, ["betas=[0.9,"])


def test_overrides_leave_the_callers_mapping_alone():
    source = {"train": {"steps": 5}}
    load_config(Outer, source, ["train.steps=7"])
    assert source == {"train": {"steps": 5}}


def test_configs_are_frozen():
    config = load_config(TrainConfig, {"steps": 1})
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 2
    assert config.steps == 1


def test_yaml_round_trip(tmp_path):
    config = Outer(
        name="größer",
        inner=Inner(rank=7, scale=1e-9),
        train=TrainConfig(steps=3, learning_rate=2e-5, betas=(0.5, 0.75), max_norm=None, ema=0.99),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(Outer, path) == config


@pytest.mark.parametrize("name", ["1e4", "12e4567", "1e-4", "null", "true", "12", "a: b"])
def test_yaml_round_trip_of_text_that_looks_like_something_else(tmp_path, name):
    config = Outer(name=name, train=TrainConfig(steps=3))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(Outer, path) == config


def test_missing_file(tmp_path):
    text = messages(TrainConfig, tmp_path / "none.yaml")
    assert "none.yaml" in text
    assert "No such file" in text


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "just words\n", "3\n"])
def test_a_file_that_is_not_a_mapping(tmp_path, content):
    path = tmp_path / "list.yaml"
    path.write_text(content)
    text = messages(TrainConfig, path)
    assert "mapping" in text
    assert str(path) in text


def test_a_file_that_is_not_yaml(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("steps: [1, 2\n")
    assert "not valid YAML" in messages(TrainConfig, path)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: größer\n".encode("latin-1"))
    assert str(path) in messages(Outer, path)


def test_an_empty_file_gives_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_config(Inner, path) == Inner() == load_config(Inner, None)


def test_changing_one_key_of_a_default_block_keeps_the_others():
    from t2i_align.playground.diffusion import DiffusionRecipe

    default = DiffusionRecipe().train
    for source, words in ((None, ["train.steps=3"]), ({"train": {"steps": 3}}, [])):
        assert load_config(DiffusionRecipe, source, words).train == default.model_copy(update={"steps": 3})


def published(path):
    """Whether a recipe is for a published model, whose weights and scorers are not here."""
    return path.parent.name not in ("playground", "scorer")


def test_ready_recipes_are_valid_and_open_with_their_command():
    from t2i_align.methods import METHODS
    from t2i_align.playground.diffusion import DiffusionRecipe
    from t2i_align.scorer_training.blocks import ScorerRun
    from t2i_align.training.blocks import load_run

    recipes = sorted((ROOT / "configs").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert path.read_text().startswith("# t2i-align ")
        assert str(path.relative_to(ROOT)) in path.read_text().splitlines()[0]
        if published(path):
            assert "\n# Not run on a GPU" in path.read_text()  # and see the next test
        elif path.stem in METHODS:
            assert load_run(path).method["use"] == path.stem
        elif path.parent.name == "scorer":
            load_config(ScorerRun, path)  # its data need not be here
        elif path.stem == "d3po-choices":  # valid with a folder of choices alone: tests/test_choices.py runs it
            assert yaml.safe_load(path.read_text())["method"]["use"] == "d3po"
        else:
            assert load_config(DiffusionRecipe, path).train.learning_rate == DiffusionRecipe().train.learning_rate


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if published(path)],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_recipes_of_published_models_pass_all_checks_but_that_their_files_are_here(path, tmp_path, monkeypatch):
    from t2i_align.pipelines.catalog import call_defaults
    from t2i_align.pipelines.models import MODELS
    from t2i_align.training.blocks import load_run
    from t2i_align.training.prompts import make_pool

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("t2i_align.rewards.build._check_scorer", lambda *_: None)
    monkeypatch.setattr("t2i_align.pipelines.catalog.check_pipeline", lambda name, _: MODELS[name].source)
    words = []
    if path.stem == "diffusion_dpo":
        for name in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        sides = {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "label_1": 0}
        lines = [json.dumps({"prompt": f"prompt {number}"} | sides) for number in range(256)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
        words = [f"prompts.path={tmp_path / 'pairs.jsonl'}"]
    run = load_run(path, words)
    assert (run.model.use, run.method["use"]) == (path.parent.name, path.stem)
    assert call_defaults(run.model.use)["num_inference_steps"]
    assert run.policy.gradient_checkpointing
    assert run.train.precision == run.model.dtype == "bf16"
    assert run.reward not in run.evaluate.watch
    assert run.evaluate.stop.watch in run.evaluate.watch
    seen = make_pool(run.prompts).prompts.text
    assert not set(seen) & set(make_pool(run.evaluate.prompts).prompts.text)


def test_playground_recipes_clip_by_the_size_of_their_latents():
    from t2i_align.bench.recipes import METHODS
    from t2i_align.training.blocks import load_run

    for name, key in {"grpo": "clip", "ddpo": "clip", "prdp": "eps"}.items():
        assert load_run(ROOT / f"configs/playground/{name}.yaml").method[key] == METHODS[name]["method"][key]
