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
from t2i_align.scoring import Row, check_output, read_rows, score_columns, score_file, score_rows, write_table
from tests import tiny_scorers, tiny_vlm


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
    """Score in batches of two, saved by chunks of two batches; returns the table written."""
    score_file(rows, [scorer or Brightness()], out, settings=settings, batch_size=2, **options)
    return table_in(out)


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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


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


@pytest.mark.parametrize("name", ["results.jsonl", "results.parquet", "prompts.jsonl"])
def test_a_folder_of_ours_is_read_by_its_listing(tmp_path, name):
    picture(tmp_path / "images" / "1.png", 10)
    picture(tmp_path / "grid.png", 10)
    write_table([{"image": "images/1.png", "prompt": "p"}], tmp_path / name)
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
    with pytest.raises(T2IError, match="Expected a folder of images, a table"):
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
    record = yaml.safe_load((out.parent / "scores.config.yaml").read_text())
    assert record.pop("job")["rewards"] == SETTINGS["rewards"]
    assert record == SETTINGS | {"table": out.name}


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
    from t2i_align.scoring import batch

    class Counting(Brightness):
        sizes = []

        def forward(self, images, prompts):
            self.sizes.append(len(images))
            return super().forward(images, prompts)

    monkeypatch.setattr(batch, "BATCH_PIXELS", 3 * 8 * 6)
    table = score_file(pictures(tmp_path, 5), [Counting()], tmp_path / "o.csv", settings=SETTINGS, batch_size=4)
    assert table.rows == 5
    assert Counting.sizes == [3, 2]


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


FIXED = [tiny_scorers.aesthetic_v25, tiny_scorers.mps, tiny_vlm.image_reward, tiny_vlm.cyclereward, tiny_vlm.vqascore]


@pytest.mark.parametrize("build", FIXED)
def test_networks_of_one_input_size_run_once_for_pictures_of_many(build, tmp_path):
    scorer = build(tmp_path)
    rng = torch.Generator().manual_seed(0)
    rows = []
    for n, (height, width) in enumerate([(40, 50), (64, 30), (40, 50), (33, 33)]):
        pixels = (255 * torch.rand(height, width, 3, generator=rng)).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        rows.append(Row(tmp_path / f"{n}.png", "a red circle"))
    alone = [score_rows([row], [scorer])[0][scorer.name] for row in rows]
    calls = []
    scorer.register_forward_hook(lambda *_: calls.append(1))
    together = [row[scorer.name] for row in score_rows(rows, [scorer])]
    assert len(calls) == 1
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    seen = torch.rand(2, 3, 45, 37, generator=rng)
    fitted = scorer.preprocessing.fit(seen)
    assert torch.equal(scorer.preprocessing.fit(fitted), fitted)  # `forward` fits again


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


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_file_names_and_prompts_with_odd_characters(tmp_path, suffix):
    said = "line\u2028separator\u0085\r\n\x00"
    rows = [Row(picture(tmp_path / "a\u2028b.png", 100), said), Row(tmp_path / "a\u2028b.png", "half \ud83d of a pair")]
    rows.append(Row(tmp_path / "a\u2028b.png", None, {"tag": ["\udfff", {"x": 1}]}))
    table = score(rows, tmp_path / f"out{suffix}")
    assert brightness(table) == [100, 100, 100]
    assert table[0]["prompt"] == said
    assert table[1]["prompt"] == "half \\ud83d of a pair"


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
    assert list(row)[:6] == ["image", "prompt", *names, "unsure"]
    assert row["jpeg_incompressibility"] > 0
    assert row[reward.name] == pytest.approx(3 * row["jpeg_incompressibility"], rel=1e-6)
    assert (row["unsure"], row["unsure_std"]) == (0.0, 0.25)


def test_the_rows_of_a_prompt_go_together_and_the_table_keeps_their_order(tmp_path):
    class Seeing(Brightness):
        needs_prompt = True
        calls = []

        def forward(self, images, prompts):
            self.calls.append(list(prompts.text))
            return super().forward(images, prompts)

    rows = [Row(picture(tmp_path / f"{n}.png", 20 * n), f"p{n % 3}") for n in range(8)]
    score_file(rows, [Seeing()], tmp_path / "o.jsonl", settings=SETTINGS, batch_size=3)
    assert Seeing.calls == [["p0", "p0", "p0"], ["p1", "p1", "p1"], ["p2", "p2"]]
    assert brightness(table_in(tmp_path / "o.jsonl")) == [20 * n for n in range(8)]


