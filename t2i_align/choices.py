"""A person's choices among generated images: `choices.json` beside them, read as pairs of a winner and a loser.

The file has an entry per prompt, which says any of

    best      2, or [0, 2]: better than all others of the prompt
    ranking   [3, [1, 2], 0]: best first, equals in brackets; images left out are not compared
    pairs     [[3, 0], [1, 0]]: the first is better than the second
    good, bad [0, 2], [1]: every good one is better than every bad one

Images are named by their number among the prompt's, columns of the contact sheet from 0. Prompts without a choice are
left out of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from t2i_align.config import ConfigError, Settings, load_config
from t2i_align.data.preferences import CHOICES
from t2i_align.errors import T2IError
from t2i_align.jobs import GenerateJob, image_name
from t2i_align.prompts import Prompts
from t2i_align.runs import CONFIG, write_text

FLAGS = '`t2i-align generate ... --kernel "ddim(1.0)" --choices`'
Pair = tuple[int, int]


class Choice(Settings):
    """What a person said of the images of one prompt."""

    row: int = Field(description="of the prompt, from 0")
    prompt: str | None = Field(None, description="its text, for the reader")
    best: int | tuple[int, ...] | None = Field(None, description="better than all others")
    ranking: tuple[int | tuple[int, ...], ...] = Field((), description="best first; equals in brackets")
    pairs: tuple[Pair, ...] = Field((), description="winner, loser")
    good: tuple[int, ...] = Field((), description="each better than all of `bad`")
    bad: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether nothing was chosen."""
        return self.best is None and not (self.ranking or self.pairs or self.good or self.bad)

    def named(self) -> set[int]:
        """All images that are mentioned."""
        ranked = {i for level in self.ranking for i in _several(level)}
        return {*_several(self.best), *ranked, *(i for pair in self.pairs for i in pair), *self.good, *self.bad}

    def edges(self, images: int) -> list[Pair]:
        """Pairs (winner, loser) of a prompt with so many images, each once."""
        best = _several(self.best)
        found = [(win, lose) for win in best for lose in range(images) if lose not in best]
        levels = [_several(level) for level in self.ranking]
        for place, level in enumerate(levels):
            found += product(level, (i for lower in levels[place + 1 :] for i in lower))
        return list(dict.fromkeys([*found, *self.pairs, *product(self.good, self.bad)]))


class Choices(NamedTuple):
    """Choices that were read and checked: the job that drew the images, pairs (winner, loser) by row of its prompts."""

    job: GenerateJob
    pairs: dict[int, list[Pair]]

    def prompts(self) -> Prompts:
        """The prompts with choices; the column `row` has their rows among the job's."""
        table = self.job.table()[list(self.pairs)]
        return Prompts(table.text, table.columns | {"row": tuple(self.pairs)})


def write_template(folder: Path, job: GenerateJob) -> Path:
    """Write `choices.json` for a person to fill in, unless there is one."""
    path = folder / CHOICES
    if not path.exists():
        empty: dict[str, Any] = {"best": None, "ranking": [], "pairs": [], "good": [], "bad": []}
        entries = [{"row": row, "prompt": prompt} | empty for row, prompt in enumerate(job.prompts)]
        lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
        write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    return path


def read_job(folder: str | Path, chains: bool = True) -> GenerateJob:
    """The job that drew the images of a folder.

    Args:
        folder: of `generate`.
        chains: whether the denoising steps are wanted, which only a stochastic kernel's can be drawn again; else the
            images alone.

    Raises:
        T2IError: not a folder of `generate`, or images without a stochastic kernel, whose chains have no log-probs.
    """
    from t2i_align.pipelines import load_kernel

    if not (Path(folder) / CONFIG).is_file():
        raise T2IError(f"Expected {folder} to be a folder that {FLAGS} wrote but it has no {CONFIG}.")
    try:
        job = load_config(GenerateJob, Path(folder) / CONFIG)
    except ConfigError as error:
        raise T2IError(f"Expected {folder} to be a folder that {FLAGS} wrote: {error}") from error
    if chains and (job.kernel is None or not load_kernel(job.kernel).stochastic):
        how = "the pipeline's own solver" if job.kernel is None else job.kernel
        raise T2IError(f"The images of {folder} were drawn by {how}, which has no log-prob: draw them by {FLAGS}.")
    if job.particles < 2:
        raise T2IError(f"Expected 2 or more images per prompt in {folder}, to choose among, but it has 1.")
    return job


