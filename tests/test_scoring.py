import csv
import json
import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image

from t2i_align.errors import T2IError
from t2i_align.rewards import Scorer, load_reward
from t2i_align.scoring import Row, check_output, read_rows, score_columns, score_file, score_rows


class Brightness(Scorer):
    name = "brightness"

    def forward(self, images, prompts):
        return images.mean((1, 2, 3))


class Interrupted(Brightness):
    """Ctrl-C in the call number `at`."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, images, prompts):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().forward(images, prompts)


class Allergic(Brightness):
    """Fails on dark images."""

    name = "allergic"

    def forward(self, images, prompts):
        if (images.mean((1, 2, 3)) < 0.1).any():
            raise RuntimeError("too dark")
        return super().forward(images, prompts)


SETTINGS = {"rewards": "brightness"}


def picture(path, level, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def pictures(folder, number=7):
    return [Row(picture(folder / f"{n}.png", 36 * (n + 1)), f"prompt {n}") for n in range(number)]


def brightness(table):
    return [None if row["brightness"] is None else round(255 * row["brightness"]) for row in table]


def score(rows, out, scorer=None, settings=SETTINGS, **options):
    return score_file(rows, [scorer or Brightness()], out, settings=settings, batch_size=2, **options)


def interrupt(rows, out, at, **options):
    with pytest.raises(KeyboardInterrupt):
        score(rows, out, Interrupted(at), **options)


def table_in(path):
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {k: (None if v == "" else float(v) if k == "brightness" else v) for k, v in row.items()}
                for row in csv.DictReader(file)
            ]
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_is_read_in_order_with_its_sidecars(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.png"):
        picture(tmp_path / name, 10)
    (tmp_path / "b.txt").write_text("a blue größe \n", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("")
    assert read_rows(tmp_path, "else") == [
        Row(tmp_path / "a.jpg", "else"),
        Row(tmp_path / "b.png", "a blue größe"),
        Row(tmp_path / "sub" / "c.png", "else"),
    ]
    assert [row.prompt for row in read_rows(tmp_path)] == [None, "a blue größe", None]


def test_a_sidecar_may_start_with_a_byte_order_mark(tmp_path):
    picture(tmp_path / "a.png", 10)
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n".encode())
    assert read_rows(tmp_path)[0].prompt == "a cat"


def test_a_sidecar_that_is_not_utf8_fails_its_row_alone(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", 10)
    (tmp_path / "a.txt").write_bytes(b"gr\xf6\xdfe")
    table = score(read_rows(tmp_path), tmp_path / "out.jsonl")
    assert "a.txt is not UTF-8" in table[0]["error"]
    assert table[1]["error"] is None


@pytest.mark.parametrize("name", ["results.jsonl", "prompts.jsonl"])
def test_a_folder_of_ours_is_read_by_its_listing(tmp_path, name):
    picture(tmp_path / "images" / "1.png", 10)
    picture(tmp_path / "grid.png", 10)
    (tmp_path / name).write_text('{"image": "images/1.png", "prompt": "p"}\n')
    assert read_rows(tmp_path) == [Row(tmp_path / "images" / "1.png", "p")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(("image", "prompt"), [("image", "prompt"), ("file_name", "text"), ("path", "caption")])
def test_tables_are_relative_to_themselves(tmp_path, suffix, image, prompt):
    path = tmp_path / f"table{suffix}"
    rows = [{image: "x/1.png", prompt: "größe, a"}, {image: str(tmp_path / "2.png"), prompt: None}]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".csv":
        path.write_text(f'{image},{prompt}\nx/1.png,"größe, a"\n{tmp_path / "2.png"},\n', encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_rows(path) == [Row(tmp_path / "x/1.png", "größe, a"), Row(tmp_path / "2.png", None)]
    assert read_rows(path, "else")[1].prompt == "else"


def test_sources_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(T2IError, match="has no images"):
        read_rows(tmp_path)
    with pytest.raises(T2IError, match="No such file or folder"):
        read_rows(tmp_path / "none")
    with pytest.raises(T2IError, match="No such file"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(T2IError, match="Expected a folder of images or a table"):
        read_rows(picture(tmp_path / "a.png", 10))
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    with pytest.raises(T2IError, match="column image or image_path"):
        read_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_the_written_table_is_the_returned_one(tmp_path, suffix):
    rows = pictures(tmp_path / "in", 3)
    rows[1] = Row(tmp_path / "none.png", None)
    rows.append(Row(picture(tmp_path / "in" / "größe.png", 50), 'with "quotes",\nand lines'))
    out = tmp_path / "out" / f"scores{suffix}"
    table = score(rows, out)
    assert table_in(out) == table
    assert brightness(table) == [36, None, 108, 50]
    assert [row["prompt"] for row in table] == [row.prompt for row in rows]
    assert list(table[0]) == ["image", "prompt", "brightness", "error"]
    assert {p.name for p in out.parent.iterdir()} == {out.name, "scores.config.yaml", "scores.environment.json"}
    assert yaml.safe_load((out.parent / "scores.config.yaml").read_text()) == SETTINGS


def test_a_written_table_can_be_scored_again(tmp_path):
    rows = pictures(tmp_path, 3)
    score(rows, tmp_path / "a.parquet")
    again = read_rows(tmp_path / "a.parquet")
    assert [(row.image, row.prompt) for row in again] == [(row.image, row.prompt) for row in rows]


def test_relative_paths_are_written_relative_to_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(Path("in/a.png"), 10)
    (tmp_path / "in/list.jsonl").write_text('{"image": "a.png", "kind": "single", "row": 3}\n')
    (tmp_path / "out").mkdir()
    (row,) = score(read_rows("in/list.jsonl"), Path("out/a.parquet"))
    assert row["image"] == "../in/a.png"
    assert (row["kind"], row["row"]) == ("single", 3)  # other columns travel along
    assert read_rows("out/a.parquet")[0].image.is_file()


def test_cells_that_are_no_paths_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": {"bytes": "x"}}\n')
    with pytest.raises(T2IError, match="hold paths but got a dict"):
        read_rows(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("image,prompt\n")
    with pytest.raises(T2IError, match="has no rows"):
        read_rows(tmp_path / "a.csv")


def test_large_pictures_are_scored_in_smaller_batches(tmp_path, monkeypatch):
    from t2i_align import scoring

    rows = pictures(tmp_path, 5)
    monkeypatch.setattr(scoring, "BATCH_PIXELS", 2 * 8 * 8)
    sizes = []
    inner = scoring.score_rows
    monkeypatch.setattr(scoring, "score_rows", lambda batch, *a, **k: sizes.append(len(batch)) or inner(batch, *a, **k))
    assert len(score(rows, tmp_path / "out.jsonl")) == 5
    assert sizes == [2, 2, 1]


def test_the_output_is_neither_input_nor_folder(tmp_path):
    for wrong, message in ((tmp_path / "a.csv", "other than the input"), (tmp_path / "b.csv", "it is a folder")):
        (tmp_path / "b.csv").mkdir(exist_ok=True)
        with pytest.raises(T2IError, match=message):
            check_output(wrong, tmp_path / "a.csv", overwrite=True)
    with pytest.raises(T2IError, match="both"):
        check_output(tmp_path / "c.csv", resume=True, overwrite=True)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(T2IError, match="ending in .parquet, .csv, .jsonl"):
        score(pictures(tmp_path), tmp_path / "out.xls")


def test_broken_and_missing_images_do_not_stop_the_rest(tmp_path):
    rows = pictures(tmp_path)
    rows[1].image.write_bytes(rows[1].image.read_bytes()[:45])
    rows[2].image.write_text("not an image")
    rows[4].image.unlink()
    rows[5] = Row(tmp_path, "a folder")
    table = score(rows, tmp_path / "out.jsonl")
    assert brightness(table) == [36, None, None, 144, None, None, 252]
    assert [row["error"] is None for row in table] == [True, False, False, True, False, False, True]
    assert "1.png" in table[1]["error"]
    assert "No such image" in table[4]["error"]


def test_images_of_several_sizes_and_modes(tmp_path):
    rows = [Row(picture(tmp_path / f"{n}.png", 50 * n, size), None) for n, size in enumerate([(4, 4), (9, 5), (4, 4)])]
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "3.png")
    rows.append(Row(tmp_path / "3.png", None))
    assert brightness(score_rows(rows, [Brightness()])) == [0, 50, 100, 255]


def test_a_scorer_that_fails_for_one_image_costs_only_that_row(tmp_path):
    rows = pictures(tmp_path, 4)
    picture(rows[2].image, 0)
    table = score_rows(rows, [Allergic(), Brightness()])
    assert [row["allergic"] is None for row in table] == [False, False, True, False]
    assert [row["error"] for row in table] == [None, None, "allergic: RuntimeError: too dark", None]
    assert brightness(table) == [36, 72, 0, 144]


def test_errors_of_several_scorers_are_joined(tmp_path):
    class Other(Allergic):
        name = "other"

    (row,) = score_rows([Row(picture(tmp_path / "a.png", 0), "p")], [Allergic(), Other()])
    assert row["error"] == "allergic: RuntimeError: too dark | other: RuntimeError: too dark"


def test_rows_without_a_prompt_are_refused_by_scorers_that_read_it(tmp_path):
    rows = [Row(picture(tmp_path / f"{n}.png", 200), prompt) for n, prompt in enumerate([None, "a red circle"])]
    table = score_rows(rows, [load_reward("verifier"), Brightness()])
    assert [row["verifier"] for row in table] == [None, 0.0]
    assert [row["error"] for row in table] == ["verifier: the row has no prompt", None]
    assert brightness(table) == [200, 200]


def test_prompts_that_a_scorer_cannot_read_are_row_errors(tmp_path):
    rows = [Row(picture(tmp_path / f"{n}.png", 200), prompt) for n, prompt in enumerate(["a blorp", "a red circle"])]
    table = score_rows(rows, [load_reward("verifier")])
    assert [row["verifier"] for row in table] == [None, 0.0]
    assert "'blorp'" in table[0]["error"]
    assert table[1]["error"] is None


def test_a_prompt_that_is_a_number_does_not_stop_the_rest(tmp_path):
    picture(tmp_path / "a.png", 100)
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "prompt": 5}\n{"image": "a.png", "prompt": "a red circle"}\n')
    for scorer in (load_reward("verifier"), Brightness()):
        table = score_rows(read_rows(tmp_path / "t.jsonl"), [scorer])
        assert table[1][scorer.name] is not None
        assert table[1]["error"] is None


def test_a_score_that_is_not_finite_is_null_with_a_reason(tmp_path):
    class Broken(Brightness):
        def forward(self, images, prompts):
            return torch.where(images.mean((1, 2, 3)) < 0.1, torch.nan, 1.0)

    rows = [Row(picture(tmp_path / f"{n}.png", level), None) for n, level in enumerate([200, 0])]
    table = score_rows(rows, [Broken()])
    assert [row["brightness"] for row in table] == [1.0, None]
    assert table[0]["error"] is None
    assert "brightness" in (table[1]["error"] or "")


def test_file_names_and_prompts_with_odd_characters(tmp_path):
    rows = [Row(picture(tmp_path / "a\u2028b.png", 100), "line\u2028separator\u0085"), *pictures(tmp_path, 3)]
    whole = score(rows, tmp_path / "whole.jsonl")
    interrupt(rows, tmp_path / "parts.jsonl", at=2)
    assert score(rows, tmp_path / "parts.jsonl", resume=True) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_file_name_that_is_not_unicode_does_not_stop_the_rest(tmp_path):
    picture(tmp_path / "b.png", 100)
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "b.png").read_bytes())
    for suffix in (".jsonl", ".csv", ".parquet"):
        table = score(read_rows(tmp_path), tmp_path / f"out{suffix}")
        assert brightness(table)[0] == 100
        assert len(table_in(tmp_path / f"out{suffix}")) == 2


def test_columns_of_sums_and_of_uncertain_scorers(tmp_path):
    class Unsure(Scorer):
        name = "unsure"

        def forward(self, images, prompts):
            return images.mean((1, 2, 3)), torch.full((len(images),), 0.25)

    reward = load_reward("2 * jpeg_incompressibility - jpeg_compressibility")
    names = [reward.name, "jpeg_incompressibility", "jpeg_compressibility"]
    assert score_columns([reward]) == names
    (row,) = score_rows([Row(picture(tmp_path / "a.png", 0), None)], [reward, Unsure()])
    assert row["jpeg_incompressibility"] > 0
    assert row[reward.name] == pytest.approx(3 * row["jpeg_incompressibility"], rel=1e-6)
    assert (row["unsure"], row["unsure_std"]) == (0.0, 0.25)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_resume_after_an_interruption_equals_an_unbroken_run(tmp_path, suffix):
    rows = pictures(tmp_path / "in")
    rows[1].image.unlink()
    out, whole = tmp_path / f"parts{suffix}", tmp_path / f"whole{suffix}"
    expected = score(rows, whole)
    interrupt(rows, out, at=2)
    assert not out.exists()
    scorer = Interrupted(at=0)
    assert score(rows, out, scorer, resume=True) == expected
    assert scorer.calls == 3  # of four batches the first was done
    assert table_in(out) == table_in(whole)
    assert not (tmp_path / f"parts{suffix}.partial.jsonl").exists()


def test_interruptions_in_the_first_batch_and_again_later(tmp_path):
    rows = pictures(tmp_path / "in")
    expected = score(rows, tmp_path / "whole.jsonl")
    out = tmp_path / "parts.jsonl"
    interrupt(rows, out, at=1)
    interrupt(rows, out, at=2, resume=True)
    interrupt(rows, out, at=1, resume=True)
    assert score(rows, out, resume=True) == expected


def test_a_partial_line_cut_short_is_done_again(tmp_path):
    rows = pictures(tmp_path / "in")
    rows[3] = Row(rows[3].image, "café")
    expected = score(rows, tmp_path / "whole.jsonl")
    out, partial = tmp_path / "parts.jsonl", tmp_path / "parts.jsonl.partial.jsonl"
    interrupt(rows, out, at=3)
    content = partial.read_bytes()
    assert content.count(b"\n") == 5  # the job and four rows
    last = content[:-1].rindex(b"\n") + 1
    for length in (last, last + 1, content.index("é".encode()) + 1, len(content) - 2, len(content) - 1):
        partial.write_bytes(content[:length])
        assert score(rows, out, resume=True) == expected
        out.unlink()


def test_a_job_cut_short_in_its_first_line_starts_again(tmp_path):
    rows = pictures(tmp_path / "in", 3)
    (tmp_path / "out.jsonl.partial.jsonl").write_text('{"job": "ab')
    assert brightness(score(rows, tmp_path / "out.jsonl", resume=True)) == [36, 72, 108]


def test_an_unfinished_job_is_not_replaced_silently(tmp_path):
    rows = pictures(tmp_path / "in")
    out = tmp_path / "out.jsonl"
    interrupt(rows, out, at=2)
    with pytest.raises(T2IError, match="unfinished job; pass --resume"):
        score(rows, out)
    scorer = Interrupted(at=0)
    assert len(score(rows, out, scorer, overwrite=True)) == 7
    assert scorer.calls == 4


def test_a_different_job_is_refused(tmp_path):
    rows = pictures(tmp_path / "in")
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial.jsonl"
    interrupt(rows, out, at=2)
    before = partial.read_bytes()
    for other, settings in (
        (rows[::-1], SETTINGS),
        (rows[:-1], SETTINGS),
        ([*rows[:-1], Row(rows[-1].image, "another")], SETTINGS),
        (rows, {"rewards": "verifier"}),
    ):
        with pytest.raises(T2IError, match="other images, prompts or rewards"):
            score(other, out, settings=settings, resume=True)
        assert partial.read_bytes() == before
    assert len(score(rows, out, resume=True)) == 7


def test_a_finished_table_is_not_replaced_silently(tmp_path):
    rows = pictures(tmp_path / "in", 2)
    out = tmp_path / "out.csv"
    score(rows, out)
    before = out.read_bytes()
    for how in ({}, {"resume": True}):
        with pytest.raises(T2IError, match="already exists"):
            score(rows[:1], out, **how)
        assert out.read_bytes() == before
    assert len(score(rows[:1], out, overwrite=True)) == len(table_in(out)) == 1
