"""The honest look at a run: held-out prompts, scorers that are not trained on, diversity, drift, pictures, curves."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from t2i_align.data.images import contact_sheet, to_tensors
from t2i_align.evaluation import Comparison, compare, draw
from t2i_align.keys import key
from t2i_align.pipelines.kernels import Step
from t2i_align.prompts import Prompts
from t2i_align.rewards import Scorer
from t2i_align.rewards.features import Extract, extract_features
from t2i_align.rewards.sets import vendi
from t2i_align.runs import append_jsonl, read_jsonl
from t2i_align.training.blocks import TRAINED, BudgetBlock, RunConfig
from t2i_align.training.checkpoints import BEST, State, keep_as_best, step_of, write_best
from t2i_align.training.curves import plot_curves
from t2i_align.training.distributed import World
from t2i_align.training.loop import Observer
from t2i_align.training.metrics import forget_after
from t2i_align.training.trackers import Trackers

if TYPE_CHECKING:
    from t2i_align.methods.base import OnPolicy

EVALUATIONS = "evaluations.jsonl"


@dataclass
class Judges:
    """What images are judged by: the trained reward, if there is one, scorers that are not trained on, an embedding."""

    reward: Scorer | None
    watch: dict[str, Scorer]
    features: Extract | None

    @property
    def scorers(self) -> dict[str, Scorer]:
        """By their names in an evaluation; the trained one is `reward`."""
        trained = {} if self.reward is None else {TRAINED: self.reward}
        return trained | self.watch


@dataclass
class Honest(Observer):
    """Evaluates a run every so many updates, and says when to stop.

    Step 0 is where the run starts: the base, unless `policy.start` names a LoRA to go on from. `evaluations.jsonl` has
    a row per evaluation: means, and the scores of every image. A run with `stop` keeps the weights of the evaluation
    with the best watched score in `checkpoints/best.pt`.

    Attributes:
        since: evaluations of earlier updates are not kept, since a better one's weights were lost.
        trained_prompts: how many of the prompts are trained on as well.
    """

    config: RunConfig
    folder: Path
    prompts: Prompts
    method: OnPolicy
    judges: Judges
    call: dict[str, Any]
    trackers: Trackers
    world: World
    rows: list[dict[str, Any]] = field(default_factory=list)
    base_pictures: list[Image.Image] = field(default_factory=list)
    since: int = 0
    trained_prompts: int = 0

    def look(self, state: State) -> bool:
        """Evaluate if it is time; True once the watched score has not risen for `patience` evaluations."""
        if not self.rows:  # of an earlier session
            self.rows = self.world.once(lambda: self._read(state.step))
            self._find_best(state)
        if self.due(state.step) and all(row["step"] != state.step for row in self.rows):
            self.rows.append(self.world.once(lambda: self._evaluate(state), state.sharded))
        return self.stopped

    def row(self, row: dict[str, float]) -> None:
        """Pass a row of metrics on to the trackers."""
        self.trackers.write(row["step"], row, "train")

    @property
    def shown(self) -> dict[str, float]:
        """What belongs beside the progress bar."""
        return {"kl": self.rows[-1]["kl"]} if self.rows else {}

    @property
    def watched_in_reward(self) -> tuple[str, ...]:
        """The watched scorers that are trained on all the same, as parts of the reward."""
        if not self.method.learns_reward or self.judges.reward is None:
            return ()
        trained = set(map(type, self.judges.reward.leaves()))
        watched = ((name, self.judges.scorers[name]) for name in self.judges.watch)
        return tuple(name for name, scorer in watched if trained & set(map(type, scorer.leaves())))

    def due(self, step: int) -> bool:
        """Whether a step, the first of a round, is evaluated: the first one at or after each multiple, and the last."""
        return is_due(step, self.config.evaluate.every, self.method.updates, self.config.train.steps)

    @property
    def best(self) -> dict[str, Any] | None:
        """The row with the best watched score within the budget, the earlier of equal ones; without `stop` the last.

        None without `stop` and budget.
        """
        return self._best_of(self.rows)

    @property
    def stopped(self) -> bool:
        """Whether the run should end. Evaluations of a method's first updates, which move nothing, do not count."""
        stop, best = self.config.evaluate.stop, self.best
        if any(not self.within(row) for row in self.rows):
            return True
        if stop is None or best is None:
            return False
        later = self.rows[self.rows.index(best) + 1 :]
        return sum(row["step"] > self.method.still for row in later) >= stop.patience

    def note(self, step: int) -> str:
        """Why a run has ended at a step before its last, and whether it has kept the weights it began with."""
        e, best, said = self.config.evaluate, self.best, ""
        if step < self.config.train.steps:
            why = "its time is up; --resume goes on"
            if any(not self.within(row) for row in self.rows):
                why = f"the policy is further from the base than evaluate.budget allows ({e.budget})"
            elif self.stopped and e.stop is not None:
                why = f"`{e.stop.watch}` has not risen for {e.stop.patience} evaluations (evaluate.stop)"
            said = f"Stopped at update {step} of {self.config.train.steps}: {why}. "
        if best is None and self.rows[-1]["step"] != step:
            said += f"Its last evaluation, and the scores here, are those of update {self.rows[-1]['step']}. "
        if best is not None and best["step"] == 0 and step:
            how = "within the budget" if e.stop is None else "better than the first"
            said += f"No later evaluation was {how}, so the weights are those that the run began with. "
        return said.strip()

    def comparisons(self, row: dict[str, Any]) -> dict[str, Comparison]:
        """An evaluation against that of step 0, by scorer."""
        scores = [{name: torch.tensor(values) for name, values in r["scores"].items()} for r in (self.rows[0], row)]
        return {name: compare(scores[0][name], scores[1][name]) for name in scores[0]}

    def within(self, row: dict[str, Any]) -> bool:
        """Whether an evaluation is within the budget; the first one is, wherever the run starts."""
        limits = self.config.evaluate.budget.model_dump()
        return row["step"] == 0 or all(limit is None or row[name] <= limit for name, limit in limits.items())

    def _best_of(self, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
        stop, budget = self.config.evaluate.stop, self.config.evaluate.budget
        rows = [row for row in rows if row["step"] >= self.since and self.within(row)]
        if not rows or (stop is None and budget == BudgetBlock()):
            return None
        if stop is None:
            return rows[-1]
        return max(rows, key=lambda row: -math.inf if math.isnan(row[stop.watch]) else row[stop.watch])

    def _find_best(self, state: State) -> None:
        """See to it that `best.pt` has the weights of the best row, in a session that goes on; else leave that row out.

        Its file may be damaged, or of a step that is made again, since a newer checkpoint was deleted.
        """
        if self.best is None:
            return
        path = self.folder / "checkpoints" / BEST
        held = self.world.once(lambda: step_of(path))
        if held is not None and held in (state.step, *(row["step"] for row in self.rows)):
            self.since = held  # rows before it are no better, or were lost in an earlier session
        best = self.best
        if best is None or best["step"] == held:
            return
        if best["step"] != state.step and not self.world.once(lambda: keep_as_best(self.folder, best["step"])):
            if self.world.first:
                print(
                    f"note: {path} has not the weights of update {best['step']}, the best evaluation, and no other "
                    f"checkpoint has them; the best from update {state.step} on is kept",
                    file=sys.stderr,
                )
            self.since = state.step
            best = self.best
        if best is not None and best["step"] == state.step:
            self.world.once(lambda: state.save(path, self.world.first), state.sharded)

    def _read(self, step: int) -> list[dict[str, Any]]:
        forget_after(self.folder / EVALUATIONS, step)
        return read_jsonl(self.folder / EVALUATIONS)

    def _evaluate(self, state: State) -> dict[str, Any]:
        """One row; where it is the best one, its weights are written first. The first process writes."""
        started = time.perf_counter()
        is_base = state.step == 0 and self.config.policy.start is None
        with state.averaged():
            images = self._draw(f"step {state.step}", plain=is_base)
            row = {"step": state.step} | self._judge(images) | self._measure(images)
            some = self.prompts[: self.config.evaluate.kl_images]
            row |= {"kl": 0.0, "chi2": 0.0} if is_base else drift_from_base(self.method, some, state.config.seed)
        row["seconds"] = round(time.perf_counter() - started, 2)
        self._keep_pictures(images, state.step, is_base)
        best = self._best_of([*self.rows, row]) is row
        if state.sharded:  # all processes write, or none: rounding may tell them different things
            best = self.world.collect(best)[0]
        if best:
            write_best(self.folder, state, self.world.first)
        if not self.world.first:
            return row
        append_jsonl(self.folder / EVALUATIONS, [row])
        marked = self.watched_in_reward
        plot_curves([*self.rows, row], list(self.judges.scorers), self.folder / "curves.png", marked)
        self.trackers.write(state.step, {k: v for k, v in row.items() if k not in ("step", "scores")}, "evaluate")
        return row

    def _draw(self, label: str, plain: bool) -> list[Image.Image]:
        """Pictures of the prompts, as a user would write them for the result or, `plain`, for the base."""
        e, pipe, shown = self.config.evaluate, self.method.tools.driver.pipe, self.world.first
        told, label = None if plain else self.method.as_used(self.prompts), f"evaluating {label}"
        return draw(pipe, self.prompts, e.images, e.seed, e.batch_size, label, shown, told, **self.call)

    def _judge(self, images: list[Image.Image]) -> dict[str, Any]:
        """Mean scores by scorer, the number of images without one, and all scores (prompts, images)."""
        many, shape = self.prompts.repeat(self.config.evaluate.images), (len(self.prompts), -1)
        totals = {name: scorer.scores(images, many).total.cpu() for name, scorer in self.judges.scorers.items()}
        means = {name: float(total.nanmean()) for name, total in totals.items()}
        invalid = sum(int(total.isnan().sum()) for total in totals.values())
        return means | {"invalid": invalid, "scores": {name: t.reshape(shape).tolist() for name, t in totals.items()}}

    def _measure(self, images: list[Image.Image]) -> dict[str, float]:
        """Diversity, by the embedding, and what images look like as pixels."""
        stacked = to_tensors(images)
        found = look_of(stacked if isinstance(stacked, Tensor) else torch.stack(stacked))
        if self.judges.features is None:
            return found
        features = extract_features(images, self.judges.features).float().cpu()
        found |= {"vendi": float(vendi(features))}
        if self.config.evaluate.images > 1:
            found["diversity"] = float(pairwise_distance(features, self.config.evaluate.images))
        return found

    def _keep_pictures(self, images: list[Image.Image], step: int, is_base: bool) -> None:
        """`samples/step-N.png`: the base's pictures above the current ones, same prompts and noise."""
        count, each = min(self.config.log.pictures, len(self.prompts)), self.config.evaluate.images
        pictures = images[: count * each : each]
        if not self.base_pictures:
            with self.method.policy.reference():
                self.base_pictures = pictures if is_base else self._draw("base", plain=True)[: count * each : each]
        if not self.world.first:
            return
        (self.folder / "samples").mkdir(exist_ok=True)
        zoom = max(1, 128 // pictures[0].width)
        sheet = contact_sheet([*self.base_pictures, *pictures], count, labels=["base", f"step {step}"], zoom=zoom)
        sheet.save(self.folder / "samples" / f"step-{step:06d}.png")


def is_due(step: int, every: int, updates: int, last: int) -> bool:
    """See `Honest.due`: for rounds of so many updates, and the last step of a run."""
    return step == 0 or step // every > (step - updates) // every or step >= last


@torch.no_grad()
def drift_from_base(method: OnPolicy, prompts: Prompts, seed: int) -> dict[str, float]:
    """How far the current model's chains of denoising steps are from the base's, on fresh training-type chains.

    `kl`: nats per image, the sum over steps of KL(p_theta(x_s | x_t) || p_base(x_s | x_t)) at latents of the current
    model: an unbiased estimate of the KL of whole chains, which bounds that of the images. `chi2`: the sum over steps
    of the mean chi-squared divergence, exp(2 KL) - 1 for two Gaussians of one standard deviation; that of whole chains
    is a product over steps and explodes (arXiv 2403.03185 has it for one step).
    """
    s, driver, call, kernel = method.settings, method.tools.driver, method.tools.call, method.kernel
    cond = driver.encode(method.as_used(prompts))
    seed = key(seed, "kl")
    x = driver.start(cond, s.steps, seed, **call)
    latents, kl, chi2 = [x], 0.0, 0.0

    def add(row: int, made: Step, after: Tensor) -> None:
        nonlocal kl, chi2
        if made.q.std.any():
            moved = torch.zeros(len(cond), device=x.device)
            with method.policy.reference():
                for first in range(0, len(cond), s.batch_size):
                    part = slice(first, first + s.batch_size)
                    base = driver.step(latents[-1][part], row, cond[part], s.steps, kernel, **call).q
                    moved[part] = made.q._replace(mean=made.q.mean[part]).kl(base)
            kl += float(moved.mean())
            chi2 += float((2 * moved.cpu().double()).clamp(max=600).expm1().mean())
        latents.append(after)

    driver.rollout(cond, s.steps, kernel, seed, on_step=add, batch_size=s.batch_size, start=x, **call)
    return {"kl": kl, "chi2": chi2}


def pairwise_distance(features: Tensor, group: int) -> Tensor:
    """1 - cosine between two images of one prompt, on average; features (n, D) in groups."""
    unit = torch.nn.functional.normalize(features, dim=1).reshape(-1, group, features.shape[1])
    cosines = unit @ unit.mT
    others = ~torch.eye(group, dtype=torch.bool)
    return 1 - cosines[:, others].mean()


def look_of(images: Tensor) -> dict[str, float]:
    """Of images (B, 3, H, W) in [0, 1]: what reward hacking shows in first.

    `sharpness`: mean absolute Laplacian of the luminance; `saturation`: mean of the largest less the smallest channel.
    """
    gray = images.mean(1, keepdim=True)
    stencil = images.new_tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    laplacian = torch.nn.functional.conv2d(gray, stencil)
    chroma = images.amax(1) - images.amin(1)
    return {"sharpness": float(laplacian.abs().mean()), "saturation": float(chroma.mean())}
