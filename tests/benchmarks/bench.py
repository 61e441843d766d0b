"""What the benchmarks share: data of CIFAR's shape, an experiment on the device at hand, a clock, and `name: value` lines."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: F401 (puts the script on the path)
import numpy as np
import torch
from lab import open_lab

import run_exp1b_kaggle as exp

RATIOS = tuple(exp.RATIOS)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--width", type=int, default=16)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument(
        "--threads", type=int, default=exp.thread_count(exp.Settings(), [exp.Device("cpu", 0, "CPU")])
    )
    made.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    made.add_argument("--precision", choices=("auto", *exp.PRECISIONS), default="auto")
    return made


def cifar_like(images: int, test: int = 1_000) -> exp.RawData:
    """Random pixels in CIFAR-10's shapes, `images` of them for training and holding out: the speed does not depend on them."""
    rng = np.random.default_rng(0)
    pixels, tests = (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (images, test))
    labels = [np.arange(n, dtype=np.int64) % 10 for n in (images, test)]
    return exp.RawData("SYNTHETIC", tuple("0123456789"), pixels, labels[0], tests, labels[1], "random")


@contextlib.contextmanager
def experiment(options: argparse.Namespace, raw: exp.RawData, **given: object) -> Iterator[exp.Experiment]:
    """An experiment on the device of `options` that has a teacher and assistants (untrained), in a folder that goes away."""
    exp.log.setLevel(logging.WARNING)
    device = exp.find_devices(options.device, False, True)[0]
    shape = {name: getattr(options, name) for name in ("width", "batch_size", "threads", "precision")}
    shape["precision"] = exp.choose_precision(options.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        made = open_lab(Path(folder) / "run", raw, device, **{**shape, **given})
        for name in ("teacher", *exp.ASSISTANTS):
            job = exp.teacher_job(name, made.settings.dataset)
            network = made.place(exp.build_network(name, 10, options.width))
            made.outputs._networks[name] = exp.DescribedNetwork(made.place(network.eval().folded()), [])
            made.run.records[job.name] = exp.Record(
                **made.run.job_fields(job), network=name, weights_sha256=name
            )
        yield made


def make_training(
    made: exp.Experiment, network: str, method: str, epochs: int, run: int = 1, steps: int | None = None
) -> exp.Training:
    """A training of `network` for some epochs (or `steps` steps)."""
    job = (
        exp.Job("teacher", "SYNTHETIC")
        if network == "teacher"
        else exp.Job("student", "SYNTHETIC", network, method, run)
    )
    per_epoch = len(made.images) // made.settings.batch_size
    pages = exp.page_order(made.settings.seed, run, epochs)
    config = exp.Distillation() if exp.METHODS[method] is not exp.Direct else None
    distilling = exp.METHODS[method](made, config, pages)
    return exp.Training(made, job, f"{network}_{method}_{run}", steps or epochs * per_epoch, distilling)


def clock(device: exp.Device) -> float:
    """Seconds: of the wall on a GPU, once it has caught up; on a CPU those that the process used, whatever else runs there."""
    if device.kind == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device: exp.Device, action: Callable[[], object]) -> float:
    """How long an action takes."""
    started = clock(device)
    action()
    return clock(device) - started


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Nothing that an experiment says, its workers included, gets among the figures."""
    console, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(console, 1)
        os.close(console)
        os.close(nothing)


def say(name: str, value: float | str) -> None:
    """Print one figure."""
    print(f"{name}: {value if isinstance(value, str) else f'{value:.4g}'}", flush=True)


def say_device(made: exp.Experiment) -> None:
    """Print what was measured on."""
    say(
        "device",
        f"{made.device.name}, {made.settings.threads} threads, {made.precision}, torch {torch.__version__}",
    )
    say("width", made.settings.width)
    say("training_images", str(len(made.images)))
