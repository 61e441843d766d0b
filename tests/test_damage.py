"""Damage where a job is in progress, files that cannot be read, and runs of earlier versions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import results_without_times
from lab import do, open_lab, pilot, shortcuts, teacher, untimed
from toy import DAMAGES, DIRECT, HPMKD, PILOT, TEACHER, cut_networks, epochs_in_log, forbid, leftovers, resume, tree

import run_exp1b_kaggle as exp

# ---- A pilot in progress ---------------------------------------------------------------------------------------------

STOPPED_IN = "rung3_candidate1"  # the first with two epochs, so that it has a checkpoint of its own
TRIALS = 12  # candidates trained before it, over two rungs


@pytest.fixture(scope="module")
def piloting(tmp_path_factory: pytest.TempPathFactory) -> tuple[exp.Experiment, dict[str, Any]]:
    """An experiment whose pilot was stopped in the second epoch of a candidate, and the record of an undisturbed pilot. Read only."""
    folder = tmp_path_factory.mktemp("piloting")
    with shortcuts() as patch:
        cut_networks(patch)
        lab = open_lab(folder / "whole", student_epochs=6, compression=("2.3x",))
        record = do(lab, teacher(lab), pilot(lab))[pilot(lab).name]
        shutil.copytree(folder / "whole", folder / "stopped")
        stopped = exp.dataclasses.replace(lab, folder=exp.RunFolder(folder / "stopped"))
        stopped.folder.model_file(record["job"]).unlink()
        stopped.folder.remove_progress(record["job"])
        epoch = exp.Fitting._epoch

        def stop(fitting: exp.Fitting, number: int) -> None:
            if fitting.name.endswith(STOPPED_IN) and number == 1:
                raise exp.Stopped("session clock")
            epoch(fitting, number)

        patch.setattr(exp.Fitting, "_epoch", stop)
        with pytest.raises(exp.Stopped):
            exp.JobRunner(stopped, pilot(lab)).run()
    return stopped, record


def drop_a_field(path: Path) -> None:
    """Remove what a checkpoint cannot do without, and seal it again."""
    content = exp.load_checkpoint(path)
    content.pop("seconds", None)
    for result in content.get("results", {}).values():
        del result["correct"]
    exp.save_checkpoint(path, content)


def of_another_run(path: Path) -> None:
    exp.save_checkpoint(path, {**exp.load_checkpoint(path), "identity": "another's"})


PILOT_DAMAGES = {**{name: DAMAGES[name] for name in ("empty", "bit at 60%", "a folder")}, "field": drop_a_field, "other": of_another_run}
LOST_TRIALS = {".progress": 1, ".progress*": TRIALS, f"_{STOPPED_IN}.progress": 0}


@pytest.mark.parametrize(
    ("files", "damage"),
    [(files, damage) for files in LOST_TRIALS for damage in PILOT_DAMAGES if files != ".progress*" or damage in ("a folder", "field")],
)
def test_damage_to_a_pilot_in_progress(piloting: tuple[exp.Experiment, dict[str, Any]], tmp_path: Path, files: str, damage: str) -> None:
    """The version before has one candidate less; a candidate's own checkpoint costs its epoch; the pilot chooses the same."""
    stopped, expected = piloting
    shutil.copytree(stopped.folder.path, tmp_path / "run")
    lab = exp.dataclasses.replace(stopped, folder=exp.RunFolder(tmp_path / "run"))
    for path in list(lab.folder.checkpoints.glob(expected["job"] + files)):
        PILOT_DAMAGES[damage](path)
    trained: list[str] = []
    with shortcuts() as patch:
        cut_networks(patch)
        start = exp.Fitting.run
        patch.setattr(exp.Fitting, "run", lambda fitting: trained.append(fitting.name) or start(fitting))
        exp.JobRunner(lab, pilot(lab)).run()
    found = exp.load_checkpoint(lab.folder.model_file(expected["job"]))["record"]
    assert untimed(found) == untimed(expected)
    assert len(trained) == 2 + LOST_TRIALS[files]