def test_scorers_on_one_tower_get_one_tensor(tmp_path):
    seen = []

    class First(Brightness):
        def forward(self, images, prompts):
            seen.append(images)
            return super().forward(images, prompts)

    class Second(First):
        name = "second"

    score_rows(pictures(tmp_path, 3), [First(), Second()])
    assert seen[0] is seen[1]


def test_columns_reach_the_scorers_that_read_them(tmp_path):
    class Tagged(Scorer):
        name = "tagged"
        columns = ("tag",)

        def forward(self, images, prompts):
            return torch.tensor([float(tag) for tag in prompts.columns["tag"]])

    image = picture(tmp_path / "a.png", 9)
    table = score_rows([Row(image, None, {"tag": 3}), Row(image, None), Row(image, None, {"tag": 4})], [Tagged()])
    assert [row["tagged"] for row in table] == [3, None, 4]
    assert table[1]["error"] == "tagged: the row has no tag"


def test_scorers_that_compare_images_are_refused(tmp_path):
    class Ranking(Brightness):
        groupwise = True

    with pytest.raises(T2IError, match="compares the images of one prompt"):
        score(pictures(tmp_path, 2), tmp_path / "o.csv", Ranking())
    assert not list(tmp_path.glob("o.csv*"))


def test_a_failing_batch_is_halved_down_to_the_guilty_rows(tmp_path):
    class Counting(Allergic):
        sizes = []

        def forward(self, images, prompts):
            self.sizes.append(len(images))
            return super().forward(images, prompts)

    rows = [Row(picture(tmp_path / f"{n}.png", 0 if n == 5 else 100), None) for n in range(16)]
    table = score_rows(rows, [Counting()])
    assert [row["allergic"] is None for row in table] == [n == 5 for n in range(16)]
    assert sorted(Counting.sizes) == [1, 1, 2, 2, 4, 4, 8, 8, 16]


def test_bf16_runs_matrix_products_in_bfloat16(tmp_path):
    class Linear(Scorer):
        name = "linear"

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 8 * 6, 1)
            self.seen = []

        def forward(self, images, prompts):
            value = self.layer(images.flatten(1))[:, 0]
            self.seen.append(value.dtype)
            return value

    scorer, rows = Linear(), pictures(tmp_path, 3)
    fine, coarse = (score_rows(rows, [scorer], dtype=dtype) for dtype in ("fp32", "bf16"))
    assert scorer.seen == [torch.float32, torch.bfloat16]
    for a, b in zip(fine, coarse, strict=True):
        assert a["linear"] != b["linear"]
        assert a["linear"] == pytest.approx(b["linear"], abs=0.05)
    with pytest.raises(T2IError, match="fp32 or bf16"):
        score_rows(rows, [scorer], dtype="fp16")


def test_a_report_that_fails_is_a_note_and_the_rest_goes_on(tmp_path):
    class Telling(Brightness):
        def explain(self, image, prompt):
            if image.mean() < 50:
                raise ValueError("too\ndark")
            return f"{image.mean():.0f} of 255"

    table = score(pictures(tmp_path, 2), tmp_path / "o.jsonl", Telling(), explain=True)
    assert brightness(table) == [36, 72]
    assert [row["brightness_report"] for row in table] == ["no report: ValueError: too dark", "72 of 255"]
    assert [row["error"] for row in table] == [None, None]


