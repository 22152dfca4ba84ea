"""Time of the command score with all cores idle, and with one core used by another program.

    python -m tests.bench.busy_score RUN_FOLDER [--rows N] [--repeats N]

RUN_FOLDER needs held-out rows, such as quickstart/run. Both cases alternate. Prints the seconds of
each command, and the median time with one busy core divided by that with all cores idle. The result
is valid on an idle machine only: the load before each command is printed too, which after the first
one includes the commands of this script.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

from tests import ROOT


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    times = {"idle": [], "busy": []}
    for _ in range(arguments.repeats):
        for name, other_program in (("idle", nullcontext()), ("busy", one_busy_core())):
            load = os.getloadavg()[0]
            with other_program:
                times[name].append(seconds(arguments.run, arguments.rows))
            print(f"{name}: {times[name][-1]:.1f} s (load before: {load:.1f})", flush=True)
    ratio = median(times["busy"]) / median(times["idle"])
    print(f"with one busy core {ratio:.2f} times the idle time")


@contextmanager
def one_busy_core():
    """An endless loop in another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(run, rows):
    """Wall-clock seconds of the command score on so many rows of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "launch/score.py", run, "--rows", str(rows)]
        start = time.monotonic()
        subprocess.run(
            [*command, "--out", f"{folder}/score.json"],
            check=True, stdout=subprocess.DEVNULL, env=os.environ | {"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        return time.monotonic() - start


if __name__ == "__main__":
    main()
