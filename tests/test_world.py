from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from t2i_align.playground.data import ScenePool, pick_rows
from t2i_align.playground.grammar import COLOURS, OPPOSITE, RELATIONS, SHAPES, Thing, parse
from t2i_align.playground.world import (
    BACKGROUND_RGB,
    HELDOUT_THINGS,
    KIND_SHARES,
    RGB,
    SIZE,
    SPLITS,
    is_heldout_triple,
    render_batch,
    sample_scene,
    sample_scenes,
    shape_outline,
    split_of,
)
from t2i_align.rewards.verifier import report


def specification(scene):
    objects = "; ".join(f"{o.thing} {o.x:.6f} {o.y:.6f} {o.radius:.6f}" for o in scene.objects)
    return f"{scene.caption} | {scene.background} | {scene.arrangement} | {objects}"


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("train", "fc5bb961b3cbb5404b9f05eb29a0b815f74aa2e5ebd0ea4f2b14b35f996cf884"),
        ("heldout", "e67ac695c87f1a6b66b18b9408f9def297b9e68ddee63dac4c8cdc8c1f6fa9a1"),
    ],
)
def test_scenes_never_change(split, digest):
    text = "\n".join(specification(scene) for scene in sample_scenes(50, 0, split))
    assert sha256(text.encode()).hexdigest() == digest


def test_the_first_scene_in_full():
    assert specification(sample_scene(0, 0)) == (
        "a red triangle and a purple triangle | black | right of | red triangle 50.189828 30.279297 9.449836; "
        "purple triangle 12.981049 33.250000 10.340977"
    )


def test_a_scene_does_not_depend_on_others():
    assert sample_scene(3, 17, "heldout") == list(sample_scenes(20, 3, "heldout"))[17]
    assert sample_scene(3, 17) != sample_scene(4, 17)
    assert np.array_equal(sample_scene(3, 17).render(), sample_scene(3, 17).render())


def boxes_are_apart(one, other):
    return max(abs(one.x - other.x), abs(one.y - other.y)) > one.radius + other.radius


@pytest.mark.parametrize("split", SPLITS)
def test_objects_never_overlap_and_stay_inside(split):
    for scene in sample_scenes(500, 1, split):
        for at, placed in enumerate(scene.objects):
            assert placed.radius + 1 < placed.x < SIZE - 1 - placed.radius
            assert placed.radius + 1 < placed.y < SIZE - 1 - placed.radius
            for other in scene.objects[:at]:
                assert boxes_are_apart(placed, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_lie_within_their_radius(shape):
    corners = shape_outline(shape)
    assert max(max(abs(x), abs(y)) for x, y in corners) <= 1 + 1e-9


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="'hexagon'"):
        shape_outline("hexagon")


def test_scenes_hold_what_their_caption_says():
    for split in SPLITS:
        for scene in sample_scenes(300, 2, split):
            things = Counter(placed.thing for placed in scene.objects)
            number = scene.caption.number
            assert things == Counter(dict.fromkeys(scene.caption.things, number))
            assert scene.caption.background in ("", scene.background)
            assert scene.caption.relation in ("", scene.arrangement)
            if scene.arrangement:
                one, other = scene.objects
                dx, dy = other.x - one.x, other.y - one.y
                along, across = (dx, dy) if scene.arrangement in ("left of", "right of") else (dy, dx)
                assert abs(along) > abs(across) + 3
                assert (along > 0) == (scene.arrangement in ("left of", "above"))


def test_train_never_shows_a_held_out_combination():
    for scene in sample_scenes(1500, 3):
        assert not HELDOUT_THINGS & {placed.thing for placed in scene.objects}
        if scene.arrangement:
            first, second = (placed.thing.colour for placed in scene.objects)
            assert not is_heldout_triple(first, scene.arrangement, second)
            assert not is_heldout_triple(second, OPPOSITE[scene.arrangement], first)
        assert {split_of(caption) for caption in scene.descriptions()} == {"train"}


