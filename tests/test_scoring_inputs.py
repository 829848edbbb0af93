"""Layouts of benchmarks, tar shards, and what may be wrong with them."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_scoring import SETTINGS, Brightness, brightness, picture, score, table_in

from t2i_align.data.files import braces, open_bytes, tar_index, walk
from t2i_align.errors import T2IError
from t2i_align.scoring import open_rows, read_rows, score_file
from t2i_align.scoring.views import write_pairs


def told(rows):
    """(name, prompt, rest) of rows."""
    return [(row.image.name, row.prompt, row.rest) for row in rows]


def geneval(folder, prompts=("a photo of a cow", "a photo of two dogs"), samples=2):
    for n, prompt in enumerate(prompts):
        about = {"tag": "counting", "include": [{"class": "cow", "count": 1}], "prompt": prompt}
        for k in range(samples):
            picture(folder / f"{n:05d}" / "samples" / f"{k:04d}.png", 10 * n + k)
        picture(folder / f"{n:05d}" / "grid.png", 99)
        (folder / f"{n:05d}" / "metadata.jsonl").write_text(json.dumps(about))
    return folder


def test_geneval(tmp_path):
    rows = open_rows(geneval(tmp_path))
    assert rows.layout == "geneval"
    about = {"tag": "counting", "include": [{"class": "cow", "count": 1}]}
    assert told(rows) == [
        ("0000.png", "a photo of a cow", {"folder": "00000", **about}),
        ("0001.png", "a photo of a cow", {"folder": "00000", **about}),
        ("0000.png", "a photo of two dogs", {"folder": "00001", **about}),
        ("0001.png", "a photo of two dogs", {"folder": "00001", **about}),
    ]
    (tmp_path / "results.jsonl").write_text('{"filename": "x"}\n')  # what GenEval's own evaluation may leave there
    assert open_rows(tmp_path).layout == "geneval"
    for suffix in (".jsonl", ".csv", ".parquet"):
        table = score(open_rows(tmp_path), tmp_path / "out" / f"s{suffix}")
        assert brightness(table) == [0, 1, 10, 11]
        include = json.loads(table[0]["include"]) if suffix == ".csv" else table[0]["include"]
        assert include == [{"class": "cow", "count": 1}]


def test_geneval_with_damaged_metadata_loses_those_rows_alone(tmp_path):
    geneval(tmp_path, ("a", "b", "c"), samples=1)
    (tmp_path / "00001" / "metadata.jsonl").write_text("{")
    (tmp_path / "00002" / "metadata.jsonl").unlink()
    table = score(open_rows(tmp_path), tmp_path / "s.jsonl")
    assert [row["error"] is None for row in table] == [True, False, False]
    assert "00001" in table[1]["error"]


def hpsv2(folder, styles=("anime", "photo"), number=3):
    for style in styles:
        for n in range(number):
            picture(folder / style / f"{n:05d}.jpg", 10)
    return folder


def test_hpsv2_with_prompts_beside_the_styles(tmp_path):
    hpsv2(tmp_path)
    (tmp_path / "anime.json").write_text(json.dumps([f"anime {n}" for n in range(3)]))
    (tmp_path / "photo.json").write_text(json.dumps([f"photo {n}" for n in range(2)]))
    rows = list(open_rows(tmp_path))
    assert open_rows(tmp_path).layout == "hpsv2"
    assert told(rows)[:2] == [
        ("00000.jpg", "anime 0", {"style": "anime", "index": 0}),
        ("00001.jpg", "anime 1", {"style": "anime", "index": 1}),
    ]
    assert [row.prompt for row in rows][3:] == ["photo 0", "photo 1", None]
    assert "has 2 prompts, none for 2" in rows[5].problem


@pytest.mark.parametrize("form", ["folder", "file"])
def test_hpsv2_with_prompts_elsewhere(tmp_path, form):
    hpsv2(tmp_path / "images", ("anime", "sketch"), 2)
    lists = {style: [f"{style} {n}" for n in range(2)] for style in ("anime", "sketch")}
    where = tmp_path / "prompts"
    if form == "file":
        where.write_text(json.dumps(lists))
    else:
        where.mkdir()
        for style, texts in lists.items():
            (where / f"{style}.json").write_text(json.dumps(texts))
    rows = open_rows(tmp_path / "images", prompts=where)
    assert [row.prompt for row in rows] == ["anime 0", "anime 1", "sketch 0", "sketch 1"]
    assert [row.prompt for row in open_rows(tmp_path / "images", "else")] == ["else"] * 4


def test_wrong_prompts_of_hpsv2_are_refused(tmp_path):
    hpsv2(tmp_path / "images")
    for content, message in (
        ("{", "not JSON"),
        ("[1]", "JSON object of styles"),
        ('{"anime": [1]}', "list of strings"),
    ):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(T2IError, match=message):
            read_rows(tmp_path / "images", prompts=tmp_path / "p.json")


@pytest.mark.parametrize("source", ["ours", "ours/prompts.jsonl", "x.tar"])
def test_prompts_that_would_not_be_used_are_refused(tmp_path, source):
    picture(tmp_path / "ours" / "a.png", 10)
    (tmp_path / "ours/prompts.jsonl").write_text('{"image": "a.png", "prompt": "p"}\n')
    shard(tmp_path / "x.tar", SAMPLES)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(T2IError, match="for the layout hpsv2 alone"):
        open_rows(tmp_path / source, prompts=tmp_path / "p.json")


def test_compbench(tmp_path):
    for name in ("a red book and a yellow vase_000000", "a red book and a yellow vase_000001", "a cat_dog_000010"):
        picture(tmp_path / "samples" / f"{name}.png", 9)
    rows = open_rows(tmp_path)
    assert rows.layout == "compbench"
    assert [(row.prompt, row.rest["index"]) for row in rows] == [
        ("a cat_dog", 10),
        ("a red book and a yellow vase", 0),
        ("a red book and a yellow vase", 1),
    ]
    assert len(read_rows(tmp_path / "samples", layout="compbench")) == 3


def test_a_layout_can_be_forced(tmp_path):
    geneval(tmp_path)
    assert len(read_rows(tmp_path, layout="folder")) == 6  # with the grids
    with pytest.raises(T2IError, match="no images in the layout 'hpsv2'"):
        read_rows(tmp_path, layout="hpsv2")
    with pytest.raises(T2IError, match="Did you mean 'geneval'"):
        read_rows(tmp_path, layout="genval")
    with pytest.raises(T2IError, match="hpsv2 alone"):
        read_rows(tmp_path, layout="geneval", prompts=tmp_path)


def shard(path, samples, order=None):
    """A tar with the members `samples`: name -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in order or samples:
            about = tarfile.TarInfo(name)
            about.size = len(samples[name])
            tar.addfile(about, io.BytesIO(samples[name]))
    return path