# ---- A student in progress: sealed, of this run, but not what this script writes ---------------------------------------


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    """Remove an item at the end of these keys."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


STRANGE_PROGRESS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no history": without("history"),
    "a number for a history": lambda content: content.update(history=5),
    "half an epoch": lambda content: content["history"][0].pop("loss"),
    "another network": lambda content: content["model"].update({"classifier.bias": torch.zeros(3)}),
    "micro-batches of none": lambda content: content.update(micro_batch=0),
    "seconds in words": lambda content: content.update(seconds="many"),
}


@pytest.mark.parametrize("strange", STRANGE_PROGRESS)
def test_a_strange_checkpoint_in_progress_is_not_continued(half_trained: Path, toy: Path, toy_run: Path, strange: str) -> None:
    shutil.copytree(half_trained, toy / "run")
    progress = toy / f"run/checkpoints/{DIRECT}.progress"
    content = exp.load_checkpoint(progress)
    STRANGE_PROGRESS[strange](content)
    exp.save_checkpoint(progress, content)
    assert exp.main(["--status", "--output-dir", str(toy / "run")]) == 0
    assert resume(toy / "run") == 0
    assert epochs_in_log(toy / "run")[-2:] == [f"{DIRECT} epoch 2", f"{DIRECT} epoch 3"]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


# ---- Files that cannot be read ---------------------------------------------------------------------------------------

UNREADABLE = {
    "experiment_state.pkl": [],
    f"{TEACHER}.pt": [TEACHER],
    f"{PILOT}.pt": [PILOT],
    f"{HPMKD}.pt": [HPMKD],
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_set_aside(copied: Path, toy_run: Path, redone: list[str], name: str) -> None:
    """Like a damaged one. --status says what it can without moving anything."""
    path, before = copied / "checkpoints" / name, tree(copied)
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch, path)
        assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert tree(copied) == before
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch, path)
        assert resume(copied) == 0
    assert redone == UNREADABLE[name]
    assert f"checkpoints/{name}.corrupt" in leftovers(copied)
    assert results_without_times(copied) == results_without_times(toy_run)


def test_an_unreadable_batch_of_data_is_fetched_again(
    copied: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, copy = copied / "data/cifar-10-batches-py/data_batch_3", shutil.copyfile
    inode = batch.stat().st_ino

    def refused(source: Path, target: Path) -> Any:
        if Path(source).stat().st_ino == inode:
            raise PermissionError(13, "Permission denied", str(source))
        return copy(source, target)

    monkeypatch.setattr(exp.shutil, "copyfile", refused)
    assert resume(copied) == 0
    assert f"Permission denied: '{batch}'" in capsys.readouterr().out
    assert redone == []


# ---- Earlier versions ------------------------------------------------------------------------------------------------


def edit_index(folder: Path, **changes: Any) -> None:
    state = exp.load_index(exp.RunFolder(folder), repair=False)
    exp.save_plain(folder / "checkpoints/experiment_state.pkl", {**state, **changes})


EARLIER = {"script": {"version": "0.9.0", "sha256": "0" * 64}}


@pytest.mark.parametrize("action", ["--resume", "--status", "--report-only", "--merge"])
def test_a_run_of_an_earlier_version_is_refused_untouched(copied: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit_index(copied, **EARLIER, fingerprint="0" * 64)
    before = tree(copied / "checkpoints")
    target = [str(copied), "--output-dir", str(copied.parent / "merged")] if action == "--merge" else ["--output-dir", str(copied)]
    assert exp.main([action, *target]) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert "written by version 0.9.0 of this script, which computes something else: continue it with that version" in said[0]
    assert tree(copied / "checkpoints") == before
    assert not (copied.parent / "merged").exists()


def test_a_run_of_an_earlier_version_that_computed_the_same_goes_on(
    copied: Path, toy_run: Path, redone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its records lack what came later; they only cannot be merged, for which that is needed."""
    for path in (copied / "checkpoints").glob("*.pt"):
        content = exp.load_checkpoint(path)
        del content["record"]["taught_by"]
        exp.save_checkpoint(path, content)
    records = {path.stem: exp.load_checkpoint(path)["record"] for path in (copied / "checkpoints").glob("*.pt")}
    edit_index(copied, **EARLIER, jobs=records)
    assert exp.main(["--merge", str(copied), "--output-dir", str(copied.parent / "merged")]) == 2
    assert "earlier version of this script" in capsys.readouterr().out.splitlines()[-1]
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)
