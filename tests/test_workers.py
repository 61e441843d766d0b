"""Several workers, and a method of one's own: results as with one worker, digit for digit."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pandas as pd
import pytest
import small_script
from conftest import ROOT, results_without_times
from lab import open_lab, shortcuts, student, teacher
from toy import AGAIN, DIRECT, epochs_in_log, in_child, leftovers, new_toy, resume, tree

import run_exp1b_kaggle as exp

OPTIONS = [
    "--mode", "smoke", "--width", "8", "--train-size", "200", "--batch-size", "60", "--teacher-epochs", "2", "--student-epochs",
    "2", "--runs", "1", "--threads", "1", "--device", "cpu", "--precision", "fp32", "--compression", "2.3x", "--fresh-teacher",
]  # fmt: skip


SCRIPT = ROOT / "run_exp1b_kaggle.py"


def start(
    folder: Path, *options: str, prefix: tuple[str, ...] = (), script: str | Path = small_script.__file__
) -> subprocess.Popen[str]:
    """Start the script as a user does; by default with small networks, and students that are held by `hold`."""
    by = [] if "torchrun" in prefix else [sys.executable]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # for torchrun
    return subprocess.Popen(
        [*prefix, *by, str(script), *options, "--output-dir", str(folder)],
        cwd=folder.parent,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HOLD": str(folder.parent / "hold")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Callable[[int], object]]:
    """Meanwhile the students of runs beside `folder` wait after their first epoch.

    Gives a function that lets them train so many epochs.
    """
    file = folder.parent / "hold"
    file.write_text("1")
    try:
        yield lambda epochs: file.write_text(str(epochs))
    finally:
        file.unlink()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output; it is killed if it does not end."""
    try:
        out, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    return process.returncode, out


def assert_clean(folder: Path) -> None:
    """Every job went on from its last epoch, and nothing is left behind."""
    epochs = epochs_in_log(folder)
    assert len(set(epochs)) == len(epochs)
    assert leftovers(folder) == []


MISTAKES = """

import run_exp1b_kaggle as exp

@exp.register("Broken")
class Broken(exp.Direct):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        undefined

@exp.register("Large")
class Large(exp.Direct):
    def start_epoch(self, *arguments):
        raise exp.torch.OutOfMemoryError("no memory")
"""


