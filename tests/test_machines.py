"""Machines unlike ours: no temporary folder, file systems without locks, denied certificates."""

from __future__ import annotations

import errno
import os
import ssl
import urllib.error
from pathlib import Path

import pandas as pd
import pytest
from toy import new_toy, resume

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]


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
    assert new_toy(toy / "run") == 0
    said = capsys.readouterr().out
    assert said.count("cannot be locked") == 1
    assert "take care that only one process works on it" in said
    assert said.count("going on without") <= 1
    assert pd.read_csv(toy / "run/results.csv").test_accuracy.equals(
        pd.read_csv(toy_run / "results.csv").test_accuracy
    )
    assert resume(toy / "run") == 0


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