def png(level, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


SAMPLES = {
    "a/000.png": png(10),
    "a/000.txt": "größe".encode(),
    "a/000.cls": b"3",
    "001.json": b'{"caption": "from json", "width": 8}',
    "001.png": png(20),
    "002.png": png(30),
    "./003.webp": b"",
    "003.txt": b"\xff",
    "004.txt": b"no image",
}


def test_a_shard_is_read_by_key(tmp_path):
    rows = open_rows(shard(tmp_path / "x.tar", SAMPLES), "else")
    assert rows.layout == "webdataset"
    assert told(rows) == [
        ("000.png", "größe", {}),
        ("001.png", "from json", {"width": 8}),
        ("002.png", "else", {}),
        ("003.webp", None, {}),
    ]
    table = score(rows, tmp_path / "s.jsonl")
    assert brightness(table) == [10, 20, 30, None]
    assert table[0]["image"] == str(tmp_path / "x.tar" / "a" / "000.png")
    assert "Cannot read the text" in table[3]["error"]
    again = score(open_rows(tmp_path / "s.jsonl"), tmp_path / "t.jsonl")  # paths into shards can be read like others
    assert brightness(again) == [10, 20, 30, None]


def test_shards_by_braces_and_by_folder(tmp_path, monkeypatch):
    for n in range(8, 12):
        shard(tmp_path / "shards" / f"{n:03d}.tar", {f"{n}.png": png(n)})
    monkeypatch.chdir(tmp_path)
    assert [row.image.name for row in open_rows("shards/{008..010}.tar")] == ["8.png", "9.png", "10.png"]
    assert [row.image.name for row in open_rows(tmp_path / "shards")] == ["8.png", "9.png", "10.png", "11.png"]
    with pytest.raises(T2IError, match=r"No such file: shards/012\.tar"):
        read_rows("shards/{008..012}.tar")
    score_file(open_rows("shards/{008..011}.tar"), [Brightness()], "o/s.csv", settings=SETTINGS)
    assert [row["image"] for row in table_in(tmp_path / "o/s.csv")][0] == "../shards/008.tar/8.png"


def test_braces():
    assert braces("x-{8..10}.tar") == ["x-8.tar", "x-9.tar", "x-10.tar"]
    assert braces("{a,b}/{00..01}") == ["a/00", "a/01", "b/00", "b/01"]
    assert braces("plain") == ["plain"]


def test_numbers_that_fall_and_endings_in_capitals(cli, tmp_path):
    words = ["--rewards", "jpeg_compressibility", "--out", tmp_path / "o.csv"]
    code, _, err = cli("score", tmp_path / "x-{010..000}.tar", *words)
    assert code == 2
    assert "Expected numbers that rise in braces" in err
    assert len(err.strip().splitlines()) == 1
    rows = open_rows(shard(tmp_path / "S.TAR", SAMPLES))
    assert rows.layout == "webdataset"
    assert brightness(score(rows, tmp_path / "s.jsonl")) == [10, 20, 30, None]


def test_tables_and_pairs_in_linked_folders_name_files_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("deep/a/b", "far/away/c"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/a/b")
    (tmp_path / "other").symlink_to("far/away/c")
    for n in range(2):
        picture(tmp_path / "in" / f"{n}.png", 50 * n + 50)
    (tmp_path / "blob").write_bytes(shard(tmp_path / "y.tar", {"2.png": png(200)}).read_bytes())
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/x.tar").symlink_to("../blob")
    for source, wanted in (("in", [50, 100]), ("shards", [200])):
        table = score(open_rows(source, "p"), Path("link/s.jsonl"), overwrite=True)
        assert table[0]["image"].startswith(f"../../../{source}/")
        assert brightness(score(open_rows("link/s.jsonl"), Path("other/t.jsonl"), overwrite=True)) == wanted
        again = score(open_rows("other/t.jsonl"), Path("v.jsonl"), overwrite=True)
        assert brightness(again) == wanted
        assert again[0]["image"].startswith(f"{source}/")
    table = score(open_rows("in", "p"), Path("link/s.jsonl"), overwrite=True)
    assert write_pairs(table, Path("other/p.jsonl"), "brightness", Path("link/s.jsonl")) == 1
    (pair,) = table_in(Path("other/p.jsonl"))
    assert all((Path("other") / pair[name]).is_file() for name in ("image_0", "image_1"))


def test_a_shard_cut_short_loses_its_end_and_says_so(tmp_path):
    path = shard(tmp_path / "x.tar", {f"{n}.png": png(n) for n in range(6)})
    path.write_bytes(path.read_bytes()[: 3 * 1024 + 700])
    table = score(open_rows(path), tmp_path / "s.jsonl")
    assert brightness(table)[:3] == [0, 1, 2]
    assert brightness(table)[-1] is None
    assert "cut short" in table[-1]["error"]


def test_parquet_files_with_images_inside(tmp_path, monkeypatch):
    """As the datasets library writes them, as bytes, and without a prompt."""

    def png(level):
        held = io.BytesIO()
        Image.new("RGB", (4, 4), (level, level, level)).save(held, "PNG")
        return held.getvalue()

    cells = [{"bytes": png(level), "path": None} for level in (10, 20, 30)] + [{"bytes": b"half", "path": None}]
    one = pyarrow.table({"image": cells, "text": ["a", "b", "c", "d"], "seed": [1, 2, 3, 4], "jpg_1": [png(0)] * 4})
    folder = tmp_path / "data"
    folder.mkdir()
    pyarrow.parquet.write_table(one, folder / "train-0.parquet", row_group_size=2)
    pyarrow.parquet.write_table(pyarrow.table({"picture": [png(40)]}), folder / "train-1.parquet")
    rows = open_rows(folder)
    assert rows.layout == "parquet"
    assert [(row.prompt, row.rest) for row in rows][:2] == [("a", {"seed": 1}), ("b", {"seed": 2})]
    table = score(rows, tmp_path / "s.jsonl")
    assert brightness(table) == [10, 20, 30, None, 40]
    assert table[1]["image"] == str(folder / "train-0.parquet" / "1" / "image")
    assert "Cannot read the image" in table[3]["error"]
    assert brightness(score(open_rows(tmp_path / "s.jsonl"), tmp_path / "again.jsonl")) == [10, 20, 30, None, 40]
    pyarrow.parquet.write_table(one.slice(0, 0), folder / "train-2.parquet")  # an empty shard
    spark = tmp_path / "out.parquet"
    spark.mkdir()
    pyarrow.parquet.write_table(one, spark / "PART-0.PARQUET")
    assert brightness(score(open_rows(spark), tmp_path / "spark.jsonl")) == [10, 20, 30, None]
    both = pyarrow.table({"file_name": ["1.png"], "img": [png(50)]})
    pyarrow.parquet.write_table(both, tmp_path / "named.parquet")
    assert brightness(score(open_rows(tmp_path / "named.parquet"), tmp_path / "named.jsonl")) == [50]
    monkeypatch.chdir(folder)
    assert [row.prompt for row in open_rows("train-0.parquet")] == ["a", "b", "c", "d"]
    assert [str(row.image) for row in open_rows("train-{1..1}.parquet", "p")] == ["train-1.parquet/0/picture"]
    picture(folder / "x.png", 1)  # a folder of images may have tables in it
    assert open_rows(folder).layout == "folder"


def test_rows_of_a_table_that_cannot_be_meant(tmp_path):
    picture(tmp_path / "a.png", 10)
    (tmp_path / "t.csv").write_text("image,prompt\na.png,p\na.png,a circle, left of a square\n,p\n")
    table = score(open_rows(tmp_path / "t.csv"), tmp_path / "s.jsonl")
    assert brightness(table) == [10, None, None]
    assert "more cells than the header" in table[1]["error"]
    assert "nothing in the column 'image'" in table[2]["error"]
    assert set(table[1]) == set(table[0])


def test_images_of_a_parquet_file_may_lie_beside_it(tmp_path):
    picture(tmp_path / "a.png", 10)
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": None, "path": str(tmp_path / "a.png")}, None]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array(cells, kind)}), tmp_path / "x.parquet")
    assert brightness(score(open_rows(tmp_path / "x.parquet"), tmp_path / "s.jsonl")) == [10, 10, None]


def test_files_that_are_no_shards_are_refused(tmp_path):
    (tmp_path / "x.tar").write_text("not a tar file" * 100)
    with pytest.raises(T2IError, match="uncompressed tar"):
        open_rows(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "y.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    with pytest.raises(T2IError, match="uncompressed tar"):
        open_rows(tmp_path / "y.tar")
    with pytest.raises(T2IError, match="no images"):
        open_rows(shard(tmp_path / "z.tar", {"a.txt": b"x"}))


def test_members_are_found_without_reading_what_lies_before(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.bin": b"\0" * 5000, "d/b.png": png(7)})
    offset, size = tar_index(path).members["d/b.png"]
    assert path.read_bytes()[offset : offset + size] == png(7)
    assert open_bytes(path / "d" / "b.png").read() == png(7)
    with pytest.raises(FileNotFoundError):
        open_bytes(path / "none.png")


def test_a_changed_shard_is_indexed_anew(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.png": png(1)})
    assert list(tar_index(path).members) == ["a.png"]
    shard(path, {"a.png": png(1), "b.png": png(2)})
    assert list(tar_index(path).members) == ["a.png", "b.png"]


def test_a_walk_is_sorted_as_paths_are(tmp_path):
    names = ["b.png", "a/z", "a.x/y", "a/b/c", "a-b", "A", "é", "a.x/b/0"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(walk(tmp_path)) == sorted(tmp_path / name for name in names)


def test_a_listing_whose_last_line_was_cut_is_read_and_a_broken_one_is_not(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"image": "a.png"}\n{"image": "b')
    assert len(read_rows(tmp_path)) == 1
    (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n{"image": "b')
    with pytest.raises(T2IError, match="Line 2 of .* is not JSON"):
        read_rows(tmp_path / "t.jsonl")
    (tmp_path / "t.csv").write_text("image,prompt\na.png,x,y,z\nb.png\n")
    assert told(open_rows(tmp_path / "t.csv")) == [("a.png", "x", {}), ("b.png", None, {})]
