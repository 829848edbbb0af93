import json

import pyarrow
import pyarrow.parquet
import pytest

from t2i_align.errors import T2IError
from t2i_align.prompts import Prompts, find_column, read_prompts


def table():
    return Prompts(("a", "b", "c"), {"seed": (1, 2, 3), "tag": ("x", "y", "z")})


def test_one_text_serves_all_rows():
    assert Prompts.of("a cat", 3).text == ("a cat",) * 3
    assert Prompts.of("a cat").text == ("a cat",)


def test_none_is_the_empty_prompt():
    assert Prompts.of(None, 2).text == ("", "")


def test_lists_and_tables_pass_through():
    assert Prompts.of(["a", "b"], 2).text == ("a", "b")
    mine = table()
    assert Prompts.of(mine, 3) is mine


def test_a_wrong_number_of_prompts_is_refused():
    with pytest.raises(T2IError, match="each of 3 images but got 2"):
        Prompts.of(["a", "b"], 3)
    with pytest.raises(T2IError, match="each of 2 images but got 3"):
        Prompts.of(table(), 2)


@pytest.mark.parametrize("wrong", [["a", 5], ["a", None], [b"a"], 5])
def test_prompts_that_are_not_text_are_refused(wrong):
    with pytest.raises(TypeError):
        Prompts.of(wrong)


def test_columns_need_a_value_a_row():
    with pytest.raises(T2IError, match="'seed': 2"):
        Prompts(("a", "b", "c"), {"seed": (1, 2), "tag": ("x", "y", "z")})


def test_an_index_gives_a_text_and_a_slice_a_table():
    assert table()[1] == "b"
    assert table()[-1] == "c"
    assert table()[1:] == Prompts(("b", "c"), {"seed": (2, 3), "tag": ("y", "z")})
    assert table()[[2, 0]] == Prompts(("c", "a"), {"seed": (3, 1), "tag": ("z", "x")})
    assert len(table()[5:]) == 0
    assert list(table()) == ["a", "b", "c"]


def test_repeat_is_group_major():
    repeated = table()[:2].repeat(3)
    assert repeated.text == ("a", "a", "a", "b", "b", "b")
    assert repeated.columns["seed"] == (1, 1, 1, 2, 2, 2)


def test_plain_text_is_the_one_prompt():
    assert read_prompts("a red circle, 3.5 cm").text == ("a red circle, 3.5 cm",)


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_prompt_is_refused(empty):
    with pytest.raises(T2IError, match="empty"):
        read_prompts(empty)


def test_txt_has_a_prompt_a_line(tmp_path):
    path = tmp_path / "p.TXT"
    path.write_bytes("\ufeffa cat\r\n\n  größe \n".encode())
    assert read_prompts(path).text == ("a cat", "größe")


def test_jsonl_keeps_the_other_columns(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "seed": 4}\n\n{"prompt": "b", "image": "x.png"}\n{"seed": 1}\n')
    read = read_prompts(path)
    assert read.text == ("a", "b", "")
    assert read.columns == {"seed": (4, None, 1), "image": (None, "x.png", None)}


def test_jsonl_prompts_may_hold_any_character(tmp_path):
    text = "line\u2028separator, next\u0085line, \u000c and\ttab"
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_prompts(path).text == (text,)


def test_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes('\ufeffcaption,seed\n"a cat, sitting",1\n"two\nlines",2\n'.encode())
    read = read_prompts(path)
    assert read.text == ("a cat, sitting", "two\nlines")
    assert read.columns == {"seed": ("1", "2")}


def test_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "seed": [1, None]}), path)
    read = read_prompts(path)
    assert read.text == ("a", "b")
    assert read.columns == {"seed": (1, None)}


