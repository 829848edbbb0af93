"""`t2i-align bench values RUN`: is the value function of a vard run right about images that it has never seen?

The run's result draws images of held-out prompts by the steps of training. At every step the value function says what
it expects of the half-made image, and beside it stands what needs no learning: the reward of the decoded x0 prediction
of the base. Both are held against the reward of the finished image.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from t2i_align.bench.pages import fill_in
from t2i_align.bench.steering import bench_prompts
from t2i_align.bench.training import COUNTS
from t2i_align.bench.training_report import markdown
from t2i_align.errors import T2IError
from t2i_align.methods.vard import VARD
from t2i_align.runs import write_text
from t2i_align.training import Ctx
from t2i_align.training.blocks import PolicyBlock, RunConfig, load_run
from t2i_align.training.distributed import ALONE
from t2i_align.training.run import LORA, MODEL, make_parts
from t2i_align.values.calibration import calibrate, plot_calibration, within_prompts
from t2i_align.values.critic import PlugIn
from t2i_align.values.value import Served, is_value, load_value

BEGIN, END = "<!-- value calibration: begin -->", "<!-- value calibration: end -->"
PROMPT_SEED, SEED = 46_000, 47_000
PICTURE = "value-calibration.png"


class Predicted(NamedTuple):
    """Of n images: `value`, and `plugin`, the reward of the x0 prediction, (n, rows); `reward` (n,), all in its unit.

    `noise` (rows,): sigma where alpha^2 + sigma^2 = 1; `group`: images of a prompt, which are neighbours.
    """

    value: Tensor
    plugin: Tensor
    reward: Tensor
    noise: Tensor
    group: int


def open_run(folder: Path) -> RunConfig:
    """The config of a finished vard run, set to go on from its LoRA where it trained one.

    Raises:
        T2IError: not such a run, or one without trained weights or a learned value function.
    """
    if not (folder / "config.yaml").is_file():
        raise T2IError(f"Expected {folder} to be the folder of a run, with config.yaml.")
    config = load_run(folder / "config.yaml", [f"out={folder}"])
    full = config.policy.use == "full"
    result = folder / (MODEL if full else LORA)
    if config.method["use"] != "vard" or not is_value(folder / "value") or not result.is_dir():
        raise T2IError(
            f"Expected {folder} to be a finished vard run with {result.name}/ and value/ but got a run without."
        )
    return config if full else config.model_copy(update={"policy": PolicyBlock(start=str(result))})


@torch.no_grad()
def predict(folder: Path, prompts: int) -> Predicted:
    """Draw images of so many held-out prompts, as many of each as the run's group has, and predict their rewards."""
    config = open_run(folder)
    parts = make_parts(config, ALONE)
    method = parts.method
    assert isinstance(method, VARD)
    if config.policy.use == "full":
        method.policy.read(folder / MODEL)
    s, tools = method.settings, method.tools
    table = bench_prompts(prompts, PROMPT_SEED, "heldout", min(prompts // 2, COUNTS["heldout"]))[0]
    data = method.rollout(Ctx(SEED, 0, parts.device), table)
    source = method.critic.source
    value = load_value(folder / "value").to(parts.device)
    served, plugin = Served(value, source, s.batch_size), PlugIn(s.value, source, tools.reward, s.batch_size)
    x, cond, rows = data.traj.x, data.traj.cond, range(data.traj.steps)
    chunks = [slice(first, first + s.batch_size) for first in range(0, len(x), s.batch_size)]
    predictions = [served(x[:, row], row, cond) for row in rows]
    plain = [torch.cat([plugin.scaled(x[c, row], row, cond[c]) for c in chunks]) for row in rows]
    noise = torch.cat([source.angle(row, x[:1, row]) for row in rows]).sin()
    found = (torch.stack(predictions, 1), torch.stack(plain, 1), data.scores.total, noise)
    learned, unlearned, rewards, noise = (part.float().cpu() for part in found)
    return Predicted(learned, unlearned, rewards, noise, data.group)


def table_rows(found: Predicted) -> list[dict[str, str]]:
    """The cells of the table by column, noisiest row first."""
    both = zip(_columns(found.value, found), _columns(found.plugin, found), strict=True)
    rows = []
    for i, (noise, (value, plugin)) in enumerate(zip(found.noise.tolist(), both, strict=True)):
        row = {"row": str(i), "noise": f"{noise:.3f}"} | value
        rows.append(row | {f"{name}, x0": text for name, text in plugin.items()})
    return rows


def _columns(predicted: Tensor, found: Predicted) -> list[dict[str, str]]:
    names = ("correlation", "r2", "slope", "error")
    every = [{name: f"{getattr(row, name):.3f}" for name in names} for row in calibrate(predicted, found.reward)]
    within = within_prompts(predicted, found.reward, found.group)
    return [
        {"correlation": row["correlation"], "within": f"{one:.3f}"} | row
        for row, one in zip(every, within, strict=True)
    ]


def write_pages(folder: Path, found: Predicted, docs: Path | None) -> Sequence[dict[str, Any]]:
    """Write `heldout.json` and `heldout.png` into the run's `value/`, and the generated part of `docs`.

    Returns the rows of the table.
    """
    rows = table_rows(found)
    write_text(folder / "value" / "heldout.json", json.dumps(rows, indent=1) + "\n")
    plot_calibration(found.value, found.reward, folder / "value" / "heldout.png")
    if docs is not None:
        spread = float(found.reward[found.reward.isfinite()].std(correction=0))
        said = f"{len(found.reward)} images of held-out prompts, whose rewards have standard deviation {spread:.3f}."
        plot = Image.open(folder / "value" / "heldout.png").convert("RGB")
        title = "Mean rewards over mean predictions of groups of images, by row, noisiest first"
        fill_in(docs, BEGIN, END, [said, markdown(rows), (title, PICTURE, plot)])
    return rows
