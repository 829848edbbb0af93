"""The generated part of a documentation page, between two marker lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from t2i_align.errors import T2IError
from t2i_align.prompts import read_text
from t2i_align.runs import write_text

Picture = tuple[str, str, Image.Image]  # title, file name, image
Shown = tuple[str, Path]  # title, a picture that lies elsewhere


def fill_in(docs: Path, begin: str, end: str, parts: Sequence[str | Picture | Shown]) -> None:
    """Replace what stands between two marker lines by paragraphs and pictures.

    Images go to `images/` beside the page; those that lie elsewhere are linked.

    Raises:
        T2IError: the page lacks the markers.
    """
    text = read_text(docs)
    if begin not in text or end not in text:
        raise T2IError(f"Expected {docs} to have the lines {begin} and {end}: add them where the results belong.")
    paragraphs = []
    for part in parts:
        if isinstance(part, str):
            paragraphs.append(part)
            continue
        if len(part) == 2:
            title, path = part
            paragraphs.append(f"{title}\n\n![{title}]({os.path.relpath(path, docs.parent)})")
            continue
        title, name, image = part
        (docs.parent / "images").mkdir(exist_ok=True)
        image.quantize(128).save(docs.parent / "images" / name, optimize=True)
        paragraphs.append(f"{title}\n\n![{title}](images/{name})")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    write_text(docs, before + begin + "\n\n" + "\n\n".join(paragraphs) + "\n\n" + end + after)
