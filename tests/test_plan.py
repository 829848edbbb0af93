"""`--dry-run`: what it counts, and its memory against what a training really takes."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2i_align.pipelines.toy import toy_pipeline
from t2i_align.rewards import Scorer
from t2i_align.training import fit
from t2i_align.training.blocks import load_run
from t2i_align.training.distributed import ALONE
from t2i_align.training.plan import make_plan, standing
from t2i_align.training.run import make_parts

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


def memory(name):
    """Bytes of this process: VmRSS now, or VmHWM, the peak since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(folder):
    """In a process of its own: the plan of a run, and by how much memory grows once libraries are loaded."""

    def train(group, where):
        config = load_run(CONFIG, [f"method.group={group}", f"method.batch_size={group}"])
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
def test_planned_memory_is_near_the_measured_peak(tmp_path):
    code = "import sys; from tests.test_plan import measure; measure(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=280, capture_output=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert 0.6 < found["planned"] / found["measured"] < 1.5


def test_counts_are_those_of_a_whole_round():
    config = load_run(CONFIG | {"policy": {"use": "full"}})
    settings = {"use": "grpo", "group": 4, "steps": 5, "batch_size": 8, "epochs": 3, "trained_rows": 0.6, "beta": 0.01}
    config = config.model_copy(update={"method": config.method | settings})
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 30})})
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"per_round": 6})})
    parts = make_parts(config, ALONE, toy_pipeline(size=8))
    before = [p.detach().clone() for p in parts.method.parameters()]
    plan = make_plan(parts)
    assert (plan.rounds, plan.images, plan.evaluations) == (10, 24, 1)
    guided = 2  # network rows per image and step
    assert plan.drawn == 24 * 5 * guided
    assert plan.trained == 24 * 3 * guided * 2 * 3  # rows x (policy and its reference, for the KL) x epochs
    assert plan.hours > 0
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
    assert plan.hours > 0
    assert plan.memory.round > 0


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
