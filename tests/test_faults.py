"""Kills at every point, full disks, signals, two processes: nothing is lost, nothing is wrong."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, results_without_times
from toy import (
    AGAIN,
    DAMAGES,
    DIRECT,
    HPMKD,
    JOBS,
    POINTS,
    TEACHER,
    Code,
    attempt,
    epochs_in_log,
    leftovers,
    new_toy,
    repeated,
    resume,
    struck,
    tree,
)

import run_exp1b_kaggle as exp


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_and_a_resume_give_the_same_results(toy: Path, toy_run: Path, point: str) -> None:
    """SIGKILL at the second visit of a point, then --resume: the same results digit for digit, no epoch done twice."""
    folder = toy / "run"
    outcome = attempt(folder, ["--fresh-teacher"], point, 2)
    assert outcome in ("SIGKILL", 0)
    assert attempt(folder, ["--fresh-teacher"]) == 0
    assert results_without_times(folder) == results_without_times(toy_run)
    assert leftovers(folder) == []
    assert repeated(epochs_in_log(folder)) == []


@pytest.mark.parametrize("job", [TEACHER, DIRECT, HPMKD])
@pytest.mark.parametrize("damage", ["empty", "cut at 50%", "bit at 60%", "a folder", "a text"])
def test_a_damaged_model_is_set_aside_and_its_job_done_again(
    copied: Path, toy_run: Path, redone: list[str], job: str, damage: str
) -> None:
    """The others stay; what comes out is what was there before."""
    path = copied / f"checkpoints/{job}.pt"
    DAMAGES[damage](path)
    assert resume(copied) == 0
    assert redone == [job]
    assert path.with_name(path.name + ".corrupt").exists()
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("damage", ["empty", "cut at 50%", "bit at 30%", "a text"])
def test_a_damaged_index_is_taken_from_a_model(
    copied: Path, toy_run: Path, redone: list[str], damage: str
) -> None:
    """Nothing is trained again."""
    DAMAGES[damage](copied / "checkpoints" / exp.STATE_NAME)
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_hostile_index_is_not_executed(copied: Path, tmp_path: Path, redone: list[str]) -> None:
    """A sealed pickle that would create a file when it is read creates none."""
    witness = tmp_path / "witness"
    exp.write_sealed(copied / "checkpoints" / exp.STATE_NAME, exp.pickle.dumps({"format": Code(witness)}))
    assert resume(copied) == 0
    assert not witness.exists() and redone == []


def test_a_full_disk_is_said_and_loses_nothing(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ENOSPC at a rename in the run folder: exit code 1, one line, and --resume finishes."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if "student" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert new_toy(toy / "run", "--fresh-teacher") == 1
    assert "free some space" in capsys.readouterr().out.strip().splitlines()[-1]
    monkeypatch.setattr(os, "replace", replace)
    assert resume(toy / "run") == 0
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_one_denied_rename_is_tried_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virus scanner that holds a file for a moment costs nothing."""
    replace, denied = os.replace, []

    def deny_once(source: Path, target: Path) -> None:
        if not denied:
            denied.append(target)
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", deny_once)
    exp.write_atomic(toy / "file", b"content")
    assert denied and (toy / "file").read_bytes() == b"content"


