"""Make an environment with the original scorers and their own libraries, and write the fixtures with it.

    python benchmarks/parity/environment.py --env /tmp/originals                      # all scorers, both sizes
    python benchmarks/parity/environment.py --env /tmp/originals image_reward --size reduced

Needs Python 3.11 ($PYTHON311, or python3.11), 6 GB of disk and ten minutes for the environment, and 9 GB of memory for
a scorer at full size; `ours.py` then compares. On the same processor fixtures come out the same to the last bit.
Nothing of it is imported by the package or its tests, which read the fixtures; weights come from a seed on both sides.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCORERS = ("image_reward", "cyclereward", "hpsv2", "pickscore", "hpsv3", "vqascore")
REDUCED = ("hpsv3", "vqascore")  # billions of weights at full size

# The newest of each with which the wheels import; transformers 5 and setuptools 80 have dropped what they use.
FIRST = ["setuptools<80", "wheel", "torch==2.14.1", "torchvision==0.29.1"]
PINNED = [
    *("timm==0.6.13", "transformers==4.40.2", "huggingface_hub==0.23.5", "diffusers==0.27.2", "accelerate==0.30.1"),
    *("datasets==2.19.2", "openai-clip==1.0.1", "clint==0.5.1", "ftfy", "regex", "tensorboard", "sentencepiece"),
    "pillow==13.0.0",
]
UNISOLATED = ["fairscale==0.4.13"]  # its build imports torch
WHEELS = ["image-reward==1.5", "cyclereward==0.1.7", "hpsv2==1.2.0"]  # whose own pins contradict each other
OVERLAYS = {  # put before the environment's own libraries for one scorer
    "hpsv3": ["transformers==4.45.2", "tokenizers==0.20.3", "hpsv3==1.0.0"],
    "vqascore": ["t2v_metrics==3.0"],
}


def make(env: Path, scorers: Sequence[str]) -> None:
    """Python 3.11 with the originals, and what goes before it for these scorers, unless it is there."""
    pip = [env / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not (env / "made").exists():
        subprocess.run([os.environ.get("PYTHON311", "python3.11"), "-m", "venv", env], check=True)
        for options, packages in (
            ([], FIRST),
            ([], PINNED),
            (["--no-build-isolation"], UNISOLATED),
            (["--no-deps"], WHEELS),
        ):
            subprocess.run([*pip, *options, *packages], check=True)
        (env / "made").touch()
    for scorer in scorers:
        if scorer in OVERLAYS and not (env / scorer / "made").exists():
            subprocess.run([*pip, "--no-deps", "--upgrade", "--target", env / scorer, *OVERLAYS[scorer]], check=True)
            (env / scorer / "made").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorers", nargs="*", help=f"of {', '.join(SCORERS)} [default: all]")
    parser.add_argument("--env", type=Path, required=True, help="where the environment is, or is made")
    parser.add_argument("--size", choices=("reduced", "full"), help="[default: both]")
    given = parser.parse_args()
    if unknown := set(given.scorers) - set(SCORERS):
        sys.exit(f"Unknown scorers {', '.join(unknown)}; expected {', '.join(SCORERS)}.")
    scorers = given.scorers or SCORERS
    make(given.env.resolve(), scorers)
    for scorer in scorers:
        for size in (given.size,) if given.size else ("reduced", "full"):
            if size == "full" and scorer in REDUCED:
                continue
            out = HERE / "fixtures" / f"{scorer}-{size}.json"
            env = given.env.resolve()
            paths = {"PYTHONPATH": str(env / scorer)} if scorer in OVERLAYS else {}
            command = [env / "bin" / "python", HERE / "original.py", scorer, size, out]
            subprocess.run(command, check=True, env=os.environ | paths)
            print(f"{out.name} written", flush=True)


if __name__ == "__main__":
    main()
