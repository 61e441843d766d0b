"""How the time grows with images, runs and ratios, and shrinks with workers; fits the exponent.

    python tests/benchmarks/scaling.py [--images 1000 2000 4000 8000] [--runs 1 2 4] [--workers 1 2]

Prints `name: value` lines. Exponent 1: proportional. Runs and ratios are counted over the students of Direct and TraditionalKD,
pages included (all ratios together need them once, so they cost less than their sum). Workers are counted over a whole small
experiment, by the clock on the wall, which includes starting them (so it says something only on a quiet machine; --workers 1
leaves it out).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench import RATIOS, cifar_like, experiment, make_training, no_output, parser, say, say_device, seconds

import run_exp1b_kaggle as exp


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def students_seconds(made: exp.Experiment, compression: Sequence[str], runs: int) -> float:
    """Seconds of training the students of two methods, the teacher's pages that they need included."""
    spent = 0.0
    for ratio in compression:
        for run in range(1, runs + 1):
            for method in ("Direct", "TraditionalKD"):
                spent += seconds(made.device, make_training(made, ratio, method, 2, run).run)
    return spent


def worker_seconds(workers: int, width: int) -> float:
    """Seconds on the wall for a whole small experiment on the CPU, one thread per worker."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "--mode", "smoke", "--width", str(width), "--train-size", "600", "--runs", "2", "--methods", "Direct", "TraditionalKD",
            "--teacher-epochs", "2", "--student-epochs", "1",
            "--threads", "1", "--device", "cpu", "--fresh-teacher", "--workers", str(workers), "--output-dir", str(Path(folder) / "run"),
        ]  # fmt: skip
        started = time.perf_counter()
        with no_output():
            code = exp.main(command)
        assert code == 0, f"the experiment ended with {code}"
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument(
        "--images", type=int, nargs="+", default=[1_000, 2_000, 4_000, 8_000], help="held-out ones included"
    )
    options.add_argument("--runs", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--student-images", type=int, default=1_000, help="for the runs and ratios")
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    chosen = options.parse_args()
    epochs, pages = [], []
    for images in chosen.images:
        with experiment(chosen, cifar_like(images)) as made:
            training = make_training(made, "7x", "Direct", 4)
            times = [seconds(made.device, lambda e=e, t=training: t._epoch(e)) for e in range(4)]
            epochs.append(statistics.median(times[1:]))
            outputs = made.outputs
            passes = [seconds(made.device, lambda p=p, o=outputs: o.page(("5x",), p)) for p in range(4)]
            pages.append(statistics.median(passes[1:]))
            say(f"epoch_seconds_at_{images}_images", epochs[-1])
            say(f"page_seconds_at_{images}_images", pages[-1])
    say_device(made)
    say("exponent_of_epochs_in_images", exponent(chosen.images, epochs))
    say("exponent_of_pages_in_images", exponent(chosen.images, pages))
    times = []
    for runs in chosen.runs:
        with experiment(chosen, cifar_like(chosen.student_images)) as made:
            times.append(students_seconds(made, ("7x",), runs))
            say(f"students_seconds_of_{runs}_runs", times[-1])
    say("exponent_in_runs", exponent(chosen.runs, times))
    single: dict[str, float] = {}
    for ratios in [*((ratio,) for ratio in RATIOS), RATIOS]:
        # A new one each time: no page and no progress is at hand.
        with experiment(chosen, cifar_like(chosen.student_images)) as made:
            spent = students_seconds(made, ratios, 1)
        if ratios == RATIOS:
            say("all_ratios_over_their_sum", spent / sum(single.values()))
        else:
            single[ratios[0]] = spent
            say(f"students_seconds_at_{ratios[0]}", spent)
    if len(chosen.workers) > 1:
        times = [worker_seconds(workers, chosen.width) for workers in chosen.workers]
        for workers, spent in zip(chosen.workers, times, strict=True):
            say(f"experiment_wall_seconds_of_{workers}_workers", spent)
        say("exponent_in_workers", exponent(chosen.workers, times))


if __name__ == "__main__":
    main()
