"""Continuing a run: which one, with which settings, from where, and what is left alone."""

from __future__ import annotations

import os
import shutil
import signal
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import results_without_times
from toy import (
    AGAIN,
    ASSISTANT,
    DIRECT,
    HPMKD,
    JOBS,
    KD,
    PILOT,
    SECOND_ASSISTANT,
    TEACHER,
    TOY,
    epochs_in_log,
    in_child,
    new_toy,
    resume,
    stopped_at_once,
    struck,
    tree,
)

import run_exp1b_kaggle as exp

Capture = pytest.CaptureFixture[str]


def last_line(capsys: Capture) -> str:
    """The last line that was printed."""
    return capsys.readouterr().out.strip().splitlines()[-1]


def index_of(folder: Path) -> exp.Index:
    """The index of a run, read only."""
    return exp.load_index(folder, {})


@pytest.fixture
def copied(toy: Path, toy_run: Path) -> Path:
    """A copy of a finished toy in the working folder."""
    shutil.copytree(toy_run, toy / toy_run.name)
    return toy / toy_run.name


def edit_index(folder: Path, **changes: Any) -> None:
    """Alter a run's index; a change of its settings gets the fingerprint that belongs to it."""
    index = exp.replace(index_of(folder), **changes)
    fingerprint = exp.run_fingerprint(index.settings, index.precision, index.data.sha256)
    exp.save_plain(
        folder / "checkpoints" / exp.STATE_NAME, exp.to_plain(exp.replace(index, fingerprint=fingerprint))
    )


# ---- Settings ------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_with_every_difference(copied: Path, capsys: Capture) -> None:
    before = tree(copied / "checkpoints")
    options = ["--lr", "0.2", "--batch-size", "64", "--teacher-epochs", "3", "--seed", "1"]
    assert resume(copied, *options, "--precision", "auto") == 2
    line = last_line(capsys)
    assert "--lr: the run has 0.05, you gave 0.2" in line
    assert "--batch-size: the run has 90, you gave 64" in line
    assert "--seed: the run has 42, you gave 1" in line
    assert "teacher-epochs" not in line
    assert "precision" not in line
    assert tree(copied / "checkpoints") == before


@pytest.mark.parametrize("name", exp.setting_names("experiment"))
def test_every_setting_of_the_experiment_is_fixed(name: str) -> None:
    """One difference is enough, also beside --precision auto, which asks for nothing."""
    stored = exp.new_settings({})
    value = getattr(stored, name)
    others = {
        "mode": "full",
        "dataset": "CIFAR100",
        "train_size": 1000,
        "precision": "fp32",
        "deterministic": True,
    }
    other = others.get(name, (value or 0) * 2)
    for more in ({}, {"precision": "auto"} if name != "precision" else {}):
        with pytest.raises(exp.UsageError, match=exp.flag(name)):
            exp.extended_settings(stored, {name: other, **more})
    assert exp.extended_settings(stored, {name: value}) == stored


def test_scope_grows_and_never_shrinks() -> None:
    stored = exp.new_settings({"compression": ("5x",), "methods": ("Direct", "HPM-KD"), "runs": 3})
    more = {"compression": ("2.3x",), "methods": ("TraditionalKD",), "runs": 5, "ablation": True}
    grown = exp.extended_settings(stored, more)
    assert (grown.compression, grown.runs, grown.ablation) == (("2.3x", "5x"), 5, True)
    assert grown.methods == ("Direct", "TraditionalKD", "HPM-KD")
    less = {"compression": ("5x",), "methods": ("Direct",), "runs": 1, "ablation": False}
    assert exp.extended_settings(grown, less) == grown


def test_session_settings_are_replaced_and_not_stored(tmp_path: Path) -> None:
    stored = exp.new_settings({"workers": 2, "device": "cpu", "max_hours": 3.0})
    read = exp.from_plain(exp.Settings, exp.to_plain(stored))
    assert (read.workers, read.device, read.max_hours) == (None, "auto", None)
    continued = exp.extended_settings(read, {"workers": 4, "output_dir": tmp_path})
    assert (continued.workers, continued.output_dir) == (4, tmp_path)


