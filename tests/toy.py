"""A toy experiment for the reliability tests: every kind of job and file in about two seconds, and ways to hurt it.

The networks are cut to one block per stage (small_script.py), the data set is a few hundred images of noise in CIFAR-10's format that arrive
by a pretended download, one small figure is drawn and the report has one section. What reads, writes, resumes and reports is the script's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from matplotlib.figure import Figure
from small_script import ONE_BLOCK_PER_STAGE, forward, three_candidates
from test_data import install
from torchvision.datasets import CIFAR10

import run_exp1b_kaggle as exp

SESSION = ["--threads", "1", "--device", "cpu"]
TOY = [
    "--mode", "smoke", "--dataset", "CIFAR10", "--width", "8", "--train-size", "200", "--batch-size", "90", "--lr", "0.05",
    "--teacher-epochs", "3", "--student-epochs", "3", "--runs", "1", "--compression", "5x", "--precision", "fp32", *SESSION,
]  # fmt: skip
AGAIN = ["--resume", *SESSION]
JOBS = [
    "teacher_resnet50_CIFAR10", "assistant_1.5x_CIFAR10", "assistant_2.3x_CIFAR10", "pilot_5x_HPM-KD_CIFAR10",
    "student_5x_Direct_run1", "student_5x_TraditionalKD_run1", "student_5x_HPM-KD_run1",
]  # fmt: skip
TEACHER, ASSISTANT, SECOND_ASSISTANT, PILOT, DIRECT, KD, HPMKD = JOBS


# What cut networks cost, by whether they see all pixels: counted once for all toys. ARCHITECTURES must hold no others then.
COST = {all_pixels: exp.cache(exp.network_cost.__wrapped__) for all_pixels in (False, True)}


def cut_networks(patch: pytest.MonkeyPatch, all_pixels: bool = False) -> None:
    """One block per stage and, unless `all_pixels` are needed, a quarter of the pixels."""
    for name, architecture in ONE_BLOCK_PER_STAGE.items():
        patch.setitem(exp.ARCHITECTURES, name, architecture)
    if not all_pixels:
        patch.setattr(exp.CifarResNet, "forward", forward)
    patch.setattr(exp, "network_cost", COST[all_pixels])


def install_toy(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the script's experiments toys, working in `folder` (run folders are made there, teacher outputs below it)."""
    cut_networks(patch)
    patch.setattr(exp.AttentionNetwork, "STEPS", 3)
    patch.setattr(exp.HPMKD, "candidates", classmethod(three_candidates))
    patch.setattr(exp, "latency_ms", lambda *_: {})
    patch.setattr(exp, "measure_speeds", lambda *_: {})
    patch.setattr(exp.Run, "REPORT_SECONDS", 0.0)
    for name in list(exp.FIGURES)[1:]:
        patch.delitem(exp.FIGURES, name)
    patch.setitem(exp.FIGURES, next(iter(exp.FIGURES)), lambda _: Figure((1.0, 1.0)))
    patch.setattr(exp, "SECTIONS", (exp.report_reservations,))
    patch.setattr(exp, "summary_table", lambda evidence: evidence.frame[["compression", "method"]])
    patch.setattr(exp, "latex_table", lambda _: "")
    archive = install(patch, "CIFAR10", CIFAR10, "labels").archive

    def fetch(_url: str, _limit_seconds: float, check: Callable[[], None]) -> bytes:
        check()
        return archive

    patch.setattr(exp, "fetch", fetch)
    patch.setattr(
        exp, "session_age_seconds", lambda: 0.0
    )  # a pretended Kaggle session is not as old as this machine
    folder.mkdir(parents=True, exist_ok=True)
    patch.chdir(folder)
    patch.setattr(exp.tempfile, "tempdir", str(folder.resolve()))
    torch.set_num_threads(1)


