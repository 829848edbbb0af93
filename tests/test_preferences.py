"""Preferences in published formats: what is read, what is left out and said, and images inside parquet files."""

import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from t2i_align.data.images import open_image
from t2i_align.data.preferences import LAYOUTS, find_layout, read_preferences
from t2i_align.data.tables import write_table
from t2i_align.errors import T2IError
from t2i_align.scoring.views import write_pairs

REAL = Path(__file__).parents[2] / "shared" / "data" / "preferences" / "imagereward_test.json"


def picture(color="red"):
    return Image.new("RGB", (4, 4), color)


def encoded(color):
    out = io.BytesIO()
    picture(color).save(out, "png")
    return out.getvalue()


@pytest.fixture
def here(tmp_path):
    for name in "abcd":
        picture().save(tmp_path / f"{name}.png")
    return tmp_path


def rows_of(found):
    return [(p.prompt, Path(p.image_0).name, Path(p.image_1).name, p.label) for p in found.pairs()]


def test_pick_a_pic_with_ties_and_rows_that_cannot_serve(tmp_path):
    rows = [
        {"caption": "x", "jpg_0": encoded("red"), "jpg_1": encoded("lime"), "label_0": 1.0, "label_1": 0.0},
        {"caption": "x", "jpg_0": encoded("blue"), "jpg_1": encoded("red"), "label_0": 0.5, "label_1": 0.5},
        {"caption": "y", "jpg_0": encoded("red"), "jpg_1": encoded("blue"), "label_0": 0.0, "label_1": 1.0},
        {"caption": "z", "jpg_0": encoded("red"), "jpg_1": encoded("red"), "label_0": 0.0, "label_1": 0.0},
        {"caption": None, "jpg_0": encoded("red"), "jpg_1": encoded("red"), "label_0": 1.0, "label_1": 0.0},
        {"caption": "q", "jpg_0": encoded("red"), "jpg_1": encoded("red"), "label_0": 1.0, "label_1": 0.0},
    ]
    judged = pyarrow.array([True] * 5 + [False])
    table = pyarrow.Table.from_pylist(rows).append_column("has_label", judged)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "a-shard-without-rows.parquet")
    found = read_preferences(tmp_path)  # a folder with parquet files
    assert [pair.label for pair in found.pairs()] == [1.0, 0.5, 0.0]
    colors = [[open_image(i).getpixel((0, 0)) for i in (p.image_0, p.image_1)] for p in found.pairs()]
    assert colors[0] == [(255, 0, 0), (0, 255, 0)]
    assert colors[2] == [(255, 0, 0), (0, 0, 255)]  # of the second row group
    assert len(found.problems) == 3
    for text in ("row 4", "neither image is preferred", "row 5", "no caption", "row 6", "not judged"):
        assert text in found.summary()
    decided = found.decided()
    assert decided.text == ("x", "y")
    assert open_image(decided.columns["better"][1]).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(T2IError, match="No such image"):
        open_image(tmp_path / "train.parquet" / "99" / "jpg_0")