def test_an_extended_run_is_the_run_that_was_larger_from_the_start(toy: Path) -> None:
    """Ratio, method and runs added by three resumes: digit for digit the results of asking for everything at once."""
    short = ["--teacher-epochs", "1", "--student-epochs", "1", "--fresh-teacher"]
    assert new_toy(toy / "grown", "--compression", "5x", "--methods", "Direct", *short) == 0
    assert resume(toy / "grown", "--methods", "HPM-KD") == 0
    assert resume(toy / "grown", "--compression", "2.3x") == 0
    assert resume(toy / "grown", "--runs", "2") == 0
    at_once = ["--compression", "2.3x", "5x", "--methods", "Direct", "HPM-KD", "--runs", "2"]
    assert new_toy(toy / "at_once", *at_once, *short) == 0
    assert results_without_times(toy / "grown") == results_without_times(toy / "at_once")
    epochs = epochs_in_log(toy / "grown")
    assert len(epochs) == len(set(epochs)), "something was trained twice"
    assert "runs from 1 to 2" in index_of(toy / "grown").sessions[-1].extended


def test_an_interrupted_equal_cost_run_that_is_extended_keeps_its_progress(toy: Path) -> None:
    """The epochs of its arm were fixed when it was planned; nothing sound is set aside."""
    equal = "Direct-equal-cost"
    options = ["--teacher-epochs", "1", "--student-epochs", "1", "--equal-cost", "--fresh-teacher"]
    epoch = exp.Training._epoch

    def stop_in_arm(training: exp.Training, number: int) -> None:
        if equal in training.name and number == 1:
            raise exp.Stopped("session clock")
        epoch(training, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp.Training, "_epoch", stop_in_arm)
        assert new_toy(toy / "run", *options) == 0
    planned = index_of(toy / "run").equal_cost_epochs
    (progress,) = (toy / "run/checkpoints").glob(f"*{equal}*.progress")
    assert planned["5x"] > 1

    assert resume(toy / "run", "--runs", "2") == 0
    assert index_of(toy / "run").equal_cost_epochs == planned
    assert not list((toy / "run").rglob("*.corrupt"))
    epochs = epochs_in_log(toy / "run")
    assert epochs.count(f"{progress.stem} epoch 1") == 1, "its first epoch was not lost"
    lengths = [sum(line.startswith(f"student_5x_{equal}_run{run} ") for line in epochs) for run in (1, 2)]
    assert lengths == [planned["5x"]] * 2


def test_a_reader_is_told_when_bit_equality_is_over(copied: Path, redone: list[str], capsys: Capture) -> None:
    """Another torch, device, thread count or processor: the run goes on, and report and log say what it costs."""
    before = index_of(copied).sessions[-1]
    other = {"devices": ["another GPU"], "threads": 64, "processor": "another"}
    changed = exp.replace(before, versions={**before.versions, "torch": "1.0"}, **other)
    edit_index(copied, sessions=[changed])
    assert resume(copied) == 0
    out, report = capsys.readouterr().out, (copied / "experiment_report.md").read_text()
    for text in (out, report):
        assert "bit-equality is no longer promised" in text
        assert f"torch 1.0 -> {exp.versions()['torch']}" in text
        assert "threads 64 -> 1" in text
        assert "devices ['another GPU'] -> " in text
        assert "processor another -> " in text
    assert resume(copied) == 0
    report = (copied / "experiment_report.md").read_text()
    assert report.count("bit-equality") == 1, "an equal session adds nothing"


def test_more_threads_on_resume_are_noted(copied: Path, redone: list[str]) -> None:
    assert exp.main(["--resume", "--device", "cpu", "--threads", "2", "--output-dir", str(copied)]) == 0
    assert "threads 1 -> 2" in (copied / "experiment_report.md").read_text()


# ---- Which run -----------------------------------------------------------------------------------------------


def test_nothing_to_resume_says_what_was_searched(kaggle: Path, capsys: Capture) -> None:
    for action in ("--resume", "--status", "--report-only"):
        assert exp.main([action, "--mode", "full", "--dataset", "CIFAR100"], root=kaggle) == 2
        line = last_line(capsys)
        assert "found no full CIFAR100 run in" in line
        assert str(kaggle / "kaggle/working") in line
        assert str(kaggle / "kaggle/input") in line
    assert list((kaggle / "kaggle/working").iterdir()) == []


