import re

import pytest

from t2i_align.playground.grammar import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Caption,
    CaptionError,
    Fact,
    Thing,
    facts,
    parse,
    vocabulary,
)
from t2i_align.playground.world import SPLITS, sample_scenes

RED, BLUE = Thing("red", "circle"), Thing("blue", "square")


@pytest.mark.parametrize("split", SPLITS)
def test_sampled_captions_round_trip(split):
    for scene in sample_scenes(500, 11, split):
        caption = scene.caption
        assert parse(str(caption)) == caption
        assert str(parse(str(caption))) == str(caption)


def test_every_caption_of_every_form_round_trips():
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    for background in ("", *BACKGROUNDS):
        for thing in things:
            for number in (1, *NUMBERS):
                caption = Caption((thing,), number, background=background)
                assert parse(str(caption)) == caption
            for relation in ("", *RELATIONS):
                caption = Caption((thing, BLUE), 1, relation, background)
                assert parse(str(caption)) == caption


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a red circle", Caption((RED,))),
        ("a red circle on a white background", Caption((RED,), background="white")),
        ("a red circle and a blue square", Caption((RED, BLUE))),
        ("a red circle left of a blue square", Caption((RED, BLUE), relation="left of")),
        ("a red circle right of a blue square", Caption((RED, BLUE), relation="right of")),
        ("a red circle above a blue square", Caption((RED, BLUE), relation="above")),
        (
            "a red circle below a blue square on a black background",
            Caption((RED, BLUE), relation="below", background="black"),
        ),
        ("an orange star", Caption((Thing("orange", "star"),))),
        ("two red circles", Caption((RED,), 2)),
        ("three blue squares", Caption((BLUE,), 3)),
        ("four blue squares on a gray background", Caption((BLUE,), 4, background="gray")),
        ("a red circle and a red circle", Caption((RED, RED))),
    ],
)
def test_written_and_read(text, caption):
    assert parse(text) == caption
    assert str(caption) == text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("an red circle", "a red circle"),
        ("a orange star", "an orange star"),
        ("a red circle on a grey background", "a red circle on a gray background"),
        ("a red circle on an grey background", "a red circle on a gray background"),
        ("A Red CIRCLE", "a red circle"),
        ("a red circle.", "a red circle"),
        ("  Two   green\nstars on a GREY background . ", "two green stars on a gray background"),
    ],
)
def test_what_does_not_matter(text, plain):
    assert str(parse(text)) == plain


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a pink circle", ["pink"]),
        ("a red hexagon next to a blue square", ["hexagon", "next", "to"]),
        ("a red, circle", ["red,"]),
        ("five red circles", ["five"]),
        ("a photo of an astronaut", ["photo", "astronaut"]),
    ],
)
def test_unknown_words_are_named(text, unknown):
    with pytest.raises(CaptionError) as caught:
        parse(text)
    named = re.search(r"the words (.*) are not in its vocabulary", str(caught.value))
    assert named[1] == ", ".join(repr(word) for word in unknown)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "red circle",
        "circle red a",
        "a red circles",
        "two red circle",
        "two red circles left of a blue square",
        "a red circle left a blue square",
        "a red circle on a red background",
        "a red circle and a blue square and a blue square",
        "a red circle on a white background on a white background",
        "aa red circle",
    ],
)
def test_known_words_in_another_order_are_refused(text):
    with pytest.raises(CaptionError, match="playground caption"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("a red circle", [Fact("object", RED, 1), Fact("count", number=1)]),
        (
            "a red circle on a gray background",
            [Fact("object", RED, 1), Fact("count", number=1), Fact("background", background="gray")],
        ),
        (
            "three red circles on a black background",
            [
                Fact("object", RED, 1),
                Fact("object", RED, 2),
                Fact("object", RED, 3),
                Fact("count", number=3),
                Fact("background", background="black"),
            ],
        ),
        ("a red circle and a blue square", [Fact("object", RED, 1), Fact("object", BLUE, 1), Fact("count", number=2)]),
        (
            "a red circle above a blue square on a white background",
            [
                Fact("object", RED, 1),
                Fact("object", BLUE, 1),
                Fact("count", number=2),
                Fact("relation", RED, relation="above", other=BLUE),
                Fact("background", background="white"),
            ],
        ),
        ("a red circle and a red circle", [Fact("object", RED, 1), Fact("object", RED, 2), Fact("count", number=2)]),
        (
            "a red circle left of a red circle",
            [
                Fact("object", RED, 1),
                Fact("object", RED, 2),
                Fact("count", number=2),
                Fact("relation", RED, relation="left of", other=RED),
            ],
        ),
    ],
)
def test_facts(text, stated):
    assert facts(text) == tuple(stated)


def test_facts_of_text_that_is_no_caption():
    with pytest.raises(CaptionError):
        facts("a pink circle")


def test_facts_in_words():
    said = [str(fact) for fact in facts("two red circles on a black background")]
    assert said == ["red circle present", "2 x red circle present", "exactly 2 objects", "black background"]
    said = [str(fact) for fact in facts("a red circle left of a blue square")]
    assert said[-1] == "red circle left of blue square"
    assert str(facts("a red circle")[1]) == "exactly 1 object"


def test_kinds():
    assert [parse(text).kind for text in ("a red circle", "two red stars", "a red star and a red star")] == [
        "single",
        "group",
        "pair",
    ]


def test_vocabulary_is_sorted_and_covers_every_caption():
    words = set(vocabulary())
    assert vocabulary() == sorted(words)
    used = {word for split in SPLITS for scene in sample_scenes(300, 5, split) for word in str(scene.caption).split()}
    assert used <= words
    assert len(words) == 30