@pytest.mark.slow
def test_the_gallery_with_two_workers_and_a_kill_equals_one_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All eight published methods beside the main ones; two with a mistake fail alone, with two workers as with one.

    The parent is killed: its workers end. --resume needs the plugin, and refuses another file.
    """
    plugin = tmp_path / "mine.py"
    plugin.write_text((ROOT / "tests/published_methods.py").read_text() + MISTAKES)
    methods = ["Direct", "TraditionalKD", "HPM-KD", "DKD", "DIST", "LSKD", "TAKD", "AT", "SP", "RKD", "Hint"]
    options = [*OPTIONS, "--plugin", str(plugin), "--methods", *methods, "Broken", "Large"]
    assert in_child(lambda: small_script.main([*options, "--output-dir", str(tmp_path / "1")])) == 1

    process = start(tmp_path / "2", *options, "--workers", "2")
    wait_until(lambda: len(list((tmp_path / "2/checkpoints").glob("student_*.pt"))) >= 3)
    with hold(tmp_path / "2"):
        wait_for_two_students(tmp_path / "2")
        workers = workers_of(process)
        process.kill()
        finish(process)
        assert_gone(workers)
    again = ["--resume", "--output-dir", str(tmp_path / "2")]
    capfd.readouterr()
    assert in_child(lambda: small_script.main(again)) == 2
    assert "add --plugin mine.py" in capfd.readouterr().out

    code, out = finish(
        start(tmp_path / "2", "--resume", "--workers", "2", "--threads", "1", "--plugin", str(plugin))
    )
    assert code == 1, out
    assert "finished: 15 of 17 jobs done; 2 failed" in out.strip().splitlines()[-1]
    assert "started again" not in (tmp_path / "2/experiment.log").read_text()
    assert_clean(tmp_path / "2")
    assert results_without_times(tmp_path / "1") == results_without_times(tmp_path / "2")
    table = pd.read_csv(tmp_path / "2/results.csv")
    assert set(table.method[table.status == "done"]) == set(methods)
    assert set(table.method[table.status == "failed"]) == {"Broken", "Large"}
    report = (tmp_path / "2/experiment_report.md").read_text()
    assert "AT minus Direct" in report and exp.hashlib.sha256(plugin.read_bytes()).hexdigest()[:12] in report

    plugin.write_text(plugin.read_text() + "\n# another file\n")
    assert in_child(lambda: small_script.main([*again, "--plugin", str(plugin)])) == 2
    assert "another file" in capfd.readouterr().out


COMPARED = [*OPTIONS, "--methods", "Direct", "TraditionalKD", "--student-epochs", "4"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of COMPARED by one process; the processes of pytest-xdist share it."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with filelock.FileLock(shared / "alone.lock"):
        folder = shared / "alone"
        if not (shared / "alone.done").exists():
            assert in_child(lambda: small_script.main([*COMPARED, "--output-dir", str(folder)])) == 0
            (shared / "alone.done").touch()
    return folder


def wait_for_two_students(folder: Path, epochs: int = 1) -> None:
    """Wait until two students have been trained for so many epochs and are held."""
    wait_until(lambda: len(students_at(folder, epochs)) == 2)


def students_at(folder: Path, epochs: int) -> list[Path]:
    """The checkpoints in progress of students that have been trained for so many epochs."""
    found = folder.glob("checkpoints/student_*.progress")
    return [path for path in found if len(exp.load_checkpoint(path)["history"]) == epochs]


def running_workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the workers that a process has started."""
    return [int(pid) for pid in children_of(process.pid) if "spawn_main" in command_of(pid)]


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Those of two workers."""
    found = running_workers(process)
    assert len(found) == 2
    return found


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until something is the case."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, IndexError):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def assert_gone(workers: list[int], seconds: float = 60) -> None:
    """The processes end by themselves."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_dead_worker_and_a_stop_lose_nothing(tmp_path: Path, alone: Path) -> None:
    """SIGKILL to a worker: it alone is started again. SIGTERM to the parent: its workers end, with a last line.

    After both the results are those of one process, digit for digit.
    """
    folder = tmp_path / "run"
    with hold(folder) as allow:
        process = start(folder, *COMPARED, "--workers", "2")
        wait_for_two_students(folder)
        first, second = workers_of(process)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(running_workers(process)) == 2 and first not in running_workers(process))
        workers = running_workers(process)
        assert second in workers, "nobody else is disturbed"
        allow(2)
        wait_for_two_students(folder, 2)
        process.send_signal(signal.SIGTERM)
        code, out = finish(process)
        assert code == 143, out
        assert out.count("died (SIGKILL) and is started again; the others go on") == 1
        assert "stopped by SIGTERM" in out.strip().splitlines()[-1]
        assert_gone(workers)

    again = ["--resume", "--threads", "1", "--output-dir", str(folder)]
    assert in_child(lambda: small_script.main(again)) == 0
    assert results_without_times(folder) == results_without_times(alone)
    assert_clean(folder)


@pytest.mark.slow
def test_processes_join_a_run_and_are_killed(tmp_path: Path, alone: Path) -> None:
    """One comes before there is a run, one in the middle; each does a job and is killed: the leader does it to its end."""
    folder = tmp_path / "run"
    with hold(folder) as allow:
        early = start(folder, *COMPARED, "--join")
        leader = start(folder, *COMPARED)
        wait_for_two_students(folder)
        early.kill()
        finish(early)
        late = start(folder, "--join", "--device", "cpu")
        allow(2)
        wait_for_two_students(folder, 2)
        late.send_signal(signal.SIGTERM)
        code, out = finish(late)
        assert code == 143, out
        assert "stopped by SIGTERM" in out and "the process that leads it writes the report" in out
    code, out = finish(leader)
    assert code == 0, out
    assert results_without_times(folder) == results_without_times(alone)
    assert_clean(folder)


