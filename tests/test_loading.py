import pytest
import torch
from diffusers import StableDiffusionPipeline

import t2i_align as t2i
from t2i_align.pipelines import PipelineError, load_pipeline
from t2i_align.pipelines.loading import call_defaults


def test_tiny_sd_opens_with_the_stock_class_and_draws_the_same_picture():
    ours = load_pipeline("tiny-sd")
    stock = StableDiffusionPipeline.from_pretrained(t2i.pipelines.loading.ALIASES["tiny-sd"], dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    same = [pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images for pipe in (ours, stock)]
    assert type(ours) is StableDiffusionPipeline
    assert (same[0] == same[1]).all()


def test_a_folder_and_an_object_work_like_an_alias(tmp_path):
    pipe = load_pipeline("tiny-sd")
    assert load_pipeline(pipe) is pipe
    pipe.save_pretrained(tmp_path / "mine")
    again = load_pipeline(tmp_path / "mine")
    weights = zip(pipe.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_dtype_is_honoured():
    assert load_pipeline("tiny-sd", dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_defaults_come_from_the_card(tmp_path):
    assert call_defaults("tiny-sd")["num_inference_steps"] == 25
    load_pipeline("tiny-sd").save_pretrained(tmp_path / "mine")
    assert call_defaults(tmp_path / "mine") == {}


@pytest.mark.parametrize(
    ("name", "message"),
    [("tiny-ds", "Did you mean 'tiny-sd'"), ("no/such/folder", "Unknown pipeline"), (".", "no model_index.json")],
)
def test_unknown_pipelines_are_refused_in_a_sentence(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(name)


def test_a_pipeline_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PipelineError, match="Cannot open the pipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(PipelineError, match="but got 3"):
        load_pipeline(3)
    with pytest.raises(PipelineError, match="Unknown pipeline"):
        load_pipeline("x" * 400)


def test_truncated_weights_are_named(tmp_path):
    load_pipeline("tiny-sd").save_pretrained(tmp_path)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PipelineError, match="Cannot open the pipeline"):
        load_pipeline(tmp_path)