def test_a_rename_that_is_always_denied_is_one_clear_error(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a second of tries: what cannot be written, and what to do; no temporary file stays."""

    def deny(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", deny)
    monkeypatch.setattr(exp.time, "sleep", lambda _: None)
    with pytest.raises(exp.UsageError, match=r"cannot write .*--resume"):
        exp.write_atomic(toy / "file", b"content")
    assert list(toy.glob(".*tmp")) == []


def test_a_file_system_without_fsync_gets_one_warning(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


def test_a_second_process_is_refused_and_named_the_holder(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder of a live process is in use; the lock of a dead one, and a copied lock, mean nothing."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(copied)], cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == b"held"
        before = tree(copied)
        assert resume(copied) == 2
        assert f"process {holder.pid} on host" in capsys.readouterr().out
        assert tree(copied) == before
        shutil.copytree(copied, copied.with_name("copy"))
        assert resume(copied.with_name("copy")) == 0
    finally:
        holder.kill()
        holder.wait()
    assert resume(copied) == 0
    assert leftovers(copied) == []


HOLD = """
import sys, time, pathlib
import run_exp1b_kaggle as exp
with exp.RunLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_lost_its_folder_writes_nothing_into_the_other_runs(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is removed and made anew by another run while this one trains: it stops, and the other stays as it is."""
    folder, epoch, other = toy / "run", exp.Training._epoch, {}

    def taken(training: exp.Training, number: int) -> None:
        epoch(training, number)
        if not other:
            shutil.rmtree(folder)
            exp.make_run_folder(folder)
            (folder / "run.owner").write_text("process 1 on host elsewhere\nanother-token\n")
            (folder / "experiment_report.md").write_text("of the other run")
            other.update(tree(folder))

    monkeypatch.setattr(exp.Training, "_epoch", taken)
    assert new_toy(folder, "--fresh-teacher") == 1
    assert "removed or taken" in capsys.readouterr().out.strip().splitlines()[-1]
    assert tree(folder) == other


def test_a_report_that_fails_costs_no_training(
    copied: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ValueError in a table: one line on the console, the traceback in the log, exit code 0."""

    def fail(_: object) -> None:
        raise ValueError("a table that cannot be made")

    monkeypatch.setattr(exp, "summary_table", fail)
    assert resume(copied) == 0
    assert redone == []
    log = (copied / "experiment.log").read_text()
    assert "a table that cannot be made" in log and "Traceback" in log


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_a_signal_stops_cleanly(
    toy: Path, toy_run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 128 + n, a last line that says so, and --resume finishes with the same results."""
    number = getattr(signal, name)
    with struck("an epoch", 4, lambda: os.kill(os.getpid(), number)):
        assert new_toy(toy / "run", "--fresh-teacher") == 128 + number
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"stopped by {name}" in last and "continue with: python" in last
    assert resume(toy / "run") == 0
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_an_ignored_hangup_stays_ignored(toy: Path) -> None:
    """What nohup set before the start is left as it is."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with struck("an epoch", 2, lambda: os.kill(os.getpid(), signal.SIGHUP)):
            assert new_toy(toy / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_diverged_job_is_not_tried_again_and_a_crashed_one_is(
    copied: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`final` failures stay; the others get another chance with every --resume."""
    run = exp.Run(copied, exp.load_index(copied, {}))
    by_name = {job.name: job for job in run.jobs}
    for name, final in ((DIRECT, True), (HPMKD, False)):
        (copied / f"checkpoints/{name}.pt").unlink()
        run.fail(by_name[name], "made by a test", final)
    assert resume(copied) == 1
    assert redone == [HPMKD]


def test_status_counts_failed_jobs_apart(
    copied: Path, capsys: pytest.CaptureFixture[str], redone: list[str]
) -> None:
    """All but one done, one failed; the folder stays as it is."""
    run = exp.Run(copied, exp.load_index(copied, {}))
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    run.fail(next(job for job in run.jobs if job.name == DIRECT), "made by a test", True)
    assert resume(copied) == 1
    before = tree(copied)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert f"{len(JOBS) - 1} of {len(JOBS)} jobs done, 1 failed" in capsys.readouterr().out
    assert tree(copied) == before


def test_a_read_only_input_is_copied_and_left_alone(
    toy: Path, toy_run: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in a Kaggle input mount is continued in the output folder; the mount is not written."""
    root = toy / "root"
    mount = root / "kaggle/input/notebooks/someone/earlier" / toy_run.name
    (root / "kaggle/working").mkdir(parents=True)
    shutil.copytree(toy_run, mount)
    for path in [*mount.rglob("*"), mount]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    before = tree(mount)
    assert exp.main(AGAIN, root=root) == 0
    assert redone == []
    assert tree(mount) == before
    assert results_without_times(root / "kaggle/working" / toy_run.name) == results_without_times(toy_run)


def test_a_session_that_is_over_trains_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, one line that says why; the same command starts again."""
    assert new_toy(toy / "run", "--fresh-teacher", "--max-hours", "0.000001") == 0
    assert "stopped by session clock" in capsys.readouterr().out.strip().splitlines()[-1]
    assert new_toy(toy / "run") == 0


def test_an_internal_error_is_one_line_and_a_traceback_in_the_log(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fault of the program itself: exit code 1, the last line names it."""

    def fail(*_: object) -> None:
        raise RuntimeError("a fault made by a test")

    monkeypatch.setattr(exp, "priorities", fail)
    assert new_toy(toy / "run") == 1
    out = capsys.readouterr().out
    assert "a fault made by a test" in out.strip().splitlines()[-1] and "Traceback" not in out
    assert not (toy / "run").exists() or "Traceback" in (toy / "run/experiment.log").read_text()


def test_the_printed_command_continues_the_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Script as it was called, run folder, and every session setting that was given."""
    monkeypatch.setattr(sys, "argv", ["/some where/run_exp1b_kaggle.py"])
    options = ["--max-hours", "9", "--workers", "1"]
    with struck("an epoch", 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert new_toy(toy / "run", *options) == 143
    last = capsys.readouterr().out.strip().splitlines()[-1]
    expected = [
        "python '/some where/run_exp1b_kaggle.py' --resume",
        f"--output-dir {toy / 'run'}",
        "--device cpu",
    ]
    assert all(part in last for part in [*expected, "--workers 1", "--threads 1", "--max-hours 9.0"])


def test_a_new_run_into_the_folder_of_another_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that says what to do; nothing in the folder changes."""
    before = tree(copied)
    assert new_toy(copied) == 2
    assert "add --resume" in capsys.readouterr().out
    assert tree(copied) == before
