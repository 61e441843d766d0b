"""The smallest experiments, opened without the command line: jobs and whole graphs in seconds, without a report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import run_exp1b_kaggle as exp

SMALLEST = {
    "mode": "smoke", "width": 8, "train_size": 200, "batch_size": 60, "lr": 0.05, "teacher_epochs": 2,
    "student_epochs": 2, "runs": 1, "threads": 1, "device": "cpu",
}  # fmt: skip
TEST_IMAGES = 60  # three steps per epoch, 10 images to fit, 10 to select


def lab_data(size: int = 200) -> exp.RawData:
    """SYNTHETIC with `size` training images and few test images."""
    raw = exp.load_data("SYNTHETIC", None, Path(), [], size, 42)
    return dataclasses.replace(raw, test_pixels=raw.test_pixels[:TEST_IMAGES], test_labels=raw.test_labels[:TEST_IMAGES])


def open_lab(folder: Path, raw: exp.RawData | None = None, device: exp.Device | None = None, **given: Any) -> exp.Experiment:
    """An experiment of SMALLEST and `given` settings in `folder`, nothing finished; pages in folder/scratch."""
    device = device or exp.Device("cpu", 0, "CPU")
    settings = exp.new_settings({**SMALLEST, **given, "output_dir": folder})
    raw = raw or lab_data(settings.train_size or 0)
    precision = exp.choose_precision(settings.precision, device, native_cpu_bf16=False)
    state = exp.new_index(settings, precision, exp.describe_data(raw, settings.seed))
    platform = exp.Platform(False, folder.parent, folder / "scratch", (), False)
    run = exp.OpenRun(exp.RunFolder(folder), settings, state, raw, [device], None, platform)
    run.folder.create()
    return exp.make_experiment(run, exp.Session(None), device)


def do(experiment: exp.Experiment, *jobs: exp.Job) -> dict[str, Any]:
    """Do these jobs (default: all, as a worker would) and return the records of everything finished."""
    collector = exp.Collector(experiment.folder, experiment.settings, experiment.state, None, writes=False)
    if not jobs:
        exp.Worker(experiment, collector, torch.distributed.HashStore(), 0).work()
    for job in jobs:
        exp.JobRunner(experiment, job).run()
        collector.refresh()
    records: dict[str, Any] = experiment.state["jobs"]
    return records


def teacher(experiment: exp.Experiment) -> exp.Job:
    """The teacher's job."""
    return exp.Job("teacher", dataset=experiment.settings.dataset)


def student(experiment: exp.Experiment, method: str, compression: str = "2.3x", run: int = 1) -> exp.Job:
    """A student's job."""
    return exp.Job("student", compression, method, run, experiment.settings.dataset)


def pilot(experiment: exp.Experiment, method: str = "HPM-KD", compression: str = "2.3x") -> exp.Job:
    """A pilot's job."""
    return exp.Job("pilot", compression, method, dataset=experiment.settings.dataset)


@contextlib.contextmanager
def shortcuts(chosen: int | None = None, steps: bool = True) -> Iterator[pytest.MonkeyPatch]:
    """No latency measurement and a short fit of the attention.

    `chosen`: HPM-KD's pilots train nothing and choose this candidate, TunedKD's choose number 0. Without `steps` a
    training step does nothing, which is enough where only the plan of the work is looked at.
    """

    def decide(candidates: int, budget: int, evaluate: Any) -> exp.Halving:
        tuned = evaluate.__self__.job.method == "TunedKD"
        correct = {(0, candidate): np.array([True, False]) for candidate in range(candidates)}
        return exp.Halving([(1, list(range(candidates)))], correct, 0 if tuned else chosen or 0, "decided by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "latency_ms", lambda *_: {})
        patch.setattr(exp.AttentionNetwork, "STEPS", 10)
        if chosen is not None:
            patch.setattr(exp, "successive_halving", decide)
        if not steps:
            patch.setattr(exp.Fitting, "_step", lambda *_: torch.zeros(()))
        yield patch


def untimed(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock."""
    clock = ("train_seconds", "prepare_seconds", "images_per_second", "latency_ms", "finished", "pages")
    left = {key: value for key, value in record.items() if key not in clock}
    if "history" in left:
        left["history"] = [{k: v for k, v in entry.items() if k != "seconds"} for entry in left["history"]]
    return left
