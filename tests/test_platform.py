"""Kaggle and elsewhere: what is detected, where things go, what importing does (nothing), and consoles of every kind."""

from __future__ import annotations

import io
import logging
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results_without_times
from toy import TOY

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]


# ---- Importing -------------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    """What a well-behaved import leaves alone."""
    return {
        "handlers": {
            number: signal.getsignal(number) for number in signal.valid_signals() if number not in (9, 19)
        },
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "logging": (list(logging.getLogger().handlers), logging.getLogger().level),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "style": dict(exp.matplotlib.rcParams),
        "folder": os.getcwd(),
        "argv": list(sys.argv),
    }


# ---- Where we are ----------------------------------------------------------------------------------------------------


@pytest.fixture
def kaggle(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Kaggle batch session: its root."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    (tmp_path / "kaggle/working").mkdir(parents=True)
    (tmp_path / "kaggle/input").mkdir()
    return tmp_path


def test_kaggle_is_its_run_type_and_its_folder(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, toy: Path
) -> None:
    found = exp.detect_platform(kaggle)
    assert found.kaggle
    assert found.output_root == kaggle / "kaggle/working"
    assert found.inputs == (kaggle / "kaggle/input",)
    assert not exp.detect_platform(kaggle / "elsewhere").kaggle, "the variable alone is not enough"
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    here = exp.detect_platform(kaggle)
    assert (here.kaggle, here.output_root, here.inputs) == (False, toy, ()), "the folder alone is not enough"


def test_run_folders_are_made_in_the_working_folder(kaggle: Path, toy_run: Path) -> None:
    """And teacher outputs are not: they may be lost, and would count against the 20 GB."""
    assert exp.main(TOY, root=kaggle) == 0
    (folder,) = (kaggle / "kaggle/working").iterdir()
    assert folder.name.startswith("exp1b_smoke_2")
    assert results_without_times(folder) == results_without_times(toy_run)
    assert not list((kaggle / "kaggle").rglob("page_*"))


def test_the_real_session_age_is_a_time() -> None:
    assert 0 <= exp.session_age_seconds() <= 12 * 3600


# ---- No GPU on Kaggle ------------------------------------------------------------------------------------------------


def test_a_kaggle_session_without_gpu_stops_with_the_remedy(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It would silently burn twelve hours. Before anything is downloaded or written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(exp, "load_data", lambda *_: pytest.fail("loaded data"))
    assert exp.main(["--mode", "quick"], root=kaggle) == 2
    assert "choose Settings > Accelerator > GPU T4 x2" in capsys.readouterr().out
    assert list((kaggle / "kaggle/working").iterdir()) == []


# ---- Logs ------------------------------------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A console whose other end has been closed."""

    encoding = "utf-8"

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_console_that_lacks_a_letter(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be shown is shown escaped, also the bytes of a name that is no text at all."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert exp.main(["--resume", "--output-dir", str(toy / "é\udcff")]) == 2
    assert b"\\xe9\\udcff holds no run" in raw.getvalue()


def test_a_log_that_cannot_be_written_any_more_stops_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    exp.start_logging(toy / "experiment.log")
    exp.log.info("one")
    (handler,) = (h for h in exp.log.handlers if isinstance(h, logging.FileHandler))

    def no_room(_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handler.stream, "write", no_room)
    exp.log.info("two")
    monkeypatch.undo()
    exp.log.info("three")
    exp.start_logging(None)
    assert [line.split()[-1] for line in (toy / "experiment.log").read_text().splitlines()] == [
        "one",
        "three",
    ]
    assert capsys.readouterr().out.split() == ["one", "two", "three"]


def test_the_log_is_appended_to(toy: Path, toy_run: Path) -> None:
    shutil.copytree(toy_run, toy / "run")
    before = (toy / "run/experiment.log").read_text()
    assert exp.main(["--report-only", "--output-dir", str(toy / "run")]) == 0
    after = (toy / "run/experiment.log").read_text()
    assert after.startswith(before)
    assert len(after) > len(before)


# ---- Where nothing can be written ------------------------------------------------------------------------------------