def test_chosen_and_rejected_as_the_datasets_library_writes_images(tmp_path):
    cells = [{"bytes": encoded("red"), "path": None}], [{"bytes": encoded("blue"), "path": "1.png"}]
    table = pyarrow.table({"prompt": ["p"], "chosen": cells[0], "rejected": cells[1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (pair,) = read_preferences(tmp_path / "x.parquet").pairs()
    assert pair.label == 1
    assert open_image(pair.image_1).getpixel((0, 0)) == (0, 0, 255)


def test_hpdv2(here):
    train = [
        {"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [0, 1]},
        {"prompt": "q", "file_path": ["a.png", "gone.png"], "human_preference": [1, 0]},
    ]
    (here / "train.json").write_text(json.dumps(train))
    found = read_preferences(here / "train.json")
    assert rows_of(found) == [("p", "a.png", "b.png", 0.0)]
    assert "no such image" in found.problems[0]
    test = [{"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 1, 2], "raw_annotations": []}]
    (here / "test.json").write_text(json.dumps(test))
    assert [row[1:] for row in rows_of(read_preferences(here / "test.json"))] == [
        ("a.png", "b.png", 0.0),
        ("a.png", "c.png", 0.5),
        ("b.png", "c.png", 1.0),
    ]


def test_image_reward_db_gathers_the_images_of_a_prompt(here):
    rows = [
        {"prompt_id": 1, "prompt": "p", "image": "a.png", "rank": 2},
        {"prompt_id": 2, "prompt": "q", "image": "c.png", "rank": 1},
        {"prompt_id": 1, "prompt": "p", "image": "b.png", "rank": 1},
    ]
    write_table(rows, here / "db.csv")
    found = read_preferences(here / "db.csv")
    assert rows_of(found) == [("p", "a.png", "b.png", 0.0)]
    with pytest.raises(T2IError, match=r"label 1, liked, or 0 of each single image but .*c.png has -1 \(ranks"):
        found.judged()


@pytest.mark.skipif(not REAL.exists(), reason="the published file is not here")
def test_the_published_test_set_of_image_reward():
    with pytest.raises(T2IError, match="no such image"):
        read_preferences(REAL)  # its images are not here
    found = read_preferences(REAL, exist=False)
    assert not found.problems
    assert len(found.rankings) == 466
    raw = json.loads(REAL.read_text())
    pairs = list(found.pairs())
    assert len(pairs) == sum(len(row["ranking"]) * (len(row["ranking"]) - 1) // 2 for row in raw)
    first = raw[0]["ranking"]  # 1, 2, 5, 3: lower is better
    assert [pair.label for pair in pairs[:6]] == [float(a < b) for i, a in enumerate(first) for b in first[i + 1 :]]
    ties = sum(
        row["ranking"][i] == b for row in raw for i in range(len(row["ranking"])) for b in row["ranking"][i + 1 :]
    )
    assert sum(pair.label == 0.5 for pair in pairs) == ties > 0


def test_pairs_that_scoring_saves(here):
    scored = [
        {"prompt": "p", "image": f"{name}.png", "r": value} for name, value in (("a", 1.0), ("b", 3.0), ("c", 2.0))
    ]
    write_pairs(scored, here / "pairs.jsonl", "r", here / "table.jsonl")
    assert rows_of(read_preferences(here)) == [("p", "a.png", "b.png", 0.0)]


def test_paired_folders(here):
    for side in ("w", "l"):
        (here / side).mkdir()
    for name in ("1", "2", "3"):
        picture().save(here / "w" / f"{name}.png")
    for name in ("1", "3"):
        picture().save(here / "l" / f"{name}.jpg")
    (here / "w" / "1.txt").write_text("a red square\n")
    found = read_preferences(here)
    assert rows_of(found) == [("a red square", "1.png", "1.jpg", 1.0)]
    assert found.problems == ("2: it is in w/ alone", "3: no prompt in w/3.txt")


def test_any_columns(here):
    write_table([{"t": "p", "good": "a.png", "bad": "b.png"}], here / "mine.jsonl")
    with pytest.raises(T2IError, match="Expected the columns of one of Pick-a-Pic"):
        read_preferences(here / "mine.jsonl")
    columns = {"prompt": "t", "better": "good", "worse": "bad"}
    assert rows_of(read_preferences(here / "mine.jsonl", columns)) == [("p", "a.png", "b.png", 1.0)]
    for wrong, said in (
        ({**columns, "bettr": "good"}, "Did you mean 'better'"),
        ({**columns, "worse": "no"}, "columns no in"),
        ({"prompt": "t", "better": "good"}, "to name prompt and one of"),
    ):
        with pytest.raises(T2IError, match=said):
            read_preferences(here / "mine.jsonl", wrong)
    write_table(
        [{"prompt": "p", "image": "a.png", "label": 1}, {"prompt": "p", "image": "b.png", "label": 0}], here / "l.csv"
    )
    assert read_preferences(here / "l.csv").judged().columns["liked"] == (True, False)
    write_table([{"prompt": "p", "image": name, "score": 22.5} for name in ("a.png", "b.png")], here / "s.csv")
    with pytest.raises(T2IError, match="a.png has 22.5 .*: make labels of scores by a threshold, or name the column"):
        read_preferences(here / "s.csv").judged()


def test_what_cannot_serve_at_all(here):
    write_table([{"prompt": "p", "chosen": "https://x.org/a.png", "rejected": "b.png"}], here / "web.jsonl")
    with pytest.raises(T2IError, match="row 1 of web.jsonl: the image https://x.org/a.png is an address"):
        read_preferences(here / "web.jsonl")
    with pytest.raises(T2IError, match="No such file or folder"):
        read_preferences(here / "no")
    (here / "empty").mkdir()
    with pytest.raises(T2IError, match="pairs.jsonl, a choices.json, parquet files, or folders w/ and l/"):
        read_preferences(here / "empty")


def test_every_layout_is_found_by_its_own_columns():
    for name, layout in LAYOUTS.items():
        assert find_layout(list(layout.values()), None, name) == layout
