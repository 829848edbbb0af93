"""Is it better? A pipeline with and without a LoRA on the same prompts and noise, by any scorers, with intervals.

Images of one prompt are averaged; what is compared are prompts, in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from scipy.stats import t as student
from torch import Tensor

from t2i_align.arms import arms
from t2i_align.errors import T2IError
from t2i_align.generation import generate_samples
from t2i_align.pipelines import call_keywords, check_call, load_pipeline
from t2i_align.progress import Progress
from t2i_align.prompts import Prompts
from t2i_align.report import write_report
from t2i_align.rewards import Scorer, check_reward, load_reward, split_rewards
from t2i_align.runs import folder_problems

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


LEVEL = 0.95
SHOWN = 60  # prompts in the page


class Interval(NamedTuple):
    """A mean over prompts with its 95 % confidence interval by Student's t; NaN for fewer than two prompts."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]")


class Comparison(NamedTuple):
    """One scorer: means without and with the LoRA, their paired difference, and how often prompts get better.

    `win_rate` counts a tie as half; `invalid` are images without a score in either arm, whose prompts' other images
    are compared.
    """

    base: Interval
    tuned: Interval
    gain: Interval
    win_rate: float
    prompts: int
    invalid: int


class Evaluation(NamedTuple):
    """Scores of every image, `scores[arm][scorer]` (prompts, images), comparisons by scorer, and the images.

    The arms are `base` and, where a LoRA is given, `tuned`; without one a comparison is of the base with itself.
    """

    prompts: Prompts
    scores: dict[str, dict[str, Tensor]]
    comparisons: dict[str, Comparison]
    images: dict[str, list[Image.Image]]