def new_toy(folder: Path, *options: str) -> int:
    """Run the toy from its start in this run folder; returns the exit code."""
    return exp.main([*TOY, "--output-dir", str(folder), *options])


def resume(folder: Path, *options: str) -> int:
    """Continue the toy in this run folder."""
    return exp.main([*AGAIN, "--output-dir", str(folder), *options])


# ---- Looking at a run ------------------------------------------------------------------------------------------------


def epochs_in_log(folder: Path) -> list[str]:
    """Every epoch that was trained, in order, as "<job> epoch <n>"."""
    return [
        " epoch ".join(found)
        for found in re.findall(r"\] (\S+) +epoch +(\d+)/", (folder / "experiment.log").read_text())
    ]


def repeated(epochs: Sequence[str]) -> list[str]:
    """Epochs that were trained again although another one had been trained since: a resume lost more than one epoch."""
    first = [epoch for i, epoch in enumerate(epochs) if i == 0 or epochs[i - 1] != epoch]
    return [epoch for i, epoch in enumerate(first) if epoch in first[:i]]


def leftovers(folder: Path) -> list[str]:
    """Files that a finished run must not have: temporary ones, and checkpoints in progress."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(
        n
        for n in names
        if re.search(r"\.tmp$|\.part|\.partial|\.progress|\.corrupt|\.attempts|checkpoints/.*\.lock", n)
    )


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: names, contents, modes and times of the files."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = exp.hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = f"{status.st_mode:o} {status.st_mtime_ns} {content}"
    return found


# ---- Hurting it ------------------------------------------------------------------------------------------------------


class Code:
    """An object whose unpickling would create the file `witness`."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.witness), "w")


def flip(path: Path, position: float) -> None:
    """Flip one bit at this fraction of a file's length."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(position * len(content)))] ^= 4
    path.write_bytes(content)


def cut(path: Path, position: float) -> None:
    """Cut a file off at this fraction of its length."""
    path.write_bytes(path.read_bytes()[: int(position * path.stat().st_size)])


def stopped_at_once(*_: object, **__: object) -> None:
    """In the place of `work`: the session's time is over before anything is trained."""
    raise exp.Stopped("session clock")


def make_folder(path: Path) -> None:
    """Put a folder with something in it in the place of a file."""
    path.unlink()
    path.mkdir()
    (path / "something").write_text("else")


def forbid(patch: pytest.MonkeyPatch, forbidden: Path, times: int | None = None) -> list[int]:
    """The next `times` (default: all) attempts to read a file end in an error of the system, without a pause between them."""
    read, errors = Path.read_bytes, []

    def refused(path: Path) -> bytes:
        if path == forbidden and (times is None or len(errors) < times):
            errors.append([errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES][len(errors) % 4])
            raise OSError(errors[-1], os.strerror(errors[-1]))
        return read(path)

    patch.setattr(Path, "read_bytes", refused)
    patch.setattr(exp, "READ_PAUSES", (0.0,) * 5)
    return errors


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: cut(path, 0.0),
    **{f"cut at {at:.0%}": lambda path, at=at: cut(path, at) for at in (0.01, 0.5, 0.99)},
    **{f"bit at {at:.0%}": lambda path, at=at: flip(path, at) for at in (0.0, 0.3, 0.6, 0.99, 1.0)},
    "a folder": make_folder,
    "a text": lambda path: path.write_text("hello"),
}


# ---- Named points at which something can happen ----------------------------------------------------------------------


def strike_before(patch: pytest.MonkeyPatch, owner: Any, name: str, strike: Callable[[], None]) -> None:
    """Call `strike` before every call of a function."""
    original = getattr(owner, name)

    def struck(*args: Any, **options: Any) -> Any:
        strike()
        return original(*args, **options)

    patch.setattr(owner, name, struck)


