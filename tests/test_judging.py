"""Judging scorers: accuracy with intervals, calibration, stability under changes, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.judging.accuracy import accuracy
from t2i_align.judging.changes import CHANGES, allowed, write_words
from t2i_align.judging.drawn import draw_preferences
from t2i_align.judging.judge import collect, judge, score
from t2i_align.rewards import FunctionScorer, load_reward


def brightness():
    return load_reward(FunctionScorer(lambda images: images.mean((1, 2, 3)), "brightness"))


def test_accuracy_counts_ties_half_and_leaves_nan_out():
    found = accuracy(np.array([1.0, 2.0, 0.0, -1.0, np.nan]), np.arange(5))
    assert found.right == 0.625
    assert found.pairs == 4
    assert found.low < 0.625 < found.high
    assert np.isnan(accuracy(np.array([np.nan]), np.array([0])).right)


def test_the_interval_covers_the_truth_and_knows_that_pairs_of_a_ranking_depend():
    """Coverage of 95 % intervals over 50 sets; the same wins ten times over add nothing."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(50):
        margins = np.where(rng.random(200) < 0.7, 1.0, -1.0)
        found = accuracy(margins, np.arange(200), seed=trial)
        hits += found.low <= 0.7 <= found.high
    assert hits >= 42  # 47.5 expected, sd 1.5
    once = accuracy(margins, np.arange(200))
    ten = accuracy(np.repeat(margins, 10), np.repeat(np.arange(200), 10))
    assert ten.high - ten.low == pytest.approx(once.high - once.low, rel=0.01)


def test_a_bradley_terry_scorer_is_calibrated_at_its_temperature():
    """5,000 pairs whose better one is drawn with P = sigmoid(d / 2): the temperature's standard error is about 3 %."""
    rng = np.random.default_rng(0)
    d = rng.normal(scale=3, size=5_000)
    margins = np.where(rng.random(len(d)) < 1 / (1 + np.exp(-d / 2)), d, -d)
    found = accuracy(margins, np.arange(len(d)))
    assert found.temperature == pytest.approx(2, rel=0.12)
    assert found.error < 0.03
    assert found.log_loss < 0.6
    wrong = accuracy(-margins, np.arange(len(d)))
    assert wrong.temperature == float("inf")
    assert wrong.log_loss == pytest.approx(np.log(2))
    assert np.isfinite(accuracy(np.ones(5), np.arange(5)).log_loss)  # all right: there is no best temperature


def test_changes_are_what_their_names_say():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    pixels = np.asarray(image)
    shifted = np.asarray(CHANGES["shift"](image))
    assert (shifted[1:, 1:] == pixels[:-1, :-1]).all()
    assert (np.asarray(CHANGES["flip"](image)) == pixels[:, ::-1]).all()
    for change in CHANGES.values():
        assert change(image).size == image.size
    assert not allowed("flip", "a cat LEFT of a dog")
    assert allowed("flip", "bright leftovers")
    assert allowed("jpeg", "a cat left of a dog")
    written = np.asarray(write_words(Image.new("RGB", (64, 64), "white"), "a red circle"))
    assert (written[:50] == 255).all()
    assert written[56:].min() == 0
    assert written[56:].max() > 128


@pytest.fixture
def shades(tmp_path):
    """Rankings of grey pictures; brighter is better, but for one pair."""
    rankings = []
    for number, levels in enumerate([(10, 200, 90), (250, 30), (40, 60), (120, 120)]):
        files = []
        for level in levels:
            files.append(str(tmp_path / f"{number}-{len(files)}.png"))
            Image.new("RGB", (64, 64), (level,) * 3).save(files[-1])
        merits = tuple(float(level) for level in levels) if number != 2 else (1.0, 0.0)
        rankings.append(Ranking(f"prompt {number}", tuple(files), merits))
    return Preferences(tuple(rankings))


def test_a_scorer_is_judged_pair_by_pair(shades):
    (row,), distances = judge([brightness()], {"shades": shades})
    assert row.accuracy.right == pytest.approx(4 / 5)  # three pairs, one, one wrong; the tie is no pair
    assert row.accuracy.pairs == 5
    assert row.flips == dict.fromkeys(CHANGES, 0.0)
    assert distances["shades"].shape == (1, 1)
    assert judge([brightness()], {"shades": shades}, limit=1)[0][0].accuracy.pairs == 3


def test_words_fool_a_scorer_that_reads_the_strip(shades):
    def strip(images):  # likes what is written on
        return images[:, :, -6:].amax((1, 2, 3)) - images[:, :, -6:].amin((1, 2, 3)) + 0.01 * images.mean((1, 2, 3))

    row = judge([load_reward(FunctionScorer(strip, "strip"))], {"shades": shades})[0][0]
    assert row.fooled == 1
    assert judge([brightness()], {"shades": shades})[0][0].fooled == 0


def test_an_image_under_two_prompts_is_scored_for_each(shades):
    first = shades.rankings[0]
    images = collect([first, first._replace(prompt="another"), first])
    assert len(images.names) == 6
    assert images.places[0] == images.places[2]
    assert score(brightness(), images, only=[0]).dtype == torch.float64


def test_drawn_preferences_are_the_verifiers(tmp_path):
    found = draw_preferences(tmp_path, 8, seed=1)
    gold = judge([load_reward("verifier")], {"drawn": found})[0][0]
    assert gold.accuracy.right == 1
    assert gold.accuracy.pairs > 10
    assert all(ranking.merits[0] == 1 for ranking in found.rankings)


@pytest.mark.filterwarnings("ignore")
def test_the_command_writes_a_table_and_a_page(cli, tmp_path):
    rows = []
    for number in range(3):
        names = [f"{number}-{side}.png" for side in "ab"]
        for name, colour in zip(names, ("red", "blue"), strict=True):
            picture = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(picture).ellipse((12, 12, 50 - number, 50), fill=colour)
            picture.save(tmp_path / name)
        rows.append({"id": str(number), "prompt": "a red circle", "generations": names, "ranking": [1, 2]})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    words = ["rewards", "evaluate", "--data", tmp_path / "test.json", "--scenes", 4, "--out", tmp_path / "out"]
    code, out, _ = cli(*words, "--rewards", "tiny_clip, mean(tiny_clip, tiny_pick), jpeg_compressibility")
    assert code == 0
    assert "index.html" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    clip = next(row for row in results["sets"] if row["scorer"] == "tiny_clip" and row["data"].endswith("test.json"))
    assert clip["accuracy"]["right"] == 1
    assert clip["accuracy"]["pairs"] == 3
    assert len(results["starc"]["playground"]) == 3
    assert set(results["captions"]) == {"tiny_clip", "mean(tiny_clip, tiny_pick)"}
    assert "Captions with one false fact" in (tmp_path / "out" / "index.html").read_text()
    code, _, err = cli(*words, "--rewards", "tiny_clip")
    assert code == 2
    assert "--overwrite" in err
    assert cli("rewards", "evaluate", "--rewards", "tiny_clip", "--no-playground", "--out", tmp_path / "no")[0] == 2
    code, _, err = cli("rewards", "evaluate", "--rewards", "rank(tiny_clip)", "--out", tmp_path / "no", "--scenes", 8)
    assert code == 2
    assert "cannot be judged" in err
