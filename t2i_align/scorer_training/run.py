"""A scorer's training from its config: members are trained one after the other, combined, measured, written down."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from t2i_align.data.images import ImageError
from t2i_align.devices import resolve_device
from t2i_align.playground.data import pick_rows
from t2i_align.rewards import RewardError, Scorer, load_reward
from t2i_align.rewards.clip import TowerScorer
from t2i_align.rewards.trained import RUN, average_scorers, base_class, write_ensemble
from t2i_align.runs import open_folder
from t2i_align.scorer_training.blocks import ScorerRun, as_words, load_scorer_run
from t2i_align.scorer_training.data import Examples, Pictures, bootstrap, check, load, split, without_prompts
from t2i_align.scorer_training.heldout import HeldOut, gain, measure
from t2i_align.scorer_training.method import ScorerTraining
from t2i_align.scorer_training.model import Model, make_head, parameters_of
from t2i_align.training.checkpoints import BEST, FREE, State
from t2i_align.training.loop import fit
from t2i_align.training.method import Ctx

BEFORE, AFTER = "before", "after"


class TrainedScorer(NamedTuple):
    """A finished or paused run: its folder, updates made, whether all are, and what was measured by scorer."""

    folder: Path
    step: int
    finished: bool
    measured: dict[str, dict[str, float]]


@dataclass
class Parts:
    """All objects of a run, ready to train."""

    config: ScorerRun
    base: TowerScorer
    train: Examples
    held_out: Examples
    pictures: tuple[Pictures, Pictures]  # of training and of held-out examples
    device: torch.device

    def method(self, member: int) -> ScorerTraining:
        """A member at its start."""
        c, data = self.config, self.config.data
        merits = [merit for merits in self.train.merits for merit in merits]
        head = make_head(c, self.base.tower, merits).to(self.device)
        model = Model(self.base.tower, head, c.scorer, seed=c.train.seed + member)
        noise = data.noise, data.label_noise, c.train.seed
        made = ScorerTraining(
            model, self.train, c.objective.use, c.objective.ties, data.micro_batch, *noise, pictures=self.pictures[0]
        )
        return made.to(self.device)

    def rows(self, member: int) -> Callable[[int], list[int]]:
        """The rankings of each update: epochs in random order, of a member's own sample where it has one."""
        c = self.config
        sampled = c.ensemble.bootstrap and c.ensemble.members > 1
        chosen = bootstrap(self.train, c.train.seed, member) if sampled else list(range(len(self.train)))
        pick = partial(pick_rows, len(chosen), min(c.data.batch, len(chosen)), c.member(member).seed)
        return lambda step: [chosen[row] for row in pick(step).tolist()]


def train_scorer(
    config: Any,
    *,
    resume: bool = False,
    overwrite: bool = False,
    minutes: float | None = None,
    **overrides: Any,
) -> TrainedScorer:
    """Train a scorer as a config says.

    Args:
        config: a YAML file, a mapping of its blocks, or a `ScorerRun`.
        resume: go on in the run's folder from its newest checkpoint.
        overwrite: delete an earlier run in the folder.
        minutes: stop, with a checkpoint, after this much training time, that of earlier sessions included.
        overrides: changes such as `**{"train.steps": 50}`.

    Raises:
        T2IError: a config that cannot be run, with all problems in one message, before weights are loaded; or a run
            that cannot go on.
    """
    config = load_scorer_run(config, as_words(overrides))
    stored = config.model_copy(update={"out": None})  # a run folder may move
    folder = open_folder(config.folder, stored, resume=resume, overwrite=overwrite, free={"train": FREE})
    parts = make_parts(config, folder)
    watchers, spent = [], 0.0
    for member in range(config.ensemble.members):
        home = folder if config.ensemble.members == 1 else folder / f"member-{member}"
        left = None if minutes is None else max(0.0, minutes - spent / 60)
        state, watcher = train_member(parts, member, home, resume, left)
        spent += state.seconds
        if state.step < config.train.steps:
            return TrainedScorer(folder, state.step, False, {})
        write_member(parts, state, watcher, home / RUN)
        watchers.append(watcher)
    combine(config, folder)
    measured = judge(parts, folder)
    from t2i_align.scorer_training.card import write_card

    write_card(parts, folder, watchers, measured)
    return TrainedScorer(folder, config.train.steps, True, {name: row for name, (row, _) in measured.items()})


