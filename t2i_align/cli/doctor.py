"""`t2i-align doctor`: what is installed, what is missing, how to mend it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from typer import Exit, Option

from t2i_align.cli.tables import print_json

NEEDED_DISK = 2e9  # bytes
EXTRAS = {"xformers": "xformers", "bitsandbytes": "bnb", "wandb": "wandb"}


class Check(NamedTuple):
    """One line of the report; `mend` says what to do unless `state` is ok."""

    name: str
    state: str  # ok | note | wrong
    found: str
    mend: str = ""


def doctor(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """Check the installation and say how to mend it.

    Versions, devices, links, weights and disk; the exit code is 1 if something is wrong.
    """
    checks = list(_checks())
    if as_json:
        print_json([check._asdict() for check in checks], indent=2)
    else:
        for check in checks:
            print(f"{check.state:5}  {check.name}: {check.found}" + (f" -> {check.mend}" if check.mend else ""))
        wrong = sum(check.state == "wrong" for check in checks)
        print("all is well" if not wrong else f"{wrong} thing{'s' if wrong > 1 else ''} to mend")
    if any(check.state == "wrong" for check in checks):
        raise Exit(1)


def _checks() -> Iterator[Check]:
    """Every section's checks; a section that fails is itself something wrong."""
    for section in (_python, _libraries, _devices, _links, _weights, _disk):
        try:
            yield from section()
        except Exception as error:
            yield Check(section.__name__.strip("_"), "wrong", f"{type(error).__name__}: {error}", "see the lines above")


def _python() -> Iterator[Check]:
    import t2i_align

    yield Check("t2i-align", "ok", f"{t2i_align.__version__} in {Path(t2i_align.__file__).parent}")
    version = ".".join(map(str, sys.version_info[:3]))
    fine = sys.version_info >= (3, 10)
    yield Check("python", "ok" if fine else "wrong", version, "" if fine else "install Python 3.10 or newer")


def _links() -> Iterator[Check]:
    import t2i_align

    for link in ("rewards", "pipelines"):  # importing t2i_align has already refused a checkout that lost them
        path = Path(t2i_align.__file__).parent / link
        yield Check(
            f"link {link}", "ok", f"{path} -> {path.resolve()}" if path.is_symlink() else f"{path} (installed copy)"
        )


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(Path.cwd()).free
    fine = free > NEEDED_DISK
    yield Check("disk", "ok" if fine else "wrong", f"{free / 1e9:.1f} GB free here", "" if fine else "free some space")


def _libraries() -> Iterator[Check]:
    import re
    from importlib import metadata

    for requirement in metadata.requires("t2i-align") or []:
        match = re.match(r"([\w.-]+)(?:>=([\d.]+))?", requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, least = match.groups()
        found = _version(name)
        if found is None:
            yield Check(name, "wrong", "missing", f"pip install '{requirement}'")
        elif least and _numbers(found) < _numbers(least):
            yield Check(name, "wrong", f"{found}, older than {least}", f"pip install -U '{requirement}'")
        else:
            yield Check(name, "ok", found)
    for name, extra in EXTRAS.items():
        mend = f"optional: pip install 't2i-align[{extra}]'"
        found = _version(name)
        yield Check(name, "ok", found) if found else Check(name, "note", "not installed", mend)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    import re

    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _devices() -> Iterator[Check]:
    import torch

    yield Check("cpu", "ok", f"{torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(index)
            yield Check(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    elif torch.backends.mps.is_available():
        yield Check("mps", "ok", "Apple GPU")
    else:
        yield Check("gpu", "note", "none found", "the tiny models need none; published ones are slow without")


def _weights() -> Iterator[Check]:
    from t2i_align.pipelines.loading import ALIASES, PipelineError, find_pipeline
    from t2i_align.rewards import SCORERS, scorer_class

    for alias in ALIASES:
        try:
            folder = find_pipeline(alias)
        except PipelineError as error:
            yield Check(f"pipeline {alias}", "wrong", "missing", str(error))
            continue
        files = [file for file in folder.rglob("*") if file.is_file()]
        damaged = [file for file in files if file.suffix == ".safetensors" and not _opens(file)]
        if damaged:
            yield Check(f"pipeline {alias}", "wrong", f"damaged: {damaged[0]}", "reinstall t2i-align")
            continue
        size = sum(file.stat().st_size for file in files)
        yield Check(f"pipeline {alias}", "ok", f"{size / 1e6:.1f} MB in {folder}")
    for name in SCORERS:
        missing = scorer_class(name).missing()
        yield Check(f"scorer {name}", "note" if missing else "ok", missing or "usable")


def _opens(file: Path) -> bool:
    """Whether a safetensors file is whole, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return True
    except (SafetensorError, OSError):
        return False
