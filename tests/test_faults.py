"""Processes that die, signals, the session's clock, full disks, two processes: nothing saved is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, results_without_times
from lab import open_lab
from toy import (
    AGAIN,
    DIRECT,
    HPMKD,
    JOBS,
    KD,
    POINTS,
    TEACHER,
    TOY,
    attempt,
    die,
    epochs_in_log,
    in_child,
    leftovers,
    new_toy,
    repeated,
    resume,
    strike_before,
    struck,
    tree,
)

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that continues names the script as it was called."""
    monkeypatch.setattr(sys, "argv", ["run_exp1b_kaggle.py"])


def last_line(capsys: Capture) -> str:
    """The last line that was printed."""
    return capsys.readouterr().out.strip().splitlines()[-1]


def assert_as_if_undisturbed(folder: Path, reference: Path) -> None:
    """The results digit for digit, no leftovers, and no epoch trained twice but the interrupted ones."""
    assert results_without_times(folder) == results_without_times(reference)
    assert leftovers(folder) == []
    epochs = epochs_in_log(folder)
    assert set(epochs) == set(epochs_in_log(reference))
    assert repeated(epochs) == []
    assert exp.load_index(folder, {}).jobs.keys() == set(JOBS)


# ---- SIGKILL -------------------------------------------------------------------------------------------------

Kill = tuple[str, int, float | None]


def finish_after_kills(folder: Path, kills: list[Kill]) -> list[Kill]:
    """Start the toy and continue it until it is done, every session ended as the next entry of `kills` says.

    Returns the kills that took place: a point that a session did not come to kills nothing.
    """
    happened = []
    for point, number, seconds in [*kills, ("", 0, None)]:
        outcome = attempt(folder, ["--fresh-teacher"], point, number, seconds)
        assert outcome in (0, "SIGKILL"), f"{point} {number}: {outcome}"
        if outcome == "SIGKILL":
            happened.append((point, number, seconds))
    assert outcome == 0
    return happened