def evaluate(
    pipeline: str | Path | DiffusionPipeline,
    prompts: str | Sequence[str] | Prompts,
    rewards: str | Sequence[Any],
    lora: str | Path | None = None,
    *,
    images: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    device: str = "auto",
    html: str | Path | None = None,
    **call: Any,
) -> Evaluation:
    """Measure a pipeline on prompts, and what a LoRA changes.

    Args:
        pipeline: what `load_pipeline` takes; an object is left as it was.
        prompts: one text or many.
        rewards: scorers of different names: names, expressions, or what else `load_reward` takes.
        lora: what a training run wrote (its `lora` folder), or any LoRA that the pipeline opens.
        images: per prompt.
        seed: of the noise, which is the same in both arms.
        steps: denoising steps; the pipeline's own if None.
        guidance: guidance scale; the pipeline's own if None.
        batch_size: images that are drawn together.
        device: where a pipeline that is opened here goes, and scorers.
        html: a page to write: pictures side by side with their scores.
        call: other keywords of the pipeline's `__call__`.

    Raises:
        T2IError: anything unknown or missing; before the pipeline's weights are loaded where that can be known.
    """
    from t2i_align.devices import resolve_device

    if html is not None:
        check_page(Path(html))
    specs = split_rewards(rewards) if isinstance(rewards, str) else list(rewards)
    if not specs:
        raise T2IError("Expected one or more rewards but got none.")
    for spec in specs:
        if isinstance(spec, (str, Mapping)):
            check_reward(spec)
    if lora is not None and not Path(lora).exists():
        raise T2IError(f"No such LoRA: {lora}.")
    if lora is not None and (Path(lora) / "lora").is_dir():
        raise T2IError(f"Expected a LoRA but {lora} is the folder of a run: use {Path(lora) / 'lora'}.")
    if images < 1:
        raise T2IError(f"Expected 1 or more images per prompt but got {images}.")
    place, table = resolve_device(device), Prompts.of(prompts)
    if not len(table):
        raise T2IError("Expected one or more prompts but got none.")
    scorers = [load_reward(spec, place, base=pipeline if isinstance(pipeline, str) else None) for spec in specs]
    names = [scorer.name for scorer in scorers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise T2IError(
            f"Expected scorers of different names but got {', '.join(twice)} twice: name one of them, as in "
            "FunctionScorer(function, 'name')."
        )
    check_prompts(scorers, table)
    opened = isinstance(pipeline, (str, Path))
    pipe = load_pipeline(pipeline, device=place) if opened else load_pipeline(pipeline)
    call = call_keywords(pipeline, steps, guidance) | call
    check_call(pipe, call)
    drawn: dict[str, list[Image.Image]] = {}
    with arms(pipe, lora) as contexts:
        for arm, context in contexts.items():
            with context:
                drawn[arm] = draw(pipe, table, images, seed, batch_size, f"drawing {arm} images", **call)
    many = table.repeat(images)
    scores = {
        arm: {scorer.name: scorer.scores(made, many).total.cpu().reshape(len(table), images) for scorer in scorers}
        for arm, made in drawn.items()
    }
    tuned = scores["tuned" if "tuned" in scores else "base"]
    result = Evaluation(
        table, scores, {name: compare(values, tuned[name]) for name, values in scores["base"].items()}, drawn
    )
    if html is not None:
        write_page(Path(html), result)
    return result


def draw(
    pipe: DiffusionPipeline,
    prompts: Prompts,
    images: int,
    seed: int,
    batch_size: int,
    label: str,
    shown: bool = True,
    told: Prompts | None = None,
    **call: Any,
) -> list[Image.Image]:
    """`images` pictures of each prompt, group-major, by the pipeline's own sampler.

    `shown`: see `Progress`; `told`: see `generate_samples`.
    """
    jobs = [(row, number) for row in range(len(prompts)) for number in range(images)]
    made = []
    with Progress(len(jobs), label, shown=shown, batch=batch_size) as progress:
        for sample in generate_samples(pipe, prompts, jobs, seed=seed, batch_size=batch_size, told=told, **call):
            made.append(sample.image)
            progress.advance()
    return made


def check_prompts(scorers: Sequence[Scorer], prompts: Prompts) -> None:
    """Raise T2IError for a column that scorers miss or a prompt that they cannot score."""
    for scorer in scorers:
        scorer.check([], prompts)


def compare(base: Tensor, tuned: Tensor) -> Comparison:
    """Compare scores (prompts, images) of two arms."""
    means = [scores.double().nanmean(1) for scores in (base, tuned)]
    gain = means[1] - means[0]
    known = gain[~gain.isnan()]
    wins = (known > 0).double() + 0.5 * (known == 0)
    invalid = int((base.isnan() | tuned.isnan()).sum())
    rate = float(wins.mean()) if len(known) else math.nan
    return Comparison(interval(means[0]), interval(means[1]), interval(gain), rate, len(known), invalid)


def interval(values: Tensor) -> Interval:
    """The mean of independent values (n,) with its interval; those that are NaN are left out."""
    known = values.double()[~values.isnan()]
    n, mean = len(known), float(known.mean()) if len(known) else math.nan
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(student.ppf((1 + LEVEL) / 2, n - 1)) * float(known.std()) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def check_page(path: Path) -> None:
    """Raise T2IError for a page that cannot be written."""
    if path.is_dir():
        raise T2IError(f"Expected html to be a file to write but {path} is a folder: name a file in it.")
    for said in folder_problems(path.parent, "html"):
        raise T2IError(f"{said}.")


def write_page(path: Path, result: Evaluation) -> None:
    """An HTML page: the comparisons, and pictures side by side with their scores."""
    per_prompt = len(result.images["base"]) // len(result.prompts)
    rows = []
    for row, prompt in enumerate(result.prompts.text[:SHOWN]):
        rows.append(
            {
                "prompt": prompt,
                "arms": [
                    {
                        "name": arm,
                        "images": made[row * per_prompt : (row + 1) * per_prompt],
                        "scores": {name: float(values[row].nanmean()) for name, values in result.scores[arm].items()},
                    }
                    for arm, made in result.images.items()
                ],
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(
        path,
        "compare.html",
        comparisons=result.comparisons,
        rows=rows,
        tuned="tuned" in result.images,
        prompts=len(result.prompts),
        images=per_prompt,
    )
