"""The page of the published scorers says of every one of them what it must, and what it says is so."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.parity.ours import FIXTURES
from t2i_align.rewards import SCORERS, scorer_class

PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
HOME = {"verifier", "jpeg_compressibility", "jpeg_incompressibility", "tiny_clip", "tiny_pick"}  # not published ones


def table(*columns):
    """Rows of the page's table with these columns, by scorer."""
    lines = PAGE[PAGE.index("| " + " | ".join(columns) + " |") :].split("\n\n")[0].splitlines()[2:]
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        assert len(cells) == len(columns)
        assert all(cells)
        rows |= {name: dict(zip(columns, cells, strict=True)) for name in re.findall(r"`([^`]+)`", cells[0])}
    return rows


@pytest.fixture(scope="module")
def published():
    return table("scorer", "weights", "value", "gradient", "licence")


@pytest.fixture(scope="module")
def verified():
    return table("scorer", "keys and shapes", "numbers against the original", "largest relative error", "not verified")


def test_every_published_scorer_has_its_row(published, verified):
    assert set(published) == set(SCORERS) - HOME
    assert set(verified) == set(SCORERS) - HOME


def test_gradients_sources_and_licences_are_those_of_the_classes(published):
    for name, row in published.items():
        scorer = scorer_class(name)
        assert row["gradient"] == ("yes" if scorer.differentiable else "no"), name
        for file in scorer.files:
            if name not in ("vlm_rm", "aesthetic"):  # they name the CLIP
                assert (file.repo or file.url.split("/")[4]) in row["weights"] + published["image_reward"]["weights"]
        known = re.findall(r"MIT|Apache-2\.0|AGPL-3\.0", scorer.license)
        assert all(licence in row["licence"] for licence in known), name


def test_errors_are_within_the_bound_and_sizes_are_those_of_the_fixtures(verified):
    sizes = {name: {file.stem.rpartition("-")[2] for file in FIXTURES.glob(f"{name}-*.json")} for name in verified}
    for name, row in verified.items():
        error = row["largest relative error"].partition("(")[0].partition(", of a")[0]
        assert all(float(number) <= 1e-4 for number in re.findall(r"\de-\d+", error)), name
        assert ("full size" in error) == ("full" in sizes[name] or name == "hpsv2.1"), name
        assert "itself" in row["numbers against the original"] or not sizes[name], name


def test_four_originals_ran_at_full_size():
    full = {json.loads(file.read_text(encoding="utf-8"))["scorer"] for file in FIXTURES.glob("*-full.json")}
    assert full == {"image_reward", "cyclereward", "hpsv2", "pickscore"}
