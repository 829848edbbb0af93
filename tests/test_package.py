"""The package as a newcomer meets it: links, imports, start-up, the wheel."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import t2i_align

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("t2i_align", "rewards", "pipelines", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
]


@pytest.mark.parametrize("name", ["rewards", "pipelines"])
def test_links_resolve_to_the_top_level_folders(name):
    link = ROOT / "t2i_align" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


def test_short_names_are_never_imported():
    guilty = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            guilty += [f"{path}:{node.lineno}" for name in names if name.split(".")[0] in ("rewards", "pipelines")]
    assert not guilty


def test_imports_point_one_way():
    lower = [*(ROOT / "rewards").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    above = re.compile(r"t2i_align\.(methods|steering|training|values|cli|jobs|demo|scoring)\b")
    assert not [path for path in lower if above.search(path.read_text(encoding="utf-8"))]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_and_help_load_no_heavy_library():
    heavy = "{'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'scipy', 'pyarrow'}"
    code = f"import sys, t2i_align, t2i_align.cli.main; print(sorted({heavy} & set(sys.modules)))"
    assert run(code).strip() == "[]"


def test_a_trained_scorers_head_needs_no_diffusion_library():
    code = "import sys; from t2i_align.rewards.heads import Readout; Readout(4); print('diffusers' in sys.modules)"
    assert run(code).strip() == "False"


def test_public_names_are_there():
    for name in t2i_align.__all__:
        assert getattr(t2i_align, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        t2i_align.nothing  # noqa: B018


def test_a_checkout_without_links_says_so(tmp_path):
    package = tmp_path / "t2i_align"
    package.mkdir()
    for name in ("__init__.py", "_version.py"):
        (package / name).write_text((ROOT / "t2i_align" / name).read_text(encoding="utf-8"), encoding="utf-8")
    (package / "rewards").write_text("../rewards")
    done = subprocess.run([sys.executable, "-c", "import t2i_align"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "core.symlinks=true" in done.stderr


def test_the_wheel_holds_everything(tmp_path):
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".git", ".venv", "runs", "demo", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for needed in (
        "t2i_align/rewards/verifier.py",
        "t2i_align/pipelines/loading.py",
        "t2i_align/templates/demo.html",
        "t2i_align/playground/weights/tiny-sd/model_index.json",
        "t2i_align/playground/weights/tiny-sd/unet/diffusion_pytorch_model.safetensors",
        "t2i_align/py.typed",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("rewards/", "pipelines/", "tests/"))]