def test_sets_of_prompts_as_they_are_published(tmp_path):
    files = {
        "parti.tsv": 'Prompt\tCategory\tChallenge\tNote\n"a cat", asleep\tAnimals\tBasic\t\n',
        "drawbench.csv": 'Prompts,Category\n"a cat, asleep",Colors\n',
        "refl.json": '[{"text": "a cat, asleep", "image": "x.png"}]',
        "anime.json": '["a cat, asleep"]',  # HPSv2
        "geneval.jsonl": '{"tag": "single", "include": [{"class": "cat"}], "prompt": "a cat, asleep"}\n',
    }
    columns = {
        "parti.tsv": {"Category": ("Animals",), "Challenge": ("Basic",), "Note": ("",)},
        "drawbench.csv": {"Category": ("Colors",)},
        "refl.json": {"image": ("x.png",)},
        "anime.json": {},
        "geneval.jsonl": {"tag": ("single",), "include": ([{"class": "cat"}],)},
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        said = '"a cat", asleep' if name == "parti.tsv" else "a cat, asleep"  # its quotes are the prompts' own
        assert read_prompts(tmp_path / name) == Prompts((said,), columns[name])
    (tmp_path / "styles.json").write_text('{"anime": ["a"]}')
    with pytest.raises(T2IError, match="to be a list of objects or of texts"):
        read_prompts(tmp_path / "styles.json")


def test_a_comma_without_quotes_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,seed\na red circle,1\na red circle, left of a square,2\n")
    with pytest.raises(T2IError, match="Row 2 of .*p.csv has more cells than the header"):
        read_prompts(tmp_path / "p.csv")


def test_a_file_of_another_kind_is_no_prompt(tmp_path, monkeypatch):
    (tmp_path / "notes.md").write_text("a red circle")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats" / "old").mkdir(parents=True)
    assert read_prompts("cats").text == ("cats",)
    for source in ("notes.md", ".", "..", "cats/old", str(tmp_path)):
        with pytest.raises(T2IError, match="Expected a prompt or a file ending in"):
            read_prompts(source)
    assert read_prompts("a cat. " * 100).text == ("a cat. " * 100,)


def test_images_in_a_parquet_file_are_no_columns_of_prompts(tmp_path):
    cell = [{"bytes": b"much", "path": None}]
    table = pyarrow.table({"caption": ["a"], "jpg_0": [b"much"], "image": cell, "seed": [3]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet") == Prompts(("a",), {"seed": (3,)})


def test_prompt_column_goes_before_caption_and_text():
    assert find_column(["text", "caption", "Prompt"], ("prompt", "caption", "text")) == "Prompt"
    assert find_column(["prompt", "caption"], ("caption", "prompt")) == "caption"
    assert find_column(["prompt"], ("file",)) is None
    assert find_column(["Prompt", "prompt"], ("prompt",)) == "prompt"


def test_tables_that_are_joined_keep_the_negative_prompts_of_either():
    one, other = Prompts(("a",), {"negative_prompt": ("x",), "seed": (1,)}), Prompts(("b",), {"tag": (2,)})
    assert (one + other) == Prompts(("a", "b"), {"negative_prompt": ("x", None)})
    assert (other + one).columns == {"negative_prompt": (None, "x")}


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.csv", "no.parquet"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(T2IError, match=f"No such file: .*{name}"):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n"), ("a.jsonl", "\n"), ("a.csv", "prompt\n")])
def test_files_without_prompts_are_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(T2IError, match=name):
        read_prompts(tmp_path / name)


def test_a_table_without_a_prompt_column_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("seed,size\n1,2\n")
    with pytest.raises(T2IError, match="column prompt or caption or text"):
        read_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize("line", ['{"prompt": "b"', "[1, 2]", '"b"'])
def test_a_bad_json_line_is_numbered(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(T2IError, match="[Ll]ine 2 of"):
        read_prompts(path)


def test_broken_files_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "a.txt").write_bytes(b"gr\xf6\xdfe\n")
    with pytest.raises(T2IError, match="not a readable parquet file"):
        read_prompts(tmp_path / "a.parquet")
    with pytest.raises(T2IError, match="not UTF-8"):
        read_prompts(tmp_path / "a.txt")
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(T2IError, match="Expected a prompt or a file ending in"):
        read_prompts(tmp_path / "a.xls")
