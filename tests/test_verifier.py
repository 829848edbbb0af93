import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_align.playground.grammar import COLOURS, OPPOSITE, SHAPES, CaptionError, Fact, Thing
from t2i_align.playground.measure import false_caption, measure_verifier, noise, round_trip
from t2i_align.playground.world import (
    BACKGROUND_RGB,
    RGB,
    SPLITS,
    Placed,
    Scene,
    sample_scene,
    sample_scenes,
    shape_outline,
)
from t2i_align.rewards import RewardError, load_reward
from t2i_align.rewards.verifier import look, report


def draw(*objects, background="white"):
    """A picture of (colour, shape, x, y, radius) objects, made without the world's own sampling."""
    scene = Scene(None, background, tuple(Placed(Thing(*o[:2]), *o[2:]) for o in objects))
    return np.asarray(scene.render())


def checks(pixels, text):
    return {str(fact): holds for fact, holds in report(pixels, text).checks}


RED = ("red", "circle", 18, 32, 10)
BLUE = ("blue", "square", 46, 32, 10)


@pytest.fixture(scope="module")
def measured():
    return measure_verifier(800)


@pytest.mark.parametrize("sort", ["object", "count", "relation", "background", "all"])
def test_true_facts_hold_and_false_ones_do_not(measured, sort):
    assert measured[sort]["right"] >= 0.995
    assert measured[sort]["false_accept"] <= 0.005
    assert measured[sort]["facts"] > 200


def test_noise_is_borne():
    noisy = measure_verifier(200, change=noise(8))["all"]
    assert noisy["right"] >= 0.97
    assert noisy["false_accept"] <= 0.02


def test_false_captions_are_false():
    for split in SPLITS:
        for index, scene in enumerate(sample_scenes(100, 1, split)):
            false, changed = false_caption(scene.caption, random.Random(index))
            assert changed
            assert not set(changed) & set(scene.caption.facts())
            assert set(changed) <= set(false.facts())


@pytest.mark.parametrize("background", BACKGROUND_RGB)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_thing_is_seen_for_what_it_is(background, shape):
    for colour in COLOURS:
        for radius in (8, 12, 17):
            (found,), ground = look(draw((colour, shape, 30.3, 33.6, radius), background=background))
            assert (found.colour, found.shape, ground) == (colour, shape, background)
            assert (found.x, found.y) == pytest.approx((30.3, 33.6), abs=2.2)


def test_a_blank_picture():
    for background in BACKGROUND_RGB:
        blank = draw(background=background)
        assert look(blank) == ([], background)
        held = checks(blank, "a red circle left of a blue square on a white background")
        assert held.pop("white background") == (background == "white")
        assert len(held) == 4
        assert not any(held.values())


def test_an_extra_object_breaks_the_count_only():
    held = checks(draw(RED, BLUE, ("green", "star", 32, 10, 8)), "a red circle left of a blue square")
    assert held == {
        "red circle present": True,
        "blue square present": True,
        "exactly 2 objects": False,
        "red circle left of blue square": True,
    }
    assert report(draw(RED, BLUE, ("green", "star", 32, 10, 8)), "a red circle left of a blue square").score == 0.75


def test_a_group_earns_each_object_it_has():
    stars = [("green", "star", x, y, 9) for x in (16, 48) for y in (16, 48)]
    scores = [report(draw(*stars[:n]), "three green stars").score for n in range(5)]
    assert scores == [0, 0.25, 0.5, 1, 0.75]


def test_swapped_colours():
    held = checks(draw(("blue", *RED[1:]), ("red", *BLUE[1:])), "a red circle left of a blue square")
    assert held == {
        "red circle present": False,
        "blue square present": False,
        "exactly 2 objects": True,
        "red circle left of blue square": False,
    }


@pytest.mark.parametrize(
    ("one", "other", "relation"),
    [
        ((16, 30), (48, 36), "left of"),
        ((48, 30), (16, 36), "right of"),
        ((30, 16), (36, 48), "above"),
        ((36, 48), (30, 16), "below"),
    ],
)
def test_only_the_relation_that_is_shown_holds(one, other, relation):
    pixels = draw(("red", "circle", *one, 9), ("blue", "square", *other, 9))
    for said in ("left of", "right of", "above", "below"):
        forth = report(pixels, f"a red circle {said} a blue square").score
        back = report(pixels, f"a blue square {said} a red circle").score
        assert forth == (1.0 if said == relation else 0.75)
        assert back == (1.0 if said == OPPOSITE[relation] else 0.75)


def test_two_equal_things_are_both_asked_for():
    text = "a red circle left of a red circle"
    assert report(draw(RED, ("red", "circle", 46, 32, 10)), text).score == 1
    assert checks(draw(RED), text) == {
        "red circle present": True,
        "2 x red circle present": False,
        "exactly 2 objects": False,
        "red circle left of red circle": False,
    }


def test_a_wrong_background():
    assert checks(draw(RED, background="gray"), "a red circle on a black background") == {
        "red circle present": True,
        "exactly 1 object": True,
        "black background": False,
    }


