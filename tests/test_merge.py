"""One report from partial sessions: what is merged, what is refused, and that the sources stay as they are."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import results_without_times
from lab import shortcuts

import run_exp1b_kaggle as exp

OPTIONS = [
    "--mode", "smoke", "--width", "8", "--train-size", "200", "--batch-size", "60", "--lr", "0.05",
    "--teacher-epochs", "1", "--student-epochs", "1", "--runs", "1", "--threads", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with partial runs: five (5x), two (2.3x, with five's teacher), other (2.3x, with another teacher)."""
    root = tmp_path_factory.mktemp("sessions")
    with shortcuts(1) as patch:
        patch.setattr(exp.tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))
        patch.setattr(exp, "draw_figures", lambda *_: [])
        patch.setattr(exp, "measure_speeds", lambda *_: {})
        patch.chdir(root)
        for name, compression in (("exp1b_five", "5x"), ("exp1b_two", "2.3x")):
            assert exp.main([*OPTIONS, "--compression", compression, "--output-dir", str(root / name)]) == 0
        patch.setattr(exp.Schedule, "learning_rate", lambda self, step: 0.01)
        other = ["--compression", "2.3x", "--fresh-teacher", "--output-dir", str(root / "exp1b_other")]
        assert exp.main([*OPTIONS, *other]) == 0
    return root


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Merge run folders into tmp_path/merged, without figures, from a folder where there is nothing; returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exp, "draw_figures", lambda *_: [])
    target = tmp_path / "merged"

    def merging(*folders: Path) -> int:
        return exp.main(["--merge", *map(str, folders), "--output-dir", str(target)])

    return merging


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its checksum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(*folders: Path) -> pd.DataFrame:
    tables = [pd.read_csv(folder / "results.csv") for folder in folders]
    return pd.concat(tables).sort_values(["ratio_nominal", "run"], kind="stable").reset_index(drop=True)