def strike_after(patch: pytest.MonkeyPatch, owner: Any, name: str, strike: Callable[[], None]) -> None:
    """Call `strike` after every call of a function."""
    original = getattr(owner, name)

    def struck(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        strike()
        return result

    patch.setattr(owner, name, struck)


def strike_half_written(
    patch: pytest.MonkeyPatch, _owner: Any, _name: str, strike: Callable[[], None]
) -> None:
    """Call `strike` when half of what is written to a file that the script opens has arrived."""

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:
        file = open(path, mode, *args, **options)
        if mode == "wb":
            write = file.write

            def half(payload: bytes) -> int:
                write(payload[: len(payload) // 2])
                file.flush()
                strike()
                return write(payload[len(payload) // 2 :])

            return Writing(file, half)  # type: ignore[return-value]
        return file

    patch.setattr(exp, "open", opened, raising=False)


class Writing:
    """A file with another `write`."""

    def __init__(self, file: IO[Any], write: Callable[[Any], int]) -> None:
        self.file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


Install = Callable[[pytest.MonkeyPatch, Any, str, Callable[[], None]], None]
POINTS: dict[str, tuple[Install, Any, str]] = {
    "the download": (strike_before, exp, "fetch"),
    "before the temporary file": (strike_before, exp, "write_atomic"),
    "half written": (strike_half_written, None, ""),
    "before the fsync": (strike_before, os, "fsync"),
    "before the rename": (strike_before, os, "replace"),
    "after the rename": (strike_after, os, "replace"),
    "between model file and index": (strike_before, exp.Run, "save_index"),
    "before a lock is taken": (strike_before, exp, "take_lock"),
    "before a job's lock is given back": (strike_before, exp, "give_back"),
    "before the old checkpoints go": (strike_after, exp, "save_checkpoint"),
    "an epoch": (strike_before, exp.Training, "_step"),
    "the validation": (strike_before, exp.Experiment, "predict"),
    "a page of teacher outputs": (strike_before, exp.TeacherOutputs, "_compute"),
    "a pilot": (strike_before, exp, "describe_candidate"),
    "the attention": (strike_before, exp, "train_attention"),
    "the evaluation": (strike_before, exp, "evaluate"),
    "the figures": (strike_before, Figure, "savefig"),
    "the report": (strike_before, exp, "summary_table"),
    "the archive": (strike_before, exp, "write_archive"),
}


def install_strike(
    patch: pytest.MonkeyPatch, point: str, number: int, action: Callable[[], None]
) -> list[int]:
    """Do `action` when the program comes to a point for the `number`-th time; returns a list that holds the visits so far."""
    visits = [0]

    def strike() -> None:
        visits[0] += 1
        if visits[0] == number:
            action()

    install_at, owner, name = POINTS[point]
    install_at(patch, owner, name, strike)
    return visits


def die() -> None:
    """What the kernel does to a process at the end of a Kaggle session."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def struck(point: str, number: int, action: Callable[[], None]) -> Iterator[list[int]]:
    """`install_strike` for the duration of a block."""
    with pytest.MonkeyPatch.context() as patch:
        yield install_strike(patch, point, number, action)


def in_child(action: Callable[[], int], kill_after: float | None = None) -> int | str:
    """Do something in a forked process, at most `kill_after` seconds; its exit code, or the name of the signal that ended it.

    Nothing is imported again, and what the action patches stays in the child.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + (600 if kill_after is None else kill_after)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return (
                os.WEXITSTATUS(status) if os.WIFEXITED(status) else signal.Signals(os.WTERMSIG(status)).name
            )
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def attempt(
    folder: Path, options: Sequence[str], point: str = "", number: int = 0, kill_after: float | None = None
) -> int | str:
    """Start or continue the toy in a child that is killed at a point, or after some seconds."""

    def go() -> int:
        if point:
            install_strike(pytest.MonkeyPatch(), point, number, die)
        run = exp.is_run(folder)
        return exp.main([*(AGAIN if run else TOY), "--output-dir", str(folder), *options])

    return in_child(go, kill_after)
