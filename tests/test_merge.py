"""One report from partial sessions: what is merged, what is refused, and that the sources stay as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import results_without_times
from toy import DIRECT, PILOT, SECOND_ASSISTANT, SESSION, TEACHER, install_toy, new_toy, tree

import run_exp1b_kaggle as exp

Merge = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with partial runs: exp1b_five (5x), exp1b_two (2.3x, with five's teacher), exp1b_other (2.3x, another teacher)."""
    root = tmp_path_factory.mktemp("sessions")
    with pytest.MonkeyPatch.context() as patch:
        install_toy(patch, root)
        assert new_toy(root / "exp1b_five") == 0
        assert new_toy(root / "exp1b_two", "--compression", "2.3x") == 0
        patch.setattr(exp, "learning_rate", lambda *_: 0.01)
        assert new_toy(root / "exp1b_other", "--compression", "2.3x", "--fresh-teacher") == 0
    return root


@pytest.fixture
def merge(toy: Path) -> Merge:
    """Merge run folders into toy/merged; returns the exit code."""
    return lambda *folders: exp.main(["--merge", *map(str, folders), "--output-dir", str(toy / "merged")])


def rows(*folders: Path) -> pd.DataFrame:
    table = pd.concat(pd.read_csv(folder / "results.csv") for folder in folders)
    return table.sort_values(["ratio_nominal", "run"], kind="stable").reset_index(drop=True)


def models(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in tree(folder).items() if name.endswith(".pt")}


def refused(merge: Merge, capsys: Capture, toy: Path, *folders: Path) -> str:
    """Merge folders that cannot be merged: exit code 2 and one line (returned), nothing written anywhere."""
    before, own = [tree(folder) for folder in folders], tree(toy)
    capsys.readouterr()
    assert merge(*folders) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert [tree(folder) for folder in folders] == before
    assert tree(toy) == own
    return line


def test_a_second_session_reuses_the_teacher_and_both_become_one_run(
    sessions: Path, toy: Path, merge: Merge
) -> None:
    five, two = sessions / "exp1b_five", sessions / "exp1b_two"
    index = exp.load_index(two, {})
    assert any("was reused from exp1b_five" in note for note in index.notes)
    before = tree(sessions)
    assert merge(five, two) == 0
    assert tree(sessions) == before, "nothing was written into the sources"
    merged = toy / "merged"
    pd.testing.assert_frame_equal(rows(merged), rows(five, two))
    assert len(rows(merged)) == 6
    for source in (five, two):
        for path in (source / "checkpoints").glob("student_*.pt"):
            assert (merged / "checkpoints" / path.name).read_bytes() == path.read_bytes()
    index = exp.load_index(merged, {})
    assert index.settings.compression == ("2.3x", "5x")
    assert index.merged_from == ["exp1b_five", "exp1b_two"]
    assert len(index.sessions) == 2
    assert "Merged from exp1b_five and exp1b_two." in (merged / "experiment_report.md").read_text()


