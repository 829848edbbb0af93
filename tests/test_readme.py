"""Every command of the README runs; the `make` targets are what CI itself runs."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_run_in_order(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    commands = [words[1:] for words in lines if words[0] == "t2i-align"]
    assert {words[0] for words in lines} == {"make", "source", "t2i-align"}
    assert ["source", ".venv/bin/activate"] in lines  # `make` installs there
    assert len(commands) >= 6
    for words in commands:
        code, _, err = cli(*words)
        assert code == 0, f"{words}: {err}"


def test_python_runs(capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert f"\n{words[1]}:" in makefile
