"""Kills toy experiments at random points and moments and resumes them until the time is up; every finished one must be right.

    python tests/benchmarks/kill_soak.py --minutes 10 [--seed 1]

Prints `name: value` lines; exit code 1 if a result, a leftover or a repeated epoch was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from conftest import results_without_times
from toy import POINTS, attempt, epochs_in_log, install_toy, leftovers, repeated


def kill_until_done(folder: Path, choice: random.Random) -> dict[str, int]:
    """Continue a toy, each session killed somewhere, until one ends by itself; how often it was killed, by what."""
    kills = {"at a named point": 0, "at a random moment": 0}
    while True:
        if choice.random() < 0.7:
            how, outcome = (
                "at a named point",
                attempt(folder, ["--fresh-teacher"], choice.choice(list(POINTS)), choice.randint(1, 8)),
            )
        else:
            how, outcome = (
                "at a random moment",
                attempt(folder, ["--fresh-teacher"], kill_after=choice.random() * 4),
            )
        if outcome == "SIGKILL":
            kills[how] += 1
        elif outcome == 0:
            return kills
        else:
            raise SystemExit(f"unexpected outcome in {folder}: {outcome}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    choice, begun = random.Random(options.seed), time.monotonic()
    totals = {
        "runs finished": 0,
        "at a named point": 0,
        "at a random moment": 0,
        "wrong results": 0,
        "leftovers": 0,
        "repeated epochs": 0,
    }
    console = os.dup(1)
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        work = Path(temporary).resolve()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the experiments' output
        install_toy(patch, work)
        assert attempt(work / "reference", ["--fresh-teacher"]) == 0
        expected = results_without_times(work / "reference")
        while time.monotonic() - begun < 60 * options.minutes or not totals["runs finished"]:
            folder = work / f"run{totals['runs finished']}"
            for how, count in kill_until_done(folder, choice).items():
                totals[how] += count
            totals["runs finished"] += 1
            totals["wrong results"] += results_without_times(folder) != expected
            totals["leftovers"] += len(leftovers(folder))
            totals["repeated epochs"] += len(repeated(epochs_in_log(folder)))
    os.dup2(console, 1)
    for name, value in totals.items():
        print(f"{'kills ' * name.startswith('at ')}{name}: {value}")
    print(f"seconds: {time.monotonic() - begun:.0f}")
    return int(bool(totals["wrong results"] or totals["leftovers"] or totals["repeated epochs"]))


if __name__ == "__main__":
    sys.exit(main())
