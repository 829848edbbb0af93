"""The OCR reward: its formula, and RapidOCR on text that is drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_align.rewards import RewardError, load_reward
from t2i_align.rewards.ocr import OCR, levenshtein, match, wanted_text


def draw(text, size=(256, 96)):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).text((12, 28), text, fill="black", font_size=32)
    return picture


@pytest.mark.parametrize(("read", "value"), [("HE LLO world", 1.0), ("hallo", 0.8), ("", 0.0), ("zzzzzzzzzzz", 0.0)])
def test_the_published_formula(read, value):
    assert match(read, "hello") == pytest.approx(value)


def test_strict_counts_what_is_read_besides():
    assert match("hello hello hello", "hello") == 1
    assert match("hello hello hello", "hello", strict=True) == pytest.approx(1 / 3)
    assert match("HEL LO", "hello", strict=True) == 1
    assert match("", "hello", strict=True) == 0
    assert np.isnan(match("hello", " "))


@pytest.mark.parametrize(
    ("a", "b", "steps"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_levenshtein(a, b, steps):
    assert levenshtein(a, b) == levenshtein(b, a) == steps


def test_the_wanted_text_is_in_the_first_quotes():
    assert wanted_text('a sign "Open" next to "Closed"') == "Open"
    assert wanted_text("a sign “Open”") == "Open"
    assert wanted_text('a 5" screw') == wanted_text('an empty "" sign') == ""


def test_any_callable_reads_and_a_failure_is_no_score():
    seen = []

    def engine(pixels):
        seen.append(pixels)
        if pixels.mean() < 10:
            raise RuntimeError("too dark")
        return "Opem"

    scorer = OCR(engine)
    pictures = [draw("x"), Image.new("RGB", (256, 96))]
    with pytest.warns(RuntimeWarning, match="too dark"):
        total = scorer.scores(pictures, 'the word "open"').total
    assert total[0].item() == pytest.approx(0.75)
    assert total[1].isnan()
    assert seen[0].shape == (96, 256, 3)
    assert seen[0].dtype == np.uint8
    assert scorer.explain(pictures[0], 'the word "open"') == "wanted 'open', read 'Opem'"
    with pytest.raises(RewardError, match="no text between double quotes"):
        scorer.scores(pictures[0], "a sign")
    with pytest.raises(RewardError, match="'rapidocr' or a callable"):
        OCR("tesseract")


def test_rapidocr_reads_what_is_drawn():
    if missing := OCR.missing():
        pytest.skip(missing)
    scorer = load_reward("ocr")
    words = ["hello", "New York", "42 cats"]
    pictures = [draw(word) for word in words]
    total = scorer.scores(pictures, [f'a sign that says "{word}"' for word in words]).total
    assert torch.equal(total, torch.ones(3))
    total = scorer.scores(pictures, 'a sign that says "hallo"').total
    assert total[0].item() == pytest.approx(0.8)
    assert (total[1:] < 0.5).all()
    assert scorer.scores(Image.new("RGB", (64, 64), "white"), 'the word "hello"').total.item() == 0
    red = Image.new("RGB", (256, 96), (200, 0, 0))
    ImageDraw.Draw(red).text((12, 28), "stop", fill=(255, 255, 255), font_size=32)
    assert "stop" in scorer.explain(red, 'the word "stop"')