def test_animated_and_turned_images_carry_a_note(tmp_path):
    frames = [Image.new("RGB", (8, 6), (level,) * 3) for level in (50, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[274] = 6
    frames[1].save(tmp_path / "b.jpg", exif=exif)
    picture(tmp_path / "c.png", 9)
    table = score(read_rows(tmp_path), tmp_path / "o.jsonl")
    assert brightness(table)[::2] == [50, 9]
    assert [row.get("image_note") for row in table] == ["first of 2 frames", "turned as its EXIF says", None]
    assert [row["error"] for row in table] == [None] * 3


def test_images_above_the_limit_are_refused_unread(tmp_path):
    rows = [Row(picture(tmp_path / "big.png", 90, (100, 60)), None), Row(picture(tmp_path / "small.png", 90), None)]
    table = score(rows, tmp_path / "o.jsonl", max_pixels=5999)
    assert brightness(table) == [None, 90]
    assert "100 x 60 pixels; the limit is 5999" in table[0]["error"]
    assert brightness(score(rows, tmp_path / "p.jsonl", max_pixels=6000)) == [90, 90]


def test_our_limit_stands_in_for_pillows(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    rows = [Row(picture(tmp_path / "big.png", 90, (100, 60)), None)]
    assert brightness(score(rows, tmp_path / "o.jsonl", max_pixels=10_000)) == [90]
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert not [warning for warning in recwarn if "DecompressionBomb" in str(warning.category)]


@pytest.mark.parametrize("workers", [1, 3])
def test_decoding_ahead_keeps_order_and_bounds(tmp_path, monkeypatch, workers):
    from t2i_align.scoring import decode

    monkeypatch.setattr(decode, "AHEAD_PIXELS", 200)
    rows = pictures(tmp_path, 30)[:7] * 4
    rows[3] = Row(picture(tmp_path / "huge.png", 77, (50, 40)), None)  # above the bound by itself
    rows[9] = Row(tmp_path / "none.png", None)
    decoder = decode.Decoder(workers, ahead=12)
    found = list(decoder(enumerate(rows)))
    assert [tag for tag, _ in found] == list(range(28))
    assert [item.row for _, item in found] == rows
    assert [item.error is None for _, item in found] == [n != 9 for n in range(28)]
    assert found[3][1].pixels.shape == (40, 50, 3)


def test_a_reader_that_leaves_early_stops_the_decoding(tmp_path):
    import threading

    from t2i_align.scoring.decode import Decoder

    before = threading.active_count()
    reader = Decoder(2, ahead=8)(enumerate(pictures(tmp_path, 7) * 50))
    next(reader)
    reader.close()
    assert threading.active_count() == before


def test_an_interrupted_job_leaves_no_threads(tmp_path):
    import threading

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt) as held:
        score(pictures(tmp_path, 7) * 50, tmp_path / "out.csv", Interrupted(2))
    assert held.value
    assert threading.active_count() == before


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_of_several_types_are_written_as_before(tmp_path, suffix):

    rows = [{"n": n, "mixed": n, "late": None, "list": [n]} for n in range(5000)]
    rows[4500] |= {"mixed": "x", "late": 2.5, "new": True}
    path = tmp_path / f"t{suffix}"
    write_table(rows, path)
    table = table_in(path)
    assert len(table) == 5000
    if suffix == ".parquet":
        schema = pyarrow.parquet.read_schema(path)
        kinds = {name: str(schema.field(name).type) for name in schema.names}
        assert [kinds[name] for name in rows[4500]] == ["int64", "string", "double", "list<element: int64>", "bool"]
        assert table[4499] == {"n": 4499, "mixed": "4499", "late": None, "list": [4499], "new": None}
    if suffix == ".csv":
        assert table[4500] == {"n": "4500", "mixed": "x", "late": "2.5", "list": "[4500]", "new": "True"}


def test_values_that_parquet_has_no_type_for_become_text(tmp_path):
    rows = [{"hash": 2**64 - 1 - n, "meta": {}, "deep": [{"x": {}}], "late": 2**60 + n} for n in range(5000)]
    rows[4999] |= {"meta": {"a": 1}, "late": 0.5}
    rows[0] |= {"meta": None}
    write_table(rows, tmp_path / "t.parquet")
    table = table_in(tmp_path / "t.parquet")
    assert table[0] == {"hash": str(2**64 - 1), "meta": None, "deep": '[{"x": {}}]', "late": str(2**60)}
    assert (table[1]["meta"], table[4999]["meta"], table[4999]["late"]) == ("{}", '{"a": 1}', "0.5")


def test_a_table_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    from t2i_align.data import tables

    out = tmp_path / "out.parquet"
    rows = pictures(tmp_path / "in", 3)
    score(rows[:2], out)
    before = out.read_bytes()
    monkeypatch.setattr(tables, "_array", lambda values, kind=None: values[10**9])
    with pytest.raises(IndexError):
        score(rows, out, overwrite=True)
    assert out.read_bytes() == before
    monkeypatch.undo()
    assert len(score(rows, out, Interrupted(at=1), resume=True)) == 3


def test_dates_of_a_parquet_table_travel_along_and_bytes_do_not(tmp_path):
    import datetime

    picture(tmp_path / "a.png", 60)
    when = datetime.datetime(2024, 5, 6, 7, 8)
    table = pyarrow.Table.from_pylist([{"image": "a.png", "when": when, "jpg": b"123", "score": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    (row,) = score(read_rows(tmp_path / "t.parquet"), tmp_path / "o.jsonl")
    assert row["when"] == "2024-05-06 07:08:00"
    assert "jpg" not in row


def toy_scorers(encode, resize="shortest"):
    """Two scorers on one tower whose image features are the pixels of its 8x8 input."""
    from t2i_align.rewards.clip import TowerScorer
    from t2i_align.rewards.tower import Preprocessing, Tower, TowerSpec

    preprocessing = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3, resize)
    tower = Tower(TowerSpec("toy"), torch.nn.Linear(1, 1), preprocessing, encode, None, None, None)

    class Bright(TowerScorer):
        def __init__(self, name, channel):
            super(TowerScorer, self).__init__()
            self._hold(tower)
            self.name, self.channel = name, channel

        def forward(self, images, prompts):
            return self.tower.image_features(images).view(len(images), 3, -1)[:, self.channel].mean(1)

    return Bright("a", 0), Bright("b", 1)


def test_pictures_of_many_sizes_make_one_batch_for_a_tower(tmp_path):
    sizes = []

    def encode(network, pixels):
        sizes.append(len(pixels))
        return pixels.flatten(1)

    first, second = toy_scorers(encode)
    rng = torch.Generator().manual_seed(0)
    rows = []
    for n in range(9):
        width, height = torch.randint(8, 40, (2,), generator=rng).tolist()
        level = torch.randint(0, 256, (height, width, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(level.numpy()).save(tmp_path / f"{n}.png")
        rows.append(Row(tmp_path / f"{n}.png", None))
    rows[4].image.write_bytes(b"")
    scorers = [first, Brightness(), second]
    table = score_rows(rows, scorers)
    assert sizes == [8]  # one batch, for two scorers
    for row, line in zip(rows, table, strict=True):
        if row.image.stat().st_size:
            for scorer in scorers:
                alone = scorer.scores([row.image], [""]).total.item()
                assert line[scorer.name] == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_a_tower_that_takes_pictures_as_they_are_gets_those_of_one_size_together(tmp_path):
    shapes = []

    def encode(network, pixels):
        shapes.append(tuple(pixels.shape))
        return pixels.flatten(1)

    scorers = toy_scorers(encode, "none")
    sizes = [(4, 4), (9, 5), (4, 4), (9, 5)]
    rows = [Row(picture(tmp_path / f"{n}.png", 50 * n, size), None) for n, size in enumerate(sizes)]
    table = score_rows(rows, scorers)
    assert set(shapes) == {(2, 3, 4, 4), (2, 3, 5, 9)}
    for row, line in zip(rows, table, strict=True):
        for scorer in scorers:
            assert line[scorer.name] == pytest.approx(scorer.scores([row.image], [""]).total.item(), abs=1e-6)


def test_bf16_gives_towers_weights_of_that_type_for_the_time_of_the_job(tmp_path):
    types = []

    def encode(network, pixels):
        types.append((network.weight.dtype, pixels.dtype, torch.is_autocast_enabled("cpu")))
        return pixels.flatten(1)

    scorers = toy_scorers(encode)
    towers = [scorer.tower for scorer in scorers]
    table = score_rows(pictures(tmp_path, 3), scorers, dtype="bf16")
    assert types == [(torch.bfloat16, torch.bfloat16, False)]
    assert [scorer.tower for scorer in scorers] == towers
    fine = score_rows(pictures(tmp_path, 3), scorers)
    for row, exact in zip(table, fine, strict=True):
        assert row["a"] == pytest.approx(exact["a"], rel=0.02)


def test_a_text_is_encoded_once_in_a_chunk():
    from t2i_align.scoring import Scoring
    from t2i_align.scoring.decode import Decoded

    scorer = load_reward("tiny_clip")
    pixels = torch.full((64, 64, 3), 200, dtype=torch.uint8).numpy()
    colours = ("red", "red", "blue", "red")
    batch = [Decoded(Row(Path("none.png"), f"a {colour} circle"), pixels) for colour in colours]
    texts = []
    tokenise = scorer.tower.tokenise
    scorer.tower.tokenise = lambda new: texts.extend(new) or tokenise(new)
    try:
        scoring = Scoring([scorer, load_reward("2 * tiny_clip")])
        scoring(batch)
        scoring(batch)
        assert texts == ["a red circle", "a blue circle"]
        scoring.forget()
        scoring(batch)
        assert texts == ["a red circle", "a blue circle"] * 2
    finally:
        scorer.tower.tokenise = tokenise