def test_an_output_dir_without_a_run_is_said(toy: Path, capsys: Capture) -> None:
    assert resume(toy / "nothing") == 2
    assert "nothing holds no run to continue" in last_line(capsys)
    assert not (toy / "nothing").exists()


def started(folder: Path, moment: str, **settings: Any) -> None:
    """Let a run's last session have started at another time, with other settings."""
    index = index_of(folder)
    edit_index(
        folder,
        created="1999",
        sessions=[exp.replace(index.sessions[-1], started=moment)],
        settings=exp.replace(index.settings, **settings),
    )


def test_of_several_runs_the_last_active_one_that_matches_is_used(
    copied: Path, toy: Path, capsys: Capture
) -> None:
    """By what the index says, not by the files' times; --mode and --dataset narrow the choice."""
    newest, other = toy / "newest", toy / "other"
    for folder in (newest, other):
        shutil.copytree(copied, folder)
    started(newest, "2998-01-01T00:00:00+00:00")
    started(other, "2999-01-01T00:00:00+00:00", mode="full")
    os.utime(copied / "checkpoints" / exp.STATE_NAME)
    assert exp.main(["--status", "--mode", "smoke"]) == 0
    out = capsys.readouterr().out
    assert f"2 runs match; the newest is used: {newest}" in out
    assert f"\n{newest}\nsmoke, CIFAR10, " in out
    assert exp.main(["--status", "--mode", "full"]) == 0
    assert f"{other}\nfull, CIFAR10, " in capsys.readouterr().out
    assert exp.main(["--status", "--mode", "quick"]) == 2


def test_a_run_that_cannot_be_used_is_named_and_passed_over(copied: Path, toy: Path, capsys: Capture) -> None:
    shutil.copytree(copied, toy / "newer_format")
    exp.save_plain(toy / "newer_format/checkpoints" / exp.STATE_NAME, {"format": 9, "version": "9.1"})
    assert exp.main(["--status"]) == 0
    out = capsys.readouterr().out
    assert f"not considered: {toy / 'newer_format'}: the run was written by version 9.1" in out
    assert f"{copied}\nsmoke, CIFAR10, " in out


@pytest.mark.parametrize("command", [["--resume"], ["--mode", "smoke", "--resume"], ["--status"]])
def test_an_older_run_does_not_take_the_place_of_the_newest(
    copied: Path, toy: Path, capsys: Capture, command: list[str]
) -> None:
    shutil.copytree(copied, toy / "newest")
    started(toy / "newest", "2999-01-01T00:00:00+00:00")
    edit_index(toy / "newest", plugins={"mine.py": "0"})
    assert exp.main(command) == 2
    assert "the newest run cannot be used" in last_line(capsys)


PLUGIN = """
import run_exp1b_kaggle as exp

@exp.register("Mine")
class Mine(exp.Direct):
    pass
"""


@pytest.mark.usefixtures("untrained")
def test_a_plugin_that_is_not_used_binds_no_run(toy: Path, capsys: Capture) -> None:
    """Edited later, or left out, it would refuse the run for nothing."""
    (toy / "mine.py").write_text(PLUGIN)
    methods = dict(exp.METHODS)
    try:
        assert new_toy(toy / "run", "--fresh-teacher", "--plugin", "mine.py") == 0
        assert "--methods names none of them" in capsys.readouterr().out
        assert index_of(toy / "run").plugins == {}
        assert resume(toy / "run", "--plugin", "mine.py", "--methods", "Direct", "Mine") == 0
        assert exp.load_plain(toy / "run/checkpoints" / exp.STATE_NAME)["plugins"].keys() == {"mine.py"}
    finally:
        exp.METHODS.clear()
        exp.METHODS.update(methods)


def test_a_new_run_over_an_existing_one_is_refused(copied: Path, capsys: Capture) -> None:
    before = tree(copied)
    assert new_toy(copied) == 2
    assert "holds a run already: add --resume" in last_line(capsys)
    assert tree(copied) == before


@pytest.mark.parametrize("left", [f"{TEACHER}.progress", f"{DIRECT}.pt", exp.STATE_NAME])
def test_what_counts_as_a_run(toy: Path, left: str, capsys: Capture) -> None:
    """Whatever is left of one, a new run is refused there."""
    exp.make_run_folder(toy / "run")
    (toy / "run/checkpoints" / left).write_bytes(b"")
    assert new_toy(toy / "run") == 2
    assert "holds a run already" in last_line(capsys)