def test_held_out_captions_name_a_held_out_combination():
    by_thing = by_relation = 0
    for scene in sample_scenes(500, 4, "heldout"):
        caption = parse(str(scene.caption))
        assert split_of(caption) == "heldout"
        named = bool(HELDOUT_THINGS & set(caption.things))
        related = bool(caption.relation) and is_heldout_triple(
            caption.things[0].colour, caption.relation, caption.things[1].colour
        )
        assert named or related
        by_thing += named
        by_relation += related and not named
    assert by_thing > 50
    assert by_relation > 20


def test_a_held_out_triple_and_its_mirror_image_go_together():
    triples = [(one, relation, other) for one in COLOURS for relation in RELATIONS for other in COLOURS]
    for one, relation, other in triples:
        assert is_heldout_triple(one, relation, other) == is_heldout_triple(other, OPPOSITE[relation], one)
    share = sum(is_heldout_triple(*triple) for triple in triples) / len(triples)
    assert 0.05 < share < 0.25
    for colour in COLOURS:  # each colour and each relation is seen in training
        assert not all(is_heldout_triple(colour, relation, other) for relation in RELATIONS for other in COLOURS)


def test_every_colour_and_shape_occurs_in_training():
    seen = {thing for scene in sample_scenes(1500, 5) for thing in scene.caption.things}
    assert seen == {Thing(colour, shape) for colour in COLOURS for shape in SHAPES} - HELDOUT_THINGS


def test_kinds_occur_in_their_shares():
    kinds = Counter(scene.caption.kind for scene in sample_scenes(2000, 6, "heldout"))
    assert set(kinds) == set(KIND_SHARES)
    singles = [sample_scene(6, index, kind="single").caption.kind for index in range(30)]
    groups = [sample_scene(6, index, kind="group").caption.kind for index in range(30)]
    pairs = [sample_scene(6, index, "heldout", kind="pair").caption.kind for index in range(30)]
    assert (set(singles), set(groups), set(pairs)) == ({"single"}, {"group"}, {"pair"})


@pytest.mark.parametrize("split", SPLITS)
def test_every_description_is_a_caption_that_is_true(split):
    for scene in sample_scenes(50, 7, split):
        pixels = np.asarray(scene.render())
        descriptions = scene.descriptions()
        assert scene.caption in descriptions
        assert len(set(descriptions)) == len(descriptions) == (8 if scene.caption.kind == "pair" else 2)
        for caption in descriptions:
            assert parse(str(caption)) == caption
            assert report(pixels, str(caption)).score == 1.0


def test_pictures_have_the_named_colours():
    for scene in sample_scenes(50, 8, "heldout"):
        image = scene.render()
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert image.getpixel((0, 0)) == image.getpixel((63, 63)) == BACKGROUND_RGB[scene.background]
        for placed in scene.objects:
            middle = np.array(image.getpixel((int(placed.x), int(placed.y))))
            assert np.abs(middle - RGB[placed.thing.colour]).max() <= 12


def test_render_batch_stacks():
    scenes = list(sample_scenes(3, 9))
    batch = render_batch(scenes)
    assert batch.shape == (3, 64, 64, 3)
    assert batch.dtype == np.uint8
    assert np.array_equal(batch[2], np.asarray(scenes[2].render()))


def test_a_pool_holds_pictures_and_captions_of_the_train_split():
    pool = ScenePool(5, seed=9)
    assert len(pool) == 5
    assert pool.captions() == [str(scene.caption) for scene in sample_scenes(5, 9)]
    images = pool.images(slice(1, 3))
    assert images.shape == (2, 3, 64, 64)
    expected = np.asarray(sample_scene(9, 2).render()).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(images[1].numpy(), expected, atol=1e-6)


def test_picked_rows_are_permutations_epoch_by_epoch():
    rows = [row for step in range(21) for row in pick_rows(pool=7, batch=3, seed=1, step=step).tolist()]
    epochs = [rows[first : first + 7] for first in range(0, 63, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    large = pick_rows(pool=7, batch=20, seed=1, step=0).tolist()
    assert large == rows[:20]
