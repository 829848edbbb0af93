"""Start-up times, minimum of 7 runs: `python benchmarks/startup.py`."""

import subprocess
import sys
import time

CASES = {
    "python alone": ["-c", "pass"],
    "import t2i_align": ["-c", "import t2i_align"],
    "t2i-align --help": ["-m", "t2i_align", "--help"],
}


def seconds(words):
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - started


for name, words in CASES.items():
    print(f"{name}: {min(seconds(words) for _ in range(7)):.3f} s")
