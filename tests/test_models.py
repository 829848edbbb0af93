"""The table of models: sound, in step with its page, and said on the command line."""

import inspect
import re
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest

from t2i_align.pipelines.hub import is_hub_id
from t2i_align.pipelines.loading import ALIASES, DTYPES
from t2i_align.pipelines.models import GUIDANCE, MODELS, find_model, markdown, model_rows
from t2i_align.runs import read_jsonl

CLASSES = {  # where it is not StableDiffusionPipeline
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-turbo": "StableDiffusionXLPipeline",
    "sd3.5-medium": "StableDiffusion3Pipeline",
    "sd3.5-large": "StableDiffusion3Pipeline",
    "sd3.5-large-turbo": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux2-klein": "Flux2KleinPipeline",
    "flux2-klein-base": "Flux2KleinPipeline",
    "qwen-image": "QwenImagePipeline",
    "z-image": "ZImagePipeline",
    "z-image-turbo": "ZImagePipeline",
    "sana": "SanaPipeline",
    "sana-sprint": "SanaSprintPipeline",
    "pixart-alpha": "PixArtAlphaPipeline",
    "pixart-sigma": "PixArtSigmaPipeline",
    "lcm-sd15": "LatentConsistencyModelPipeline",
    "lumina2": "Lumina2Pipeline",
    "chroma": "ChromaPipeline",
    "cogview4": "CogView4Pipeline",
    "aura-flow": "AuraFlowPipeline",
    "hunyuan-dit": "HunyuanDiTPipeline",
}


@pytest.mark.parametrize("alias", MODELS)
def test_an_entry_is_sound(alias):
    model = MODELS[alias]
    kind = getattr(diffusers, CLASSES.get(alias, "StableDiffusionPipeline"))
    assert set(model.call) <= set(inspect.signature(kind.__call__).parameters)
    assert sum(keyword in model.call for keyword in GUIDANCE) == 1
    assert model.dtype in DTYPES
    assert model.few is None or 1 <= model.call["num_inference_steps"] <= model.few <= 8
    assert all(is_hub_id(source) for source in (model.source, *model.others))
    assert model.license
    assert find_model(alias) is find_model(model.source) is model
    assert all(find_model(source) is model for source in model.others)


def test_names_are_not_taken_twice():
    sources = [source for model in MODELS.values() for source in (model.source, *model.others)]
    assert len(set(sources)) == len(sources)
    assert not set(MODELS) & set(ALIASES)


def test_turbo_models_take_few_steps_and_only_they():
    few = {alias for alias, model in MODELS.items() if model.few}
    named = {alias for alias in MODELS if re.search("turbo|schnell|klein$|sprint|lcm", alias)}
    assert few == named
    assert {alias for alias, model in MODELS.items() if model.one_step} == {"sd-turbo", "sdxl-turbo"}
    assert find_model("sd-turbos") is None


def test_the_page_shows_the_table():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    assert markdown(model_rows()) in page, "run `python -m t2i_align.pipelines.models` and paste"


def test_the_command_line_lists_the_models(cli):
    code, out, _ = cli("generate", "--models")
    assert code == 0
    assert re.search(r"^sdxl-turbo +stabilityai/sdxl-turbo +1 +0 +512 +up to 4 ", out, re.MULTILINE)
    assert len(out.splitlines()) == len(MODELS) + 1


@pytest.fixture
def turbo(tmp_path, monkeypatch):
    """tiny-sd in the place of sd-turbo, in a hub cache without a network."""
    store = tmp_path / "hub" / "models--stabilityai--sd-turbo"
    shutil.copytree(ALIASES["tiny-sd"], store / "snapshots" / "abc", ignore=shutil.ignore_patterns("card.json"))
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_turbo_model_is_run_as_it_is_meant_to_be(cli, turbo, tmp_path):
    size = ("--height", 64, "--width", 64, "--particles", 1, "--device", "cpu")
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "out", "--pipeline", "sd-turbo", *size)
    assert code == 0
    assert "note: sd-turbo: 1 step, guidance 0, 64x64 (defaults from the table of models; --steps, " in err
    assert "distilled" not in err
    assert len(list(read_jsonl(tmp_path / "out" / "results.jsonl"))) == 1
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "steps: 1\nguidance: 0.0\nheight: 64\n" in config
    assert "dtype: fp32\n" in config


def test_too_many_steps_are_remarked_upon_not_refused(cli, turbo, tmp_path):
    many = ("--steps", 5, "--guidance", 1, "--height", 64, "--width", 64, "--particles", 1, "--device", "cpu")
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "out", "--pipeline", "sd-turbo", *many)
    assert code == 0
    assert "note: sd-turbo: 5 steps, guidance 1, 64x64" in err
    assert "note: sd-turbo is distilled to 1 to 4 steps: 5 take 5 times as long" in err


def test_a_model_that_is_not_here_is_one_sentence(cli, turbo, tmp_path):
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "out", "--pipeline", "sdxl")
    assert code == 2
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0" in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_weight_of_a_lora_must_be_a_number(cli, tmp_path):
    code, _, err = cli("generate", "a red circle", "--out", tmp_path / "out", "--lora", "style.safetensors@much")
    assert code == 2
    assert "LORA@WEIGHT, such as style.safetensors@0.5" in err
