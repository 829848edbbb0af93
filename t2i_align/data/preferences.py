"""Human preferences in the formats they are published in: rankings of images of one prompt, read row by row.

    found = read_preferences("pairs.jsonl")
    found.pairs()                              # Pair(prompt, image_0, image_1, label, ranking), ties with label 0.5
    found.rankings                             # what they come from
    print(found.summary())                     # how many, and which rows were left out, and why

Images are names that `open_image` takes: files, `SHARD.tar/MEMBER`, `TABLE.parquet/ROW/COLUMN`. Nothing is decoded
here. A row that cannot serve is reported and left out; the rest goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from t2i_align.config import nearest
from t2i_align.data.files import split_cell, split_member, tar_index, walk
from t2i_align.data.images import walk_images
from t2i_align.data.tables import BEYOND, TABLES, Row, parquet_columns, stream_table
from t2i_align.errors import T2IError
from t2i_align.prompts import Prompts, read_text

SHOWN = 5  # rows that were left out, in a summary
PAIRS_FILE = "pairs.jsonl"
CHOICES = "choices.json"  # a person's, among images that `generate` drew: see `t2i_align/choices.py`
FOLDERS = (("w", "l"), ("win", "lose"), ("better", "worse"), ("chosen", "rejected"))  # of paired images

# What columns can say: two images with labels; the better and the worse; a list of images with ranks (1 is best) or
# labels (larger is better); one image a row with a rank or label, rows of one `group` belonging together.
FORMS = (
    ("image_0", "image_1", "label_0"),
    ("better", "worse"),
    ("images", "ranks"),
    ("images", "labels"),
    ("image", "rank"),
    ("image", "label"),
)
FIELDS = ("prompt", "group", "label_1", *dict.fromkeys(field for form in FORMS for field in form))

# Where published sets have these; the first whose columns are all there is taken.
LAYOUTS: dict[str, dict[str, str]] = {
    "Pick-a-Pic": {
        "prompt": "caption",
        "image_0": "jpg_0",
        "image_1": "jpg_1",
        "label_0": "label_0",
        "label_1": "label_1",
    },
    "pairs.jsonl": {name: name for name in ("prompt", "image_0", "image_1", "label_0", "label_1")},
    "open-image-preferences": {"prompt": "prompt", "better": "chosen", "worse": "rejected"},
    "better and worse": {"prompt": "prompt", "better": "better", "worse": "worse"},
    "HPDv2 train.json": {"prompt": "prompt", "images": "file_path", "labels": "human_preference"},
    "HPDv2 test.json": {"prompt": "prompt", "images": "image_path", "ranks": "rank"},
    "ImageReward test.json": {"prompt": "prompt", "images": "generations", "ranks": "ranking"},
    "ImageRewardDB": {"prompt": "prompt", "group": "prompt_id", "image": "image", "rank": "rank"},
    "liked images": {"prompt": "prompt", "image": "image", "label": "label"},
    "scored images": {"prompt": "prompt", "image": "image", "label": "score"},
}


class Ranking(NamedTuple):
    """Images of one prompt and how good each is: larger `merits` are better, equal ones tie; they have no unit.

    A single image has its score, or the label 1 if it was liked and 0 if not.
    """

    prompt: str
    images: tuple[str, ...]
    merits: tuple[float, ...]


class Pair(NamedTuple):
    """Two images of a prompt: `label` is 1 where image 0 is better, 0 where image 1 is, 0.5 for a tie.

    `ranking`: number of the ranking it comes from; pairs of one are not independent.
    """

    prompt: str
    image_0: str
    image_1: str
    label: float
    ranking: int


@dataclass(frozen=True)
class Preferences:
    """What was read, and a sentence for each row that was left out."""

    rankings: tuple[Ranking, ...]
    problems: tuple[str, ...] = ()

    def pairs(self) -> Iterator[Pair]:
        """All pairs of every ranking, in order, ties among them."""
        for number, (prompt, images, merits) in enumerate(self.rankings):
            for a, b in combinations(range(len(images)), 2):
                label = 0.5 if merits[a] == merits[b] else float(merits[a] > merits[b])
                yield Pair(prompt, images[a], images[b], label, number)

    def decided(self) -> Prompts:
        """A row for each pair that is no tie, with the columns `better` and `worse`."""
        pairs = [pair for pair in self.pairs() if pair.label != 0.5]
        better = tuple(pair.image_0 if pair.label else pair.image_1 for pair in pairs)
        worse = tuple(pair.image_1 if pair.label else pair.image_0 for pair in pairs)
        return Prompts(tuple(pair.prompt for pair in pairs), {"better": better, "worse": worse})

    def judged(self) -> Prompts:
        """A row for each single image, with the columns `image` and `liked`.

        Raises:
            T2IError: labels that are neither 0 nor 1, such as scores, or ranks of images that nothing groups.
        """
        alone = [ranking for ranking in self.rankings if len(ranking.images) == 1]
        strange = next((ranking for ranking in alone if ranking.merits[0] not in (0.0, 1.0)), None)
        if strange is not None:
            raise T2IError(
                f"Expected the label 1, liked, or 0 of each single image but {strange.images[0]} has "
                f"{strange.merits[0]:g} (ranks count negative): make labels of scores by a threshold, or name the "
                "column that groups the images of a prompt by columns: {group: NAME}."
            )
        columns = {
            "image": tuple(ranking.images[0] for ranking in alone),
            "liked": tuple(ranking.merits[0] == 1 for ranking in alone),
        }
        return Prompts(tuple(ranking.prompt for ranking in alone), columns)

    def summary(self) -> str:
        """For people: how many there are, and what was left out."""
        pairs = [pair.label for pair in self.pairs()]
        alone = sum(len(ranking.images) == 1 for ranking in self.rankings)
        said = f"{len(pairs)} pairs, {pairs.count(0.5)} of them ties, in {len(self.rankings) - alone} rankings"
        said += f"; {alone} single images" if alone else ""
        if not self.problems:
            return said
        more = "" if len(self.problems) <= SHOWN else f"; and {len(self.problems) - SHOWN} more"
        return f"{said}; {len(self.problems)} rows left out: {'; '.join(self.problems[:SHOWN])}{more}"


def read_preferences(
    source: str | Path,
    columns: Mapping[str, str] | None = None,
    root: str | Path | None = None,
    exist: bool = True,
) -> Preferences:
    """Read preferences.

    Args:
        source: a `.json` (list of objects), `.jsonl`, `.csv`, `.tsv` or `.parquet` file; a folder with a `pairs.jsonl`
            or with parquet files; a folder of `generate` with a `choices.json` that was filled in; or a folder of
            paired images, `w/NAME.png` better than `l/NAME.png`, with the prompt in a `.txt` of that name beside
            either.
        columns: which column has which of `FIELDS`; the layouts of `LAYOUTS` are known without.
        root: folder that image paths are relative to; that of the file by default.
        exist: leave out rows whose image files are not there; cells of parquet files are seen when they are opened.

    Raises:
        T2IError: nothing can be read, the columns are unknown, or no row can serve.
    """
    path, problems = Path(source), list[str]()
    if not path.exists():
        raise T2IError(f"No such file or folder: {path}.")
    found: list[Ranking] = []
    if path.is_dir() and (sides := _sides(path)):
        found += _read_folders(path, sides, problems)
    elif (folder := _chosen(path)) is not None:
        found += _read_choices(folder)
    else:
        for table in _tables(path):
            found += _read_table(table, columns, Path(root) if root is not None else table.parent, problems)
    if exist:
        gone = {number: said for number, ranking in enumerate(found) if (said := _absent(ranking))}
        problems += gone.values()
        found = [ranking for number, ranking in enumerate(found) if number not in gone]
    if not found:
        raise T2IError(f"Expected preferences in {path} but no row can serve: {'; '.join(problems[:SHOWN]) or 'none'}.")
    return Preferences(tuple(found), tuple(problems))


def _sides(folder: Path) -> tuple[str, str] | None:
    """The folders of better and worse images, if there are such."""
    return next((pair for pair in FOLDERS if all((folder / name).is_dir() for name in pair)), None)


def _chosen(path: Path) -> Path | None:
    """The folder of a person's choices, if the path means such."""
    folder = path.parent if path.name == CHOICES else path
    meant = path.name == CHOICES or not (path / PAIRS_FILE).is_file()
    return folder if meant and (folder / CHOICES).is_file() else None


