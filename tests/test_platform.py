"""Kaggle and elsewhere: what is detected, where things go, what importing does (nothing), and consoles of every kind."""

from __future__ import annotations

import ast
import contextlib
import errno
import importlib.util
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results_without_times
from toy import TOY, new_toy, stopped_at_once, tree

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]


# ---- Importing -------------------------------------------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    """What a well-behaved import leaves alone."""
    plots = sys.modules.get("matplotlib")
    return {
        "handlers": {
            number: signal.getsignal(number) for number in signal.valid_signals() if number not in (9, 19)
        },
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "logging": (list(logging.getLogger().handlers), logging.getLogger().level),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "style": dict(plots.rcParams) if plots else {},
        "folder": os.getcwd(),
        "argv": list(sys.argv),
    }


def test_importing_has_no_side_effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No files, no handlers, no threads, no use of the GPU, no output, nothing in the global state of a library."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    before = process_state()
    spec = importlib.util.spec_from_file_location("imported_again", exp.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported_again", module)
    spec.loader.exec_module(module)
    assert process_state() == before
    assert sys.stdout.getvalue() == ""
    assert list(tmp_path.iterdir()) == []
    assert not torch.cuda.is_initialized()
    assert module.parse_args([]).given == {"plugin": ()}


def test_an_older_python_is_told_what_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """One line; and there is no syntax in the file that an older Python would stumble over before it says so."""
    source = Path(exp.__file__).read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(sys, "version", "3.10.4 (main)")
    with pytest.raises(SystemExit) as stop:
        exec(compile(source, "run_exp1b_kaggle.py", "exec"), {"__name__": "__main__"})
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: run_exp1b_kaggle.py needs Python 3.11 or later, this is 3.10.4\n"


def test_pasted_into_a_cell_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """There `__file__` is unknown and the arguments are the kernel's: one line, and nothing is started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/root/.local/kernel-1.json"])
    source = Path(exp.__file__).read_text(encoding="utf-8")
    exec(compile(source, "<ipython-input-1>", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "%%writefile" in out and "--mode smoke" in out
    assert list(tmp_path.iterdir()) == []


def test_a_script_that_is_read_from_stdin_has_no_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python - < run_exp1b_kaggle.py`: there `__file__` is no file."""
    assert len(exp.script_sha256.__wrapped__()) == 64
    monkeypatch.setattr(exp, "__file__", "<stdin>")
    assert exp.script_sha256.__wrapped__() == ""


def test_main_works_in_a_thread(toy: Path, toy_run: Path) -> None:
    """Where Python lets nobody set signal handlers."""
    handlers, codes = process_state()["handlers"], []
    thread = threading.Thread(target=lambda: codes.append(new_toy(toy / "run")))
    thread.start()
    thread.join()
    assert codes == [0]
    assert results_without_times(toy / "run") == results_without_times(toy_run)
    assert process_state()["handlers"] == handlers


# ---- The user's environment ------------------------------------------------------------------------------------------

STRANGE = {
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONIOENCODING": "ascii",
    "COLUMNS": "nonsense",
    "LC_ALL": "nonsense",
}


def test_strange_variables_and_settings_change_nothing(toy_run: Path, tmp_path: Path) -> None:
    """A notebook's plotting backend that this Python lacks, a matplotlibrc that is none."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe nonsense : : :")
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib_inline'] = None\n")
    environment = {**os.environ, **STRANGE, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, exp.__file__, "--status", "--output-dir", str(toy_run)]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\n0 of 7 jobs done" in ended.stdout, (
        "none of the toy's networks, which this process does not know"
    )


def test_ctrl_c_while_packages_are_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "filelock.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, exp.__file__, "--status"], env=environment, capture_output=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


# ---- Where we are ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("run_type", "size", "bars"),
    [
        ("Batch", None, False), ("Interactive", None, True), ("", None, False), ("", (80, 24), True),
        ("", (80, 0), False),
    ],
)  # fmt: skip
def test_bars_only_where_somebody_watches(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, run_type: str, size: tuple[int, int] | None, bars: bool
) -> None:
    """A bar in a batch log writes a line per refresh; in a terminal of no size it would not be seen."""

    def terminal_size(_: int) -> os.terminal_size:
        if size is None:
            raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")
        return os.terminal_size(size)

    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", terminal_size)
    assert exp.detect_platform(kaggle).watched == bars


def test_run_folders_are_made_in_the_working_folder(kaggle: Path, toy_run: Path) -> None:
    """And teacher outputs are not: they may be lost, and would count against the 20 GB."""
    assert exp.main(TOY, root=kaggle) == 0
    (folder,) = (kaggle / "kaggle/working").iterdir()
    assert folder.name.startswith("exp1b_smoke_2")
    assert results_without_times(folder) == results_without_times(toy_run)
    assert not list((kaggle / "kaggle").rglob("page_*"))


def test_elsewhere_they_are_made_here(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp, "work", stopped_at_once)
    assert exp.main(TOY) == 0
    (folder,) = toy.glob("exp1b_smoke_*")
    assert exp.re.fullmatch(r"exp1b_smoke_\d{8}_\d{6}", folder.name)


def test_a_session_is_as_old_as_process_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start is in ticks since boot, behind a command name that may hold spaces and brackets."""
    ticks = os.sysconf("SC_CLK_TCK")
    files = {
        "/proc/1/stat": f"1 (a ) b) S {'0 ' * 18}{100 * ticks} 5 6",
        "/proc/uptime": "4000.5 9.0",
    }
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert exp.session_age_seconds() == pytest.approx(3900.5)
    for uptime, age in (
        ("43299.5 9.0", 43199.5),
        ("43301.0 9.0", 0),
        ("99.0 9.0", 0),
    ):  # 12 hours, the host's, before its start
        files["/proc/uptime"] = uptime
        assert exp.session_age_seconds() == pytest.approx(age)
    files["/proc/1/stat"] = "nonsense"
    assert exp.session_age_seconds() == 0


def test_the_real_session_age_is_a_time() -> None:
    assert 0 <= exp.session_age_seconds() <= 12 * 3600


@pytest.mark.parametrize(("hours", "margin"), [(1.0, 72.0), (11.5, 120.0)])
@pytest.mark.parametrize("on_kaggle", [False, True])
def test_a_length_that_is_given_counts_from_now_and_leaves_time_for_the_report(
    kaggle: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, hours: float, margin: float, on_kaggle: bool
) -> None:
    seen: list[float | None] = []
    root = kaggle if on_kaggle else kaggle / "elsewhere"
    monkeypatch.setattr(exp, "session_age_seconds", lambda: 7200.0)
    monkeypatch.setattr(exp.time, "time", lambda: 1e9)

    def work(experiment: exp.Experiment, *_: object) -> None:
        seen.append(experiment.session.deadline)
        raise exp.Stopped("session clock")

    monkeypatch.setattr(exp, "work", work)
    assert exp.main([*TOY, "--output-dir", str(toy / "run"), "--max-hours", str(hours)], root=root) == 0
    assert seen == [pytest.approx(1e9 + 3600 * hours - margin)]


def test_kaggle_has_a_deadline_by_default(kaggle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float | None] = []
    monkeypatch.setattr(exp.time, "time", lambda: 1e9)
    monkeypatch.setattr(exp, "session_age_seconds", lambda: 600.0)

    def work(experiment: exp.Experiment, *_: object) -> None:
        seen.append(experiment.session.deadline)
        raise exp.Stopped("session clock")

    monkeypatch.setattr(exp, "work", work)
    assert exp.main([*TOY, "--output-dir", str(kaggle / "kaggle/working/run")], root=kaggle) == 0
    assert seen == [pytest.approx(1e9 - 600 + 11.5 * 3600 - 120)]
    assert exp.main([*TOY, "--output-dir", str(kaggle / "run")], root=kaggle / "elsewhere") == 0
    assert seen[1] is None


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


@pytest.mark.parametrize("options", [["--mode", "smoke"], ["--mode", "quick", "--device", "cpu"]])
def test_unless_it_is_meant(kaggle: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(exp, "work", stopped_at_once)
    assert (
        exp.main([*options, "--dataset", "CIFAR10", "--train-size", "300", "--threads", "1"], root=kaggle)
        == 0
    )


# ---- Logs ------------------------------------------------------------------------------------------------------------


def test_secrets_in_the_environment_are_not_written(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Kaggle's variables hold live tokens."""
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "t0ken-that-nobody-may-see")
    monkeypatch.setattr(exp, "work", stopped_at_once)
    assert new_toy(toy / "run") == 0
    written = b"".join(path.read_bytes() for path in (toy / "run").rglob("*") if path.is_file())
    assert b"t0ken" not in written + capsys.readouterr().out.encode()


class Gone(io.StringIO):
    """A console whose other end has been closed."""

    encoding = "utf-8"

    def write(self, _: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_console_that_is_gone_stops_nothing(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost connection, or `| head`: the log file has everything."""
    monkeypatch.setattr(sys, "stdout", Gone())
    assert new_toy(toy / "run") == 0
    assert results_without_times(toy / "run") == results_without_times(toy_run)
    assert "finished: 7 of 7" in (toy / "run/experiment.log").read_text()


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


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "x" * 300])
def test_an_impossible_output_folder_is_one_line(toy: Path, place: str, capsys: Capture) -> None:
    (toy / "file").write_text("")
    before = tree(toy)
    assert new_toy(toy / place) == 2
    out = capsys.readouterr().out
    assert out.startswith("error: ")
    assert out.count("\n") == 1
    assert tree(toy) == before


def test_a_temporary_folder_that_cannot_be_used_costs_one_warning(
    toy: Path, toy_run: Path, capsys: Capture
) -> None:
    """Pages are only a cache: they go into the run folder, and are gone at the end."""
    folder = exp.PageStore(toy).places[0]
    folder.rmdir()
    folder.write_text("a file where the folder should be")
    exp.warn_once.cache_clear()
    assert new_toy(toy / "run") == 0
    assert capsys.readouterr().out.count("teacher outputs are kept in the run folder") == 1
    assert results_without_times(toy / "run") == results_without_times(toy_run)
    assert list((toy / "run").rglob("page_*")) == []


# ---- Which folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are opened and closed, but train nothing."""
    monkeypatch.setattr(exp, "work", stopped_at_once)


@pytest.mark.usefixtures("untrained")
def test_two_starts_in_one_second_make_two_runs(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(exp.datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 1, 2, 3, 4, 5, tzinfo=tz)

    monkeypatch.setattr(exp.datetime, "datetime", Clock)
    assert [exp.main(TOY) for _ in range(3)] == [0, 0, 0]
    names = [f"exp1b_smoke_20260102_030405{more}" for more in ("", "_2", "_3")]
    assert sorted(path.name for path in toy.glob("exp1b_smoke_*")) == names
    assert all(exp.is_run(toy / name) for name in names)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", ["thesis.txt", ".git/config", "checkpoints.old/a"])
def test_a_folder_that_holds_other_things_is_no_output_folder(toy: Path, name: str, capsys: Capture) -> None:
    """What is in it would be mixed with the run's files, and shared with them."""
    (toy / "mine" / name).parent.mkdir(parents=True)
    (toy / "mine" / name).write_text("precious")
    before = tree(toy)
    assert new_toy(toy / "mine") == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"holds other files ({name.split('/')[0]})" in said
    assert tree(toy) == before


@pytest.mark.usefixtures("untrained")
def test_an_empty_folder_and_what_a_killed_start_left_are_output_folders(toy: Path) -> None:
    (toy / "empty").mkdir()
    (toy / "left/checkpoints").mkdir(parents=True)
    (toy / "left/data").mkdir()
    (toy / "left/experiment.log").write_text("an earlier start\n")
    assert [new_toy(toy / name) for name in ("empty", "left")] == [0, 0]


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("form", [["--output-dir=~/a run"], ["--output-dir", "~/a run"]])
def test_the_home_folder_is_meant_by_a_tilde(
    toy: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    """A shell expands it only at the beginning of a word."""
    monkeypatch.setenv("HOME", str(toy / "home"))
    assert exp.main([*TOY, *form]) == 0
    assert exp.is_run(toy / "home/a run")
    assert not (toy / "~").exists()


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("folder", ["a", ".hidden", ".exp1b_x"])
def test_a_hidden_folder_above_hides_no_run(toy: Path, toy_run: Path, folder: str) -> None:
    """Only a run folder whose own name begins with a dot is none: a copy that is not complete."""
    place = toy / folder if folder.startswith(".exp1b") else toy / folder / "exp1b_earlier"
    shutil.copytree(toy_run, place)
    os.chdir(place.parent)
    assert exp.main([*TOY, "--output-dir", "new"]) == 0
    assert bool(exp.load_index(place.parent / "new", {}).jobs) == (not folder.startswith(".exp1b"))


@pytest.mark.usefixtures("untrained")
def test_runs_are_looked_for_beside_a_new_one_and_not_below(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start in a home folder does not read all of it; a sibling of --output-dir shares its teacher."""
    shutil.copytree(toy_run, toy / "deep/below/exp1b_earlier")
    monkeypatch.setattr(exp.os, "walk", lambda *_, **__: pytest.fail("walked"))
    assert exp.main(["--status"]) == 2
    assert new_toy(toy / "new") == 0
    assert exp.load_index(toy / "new", {}).jobs == {}
    assert new_toy(toy / "deep/below/new") == 0
    assert len(exp.load_index(toy / "deep/below/new", {}).jobs) == 4


@pytest.mark.parametrize("action", [["--status"], ["--plan"], ["--help"]])
def test_what_is_printed_needs_no_letter_that_the_console_lacks(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, action: list[str]
) -> None:
    folder = toy / "é\udcff"
    shutil.copytree(toy_run, folder)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with contextlib.suppress(SystemExit):
        assert exp.main([*action, "--resume", "--output-dir", str(folder)]) == 0
    assert action != ["--status"] or b"\\xe9\\udcff\n" in raw.getvalue()


# ---- The same command again ------------------------------------------------------------------------------------------


def runs_of(folder: Path) -> list[str]:
    """Runs that are there, each with how many sessions it has had and its ratios."""
    found = {path.name: exp.load_index(path, {}) for path in exp.runs_in([folder])}
    return [f"{len(i.sessions)} {' '.join(i.settings.compression)} {i.settings.lr}" for i in found.values()]


@pytest.mark.usefixtures("untrained")
def test_resume_auto_starts_or_continues(toy: Path, capsys: Capture) -> None:
    """What a scheduler repeats; --resume alone stays strict. Other settings are another run; the scope grows."""
    auto = [*TOY, "--resume", "auto"]
    assert exp.main([*TOY, "--resume"]) == 2
    assert [exp.main(auto), exp.main(auto)] == [0, 0]
    assert capsys.readouterr().out.count("there is no run with these settings yet: a new one starts") == 1
    assert runs_of(toy) == ["2 5x 0.05"]
    assert exp.main([*auto, "--lr", "0.06"]) == 0
    assert sorted(runs_of(toy)) == ["1 5x 0.06", "2 5x 0.05"]
    assert exp.main([*auto, "--compression", "2.3x"]) == 0
    assert sorted(runs_of(toy)) == ["1 5x 0.06", "3 2.3x 5x 0.05"]
    assert exp.main([*TOY, "--resume", "auto", "--precision", "auto"]) == 0
    assert len(runs_of(toy)) == 3, "a run whose precision was asked for is not one that leaves it open"


@pytest.mark.usefixtures("untrained")
def test_resume_auto_in_a_named_folder(toy: Path, capsys: Capture) -> None:
    """That folder is used: it starts there, continues there, and is refused with the list of differences."""
    auto = ["--resume", "auto"]
    assert [new_toy(toy / "run", *auto) for _ in range(2)] == [0, 0]
    assert runs_of(toy) == ["2 5x 0.05"]
    before = tree(toy / "run/checkpoints")
    assert new_toy(toy / "run", *auto, "--lr", "0.06") == 2
    assert "--lr: the run has 0.05, you gave 0.06" in capsys.readouterr().out.splitlines()[-1]
    assert tree(toy / "run/checkpoints") == before
    (toy / "mine").mkdir()
    (toy / "mine/thesis.txt").write_text("precious")
    assert new_toy(toy / "mine", *auto) == 2
    assert "holds other files (thesis.txt)" in capsys.readouterr().out
    assert [new_toy(toy / "other", *auto, "--lr", "0.06"), new_toy(toy / "other", *auto)] == [0, 2]
    assert "--lr: the run has 0.06, you gave" in capsys.readouterr().out, "also where it is not given"


@pytest.mark.usefixtures("untrained")
def test_resume_auto_of_an_attached_run(kaggle: Path, toy_run: Path) -> None:
    """Save & Run All: the first version starts, the next one continues what is attached, in its own folder."""
    shutil.copytree(toy_run, kaggle / "kaggle/input/me/v1" / toy_run.name)
    assert exp.main([*TOY, "--resume", "auto"], root=kaggle) == 0
    assert [path.name for path in (kaggle / "kaggle/working").iterdir()] == [toy_run.name]
    assert exp.main(["--plan", *TOY, "--resume", "auto"], root=kaggle) == 0


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("known", [True, False])
def test_an_extension_is_declared_whatever_the_index_knew(toy: Path, toy_run: Path, known: bool) -> None:
    """The results that are there have been seen, also where an older index does not name them."""
    shutil.copytree(toy_run, toy / "run")
    index = exp.load_index(toy / "run", {})
    if not known:
        index.jobs = {}
    exp.save_plain(toy / "run/checkpoints" / exp.STATE_NAME, exp.to_plain(index))
    assert exp.main(["--resume", "--runs", "2", "--device", "cpu", "--output-dir", str(toy / "run")]) == 0
    assert exp.load_index(toy / "run", {}).sessions[-1].extended == "runs from 1 to 2"


# ---- Room ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "counted"), [(10**9, False), (10**3, True), (0, True)])
def test_pages_that_fall_into_the_run_folder_are_counted(
    kaggle: Path, monkeypatch: pytest.MonkeyPatch, space: int, counted: bool, capsys: Capture
) -> None:
    """Where the temporary folder has no room, or there is none, they count against Kaggle's limit."""
    monkeypatch.setattr(exp, "KAGGLE_DISK_BYTES", 6_000_000)
    monkeypatch.setattr(exp, "disk_bytes", lambda *_: 5_000_000)
    monkeypatch.setattr(exp, "page_bytes", lambda *_: 2_000_000)
    monkeypatch.setattr(exp, "work", stopped_at_once)
    monkeypatch.setattr(exp.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(space, 0, space))
    if space == 0:
        folder = exp.PageStore(kaggle).places[0]
        folder.rmdir()
        folder.write_text("a file where the folder should be")
    assert exp.main(TOY, root=kaggle) == (2 if counted else 0)
    assert ("this run needs about 7 MB" in capsys.readouterr().out) == counted


def test_an_unfinished_copy_in_an_input_is_no_run(kaggle: Path, toy_run: Path, capsys: Capture) -> None:
    """A session that was killed while it copied left `.<run>.partial` in its output."""
    shutil.copytree(toy_run, kaggle / f"kaggle/input/me/.{toy_run.name}.partial")
    assert exp.main(["--status"], root=kaggle) == 2
    assert "found no run in" in capsys.readouterr().out
