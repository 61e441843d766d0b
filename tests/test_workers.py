"""Several workers, and a method of one's own: results as with one worker, digit for digit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pandas as pd
import pytest
import torch
from conftest import ROOT, results_without_times
from lab import open_lab, student
from toy import in_child

import run_exp1b_kaggle as exp

OPTIONS = [
    "--mode", "smoke", "--width", "8", "--train-size", "200", "--batch-size", "60", "--teacher-epochs", "2", "--student-epochs",
    "2", "--runs", "1", "--threads", "1", "--device", "cpu", "--precision", "fp32", "--compression", "2.3x", "--fresh-teacher",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def plugin_text() -> str:
    """The method of one's own that README shows."""
    section = (ROOT / "README_KAGGLE.md").read_text().split("Add your own method", 1)[1]
    return re.search(r"```python\n(.*?)```", section, re.S)[1]  # type: ignore[index]


def start(folder: Path, *options: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the script as a user does."""
    command = [
        *prefix,
        sys.executable,
        str(ROOT / "run_exp1b_kaggle.py"),
        *options,
        "--output-dir",
        str(folder),
    ]
    return subprocess.Popen(
        command,
        cwd=folder.parent,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    out, _ = process.communicate(timeout=400)
    return process.returncode, out


@pytest.mark.slow
def test_two_workers_with_a_plugin_equal_one_worker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The plugin trains, pairs, and is in table and report; --resume needs it, and refuses another file."""
    plugin = tmp_path / "dkd.py"
    plugin.write_text(plugin_text())
    options = [
        *OPTIONS,
        "--plugin",
        str(plugin),
        "--methods",
        "Direct",
        "HPM-KD",
        "DKD",
        "--teacher-epochs",
        "1",
        "--student-epochs",
        "1",
    ]
    assert in_child(lambda: exp.main([*options, "--output-dir", str(tmp_path / "1")])) == 0
    code, out = finish(start(tmp_path / "2", *options, "--workers", "2"))
    assert code == 0, out
    assert "finished: " in out.strip().splitlines()[-1]
    assert results_without_times(tmp_path / "1") == results_without_times(tmp_path / "2")
    table = pd.read_csv(tmp_path / "2/results.csv")
    assert set(table.method) == {"Direct", "HPM-KD", "DKD"} and (table.status == "done").all()
    report = (tmp_path / "2/experiment_report.md").read_text()
    assert "DKD minus Direct" in report and exp.hashlib.sha256(plugin.read_bytes()).hexdigest()[:12] in report

    again = ["--resume", "--output-dir", str(tmp_path / "2")]
    capfd.readouterr()
    assert in_child(lambda: exp.main(again)) == 2
    assert "add --plugin dkd.py" in capfd.readouterr().out
    plugin.write_text(plugin_text() + "\n# another file\n")
    assert in_child(lambda: exp.main([*again, "--plugin", str(plugin)])) == 2
    assert "another file" in capfd.readouterr().out


COMPARED = [*OPTIONS, "--methods", "Direct", "TraditionalKD", "--teacher-epochs", "6"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of COMPARED by one process; the processes of pytest-xdist share it."""
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with filelock.FileLock(shared / "alone.lock"):
        folder = shared / "alone"
        if not (shared / "alone.done").exists():
            assert in_child(lambda: exp.main([*COMPARED, "--output-dir", str(folder)])) == 0
            (shared / "alone.done").touch()
    return folder


def wait_for_progress(folder: Path) -> None:
    """Wait until a job saves an epoch from now on."""
    begun, deadline = time.time(), time.monotonic() + 200
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # a job has just ended
            if any(path.stat().st_mtime > begun for path in folder.glob("checkpoints/*.progress")):
                return
        time.sleep(0.05)
    raise AssertionError("no epoch was saved")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the workers of our own launcher."""
    found = [int(pid) for pid in children_of(process.pid) if "spawn_main" in command_of(pid)]
    assert len(found) >= 2
    return found


def assert_gone(workers: list[int], seconds: float = 60) -> None:
    """The processes end by themselves."""
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_a_stop_a_dead_parent_and_a_dead_worker_lose_nothing(tmp_path: Path, alone: Path) -> None:
    """SIGKILL to a worker: the others go on. SIGTERM to the parent: a last line. SIGKILL to it: its workers end too.

    After all three the results are those of one process, digit for digit.
    """
    folder = tmp_path / "run"
    again = ["--resume", "--threads", "1"]

    process = start(folder, *COMPARED, "--workers", "2")
    wait_for_progress(folder)
    workers = workers_of(process)
    os.kill(workers[0], signal.SIGKILL)
    assert_gone(workers, seconds=25)  # torch's launcher kills after 30 who has not ended by itself
    wait_for_progress(folder)
    workers = workers_of(process)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 143, out
    assert "a worker died, so all start again" in out
    assert "stopped by SIGTERM" in out.strip().splitlines()[-1]
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    process = start(folder, *again, "--workers", "2")
    wait_for_progress(folder)
    workers = workers_of(process)
    process.kill()
    finish(process)
    assert_gone(workers)

    assert in_child(lambda: exp.main([*again, "--output-dir", str(folder)])) == 0
    assert results_without_times(folder) == results_without_times(alone)


BUSY = """
import os
import run_exp1b_kaggle as exp

@exp.register("Mine")
class Mine(exp.Direct):
    pass

def busy(device):
    if os.environ.get("RANK") == "1":
        raise exp.UsageError("the second device is busy: wait")

exp.work.__globals__["probe"] = busy  # a worker's module is a copy of its functions' globals
"""


@pytest.mark.slow
def test_a_worker_whose_device_is_busy_leaves_the_work_to_the_others(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    options = [*OPTIONS, "--plugin", str(tmp_path / "busy.py"), "--methods", "Direct", "Mine"]
    code, out = finish(start(tmp_path / "run", *options, "--workers", "2"))
    assert code == 0, out
    assert "this worker stops: the second device is busy" in out
    assert out.strip().splitlines()[-1].startswith("finished: 3 of 3 jobs done")
    assert (pd.read_csv(tmp_path / "run/results.csv").status == "done").all()


@pytest.mark.slow
def test_torchrun_starts_a_group_again_in_which_a_process_has_died(tmp_path: Path, alone: Path) -> None:
    """The results are those of one process, digit for digit."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--standalone")
    folder = tmp_path / "run"
    command = [sys.executable, *torchrun, str(ROOT / "run_exp1b_kaggle.py"), *COMPARED]
    process = subprocess.Popen(
        [*command, "--output-dir", str(folder)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, cwd=tmp_path,
    )  # fmt: skip
    wait_for_progress(folder)
    os.kill(int(children_of(process.pid)[-1]), signal.SIGKILL)
    code, out = finish(process)
    assert code == 0, out
    assert results_without_times(folder) == results_without_times(alone)
    said = (folder / "experiment.log").read_text()
    assert "finished: 3 of 3 jobs done" in said
    assert said.count("run folder") == 2, "the kill struck a member, and the group was started again"


def test_a_worker_that_cannot_reach_the_launcher_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It returns the error, so that the launcher does not start it again, and within the time limit."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nobody listens there
        monkeypatch.setattr(exp, "CONNECT_SECONDS", 1.0)
        monkeypatch.setenv("RANK", "0")
        started = time.monotonic()
        mandate = (tmp_path, exp.Settings(), "", (), exp.detect_platform(tmp_path), None, port)
        returned = exp.worker_main(*mandate)
    assert isinstance(returned, exp.UsageError)
    assert "several workers cannot be started" in str(returned)
    assert time.monotonic() - started < 30
    assert "[worker 1] this worker stops" in capfd.readouterr().out


def test_a_job_that_ends_its_process_twice_is_failed(tmp_path: Path) -> None:
    """What a process that dies leaves is its count of attempts; the third worker to take the job marks it failed."""
    lab = open_lab(tmp_path, methods=("Direct",))
    job, store = student(lab, "Direct"), torch.distributed.HashStore()
    store.add(f"attempt/{job.name}", exp.Worker.MOST_ATTEMPTS)
    exp.Worker(lab, store, "0", alone=False, writes=False).attempt(job)
    lab.run.refresh()
    assert "it ended its process 2 times" in lab.run.records[job.name].failure


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


def test_decoupled_kd_is_its_formula(tmp_path: Path) -> None:
    """README's plugin against the definition in float64 (Zhao et al. 2022)."""
    plugin = tmp_path / "dkd_formula.py"
    plugin.write_text(plugin_text().replace('"DKD"', '"DKD-formula"'))
    known = dict(exp.METHODS)
    try:
        exp.load_plugins([plugin])
        method = exp.METHODS["DKD-formula"].__new__(exp.METHODS["DKD-formula"])
    finally:
        exp.METHODS.clear()
        exp.METHODS.update(known)
    generator = torch.Generator().manual_seed(1)
    z, t = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, temperature = torch.arange(6), 4.0
    method.temperature, method.soft_targets = temperature, torch.softmax(t / temperature, 1)
    method.experiment = type("E", (), {"images": type("I", (), {"labels": labels})})
    expected = torch.nn.functional.cross_entropy(z, labels)
    for i in range(6):
        p, q = (torch.softmax(logits[i] / temperature, 0) for logits in (t, z))
        rest = [c for c in range(10) if c != i]
        tckd = p[i] * (p[i] / q[i]).log() + (1 - p[i]) * ((1 - p[i]) / (1 - q[i])).log()
        hat_p, hat_q = p[rest] / (1 - p[i]), q[rest] / (1 - q[i])
        nckd = (hat_p * (hat_p / hat_q).log()).sum()
        expected = expected + temperature**2 * (method.ALPHA * tckd + method.BETA * nckd) / 6
    assert torch.allclose(method.loss(z, torch.arange(6)), expected)


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