@pytest.mark.slow
def test_who_joined_goes_on_when_the_leader_is_killed(tmp_path: Path, alone: Path) -> None:
    """The kernel gives the leader's claim to who waits; the next leader has only to write the report."""
    folder = tmp_path / "run"
    with hold(folder):
        leader, joined = start(folder, *COMPARED), start(folder, *COMPARED, "--join")
        wait_for_two_students(folder)
        leader.kill()
        finish(leader)
    code, out = finish(joined)
    assert code == 0, out
    last = out.strip().splitlines()[-1]
    assert "nothing is left to do here: 3 of 3 jobs of the run done; nobody leads it any more" in last
    before = (folder / "experiment.log").read_text().count(" epoch ")
    assert (
        in_child(lambda: small_script.main(["--resume", "--device", "cpu", "--output-dir", str(folder)])) == 0
    )
    assert (folder / "experiment.log").read_text().count(" epoch ") == before, "nothing is trained again"
    assert results_without_times(folder) == results_without_times(alone)
    assert_clean(folder)


BUSY = """
import multiprocessing
import run_exp1b_kaggle as exp

@exp.register("Mine")
class Mine(exp.Direct):
    pass

def busy(device):
    if multiprocessing.current_process().name == "worker 2":
        raise exp.UsageError("the second device is busy: wait")

exp.work.__globals__["probe"] = busy  # a worker's module is a copy of its functions' globals
"""


@pytest.mark.slow
def test_a_worker_whose_device_is_busy_leaves_the_work_to_the_others(tmp_path: Path) -> None:
    """By the script itself, whose workers import it under another name."""
    (tmp_path / "busy.py").write_text(BUSY)
    options = [*OPTIONS, "--plugin", str(tmp_path / "busy.py"), "--methods", "Direct", "Mine"]
    options += ["--teacher-epochs", "1", "--student-epochs", "1"]
    code, out = finish(start(tmp_path / "run", *options, "--workers", "2", script=SCRIPT))
    assert code == 0, out
    assert "this worker stops: the second device is busy" in out
    assert out.strip().splitlines()[-1].startswith("finished: 3 of 3 jobs done")
    assert (pd.read_csv(tmp_path / "run/results.csv").status == "done").all()


@pytest.mark.slow
def test_torchrun_starts_processes_that_share_a_run(tmp_path: Path, alone: Path) -> None:
    """Rank 0 leads, the other one joins; the results are those of one process, digit for digit."""
    torchrun = ("torchrun", "--nproc-per-node", "2", "--standalone")
    folder = tmp_path / "run"
    with hold(folder):
        process = start(folder, *COMPARED, prefix=torchrun)
        wait_for_two_students(folder)
    code, out = finish(process)
    assert code == 0, out
    assert results_without_times(folder) == results_without_times(alone)
    said = (folder / "experiment.log").read_text()
    assert "finished: 3 of 3 jobs done" in said
    assert "nothing is left to do here: 3 of 3 jobs of the run done" in said
    assert "epoch" in "".join(line for line in said.splitlines() if f"[{socket.gethostname()} " in line)
    assert leftovers(folder) == []


SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, exp.Group()),
        (SRUN, exp.Group(3, 4, 1)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, exp.Group()),
        ({**SRUN, "SLURM_PTY_PORT": "40000", "terminal": "1"}, exp.Group()),
        ({**SRUN, "SLURM_PTY_PORT": "40000"}, exp.Group(3, 4, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, exp.Group()),  # sbatch without srun
        (TORCHRUN, exp.Group(5, 8, 1, 4)),
        ({**SRUN, **TORCHRUN}, exp.Group(5, 8, 1, 4)),  # srun that starts torchrun
    ],
    ids=[
        "alone",
        "srun",
        "srun of one",
        "a shell",
        "srun in one",
        "sbatch",
        "torchrun",
        "torchrun below srun",
    ],
)
def test_what_a_launcher_says(
    environment: dict[str, str], group: exp.Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "isatty", lambda _: "terminal" in environment)
    assert exp.Group.find() == group
    devices = [exp.Device("cpu", 0, "CPU")]
    assert exp.worker_count(exp.Settings(workers=3), devices) == (group.size if group.size > 1 else 3)


# ---- Joining -------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of a process that may not join."""
    assert exp.main(["--join", *options]) == 2
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_joining_needs_a_filelock_that_leaves_locks_as_they_are(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exp.importlib.metadata, "version", lambda _: "3.20.0")
    assert exp.main(["--join", "--output-dir", str(toy / "run")]) == 2
    assert "needs filelock 4 or newer, not 3.20.0" in capsys.readouterr().out


def test_joining_needs_a_folder_and_a_leader(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for one, for a while."""
    monkeypatch.setattr(exp, "JOIN_SECONDS", 0.0)
    assert "need --output-dir DIR" in refused(capsys)
    assert "no process leads a run in" in refused(capsys, "--output-dir", str(toy / "run"))
    assert "excludes --resume" in refused(capsys, "--resume")
    assert not (toy / "run").exists()


@pytest.mark.parametrize(
    ("owner", "name", "value", "options", "said"),
    [
        (exp, "script_sha256", lambda: "another", [], "another version of this script leads the run"),
        (exp.RawData, "sha256", "another", [], "are not the run's"),
        (exp, "Nothing", None, ["--lr", "0.9"], "--lr: the run has 0.05, you gave 0.9"),
        (exp, "check_plugins", lambda *_: exp.load_plugins([Path("missing.py")]), [], "missing.py"),
    ],
    ids=["script", "data", "settings", "plugins"],
)
def test_who_would_compute_something_else_may_not_join(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    owner: Any, name: str, value: Any, options: list[str], said: str,
) -> None:  # fmt: skip
    before = tree(copied / "checkpoints")
    with exp.hold_folder(copied):
        os.utime(copied / "checkpoints" / exp.STATE_NAME)
        before = tree(copied / "checkpoints")
        monkeypatch.setattr(owner, name, value, raising=False)
        assert said in refused(capsys, "--output-dir", str(copied), "--device", "cpu", *options)
    assert tree(copied / "checkpoints") == before


def test_a_process_that_joins_waits_until_the_run_is_prepared(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index of an earlier session is not enough."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.utime(copied / "checkpoints" / exp.STATE_NAME)

    monkeypatch.setattr(exp.time, "sleep", sleep)
    with exp.hold_folder(copied):
        exp.await_leader(copied, exp.Session())
    assert len(waits) == 4, "and looks twice: another one that waits may have held the lock for a moment"


def test_the_parent_gives_its_workers_the_device_and_ends_those_that_are_late(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is started again without its GPU must not go on on the CPU; one may hang in a driver."""
    ended: list[int] = []
    given: list[dict[str, Any]] = []

    class Hanging:
        def __init__(self, count: int, mandate: Any, *_: Any) -> None:
            given.append(mandate.given)
            self.members, self.working = [], [self] * count

        def listen(self, _: float) -> None:
            pass

        def end(self, number: int) -> None:
            ended.append(number)
            self.working = []

        def kill(self) -> None:
            pass

        def reason(self) -> str:
            return "SIGTERM"

    monkeypatch.setattr(exp, "find_devices", lambda *_: [exp.Device("cpu", 0, "CPU")])
    monkeypatch.setattr(exp, "Crew", Hanging)
    monkeypatch.setattr(exp, "END_SECONDS", -1e6)
    assert new_toy(toy / "run", "--workers", "2", "--max-hours", "1", "--device", "auto") == 0
    assert ended == [signal.SIGTERM] and given[0]["device"] == "cpu"


def test_a_worker_tells_how_far_its_jobs_are(copied: Path) -> None:
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    told: list[tuple[str, Any]] = []
    here, there = multiprocessing.Pipe(duplex=False)
    worker = (0, there, exp.parse_args([*AGAIN, "--output-dir", str(copied)]), exp.detect_platform(), None)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=exp.worker_main, args=worker, daemon=True)
    process.start()
    while not told or told[-1][0] != "outcome":
        assert here.poll(60)
        told.append(here.recv())
    process.join()
    assert [value for kind, value in told if kind == "trained"] == [{DIRECT: n / 3} for n in (1, 2, 3)]


