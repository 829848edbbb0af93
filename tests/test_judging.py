"""Judging scorers: accuracy with intervals, calibration, stability under changes, and the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_align.data.preferences import Preferences, Ranking
from t2i_align.errors import T2IError
from t2i_align.judging.accuracy import accuracy
from t2i_align.judging.changes import CHANGES, allowed, write_words
from t2i_align.judging.drawn import draw_preferences
from t2i_align.judging.judge import judge
from t2i_align.judging.paraphrases import paraphrases, read_paraphrases
from t2i_align.judging.samples import best_of, read_samples
from t2i_align.judging.score import collect, score
from t2i_align.playground.grammar import parse
from t2i_align.playground.proxies import measure_swaps
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
    (row,), distances, _ = judge([brightness()], {"shades": shades})
    assert row.accuracy.right == pytest.approx(4 / 5)  # three pairs, one, one wrong; the tie is no pair
    assert row.accuracy.pairs == 5
    assert row.flips == dict.fromkeys(CHANGES, 0.0)
    assert distances["shades"].shape == (1, 1)
    assert judge([brightness()], {"shades": shades}, limit=1).rows[0].accuracy.pairs == 3


def test_words_fool_a_scorer_that_reads_the_strip(shades):
    def strip(images):  # likes what is written on
        return images[:, :, -6:].amax((1, 2, 3)) - images[:, :, -6:].amin((1, 2, 3)) + 0.01 * images.mean((1, 2, 3))

    row = judge([load_reward(FunctionScorer(strip, "strip"))], {"shades": shades}).rows[0]
    assert row.fooled == 1
    assert judge([brightness()], {"shades": shades}).rows[0].fooled == 0


def test_paraphrases_say_the_same():
    found = dict(paraphrases("an orange star left of a red square on a gray background."))
    assert found == {
        "case": "An orange star left of a red square on a gray background.",
        "stop": "an orange star left of a red square on a gray background",
        "spelling": "an orange star left of a red square on a grey background.",
        "article": "a orange star left of an red square on an gray background.",
        "order": "a red square right of an orange star on a gray background",
    }
    for text in ("a red circle", "two green stars on a gray background", "a red star and a red circle"):
        facts = set(map(str, parse(text).facts()))
        assert all(set(map(str, parse(said).facts())) == facts for _, said in paraphrases(text))
    assert dict(paraphrases("A gray cat and the Dog!"))["spelling"] == "A grey cat and the Dog!"
    assert dict(paraphrases("A gray cat and the Dog."))["order"] == "The Dog and a gray cat."
    assert "order" not in dict(paraphrases("a cat and a dog in a park near a river"))
    assert [rule for rule, _ in paraphrases("hi!", {"hi!": ("hello!", "hi!")})] == ["case", "given"]


def test_a_scorer_of_letters_turns_under_paraphrases(shades, tmp_path):
    def capital(images, prompts):
        sign = torch.tensor([-1.0 if text[0].isupper() else 1.0 for text in prompts])
        return sign * images.mean((1, 2, 3))

    row = judge([load_reward(FunctionScorer(capital, "capital"))], {"shades": shades}).rows[0]
    assert row.reworded == {"case": 1.0, "stop": 0.0, "all": 0.5}
    table = tmp_path / "said.csv"
    table.write_text("prompt,paraphrase\nprompt 0,Another\nprompt 0,the same\nprompt 1,\n")
    given = read_paraphrases(table)
    assert given == {"prompt 0": ("Another", "the same")}
    again = judge([load_reward(FunctionScorer(capital, "capital"))], {"shades": shades}, given=given).rows[0]
    assert again.reworded["given"] == 0.5
    assert judge([brightness()], {"shades": shades}).rows[0].reworded == {}  # it reads no prompt
    with pytest.raises(T2IError, match="columns prompt and paraphrase"):
        read_paraphrases("prompt")


def test_what_a_scorer_refuses_is_no_paraphrase_for_it(tmp_path):
    found = draw_preferences(tmp_path, 4, seed=1)
    given = {ranking.prompt: ("a scarlet disc",) for ranking in found.rankings}
    row = judge([load_reward("verifier")], {"drawn": found}, given=given).rows[0]
    assert "given" not in row.reworded
    assert set(row.reworded.values()) == {0.0}  # gold reads its grammar's other words alike


@pytest.fixture
def samples(tmp_path):
    """Eight grey pictures of two prompts each, brighter ones darker in blue."""
    rng, folder = np.random.default_rng(0), tmp_path / "samples"
    folder.mkdir()
    rows = []
    for number in range(16):
        light, blue = rng.integers(0, 256, 2).tolist()
        Image.new("RGB", (64, 64), (light, light, blue)).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "prompt": f"a red {('circle', 'star')[number // 8]}"}))
    (folder / "results.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_samples_are_ranked_by_gold(samples):
    blue = load_reward(FunctionScorer(lambda images: images[:, 2].mean((1, 2)), "blue"))
    found = read_samples(str(samples), blue)
    assert [len(ranking.images) for ranking in found.rankings] == [8, 8]
    assert judge([blue], {"s": found}).rows[0].accuracy.right == 1
    plain = judge([blue, brightness()], {"s": read_samples(str(samples))})
    assert plain.rows[0].accuracy.pairs == 0
    assert 0 < plain.distances["s"][0, 1] < 2
    for file in samples.glob("*.png"):
        if file.stem not in ("0", "15"):
            file.unlink()
    (samples / "results.jsonl").unlink()
    with pytest.raises(T2IError, match="several images of a prompt"):
        read_samples(str(samples))


def test_optimisation_is_seen_in_gains_and_distances(samples):
    def channel(row):
        return load_reward(FunctionScorer(lambda images: images[:, row].mean((1, 2)), f"channel {row}"))

    red, blue = channel(0), channel(2)
    found = judge([red, blue, red + blue], {"base": read_samples(str(samples))}, base="base", best=2)
    assert list(found.gains) == [
        "best of 2 by channel 0",
        "best of 2 by channel 2",
        f"best of 2 by {(red + blue).name}",
    ]
    assert found.gains["best of 2 by channel 0"][0] > 0.2  # 0.56 expected of a Gaussian
    assert found.gains["best of 2 by channel 0"][0] > found.gains["best of 2 by channel 0"][1]
    assert set(found.distances) == {"base", *found.gains}
    values = torch.tensor([1.0, 3.0, float("nan"), 2.0, 5.0])
    assert best_of(values, [[0, 1, 2, 3], [4, 0]], 2) == [1, 3]


def test_swapped_colours_ask_for_binding():
    assert measure_swaps(load_reward("verifier"), 30)["right"] == 1
    bag = load_reward(FunctionScorer(lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]), "bag"))
    assert measure_swaps(bag, 30)["right"] == 0  # the same words: a tie


def test_an_image_under_two_prompts_is_scored_for_each(shades):
    first = shades.rankings[0]
    images = collect([first, first._replace(prompt="another"), first])
    assert len(images.names) == 6
    assert images.places[0] == images.places[2]
    assert score(brightness(), images, only=[0]).dtype == torch.float64


def test_drawn_preferences_are_the_verifiers(tmp_path):
    found = draw_preferences(tmp_path, 8, seed=1)
    gold = judge([load_reward("verifier")], {"drawn": found}).rows[0]
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
    assert results["captions"]["tiny_clip"]["colours swapped"]["scenes"] < 4
    assert set(results["captions"]) == {"tiny_clip", "mean(tiny_clip, tiny_pick)"}
    assert "Captions with one false fact" in (tmp_path / "out" / "index.html").read_text()
    code, _, err = cli(*words, "--rewards", "tiny_clip")
    assert code == 2
    assert "--overwrite" in err
    assert cli("rewards", "evaluate", "--rewards", "tiny_clip", "--no-playground", "--out", tmp_path / "no")[0] == 2
    words = ["rewards", "evaluate", "--rewards", "tiny_clip", "--no-playground", "--out", tmp_path / "no"]
    assert "nothing to judge" in cli(*words)[2]
    assert "--best-of 2 or more" in cli(*words, "--data", tmp_path / "test.json", "--best-of", 4)[2]
    code, _, err = cli("rewards", "evaluate", "--rewards", "rank(tiny_clip)", "--out", tmp_path / "no", "--scenes", 8)
    assert code == 2
    assert "cannot be judged" in err


def test_the_command_compares_base_and_optimised_samples(cli, samples, tmp_path):
    words = ["rewards", "evaluate", "--rewards", "jpeg_compressibility", "--gold", "verifier", "--no-playground"]
    more = shutil.copytree(samples, tmp_path / "more")
    sets = ["--base", samples, "--optimised", more, "--best-of", 2]
    code, _, err = cli(*words, *sets, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scorers"] == ["jpeg_compressibility", "verifier"]
    assert "best of 2 by jpeg_compressibility" in results["starc"]
    assert results["gains"][str(more)] == [0, None]  # grey pictures are all alike to the verifier
    assert "Under optimisation" in (tmp_path / "out" / "index.html").read_text()
    code, _, err = cli(*words, "--base", samples, "--best-of", 5, "--out", tmp_path / "no")
    assert code == 2
    assert "10 images of a prompt" in err
