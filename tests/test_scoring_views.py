"""Summary, top rows, pairs and gallery of a finished table."""

import json
import random
import statistics

import pytest
from PIL import Image
from test_scoring import picture, table_in

from t2i_align.scoring import write_table
from t2i_align.scoring.gallery import write_gallery
from t2i_align.scoring.views import read_scored, summarise, write_pairs, write_top

ROWS = [("p", 0.5), ("q", 0.1), ("p", 0.9), ("p", None), ("q", 0.1), ("p", 0.2), (None, 0.4), ("q", 0.3), ("r", 0.7)]


@pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
def table(tmp_path, request):
    """A table of nine rows with the pictures beside it."""
    rows = []
    for n, (prompt, value) in enumerate(ROWS):
        picture(tmp_path / "in" / f"{n}.png", 20 * n)
        error = None if value is not None else "broken"
        rows.append({"image": f"in/{n}.png", "prompt": prompt, "a": value, "b": float(n), "error": error})
    path = tmp_path / f"table{request.param}"
    write_table(rows, path)
    return path


def read(table):
    return read_scored(table, ["a", "b"])


def test_the_summary_equals_the_plain_formulas(table):
    summary = summarise(read(table), ["a", "b"])
    values = [value for _, value in ROWS if value is not None]
    assert (summary.rows, summary.failed, summary.failures[0]["image"]) == (9, 1, "in/3.png")
    assert summary.scores["a"].as_dict() == {
        "mean": pytest.approx(statistics.fmean(values), rel=1e-12),
        "sd": pytest.approx(statistics.pstdev(values), rel=1e-12),
        "min": 0.1,
        "max": 0.9,
        "n": 8,
    }
    assert summarise([], ["a"]).scores["a"].as_dict() == {}


def test_top_rows_of_each_prompt(table):
    path = table.with_name(f"top{table.suffix}")
    assert write_top(read(table), path, "a", 2) == 6
    rows = [(row["image"], row["prompt"] or None, int(row["rank"])) for row in table_in(path)]
    assert rows == [
        ("in/2.png", "p", 1),
        ("in/0.png", "p", 2),
        ("in/7.png", "q", 1),
        ("in/1.png", "q", 2),  # the earlier of two equal scores
        ("in/6.png", None, 1),
        ("in/8.png", "r", 1),
    ]


def test_pairs_of_best_and_worst(table, tmp_path):
    path = tmp_path / "pairs" / "pairs.jsonl"
    path.parent.mkdir()
    assert write_pairs(read(table), path, "a", table) == 2
    first, second = table_in(path)
    assert first == {
        "prompt": "p",
        "image_0": "../in/2.png",
        "image_1": "../in/5.png",
        "label_0": 1,
        "label_1": 0,
        "score_0": 0.9,
        "score_1": 0.2,
        "gap": pytest.approx(0.7),
        "reward": "a",
    }
    assert (second["image_0"], second["image_1"], second["label_0"], second["label_1"]) == (
        "../in/1.png",
        "../in/7.png",
        0,
        1,
    )
    assert (path.parent / first["image_0"]).resolve().is_file()
    assert write_pairs(read(table), path, "a", table, min_gap=0.5) == 1
    assert write_pairs(read(table), path, "a", table, min_gap=0.71) == 0
    assert path.read_text() == ""


def test_equal_scores_make_no_pair(tmp_path):
    rows = [{"image": f"{n}.png", "prompt": "p", "a": 1.0} for n in range(3)]
    assert write_pairs(rows, tmp_path / "p.jsonl", "a", tmp_path / "t.jsonl") == 0


def test_the_gallery_stands_alone(table, tmp_path):
    path = tmp_path / "gallery.html"
    write_gallery(lambda: read(table), table, path, ["a", "b"], "a")
    page = path.read_text()
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<svg") == 2
    assert page.count("<figure>") == 8 + 2 * 2  # all by score, and best and worst of p and q
    assert page.count("data:image/png;base64,") == page.count("<figure>")
    order = [page.index(f'<span class="path">in/{n}.png') for n in (2, 8, 0, 6, 7, 5, 1, 4)]
    assert order == sorted(order)
    assert "in/3.png: broken" in page


