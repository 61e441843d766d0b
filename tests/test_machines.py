"""Machines unlike ours: strange host names, nohup, small or read-only mounts, file systems without locks, denied certificates."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pandas as pd
import pytest
from test_workers import OPTIONS, SCRIPT, finish, hold, start, wait_for_two_students
from toy import in_child, new_toy, resume

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]
DIRECT = [*OPTIONS, "--methods", "Direct"]


def in_namespace(script: str) -> tuple[str, ...]:
    """A prefix that runs a command after `script` in mount and host-name namespaces of its own; skips where that is not permitted."""
    space = ("unshare", "-u", "-m", "--propagation", "private", "bash", "-euc")
    if shutil.which("unshare") is None or subprocess.run([*space, script], capture_output=True).returncode:
        pytest.skip("namespaces of its own (unshare -u -m) are not permitted here")
    return (*space, f'{script}; exec "$@"', "bash")


def wait_for(folder: Path, pattern: str) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 200
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_workers_on_a_strange_machine(tmp_path: Path) -> None:
    """A host name that does not resolve, nohup and a hangup, a temporary folder of 32 kB, and /dev/shm read-only, as in many
    containers: it finishes."""
    small = tmp_path / "tmp"
    small.mkdir()
    script = f"hostname job-x.internal; mount -t tmpfs -o size=32k none {small}; export TMPDIR={small}; trap '' HUP"
    script += "; mount -t tmpfs -o ro none /dev/shm"
    folder = tmp_path / "run"
    methods = ["--methods", "Direct", "TraditionalKD", "--workers", "2"]
    with hold(folder):
        process = start(folder, *OPTIONS, *methods, prefix=in_namespace(script))
        wait_for_two_students(folder)
        process.send_signal(signal.SIGHUP)
    code, out = finish(process)
    assert code == 0, out
    assert (pd.read_csv(folder / "results.csv").status == "done").all()
    assert "2 workers" in out and "Traceback" not in out
    assert not list(small.iterdir()), "it was unmounted with its namespace"


def test_workers_that_cannot_be_started_are_one_line(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def refused(_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", refused)
    assert new_toy(toy / "run", "--workers", "2") == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "several workers cannot be started (Too many open files)" in last.replace("[Errno 24] ", "")
    assert last.endswith("or give --workers 1")


NO_DEVICE = """
import run_exp1b_kaggle as exp

@exp.register("Mine")
class Mine(exp.Direct):
    pass

def fails(device):
    raise exp.UsageError("no device works: replace them")

exp.make_experiment.__globals__["probe"] = fails  # a worker's module is a copy of its functions' globals
"""


@pytest.mark.slow
def test_several_workers_without_any_device_that_works_are_one_line(tmp_path: Path) -> None:
    """Each tries its own; the first one's reason is the run's."""
    (tmp_path / "no_device.py").write_text(NO_DEVICE)
    options = [*DIRECT, "--workers", "2", "--plugin", str(tmp_path / "no_device.py")]
    code, out = finish(start(tmp_path / "run", *options, script=SCRIPT))
    assert code == 2, out
    assert out.strip().splitlines()[-1] == "error: no device works: replace them"
    assert "started again" not in out and "Traceback" not in out


def test_without_any_temporary_folder(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """One warning; --status too goes on."""

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(exp.tempfile, "gettempdir", none)
    assert new_toy(toy / "run") == 0
    assert pd.read_csv(toy / "run/results.csv").test_accuracy.equals(
        pd.read_csv(toy_run / "results.csv").test_accuracy
    )
    assert exp.main(["--status", "--output-dir", str(toy / "run")]) == 0
    assert "Traceback" not in capsys.readouterr().out
    assert not (toy / "run/.pages").exists(), "removed with the last job"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_warnings(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    assert new_toy(toy / "run", "--workers", "2") == 0
    said = capsys.readouterr().out
    assert said.count("has no locks, which several workers need: one worker") == 1
    assert said.count("files cannot be locked") == 1
    assert "take care that only one process works on a run" in said
    assert pd.read_csv(toy / "run/results.csv").test_accuracy.equals(
        pd.read_csv(toy_run / "results.csv").test_accuracy
    )
    assert resume(toy / "run") == 0
    assert exp.main(["--join", "--output-dir", str(toy / "run")]) == 0
    assert "only the process that leads can work there" in capsys.readouterr().out


POLICY = """
import os, runpy, sys
sys.modules["filelock"] = None  # the first package that is imported: the script gets no further
try:
    runpy.run_path(sys.argv[1], run_name=sys.argv[2])
except ImportError:
    print(os.environ.get("OMP_WAIT_POLICY"))
"""


@pytest.mark.parametrize(
    ("name", "given", "used"),
    [
        ("__main__", None, "passive"),
        ("__main__", "", "passive"),
        ("__main__", "active", "active"),
        ("run_exp1b_kaggle", None, "None"),  # imported: it is the importer's own business
    ],
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    name: str, given: str | None, used: str
) -> None:
    """OpenMP reads its policy when torch is imported, so it must be set before any package is."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if given is not None:
        environment["OMP_WAIT_POLICY"] = given
    command = [sys.executable, "-c", POLICY, exp.__file__, name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == used


def test_without_flock_a_killed_process_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSYS: filelock then uses a file that names its process."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    def hold(forever: bool) -> int:
        try:
            with exp.hold_folder(tmp_path):
                (tmp_path / "held").touch()
                while forever:
                    time.sleep(1)
        except exp.UsageError as error:
            assert f"is in use by {first.pid} " in str(error)
            return 2
        return 0

    monkeypatch.setattr("fcntl.flock", refused)
    first = multiprocessing.get_context("fork").Process(target=hold, args=(True,))
    first.start()
    try:
        wait_for(tmp_path, "held")
        assert in_child(lambda: hold(False)) == 2
    finally:
        first.kill()
        first.join()
    assert in_child(lambda: hold(False)) == 0


@pytest.mark.parametrize("kaggle", [False, True])
def test_a_certificate_that_fails_is_named_and_the_remedy_fits_the_platform(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, kaggle: bool
) -> None:
    def fetch(*_: object) -> bytes:
        raise urllib.error.URLError(
            ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
        )

    monkeypatch.setattr(exp, "fetch", fetch)
    if kaggle:
        (toy / "kaggle/working").mkdir(parents=True)
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    code = exp.main(
        ["--mode", "smoke", "--dataset", "CIFAR10", "--device", "cpu", "--output-dir", str(toy / "run")],
        root=toy,
    )
    assert code == 2
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "certificate verify failed" in last
    assert "elsewhere give --data-dir DIR" in last