def test_a_kill_at_any_point_and_a_resume_give_the_same_results(toy: Path, toy_run: Path) -> None:
    """Every point of the program kills one session, most a second one: each session goes further than the one before."""
    last = ("the report", "the figures", "the archive")
    kills: list[Kill] = [(point, number, None) for number in (1, 2) for point in POINTS if point not in last]
    kills += [("the report", 1, None), ("the figures", 1, None), ("the figures", 2, None)]
    kills += [("the archive", 1, None)]
    happened = finish_after_kills(toy / "run", kills)
    assert {point for point, _, _ in happened} == set(POINTS), "a point was never reached"
    assert len(happened) >= 25
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_a_kill_between_a_finished_job_and_its_old_checkpoints(copied: Path, toy_run: Path) -> None:
    """The next session removes the checkpoints, though it has nothing to do for that job."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    assert attempt(copied, [], "before the old checkpoints go", 3) == "SIGKILL", "two epochs, then the result"
    assert (copied / f"checkpoints/{DIRECT}.pt").exists()
    assert leftovers(copied) != []
    assert resume(copied) == 0
    assert leftovers(copied) == []
    assert results_without_times(copied) == results_without_times(toy_run)


def test_kills_at_random_moments(toy: Path, toy_run: Path) -> None:
    """Eight sessions of growing random length; then one that finishes."""
    moment = random.Random(5)
    kills: list[Kill] = [("", 0, 0.2 + moment.random() * (0.2 + 0.2 * i)) for i in range(8)]
    assert len(finish_after_kills(toy / "run", kills)) >= 3
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_a_kill_while_a_run_is_copied_out_of_an_input(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half copied run is not taken for a run: the next session copies it again."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    root = toy / "root"
    shutil.copytree(toy_run, root / "kaggle/input/notebooks/me/earlier" / toy_run.name)
    target = root / "kaggle/working" / toy_run.name
    target.parent.mkdir()

    def session(number: int) -> int:
        copied, copyfile = [], shutil.copyfile

        def copy(source: str, target: str) -> None:
            copied.append(source)
            if len(copied) == number:
                die()
            copyfile(source, target)

        pytest.MonkeyPatch().setattr(exp.shutil, "copyfile", copy)
        return exp.main(AGAIN, root=root)

    assert in_child(lambda: session(9)) == "SIGKILL"
    assert not target.exists()
    assert in_child(lambda: session(999)) == 0
    assert_as_if_undisturbed(target, toy_run)


# ---- Signals -------------------------------------------------------------------------------------------------

MOMENTS = [
    ("SIGTERM", "an epoch", 4), ("SIGINT", "the evaluation", 2), ("SIGHUP", "a page of teacher outputs", 1),
    ("SIGUSR1", "a pilot", 3), ("SIGXCPU", "between model file and index", 3), ("SIGUSR2", "the report", 1),
    ("SIGINT", "half written", 6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "point", "number"), MOMENTS)
def test_a_signal_stops_cleanly(
    toy: Path, toy_run: Path, capsys: Capture, name: str, point: str, number: int
) -> None:
    """Wherever it is, and followed by others: the first one counts, and the rest of the run is as if nothing had been."""

    def ask() -> None:
        for asked in (name, name, "SIGINT"):
            os.kill(os.getpid(), getattr(signal, asked))

    with struck(point, number, ask) as visits:
        assert new_toy(toy / "run", "--fresh-teacher") == 128 + getattr(signal, name)
    assert visits[0] >= number
    last = last_line(capsys)
    assert last.startswith(f"stopped by {name}: ")
    assert f"continue with: python run_exp1b_kaggle.py --resume --output-dir {toy / 'run'}" in last
    assert (toy / "run/experiment_report.md").exists()
    assert resume(toy / "run") == 0
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_ctrl_c_during_the_last_figures(copied: Path, toy_run: Path, capsys: Capture) -> None:
    """What was being drawn is drawn to its end, also when it is pressed twice."""

    def press() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with struck("the figures", 1, press):
        assert resume(copied) == 130
    assert f"{len(JOBS)} of {len(JOBS)} jobs done" in last_line(capsys)
    assert_as_if_undisturbed(copied, toy_run)


def test_a_signal_during_the_download(toy: Path, capsys: Capture) -> None:
    with struck("the download", 1, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert new_toy(toy / "run") == 130
    assert "the same command" in last_line(capsys)
    assert not (toy / "run").exists(), "nothing was saved, so nothing is left"


WORK = [
    (exp.Training, "_step"), (exp.Experiment, "infer"), (exp, "train_attention"), (exp, "evaluate"),
    (exp, "describe_candidate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("point", "number", "under_way"),
    [
        ("an epoch", 2, ["_step"]),
        ("the validation", 1, []),
        ("the evaluation", 1, ["evaluate"]),
        ("a page of teacher outputs", 1, []),
        ("the attention", 1, ["train_attention"]),
    ],
)
def test_ctrl_c_ends_the_work_at_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: int, under_way: list[str]
) -> None:
    """No further step or batch of inference is begun: an epoch or a page may take minutes."""
    monkeypatch.setattr(exp, "CHUNK", 16)
    begun: list[str] = []
    interrupted: list[bool] = []
    for owner, name in WORK:
        strike_before(monkeypatch, owner, name, lambda name=name: begun.append(name) if interrupted else None)

    def interrupt() -> None:
        interrupted.append(True)
        os.kill(os.getpid(), signal.SIGINT)

    with struck(point, number, interrupt) as visits:
        assert new_toy(toy / "run", "--batch-size", "30") == 130
    assert visits[0] == number
    assert begun == under_way


def test_an_ignored_hangup_stays_ignored(toy: Path) -> None:
    """What nohup set before the start is left as it is."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with struck("an epoch", 2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert new_toy(toy / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_printed_command_continues_the_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Script as it was called, run folder, and every session setting that was given, quoted for a shell."""
    monkeypatch.setattr(sys, "argv", ["/some where/run_exp1b_kaggle.py"])
    options = ["--max-hours", "9", "--workers", "1"]
    with struck("an epoch", 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert new_toy(toy / "a run", *options) == 143
    last = last_line(capsys)
    assert "python '/some where/run_exp1b_kaggle.py' --resume" in last
    assert f"--output-dir '{toy / 'a run'}'" in last
    for part in ("--device cpu", "--workers 1", "--threads 1", "--max-hours 9.0"):
        assert part in last


# ---- The session's clock -------------------------------------------------------------------------------------


class Clock:
    """The time, as far as the script knows it: it stands still but for what `epoch_seconds` adds."""

    def __init__(self, patch: pytest.MonkeyPatch, epoch_seconds: Callable[[int], float]) -> None:
        self.now, self.epochs = 1e9, 0
        patch.setattr(exp.time, "time", lambda: self.now)
        patch.setattr(exp.time, "perf_counter", lambda: self.now)
        train = exp.Training._train_epoch

        def slow(training: exp.Training, epoch: int) -> float:
            loss = train(training, epoch)
            self.epochs += 1
            self.now += epoch_seconds(self.epochs)
            return loss

        patch.setattr(exp.Training, "_train_epoch", slow)


@pytest.mark.parametrize("kaggle", [False, True])
def test_the_clock_stops_before_an_epoch_that_would_not_fit(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, kaggle: bool
) -> None:
    """Half an hour of 600-second epochs: two fit, on Kaggle too, however old the session is: what is given counts from now."""
    clock = Clock(monkeypatch, lambda _: 600.0)
    monkeypatch.setattr(exp, "session_age_seconds", lambda: 900.0)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch" if kaggle else "")
    (toy / "root/kaggle/working").mkdir(parents=True)
    options = ["--output-dir", str(toy / "run"), "--max-hours", "0.5"]
    assert exp.main([*TOY, *options], root=toy / "root") == 0
    assert clock.epochs == 2
    assert f"stopped by session clock: 0 of {len(JOBS)} jobs done; continue with: " in last_line(capsys)
    assert (toy / f"run/checkpoints/{TEACHER}.progress").exists()


def test_the_slowest_epoch_counts(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs that grow slower are expected to be as slow as the slowest, and a fifth more."""
    clock = Clock(monkeypatch, lambda number: 100.0 * number)  # 100, 200 and 300 seconds
    begun = clock.now
    assert new_toy(toy / "run", "--max-hours", str(500 / 3600)) == 0
    assert (clock.epochs, clock.now - begun) == (2, 300.0)


def test_a_last_epoch_that_is_far_too_slow_ends_at_the_deadline(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an estimate fails, the deadline itself ends the epoch at its next batch, with time to write the report."""
    clock = Clock(monkeypatch, lambda _: 10.0)
    step, steps = exp.Training._step, []

    def slow_step(training: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        steps.append(page)
        clock.now += 20.0 if len(steps) > 6 else 1.0
        return step(training, index, page)

    monkeypatch.setattr(exp.Training, "_step", slow_step)
    begun, limit = clock.now, 60.0
    options = ["--max-hours", str(limit / 3600), "--teacher-epochs", "2", "--batch-size", "30"]
    assert new_toy(toy / "run", *options) == 0
    assert len(steps) == 6 + 3
    assert limit < clock.now - begun <= limit + 20, "it ends with the batch in which the time is over"


def test_a_deadline_that_is_over_trains_nothing_and_loses_nothing(
    copied: Path, toy_run: Path, capsys: Capture
) -> None:
    assert resume(copied, "--runs", "2", "--max-hours", "0.000001") == 0
    assert "stopped by session clock" in last_line(capsys)
    assert epochs_in_log(copied) == epochs_in_log(toy_run)
    assert results_without_times(copied) == results_without_times(toy_run)


# ---- A full disk ---------------------------------------------------------------------------------------------


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("point", "numbers"),
    [
        ("half written", (1, 3, 6, 9, 12)),
        ("before the fsync", (3,)),  # of files; a folder that cannot be synced is no loss
        ("before the rename", (1, 6, 18)),
    ],
)
def test_a_full_disk_is_said_and_loses_nothing(
    toy: Path,
    toy_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    point: str,
    numbers: tuple[int, ...],
) -> None:
    """Every kind of write fails once for lack of room, one session after the other; with room the run goes on."""
    monkeypatch.setattr(
        exp.PageStore, "__init__", lambda store, _: setattr(store, "places", [])
    )  # of teacher outputs: these can be done without
    for number in numbers:
        with struck(point, number, no_room) as visits:
            code = resume(toy / "run") if exp.is_run(toy / "run") else new_toy(toy / "run", "--fresh-teacher")
        assert visits[0] >= number, "the fault never came"
        last = last_line(capsys)
        assert (code, "free some space, then continue with --resume" in last) == (1, True), f"{number} {last}"
    code = resume(toy / "run") if exp.is_run(toy / "run") else new_toy(toy / "run", "--fresh-teacher")
    assert code == 0
    assert_as_if_undisturbed(toy / "run", toy_run)


WRITTEN = [
    ".attempts.",
    ".progress.",
    ".pt.",
    ".pkl.",
    "results.csv.",
    "report.md.",
    ".png.",
]  # parts of names


def test_a_full_disk_wherever_something_is_written(copied: Path, toy_run: Path, capsys: Capture) -> None:
    """Checkpoint, model, index, tables, report, figures, lock: no room for one of them in each session."""
    (copied / f"checkpoints/{KD}.pt").unlink()
    for name in WRITTEN:
        failed: list[Path] = []

        def full(path: Path, mode: str = "r", name: str = name, failed: list[Path] = failed) -> Any:
            if mode in ("w", "wb") and name in path.name:
                failed.append(path)
                no_room()
            return open(path, mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exp, "open", full, raising=False)
            code = resume(copied)
        last = last_line(capsys)
        assert failed, f"{name} is never written"
        said = "free some space, then continue with --resume" in last
        assert (code, said) == (1, True), f"{name}: {code} {last}"
    assert resume(copied) == 0
    assert leftovers(copied) == []
    assert repeated(epochs_in_log(copied)[len(epochs_in_log(toy_run)) :]) == []
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("name", ["page_", "results.zip."])
def test_a_full_disk_for_what_can_be_done_without(
    copied: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str
) -> None:
    """Teacher outputs are computed where they are needed, the archive is left out: one line, no failure."""
    (copied / f"checkpoints/{KD}.pt").unlink()

    def full(path: Path, mode: str = "r") -> Any:
        if mode == "wb" and name in path.name:
            no_room()
        return open(path, mode)

    monkeypatch.setattr(exp, "open", full, raising=False)
    assert resume(copied) == 0
    assert "no room to write" in capsys.readouterr().out
    assert results_without_times(copied) == results_without_times(toy_run)


def files_below(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_file_system(toy: Path, toy_run: Path, capsys: Capture) -> None:
    """A real one: a tmpfs with room for half of the checkpoints."""
    mount = toy / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        needed = files_below(toy_run / "data") + files_below(toy_run / "checkpoints") // 2
        (mount / "ballast").write_bytes(bytes(shutil.disk_usage(mount).free - needed))
        assert new_toy(mount / "run", "--fresh-teacher") == 1
        assert "free some space" in last_line(capsys)
        assert resume(mount / "run") == 1
        (mount / "ballast").unlink()
        assert resume(mount / "run") == 0
        assert_as_if_undisturbed(mount / "run", toy_run)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("folder", ["run", "a/b/run"])
def test_kaggles_budget_is_estimated_before_the_start(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, folder: str
) -> None:
    """What is needed counts, and what lies anywhere in the output folder already."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    working = toy / "kaggle/working"
    working.mkdir(parents=True)
    monkeypatch.setattr(exp, "KAGGLE_DISK_BYTES", 6_000_000)
    monkeypatch.setattr(exp, "disk_bytes", lambda *_: 5_000_000)
    (working / "other").write_bytes(bytes(2_000_000))
    assert exp.main([*TOY, "--output-dir", str(working / folder)], root=toy) == 2
    said = last_line(capsys)
    assert "holds 2 MB of other files, and Kaggle keeps 6 MB" in said
    assert "use fewer --runs" in said
    assert not exp.is_run(working / folder)


# ---- Renames and fsync ---------------------------------------------------------------------------------------


def test_a_rename_that_is_denied_is_one_clear_error(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be written, and what to do; no temporary file stays."""

    def deny(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", deny)
    with pytest.raises(exp.UsageError, match=r"cannot write .*--resume"):
        exp.write_atomic(toy / "file", b"content")
    assert list(toy.glob(".*tmp")) == []


def test_a_file_system_without_fsync_gets_one_warning(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """EINVAL from fsync ends nothing."""

    def no_fsync(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_fsync)
    exp.warn_once.cache_clear()
    exp.start_logging(None)
    for name in ("one", "two"):
        exp.write_atomic(toy / name, b"content")
    assert capsys.readouterr().out.count("no fsync") == 1


# ---- Numbers -------------------------------------------------------------------------------------------------


def spoil(patch: pytest.MonkeyPatch, job: str, value: float) -> None:
    """Make the loss of one job's training this value."""
    step = exp.Training._step

    def spoiled(training: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        loss = step(training, index, page)
        return loss * 0 + value if training.name == job else loss

    patch.setattr(exp.Training, "_step", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverging_job_fails_and_the_others_go_on(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, value: float
) -> None:
    """Exit 1; the reason is said, in the report too, and remembered; the other students are unharmed."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    spoil(monkeypatch, DIRECT, value)
    assert resume(copied) == 1
    last = last_line(capsys)
    assert last.startswith(f"finished: 6 of 7 jobs done; 1 failed ({DIRECT})") and "continue with" not in last
    report = (copied / "experiment_report.md").read_text()
    assert f"Failed: {DIRECT} (the loss diverged in epoch 1 (mean nan)" in report
    table = exp.pd.read_csv(copied / "results.csv")
    statuses = dict(zip(table.method, table.status, strict=True))
    assert statuses == {"Direct": "failed", "TraditionalKD": "done", "HPM-KD": "done"}
    before = tree(copied)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert "6 of 7 jobs done, 1 failed" in capsys.readouterr().out
    assert tree(copied) == before
    trained = len(epochs_in_log(copied))
    assert resume(copied) == 1
    assert "1 failed" in last_line(capsys)
    assert len(epochs_in_log(copied)) == trained, "it would diverge again, so it is not tried"


def test_a_failed_teacher_leaves_what_does_not_need_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    spoil(monkeypatch, TEACHER, float("nan"))
    assert new_toy(toy / "run") == 1
    assert f"1 of 7 jobs done; 1 failed ({TEACHER}); 5 not done, because they need" in last_line(capsys)
    assert exp.load_index(toy / "run", {}).jobs.keys() == {TEACHER, DIRECT}


def test_outputs_that_are_not_finite_after_the_last_epoch(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network may break in its very last step: the loss was still fine."""
    (copied / f"checkpoints/{KD}.pt").unlink()
    train = exp.Training.run

    def broken(training: exp.Training) -> Any:
        network = train(training)
        network.classifier.bias.data.fill_(float("nan"))
        return network

    monkeypatch.setattr(exp.Training, "run", broken)
    assert resume(copied) == 1
    jobs = exp.load_index(copied, {}).jobs
    assert "outputs are not finite" in jobs[KD].failure
    assert jobs[HPMKD].done


def test_an_empty_class(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without images, in training and in the test, is nothing to die of: its accuracy is unknown."""
    load = exp.load_data

    def without_the_last_class(*args: Any) -> exp.RawData:
        raw = load(*args)
        return exp.replace(raw, train_labels=raw.train_labels % 9, test_labels=raw.test_labels % 9)

    monkeypatch.setattr(exp, "load_data", without_the_last_class)
    assert new_toy(toy / "run", "--methods", "Direct") == 0
    record = exp.load_index(toy / "run", {}).jobs[DIRECT]
    assert exp.math.isnan(record.test_class_accuracy[9])
    assert 0 <= record.test_accuracy <= 100


# ---- Crashes -------------------------------------------------------------------------------------------------

CRASH = RuntimeError("CUDA error: an illegal memory access was encountered\nkernel errors might come later")


def crash(patch: pytest.MonkeyPatch, job: str, number: int) -> None:
    """Raise what nobody expects from one job's step with this number."""
    steps = [0]
    step = exp.Training._step

    def crashing(training: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        steps[0] += training.name == job
        if training.name == job and steps[0] == number:
            raise CRASH
        return step(training, index, page)

    patch.setattr(exp.Training, "_step", crashing)


def test_a_crash_in_a_job_costs_that_job_and_not_the_session(
    copied: Path, toy_run: Path, capsys: Capture
) -> None:
    """Its reason is in the report, the traceback in the log alone; --resume continues it from its last epoch."""
    for name in (DIRECT, KD):
        (copied / f"checkpoints/{name}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, DIRECT, 4)  # in the second epoch
        assert resume(copied) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(f"finished: 6 of 7 jobs done; 1 failed ({DIRECT})")
    assert "Traceback" not in out
    assert "raise CRASH\nRuntimeError: CUDA error: an illegal" in (copied / "experiment.log").read_text()
    reason = "it crashed (RuntimeError: CUDA error: an illegal memory access was encountered): --resume tries again"
    assert f"Failed: {DIRECT} ({reason}" in (copied / "experiment_report.md").read_text()
    before = len(epochs_in_log(copied))
    assert resume(copied) == 0
    assert epochs_in_log(copied)[before:] == [f"{DIRECT} epoch 2", f"{DIRECT} epoch 3"]
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_lost_device_ends_the_session_and_not_every_job(
    copied: Path, toy_run: Path, capsys: Capture
) -> None:
    """On a GPU an error may stick to the process: then all other jobs would fail of it, one after the other."""
    for name in (DIRECT, KD):
        (copied / f"checkpoints/{name}.pt").unlink()
    probe = exp.probe

    def lost(device: exp.Device) -> None:
        if sys.exc_info()[1] is not None:  # asked after a crash, not at the start
            raise exp.UsageError("the device fails")
        probe(device)

    with pytest.MonkeyPatch.context() as patch:
        crash(patch, DIRECT, 1)
        patch.setattr(exp, "probe", lost)
        assert resume(copied) == 1
    last = last_line(capsys)
    assert last.startswith("stopped by the loss of CPU")
    assert "CUDA error: an illegal memory access was encountered)" in last
    assert f"{len(JOBS) - 2} of {len(JOBS)} jobs done; continue with" in last, "it has not failed: it goes on"
    assert (copied / f"checkpoints/{DIRECT}.attempts").exists(), "it counts like a process that has died"
    assert "continue with: python run_exp1b_kaggle.py --resume" in last
    assert resume(copied) == 0
    assert results_without_times(copied) == results_without_times(toy_run)


def raise_value_error(*_: object) -> None:
    raise ValueError("no such colour")


def test_a_table_that_cannot_be_replaced_costs_no_training(
    copied: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows denies it while another program has it open. At the end it is an error, and nothing is lost."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        denied = exp.UsageError("cannot write results.csv")
        patch.setattr(exp, "write_outputs", lambda *_: (_ for _ in ()).throw(denied))
        assert resume(copied) == 2
    monkeypatch.setattr(exp, "do_job", None)
    assert resume(copied) == 0, "it was trained"
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("part", ["summary_table", "latex_table", "draw_figures", "gather_evidence"])
def test_a_report_that_fails_costs_no_training(
    copied: Path,
    toy_run: Path,
    redone: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    part: str,
) -> None:
    """A ValueError in a table or figure, on resume and at the end: one line, and the traceback in the log alone."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, part, raise_value_error)
        assert resume(copied) == 0
    assert redone == [DIRECT]
    out = capsys.readouterr().out
    assert "figures or report could not be written (no such colour)" in out
    assert "Traceback" not in out
    assert out.strip().splitlines()[-1].startswith(f"finished: {len(JOBS)} of {len(JOBS)} jobs done")
    assert "ValueError: no such colour" in (copied / "experiment.log").read_text()
    assert not list((copied / "checkpoints").glob("*.failed"))
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_report_that_had_to_wait_is_written_after_the_next_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs that end within REPORT_SECONDS: the second is in the report when a third has saved an epoch."""
    lab, written = open_lab(tmp_path), []
    monkeypatch.setattr(exp, "write_outputs", lambda run, figures: written.append(figures))
    worker = exp.Worker(lab, writes=True)
    lab.run.save()
    lab.run.save()
    assert (len(written), lab.run.stale) == (1, True)
    monkeypatch.setattr(exp.Run, "REPORT_SECONDS", 0.0)
    exp.do_job(lab, exp.Job("teacher", "SYNTHETIC"))
    assert (len(written), lab.run.stale) == (2, False)
    worker.refresh()
    assert len(written) == 3, "the teacher has ended"


def test_an_internal_error_is_one_line_and_a_traceback_in_the_log(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A fault of the program itself, and of its kind also an OSError: exit code 1, the last line names it."""
    for error in (RuntimeError("a fault made by a test"), OSError(errno.EBADF, "a fault made by a test")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exp, "priorities", fail)
            assert resume(copied) == 1
        out = capsys.readouterr().out
        assert "a fault made by a test" in out.strip().splitlines()[-1]
        assert "Traceback" not in out
        assert f"{type(error).__name__}: " in (copied / "experiment.log").read_text().split("Traceback")[-1]
    monkeypatch.undo()


# ---- Two processes -------------------------------------------------------------------------------------------

HOLD = """
import sys, time, pathlib
import run_exp1b_kaggle as exp
with exp.hold_folder(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(folder: Path, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds a run folder's lock; it is killed at the end."""
    command = [*prefix, sys.executable, "-c", HOLD, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_process_is_refused_and_named_the_holder(
    copied: Path, redone: list[str], capsys: Capture
) -> None:
    """Host and process id are named and nothing is changed; the lock of a dead process, and a copied one, mean nothing."""
    with holder(copied) as process:
        before = tree(copied)
        named = f"is in use by process {process.pid} on host {exp.socket.gethostname()}"
        for action in ("--resume", "--report-only"):
            assert exp.main([action, "--output-dir", str(copied)]) == 2
            assert named in last_line(capsys)
        assert tree(copied) == before
        assert exp.main(["--status", "--output-dir", str(copied)]) == 0

        shutil.copytree(copied, copied.with_name("copy"))
        assert (copied.with_name("copy") / "run.lock").exists()
        assert resume(copied.with_name("copy")) == 0
        assert tree(copied) == before
    assert process.returncode == -signal.SIGKILL
    assert resume(copied) == 0
    assert leftovers(copied) == []


def test_a_process_of_another_pid_namespace_is_refused(copied: Path, capsys: Capture) -> None:
    """In a container, where process numbers say nothing, the lock works all the same; it ends with its process."""
    space = ["unshare", "-p", "-f", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("a PID namespace of its own (unshare -p -f --mount-proc) is not permitted here")
    with holder(copied, *space):
        assert resume(copied) == 2
        assert "is in use by process 1 on host" in last_line(capsys)
    deadline = exp.time.monotonic() + 30  # the kernel ends the processes of a namespace after its first one
    while (code := resume(copied)) == 2 and exp.time.monotonic() < deadline:
        exp.time.sleep(0.1)
    assert code == 0


def test_a_process_started_beside_a_running_one_is_refused_and_the_first_goes_on(
    toy: Path, toy_run: Path
) -> None:
    """Started while the first one trains: it names host and process, exits 2, and changes nothing."""
    outcomes: list[int | str] = []
    said = toy / "said"

    def second() -> None:
        def go() -> int:
            with open(said, "w") as file:
                os.dup2(file.fileno(), 1)
                exp.sys.stdout = file  # type: ignore[assignment]
                return exp.main([*AGAIN, "--output-dir", str(toy / "run")])

        outcomes.append(in_child(go))

    with struck("an epoch", 5, second):
        assert new_toy(toy / "run", "--fresh-teacher") == 0
    assert outcomes == [2]
    named = f"is in use by process {os.getpid()} on host {exp.socket.gethostname()}"
    assert named in said.read_text()
    assert_as_if_undisturbed(toy / "run", toy_run)


@pytest.mark.parametrize("moment", ["an epoch", "the evaluation"])
def test_a_process_that_lost_its_folder_writes_nothing_into_the_other_runs(
    copied: Path, capsys: Capture, moment: str
) -> None:
    """The folder is removed and made anew by another run while this one works: it stops, and the other stays as it is."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    other: dict[str, bytes | str] = {}

    def taken() -> None:
        shutil.rmtree(copied)
        exp.make_run_folder(copied)
        (copied / "run.lock").write_text("process 1 on host elsewhere\n")
        (copied / "experiment_report.md").write_text("of the other run")
        (copied / f"checkpoints/{DIRECT}.pt").write_text("of the other run")
        other.update(tree(copied))

    with struck(moment, 1, taken):
        assert resume(copied) == 1
    assert "removed or taken by another process" in last_line(capsys)
    assert tree(copied) == other


def test_a_folder_that_cannot_be_looked_at_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle on a network file system, for instance: the folder may still be this process's own."""

    def fail(*_: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    folder = tmp_path / "run"
    exp.make_run_folder(folder)
    with exp.hold_folder(folder):
        run = open_lab(folder).run
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", fail)
            run.check_ours()
        run.save_index()
        (folder / "run.lock").unlink()
        with pytest.raises(exp.Stopped, match="removed or taken by another process"):
            run.save_index()


def test_a_process_whose_folder_was_removed_makes_no_new_one(copied: Path, capsys: Capture) -> None:
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    with struck("the evaluation", 1, lambda: shutil.rmtree(copied)):
        assert resume(copied) == 1
    assert "removed or taken by another process" in last_line(capsys)
    assert not copied.exists()