def test_a_run_killed_in_its_very_first_epoch_can_be_continued(toy: Path, toy_run: Path) -> None:
    """The index is there before the first epoch, so that --resume alone finds the run."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with struck("an epoch", 1, kill), pytest.raises(Killed):
        exp.main(TOY)
    (folder,) = toy.glob("exp1b_smoke_*")
    assert exp.main(["--status"]) == 0
    assert exp.main(AGAIN) == 0
    assert results_without_times(folder) == results_without_times(toy_run)


# ---- Input mounts --------------------------------------------------------------------------------------------

LAYOUTS = [
    "earlier", "notebooks/someone/earlier", "notebooks/someone/earlier/version 3/output",
    "datasets/someone/results/archive", "my results/exp1b_full.zip", "Ünïcode überall/目录",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_read_only_input_is_copied_and_left_alone(
    kaggle: Path, toy_run: Path, redone: list[str], layout: str, capsys: Capture
) -> None:
    """Wherever Kaggle mounts it. Every byte, mode and time of the input stays; the copy can be written; the rest is done."""
    source = kaggle / "kaggle/input" / layout / toy_run.name
    shutil.copytree(toy_run, source)
    for name in (f"{HPMKD}.pt", f"{KD}.pt"):
        (source / "checkpoints" / name).unlink()
    for path in (source, *source.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(kaggle / "kaggle/input")
    assert exp.main(AGAIN, root=kaggle) == 0
    target = kaggle / "kaggle/working" / toy_run.name
    assert f"copying the run {source} to {target}" in capsys.readouterr().out
    assert tree(kaggle / "kaggle/input") == before
    assert sorted(redone) == sorted([HPMKD, KD])
    assert results_without_times(target) == results_without_times(toy_run)
    assert all(path.stat().st_mode & 0o200 for path in target.rglob("*"))
    assert all(path.stat().st_mode & 0o700 == 0o700 for path in target.rglob("*") if path.is_dir())


def test_a_run_of_the_output_folder_comes_before_inputs(kaggle: Path, toy_run: Path, capsys: Capture) -> None:
    for place in ("input/earlier/run_a", "working/run_b"):
        shutil.copytree(toy_run, kaggle / "kaggle" / place)
    assert exp.main(["--status"], root=kaggle) == 0
    assert f"{kaggle / 'kaggle/working/run_b'}\n" in capsys.readouterr().out


def test_of_several_inputs_the_newest_is_copied(
    kaggle: Path, toy_run: Path, redone: list[str], capsys: Capture
) -> None:
    for name, moment in (("b", "2001"), ("a", "2999"), ("c", "2000")):
        folder = kaggle / "kaggle/input/datasets" / name / f"run_{name}"
        shutil.copytree(toy_run, folder)
        started(folder, moment)
    assert exp.main(AGAIN, root=kaggle) == 0
    assert "3 runs match; the newest is used: " in capsys.readouterr().out
    assert [path.name for path in (kaggle / "kaggle/working").iterdir()] == ["run_a"]


def test_the_newest_run_is_continued_or_refused_and_no_older_one(
    copied: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, redone: list[str], capsys: Capture
) -> None:
    """The newest needs a plugin, which this command does not give; an older one would go on without."""
    monkeypatch.chdir(toy)
    shutil.copytree(copied, toy / "exp1b_older")
    started(toy / "exp1b_older", "2001")
    started(copied, "2999")
    edit_index(copied, plugins={"mine.py": "1" * 64})
    before = tree(toy)
    assert exp.main(AGAIN) == 2
    assert "add --plugin mine.py; or give --output-dir" in capsys.readouterr().out.splitlines()[-1]
    assert (tree(toy), redone) == (before, [])


def test_an_input_given_by_hand_is_copied_too(kaggle: Path, toy_run: Path, redone: list[str]) -> None:
    """Into the output folder, once; the next session finds the copy by its name."""
    source = kaggle / "kaggle/input/earlier/run"
    shutil.copytree(toy_run, source)
    before = tree(source)
    assert exp.main([*AGAIN, "--output-dir", str(kaggle / "kaggle/working/run")], root=kaggle) == 0
    assert tree(source) == before
    assert (kaggle / "kaggle/working/run/results.csv").exists()


def test_an_input_itself_given_by_hand_is_copied_under_its_name(
    kaggle: Path, toy_run: Path, redone: list[str]
) -> None:
    source = kaggle / "kaggle/input/earlier/run"
    shutil.copytree(toy_run, source)
    assert exp.main([*AGAIN, "--output-dir", str(source)], root=kaggle) == 0
    assert (kaggle / "kaggle/working/run/results.csv").exists()


def test_a_named_folder_means_no_run_of_that_name_elsewhere(
    copied: Path, toy: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy)
    before = tree(copied)
    assert exp.main([*AGAIN, "--output-dir", str(toy / "elsewhere" / copied.name)]) == 2
    assert (tree(copied), redone) == (before, [])


def test_a_copy_takes_neither_lock_nor_rubbish_along(kaggle: Path, toy_run: Path, redone: list[str]) -> None:
    """And nothing that a link leads to outside of the run."""
    source = kaggle / "kaggle/input/earlier/run"
    shutil.copytree(toy_run, source)
    for name in (
        "run.lock",
        "checkpoints/a.lock",
        "checkpoints/a.attempts",
        ".results.csv.7.tmp",
        "checkpoints/a.pt.corrupt",
    ):
        (source / name).write_text("process 1 on host elsewhere\ntoken\n")
    secret = kaggle / "secret"
    secret.write_text("of this machine")
    (source / "figures/dangling.png").symlink_to("/nowhere")
    (source / "figures/secret.png").symlink_to(secret)
    assert exp.main(AGAIN, root=kaggle) == 0
    names = {path.name for path in (kaggle / "kaggle/working/run").rglob("*")}
    assert not names & {
        "a.lock",
        "a.attempts",
        ".results.csv.7.tmp",
        "a.pt.corrupt",
        "dangling.png",
        "secret.png",
    }
    assert "elsewhere" not in (kaggle / "kaggle/working/run/run.lock").read_text()


def test_report_only_of_an_input_works_on_a_copy(kaggle: Path, toy_run: Path) -> None:
    source = kaggle / "kaggle/input/notebooks/me/x/run"
    shutil.copytree(toy_run, source)
    before = tree(source)
    assert exp.main(["--report-only"], root=kaggle) == 0
    assert tree(source) == before
    assert results_without_times(kaggle / "kaggle/working/run") == results_without_times(toy_run)


# ---- Reuse of teachers, assistants and pilots ----------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are opened and closed, but train nothing."""
    monkeypatch.setattr(exp, "work", stopped_at_once)