def read_choices(folder: str | Path, chains: bool = True) -> Choices:
    """Read the choices in a folder of `generate`; `chains` as in `read_job`.

    Raises:
        T2IError: no such folder or file, or no choice in it.
        ConfigError: with everything that is wrong: unknown rows, images or keys; choices that contradict each other;
            prompts whose choices name no two different pictures.
    """
    folder = Path(folder)
    job, path = read_job(folder, chains), folder / CHOICES
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise T2IError(f"There is no {path}: `--choices` writes one to fill in.") from error
    except (OSError, ValueError) as error:
        raise T2IError(f"Expected {path} to be JSON but it cannot be read: {error}.") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise T2IError(f'Expected {path} to be a list of entries such as {{"row": 0, "best": 2}}.')
    pairs: dict[int, list[Pair]] = {}
    found: list[str] = []
    for number, entry in enumerate(entries):
        row = entry.get("row", f"of entry {number}")
        try:
            choice = load_config(Choice, entry)
        except ConfigError as error:
            found.append(f"row {row}: {str(error).partition(': ')[2].rstrip('.')}")
            continue
        if row in pairs:
            found.append(f"row {row} comes twice")
        elif not choice.empty:
            wrong = list(_problems(choice, job, folder))
            found += [f"row {row}: {text}" for text in wrong]
            pairs[row] = [] if wrong else choice.edges(job.particles)
    if found:
        count = "a problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"The choices in {path} have {count}: " + "; ".join(found) + ".")
    if not pairs:
        raise T2IError(f"Nothing is chosen in {path} yet: say of some prompts which image is best.")
    return Choices(job, dict(sorted(pairs.items())))


def _problems(choice: Choice, job: GenerateJob, folder: Path) -> Iterator[str]:
    """What is wrong with the choice of one prompt; only the first kind that is found."""
    if not 0 <= choice.row < len(job.prompts):
        yield f"there are prompts 0 to {len(job.prompts) - 1}"
        return
    text = job.prompts[choice.row]
    if choice.prompt not in (None, text):
        yield f"the prompt is {text!r}, not {choice.prompt!r}"
        return
    unknown = sorted(choice.named() - set(range(job.particles)))
    if unknown:
        yield f"no image {', '.join(map(str, unknown))}: they are 0 to {job.particles - 1}"
        return
    edges = choice.edges(job.particles)
    if not edges:
        yield "the choice says of no two images which one is better"
        return
    circle = _circle(edges)
    if circle:
        named = ", ".join(map(str, circle))
        yield f"the choices contradict each other: by way of others, images {named} are better than themselves"
        return
    files = {i: folder / image_name(choice.row, i) for edge in edges for i in edge}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        yield f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        return
    content = {i: file.read_bytes() for i, file in files.items()}
    for win, lose in edges:
        if content[win] == content[lose]:
            yield f"the images {win} and {lose} are the same picture"


def _circle(edges: Sequence[Pair]) -> list[int]:
    """The images that are better than themselves by way of some others, in order."""
    better = {win: {lose for first, lose in edges if first == win} for win, _ in edges}
    return [start for start in sorted(better) if start in _below(start, better)]


def _below(start: int, better: dict[int, set[int]]) -> set[int]:
    seen: set[int] = set()
    todo = [start]
    while todo:
        new = better.get(todo.pop(), set()) - seen
        seen |= new
        todo += new
    return seen


def _several(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