def test_a_gallery_is_limited_from_both_ends(tmp_path):
    rng = random.Random(0)
    values = [rng.random() for _ in range(60)]
    rows = [{"image": f"{n}.png", "prompt": "<b>p</b>", "a": v, "error": None} for n, v in enumerate(values)]
    for n in range(60):
        if n != 7:
            Image.new("RGB", (300, 200)).save(tmp_path / f"{n}.png")
    path = tmp_path / "gallery.html"
    write_gallery(lambda: rows, tmp_path / "t.csv", path, ["a"], "a", limit=9)
    page = path.read_text()
    assert "The best 5 of 60" in page
    assert "The worst 4 of 60" in page
    falling = sorted(range(60), key=lambda n: -values[n])
    shown = [f'<span class="path">{n}.png' for n in falling[:5] + falling[-4:]]
    places = [page.index(said) for said in shown]
    assert places == sorted(places)
    assert "&lt;b&gt;p" in page
    assert "data:image/jpeg" in page
    assert page.count("<figure>") == 9 + 2


def test_an_image_that_is_gone_leaves_a_gap(tmp_path):
    rows = [{"image": "none.png", "prompt": None, "a": 1.0, "error": None}]
    write_gallery(lambda: rows, tmp_path / "t.csv", tmp_path / "g.html", ["a"], "a")
    assert "cannot be read" in (tmp_path / "g.html").read_text()


def test_views_from_the_command_line(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(6):
        Image.effect_noise((16, 16), 10 * n + 1).convert("RGB").save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text(f"prompt {n % 2}")
    views = ["--gallery", "out/g.html", "--top-k", 1, "--pairs", "out/p.jsonl", "--min-gap", "0.01"]
    words = ["score", ".", "--rewards", "jpeg_incompressibility,jpeg_compressibility", "--out", "s.parquet", *views]
    code, out, err = cli(*words)
    assert code == 0, err
    assert "images/s" in out
    assert "2 best rows in s.top.parquet" in out
    assert "2 pairs in out/p.jsonl" in out
    top = table_in(tmp_path / "s.top.parquet")
    assert [row["image"] for row in top] == ["4.png", "5.png"]
    pair = json.loads((tmp_path / "out/p.jsonl").read_text().splitlines()[0])
    assert (pair["image_0"], pair["image_1"], pair["label_1"]) == ("../0.png", "../4.png", 1)
    page = (tmp_path / "out/g.html").read_bytes()
    (tmp_path / "out/g.html").unlink()
    code, out, _ = cli(*words, "--resume")
    assert code == 0
    assert "nothing to do" in out
    assert (tmp_path / "out/g.html").read_bytes() == page
    words[words.index("s.parquet")] = "t.parquet"
    code, _, err = cli(*words)
    assert code == 2
    assert "out/g.html already exists" in err
    assert not (tmp_path / "t.parquet").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "verifier"], "--by to be one of jpeg_compressibility"),
        (["--gallery", "g.htm"], "ending in .html"),
        (["--pairs", "p.csv"], "ending in .jsonl"),
        (["--dtype", "fp16"], "fp32 or bf16"),
        (["--layout", "hpsv3"], "Did you mean 'hpsv2'"),
        (["--prompts", "p.json"], "hpsv2"),
    ],
)
def test_bad_options_are_one_sentence(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.png", 5)
    code, out, err = cli("score", ".", "--rewards", "jpeg_compressibility", "--out", "s.csv", *words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["in", "--out", "s.jsonl", "--pairs", "link/s.jsonl"], "--out and --pairs to be two files"),
        (["in", "--out", "in/prompts.jsonl"], "the input and --out to be two files"),
        (["in", "--out", "s.jsonl", "--pairs", "in/prompts.jsonl"], "the input and --pairs"),
        (["s.top.jsonl", "--out", "s.jsonl", "--top-k", "1"], "the input and the table of --top-k"),
        (["s.top.jsonl", "--out", "t.csv", "--pairs", "s.top.jsonl"], "the input and --pairs"),
        (["in", "--out", "s.jsonl", "--top-k", "1", "--pairs", "s.top.jsonl"], "--top-k and --pairs"),
    ],
)
def test_two_files_that_are_one_are_refused(cli, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "in" / "a.png", 5)
    for listing in ("in/prompts.jsonl", "s.top.jsonl"):
        write_table([{"image": "a.png", "prompt": "p"}], tmp_path / listing)
    (tmp_path / "link").symlink_to(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    code, _, err = cli("score", *words, "--rewards", "jpeg_compressibility", "--overwrite")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert said in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before


def test_the_default_limit_of_pixels_is_the_same_everywhere():
    import inspect

    from t2i_align.cli.score import score
    from t2i_align.scoring.job import MAX_PIXELS

    assert inspect.signature(score).parameters["max_pixels"].default == MAX_PIXELS == Image.MAX_IMAGE_PIXELS