@pytest.mark.usefixtures("untrained")
def test_an_identical_finished_teacher_is_reused(copied: Path, toy: Path, capsys: Capture) -> None:
    """With its assistants and pilot; a shorter training of students needs others of these, but the same teacher."""
    assert new_toy(toy / "same") == 0
    said = f"{TEACHER} was reused from {copied.name} (identical settings, data and precision)"
    assert said in capsys.readouterr().out
    assert index_of(toy / "same").jobs.keys() == {TEACHER, ASSISTANT, SECOND_ASSISTANT, PILOT}
    assert new_toy(toy / "shorter", "--student-epochs", "2") == 0
    assert index_of(toy / "shorter").jobs.keys() == {TEACHER}
    weights = [index_of(folder).jobs[TEACHER].weights_sha256 for folder in (copied, toy / "same")]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("untrained")
def test_a_run_that_is_killed_while_it_copies_a_teacher_goes_on(copied: Path, toy: Path) -> None:
    save = exp.Run.save_result

    def killed(run: exp.Run, *given: Any) -> None:
        save(run, *given)
        os.kill(os.getpid(), signal.SIGKILL)

    def started() -> int:
        exp.Run.save_result = killed  # type: ignore[method-assign]
        return new_toy(toy / "part")

    assert in_child(started) == "SIGKILL"
    assert resume(toy / "part") == 0
    assert index_of(toy / "part").jobs.keys() == {TEACHER, ASSISTANT, SECOND_ASSISTANT, PILOT}


