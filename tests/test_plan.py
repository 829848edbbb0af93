"""`--dry-run`: what it counts, and its memory against what a training really takes."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.policy import Policy
from t2i_align.rewards import Scorer
from t2i_align.training import fit
from t2i_align.training.blocks import load_run
from t2i_align.training.distributed import ALONE
from t2i_align.training.plan import LiveTensors, counted, make_plan, standing
from t2i_align.training.run import make_parts
from t2i_align.training.run import train as run
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model": {"guidance": 3.0},
    "method": {"use": "grpo", "steps": 2, "trained_rows": 0.5},
    "reward": "jpeg_compressibility",
    "prompts": {"per_round": 1},
    "train": {"steps": 1, "checkpoint_every": 1},
    "evaluate": {"prompts": {"split": "heldout", "size": 2}, "images": 1, "steps": 1, "watch": [], "every": 50},
}


class Bright(Scorer):
    """A reward with gradients that loads nothing."""

    name, differentiable = "bright", True

    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


class Slow(Bright):
    """The same after 20 ms an image."""

    name = "slow"

    def forward(self, images, prompts):
        time.sleep(0.02 * len(images))
        return super().forward(images, prompts)


def fresh(family):
    """A pipeline at tiny size."""
    pipe = FAMILIES[family]().pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def memory(name):
    """Bytes of this process: VmRSS now, or VmHWM, the peak since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


DRAFT = {"method": {"use": "draft", "steps": 2, "keep": 2}, "reward": "tiny_clip"}
MEASURED = {  # batches of a group, other blocks, and other settings
    "LoRA": (1, {}, []),
    # moments are there from the second update on
    "all weights, averaged, in batches": (4, {}, ["policy.use=full", "train.ema=0.9", "train.steps=2"]),
    "through the decoder and a scorer": (1, DRAFT, []),
}


def measure(folder, name):
    """In a process of its own: the plan of a run, and by how much memory grows once libraries are loaded."""

    batches, blocks, words = MEASURED[name]

    def train(group, where):
        size = max(1, group // batches)
        config = load_run(CONFIG | blocks, [f"method.group={group}", f"method.batch_size={size}", *words])
        parts = make_parts(config, ALONE)
        fit(parts.method, lambda number: parts.pool.draw(0, number, 1), config.train, where)
        return parts

    train(2, Path(folder) / "warm")
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    parts = train(16, Path(folder) / "run")
    peak = memory("VmHWM")
    plan = make_plan(parts)
    print(json.dumps({"measured": peak - before, "planned": plan.memory.total, "parts": plan.memory}))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory accounting")
@pytest.mark.parametrize("name", MEASURED)
def test_planned_memory_is_near_the_measured_peak(tmp_path, name):
    code = "import sys; from tests.test_plan import measure; measure(*sys.argv[1:])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system, or it would be counted
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), name], env=environment, check=True, timeout=500, capture_output=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert 0.85 < found["planned"] / found["measured"] < 1.2


def test_weights_are_no_activations():
    """Views of what was there before, and results written into it, are not counted; what is made and kept is."""
    pairs = [(torch.nn.Linear(50, 50, bias=False), torch.nn.Tanh()) for _ in range(8)]  # tanh keeps its 200 bytes
    layers = torch.nn.Sequential(*[layer for pair in pairs for layer in pair]).requires_grad_(False)
    x = torch.zeros(1, 50, requires_grad=True)
    with LiveTensors() as tensors:
        layers(x).sum().backward()
    assert 8 * 200 <= tensors.peak < 50 * 50 * 4
    assert tensors.live == 200  # the gradient of x
    with LiveTensors() as tensors:
        x.grad.add_(1)
    assert tensors.peak == 0


