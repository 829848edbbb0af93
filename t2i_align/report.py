"""Self-contained HTML reports: pictures travel inside the file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_align.runs import write_text

TEMPLATES = Path(__file__).parent / "templates"


def write_report(path: Path, template: str, **values: Any) -> None:
    """Fill `templates/TEMPLATE` (jinja2, autoescaped; the filter `picture` embeds a PIL image) and write it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["picture"] = picture
    write_text(path, environment.get_template(template).render(**values))


def picture(image: Image.Image) -> str:
    """A PIL image as a `data:` address."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
