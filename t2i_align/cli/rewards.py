"""`t2i-align rewards`: what can score an image here."""

from __future__ import annotations

import json
from typing import Annotated, Any

from typer import Option


def rewards(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List the scorers.

    What they need, whether gradients pass, their licence, and whether their weights are here.
    """
    from t2i_align.rewards import SCORERS, scorer_class

    rows = [_row(scorer_class(name)) for name in SCORERS]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from t2i_align.cli.tables import print_table

    shown = ("name", "needs", "differentiable", "unit", "license", "weights", "summary")
    print_table([{name: row[name] for name in shown} for row in rows])


def _row(scorer: Any) -> dict[str, Any]:
    missing = scorer.missing()
    needs = [*(["prompt"] if scorer.needs_prompt else []), *scorer.columns]
    return {
        "name": scorer.name,
        "needs": ", ".join(["image", *needs]),
        "differentiable": "yes" if scorer.differentiable else "no",
        "unit": scorer.unit,
        "license": scorer.license,
        "weights": f"missing: {missing}" if missing else "none" if scorer.source == "none" else "present",
        "summary": scorer.summary,
    }