def test_counts_are_those_of_a_whole_round():
    config = load_run(CONFIG | {"policy": {"use": "full"}})
    settings = {"use": "grpo", "group": 4, "steps": 5, "batch_size": 8, "epochs": 3, "trained_rows": 0.6, "beta": 0.01}
    config = config.model_copy(update={"method": config.method | settings})
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 30})})
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"per_round": 6})})
    parts = make_parts(config, ALONE, toy_pipeline(size=8))
    before = [p.detach().clone() for p in parts.method.parameters()]
    plan = make_plan(parts)
    assert (plan.rounds, plan.images, plan.evaluations) == (10, 24, 2)  # before the first update and after the last
    guided = 2  # network rows per image and step
    assert plan.drawn == 24 * 5 * guided
    assert plan.trained == 24 * 3 * guided * 2 * 3  # rows x (policy and its reference, for the KL) x epochs
    # two images of one step, without guidance as the toy has it; two chains, the base's beside all steps with noise
    assert plan.evaluated == 2 * 2 + 2 * guided * (5 + 4)
    assert plan.hours == pytest.approx((10 * plan.seconds + 2 * plan.evaluation_seconds) / 3600)
    assert all((p == q).all() for p, q in zip(before, parts.method.parameters(), strict=True))
    assert parts.method.settings.epochs == 3


@pytest.mark.parametrize(
    ("settings", "drawn", "trained"),
    [
        (
            {"use": "draft", "keep": 1},
            0,
            12 * (4 + 1 + 1) * 2,
        ),  # the kept step is computed again; guidance counts twice
        ({"use": "refl", "window": 0.01, "checkpointing": False}, 0, 12 * 5 * 2),
        ({"use": "nft", "group": 2, "kl": 0.0, "trained_rows": 0.6}, 12 * 5, 12 * 3 * 2),  # policy and old policy
        ({"use": "rwr", "group": 2, "levels": 2, "beta": 9.0}, 12 * 5 * 2, 12 * 2),
        ({"use": "diffusion_dpo", "online": True, "loss": "simpo"}, 12 * 5 * 2, 12),
    ],
)
def test_methods_on_gradients_and_finished_images_are_counted_too(settings, drawn, trained):
    size = {"steps": 5, "batch_size": 4}
    prompts = {"per_round": 12 if settings["use"] in ("draft", "refl") else 6}
    blocks = {"policy": {"use": "full"}, "reward": "tests.test_plan:Bright", "prompts": prompts}
    config = load_run(CONFIG | blocks | {"method": size | settings})
    plan = make_plan(make_parts(config, ALONE, toy_pipeline(size=8)))
    assert (plan.images, plan.drawn, plan.trained) == (12, drawn, trained)
    assert plan.memory.round > 0


EVALUATE = {"images": 3, "steps": 7, "guidance": 1.0, "kl_images": 1, "every": 4, "watch": ["tests.test_plan:Slow"]}


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        # Two evaluations of 2 x 3 guided images; one chain, and the base beside all its steps but the last.
        ({"evaluate.guidance": 3.0, "model.guidance": 1.0, "train.steps": 4}, 2 * 6 * 7 * 2 + (5 + 4)),
        ({"evaluate.kl_images": 9, "train.steps": 8}, 3 * 6 * 7 + 2 * 2 * 2 * (5 + 4)),  # there are two prompts
    ],
)
def test_evaluations_are_counted_by_their_own_steps_and_guidance(tmp_path, changes, rows):
    """By hand, and against what a run really does besides its rounds."""
    method = {"use": "grpo", "group": 2, "steps": 5, "batch_size": 2}
    blocks = {"policy": {"use": "full"}, "reward": "tests.test_plan:Bright", "method": method}
    blocks |= {"evaluate": CONFIG["evaluate"] | EVALUATE, "train": {"steps": 10, "checkpoint_every": 100}}
    blocks |= {"log": {"tensorboard": False}}
    words = [f"{name}={value}" for name, value in ({"out": tmp_path / "run"} | changes).items()]
    config, pipe = load_run(CONFIG | blocks, words), toy_pipeline(size=8)
    plan = make_plan(make_parts(config, ALONE, pipe))
    assert plan.evaluated == rows
    assert plan.evaluation_seconds > 6 * 0.02
    with counted(pipe.denoiser) as done:
        run(config, pipeline=pipe)
    assert done[0] == plan.evaluated + plan.rounds * (plan.drawn + plan.trained)


