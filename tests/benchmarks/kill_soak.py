"""Kills toy experiments at random points and moments and resumes them until the time is up; every finished one must be right.

    python tests/benchmarks/kill_soak.py --minutes 10 [--seed 1] [--workers 2]

With several workers it is a small experiment instead of a toy, and who is killed is a worker or the parent of all.
Prints `name: value` lines; exit code 1 if a result, a leftover or a repeated epoch was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
from conftest import results_without_times
from test_workers import COMPARED, finish, running_workers, start
from toy import POINTS, attempt, epochs_in_log, install_toy, leftovers, repeated

import run_exp1b_kaggle as exp

# With few epochs most kills would come before the first.
LONGER = [*COMPARED, "--teacher-epochs", "60", "--student-epochs", "60"]


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


def kill_workers_until_done(folder: Path, choice: random.Random, workers: int) -> dict[str, int]:
    """The same for a small experiment with several workers; a job that has failed of the kills is done again."""
    kills = {"at a named point": 0, "at a random moment": 0}
    while True:
        options = ["--resume", "--threads", "1"] if exp.is_run(folder) else LONGER
        process = start(folder, *options, "--workers", str(workers))
        while process.poll() is None:
            time.sleep(choice.random() * 15)
            victims = [process.pid] if choice.random() < 0.3 else running_workers(process)
            if victims and process.poll() is None:
                os.kill(choice.choice(victims), signal.SIGKILL)
                kills["at a random moment"] += 1
        code, out = finish(process)
        if code == 0:
            return kills
        if code not in (1, -signal.SIGKILL):
            raise SystemExit(f"unexpected outcome in {folder}: {code} {out}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
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
        if options.workers == 1:
            install_toy(patch, work)
            patch.setattr(exp.Training, "SAVE_SECONDS", 0.0)  # every epoch is saved: none may be repeated
            assert attempt(work / "reference", ["--fresh-teacher"]) == 0
        else:
            assert finish(start(work / "reference", *LONGER))[0] == 0
        expected = results_without_times(work / "reference")
        while time.monotonic() - begun < 60 * options.minutes or not totals["runs finished"]:
            folder = work / f"run{totals['runs finished']}"
            if options.workers == 1:
                kills = kill_until_done(folder, choice)
            else:
                kills = kill_workers_until_done(folder, choice, options.workers)
            for how, count in kills.items():
                totals[how] += count
            totals["runs finished"] += 1
            totals["wrong results"] += results_without_times(folder) != expected
            totals["leftovers"] += len(leftovers(folder))
            if options.workers == 1:  # elsewhere the epochs of two jobs alternate in the log
                totals["repeated epochs"] += len(repeated(epochs_in_log(folder)))
    os.dup2(console, 1)
    for name, value in totals.items():
        print(f"{'kills ' * name.startswith('at ')}{name}: {value}")
    print(f"seconds: {time.monotonic() - begun:.0f}")
    return int(bool(totals["wrong results"] or totals["leftovers"] or totals["repeated epochs"]))


if __name__ == "__main__":
    sys.exit(main())