def make_parts(config: ScorerRun, folder: Path, plan: bool = False) -> Parts:
    """Read or draw the data, then open the base.

    Raises:
        T2IError: what cannot serve.
    """
    examples = load(config.data, folder, plan)
    train, held_out = split(examples, config)
    if config.evaluate.data is not None:
        held_out = load(config.evaluate.data, folder, plan)
        train = without_prompts(train, held_out)
    check(train, config, "data")
    check(held_out, config, "evaluate")
    device = resolve_device(config.scorer.device)
    base = load_base(config, device)
    fitted = base.tower.preprocessing
    both = Pictures(train.pictures, fitted), Pictures(held_out.pictures, fitted)
    return Parts(config, base, train, held_out, both, device)


def load_base(config: ScorerRun, device: torch.device) -> TowerScorer:
    """The scorer whose CLIP is trained."""
    block = config.scorer
    made: Any = base_class(block.use)(**block.options)
    made.eval().requires_grad_(False)
    return made.to(device)


def train_member(parts: Parts, member: int, home: Path, resume: bool, minutes: float | None) -> tuple[State, HeldOut]:
    """Train one member in its folder, or go on; one that is finished is loaded."""
    config = parts.config
    home.mkdir(parents=True, exist_ok=True)
    method = parts.method(member)
    watcher = HeldOut(config, home, method, parts.held_out, parts.pictures[1], parts.device)
    settings = config.member(member)
    options: dict[str, Any] = {"device": parts.device, "resume": resume, "minutes": minutes, "observer": watcher}
    return fit(method, parts.rows(member), settings, home, **options), watcher


def write_member(parts: Parts, state: State, watcher: HeldOut, folder: Path) -> None:
    """Write a member's scorer, of the averaged weights where the run averages, in the place of an earlier one."""
    config, method = parts.config, watcher.method
    if config.evaluate.keep == "best":
        state.load_weights(watcher.folder / "checkpoints" / BEST, watcher.kept["step"], "train again with --overwrite")
    half = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    use = config.scorer.use
    base = {"use": str(Path(use).resolve()) if Path(use).is_dir() else use, "options": config.scorer.options}
    with state.averaged():
        method.model.save(half, config.scorer.name, base, "preferences" if config.comparing else "scores")
    shutil.rmtree(folder, ignore_errors=True)
    half.rename(folder)


def combine(config: ScorerRun, folder: Path) -> None:
    """Make one scorer of several members' in `folder/scorer`."""
    count = config.ensemble.members
    if count == 1:
        return
    members, made = [folder / f"member-{n}" / RUN for n in range(count)], folder / RUN
    shutil.rmtree(made, ignore_errors=True)
    if config.ensemble.combine == "warm":
        average_scorers(members, made)
        return
    made.mkdir()
    for number, member in enumerate(members):
        shutil.copytree(member, made / f"member-{number}")
        rename(made / f"member-{number}", f"{config.scorer.name}.{number}")
    write_ensemble(made, config.scorer.name, [f"member-{number}" for number in range(count)])


def rename(folder: Path, name: str) -> None:
    """Give a trained scorer another name."""
    import json

    from t2i_align.rewards.trained import FACTS
    from t2i_align.runs import write_text

    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    write_text(folder / FACTS, json.dumps(facts | {"name": name}, indent=2) + "\n")


