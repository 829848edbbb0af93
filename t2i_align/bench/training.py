"""`t2i-align bench training`: training methods at an equal number of images on the playground.

A cell is a run: a method on a reward with a seed (`recipes.py` has the settings). Its training goes on from its last
checkpoint in as many calls as it takes; then its pictures are compared with the base's on the same prompts and noise,
and a small `result.json` is kept. Every cell is judged by gold, by the learned proxy and by the size of its files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from t2i_align.arms import arms
from t2i_align.bench.cells import Result, Runs
from t2i_align.bench.pairs import draw_pairs, read_note
from t2i_align.bench.recipes import (
    GOLD,
    IMAGES,
    LOOKS,
    MORE_LOOKS,
    OFFLINE,
    PAIRS,
    PASSES,
    REWARDS,
    recipe,
)
from t2i_align.bench.steering import bench_prompts
from t2i_align.config import load_config
from t2i_align.data.images import contact_sheet
from t2i_align.data.preferences import PAIRS_FILE
from t2i_align.errors import T2IError
from t2i_align.evaluation import draw
from t2i_align.methods import read_method
from t2i_align.pipelines import call_keywords, load_pipeline
from t2i_align.playground.world import SPLITS, Split
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer, load_reward
from t2i_align.rewards.features import extract_features, load_features
from t2i_align.rewards.pareto import hypervolume_2d
from t2i_align.runs import environment, read_jsonl, write_text
from t2i_align.training.blocks import RunConfig, Source, load_run
from t2i_align.training.checkpoints import checkpoints, read_checkpoint
from t2i_align.training.honest import EVALUATIONS, pairwise_distance
from t2i_align.training.prompts import read_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIPELINE = "tiny-sd"
JUDGES = {"gold": GOLD, "pick": "tiny_pick", "jpeg": "jpeg_compressibility", "clip": "tiny_clip"}
PROMPT_SEEDS: dict[Split, int] = {"train": 41_000, "heldout": 42_000}
COUNTS: dict[Split, int] = {"train": 240, "heldout": 48}  # captions of counts that there are
EACH = 2  # images per prompt
BATCH = 64
NOISE_SEED = 43_000
WORST = (0.0, -3.0)  # gold, minus kB: what hypervolumes are measured from
# Keywords of the pipeline in which cells are judged: as a user calls it, and as most runs draw their images.
SAMPLERS: dict[str, dict[str, Any]] = {
    "own": {},
    "short": {"num_inference_steps": 8, "guidance_scale": 1.0, "eta": 1.0},
}
POINTS = 40  # of a run's reward curve
CHECKPOINT_ROUNDS = 10
EVALUATION = 6.0  # minutes that the evaluation of a cell takes on two cores
SHOWN, COLUMNS = 16, 8  # prompts in a picture grid

Measured = dict[str, dict[str, dict[str, list[float]]]]  # sampler, split, name -> one number per prompt


@dataclass(frozen=True)
class Cell:
    """A run: `images` is how many it draws; `variant` names other `settings` of its method.

    `label` names a run that tries other settings, `words` such as `train.learning_rate=1e-4`.
    """

    method: str
    reward: str
    seed: int
    images: int = IMAGES
    variant: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    label: str = ""
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folders."""
        parts = (self.variant or self.method, self.reward, f"s{self.seed}", self.label)
        return ".".join(part for part in parts if part)

    @property
    def offline(self) -> bool:
        """Whether it learns from pairs that are drawn before."""
        return self.method in OFFLINE

    @property
    def pairs(self) -> str:
        """Of the folder of its pairs: tries of other settings learn from the same ones."""
        return f"pairs.{self.reward}.s{self.seed}.{self.images}"

    def config(self, out: Path) -> RunConfig:
        """The config of its run in the folder `out`; pairs lie beside it.

        Raises:
            ConfigError: settings that do not fit together.
            T2IError: fewer images, or pairs, than a round has.
        """
        blocks = recipe(self.method, self.reward)
        blocks["method"] = {"use": self.method} | blocks["method"] | dict(self.settings)
        blocks["train"] |= {"steps": 1, "seed": self.seed}
        blocks |= {"out": str(out), "reward": REWARDS[self.reward][0]}
        blocks["evaluate"] = {
            "prompts": {"split": "heldout", "kinds": blocks["prompts"]["kinds"], "size": 32},
            "watch": [GOLD],
            "batch_size": BATCH,
        } | blocks.get("evaluate", {})
        if self.offline:
            blocks["prompts"] |= {"use": "pairs", "path": str(out.parent / self.pairs / PAIRS_FILE)}
        blocks["log"] = {"tensorboard": False}
        asked = load_config(RunConfig, blocks, self.words)  # to see the size of a round
        s = read_method(asked.method)[1]
        rounds = self.images // (asked.prompts.per_round * s.group)
        if self.offline:
            rounds = PASSES * (read_note(out.parent / self.pairs) or {"pairs": 0})["pairs"] // asked.prompts.per_round
        if rounds < 1:
            raise T2IError(f"Expected the images of a round at least but got {self.images}: ask for more --images.")
        updates = s.epochs * s.minibatches
        blocks["evaluate"]["every"] = max(1, round(rounds / MORE_LOOKS.get(self.reward, LOOKS))) * updates
        blocks["train"] |= {"steps": rounds * updates, "log_every": max(1, rounds // POINTS) * updates}
        blocks["train"]["checkpoint_every"] = CHECKPOINT_ROUNDS * updates
        return load_run(blocks, self.words)


def cells(images: int = IMAGES, seeds: int = 3) -> list[Cell]:
    """All cells of the bench; `images` is the budget of those whose reward has none of its own."""

    def on(reward: str, methods: Sequence[str], count: int = seeds, **more: Any) -> list[Cell]:
        own = REWARDS[reward][1] or images
        return [Cell(method, reward, seed, own, **more) for seed in range(count) for method in methods]

    made = on("jpeg", ("grpo", "ddpo", "d3po", "prdp"), count=1)
    made += on("gold", ("grpo", "ddpo", "d3po", "prdp"))
    made += on("pick", ("grpo", "prdp"))
    made += on("gold-jpeg", ("grpo",))
    made += on("gold-jpeg", ("grpo",), variant="grpo-pareto", settings={"select": "pareto"})
    made += on("gold", ("vard", "nft", "rwr", "diffusion_dpo"))
    return made + on("clip", ("grpo", "refl", "draft", "alignprop"))


@dataclass
class Bench(Runs):
    """The bench's settings and what its cells share; networks load on first use.

    `prompts` are those of each split; `samplers`: keywords of the pipeline by the names that they have in results.
    """

    samplers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SAMPLERS)
    loaded: dict[str, Scorer] = field(default_factory=dict)

    def progress(self, cell: Any) -> str:
        """How far a cell is, in a word or two."""
        said = super().progress(cell)
        drawn = said == "to do" and cell.offline and read_note(self.work / cell.pairs)
        return f"{said}, pairs drawn" if drawn else said

    def prompts_of(self, split: Split) -> Prompts:
        """The prompts that cells are judged on."""
        return bench_prompts(self.prompts, PROMPT_SEEDS[split], split, min(self.prompts // 2, COUNTS[split]))[0]

    def base(self) -> Result:
        """The base's own scores, measured once and kept in a file; again where a judge is new."""
        path = self.out / "base.json"
        if path.is_file():
            known = self.known(path)
            if all(JUDGES.keys() <= split.keys() for made in known["scores"].values() for split in made.values()):
                return known
        made, pictures = self.measure(load_pipeline(PIPELINE, channels_last=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(pictures, path.parent / "base.png")
        result = {"prompts": self.prompts, "scores": made, "environment": environment()}
        write_text(path, json.dumps(result) + "\n")
        return result

    def run(self, cell: Cell) -> Result | None:
        """The result of a cell, from its file or by going on with its run; None if time was up before.

        Raises:
            T2IError: the file is of a bench with other settings; the run cannot go on.
        """
        path = self.path(cell)
        if path.is_file():
            return self.known(path, cell)
        if cell.offline and not self._pairs(cell):
            return None
        config = cell.config(self.work / cell.name)
        done = self.trained(config)
        missing = 1 if (self.out / "base.json").is_file() else 2  # evaluations
        if done.step < config.train.steps or self.left < min(missing * EVALUATION, self.minutes / 2):
            return None
        self.base()
        result = self._describe(cell, config)
        pipe = load_pipeline(PIPELINE, channels_last=True)
        with arms(pipe, done.weights) as contexts, contexts["tuned"]:
            result["scores"], pictures = self.measure(pipe, SPLITS[:1] if cell.label else SPLITS)
        path.parent.mkdir(parents=True, exist_ok=True)
        if cell.seed == 0:
            save_grid(pictures, path.parent / "after.png")
        write_text(path, json.dumps(result) + "\n")
        return result

    def _pairs(self, cell: Cell) -> bool:
        """Draw the pairs of a cell as other runs draw their images, for what is left of this call's minutes."""
        folder = self.work / cell.pairs
        if read_note(folder):
            return True
        blocks = recipe(cell.method, cell.reward)
        names, model = ("kinds", "size"), blocks["model"]
        table = read_source(Source(**{name: blocks["prompts"][name] for name in names}))
        call = call_keywords(PIPELINE, blocks["method"]["steps"], model["guidance"])
        pipe, scorer = load_pipeline(PIPELINE, channels_last=True), self.scorer(REWARDS[cell.reward][0])
        return bool(
            draw_pairs(folder, pipe, table, scorer, cell.images, PAIRS, cell.seed, lambda: self.left <= 0, **call)
        )

    def _describe(self, cell: Cell, config: RunConfig) -> Result:
        """What is kept of a run besides its pictures' scores: settings, drift, cost, curves."""
        s = read_method(config.method)[1]
        per_update = config.prompts.per_round * s.group / (s.epochs * s.minibatches)
        looks = read_jsonl(config.folder / EVALUATIONS)
        curve = read_jsonl(config.folder / "metrics.jsonl")
        state = read_checkpoint(checkpoints(config.folder)[-1])
        kept = ("model", "policy", "method", "prompts", "train")
        drawn = read_note(self.work / cell.pairs) if cell.offline else None  # all of them before the first update

        def images(step: int) -> int:
            return drawn["images"] if drawn else round(step * per_update)

        shown = {"gold": GOLD, "reward": "reward", "kl": "kl", "diversity": "diversity"}
        return {
            "cell": cell.name,
            **{name: getattr(cell, name) for name in ("method", "variant", "reward", "seed", "label", "words")},
            "expression": config.reward,
            "budget": cell.images,
            "prompts": self.prompts,
            "images": images(state["step"]),
            "updates": state["step"],
            "pairs": drawn and drawn["pairs"],
            "seconds": round(state["seconds"] + (drawn["seconds"] if drawn else 0.0), 1),
            "kl": looks[-1]["kl"],
            "curve": [[images(row["step"]), short(row["reward"])] for row in curve if "reward" in row],
            "looks": [
                {"images": images(row["step"])} | {new: short(row[old]) for new, old in shown.items() if old in row}
                for row in looks
            ],
            "config": {name: getattr(config, name).model_dump(mode="json") for name in kept if name != "method"}
            | {"method": config.method},
            "environment": environment(),
        }

    def measure(self, pipe: DiffusionPipeline, splits: Sequence[Split] = SPLITS) -> tuple[Measured, list[Image.Image]]:
        """Scores of a pipeline by sampler, split and name, one number per prompt; first images of the train split."""
        made: Measured = {}
        pictures: list[Image.Image] = []
        for sampler, call in self.samplers.items():
            made[sampler] = {}
            for split in splits:
                table, keywords = self.prompts_of(split), call_keywords(PIPELINE) | dict(call)
                label = f"drawing {split} images, {sampler} sampler"
                images = draw(pipe, table, EACH, NOISE_SEED, BATCH, label, **keywords)
                made[sampler][split] = self.judge(images, table)
                pictures = pictures or images[::EACH]
        return made, pictures

    def judge(self, images: list[Image.Image], table: Prompts) -> dict[str, list[float]]:
        """Per prompt: mean scores, distance of its images, hypervolume of their gold and file size."""
        many, shape = table.repeat(EACH), (len(table), EACH)
        scores = {name: self.scorer(spec).scores(images, many).total.reshape(shape) for name, spec in JUDGES.items()}
        features = extract_features(images, load_features("tiny_clip")).reshape(*shape, -1)
        worst = torch.tensor(WORST)
        both = torch.stack([scores["gold"], scores["jpeg"]], 2)
        kept = {name: values.mean(1) for name, values in scores.items()}
        kept["spread"] = scores["jpeg"].std(1)
        kept["diversity"] = torch.stack([pairwise_distance(rows, EACH) for rows in features])
        kept["hypervolume"] = torch.stack([hypervolume_2d(rows, worst) for rows in both])
        return {name: numbers(values) for name, values in kept.items()}

    def scorer(self, name: str) -> Scorer:
        """A scorer, loaded once."""
        if name not in self.loaded:
            self.loaded[name] = load_reward(name)
        return self.loaded[name]


def save_grid(pictures: list[Image.Image], path: Path) -> None:
    """Some of the pictures in rows, in few colours: small files. Half are of the first prompts, half of the last."""
    half = min(SHOWN, len(pictures)) // 2
    contact_sheet(pictures[:half] + pictures[-half:], COLUMNS).quantize(128).save(path, optimize=True)


def numbers(values: Tensor) -> list[float]:
    """With four digits after the point."""
    return [round(float(value), 4) for value in values]


def short(value: float) -> float:
    """With four digits."""
    return float(f"{value:.4g}")
