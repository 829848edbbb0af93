"""tiny-turbo: how the student is cut out of its teacher, its pairs and loss, resuming, and the shipped pipeline."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from t2i_align.config import load_config
from t2i_align.pipelines import load_pipeline
from t2i_align.playground.measure import measure_pipeline
from t2i_align.playground.turbo import (
    Distillation,
    TurboRecipe,
    build_student,
    draw_pairs,
    one_step_scheduler,
    pair_noise,
    train_turbo,
)
from t2i_align.rewards.tiny import WEIGHTS
from t2i_align.training import Ctx

FOLDER = WEIGHTS / "tiny-turbo"
CALL = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def teacher():
    return load_pipeline("tiny-sd")


def recipe(*changes):
    words = ["pairs=24", "steps=2", "batch=8", "train.steps=6", "train.log_every=2", "train.checkpoint_every=3"]
    words += ["train.precision=fp32"]  # most CPUs emulate bf16
    return load_config(TurboRecipe, None, [*words, *changes])


def test_the_student_starts_close_to_the_teachers_prediction_at_pure_noise(teacher):
    student = build_student(teacher.unet).eval()
    assert sum(p.numel() for p in student.parameters()) <= 5e6
    tokens = teacher.tokenizer(["two red stars"] * 4, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        text = teacher.text_encoder(tokens).last_hidden_state
        noise = pair_noise(0, [0, 1, 2, 3])
        one, other = (unet(noise, 999, text).sample.flatten() for unet in (student, teacher.unet))
    assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("up_blocks.0.resnets.0.conv1", [*range(96), *range(192, 288)]),  # from below 192, skip 192
        ("up_blocks.0.resnets.1.conv_shortcut", [*range(96), *range(192, 320)]),  # from below 192, skip 128
        ("up_blocks.1.resnets.0.conv1", [*range(96), *range(192, 320)]),
        ("up_blocks.1.resnets.1.conv1", [*range(256)]),
        ("down_blocks.1.resnets.0.conv1", [*range(128)]),
    ],
)
def test_the_cut_keeps_the_channels_that_belong_together(teacher, name, columns):
    old, new = (unet.get_submodule(name).weight for unet in (teacher.unet, build_student(teacher.unet)))
    assert torch.equal(new, old[: len(new)][:, columns])


def test_the_cut_keeps_values_and_gates_together(teacher):
    name = "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    old, new = (unet.get_submodule(name).weight for unet in (teacher.unet, build_student(teacher.unet)))
    half, full = len(new) // 2, len(old) // 2
    assert torch.equal(new[:half], old[:half, :96])
    assert torch.equal(new[half:], old[full : full + half, :96])


def test_the_loss_is_zero_for_the_teachers_own_latents(teacher, tmp_path):
    """With latents replaced by what the student itself reaches in one pipeline call, nothing is left to learn."""
    pairs = draw_pairs(teacher, recipe(), tmp_path)
    student = build_student(teacher.unet).eval()
    scheduler = one_step_scheduler(teacher.scheduler)
    parts = {**teacher.components, "unet": student, "scheduler": scheduler}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rows = [0, 5, 17]
    with torch.no_grad():
        reached = pipe(
            [pairs.captions[row] for row in rows], latents=pair_noise(0, rows), output_type="latent", **CALL
        ).images
    pairs.latents[rows] = reached
    method, ctx = Distillation(student, teacher, pairs, recipe()), Ctx(0, 0, torch.device("cpu"))
    (term,) = method.losses(ctx, method.collect(ctx, torch.tensor(rows)))
    assert term.stats["mse"].item() < 1e-6


def test_pairs_are_what_the_teacher_draws_and_are_drawn_once(teacher, tmp_path):
    pairs = draw_pairs(teacher, recipe(), tmp_path)
    assert pairs.latents.shape == (24, 8, 8, 8)
    assert pairs.latents.std().item() == pytest.approx(1, abs=0.4)
    file = tmp_path / "000000.safetensors"
    before = file.read_bytes()
    again = draw_pairs(teacher, recipe(), tmp_path)
    assert file.read_bytes() == before
    assert torch.equal(again.latents, pairs.latents)
    assert torch.equal(pair_noise(0, [3, 7])[1], pair_noise(0, [7])[0])
    assert type(teacher.scheduler).__name__ == "DDIMScheduler"  # the teacher is left as it was


def test_training_resumes_to_the_same_weights_and_writes_a_stock_pipeline(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_turbo(recipe(), load_pipeline("tiny-sd"), whole)
    shutil.copytree(whole / "checkpoints", parts / "checkpoints")
    (parts / "checkpoints" / "step-00000006.pt").unlink()
    train_turbo(recipe(), load_pipeline("tiny-sd"), parts, resume=True)
    weights = "tiny-turbo/unet/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    pipe = StableDiffusionPipeline.from_pretrained(whole / "tiny-turbo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", output_type="np", **CALL).images.shape == (1, 64, 64, 3)


def test_the_shipped_pipeline_is_stock_and_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12e6
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert json.loads((FOLDER / "card.json").read_text())["defaults"] == CALL


def test_one_step_keeps_most_of_the_teachers_gold():
    rows = measure_pipeline(load_pipeline(FOLDER), prompts=60, **CALL)
    gold = {(row["split"], row["kind"]): row["gold"] for row in rows}
    assert gold["train", "single"] > 0.6 * 0.95  # tiny-sd: 0.95
    assert gold["heldout", "single"] > 0.6 * 0.95


def test_gradients_reach_the_noise():
    pipe = load_pipeline(FOLDER)
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    call = StableDiffusionPipeline.__call__.__wrapped__  # without its no_grad
    images = call(pipe, ["a red circle"] * 2, latents=noise, output_type="pt", **CALL).images
    (gradient,) = torch.autograd.grad(images.sum(), noise)
    assert gradient.isfinite().all()
    assert (gradient.abs().flatten(1).sum(1) > 0).all()
    assert np.prod(images.shape) == 2 * 3 * 64 * 64
