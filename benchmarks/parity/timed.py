"""The original image_reward on images one by one, as often as a line comes in: run by benchmarks/published.py.

    python timed.py ROWS.json full        in the environment of environment.py

Prints a line when the network is there, then for each line of the standard input seconds and scores as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import original
import torch


def main(table: str, size: str) -> None:
    rows = json.loads(Path(table).read_text())
    said, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        score = original.blip("image_reward", size)
        print("ready", file=said, flush=True)
        for _ in sys.stdin:
            clock, processor = time.perf_counter(), time.process_time()
            with torch.no_grad():  # as the wheel's README does
                values = [float(score(prompt, image)) for image, prompt in rows]
            took = time.perf_counter() - clock, time.process_time() - processor
            print(json.dumps({"seconds": took, "scores": values}), file=said, flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main(*sys.argv[1:])
