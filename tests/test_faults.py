"""Processes that die, signals, the session's clock, full disks and numbers that explode: nothing that was saved is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import results_without_times
from toy import (
    AGAIN,
    DIRECT,
    HPMKD,
    JOBS,
    KD,
    PILOT,
    POINTS,
    TEACHER,
    TOY,
    attempt,
    epochs_in_log,
    leftovers,
    new_toy,
    repeated,
    resume,
    strike_before,
    struck,
)

import run_exp1b_kaggle as exp

# ---- SIGKILL ---------------------------------------------------------------------------------------------------------


def finish_after_kills(folder: Path, kills: list[tuple[str, int, float | None]]) -> list[tuple[str, int, float | None]]:
    """Start the toy and continue it until it is done, every session ended as the next entry of `kills` says.

    Returns the kills that took place: a point that a session did not come to kills nothing.
    """
    done = []
    for point, number, seconds in [*kills, ("", 0, None)]:
        outcome = attempt(folder, ["--fresh-teacher"], point, number, seconds)
        assert outcome in (0, "SIGKILL"), f"{point} {number}: {outcome}"
        if outcome == "SIGKILL":
            done.append((point, number, seconds))
    assert outcome == 0
    return done


def assert_as_if_undisturbed(folder: Path, reference: Path) -> None:
    """The results digit for digit, no leftovers, and no epoch trained twice but the interrupted ones."""
    assert results_without_times(folder) == results_without_times(reference)
    assert leftovers(folder) == []
    epochs = epochs_in_log(folder)
    assert set(epochs) == set(epochs_in_log(reference))
    assert repeated(epochs) == []
    assert exp.load_index(exp.RunFolder(folder))["jobs"].keys() == set(JOBS)


def test_killed_at_every_named_point(toy: Path, toy_run: Path) -> None:
    """Every point of the program kills one session, some at a later visit: every session goes further than the one before."""
    kills = [(point, number, None) for number in (1, 2) for point in POINTS if point not in ("the figures", "the archive")]
    kills += [("the figures", 1, None), ("the figures", 2, None), ("the archive", 1, None)]
    happened = finish_after_kills(toy / "run", kills)
    assert {point for point, _, _ in happened} == set(POINTS), "a point was never reached"
    assert len(happened) >= 25
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_killed_at_random_moments(toy: Path, toy_run: Path) -> None:
    """Ten sessions of growing random length; then one that finishes."""
    moment = random.Random(5)
    kills = [("", 0, 0.3 + moment.random() * (0.5 + 0.2 * i)) for i in range(10)]
    assert len(finish_after_kills(toy / "run", kills)) >= 3
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_killed_while_a_run_is_copied_out_of_an_input(toy: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half copied run is not taken for a run: the next session copies it again."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    source = tmp_path / "kaggle/input/notebooks/me/earlier" / toy_run.name
    shutil.copytree(toy_run, source)
    working = tmp_path / "kaggle/working"
    working.mkdir(parents=True)

    def session(number: int) -> Callable[[], int]:
        def go() -> int:
            if number:
                from toy import die, install_strike

                install_strike(pytest.MonkeyPatch(), "before the rename", number, die)
            return exp.main(AGAIN, root=tmp_path)

        return go

    from toy import in_child

    assert in_child(session(9)) == "SIGKILL"
    assert not (working / toy_run.name).exists()
    assert in_child(session(0)) == 0
    assert_as_if_undisturbed(working / toy_run.name, toy_run)


# ---- SIGINT and SIGTERM ----------------------------------------------------------------------------------------------

MOMENTS = [
    ("an epoch", 2), ("the evaluation", 2), ("a page of teacher outputs", 1), ("a pilot", 3),
    ("between model file and index", 3), ("the report", 2), ("half written", 6),
]  # fmt: skip


@pytest.mark.parametrize(("point", "number"), MOMENTS)
def test_a_signal_saves_and_says_how_to_continue(
    toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str], point: str, number: int
) -> None:
    """SIGTERM twice and then SIGINT, wherever it is: the first one counts, and the rest of the run is as if nothing had been."""

    def ask() -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)

    with struck(point, number, ask) as visits:
        assert new_toy(toy / "run") == 143
    assert visits[0] >= number
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"continue with: python run_exp1b_kaggle.py --resume --output-dir {toy / 'run'}" in last
    assert last.startswith("stopped by SIGTERM: ")
    assert (toy / "run/experiment_report.md").exists()
    assert resume(toy / "run") == 0
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_ctrl_c_during_the_last_figures(toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was being drawn is drawn to its end, also when it is pressed twice."""
    with struck("the figures", 1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]):  # type: ignore[arg-type,return-value]
        assert new_toy(toy / "run") == 130
    assert "6 of 6 jobs done" in capsys.readouterr().out.splitlines()[-1]
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_a_signal_during_the_download(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with struck("the download", 2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert new_toy(toy / "run") == 130
    assert "the same command starts again" in capsys.readouterr().out.splitlines()[-1]
    assert leftovers(toy / "run") == []
    assert new_toy(toy / "run") == 0


WORK = [
    (exp.Fitting, "_step"), (exp.Experiment, "infer"), (exp._Pilot, "evaluate"), (exp, "train_attention"), (exp.JobRunner, "_evaluate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("point", "number", "under_way"),
    [
        ("an epoch", 2, ["_step"]),
        ("the validation", 1, []),
        ("the evaluation", 1, ["_evaluate"]),
        ("a page of teacher outputs", 1, []),
        ("a pilot", 1, ["evaluate"]),
        ("the attention", 1, ["train_attention"]),
        ("the download", 2, []),
    ],
)
def test_ctrl_c_twice_ends_the_work_at_once(
    toy: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: int, under_way: list[str]
) -> None:
    """Of all steps, batches of inference and pieces of a download, nothing is begun any more: an epoch or a page may take minutes."""
    monkeypatch.setattr(exp, "CHUNK", 16)
    begun: list[str] = []
    interrupted = []
    for owner, name in WORK:
        strike_before(monkeypatch, owner, name, lambda name=name: interrupted and begun.append(name))

    def interrupt() -> None:
        interrupted.append(True)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with struck(point, number, interrupt) as visits:
        assert new_toy(toy / "run", "--batch-size", "30") == 130
    assert visits[0] == number
    assert begun == under_way


# ---- The session's clock ---------------------------------------------------------------------------------------------


class Clock:
    """The time, as far as the script knows it: it stands still but for what `epoch` adds."""

    def __init__(self, patch: pytest.MonkeyPatch, epoch_seconds: Callable[[int], float]) -> None:
        self.now, self.epochs = 1e9, 0
        patch.setattr(exp.time, "time", lambda: self.now)
        patch.setattr(exp.time, "perf_counter", lambda: self.now)
        train = exp.Fitting._train_epoch

        def slow(fitting: exp.Fitting, epoch: int, page: int) -> float:
            loss = train(fitting, epoch, page)
            self.epochs += 1
            self.now += epoch_seconds(self.epochs)
            return loss

        patch.setattr(exp.Fitting, "_train_epoch", slow)


@pytest.mark.parametrize("kaggle", [False, True])
def test_the_clock_stops_before_an_epoch_that_would_not_fit(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kaggle: bool
) -> None:
    """Half an hour of 600-second epochs: two fit; with 900 seconds of the session gone before the start, on Kaggle, one does."""
    clock = Clock(monkeypatch, lambda _: 600.0)
    monkeypatch.setattr(exp, "session_age_seconds", lambda on_kaggle: 900.0 if on_kaggle else 0.0)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch" if kaggle else "")
    (toy / "root/kaggle/working").mkdir(parents=True)
    assert exp.main([*TOY, "--output-dir", str(toy / "run"), "--max-hours", "0.5"], root=toy / "root") == 0
    assert clock.epochs == (1 if kaggle else 2)
    assert "stopped by session clock: 0 of 6 jobs done; 6 left; continue with:" in capsys.readouterr().out.splitlines()[-1]
    assert exp.RunFolder(toy / "run").progress_file(TEACHER).exists()


def test_the_slowest_epoch_counts(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs that grow slower are expected to be as slow as the slowest, and a fifth more."""
    clock = Clock(monkeypatch, lambda number: 100.0 * number)  # 100, 200 and 300 seconds
    begun = clock.now
    assert new_toy(toy / "run", "--max-hours", str(500 / 3600)) == 0
    assert (clock.epochs, clock.now - begun) == (2, 300.0)


def test_a_last_epoch_that_is_far_too_slow_ends_at_the_deadline(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an estimate fails, the deadline itself ends the epoch at its next batch, with time to write the report."""
    clock = Clock(monkeypatch, lambda _: 10.0)
    step, steps = exp.Fitting._step, []

    def slow_step(fitting: exp.Fitting, index: torch.Tensor, page: int) -> torch.Tensor:
        steps.append(page)
        clock.now += 20.0 if len(steps) > 6 else 1.0
        return step(fitting, index, page)

    monkeypatch.setattr(exp.Fitting, "_step", slow_step)
    begun, limit = clock.now, 60.0
    assert new_toy(toy / "run", "--max-hours", str(limit / 3600), "--teacher-epochs", "2", "--batch-size", "30") == 0
    assert len(steps) == 6 + 3
    assert limit < clock.now - begun <= limit + 20, "it ends with the batch in which the time is over"


def test_a_deadline_that_is_over_trains_nothing_and_loses_nothing(toy: Path, toy_run: Path) -> None:
    shutil.copytree(toy_run, toy / "run")
    assert resume(toy / "run", "--runs", "2", "--max-hours", "1e-9") == 0
    assert epochs_in_log(toy / "run") == epochs_in_log(toy_run)
    assert results_without_times(toy / "run") == results_without_times(toy_run)


# ---- A full disk -----------------------------------------------------------------------------------------------------


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("point", "numbers"),
    [
        ("half written", (1, 3, 6, 9, 12, 25)),
        ("before the fsync", (3, 19)),  # of files; a folder that cannot be synced is no loss
        ("before the rename", (1, 5, 18)),
        ("before the previous version is kept", (2,)),
    ],
)
def test_a_full_disk_is_said_and_the_run_goes_on_with_room(
    toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str], point: str, numbers: tuple[int, ...]
) -> None:
    """Every kind of write fails once for lack of room, one session after the other."""
    for number in numbers:
        with struck(point, number, no_room) as visits:
            run = exp.RunFolder(toy / "run").is_run()
            code = resume(toy / "run") if run else new_toy(toy / "run", "--fresh-teacher")
        last = capsys.readouterr().out.splitlines()[-1]
        assert visits[0] >= number, "the fault never came"
        if "previous version" in point:  # no link: the file is copied instead
            assert code == 0
        else:
            assert code == 1
            assert "error: " in last
            assert "free some space, then continue with --resume" in last
    assert resume(toy / "run") == 0
    assert_as_if_undisturbed(toy / "run", toy_run)


WRITTEN = ["page_", ".page_", ".progress.", ".pt.", ".pkl.", "results.csv.", "report.md.", ".png.", "results.zip."]  # parts of names


def test_a_full_disk_wherever_something_is_written(toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scratch, checkpoint, model, index, tables, report, figures, archive, lock: no room for one of them in each session."""
    shutil.copytree(toy_run, toy / "run")
    (toy / f"run/checkpoints/{KD}.pt").unlink()
    for name in WRITTEN:
        failed: list[Path] = []

        def full(path: Path, mode: str = "r", name: str = name, failed: list[Path] = failed) -> Any:
            if mode in ("w", "wb") and name in path.name:
                failed.append(path)
                no_room()
            return open(path, mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exp, "open", full, raising=False)
            code = resume(toy / "run")
        last = capsys.readouterr().out.splitlines()[-1]
        assert failed, f"{name} is never written"
        assert (code, "free some space, then continue with --resume" in last) == (1, True), f"{name}: {code} {last}"
    assert resume(toy / "run") == 0
    assert leftovers(toy / "run") == []
    assert repeated(epochs_in_log(toy / "run")[len(epochs_in_log(toy_run)) :]) == []
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_a_full_file_system(toy: Path, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one: a tmpfs with room for half of the checkpoints."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        free = shutil.disk_usage(mount).free - exp.bytes_below(toy_run / "checkpoints") // 2
        (mount / "ballast").write_bytes(bytes(free))
        data = ["--data-dir", str(toy_run / "data")]
        assert new_toy(mount / "run", *data) == 1
        assert "free some space" in capsys.readouterr().out.splitlines()[-1]
        assert resume(mount / "run", *data) == 1
        (mount / "ballast").unlink()
        assert resume(mount / "run", *data) == 0
        assert_as_if_undisturbed(mount / "run", toy_run)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("room", [4_000_000, 6_000_000])
def test_kaggles_budget_is_estimated_before_the_start(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """What is needed counts, and what lies there already."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    (toy / "kaggle/working").mkdir(parents=True)
    monkeypatch.setattr(exp, "KAGGLE_DISK_BYTES", room)
    monkeypatch.setattr(exp, "disk_bytes", lambda *_: 5_000_000)
    (toy / "kaggle/working/other").write_bytes(bytes(2_000_000))
    assert exp.main([*TOY, "--output-dir", str(toy / "kaggle/working/run")], root=toy) == 2
    assert "0.0 GB of other files" in (said := capsys.readouterr().out.splitlines()[-1])
    assert "use fewer --runs" in said
    assert not exp.RunFolder(toy / "kaggle/working/run").is_run()


def test_kaggles_budget_is_watched_while_running(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything in the output folder counts, also what other runs left there; with room again the run goes on."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    working = toy / "kaggle/working"
    working.mkdir(parents=True)
    monkeypatch.setattr(exp, "KAGGLE_DISK_BYTES", 60_000_000)
    monkeypatch.setattr(exp, "check_disk", lambda *_: None)
    with open(working / "other", "wb") as file:
        file.truncate(61_000_000)
    run = ["--output-dir", str(working / "run")]
    assert exp.main([*TOY, *run], root=toy) == 1
    assert "GB that the platform keeps: free some space" in capsys.readouterr().out.splitlines()[-1]
    (working / "other").unlink()
    assert exp.main([*AGAIN, *run], root=toy) == 0
    assert results_without_times(working / "run") == results_without_times(toy_run)


def test_no_budget_off_kaggle(tmp_path: Path) -> None:
    exp.RunFolder(tmp_path).check_room(None)
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_bytes(bytes(1000))
    exp.RunFolder(tmp_path / "run").check_room(1000)
    with pytest.raises(exp.DiskFull):
        exp.RunFolder(tmp_path / "run").check_room(999)


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def spoil(patch: pytest.MonkeyPatch, job: str, value: float) -> None:
    """Make the loss of one job's training this value."""
    step = exp.Fitting._step

    def spoiled(fitting: exp.Fitting, index: torch.Tensor, page: int) -> torch.Tensor:
        return step(fitting, index, page) * 0 + value if fitting.name == job else step(fitting, index, page)

    patch.setattr(exp.Fitting, "_step", spoiled)


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_a_diverging_job_fails_and_the_others_go_on(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """A student fails: exit 1, the reason is said, in the report too, and remembered; the other students are unharmed."""
    spoil(monkeypatch, DIRECT, value)
    shutil.copytree(toy_run, toy / "exp1b_earlier")  # its teacher is reused
    assert new_toy(toy / "run") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"finished: 5 of 6 jobs done; 1 failed ({DIRECT})")
    assert f"Failed: {DIRECT} (the loss diverged in epoch 1 (mean {value:g})" in (toy / "run/experiment_report.md").read_text()
    table = exp.pd.read_csv(toy / "run/results.csv")
    assert dict(zip(table.method, table.status, strict=True)) == {"Direct": "failed", "TraditionalKD": "done", "HPM-KD": "done"}
    assert resume(toy / "run") == 1
    assert "1 failed" in capsys.readouterr().out.splitlines()[-1]


def test_a_failed_teacher_leaves_what_does_not_need_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, TEACHER, float("nan"))
    assert new_toy(toy / "run") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"1 of 6 jobs done; 1 failed ({TEACHER}); 4 not done, because they need a failed one" in last
    assert exp.load_index(exp.RunFolder(toy / "run"))["jobs"].keys() == {TEACHER, DIRECT}


def test_an_absurd_learning_rate_ends_with_a_report(toy: Path) -> None:
    """--lr 50: whatever diverges is failed, nothing is a traceback, and no accuracy is made up."""
    code = new_toy(toy / "run", "--lr", "50")
    jobs = exp.load_index(exp.RunFolder(toy / "run"))["jobs"]
    failed = [job for job in jobs.values() if job["status"] == "failed"]
    assert code == (1 if failed else 0)
    assert failed
    assert all("smaller --lr" in job["reason"] for job in failed)
    assert (toy / "run/experiment_report.md").read_text().count("- Failed: ") == len(failed)


def test_outputs_that_are_not_finite_after_the_last_epoch(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network may break in its very last step: the loss was still fine."""
    finish = exp.Fitting.run

    def broken(fitting: exp.Fitting) -> Any:
        network = finish(fitting)
        if fitting.name == KD:
            network.classifier.bias.data.fill_(float("nan"))
        return network

    monkeypatch.setattr(exp.Fitting, "run", broken)
    assert new_toy(toy / "run") == 1
    jobs = exp.load_index(exp.RunFolder(toy / "run"))["jobs"]
    assert "outputs are not finite" in jobs[KD]["reason"]
    copied_from_it = jobs[PILOT]["chosen"] == 0  # then HPM-KD's student would be a copy of the failed one
    assert (HPMKD in jobs) is not copied_from_it
    assert copied_from_it or jobs[HPMKD]["status"] == "done"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train-size", "1"], "--train-size 1 does not fit"),
        (["--train-size", "0"], "--train-size 0 does not fit"),
        (["--batch-size", "181"], "--batch-size 181 is larger than the 180 training images"),
        (["--teacher-epochs", "0"], "--teacher-epochs must lie between"),
        (["--student-epochs", "-1"], "--student-epochs must lie between"),
        (["--runs", "0"], "--runs must lie between"),
        (["--lr", "nan"], "--lr must lie between"),
    ],
)
def test_numbers_that_make_no_experiment_are_refused_at_the_start(
    toy: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert new_toy(toy / "run", *options) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"error: {message}")
    assert not exp.RunFolder(toy / "run").is_run()


def test_an_empty_class(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without images, in training and in the test, is nothing to die of: its accuracy is unknown."""
    load = exp.load_data

    def without_the_last_class(*args: Any) -> exp.RawData:
        raw = load(*args)
        return exp.replace(raw, train_labels=raw.train_labels % 9, test_labels=raw.test_labels % 9)

    monkeypatch.setattr(exp, "load_data", without_the_last_class)
    assert new_toy(toy / "run", "--methods", "Direct") == 0
    record = exp.load_index(exp.RunFolder(toy / "run"))["jobs"][DIRECT]
    assert exp.math.isnan(record["test_class_accuracy"][9])
    assert 0 <= record["test_accuracy"] <= 100


# ---- Crashes ---------------------------------------------------------------------------------------------------------

CRASH = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")


def crash(patch: pytest.MonkeyPatch, job: str, number: int) -> None:
    """Raise what nobody expects from one job's step with this number."""
    steps = [0]
    step = exp.Fitting._step

    def crashing(fitting: exp.Fitting, index: torch.Tensor, page: int) -> torch.Tensor:
        steps[0] += fitting.name == job
        if fitting.name == job and steps[0] == number:
            raise CRASH
        return step(fitting, index, page)

    patch.setattr(exp.Fitting, "_step", crashing)


def test_a_crash_in_a_job_costs_that_job_and_not_the_session(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its reason is in the report, the traceback in the log alone; --resume continues it from its last epoch."""
    shutil.copytree(toy_run, toy / "exp1b_earlier")  # its teacher is reused
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, DIRECT, 4)  # in the second epoch
        assert new_toy(toy / "run") == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(f"finished: 5 of 6 jobs done; 1 failed ({DIRECT})")
    assert "Traceback" not in out
    assert "raise CRASH\nRuntimeError: CUDA error: an illegal" in (toy / "run/experiment.log").read_text()
    reason = "it crashed (RuntimeError: CUDA error: an illegal memory access was encountered): --resume tries again"
    assert f"Failed: {DIRECT} ({reason}" in (toy / "run/experiment_report.md").read_text()
    before = len(epochs_in_log(toy / "run"))
    assert resume(toy / "run") == 0
    assert epochs_in_log(toy / "run")[before:] == [f"{DIRECT} epoch 2", f"{DIRECT} epoch 3"]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_a_report_that_cannot_be_written_fails_no_finished_job(toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, calls = exp.write_outputs, iter(range(1000))

    def break_down_once(*given: Any) -> None:
        if next(calls) == 2:
            raise ValueError("no such colour")
        write(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "write_outputs", break_down_once)
        assert new_toy(toy / "run", "--fresh-teacher") == 0
    assert "report could not be written (no such colour)" in capsys.readouterr().out
    assert not list((toy / "run/checkpoints").glob("*.failed"))
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_a_lost_device_ends_the_session_and_not_every_job(toy: Path, toy_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU an error may stick to the process: then all other jobs would fail of it, one after the other."""
    shutil.copytree(toy_run, toy / "exp1b_earlier")

    def lost(_device: exp.Device) -> None:
        raise exp.UsageError("the device fails")

    with pytest.MonkeyPatch.context() as patch:
        crash(patch, DIRECT, 1)
        patch.setattr(exp, "probe_gpu", lost)
        assert new_toy(toy / "run") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped by the loss of CPU")
    assert "(CUDA error: an illegal memory access was encountered)" in last
    assert f"1 failed ({DIRECT})" in last
    assert "continue with: python run_exp1b_kaggle.py --resume" in last
    jobs = exp.load_index(exp.RunFolder(toy / "run"))["jobs"]
    assert [name for name, record in jobs.items() if record["status"] == "failed"] == [DIRECT]
    assert (toy / "run/experiment_report.md").exists()
    assert resume(toy / "run") == 0
    assert results_without_times(toy / "run") == results_without_times(toy_run)


# ---- Two processes ---------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_goes_on(toy: Path, toy_run: Path) -> None:
    """Started while the first one trains: it names host and process, exits 2, and changes nothing."""
    outcomes: list[int | str] = []
    said = toy / "said"

    def second() -> None:
        from toy import in_child

        def go() -> int:
            with open(said, "w") as file:
                os.dup2(file.fileno(), 1)
                exp.sys.stdout = file  # type: ignore[assignment]
                return exp.main([*AGAIN, "--output-dir", str(toy / "run")])

        outcomes.append(in_child(go))

    with struck("an epoch", 5, second):
        assert new_toy(toy / "run") == 0
    assert outcomes == [2]
    message = said.read_text()
    assert f"is in use by process {os.getpid()} on host {exp.socket.gethostname()}" in message
    assert_as_if_undisturbed(toy / "run", toy_run)


def test_the_lock_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life every half minute, until it is given back."""
    monkeypatch.setattr(exp.RunLock, "BEAT_SECONDS", 0.01)
    lock = exp.RunLock(exp.RunFolder(tmp_path))
    lock.acquire()
    os.utime(lock.path, (1, 1))
    for _ in range(500):
        time.sleep(0.01)
        if lock.path.stat().st_mtime > 1:
            break
    else:
        pytest.fail("no heartbeat in five seconds")
    lock.release()
    assert not lock.path.exists()


def test_a_process_that_lost_its_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer that slept for an hour wakes up: meanwhile another process has taken the run, and keeps it."""
    monkeypatch.setattr(exp.RunLock, "BEAT_SECONDS", 0.05)
    session = exp.Session(None)
    old = exp.signal.getsignal(exp.signal.SIGTERM)
    session.listen()
    try:
        sleeper, successor = (exp.RunLock(exp.RunFolder(tmp_path)) for _ in range(2))
        sleeper.acquire()
        sleeper.path.unlink()
        successor.acquire()
        deadline = time.monotonic() + 5
        while not session.signal and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(exp.Stopped, match="SIGTERM"):
            session.check()
        sleeper.release()
        assert successor.path.exists(), "the successor's lock is not the sleeper's to remove"
        successor.release()
    finally:
        exp.signal.signal(exp.signal.SIGTERM, old)
        exp.signal.signal(exp.signal.SIGINT, exp.signal.default_int_handler)
