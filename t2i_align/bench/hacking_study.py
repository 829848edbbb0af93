"""`t2i-align bench hacking-study`: runs that go on past their reward's optimum, with and without guards.

The reward is a sibling of tiny_pick, another one for each seed: one preference model, as one usually has. It is
differentiable, and DRaFT follows its gradient on a handful of prompts that come back in every update, which takes the
reward further than many prompts do; gold is the verifier. A cell is a run with one guard:

    none    the sibling alone
    lcb     the lower confidence bound of the three bootstrapped siblings, mean - k std
    kl      the sibling, and a KL to the base in the loss
    stop    the sibling; the run ends when gold stops rising, and the best weights are kept
    warm    the mean of the weights of whole networks (WARM, arXiv 2401.12187), made on the way from tiny_pick's data
    member  one of these networks alone: what warm is to be compared with

Every twelfth of a run gold, proxy and KL are measured on the prompts of training; the weights that are kept in the end
on held-out ones as well. The proxy is tiny_pick's mean for all, whatever is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING, Any

from PIL import Image

from t2i_align.arms import arms
from t2i_align.bench.cells import Result, Runs
from t2i_align.bench.recipes import COMMON, GOLD, METHODS, laid_over, precision
from t2i_align.bench.steering import bench_prompts
from t2i_align.bench.training import BATCH, COUNTS, PIPELINE, numbers, short
from t2i_align.config import load_config
from t2i_align.data.images import LABEL_HEIGHT
from t2i_align.errors import T2IError
from t2i_align.evaluation import draw
from t2i_align.methods import read_method
from t2i_align.pipelines import call_keywords, load_pipeline
from t2i_align.playground.pick import PickRecipe
from t2i_align.prompts import Prompts
from t2i_align.rewards import load_reward
from t2i_align.runs import environment, read_jsonl, write_text
from t2i_align.scorer_training.blocks import ScorerRun, load_scorer_run
from t2i_align.scorer_training.run import train_scorer
from t2i_align.training.blocks import RunConfig, load_run
from t2i_align.training.checkpoints import checkpoints, read_checkpoint
from t2i_align.training.honest import EVALUATIONS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROXY, SIBLINGS = "tiny_pick", 3
IMAGES, LOOKS, POINTS = 6_144, 12, 40
HANDFUL, EACH = 8, 16  # prompts of training, images of each at a look
EVALUATION = 3.0  # minutes that judging a cell takes
PROMPT_SEED, NOISE_SEED = 44_000, 45_000
PICTURES, GAP = 8, 2  # prompts of a strip of pictures, pixels between contact sheets' cells
SAMPLER = {"steps": 8, "guidance": 1.0}  # as training draws its images

# Blocks over those of the training bench, by method.
METHOD = "draft"  # of cells without a method in their names
FEW: dict[str, Any] = {"prompts": {"size": HANDFUL, "per_round": HANDFUL}}
BASES: dict[str, dict[str, Any]] = {
    METHOD: laid_over(METHODS["draft"], FEW | {"method": {"group": 2}, "train": {"learning_rate": 3e-5, "warmup": 10}}),
    "grpo": laid_over(METHODS["grpo"], FEW),
}
GUARDS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {},
    "lcb": {"reward": {"use": "lcb(tiny_pick, k=1)"}},
    "kl": {METHOD: {"kl": 2e-4}, "grpo": {"beta": 1e-3}},  # what the proxy gains per nat at a KL of some hundreds
    "stop": {"evaluate": {"stop": {"watch": GOLD, "patience": 3}}},
    "warm": {},
    "member": {},
}
MADE = {"warm": "scorer", "member": "member-0/scorer"}  # guards that train on what their networks' training makes
CONTROLS = {"warm": "member"}  # what guards are compared with; "none" where it is not said
UNGUARDED = "none"

# The networks of warm: tiny_pick's recipe, in another order of the data and at another rate for each.
PICK = PickRecipe()
NETWORKS: dict[str, Any] = {
    "scorer": {"name": PROXY, "use": "tiny_clip", "train": "full", "head": "cosine", "scale": PICK.scale},
    "data": {"use": "playground"} | PICK.model_dump(include={"prompts", "label_noise", "noise", "batch"}),
    "objective": {"ties": "drop"},
    "ensemble": {"members": 3, "bootstrap": False, "learning_rates": (3e-5, 5e-5, 1e-4), "combine": "warm"},
    "train": PICK.train.model_dump(include={"steps", "schedule", "warmup", "weight_decay", "ema"}),
    "evaluate": {"every": 60},
}


@dataclass(frozen=True)
class Cell:
    """A run: `guard` is one of `GUARDS`; `label` names a try of other settings, `words`."""

    guard: str
    seed: int
    images: int = IMAGES
    method: str = METHOD
    label: str = ""
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folders."""
        method = "" if self.method == METHOD else self.method
        return ".".join(part for part in (method, self.guard, f"s{self.seed}", self.label) if part)

    def reward(self, work: Path) -> dict[str, Any]:
        """What is trained on; `work`: folder of the runs."""
        if self.guard in MADE:
            return {PROXY: {"use": str(self.networks(work).folder / MADE[self.guard])}}
        return {PROXY: GUARDS[self.guard].get("reward", {"use": PROXY, "options": {"sibling": self.seed % SIBLINGS}})}

    def networks(self, work: Path) -> ScorerRun:
        """The training of the networks of `warm`: others for each seed, from the same pictures."""
        blocks = laid_over(laid_over(NETWORKS, precision()), {"train": {"seed": self.seed}})
        blocks["data"] |= {"samples": str(work / "networks")}
        return load_scorer_run(blocks | {"out": str(work / f"networks.s{self.seed}")})

    def config(self, out: Path) -> RunConfig:
        """The config of its run in the folder `out`.

        Raises:
            ConfigError: settings that do not fit together.
            T2IError: fewer images than the rounds of its evaluations have.
        """
        known = read_method({"use": self.method})[1].__class__.model_fields
        common = COMMON | {"method": {name: value for name, value in COMMON["method"].items() if name in known}}
        guard = GUARDS[self.guard]
        blocks = laid_over(laid_over(common, precision()), BASES[self.method])
        blocks["method"] = {"use": self.method} | blocks["method"] | guard.get(self.method, {})
        blocks["train"] |= {"steps": 1, "seed": self.seed}
        blocks["evaluate"] = {
            "prompts": {"split": "train"} | {name: blocks["prompts"][name] for name in ("kinds", "size")},
            "images": EACH,
            "watch": [GOLD, PROXY],
            "batch_size": BATCH,
            **SAMPLER,
            **guard.get("evaluate", {}),
        }
        blocks |= {"out": str(out), "reward": self.reward(out.parent)}
        blocks["log"] = {"tensorboard": False, "pictures": PICTURES}
        asked = load_config(RunConfig, blocks, self.words)  # to see the size of a round
        s = read_method(asked.method)[1]
        rounds, updates = self.images // (asked.prompts.per_round * s.group), s.epochs * s.minibatches
        if rounds < LOOKS:
            least = LOOKS * asked.prompts.per_round * s.group
            raise T2IError(f"Expected {least} images or more, a round per evaluation, but got {self.images}.")
        rounds -= rounds % LOOKS
        blocks["evaluate"]["every"] = rounds // LOOKS * updates
        blocks["train"] |= {"steps": rounds * updates, "log_every": max(1, rounds // POINTS) * updates}
        blocks["train"]["checkpoint_every"] = blocks["evaluate"]["every"]
        return load_run(blocks, self.words)


def cells(images: int = IMAGES, seeds: int = 3, method: str = METHOD) -> list[Cell]:
    """All cells of the study."""
    return [Cell(guard, seed, images, method) for seed in range(seeds) for guard in GUARDS]


class Study(Runs):
    """The study's runs; `prompts` are those that kept weights are judged on."""

    def base(self) -> Result:
        """The base's scores, measured once and kept in a file."""
        path = self.out / "base.json"
        if path.is_file():
            return self.known(path)
        result = {"prompts": self.prompts, "scores": self.measure(load_pipeline(PIPELINE, channels_last=True))}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(result) + "\n")
        return result

    def run(self, cell: Cell) -> Result | None:
        """The result of a cell, from its file or by going on with its run; None if time was up before.

        Raises:
            T2IError: the file is of a study with other settings; the run cannot go on.
        """
        path = self.path(cell)
        if path.is_file():
            return self.known(path, cell)
        if cell.guard in MADE:
            networks = cell.networks(self.work)
            if not (networks.folder / "README.md").is_file():  # the last that their training writes
                made = [checkpoints(networks.folder / f"member-{n}") for n in range(networks.ensemble.members)]
                spent = sum(read_checkpoint(found[-1])["seconds"] / 60 for found in made if found)
                if not train_scorer(networks, resume=True, minutes=spent + max(0.0, self.left)).finished:
                    return None
        config = cell.config(self.work / cell.name)
        done = self.trained(config)
        looks = read_jsonl(config.folder / EVALUATIONS)
        ended = done.step >= config.train.steps or (config.evaluate.stop is not None and given_up(looks, config))
        if not ended or self.left < min(EVALUATION, self.minutes / 2):
            return None
        self.base()
        result = self._describe(cell, config, looks, done.kept)
        pipe = load_pipeline(PIPELINE, channels_last=True)
        with arms(pipe, done.weights) as contexts, contexts["tuned"]:
            result["scores"] = self.measure(pipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        if cell.seed == 0:
            peak = max(looks, key=lambda look: look[GOLD])["step"]
            for name, step in {"before": 0, "peak": peak, "end": looks[-1]["step"], "kept": done.kept["step"]}.items():
                strip(config.folder / "samples" / f"step-{step:06d}.png").save(path.parent / f"{name}.png")
        write_text(path, json.dumps(result) + "\n")
        return result

    def measure(self, pipe: DiffusionPipeline) -> dict[str, list[float]]:
        """Gold and proxy, one number per prompt, and the siblings' disagreement."""
        table = self.prompts_of()
        call = call_keywords(PIPELINE, SAMPLER["steps"], SAMPLER["guidance"])  # type: ignore[arg-type]
        images = draw(pipe, table, 1, NOISE_SEED, BATCH, "drawing held-out images", **call)
        proxy = load_reward(PROXY).scores(images, table)
        assert proxy.std is not None
        scores = {"gold": load_reward(GOLD).scores(images, table).total, "proxy": proxy.total, "doubt": proxy.std}
        return {name: numbers(values) for name, values in scores.items()}

    def prompts_of(self) -> Prompts:
        """The prompts that kept weights are judged on; the looks of a run have others."""
        return bench_prompts(self.prompts, PROMPT_SEED, "heldout", min(self.prompts // 2, COUNTS["heldout"]))[0]

    def _describe(self, cell: Cell, config: RunConfig, looks: list[dict[str, Any]], kept: Mapping[str, Any]) -> Result:
        """What is kept of a run besides scores of its result: settings, cost, its path."""
        s = read_method(config.method)[1]
        per_update = config.prompts.per_round * s.group / (s.epochs * s.minibatches)
        state = read_checkpoint(checkpoints(config.folder)[-1])
        shown = {"gold": GOLD, "proxy": PROXY, "reward": "reward"}
        shown |= {name: name for name in ("kl", "diversity", "sharpness", "saturation")}
        blocks = ("policy", "prompts", "train")
        return {
            "cell": cell.name,
            **{name: getattr(cell, name) for name in ("guard", "method", "seed", "label", "words")},
            "reward": cell.reward(self.work),
            "budget": cell.images,
            "prompts": self.prompts,
            "images": round(state["step"] * per_update),
            "updates": state["step"],
            "seconds": round(state["seconds"], 1),
            "spread": {
                new: pstdev(sum(looks[0]["scores"][old], [])) for new, old in (("gold", GOLD), ("proxy", PROXY))
            },
            "looks": [
                {"images": round(row["step"] * per_update)}
                | {new: short(row[old]) for new, old in shown.items() if old in row}
                for row in looks
            ],
            "kept": [row["step"] for row in looks].index(kept["step"]),
            "config": {name: getattr(config, name).model_dump(mode="json") for name in blocks}
            | {"method": config.method},
            "environment": environment(),
        }


def given_up(looks: list[dict[str, Any]], config: RunConfig) -> bool:
    """Whether a run with `stop` has ended: its watched score has not risen for so many looks."""
    stop = config.evaluate.stop
    assert stop is not None
    values = [look[stop.watch] for look in looks]
    return len(values) - 1 - values.index(max(values)) >= stop.patience


def strip(path: Path) -> Image.Image:
    """The lower row of an evaluation's contact sheet: the pictures of its weights, in few colours."""
    sheet = Image.open(path).convert("RGB")
    height = (sheet.height - GAP - 2 * LABEL_HEIGHT) // 2
    top = sheet.height - height
    return sheet.crop((0, top, sheet.width, sheet.height)).quantize(256)
