"""Everything that the owner of a GPU can tell us, in one command of at most eight minutes. It needs no data set.

    python tests/benchmarks/gpu_check.py > gpu_check.txt
    python tests/benchmarks/gpu_check.py --width 16       # a small GPU

Prints `name: value` lines: whether smoke works and what it results in; one and two workers on one GPU; images per second of every
network in every precision, and which share of the device's matrix products that is; host synchronisations per step; peak memory;
what a distillation epoch costs, measured in epochs of Direct, when the teacher's outputs are at hand. Pixels are random. Without a
GPU it ends with 2; `--cpu` tries all of it that a CPU can do.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from bench import cifar_like, experiment, make_training, parser, say, say_device, seconds
from conftest import ROOT
from throughput import images_per_second, matrix_product_rate

import run_exp1b_kaggle as exp

SCRIPT = "run_exp1b_kaggle.py"
# A part of smoke.
SMALL = ["--methods", "Direct", "TraditionalKD", "--runs", "2", "--compression", "5x", "7x"]
TINY = [
    "--methods", "Direct", "TraditionalKD", "--runs", "1", "--compression", "7x", "--train-size", "200", "--batch-size", "60",
    "--teacher-epochs", "1", "--student-epochs", "1", "--device", "cpu", "--threads", "1", "--width", "8",
]  # fmt: skip
EPOCHS = 4  # of each method; the first is the warm-up


def run_smoke(name: str, options: Sequence[str], script: str = SCRIPT) -> pd.DataFrame:
    """Run smoke as a program on one device and say how it ended; returns its results (empty if there are none)."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": hidden.split(",")[0]}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / script), "--mode", "smoke", "--fresh-teacher", *options]
        command += ["--output-dir", f"{folder}/run"]
        started = time.perf_counter()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        say(f"{name}_seconds", time.perf_counter() - started)
        say(f"{name}_exit_code", ended.returncode)
        done = re.findall(r"(\d+) of \d+ jobs done", ended.stdout)
        say(f"{name}_jobs_done", int(done[-1]) if done else 0)
        if ended.returncode != 0:
            print(ended.stdout[-3000:], ended.stderr[-3000:], file=sys.stderr)
        table = Path(folder) / "run/results.csv"
        return pd.read_csv(table) if table.exists() else pd.DataFrame()


def say_runs(script: str, smoke: Sequence[str], small: Sequence[str], workers: Sequence[int]) -> None:
    """Smoke by this script with its accuracies, then a smaller run with so many workers each time; with these options."""
    results = run_smoke("smoke", smoke, script)
    if len(results):
        means = results.groupby(["compression", "method"]).test_accuracy.mean()
        for (ratio, method), accuracy in means.items():
            say(f"smoke_{ratio}_{method}_test_accuracy", accuracy)
    for count in workers:
        run_smoke(f"small_run_{count}_workers", [*small, "--workers", str(count)])


def say_networks(made: exp.Experiment, steps: int) -> None:
    """Speed, share of the matrix products, synchronisations and memory of every network, in this precision."""
    rate = matrix_product_rate(made)
    say(f"{made.precision}_matrix_product_tera_macs_per_second", rate / 1e12)
    for network in exp.ARCHITECTURES:
        name = f"{made.precision}_{network}"
        if made.device.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training, inference = images_per_second(made, network, steps)
        macs = exp.network_cost(network, len(made.images.classes), made.settings.width)[1]
        say(f"{name}_training_images_per_second", training)
        say(f"{name}_training_share_of_the_matrix_product_rate", 3 * macs * training / rate)
        say(f"{name}_inference_images_per_second", inference)
        if made.device.kind == "cuda":
            say(f"{name}_peak_gpu_memory_gigabytes", torch.cuda.max_memory_allocated() / 1e9)
            say(f"{name}_host_synchronisations_per_step", synchronisations(made, network, steps))


def synchronisations(made: exp.Experiment, network: str, steps: int) -> float:
    """How often per step the host waits for the GPU, by torch's own account."""
    training = make_training(made, network, "Direct", 1)
    training.trained.train()
    index = torch.arange(made.settings.batch_size, device=made.device.torch)
    training._step(index, 0)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                training._step(index, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found) / steps


def say_distillation(made: exp.Experiment) -> None:
    """Epochs of Direct and TraditionalKD in turn, and a teacher's page."""
    trainings = {name: make_training(made, "7x", name, EPOCHS) for name in ("Direct", "TraditionalKD")}
    pages = trainings["TraditionalKD"].method.pages
    spent = [seconds(made.device, lambda page=page: made.outputs.page(("teacher",), page)) for page in pages]
    say("teacher_page_seconds", statistics.median(spent))
    times: dict[str, list[float]] = {name: [] for name in trainings}
    for epoch in range(EPOCHS):
        for name, training in trainings.items():
            times[name].append(
                seconds(made.device, lambda training=training, epoch=epoch: training._epoch(epoch))
            )
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, value in medians.items():
        say(f"7x_{name}_epoch_seconds", value)
    say("7x_distillation_epoch_over_Direct", medians["TraditionalKD"] / medians["Direct"])


def main() -> int:
    """Measure and print; 2 without a GPU."""
    options = parser(__doc__)
    options.set_defaults(width=exp.FULL_WIDTH)
    options.add_argument("--cpu", action="store_true", help="try the check itself on a CPU, in tiny sizes")
    options.add_argument("--images", type=int, default=10_000, help="training images, held-out ones included")
    options.add_argument("--steps", type=int, default=12, help="training steps to time per network")
    chosen = options.parse_args()
    if not chosen.cpu and not torch.cuda.is_available():
        print("error: torch sees no GPU: attach one, or try the check itself with --cpu", file=sys.stderr)
        return 2
    started, raw = time.perf_counter(), cifar_like(chosen.images)
    chosen.device, precisions, workers = "cuda", exp.PRECISIONS, (1, 2)
    script, smoke, small = SCRIPT, ["--device", "cuda"], ["--device", "cuda", *SMALL]
    if chosen.cpu:
        chosen.device, precisions, workers, smoke, small = "cpu", ("fp32",), (2,), TINY, TINY
        script = "tests/small_script.py"

    with experiment(chosen, raw) as made:  # in the precision that a run would choose
        say_device(made)
        if made.device.capability is not None:
            say("compute_capability", float("{}.{}".format(*made.device.capability)))
            say("gpus", torch.cuda.device_count())
        say_distillation(made)
    for precision in precisions:
        with experiment(argparse.Namespace(**{**vars(chosen), "precision": precision}), raw) as made:
            say_networks(made, chosen.steps)
    say_runs(script, smoke, small, workers)
    say("minutes_in_all", (time.perf_counter() - started) / 60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