def _read_choices(folder: Path) -> Iterator[Ranking]:
    """A ranking for each pair: choices need not order all images of a prompt."""
    from t2i_align.choices import read_choices
    from t2i_align.jobs import image_name

    job, pairs = read_choices(folder, chains=False)
    for row, edges in pairs.items():
        for edge in edges:
            yield Ranking(job.prompts[row], tuple(str(folder / image_name(row, i)) for i in edge), (1.0, 0.0))


def _tables(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise T2IError(f"Expected a folder or a file ending in {', '.join(TABLES)} but got {path}.")
        return [path]
    saved = path / PAIRS_FILE
    found = [saved] if saved.is_file() else [file for file in walk(path) if file.suffix.lower() == ".parquet"]
    if not found:
        sides = ", ".join(f"{better}/ and {worse}/" for better, worse in FOLDERS)
        raise T2IError(
            f"Expected {path} to hold a {PAIRS_FILE}, a {CHOICES}, parquet files, or folders {sides} but it has none."
        )
    return found


def _read_folders(folder: Path, sides: tuple[str, str], problems: list[str]) -> Iterator[Ranking]:
    """Images of the same name in two folders."""
    better, worse = (
        {file.relative_to(folder / side).with_suffix(""): file for file in walk_images(folder / side)} for side in sides
    )
    for name in dict.fromkeys([*better, *worse]):
        if name not in better or name not in worse:
            problems.append(f"{name}: it is in {sides[name not in better]}/ alone")
            continue
        texts = [file.with_suffix(".txt") for file in (better[name], worse[name])]
        text = next((file for file in texts if file.is_file()), None)
        if text is None:
            problems.append(f"{name}: no prompt in {texts[0].relative_to(folder)}")
            continue
        yield Ranking(read_text(text).strip(), (str(better[name]), str(worse[name])), (1.0, 0.0))


def _read_table(table: Path, columns: Mapping[str, str] | None, root: Path, problems: list[str]) -> Iterator[Ranking]:
    names, rows = _columns_and_rows(table)
    layout = find_layout(names, columns, table)
    groups: dict[Any, list[tuple[str, str, float]]] = {}
    for number, row in rows:
        try:
            ranking = _read_row(row, layout, root)
        except (T2IError, TypeError, ValueError) as error:
            problems.append(f"row {number} of {table.name}: {str(error).rstrip('.')}")
            continue
        if "group" not in layout:
            yield ranking
        else:
            known = groups.setdefault(row.get(layout["group"]), [])
            known.append((ranking.prompt, ranking.images[0], ranking.merits[0]))
    for members in groups.values():
        yield Ranking(members[0][0], tuple(image for _, image, _ in members), tuple(merit for _, _, merit in members))


def find_layout(names: Sequence[str], columns: Mapping[str, str] | None, source: Any) -> dict[str, str]:
    """Which column has which field: as told, or as the first known layout has it.

    Raises:
        T2IError: unknown fields, missing columns, or a layout that is none of the known ones.
    """
    if columns is None:
        for layout in LAYOUTS.values():
            if set(layout.values()) <= set(names):
                return layout
        known = "; ".join(f"{name} ({', '.join(layout.values())})" for name, layout in LAYOUTS.items())
        raise T2IError(
            f"Expected the columns of one of {known} in {source} but got {', '.join(names)}: say which column is which "
            f"by columns: {{prompt: NAME, better: NAME, worse: NAME}}, or other fields of {', '.join(FIELDS)}."
        )
    for field in columns:
        if field not in FIELDS:
            raise T2IError(f"Unknown field {field!r} of columns.{nearest(field, FIELDS)} Known: {', '.join(FIELDS)}.")
    absent = [name for name in columns.values() if name not in names]
    if absent:
        raise T2IError(f"Expected the columns {', '.join(absent)} in {source} but it has {', '.join(names)}.")
    if "prompt" not in columns or not any(set(form) <= set(columns) for form in FORMS):
        forms = " or ".join(f"({', '.join(form)})" for form in FORMS)
        raise T2IError(f"Expected columns to name prompt and one of {forms} but got {', '.join(columns)}.")
    return dict(columns)


def _read_row(row: Row, layout: Mapping[str, str], root: Path) -> Ranking:
    """One row as a ranking. Raises T2IError, TypeError or ValueError for one that cannot serve."""
    if BEYOND in row:
        raise T2IError("more cells than the header: put texts with commas in quotes")
    values: dict[str, Any] = {field: row.get(name) for field, name in layout.items()}
    absent = [layout[field] for field in values if values[field] is None and field != "label_1"]
    if absent:
        raise T2IError(f"no {', '.join(absent)}")
    if row.get("has_label") is False:  # Pick-a-Pic
        raise T2IError("it was not judged")
    prompt = str(values["prompt"]).strip()
    if not prompt:
        raise T2IError("an empty prompt")
    if "image_0" in values:
        images, label = [values["image_0"], values["image_1"]], float(values["label_0"])
        merits = [label, float(values["label_1"]) if values.get("label_1") is not None else 1 - label]
        if not any(merits):
            raise T2IError("neither image is preferred, and it is no tie, which is 0.5 for both")
    elif "better" in values:
        images, merits = [values["better"], values["worse"]], [1.0, 0.0]
    elif "images" in values:
        images = _listed(values["images"])
        worse = [-float(rank) for rank in _listed(values["ranks"])] if "ranks" in values else None
        merits = [float(label) for label in _listed(values["labels"])] if worse is None else worse
    else:
        images = [values["image"]]
        merits = [-float(values["rank"]) if "rank" in values else float(values["label"])]
    if len(images) != len(merits) or any(merit != merit for merit in merits):
        raise T2IError(f"{len(images)} images but {len(merits)} ranks or labels, each a number")
    return Ranking(prompt, tuple(_place(image, root) for image in images), tuple(merits))


def _listed(value: Any) -> list[Any]:
    """A list, or one as JSON in a csv cell."""
    return json.loads(value) if isinstance(value, str) else list(value)


def _place(image: Any, root: Path) -> str:
    """The name of an image that `open_image` takes."""
    if isinstance(image, Mapping):  # as the datasets library writes images that lie elsewhere
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise T2IError(f"expected the path of an image but got {image!r:.60}")
    if image.startswith(("http://", "https://")):
        raise T2IError(f"the image {image:.80} is an address: download it, and name the files")
    return image if os.path.isabs(image) else os.path.normpath(root / image)


def _absent(ranking: Ranking) -> str | None:
    """What is missing of a ranking's images."""
    for image in ranking.images:
        member, cell = split_member(image), split_cell(image)
        if cell is not None:
            continue
        there = Path(image).is_file() if member is None else member[1] in tar_index(member[0]).members
        if not there:
            return f"{ranking.prompt:.40}: no such image: {image}"
    return None


def _columns_and_rows(table: Path) -> tuple[list[str], Iterable[tuple[int, Row]]]:
    """The names of all columns, and the rows with their numbers, from 1; cells with images as names of them."""
    rows = stream_table(table, cells=str(table.absolute()))
    if table.suffix.lower() == ".parquet":  # too large for memory, maybe
        return parquet_columns(table).names, enumerate(rows, start=1)
    every = list(rows)
    return list(dict.fromkeys(name for row in every for name in row)), enumerate(every, start=1)