def test_a_merged_run_can_be_reported_again_and_continued(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    assert merge(sessions / "exp1b_two", sessions / "exp1b_five") == 0
    merged = toy / "merged"
    table, trained = results_without_times(merged), models(merged)
    (merged / "results.csv").unlink()
    assert exp.main(["--report-only", "--resume", "--output-dir", str(merged)]) == 0
    assert results_without_times(merged) == table
    assert exp.main(["--resume", "--output-dir", str(merged), *SESSION]) == 0
    assert models(merged) == trained
    assert "11 of 11 jobs done" in capsys.readouterr().out


def test_a_merge_that_was_killed_leaves_nothing_that_hinders_the_next(
    sessions: Path, toy: Path, merge: Merge
) -> None:
    """Whether it died before it was named or after, before its report was written."""
    five, two = sessions / "exp1b_five", sessions / "exp1b_two"
    for point in ("save_index", "report_on"):
        with pytest.MonkeyPatch.context() as patch:
            owner = exp.Run if point == "save_index" else exp
            patch.setattr(owner, point, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            merge(five, two)
        assert not list(toy.glob(".*"))
        if point == "report_on":
            assert exp.main(["--report-only", "--output-dir", str(toy / "merged")]) == 0
        else:
            assert merge(five, two) == 0
        assert len(rows(toy / "merged")) == 6
        shutil.rmtree(toy / "merged")


def test_the_same_files_twice_are_recognised(sessions: Path, toy: Path, merge: Merge) -> None:
    """A copied folder, a folder named twice, and a teacher in both."""
    five = sessions / "exp1b_five"
    shutil.copytree(five, toy / "exp1b_copy")
    assert merge(five, toy / "exp1b_copy", five, sessions / "exp1b_two") == 0
    assert len(rows(toy / "merged")) == 6


def test_parts_with_different_teachers_are_refused(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    """Also where no ratio is in both: only results that share a teacher can be compared."""
    for first in ("exp1b_two", "exp1b_five"):
        said = refused(merge, capsys, toy, sessions / first, sessions / "exp1b_other")
        assert f"{TEACHER}.pt differ (the runs learned from different teachers, or" in said


def test_a_student_trained_differently_is_refused(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    shutil.copytree(sessions / "exp1b_other", toy / "exp1b_other")
    for path in (toy / "exp1b_other/checkpoints").glob("*.pt"):
        if "_Direct_" not in path.name:
            path.unlink()
    said = refused(merge, capsys, toy, sessions / "exp1b_two", toy / "exp1b_other")
    assert "student_2.3x_Direct_run1.pt differ (" in said and "merge only one of them" in said


def test_students_without_their_teacher_are_refused(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    """No job is in both runs, and yet they cannot be compared."""
    for name, kept in (("exp1b_five", ""), ("exp1b_other", "student_2.3x_TraditionalKD")):
        shutil.copytree(sessions / name, toy / name)
        for path in (toy / name / "checkpoints").glob("*.pt"):
            if not path.name.startswith(kept):
                path.unlink()
    said = refused(merge, capsys, toy, toy / "exp1b_five", toy / "exp1b_other")
    assert f"was distilled from another {TEACHER} than this run's: repair" in said
    (toy / "exp1b_five/checkpoints" / f"{TEACHER}.pt").unlink()
    said = refused(merge, capsys, toy, toy / "exp1b_five", toy / "exp1b_other")
    assert f"was distilled from a {TEACHER} that none of these runs holds" in said


def test_parts_with_equal_cost_are_merged(sessions: Path, toy: Path, merge: Merge) -> None:
    """Each keeps the length of its own arm, which depends on how many ratios share the teacher."""
    parts = [
        as_if(sessions / f"exp1b_{name}", toy / f"exp1b_{name}", equal_cost=True, equal_cost_epochs=epochs)
        for name, epochs in (("five", {"5x": 11}), ("two", {"2.3x": 7}))
    ]
    merge(*parts)
    assert exp.load_index(toy / "merged", {}).equal_cost_epochs == {"2.3x": 7, "5x": 11}
    assert exp.main(["--status", "--output-dir", str(toy / "merged")]) == 0


def test_parts_that_plan_equal_cost_differently_are_refused(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    parts = [
        as_if(
            sessions / "exp1b_five", toy / f"part{epochs}", equal_cost=True, equal_cost_epochs={"5x": epochs}
        )
        for epochs in (11, 12)
    ]
    assert "plans 12 epochs of Direct-equal-cost at 5x" in refused(merge, capsys, toy, *parts)


def as_if(source: Path, target: Path, **changes: Any) -> Path:
    """A run that has only started, whose index is `source`'s but for these settings or fields."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pt", "*.bak"))
    index = exp.load_index(source, {})
    settings = {
        name: changes.pop(name)
        for name in list(changes)
        if hasattr(index.settings, name) and name != "precision"
    }
    index = replace(index, settings=replace(index.settings, **settings), **changes)
    index.fingerprint = exp.run_fingerprint(index.settings, index.precision, index.data.sha256)
    exp.save_plain(target / "checkpoints" / exp.STATE_NAME, exp.to_plain(index))
    return target


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.2, "student_epochs": 9}, ["student_epochs 9 / 3", "lr 0.2 / 0.05"]),
        ({"seed": 7}, ["seed 7 / 42"]),
        ({"precision": "bf16"}, ["precision bf16 / fp32"]),
    ],
)
def test_different_settings_are_refused_by_name(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture, changes: dict[str, Any], said: list[str]
) -> None:
    changed = as_if(sessions / "exp1b_five", toy / "changed", **changes)
    line = refused(merge, capsys, toy, changed, sessions / "exp1b_two")
    assert all(part in line for part in said)
    assert "width" not in line


def test_other_data_are_refused(sessions: Path, toy: Path, merge: Merge, capsys: Capture) -> None:
    five = sessions / "exp1b_five"
    changed = as_if(five, toy / "changed", data=replace(exp.load_index(five, {}).data, sha256="0" * 64))
    assert "the data differ" in refused(merge, capsys, toy, changed, sessions / "exp1b_two")


def test_folders_without_a_run_are_refused(sessions: Path, toy: Path, merge: Merge, capsys: Capture) -> None:
    (toy / "empty").mkdir()
    for folder in (toy / "empty", toy / "nowhere"):
        assert f"{folder} holds no run" in refused(merge, capsys, toy, sessions / "exp1b_two", folder)


@pytest.mark.parametrize("damaged", [DIRECT, PILOT, SECOND_ASSISTANT])
def test_a_damaged_file_is_refused_and_not_set_aside(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture, damaged: str
) -> None:
    shutil.copytree(sessions / "exp1b_five", toy / "five")
    path = toy / f"five/checkpoints/{damaged}.pt"
    path.write_bytes(path.read_bytes()[:-1])
    said = refused(merge, capsys, toy, toy / "five", sessions / "exp1b_two")
    assert path.name in said
    assert "--resume first" in said


def test_an_existing_folder_is_not_merged_into(
    sessions: Path, toy: Path, merge: Merge, capsys: Capture
) -> None:
    (toy / "merged").mkdir()
    (toy / "merged/mine").write_text("precious")
    assert merge(sessions / "exp1b_five", sessions / "exp1b_two") == 2
    assert "exists already" in capsys.readouterr().out
    assert set(tree(toy / "merged")) == {"mine"}
