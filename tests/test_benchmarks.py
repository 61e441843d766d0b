"""Every script in benchmarks/ runs, in a configuration of seconds, and prints figures: what is seldom used must not rot."""

from __future__ import annotations

import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
import small_script
from conftest import ROOT

FOLDER = ROOT / "tests/benchmarks"
TINY = ["--width", "8", "--threads", "1", "--device", "cpu"]
SCRIPTS = {  # arguments, and figures that must be among what is printed
    "gpu_check": (
        [*TINY, "--cpu", "--images", "400", "--steps", "2", "--batch-size", "60"],
        [
            "fp32_teacher_training_share_of_the_matrix_product_rate",
            "7x_distillation_epoch_over_Direct",
            "smoke_7x_TraditionalKD_test_accuracy",
            "small_run_2_workers_seconds",
        ],
    ),
    "kill_soak": (["--minutes", "0.01"], ["runs finished", "wrong results"]),
    "memory": (
        [*TINY, "--images", "200", "--steps", "1", "--batch-size", "60", "--compression", "2.3x"],
        ["peak", "peak_anonymous", "peak_during_images"],
    ),
    "methods": (
        [*TINY, "--images", "300", "--rounds", "1", "--batch-size", "60", "--methods", "AT"],
        ["AT_over_TraditionalKD", "HPM-KD_over_TraditionalKD"],
    ),
    "scaling": (
        [
            *TINY,
            "--images",
            "300",
            "600",
            "--runs",
            "1",
            "2",
            "--workers",
            "1",
            "--student-images",
            "200",
            "--batch-size",
            "60",
        ],
        ["exponent_of_epochs_in_images", "exponent_in_runs", "all_ratios_over_their_sum"],
    ),
    "throughput": (
        [*TINY, "--images", "400", "--steps", "2", "--batch-size", "60", "--profile"],
        [
            "teacher_training_share_of_the_matrix_product_rate",
            "7x_Direct_epoch_share_outside_the_network",
            "7x_TraditionalKD_share_of_optimizer",
        ],
    ),
    "waiting": (
        [*TINY, "--steps", "1", "--rounds", "1", "--batch-size", "8"],
        ["passive_over_active", "passive_ms_per_step"],
    ),
    "versus_reference": (
        [*TINY, "--images", "300", "--rounds", "1", "--networks", "7x", "--batch-size", "60"],
        ["distillation_over_Direct", "speedup_distillation_quick_schedule"],
    ),
}


def run_script(name: str, arguments: list[str], output: Path) -> None:
    """Run a benchmark as a program, with small networks.

    This process is forked: what it patches ends with it, and torch need not be imported again.
    """
    small_script.shrink()
    handle = os.open(output, os.O_CREAT | os.O_WRONLY)
    os.dup2(handle, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.argv = [str(FOLDER / f"{name}.py"), *arguments]
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_every_benchmark_is_tried() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, "bench", "develop"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_prints_finite_figures(name: str, tmp_path: Path) -> None:
    arguments, wanted = SCRIPTS[name]
    process = multiprocessing.get_context("fork").Process(
        target=run_script, args=(name, arguments, tmp_path / "output")
    )
    process.start()
    process.join(300)
    process.kill()
    said = (tmp_path / "output").read_text()
    assert process.exitcode == 0, said
    figures = dict(line.split(": ", 1) for line in said.splitlines())
    device = figures.pop("device", None)
    assert device is None or device.startswith("CPU")
    assert all(math.isfinite(float(value)) for value in figures.values()), said
    assert set(wanted) <= set(figures), said
    assert {value for figure, value in figures.items() if figure.endswith("exit_code")} <= {"0"}, said