def test_a_run_that_starts_from_a_lora_draws_the_bases_pictures_too(tmp_path):
    Policy.lora(fresh("sd"), rank=2).save(tmp_path / "lora")
    blocks = {"policy": {"use": "lora", "start": str(tmp_path / "lora")}, "reward": "tests.test_plan:Bright"}
    blocks |= {"method": {"use": "grpo", "group": 2, "steps": 3, "batch_size": 2}, "log": {"tensorboard": False}}
    config = load_run(CONFIG | blocks, [f"out={tmp_path / 'run'}", "evaluate.guidance=2.0"])
    plan = make_plan(make_parts(config, ALONE, fresh("sd")))
    # Two images of one guided step in two evaluations and for the base; two guided chains in each evaluation, noise
    # in all their steps, since the scheduler ends above 0.
    assert plan.evaluated == 3 * 2 * 2 + 2 * 2 * 2 * (3 + 3)
    assert plan.evaluations == 2
    pipe = fresh("sd")
    with counted(pipe.unet) as done:
        run(config, pipeline=pipe)
    assert done[0] == plan.evaluated + plan.rounds * (plan.drawn + plan.trained)


@pytest.mark.parametrize("family", ["z-image", "z-image-turbo", "z-image-controlnet"])
def test_rows_are_counted_where_a_network_takes_lists(family):
    pipe, embeds, call, *_ = FAMILIES[family]()
    words = {"prompt": ["a", "b", "c"]} if embeds is None else embeds(3)
    with counted(pipe.transformer) as rows, torch.no_grad():
        pipe(**words, **call, num_inference_steps=2, output_type="latent")
    assert rows[0] == 3 * 2 * (2 if call["guidance_scale"] else 1)


def test_z_image_is_planned():
    blocks = {"policy": {"use": "lora"}, "reward": "tests.test_plan:Bright"}
    call = {"guidance": 0.0, "call": {"height": 32, "width": 32, "max_sequence_length": 64}}
    method = {"use": "grpo", "group": 2, "steps": 4, "batch_size": 2}
    config = load_run(CONFIG | blocks | {"method": method, "model": call}, ["evaluate.guidance=0.0"])
    plan = make_plan(make_parts(config, ALONE, fresh("z-image")))
    assert (plan.drawn, plan.trained) == (2 * 4, 2 * 3)


@pytest.mark.parametrize(
    ("change", "copies"), [("train.ema=0.9", 1), ("train.elastic_reset=2", 2), ("method.use=nft", 1)]
)
def test_copies_of_the_weights_are_counted(change, copies):
    blocks = {"policy": {"use": "full"}, "reward": "tests.test_plan:Bright", "train": {"steps": 4}}
    config = CONFIG | blocks | {"method": {"use": "rwr", "group": 2, "batch_size": 2}}
    plain, more = (make_parts(load_run(config, some), ALONE, toy_pipeline(size=8)) for some in ([], [change]))
    size = sum(p.numel() * p.element_size() for p in plain.method.policy.trainable())
    assert standing(more)[1] - standing(plain)[1] == copies * size


def test_the_training_state_is_what_is_held(tmp_path):
    blocks = {"policy": {"use": "full"}, "reward": "tests.test_plan:Bright"}
    train = {"steps": 2, "ema": 0.9, "elastic_reset": 8}
    config = load_run(CONFIG | blocks | {"train": train, "method": {"use": "rwr", "group": 2, "batch_size": 2}})
    parts = make_parts(config, ALONE, toy_pipeline(size=8))
    gradients = []
    for p in parts.method.policy.trainable():
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad.nbytes))
    state = fit(parts.method, lambda number: parts.pool.draw(0, number, 1), config.train, tmp_path)
    moments = [m for values in state.optimizer.state.values() for m in values.values() if m.ndim]
    copies = [state.average, state.elastic.start, state.elastic.average, parts.method.policy.weights.start]
    held = [*moments, *(tensor for copy in copies for tensor in copy.values())]
    assert standing(parts)[1] == max(gradients) + sum(tensor.nbytes for tensor in held)
    assert not parts.method.policy.weights.average


def test_the_clip_of_a_value_function_is_counted():
    blocks = {"policy": {"use": "full"}, "reward": "tests.test_plan:Bright"}
    config = CONFIG | blocks | {"method": {"use": "vard", "batch_size": 4}}
    clip = ["method.value.net=clip", "method.value.clip=tiny_pick"]
    plain, more = (make_parts(load_run(config, some), ALONE, toy_pipeline(size=8)) for some in ([], clip))
    seen = more.method.critic.source.tower.network
    assert standing(more)[0] - standing(plain)[0] == sum(p.numel() * p.element_size() for p in seen.parameters())