def as_if(source: Path, target: Path, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run that has only started, whose index is `source`'s but for this."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.pt", "*.previous"))
    index = exp.RunFolder(target).index_file
    state = exp.load_plain(index)
    state |= {key: {**state[key], **value} if isinstance(value, dict) else value for key, value in changes.items()}
    state["settings"] |= settings or {}
    experiment = exp.Settings.from_plain(state["settings"])
    state["fingerprint"] = exp.fingerprint(experiment, state["precision"], state["data"]["sha256"])
    exp.save_plain(index, state)
    return target


def refused(merging: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, *folders: Path) -> str:
    """Merge folders that cannot be merged: exit code 2 and one line (returned), nothing written anywhere."""
    before = {folder: tree(folder) for folder in folders}
    own = tree(tmp_path)
    capsys.readouterr()
    assert merging(*folders) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert {folder: tree(folder) for folder in folders} == before
    assert tree(tmp_path) == own
    assert not (tmp_path / "merged").exists()
    return line


def test_a_second_session_reuses_the_teacher_and_both_become_one_run(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    five, two = sessions / "exp1b_five", sessions / "exp1b_two"
    state = exp.load_index(exp.RunFolder(two))
    teacher = "teacher_resnet50_SYNTHETIC"
    assert f"{teacher} was reused from exp1b_five (identical settings, data and precision)." in state["notes"]
    assert state["jobs"][teacher] == exp.load_index(exp.RunFolder(five))["jobs"][teacher]
    before = tree(sessions)
    assert merge(five, two) == 0
    assert tree(sessions) == before, "nothing was written into the sources"
    merged = tmp_path / "merged"
    pd.testing.assert_frame_equal(rows(merged), rows(five, two))
    assert len(rows(merged)) == 6
    for source in (five, two):
        for path in (source / "checkpoints").glob("student_*.pt"):
            assert (merged / "checkpoints" / path.name).read_bytes() == path.read_bytes()
    index = exp.load_index(exp.RunFolder(merged))
    assert index["settings"]["compression"] == ["2.3x", "5x"]
    assert index["merged"]["sources"] == ["exp1b_five", "exp1b_two"]
    assert {t["weights_sha256"] for t in index["merged"]["teachers"].values()} == {state["jobs"][teacher]["weights_sha256"]}
    assert len(index["sessions"]) == 2
    assert "Merged from exp1b_five, exp1b_two." in (merged / "experiment_report.md").read_text()


def test_a_merged_run_can_be_reported_again_and_continued(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(sessions / "exp1b_two", sessions / "exp1b_five") == 0
    merged = tmp_path / "merged"
    table, report = results_without_times(merged), (merged / "experiment_report.md").read_text()
    (merged / "results.csv").unlink()
    (merged / "experiment_report.md").unlink()
    assert exp.main(["--report-only", "--resume", "--output-dir", str(merged)]) == 0
    assert results_without_times(merged) == table
    assert (merged / "experiment_report.md").read_text().splitlines()[0] == report.splitlines()[0]
    models = {name: value for name, value in tree(merged / "checkpoints").items() if name.endswith(".pt")}
    with shortcuts(1):
        assert exp.main(["--resume", "--output-dir", str(merged), "--device", "cpu", "--threads", "1"]) == 0
    assert {name: value for name, value in tree(merged / "checkpoints").items() if name.endswith(".pt")} == models
    assert "10 of 10 jobs done" in capsys.readouterr().out


def test_the_same_files_twice_are_recognised(sessions: Path, tmp_path: Path, merge: Any) -> None:
    """A copied folder, a folder named twice, and a teacher in both."""
    shutil.copytree(sessions / "exp1b_five", tmp_path / "exp1b_copy")
    five = sessions / "exp1b_five"
    assert merge(five, tmp_path / "exp1b_copy", five, sessions / "exp1b_two") == 0
    assert len(rows(tmp_path / "merged")) == 6


def test_the_same_student_trained_differently_is_refused(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(merge, capsys, tmp_path, sessions / "exp1b_two", sessions / "exp1b_other")
    assert "both hold student_2.3x_" in said
    assert "trained differently" in said


def test_students_of_one_ratio_from_different_pilots_are_refused(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """HPM-KD would mean two things in one cell, though no student is in both runs."""
    changed = tmp_path / "changed"
    shutil.copytree(sessions / "exp1b_five", changed, ignore=shutil.ignore_patterns("student_*.pt"))
    pilot = changed / "checkpoints" / "pilot_5x_HPM-KD_SYNTHETIC.pt"
    content = exp.load_checkpoint(pilot)
    content["record"]["config"]["alpha"] = 0.3
    exp.save_checkpoint(pilot, content)
    said = refused(merge, capsys, tmp_path, sessions / "exp1b_five", changed)
    assert "both hold pilot_5x_HPM-KD_SYNTHETIC" in said


def test_students_of_one_ratio_from_different_teachers_are_refused(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """No student is in both runs, and yet they cannot be compared."""
    for name, method in (("exp1b_two", "TraditionalKD"), ("exp1b_other", "HPM-KD")):
        shutil.copytree(sessions / name, tmp_path / name)
        for path in (tmp_path / name / "checkpoints").glob("student_*.pt"):
            if f"_{method}_" not in path.name:
                path.unlink()
    said = refused(merge, capsys, tmp_path, tmp_path / "exp1b_two", tmp_path / "exp1b_other")
    assert "students at 2.3x learned from different teachers" in said


def test_ratios_with_different_teachers_are_merged_and_the_report_says_so(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each ratio keeps its own teacher; five's 2.3x intermediate has five's, though the students at 2.3x have another."""
    five, other = sessions / "exp1b_five", sessions / "exp1b_other"
    assert merge(other, five) == 0
    merged = tmp_path / "merged"
    pd.testing.assert_frame_equal(rows(merged), rows(other, five))
    accuracy = rows(merged).groupby("compression").teacher_accuracy
    assert accuracy.nunique().tolist() == [1, 1]
    teachers = {r: t["weights_sha256"] for r, t in exp.load_index(exp.RunFolder(merged))["merged"]["teachers"].items()}
    assert set(teachers) == {"2.3x", "5x"}
    assert len(set(teachers.values())) == 2
    assert "different teachers" in (merged / "experiment_report.md").read_text()
    assert not list(merged.rglob("*.corrupt"))
    assert (merged / "checkpoints" / "intermediate_2.3x_SYNTHETIC.pt").exists()
    before = {path: value for path, value in tree(merged).items() if path.endswith((".pt", ".pkl"))}
    capsys.readouterr()
    assert exp.main(["--resume", "--output-dir", str(merged), "--device", "cpu"]) == 2
    assert "merged from several teachers" in capsys.readouterr().out
    assert {path: value for path, value in tree(merged).items() if path.endswith((".pt", ".pkl"))} == before
    assert exp.main(["--report-only", "--resume", "--output-dir", str(merged)]) == 0
    pd.testing.assert_frame_equal(rows(merged), rows(other, five))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.2, "student_epochs": 9}, ["student_epochs 9 / 1", "lr 0.2 / 0.05"]),
        ({"seed": 7}, ["seed 7 / 42"]),
        ({"dataset": "CIFAR10"}, ["dataset CIFAR10 / SYNTHETIC"]),
    ],
    ids=str,
)
def test_different_settings_are_refused_by_name(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str], change: dict[str, Any], named: list[str]
) -> None:
    changed = as_if(sessions / "exp1b_five", tmp_path / "changed", settings=change)
    said = refused(merge, capsys, tmp_path, changed, sessions / "exp1b_two")
    assert all(field in said for field in named)
    assert "width" not in said


@pytest.mark.parametrize(("key", "value", "said"), [("precision", "bf16", "precision"), ("data", {"sha256": "0"}, "data differ")])
def test_another_precision_or_other_data_are_refused(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str], key: str, value: Any, said: str
) -> None:
    changed = as_if(sessions / "exp1b_five", tmp_path / "changed", **{key: value})
    assert said in refused(merge, capsys, tmp_path, sessions / "exp1b_two", changed)


def test_folders_without_a_run_are_refused(sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        said = refused(merge, capsys, tmp_path, sessions / "exp1b_two", folder)
        assert str(folder) in said
        assert "holds no run" in said


def test_a_damaged_file_is_refused_and_not_set_aside(
    sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sessions / "exp1b_five", tmp_path / "five")
    path = tmp_path / "five" / "checkpoints" / "student_5x_Direct_run1.pt"
    path.write_bytes(path.read_bytes()[:-1])
    said = refused(merge, capsys, tmp_path, tmp_path / "five", sessions / "exp1b_two")
    assert path.name in said
    assert "--resume first" in said


def test_an_existing_folder_is_not_merged_into(sessions: Path, tmp_path: Path, merge: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine").write_text("precious")
    assert merge(sessions / "exp1b_five", sessions / "exp1b_two") == 2
    assert "exists already" in capsys.readouterr().out
    assert set(tree(tmp_path / "merged")) == {"mine"}
