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
    "student_epochs": 2, "runs": 1, "threads": 1, "device": "cpu", "precision": "fp32",
}  # fmt: skip
TEST_IMAGES = 60  # three steps per epoch, 10 images to fit, 10 to select


def lab_data(size: int = 200) -> exp.RawData:
    """SYNTHETIC with `size` training images and few test images."""
    raw = exp.synthetic(size, 42)
    return dataclasses.replace(
        raw, test_pixels=raw.test_pixels[:TEST_IMAGES], test_labels=raw.test_labels[:TEST_IMAGES]
    )


def hundred_classes(size: int) -> exp.RawData:
    """As many images of 100 classes in the shape of CIFAR-100: class 10 a + b is pattern a, with pattern b laid over it."""
    below, above = exp.synthetic(size, 42), exp.synthetic(size, 43)
    order = np.random.default_rng(0)

    def blend(part: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        one, other = (getattr(raw, f"{part}_pixels")[:count] for raw in (below, above))
        a, b = (getattr(raw, f"{part}_labels")[:count] for raw in (below, above))
        shuffled = order.permutation(len(b))
        return (0.6 * one + 0.4 * other[shuffled]).astype(np.uint8), 10 * a + b[shuffled]

    classes = tuple(f"patterns {number:02d}" for number in range(100))
    return exp.RawData("CIFAR100", classes, *blend("train"), *blend("test", TEST_IMAGES), "generated")


def open_lab(
    folder: Path, raw: exp.RawData | None = None, device: exp.Device | None = None, **given: Any
) -> exp.Experiment:
    """An experiment of SMALLEST and `given` settings in `folder`, nothing finished; pages in folder/scratch."""
    device = device or exp.Device("cpu", 0, "CPU")
    settings = exp.new_settings({**SMALLEST, **given, "output_dir": folder})
    raw = raw or lab_data(settings.train_size or 0)
    index = exp.new_index(settings, settings.precision, exp.describe_data(raw, settings.seed), {})
    exp.make_run_folder(folder)
    run = exp.Run(folder, index, labels=raw.test_labels)
    session, progress = exp.Session(), exp.Progress(run, 1)
    experiment = exp.make_experiment(run, device, [device], raw, session, progress)
    experiment.outputs.store.places = [folder / "scratch"]
    return experiment


def do(experiment: exp.Experiment, *jobs: exp.Job) -> dict[str, exp.Record]:
    """Do these jobs (default: all, as a worker would) and return the records of everything finished."""
    if not jobs:
        exp.Worker(experiment, writes=False).work()
    for job in jobs:
        exp.do_job(experiment, job)
        experiment.run.refresh()
    return experiment.run.records


def teacher(experiment: exp.Experiment) -> exp.Job:
    """The teacher's job."""
    return exp.Job("teacher", experiment.settings.dataset)


def student(experiment: exp.Experiment, method: str, compression: str = "2.3x", run: int = 1) -> exp.Job:
    """A student's job."""
    return exp.Job("student", experiment.settings.dataset, compression, method, run)


def pilot(experiment: exp.Experiment, method: str = "HPM-KD", compression: str = "2.3x") -> exp.Job:
    """A pilot's job."""
    return exp.Job("pilot", experiment.settings.dataset, compression, method)


@contextlib.contextmanager
def shortcuts(chosen: int | None = None, steps: bool = True) -> Iterator[pytest.MonkeyPatch]:
    """No latency measurement and a short fit of the attention.

    `chosen`: pilots train nothing and choose this candidate. Without `steps` a
    training step does nothing, which is enough where only the plan of the work is looked at.
    """

    def decide(candidates: int, budget: int, evaluate: Any) -> exp.Halving:
        correct = {(0, candidate): np.array([True, False]) for candidate in range(candidates)}
        return exp.Halving([(1, list(range(candidates)))], correct, chosen or 0, "decided by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "latency_ms", lambda *_: {})
        patch.setattr(exp.AttentionNetwork, "STEPS", 10)
        if chosen is not None:
            patch.setattr(exp, "successive_halving", decide)
        if not steps:
            patch.setattr(exp.Training, "_step", lambda *_: torch.zeros(()))
        yield patch


def stop_before_epoch(patch: pytest.MonkeyPatch, number: int) -> None:
    """Trainings stop before their epoch `number`, counted from 0."""
    epoch = exp.Training._epoch

    def stop(training: exp.Training, current: int) -> None:
        if current == number:
            raise exp.Stopped("session clock")
        epoch(training, current)

    patch.setattr(exp.Training, "_epoch", stop)


def untimed(record: exp.Record) -> exp.Record:
    """A record without what depends on the clock."""
    history = [dataclasses.replace(epoch, seconds=0.0) for epoch in record.history]
    clock = {
        "train_seconds": 0.0,
        "images_per_second": 0.0,
        "inference_seconds": 0.0,
        "latency_ms": {},
        "finished": "",
    }
    return dataclasses.replace(record, history=history, **clock)