@pytest.mark.usefixtures("untrained")
def test_a_folder_of_somebody_else_hinders_nobody(copied: Path, toy: Path, monkeypatch: Any) -> None:
    is_run = exp.is_run

    def denied(path: Path) -> bool:
        if path.name == "bob":
            raise exp.UsageError(f"cannot open {path} (Permission denied)")
        return is_run(path)

    (toy / "bob/checkpoints").mkdir(parents=True)
    monkeypatch.setattr(exp, "is_run", denied)
    assert new_toy(toy / "mine") == 0
    assert index_of(toy / "mine").jobs.keys() == {TEACHER, ASSISTANT, SECOND_ASSISTANT, PILOT}


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    "option",
    [
        ["--fresh-teacher"], ["--seed", "1"], ["--teacher-epochs", "4"], ["--lr", "0.06"],
        ["--precision", "bf16"], ["--train-size", "220"],
    ],
)  # fmt: skip
def test_a_teacher_is_not_reused(copied: Path, toy: Path, option: list[str]) -> None:
    assert new_toy(toy / "other", *option) == 0
    assert index_of(toy / "other").jobs == {}


@pytest.mark.usefixtures("untrained")
def test_a_teacher_of_an_input_is_reused(kaggle: Path, toy_run: Path) -> None:
    source = kaggle / "kaggle/input/notebooks/me/x/run"
    shutil.copytree(toy_run, source)
    before = tree(source)
    run = kaggle / "kaggle/working/run"
    assert exp.main([*TOY, "--output-dir", str(run)], root=kaggle) == 0
    assert tree(source) == before
    assert index_of(run).jobs.keys() == {TEACHER, ASSISTANT, SECOND_ASSISTANT, PILOT}


@pytest.mark.usefixtures("untrained")
def test_a_damaged_teacher_elsewhere_is_not_reused_and_left_alone(copied: Path, toy: Path) -> None:
    path = copied / f"checkpoints/{TEACHER}.pt"
    path.write_bytes(path.read_bytes()[:-9])
    before = tree(copied)
    assert new_toy(toy / "other") == 0
    assert index_of(toy / "other").jobs == {}
    assert tree(copied) == before


def test_results_with_a_reused_teacher_are_the_same(copied: Path, toy: Path, toy_run: Path) -> None:
    assert new_toy(toy / "again") == 0
    assert {epoch.split()[0] for epoch in epochs_in_log(toy / "again")} == {DIRECT, KD, HPMKD}
    assert results_without_times(toy / "again") == results_without_times(toy_run)


# ---- --status and --report-only ------------------------------------------------------------------------------


@pytest.fixture
def half(toy: Path) -> Path:
    """A run that was stopped in the teacher's second epoch."""

    def stop() -> None:
        raise exp.Stopped("session clock")

    with struck("an epoch", 3, stop):
        assert new_toy(toy / "half") == 0
    return toy / "half"


def test_status_of_a_half_finished_run(half: Path, capsys: Capture) -> None:
    before = tree(half)
    capsys.readouterr()
    assert exp.main(["--status", "--output-dir", str(half)]) == 0
    out = capsys.readouterr().out
    assert f"0 of {len(JOBS)} jobs done, 0 failed, {len(JOBS)} left" in out
    assert f"in progress: {TEACHER}" in out
    assert f"--resume --output-dir {half}" in out
    assert tree(half) == before


def test_status_of_a_finished_run(copied: Path, capsys: Capture) -> None:
    before = tree(copied)
    assert exp.main(["--status"]) == 0
    out = capsys.readouterr().out
    assert f"{len(JOBS)} of {len(JOBS)} jobs done, 0 failed, 0 left" in out
    assert f"test accuracy {index_of(copied).jobs[TEACHER].test_accuracy:.2f}%" in out
    assert f"Direct {'':15} 1 of 1 runs done, best {index_of(copied).jobs[DIRECT].test_accuracy:.2f}%" in out
    assert "continue with" not in out
    assert tree(copied) == before


def test_status_leaves_a_damaged_run_alone(copied: Path, capsys: Capture) -> None:
    """It neither sets aside nor repairs, and says nothing wrong."""
    for name in (exp.STATE_NAME, f"{KD}.pt"):
        path = copied / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-1])
    before = tree(copied)
    assert exp.main(["--status"]) == 0
    out = capsys.readouterr().out
    assert f"{len(JOBS) - 1} of {len(JOBS)} jobs done, 0 failed, 1 left" in out
    assert "0 of 1 runs done" in next(line for line in out.splitlines() if "TraditionalKD" in line)
    assert tree(copied) == before


