import json
import shutil
from pathlib import Path

import pytest

from t2i_align.config import Settings, load_config
from t2i_align.errors import T2IError
from t2i_align.runs import FolderError, append_jsonl, check_folder, environment, open_folder, read_jsonl, write_text


class Job(Settings):
    steps: int = 3
    rate: float = 1e-4
    sizes: tuple[int, ...] = (1, 2)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def made(folder, config=None):
    open_folder(folder, config or Job())
    (folder / "result.txt").write_text("kept")
    return files(folder)


def test_a_new_folder_records_its_settings_and_environment(tmp_path):
    folder = open_folder(tmp_path / "a" / "b", Job(steps=9))
    assert load_config(Job, folder / "config.yaml") == Job(steps=9)
    recorded = json.loads((folder / "environment.json").read_text())
    assert recorded == environment()
    assert recorded["libraries"]["torch"]
    assert sorted(files(folder)) == ["config.yaml", "environment.json"]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_an_empty_folder_is_used(tmp_path, how):
    open_folder(tmp_path, Job(), **how)
    assert (tmp_path / "config.yaml").is_file()


def test_a_used_folder_is_refused_by_default(tmp_path):
    before = made(tmp_path / "run")
    with pytest.raises(FolderError, match="already holds files; pass --resume .* --overwrite"):
        open_folder(tmp_path / "run", Job())
    assert files(tmp_path / "run") == before


def test_resume_keeps_everything(tmp_path):
    before = made(tmp_path / "run")
    assert open_folder(tmp_path / "run", Job(), resume=True) == tmp_path / "run"
    assert files(tmp_path / "run") == before


def test_resume_with_other_settings_names_them(tmp_path):
    before = made(tmp_path / "run")
    with pytest.raises(FolderError) as caught:
        open_folder(tmp_path / "run", Job(steps=4, sizes=(3,)), resume=True)
    assert "(steps: 3 there, 4 here, sizes: (1, 2) there, (3,) here)" in str(caught.value)
    assert files(tmp_path / "run") == before


def test_overwrite_replaces_a_folder_of_ours(tmp_path):
    made(tmp_path / "run")
    (tmp_path / "run" / "sub").mkdir()
    open_folder(tmp_path / "run", Job(steps=4), overwrite=True)
    assert sorted(files(tmp_path / "run")) == ["config.yaml", "environment.json"]
    assert load_config(Job, tmp_path / "run" / "config.yaml").steps == 4


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
def test_a_foreign_folder_is_never_touched(tmp_path, how):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError):
        open_folder(tmp_path, Job(), **how)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_foreign_folder_with_a_config_of_its_own_is_never_deleted(tmp_path):
    (tmp_path / "config.yaml").write_text("database: postgres\n")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(T2IError):
        open_folder(tmp_path, Job(), overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_in_the_way_is_refused(tmp_path, how):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(FolderError, match="it is a file"):
        open_folder(tmp_path / "run", Job(), **how)
    assert (tmp_path / "run").read_text() == "a file"


def test_write_text_replaces_and_leaves_nothing_behind(tmp_path):
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "zwei ä")
    assert files(tmp_path) == {"a.txt": "zwei ä".encode()}


def test_jsonl_round_trip(tmp_path):
    rows = [{"a": 1.5, "b": None}, {"text": 'größe "x"\nnext'}]
    append_jsonl(tmp_path / "a.jsonl", rows)
    append_jsonl(tmp_path / "a.jsonl", rows[:1])
    assert read_jsonl(tmp_path / "a.jsonl") == [*rows, rows[0]]
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1c", "\r"])
def test_jsonl_round_trip_of_line_separators(tmp_path, character):
    rows = [{"text": f"a{character}b"}, {"text": "c"}]
    append_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows


def test_a_last_line_cut_short_anywhere_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, [{"n": 1}, {"n": 2, "text": "café"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_jsonl(path) == [{"n": 1}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(T2IError, match="Line 2 of"):
        read_jsonl(tmp_path / "a.jsonl")


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(FolderError, match="got both"):
        open_folder(tmp_path / "run", Job(), resume=True, overwrite=True)


def test_a_folder_of_another_job_is_not_replaced(tmp_path):
    class Other(Settings):
        shape: str = "round"

    open_folder(tmp_path / "run", Other())
    (tmp_path / "run" / "weights").write_text("precious")
    with pytest.raises(FolderError, match="neither resumed nor replaced"):
        open_folder(tmp_path / "run", Job(), overwrite=True)
    assert (tmp_path / "run" / "weights").read_text() == "precious"


def test_overwrite_empties_the_current_folder_and_linked_ones(tmp_path, monkeypatch):
    open_folder(tmp_path / "run", Job())
    (tmp_path / "run" / "old").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    open_folder(tmp_path / "link", Job(), overwrite=True)
    assert not (tmp_path / "run" / "old").exists()
    monkeypatch.chdir(tmp_path / "run")
    open_folder(".", Job(), overwrite=True)
    assert (tmp_path / "run" / "config.yaml").is_file()


@pytest.mark.parametrize("how", ["resume", "overwrite"])
@pytest.mark.parametrize("operation", range(4))
def test_a_kill_while_a_folder_is_made_leaves_one_of_ours(tmp_path, monkeypatch, operation, how):
    """Two files are written and renamed; the kill comes before one of these four."""
    done = []

    def counted(name):
        true = getattr(Path, name)

        def action(self, *args, **options):
            if len(done) == operation:
                raise KeyboardInterrupt
            done.append(self)
            return true(self, *args, **options)

        return action

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", counted("write_text"))
        patched.setattr(Path, "replace", counted("replace"))
        with pytest.raises(KeyboardInterrupt):
            open_folder(tmp_path / "run", Job())
    assert len(done) == operation
    open_folder(tmp_path / "run", Job(), **{how: True})
    assert sorted(files(tmp_path / "run")) == ["config.yaml", "environment.json"]
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == environment()


@pytest.mark.parametrize("name", ["environment.json.tmp", "config.yaml.tmp"])
def test_half_a_first_file_is_no_hindrance(tmp_path, name):
    (tmp_path / name).write_text("{")
    with pytest.raises(FolderError, match="already holds files"):
        open_folder(tmp_path, Job())
    open_folder(tmp_path, Job(), resume=True)
    assert load_config(Job, tmp_path / "config.yaml") == Job()


def test_an_environment_of_another_program_is_not_ours(tmp_path):
    (tmp_path / "environment.json").write_text('{"channels": ["conda-forge"]}')
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FolderError, match="neither resumed nor replaced"):
            open_folder(tmp_path, Job(), **how)


def test_a_kill_while_a_folder_is_emptied_leaves_one_of_ours(tmp_path, monkeypatch):
    made(tmp_path / "run")
    for name in ("a", "b", "c"):
        (tmp_path / "run" / name).mkdir()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_folder(tmp_path / "run", Job(steps=4), overwrite=True)
    open_folder(tmp_path / "run", Job(steps=4), overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "environment.json"]
    assert load_config(Job, tmp_path / "run" / "config.yaml").steps == 4


def test_checking_a_folder_changes_nothing(tmp_path):
    before = made(tmp_path / "run")
    check_folder(tmp_path / "run", Job(), overwrite=True)
    check_folder(tmp_path / "new", Job())
    with pytest.raises(FolderError, match="steps: 3 there, 4 here"):
        check_folder(tmp_path / "run", Job(steps=4), resume=True)
    assert files(tmp_path / "run") == before
    assert not (tmp_path / "new").exists()