def test_the_parent_counts_the_epochs_of_its_workers(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left that it shows shrinks also while a job of hours is trained."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    shown: list[float] = []

    class Telling(exp.Crew):
        def __init__(self, *_: Any) -> None:
            self.members, self.ending = [exp.Member(None, None, speeds={"5x": 1e9})], 0.0  # type: ignore[arg-type]

        def listen(self, _: float) -> None:
            member = self.members[0]
            member.trained = {DIRECT: len(shown) / 2}
            member.outcome = "SIGTERM" if len(shown) == 2 else None

        def kill(self) -> None:
            pass

    def show(progress: exp.Progress, *_: str) -> None:
        shown.append(progress.estimate.seconds_left(progress.run.left))

    monkeypatch.setattr(exp, "Crew", Telling)
    monkeypatch.setattr(exp.Progress, "show", show)
    resume(copied, "--workers", "2")
    assert shown[0] > 0 and shown == pytest.approx([shown[0], shown[0] / 2, 0.0])


# ---- Claims --------------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_leaves_no_file(tmp_path: Path) -> None:
    lock = exp.take_lock(tmp_path / "lock")
    assert lock is not None
    assert exp.take_lock(tmp_path / "lock") is None
    assert exp.is_held(tmp_path / "lock")
    exp.give_back(lock)
    assert not exp.is_held(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []
    assert exp.take_lock(tmp_path / "nowhere/lock") is None


def test_a_job_that_ended_while_it_was_claimed_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = open_lab(tmp_path, methods=("Direct",), compression=("2.3x",))
    worker, job, done = exp.Worker(lab, writes=False), student(lab, "Direct"), []
    monkeypatch.setattr(exp, "do_job", lambda _, job: done.append(job))
    monkeypatch.setattr(lab.run, "refresh", lambda: lab.run.records.update({job.name: None}) or [])
    assert worker.take(job)
    assert done == []


def test_a_finished_job_that_is_lost_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its claim was given back: the session does not wait for ever."""
    lab = open_lab(tmp_path, methods=("Direct",), compression=("2.3x",))
    done: list[str] = []
    do_job = exp.do_job

    def losing(experiment: exp.Experiment, job: exp.Job) -> None:
        done.append(job.name)
        do_job(experiment, job)
        direct = student(lab, "Direct")
        if job.kind == "teacher" and lab.run.file(direct).exists():
            lab.run.file(direct).unlink()
            del lab.run.records[direct.name]

    monkeypatch.setattr(exp, "do_job", losing)
    monkeypatch.setattr(exp, "priorities", lambda jobs, *_: {job.name: job.kind == "student" for job in jobs})
    with shortcuts(steps=False):
        exp.Worker(lab, writes=False).work()
    assert sorted(done) == sorted([teacher(lab).name, *2 * [student(lab, "Direct").name]])
    assert lab.run.left == []


def test_a_worker_waits_for_what_another_does_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = open_lab(tmp_path, methods=("Direct",), compression=("2.3x",))
    locks = [exp.take_lock(lab.run.file(job, "lock")) for job in lab.run.jobs]
    monkeypatch.setattr(exp.Worker, "WAIT_SECONDS", 0.0)
    exp.start_logging(None)

    def sleep(_: float) -> None:
        for lock in locks:
            exp.give_back(lock)

    with shortcuts(steps=False) as patch:
        patch.setattr(exp.time, "sleep", sleep)
        exp.Worker(lab, writes=False).work()
    assert f"waiting for {teacher(lab).name}, which another process is doing" in capsys.readouterr().out
    assert lab.run.left == []


def test_a_worker_that_waits_in_a_folder_that_is_gone_stops(tmp_path: Path) -> None:
    exp.make_run_folder(tmp_path / "run")
    with exp.hold_folder(tmp_path / "run"):
        lab = open_lab(tmp_path / "run", methods=("Direct",), compression=("2.3x",))
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(exp.Stopped, match="removed or taken"):
            exp.Worker(lab, writes=False).work()


def test_a_job_that_ends_its_process_twice_is_failed(tmp_path: Path) -> None:
    """What a process that dies leaves is its count of attempts; one that saves an epoch in between counts anew."""
    lab = open_lab(tmp_path, methods=("Direct",), compression=("2.3x",))
    job, worker = student(lab, "Direct"), exp.Worker(lab, writes=False)
    attempts = lab.run.file(job, "attempts")
    worker.count_attempt(job)
    lab.run.file(job, "progress").write_text("an epoch")
    worker.count_attempt(job)
    worker.count_attempt(job)
    lab.run.clean()
    assert not attempts.exists(), "a new session counts anew"
    worker.count_attempt(job)
    worker.count_attempt(job)
    worker.attempt(job)
    lab.run.refresh()
    assert "it ended its process 2 times" in lab.run.records[job.name].failure
    assert not attempts.exists()


def test_what_a_killed_process_left_of_a_job_goes_when_another_has_done_it(tmp_path: Path) -> None:
    """Killed in the middle of a write, in a run that goes on."""
    lab = open_lab(tmp_path, methods=("Direct",), compression=("2.3x",))
    for job in lab.run.jobs:
        (lab.run.checkpoints / f".{job.name}.attempts.7.tmp").touch()
    with shortcuts(steps=False):
        exp.Worker(lab, writes=False).work()
    assert lab.run.left == []
    assert list(lab.run.checkpoints.glob(".*")) == []


def test_what_is_being_done_is_not_cleaned_up(tmp_path: Path) -> None:
    """A leader that comes back while others work."""
    run = open_lab(tmp_path).run
    busy, free = run.jobs[:2]
    lock = exp.take_lock(run.file(busy, "lock"))
    for job in (busy, free):
        (run.checkpoints / f".{job.name}.pt.7.tmp").touch()
        run.file(job, "attempts").touch()
    run.clean()
    kept = {f".{busy.name}.pt.7.tmp", f"{busy.name}.attempts", f"{busy.name}.lock"}
    assert {path.name for path in run.checkpoints.iterdir()} == kept
    exp.give_back(lock)


def children_of(parent: int) -> list[str]:
    """Process ids of a process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if path.read_text().rsplit(")", 1)[1].split()[1] == str(parent):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def command_of(pid: str) -> str:
    """A process's command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "cannot be read"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "registers no method"),
        (
            "import run_exp1b_kaggle as e\n@e.register('Direct')\nclass X(e.Direct):\n    pass",
            "a method Direct already",
        ),
        (
            "import run_exp1b_kaggle as e\n@e.register('X')\nclass X(e.Direct):\n    look = ('no colour', 'o', '-')",
            "is no colour, marker and line",
        ),
    ],
)
def test_a_bad_plugin_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    """No such file, one that raises, one that registers nothing, a name that exists: exit code 2."""
    plugin = tmp_path / "mine.py"
    if content is not None:
        plugin.write_text(content)
    before = dict(exp.METHODS)
    assert exp.main(["--plan", "--plugin", str(plugin)]) == 2
    out = capsys.readouterr().out.strip()
    assert said in out and len(out.splitlines()) == 1
    assert exp.METHODS == before