def test_status_counts_failed_jobs_apart(copied: Path, redone: list[str], capsys: Capture) -> None:
    """All but one done and one failed; why is said, and the folder stays as it is."""
    run = exp.Run(copied, index_of(copied))
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    run.fail(next(job for job in run.jobs if job.name == DIRECT), "made by a test", final=True)
    assert resume(copied) == 1
    before = tree(copied)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    out = capsys.readouterr().out
    assert f"{len(JOBS) - 1} of {len(JOBS)} jobs done, 1 failed, 0 left" in out
    assert f"failed: {DIRECT}: made by a test" in out
    assert tree(copied) == before


@pytest.mark.parametrize("action", ["--status", "--report-only"])
def test_what_only_reads_takes_no_settings_that_it_would_ignore(
    copied: Path, action: str, capsys: Capture
) -> None:
    before = tree(copied)
    assert exp.main([action, "--lr", "7", "--runs", "99", "--output-dir", str(copied)]) == 2
    assert f"{action} takes no --runs and --lr" in last_line(capsys).replace(
        "--lr and --runs", "--runs and --lr"
    )
    assert tree(copied) == before


def test_report_only_writes_reports_and_trains_nothing(
    copied: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exp, "work", lambda *_, **__: pytest.fail("trained"))
    for name in ("results.csv", "experiment_report.md", "summary.csv"):
        (copied / name).unlink()
    shutil.rmtree(copied / "figures")
    models = {name: value for name, value in tree(copied / "checkpoints").items() if name.endswith(".pt")}
    assert exp.main(["--report-only"]) == 0
    assert results_without_times(copied) == results_without_times(toy_run)
    assert (copied / "experiment_report.md").exists()
    assert list((copied / "figures").glob("*.png"))
    after = {name: value for name, value in tree(copied / "checkpoints").items() if name.endswith(".pt")}
    assert after == models


def test_the_archive_holds_everything_small_with_the_last_line_of_the_log(copied: Path) -> None:
    assert exp.main(["--report-only"]) == 0
    with zipfile.ZipFile(copied / f"{copied.name}_results.zip") as archive:
        held = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    suffixes = (".csv", ".md", ".tex", ".png", ".pdf", ".log")
    small = {str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file() and p.suffix in suffixes}
    expected = {"results.csv", "summary.csv", "experiment_report.md", "results_table.tex", "experiment.log"}
    assert held.keys() == small >= expected
    assert all(held[name] == (copied / name).read_bytes() for name in small)
    assert "finished: " in held["experiment.log"].decode().splitlines()[-1]


def test_report_only_of_a_half_finished_run(half: Path, toy_run: Path) -> None:
    progress = (half / f"checkpoints/{TEACHER}.progress").read_bytes()
    assert exp.main(["--report-only", "--output-dir", str(half)]) == 0
    assert "Missing: the teacher" in (half / "experiment_report.md").read_text()
    assert (half / f"checkpoints/{TEACHER}.progress").read_bytes() == progress
    assert resume(half) == 0
    assert results_without_times(half) == results_without_times(toy_run)


# ---- Paths ---------------------------------------------------------------------------------------------------


def test_a_linked_run_folder_with_a_strange_name(
    copied: Path, toy: Path, toy_run: Path, redone: list[str]
) -> None:
    """Spaces, quotes, brackets and non-ASCII letters, behind a symbolic link: everything works, and the link stays one."""
    real = toy / "real Ordner [1] 'ä' *" / "run"
    real.parent.mkdir()
    shutil.move(copied, real)
    for name in (f"{KD}.pt", f"{HPMKD}.pt"):
        (real / "checkpoints" / name).unlink()
    link = toy / "ein link é"
    link.symlink_to(real, target_is_directory=True)
    assert resume(link) == 0
    assert sorted(redone) == sorted([KD, HPMKD])
    assert link.is_symlink()
    assert results_without_times(real) == results_without_times(toy_run)
    assert exp.main(["--report-only", "--output-dir", str(link)]) == 0