def test_a_shape_and_colour_outside_the_world_are_unknown():
    canvas = Image.new("RGB", (256, 256), BACKGROUND_RGB["white"])
    ImageDraw.Draw(canvas).rectangle([40, 110, 210, 140], fill=RGB["red"])
    (bar,), _ = look(np.asarray(canvas.resize((64, 64), Image.Resampling.LANCZOS)))
    assert (bar.colour, bar.shape) == ("red", "unknown")
    canvas = Image.new("RGB", (256, 256), BACKGROUND_RGB["white"])
    corners = [(128 + 50 * u, 128 + 50 * v) for u, v in shape_outline("star")]
    ImageDraw.Draw(canvas).polygon(corners, fill=(0, 255, 255))
    (star,), _ = look(np.asarray(canvas.resize((64, 64), Image.Resampling.LANCZOS)))
    assert (star.colour, star.shape) == ("unknown", "star")
    assert look(np.full((64, 64, 3), (255, 0, 255), np.uint8)) == ([], "unknown")


def test_specks_are_no_objects():
    pixels = draw(RED).copy()
    pixels[50:53, 50:53] = RGB["blue"]
    assert report(pixels, "a red circle").score == 1


@pytest.mark.parametrize("text", ["a red circle", "two green stars", "a red circle left of a blue square"])
def test_gray_noise_scores_low(text):
    rng = np.random.default_rng(0)
    for _ in range(5):
        levels = rng.integers(0, 256, (64, 64, 1), np.uint8).repeat(3, 2)
        smooth = np.asarray(Image.fromarray(levels[:8, :8]).resize((64, 64), Image.Resampling.BICUBIC))
        for pixels in (levels, smooth):
            seen = report(pixels, text)
            assert seen.score <= 0.5
            assert {fact.kind for fact, holds in seen.checks if holds} <= {"count"}  # what chance can give


def test_gray_copies_of_scenes_lose_their_objects():
    for scene in sample_scenes(30, 2):
        gray = np.asarray(scene.render().convert("L").convert("RGB"))
        held = report(gray, str(scene.caption)).checks
        assert not any(holds for fact, holds in held if fact.kind in ("object", "relation"))


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (512, 512), (100, 100)])
def test_larger_pictures_are_reduced(size):
    scores = []
    for scene in sample_scenes(20, 3, "heldout"):
        large = scene.render().resize(size, Image.Resampling.BICUBIC)
        scores.append(report(np.asarray(large), str(scene.caption)).score)
    assert np.mean(scores) > 0.99


def test_the_report_in_words():
    text = str(report(draw(RED, BLUE), "a red circle right of a blue square on a white background"))
    assert text == (
        "0.80 [yes: red circle present; yes: blue square present; yes: exactly 2 objects; "
        "NO: red circle right of blue square; yes: white background] "
        "seen: red circle at (18, 32), blue square at (46, 32) on white"
    )
    assert str(report(draw(), "a red circle")).endswith("seen: nothing on white")


def test_the_report_keeps_the_facts():
    assert report(draw(RED), "a red circle").checks == (
        (Fact("object", Thing("red", "circle"), 1), True),
        (Fact("count", number=1), True),
    )


def test_unreadable_captions_are_refused():
    with pytest.raises(CaptionError, match="'pink'"):
        report(draw(RED), "a pink circle")
    with pytest.raises(RewardError, match="cannot score 'a pink circle'"):
        load_reward("verifier").scores([draw(RED), draw(BLUE)], ["a red circle", "a pink circle"])


def test_scores_through_the_scorer():
    verifier = load_reward("verifier")
    images = [draw(RED), draw(BLUE), draw()]
    scores = verifier.scores(images, "a red circle")
    assert scores.total.tolist() == [1.0, 0.5, 0.0]
    assert scores.total.dtype == torch.float32
    assert scores.parts["verifier"].tolist() == [1.0, 0.5, 0.0]
    large = Image.fromarray(images[0]).resize((256, 256), Image.Resampling.BICUBIC)
    assert verifier.scores([images[1], large], ["a blue square", "a red circle"]).total.tolist() == [1.0, 1.0]


def test_no_images_have_no_scores():
    verifier = load_reward("verifier")
    assert verifier.scores(torch.empty(0, 3, 64, 64), []).total.shape == (0,)
    assert verifier.scores([], []).total.shape == (0,)


def test_scores_need_prompts_and_have_no_gradient():
    verifier = load_reward("verifier")
    with pytest.raises(RewardError, match="reads the prompt"):
        verifier.scores([draw(RED)])
    with pytest.raises(RewardError, match="not differentiable"):
        verifier.scores(torch.zeros(1, 3, 64, 64, requires_grad=True), "a red circle")


def test_facts_survive_the_shipped_autoencoder():
    from t2i_align.pipelines import load_pipeline

    table = measure_verifier(120, change=round_trip(load_pipeline("tiny-sd").vae))
    assert table["all"]["right"] >= 0.97
    assert table["all"]["false_accept"] <= 0.005


def test_few_scenes_can_be_measured():
    for scenes in (2, 5):
        assert measure_verifier(scenes, seed=5)["all"]["facts"] > 0


def test_the_scorer_can_say_why():
    scene = sample_scene(0, 0)
    said = load_reward("verifier").explain(scene.render(), str(scene.caption))
    assert said.startswith("1.00 [yes: ")
