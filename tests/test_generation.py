import numpy as np
import pytest
import torch
from PIL import Image

import t2i_align as t2i
from t2i_align.generation import generate_samples
from t2i_align.jobs import GenerateJob, call_notes, run_generate
from t2i_align.pipelines import Driver
from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.prompts import Prompts
from tests.families import FAMILIES

CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}
PROMPTS = ["a red circle", "two green stars", "a red circle"]


@pytest.fixture(scope="module")
def pipe():
    return t2i.load_pipeline("tiny-sd")


def arrays(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_images_depend_on_prompt_seed_and_number_alone(pipe):
    whole = arrays(t2i.generate(pipe, PROMPTS, particles=3, seed=1, batch_size=9, **CALL))
    pieces = arrays(t2i.generate(pipe, PROMPTS, particles=3, seed=1, batch_size=2, **CALL))
    alone = arrays(t2i.generate(pipe, PROMPTS[1], particles=2, seed=1, **CALL))
    assert abs(whole - pieces).max() <= 1  # rounding of differently sized batches
    assert abs(whole[3:5] - alone).max() <= 1
    assert abs(whole - arrays(t2i.generate(pipe, PROMPTS, particles=3, seed=2, **CALL))).max() > 30


def test_equal_prompts_of_one_table_get_different_images(pipe):
    images = arrays(t2i.generate(pipe, PROMPTS, particles=1, **CALL))
    assert abs(images[0] - images[2]).max() > 30


def test_the_global_random_state_plays_no_part(pipe):
    torch.manual_seed(1)
    first = arrays(t2i.generate(pipe, "a red circle", **CALL))
    torch.manual_seed(2)
    assert (first == arrays(t2i.generate(pipe, "a red circle", **CALL))).all()


def test_jobs_name_the_images_wanted(pipe):
    table = Prompts(("a red circle", "two green stars"))
    samples = list(generate_samples(pipe, table, [(1, 2), (0, 0)], seed=0, batch_size=8, **CALL))
    assert [(s.row, s.particle, s.prompt) for s in samples] == [(1, 2, "two green stars"), (0, 0, "a red circle")]


def test_a_column_of_negative_prompts_goes_before_the_general_one(pipe):
    against = ["a blue square", "two red stars"]
    table = Prompts(tuple(PROMPTS[:2]), {"negative_prompt": (against[0], None), "seed": (1, 2)})
    both = t2i.generate(pipe, table, **CALL, negative_prompt=against[1])
    alone = [t2i.generate(pipe, p, **CALL, negative_prompt=n)[0] for p, n in zip(PROMPTS[:2], against, strict=True)]
    assert abs(arrays(both) - arrays(alone)).max() <= 1
    plain = arrays(t2i.generate(pipe, Prompts(tuple(PROMPTS[:2]), {"negative_prompt": ("", None)}), **CALL))
    assert (plain == arrays(t2i.generate(pipe, PROMPTS[:2], **CALL))).all()
    assert abs(arrays(both) - plain).max() > 30
    with pytest.raises(t2i.pipelines.PipelineError, match="takes no 'negative_prompt'"):
        t2i.generate(toy_pipeline(size=8), Prompts(("0",), {"negative_prompt": ("1",)}), steps=2)


def test_rows_without_a_negative_prompt_keep_the_pipeline_s_default():
    """SDXL's unguided branch without one is zero, not the embedding of an empty text."""
    pipe = FAMILIES["sdxl"]().pipe
    call = {"steps": 2, "guidance": 4.0, "seed": 3}
    table = Prompts(("a cat", "a dog", "a cat"), {"negative_prompt": ("blurry", None, "")})
    mixed = arrays(t2i.generate(pipe, table, **call))
    plain = arrays(t2i.generate(pipe, ["a cat", "a dog", "a cat"], **call))
    assert abs(mixed[0] - plain[0]).max() > 2
    assert abs(mixed[1:] - plain[1:]).max() <= 1
    driver = Driver(pipe, guidance_scale=4.0)
    cond, alone = driver.encode(table), driver.encode(table.text)
    x = driver.start(cond, 2, seed=0)
    with torch.no_grad():
        guided, default = driver.predict(x, 0, cond, 2), driver.predict(x, 0, alone, 2)
    torch.testing.assert_close(guided[1:], default[1:])
    assert (guided[0] - default[0]).abs().max() > 1e-4
    one = arrays(t2i.generate(pipe, ["a cat", "a dog"], prompt_2="a style", **call))
    assert abs(one - plain[:2]).max() > 2
    assert driver.encode(table.text, prompt_2="a style").call(0)[0].shape == alone.call(0)[0].shape


def test_flux_wants_another_guidance_for_negative_prompts(tmp_path):
    FAMILIES["flux-dev"]().pipe.save_pretrained(tmp_path / "flux")
    job = GenerateJob(prompts=("a",), pipeline=str(tmp_path / "flux"), negative="blurry")
    call = job.model_copy(update={"keywords": {"true_cfg_scale": 4}}).resolved().call()
    assert (call["true_cfg_scale"], "guidance_scale" in call) == (4, False)
    pipe = t2i.load_pipeline(tmp_path / "flux")
    assert any("--keyword true_cfg_scale=4" in note for note in call_notes(job, pipe))


def test_an_alias_brings_its_defaults():
    (image,) = t2i.generate("tiny-sd", "a red circle", seed=3)
    (same,) = t2i.generate("tiny-sd", "a red circle", seed=3, num_inference_steps=25)
    assert image.size == (64, 64)
    assert (np.asarray(image) == np.asarray(same)).all()


def test_packed_latents_are_drawn_by_a_kernel_at_any_size(tmp_path):
    FAMILIES["flux-dev"]().pipe.save_pretrained(tmp_path / "flux")
    job = GenerateJob(
        prompts=("a red circle",), pipeline=str(tmp_path / "flux"), particles=2, steps=2, kernel="flow_sde(0.7)",
        height=16, width=48,
    )  # fmt: skip
    rows = run_generate(job, tmp_path / "out", device="cpu")
    for row in rows:
        with Image.open(tmp_path / "out" / row["image"]) as image:
            assert image.size == (48, 16)


def test_a_batch_size_of_nothing_is_refused(pipe):
    with pytest.raises(t2i.T2IError, match="batch size of 1 or more"):
        t2i.generate(pipe, "a red circle", batch_size=0)


def test_a_loaded_pipeline_keeps_its_cards_defaults(pipe):
    (by_object,) = t2i.generate(pipe, "a red circle", seed=3)
    (by_name,) = t2i.generate("tiny-sd", "a red circle", seed=3)
    assert (np.asarray(by_object) == np.asarray(by_name)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance_scal": 2.0}, "Did you mean 'guidance_scale'"),
        ({"steps": 5000}, "at most 1000 steps"),
        ({"particles": 0}, "1 or more particles"),
    ],
)
def test_calls_a_pipeline_would_misread_are_refused(pipe, call, message):
    with pytest.raises(t2i.T2IError, match=message):
        t2i.generate(pipe, "a red circle", **call)