def judge(parts: Parts, folder: Path) -> dict[str, tuple[dict[str, float], Tensor]]:
    """What the base, each member and the result are worth on the held-out examples, opened as a user would; by name."""
    scorers: dict[str, Scorer] = {BEFORE: parts.base}
    if parts.config.ensemble.members > 1:
        for number in range(parts.config.ensemble.members):
            scorers[f"member {number}"] = load_reward(folder / f"member-{number}" / RUN, parts.device)
    scorers[AFTER] = load_reward(folder / RUN, parts.device)
    comparing, found = parts.config.comparing, {}
    for name, scorer in scorers.items():
        values, std = score(scorer, parts.held_out, parts.config.evaluate.batch_size)
        row = measure(values, std, parts.held_out, comparing)
        if name == BEFORE:  # it is on another scale than scores of the data
            row = {key: value for key, value in row.items() if key not in ("rmse", "mae", "within_std")}
        found[name] = row, values
    return found


def score(scorer: Scorer, examples: Examples, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """Scores (N,) of all pictures of examples, and their std; NaN for those that cannot be read."""
    from t2i_align.data.images import open_image

    rows, prompts, _, _ = examples.flat()
    mean, spread = torch.full((len(rows),), float("nan")), torch.full((len(rows),), float("nan"))
    has_std = False
    for first in range(0, len(rows), batch_size):
        able, pictures = [], []
        for at in range(first, min(first + batch_size, len(rows))):
            source = examples.pictures[rows[at]]
            try:
                pictures.append(open_image(source) if isinstance(source, str) else source)
                able.append(at)
            except ImageError:
                continue
        if not able:
            continue
        scores = scorer.scores(pictures, prompts[able], batch_size)
        mean[able] = scores.total.float().cpu()
        if scores.std is not None:
            has_std, spread[able] = True, scores.std.float().cpu()
    return mean, spread if has_std else None


def improvement(measured: dict[str, tuple[dict[str, float], Tensor]], parts: Parts) -> tuple[float, float, float]:
    """The gain in pairwise accuracy from the base to the result, with an interval."""
    return gain(measured[BEFORE][1], measured[AFTER][1], parts.held_out, parts.config.comparing)


def make_plan(config: ScorerRun) -> dict[str, str]:
    """What a run will do and take, by label: one batch is backpropagated, nothing is trained.

    tiny-sd's pictures are not drawn: scenes take their place.
    """
    parts = make_parts(config, config.folder, plan=True)
    method, settings = parts.method(0), config.train
    ctx = Ctx(settings.seed, 0, parts.device)
    rows = parts.rows(0)
    with torch.no_grad():
        batch = method.collect(ctx, rows(0))
    method.train()
    started = time.perf_counter()
    for term in method.losses(ctx, batch):
        term.loss.backward()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        started = time.perf_counter()
        some = parts.held_out.take(range(min(8, len(parts.held_out))))
        method.score(some, parts.pictures[1], config.evaluate.batch_size, parts.device)
        evaluation = (time.perf_counter() - started) * len(parts.held_out) / len(some)
    every, trained = parameters_of(method)
    members, evaluations = config.ensemble.members, settings.steps // config.evaluate.every + 2
    hours = members * (settings.steps * seconds + evaluations * evaluation) / 3600
    size = min(config.data.batch, len(parts.train))
    state = trained * 4 * (4 if settings.ema else 3)  # gradients, two moments, average
    drawn = " (scenes in the place of tiny-sd's pictures, which a run draws first)"
    return {
        "data": parts.train.summary() + (drawn if config.data.use == "playground" else ""),
        "held out": parts.held_out.summary(),
        "left out": "; ".join(parts.train.problems[:5]) or "none",
        "trained": f"{trained} of {every} numbers, {config.scorer.train} of {config.scorer.use}"
        + (f", {members} members, {config.ensemble.combine}" if members > 1 else ""),
        "updates": f"{settings.steps} of {size} rankings, {settings.steps * size / len(parts.train):.3g} epochs",
        "memory": f"{(every * 4 + state) / 2**30:.2f} GiB of weights and training state, and the activations",
        "time": f"about {hours:.2g} hours: {seconds:.3g} s an update, {evaluation:.3g} s an evaluation",
    }


def refuse_pipeline(pipeline: Any) -> None:
    """Raise RewardError where a pipeline was passed to a run that has none."""
    if pipeline is not None:
        raise RewardError("Expected no pipeline with a config that trains a scorer: leave it out.")
