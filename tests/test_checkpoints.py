"""What is on the disk: whole or not there, verified when it is read, never executed; every damage of every file."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results_without_times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import lab_data
from toy import (
    DAMAGES,
    DIRECT,
    HPMKD,
    INTERMEDIATE,
    JOBS,
    KD,
    PILOT,
    TEACHER,
    Code,
    epochs_in_log,
    flip,
    forbid,
    leftovers,
    make_folder,
    new_toy,
    resume,
    struck,
    tree,
)

import run_exp1b_kaggle as exp

# ---- Writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_what_was_written_and_nothing_else_is_there(tmp_path: Path) -> None:
    exp.write_atomic(tmp_path / "file", b"one")
    exp.write_atomic(tmp_path / "file", b"two")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"two")]


@pytest.mark.parametrize("point", ["half written", "before the fsync", "before the rename"])
@pytest.mark.parametrize(("code", "expected"), [(errno.ENOSPC, exp.DiskFull), (errno.EDQUOT, exp.DiskFull), (errno.EROFS, exp.UsageError)])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, point: str, code: int, expected: type[Exception]) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    exp.write_sealed(tmp_path / "file", b"old")
    with struck(point, 1, fail), pytest.raises(expected, match="file"):
        exp.write_sealed(tmp_path / "file", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert exp.read_sealed(tmp_path / "file") == b"old"


def test_a_disk_that_returns_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exp.write_sealed(tmp_path / "file", b"old")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path)[:-1] if path.suffix == ".tmp" else read(path))
    with pytest.raises(exp.UsageError, match="something else"):
        exp.write_sealed(tmp_path / "file", b"new")
    assert exp.read_sealed(tmp_path / "file") == b"old"


def test_the_previous_version_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for number in (1, 2, 3):
        exp.save_plain(path, {"number": number})
    assert exp.load_plain(path) == {"number": 3}
    assert exp.load_plain(exp.previous(path)) == {"number": 2}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_previous_version_is_kept_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(exp.os, "link", no_links)
    test_the_previous_version_is_kept(tmp_path)


def test_a_session_that_died_before_its_write_does_not_endanger_the_next(tmp_path: Path) -> None:
    """Then file and previous version are one file with two names, and a third name must not be left to write through."""
    path = tmp_path / "state"
    exp.save_plain(path, {"number": 1})
    exp.keep_previous(path)  # killed here

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with struck("half written", 1, kill), pytest.raises(Killed):
        exp.save_plain(path, {"number": 2})
    assert exp.load_plain(path) == exp.load_plain(exp.previous(path)) == {"number": 1}


# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["plain", "tensors"])
def test_every_damage_is_noticed(tmp_path: Path, kind: str, damage: str) -> None:
    path = tmp_path / "file"
    if kind == "plain":
        exp.save_plain(path, {"numbers": list(range(100))})
    else:
        exp.save_checkpoint(path, {"model": {"weight": torch.arange(100.0)}})
    DAMAGES[damage](path)
    load: Callable[[Path], Any] = exp.load_plain if kind == "plain" else exp.load_checkpoint
    with pytest.raises(exp.Damaged):
        load(path)


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """Whichever byte of a file is changed, and wherever it is cut: it is noticed."""
    path = tmp_path / "file"
    exp.write_sealed(path, b"some weights")
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 128):
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            with pytest.raises(exp.Damaged):
                exp.read_sealed(path)
        path.write_bytes(content[:position])
        with pytest.raises(exp.Damaged):
            exp.read_sealed(path)
    path.write_bytes(content + b" ")
    with pytest.raises(exp.Damaged):
        exp.read_sealed(path)


def test_torch_reads_a_checkpoint_too(tmp_path: Path) -> None:
    """The seal lies behind the zip, where torch does not look."""
    exp.save_checkpoint(tmp_path / "file", {"weight": torch.arange(3.0)})
    assert torch.load(tmp_path / "file", weights_only=True)["weight"].tolist() == [0, 1, 2]


class Persistent(pickle.Pickler):
    """A pickler whose pickles ask the reader for objects by name."""

    def persistent_id(self, obj: object) -> object:
        return "something" if obj == 1 else None


def test_a_sealed_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    witness, path = tmp_path / "executed", tmp_path / "file"
    exp.write_sealed(path, pickle.dumps({"jobs": Code(witness)}))
    with pytest.raises(exp.Damaged, match="refused"):
        exp.load_plain(path)
    exp.save_checkpoint(path, {"model": Code(witness)})
    with pytest.raises(exp.Damaged, match="not a safe torch file"):
        exp.load_checkpoint(path)
    with open(path, "wb") as file:
        Persistent(file).dump({"a": 1})
    exp.write_sealed(path, path.read_bytes())
    with pytest.raises(exp.Damaged, match="refused a persistent object"):
        exp.load_plain(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [[1], "text", None, {1, 2}])
def test_only_dictionaries_are_read(tmp_path: Path, content: object) -> None:
    exp.write_sealed(tmp_path / "plain", pickle.dumps(content))
    with pytest.raises(exp.Damaged):
        exp.load_plain(tmp_path / "plain")
    exp.save_checkpoint(tmp_path / "tensors", content)  # type: ignore[arg-type]
    with pytest.raises(exp.Damaged):
        exp.load_checkpoint(tmp_path / "tensors")


def test_an_unreadable_file_is_damaged_and_a_missing_one_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        exp.read_sealed(tmp_path / "file")
    exp.write_sealed(tmp_path / "file", b"content")
    forbid(monkeypatch, tmp_path / "file")
    with pytest.raises(exp.Damaged, match="cannot be read"):
        exp.read_sealed(tmp_path / "file")


# ---- Arbitrary content -----------------------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("EXAMPLES", "150"))  # EXAMPLES=20000 for a run of minutes, with new examples each time
ONCE = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=20,
)


@ONCE
@given(content=st.binary(max_size=300), sealed=st.booleans())
def test_arbitrary_bytes_are_damaged(tmp_path: Path, content: bytes, sealed: bool) -> None:
    path = tmp_path / "file"
    (exp.write_sealed if sealed else exp.write_atomic)(path, content)
    for load in (exp.load_plain, exp.load_checkpoint):
        try:
            assert isinstance(load(path), dict)
        except exp.Damaged:
            pass


@ONCE
@given(value=PLAIN, position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_altered_pickles_are_plain_or_damaged(tmp_path: Path, value: object, position: int, byte: int) -> None:
    """Sealed after the alteration: what the unpickler itself makes of it."""
    content = bytearray(pickle.dumps({"value": value}, protocol=4))
    content[position % len(content)] = byte
    exp.write_sealed(tmp_path / "file", bytes(content))
    try:
        assert isinstance(exp.load_plain(tmp_path / "file"), dict)
    except exp.Damaged:
        pass


@ONCE
@given(value=st.dictionaries(st.text(), PLAIN, max_size=5))
def test_plain_data_comes_back(tmp_path: Path, value: dict[str, Any]) -> None:
    exp.write_sealed(tmp_path / "file", pickle.dumps(value, protocol=4))
    assert repr(exp.load_plain(tmp_path / "file")) == repr(value)


def good_index() -> dict[str, Any]:
    """An index that is accepted."""
    chosen = exp.new_settings({"mode": "smoke"})
    return exp.new_index(chosen, "fp32", exp.describe_data(lab_data(), 42))


def test_a_new_index_is_accepted() -> None:
    exp.check_index(good_index())


@pytest.mark.parametrize("count", [9, 11])
def test_an_index_names_every_class_of_its_data_set(count: int) -> None:
    """Tables per class would be of another length."""
    index = good_index()
    index["data"] = {**index["data"], "classes": [str(number) for number in range(count)]}
    with pytest.raises(exp.Damaged, match=f"names {count} classes"):
        exp.check_index(index)


@pytest.mark.parametrize(
    "strange",
    [
        {"sessions": [1]},
        {"jobs": {"x": 5}},
        {"jobs": {"x": {"kind": "student"}}},
        {"merged": 5},
        {"merged": {"teachers": 1}},
        {"precision": "fp8"},
    ],
)
def test_a_strange_index_is_set_aside_and_rebuilt(copied: Path, toy_run: Path, redone: list[str], strange: dict[str, Any]) -> None:
    """Sealed and plain, but not what this script writes: no command falls over it."""
    path = copied / "checkpoints/experiment_state.pkl"
    strange = {**toy_index(copied), **strange}
    exp.previous(path).unlink()
    exp.save_plain(path, strange)
    assert exp.main(["--status", "--output-dir", str(copied)]) in (0, 2)
    assert exp.main(["--report-only", "--output-dir", str(copied)]) in (0, 2)
    assert resume(copied) in (0, 2)
    assert redone == []


@ONCE
@given(name=st.sampled_from([f.name for f in exp.dataclasses.fields(exp.Settings) if f.metadata["role"] != "session"]), value=PLAIN)
def test_stored_settings_are_read_or_refused(name: str, value: object) -> None:
    stored = exp.new_settings({"mode": "smoke"}).plain()
    try:
        read = exp.Settings.from_plain({**stored, name: value})
    except exp.UsageError:
        return
    assert set(read.compression) <= set(exp.RATIOS)
    assert set(read.methods) <= set(exp.METHODS)
    assert read.dataset in exp.DATASETS


@pytest.mark.parametrize("name", ["compression", "methods"])
def test_stored_settings_without_a_ratio_or_a_method_are_refused(name: str) -> None:
    """Nobody can ask for that, and a report of nothing cannot be drawn."""
    with pytest.raises(exp.UsageError, match="no ratio or no method"):
        exp.Settings.from_plain({**exp.new_settings({"mode": "smoke"}).plain(), name: []})


@pytest.mark.parametrize("evil", ["../../evil", "/etc", "5x/../.."])
@pytest.mark.parametrize("name", ["compression", "methods", "dataset", "mode"])
def test_stored_settings_lead_nowhere_outside(name: str, evil: str) -> None:
    stored = exp.new_settings({"mode": "smoke"}).plain()
    with pytest.raises(exp.UsageError, match="does not know"):
        exp.Settings.from_plain({**stored, name: [evil] if isinstance(stored[name], list) else evil})


# ---- Every file of a run, every damage -------------------------------------------------------------------------------


REPRESENTATIVE = ["empty", "cut at 50%", "bit at 30%", "a folder"]


@pytest.mark.parametrize("damage", REPRESENTATIVE)
@pytest.mark.parametrize("job", [TEACHER, INTERMEDIATE, PILOT, DIRECT, KD])
def test_a_damaged_model_is_set_aside_and_that_job_alone_is_redone(
    copied: Path, toy_run: Path, redone: list[str], job: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[damage](copied / f"checkpoints/{job}.pt")
    assert resume(copied) == 0
    assert redone == [job]
    assert f"{job}.pt " in capsys.readouterr().out
    assert leftovers(copied) == [f"checkpoints/{job}.pt.corrupt"] + (
        [f"checkpoints/{job}.pt.corrupt/something"] if damage == "a folder" else []
    )
    assert results_without_times(copied) == results_without_times(toy_run)


def test_damage_after_damage(copied: Path, redone: list[str]) -> None:
    """A folder in the place of a file whose damaged version was set aside before, and a file after a folder."""
    path = copied / f"checkpoints/{DIRECT}.pt"
    for damage in ("empty", "a folder", "a folder", "empty"):
        DAMAGES[damage](path)
        assert resume(copied) == 0
    assert redone == [DIRECT] * 4


def test_an_unreadable_model_is_set_aside(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, copied / f"checkpoints/{KD}.pt")
    collector = exp.Collector(exp.RunFolder(copied), toy_settings(copied), {**toy_index(copied), "jobs": {}}, None, False)
    collector.refresh()
    assert set(collector.state["jobs"]) == set(JOBS) - {KD}
    assert (copied / f"checkpoints/{KD}.pt.corrupt").exists()


def toy_index(folder: Path) -> dict[str, Any]:
    return exp.load_index(exp.RunFolder(folder), repair=False)


def toy_settings(folder: Path) -> exp.Settings:
    return exp.Settings.from_plain(toy_index(folder)["settings"])


@pytest.mark.parametrize("other", [TEACHER, INTERMEDIATE, KD])
def test_the_file_of_another_job_is_not_taken(copied: Path, toy_run: Path, redone: list[str], other: str) -> None:
    shutil.copyfile(copied / f"checkpoints/{other}.pt", copied / f"checkpoints/{DIRECT}.pt")
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("job", [TEACHER, INTERMEDIATE, PILOT, DIRECT, KD])
def test_the_file_of_another_run_is_not_taken(copied: Path, toy_run: Path, redone: list[str], job: str) -> None:
    """Sound, of the right job, but trained with other settings."""
    path = copied / f"checkpoints/{job}.pt"
    content = exp.load_checkpoint(path)
    exp.save_checkpoint(path, {**content, "record": {**content["record"], "fingerprint": "0" * 64}})
    assert resume(copied) == 0
    assert redone == [job]
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_student_of_another_teacher_is_not_taken(copied: Path, redone: list[str]) -> None:
    path = copied / f"checkpoints/{KD}.pt"
    content = exp.load_checkpoint(path)
    exp.save_checkpoint(path, {**content, "record": {**content["record"], "taught_by": {TEACHER: "0" * 64}}})
    assert resume(copied) == 0
    assert redone == [KD]


def test_a_student_of_another_chain_is_not_taken(copied: Path, redone: list[str]) -> None:
    """The teacher is this run's, the intermediate is not: on a GPU one that is trained again has other weights."""
    path = copied / f"checkpoints/{HPMKD}.pt"
    content = exp.load_checkpoint(path)
    assert content["record"]["taught_by"].keys() == {TEACHER, INTERMEDIATE}
    content["record"]["taught_by"][INTERMEDIATE] = "0" * 64
    exp.save_checkpoint(path, content)
    assert resume(copied) == 0
    assert redone == [HPMKD]


def test_weights_that_are_not_those_of_the_record_are_noticed(copied: Path, redone: list[str]) -> None:
    """The seal is right: somebody wrote it. One network in the place of another of the same run."""
    contents = {name: exp.load_checkpoint(copied / f"checkpoints/{name}.pt") for name in (DIRECT, KD)}
    exp.save_checkpoint(copied / f"checkpoints/{DIRECT}.pt", {**contents[DIRECT], "model": contents[KD]["model"]})
    assert resume(copied) == 0
    assert redone == [DIRECT]


def test_a_pilot_that_chooses_otherwise_the_second_time_gets_its_students_redone(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that can happen; within the session, or its students would be missed at its end."""
    path, student = copied / f"checkpoints/{PILOT}.pt", copied / f"checkpoints/{HPMKD}.pt"
    before = exp.load_checkpoint(path)["record"]
    other = 4 if before["chosen"] != 4 else 2

    def decide(candidates: int, _budget: int, _evaluate: object) -> exp.Halving:
        correct = {(0, candidate): np.array([True, False]) for candidate in range(candidates)}
        return exp.Halving([(1, list(range(candidates)))], correct, other, "decided by the test")

    monkeypatch.setattr(exp, "successive_halving", decide)
    path.unlink()
    assert resume(copied) == 0
    assert exp.load_checkpoint(path)["record"]["chosen"] == other
    assert exp.load_checkpoint(student)["record"]["config"] == before["candidates"][other]["config"]
    assert "6 of 6 jobs done" in (copied / "experiment.log").read_text().splitlines()[-1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_replaced_by_its_previous_version(copied: Path, toy_run: Path, redone: list[str], damage: str) -> None:
    DAMAGES[damage](copied / "checkpoints/experiment_state.pkl")
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("damage", ["removed", *REPRESENTATIVE])
def test_a_lost_index_is_rebuilt_from_the_models(
    copied: Path, toy_run: Path, redone: list[str], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without --output-dir: the teacher is what the run is found by. --status knows everything that is done."""
    for name in ("experiment_state.pkl", "experiment_state.pkl.previous"):
        path = copied / "checkpoints" / name
        path.unlink() if damage == "removed" else DAMAGES[damage](path)
    assert exp.main(["--status"]) == 0
    assert "6 of 6 jobs done" in capsys.readouterr().out
    assert exp.main(["--resume", "--threads", "1", "--device", "cpu"]) == 0
    assert "the index is lost; it is rebuilt from the model files" in capsys.readouterr().out
    assert "rebuilt from the model files" in (copied / "experiment_report.md").read_text()
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


def test_an_index_without_anything_else_is_not_started_over(copied: Path, redone: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    (copied / "checkpoints/experiment_state.pkl").write_bytes(b"")
    assert resume(copied) == 2
    assert "holds no run that can be continued" in capsys.readouterr().out.splitlines()[-1]
    assert redone == []


def test_the_index_of_another_run_is_not_taken(copied: Path, toy_run: Path, redone: list[str]) -> None:
    """Sound, but its settings are not those of the models beside it: they must not all be thrown away for it."""
    state = toy_index(copied)
    other = exp.replace(toy_settings(copied), seed=7)
    foreign = exp.new_index(other, state["precision"], state["data"])
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", foreign)
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", foreign)
    assert resume(copied) == 0
    assert redone == []
    assert toy_settings(copied).seed == 42
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_reused_teacher_does_not_bring_its_runs_settings_along(copied: Path, toy: Path) -> None:
    """The index that is stored with a teacher, from which a lost one is rebuilt, is that of the run that it was copied to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "work", lambda *_: "session clock")
        assert new_toy(toy / "other", "--student-epochs", "4") == 0
    for path in (toy / "other/checkpoints").glob("experiment_state*"):
        path.unlink()
    assert toy_settings(toy / "other").student_epochs == 4


@pytest.mark.parametrize("damage", ["empty", "bit at 30%", "a text"])
@pytest.mark.parametrize("name", ["results.csv", "experiment_report.md", "summary.csv"])
def test_results_are_written_anew(copied: Path, toy_run: Path, redone: list[str], name: str, damage: str) -> None:
    DAMAGES[damage](copied / name)
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)
    assert (copied / "summary.csv").read_bytes() == (toy_run / "summary.csv").read_bytes()


@pytest.mark.parametrize("name", ["results.csv", "experiment.log", "run.lock", "figures", "checkpoints"])
def test_something_else_in_the_place_of_an_output_is_one_line(
    copied: Path, redone: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder where a file belongs, or a file where a folder belongs."""
    if (copied / name).is_dir():
        shutil.rmtree(copied / name)
        (copied / name).write_text("")
    else:
        (copied / name).write_text("")
        make_folder(copied / name)
    assert resume(copied) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last or "holds no run to continue" in last


# ---- Failure records -------------------------------------------------------------------------------------------------


@pytest.fixture
def failed(copied: Path) -> Path:
    """A run in which the Direct student has failed; returns the failure record's path."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp.JobRunner, "run", diverge)
        assert resume(copied) == 1
    return copied / f"checkpoints/{DIRECT}.failed"


def diverge(_runner: exp.JobRunner) -> None:
    raise exp.Diverged("it diverged")


def test_what_may_succeed_the_next_time_is_tried_again(copied: Path, toy_run: Path, redone: list[str]) -> None:
    """A crash or a lack of memory is no verdict on the job: the next session does it, and the failure is forgotten."""
    (copied / f"checkpoints/{DIRECT}.pt").unlink()

    def crash(_runner: exp.JobRunner) -> None:
        raise exp.JobFailed("it ended its process 2 times")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp.JobRunner, "run", crash)
        assert resume(copied) == 1
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert not (copied / f"checkpoints/{DIRECT}.failed").exists()
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_failure_is_remembered(failed: Path, redone: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(failed.parent.parent) == 1
    assert redone == []
    assert f"1 failed ({DIRECT})" in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_failure_record_means_another_attempt(failed: Path, redone: list[str], damage: str) -> None:
    DAMAGES[damage](failed)
    assert resume(failed.parent.parent) == 0
    assert redone == [DIRECT]


@pytest.mark.parametrize("change", [{"job": KD}, {"fingerprint": "0"}, {"status": "done"}, {"reason": 5}, {"fingerprint": None}])
def test_the_failure_of_another_job_or_run_is_not_taken(failed: Path, redone: list[str], change: dict[str, Any]) -> None:
    exp.save_plain(failed, {**exp.load_plain(failed), **change})
    exp.previous(failed).unlink()
    assert resume(failed.parent.parent) == 0
    assert redone == [DIRECT]


# ---- Checkpoints in progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damaged", "epochs"), [((), [3]), (("progress",), [2, 3]), (("progress", "progress.previous"), [1, 2, 3])])
@pytest.mark.parametrize("damage", ["bit at 60%", "cut at 99%", "a folder"])
def test_a_damaged_checkpoint_in_progress_costs_an_epoch(
    half_trained: Path, toy: Path, toy_run: Path, damaged: tuple[str, ...], epochs: list[int], damage: str
) -> None:
    """The one before is used, and without it only this job starts over."""
    shutil.copytree(half_trained, toy / "run")
    before = len(epochs_in_log(toy / "run"))
    for name in damaged:
        DAMAGES[damage](toy / f"run/checkpoints/{DIRECT}.{name}")
    assert resume(toy / "run") == 0
    assert epochs_in_log(toy / "run")[before:] == [f"{DIRECT} epoch {number}" for number in epochs]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_the_checkpoint_of_another_job_or_run_is_not_continued(half_trained: Path, toy: Path, toy_run: Path) -> None:
    shutil.copytree(half_trained, toy / "run")
    progress = toy / f"run/checkpoints/{DIRECT}.progress"
    content = exp.load_checkpoint(progress)
    assert len(content["history"]) == 2
    for path in (progress, exp.previous(progress)):
        exp.save_checkpoint(path, {**content, "identity": "another's"})
    assert resume(toy / "run") == 0
    assert epochs_in_log(toy / "run")[-3:] == [f"{DIRECT} epoch {number}" for number in (1, 2, 3)]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


# ---- Teacher outputs -------------------------------------------------------------------------------------------------


def test_damaged_pages_of_teacher_outputs_are_computed_again(copied: Path, toy: Path, toy_run: Path) -> None:
    """A student needs three pages; of those that an earlier session left, the damaged and the lost one are computed, no other."""
    for expected in (3, 0, 2):
        (copied / f"checkpoints/{KD}.pt").unlink()
        with struck("a page of teacher outputs", 99, lambda: None) as visits:
            assert resume(copied) == 0
        assert visits == [expected]
        assert results_without_times(copied) == results_without_times(toy_run)
        pages = sorted(path for path in toy.glob("exp1b_teacher_outputs*/*/page_*") if path.suffix != ".lock")
        assert len(pages) == 3
        flip(pages[0], 0.6)
        if expected == 0:
            pages[1].unlink()
        else:
            flip(pages[0], 0.6)  # back again


# ---- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", REPRESENTATIVE)
def test_a_damaged_batch_of_data_is_fetched_again(copied: Path, toy_run: Path, redone: list[str], damage: str) -> None:
    batch = copied / "data/cifar-10-batches-py/data_batch_3"
    DAMAGES[damage](batch)
    code = resume(copied)
    assert code == (2 if damage == "a folder" else 0)
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_damaged_batch_without_a_source_is_one_line(
    copied: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exp, "_fetch", lambda url, pieces, over: pieces.put(OSError("no network")))
    flip(copied / "data/cifar-10-batches-py/data_batch_3", 0.5)
    assert resume(copied) == 2
    assert "switch Internet ON" in capsys.readouterr().out.splitlines()[-1]
    assert redone == []


def test_hostile_batches_of_data_are_not_executed(copied: Path, toy: Path, redone: list[str]) -> None:
    batch = copied / "data/cifar-10-batches-py/data_batch_3"
    batch.write_bytes(pickle.dumps({"data": Code(toy / "executed"), "labels": []}))
    assert resume(copied) == 0
    assert not (toy / "executed").exists()


# ---- Hostile files in every place ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["experiment_state.pkl", f"{TEACHER}.pt", f"{PILOT}.pt", f"{KD}.pt"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_hostile_file_is_refused_in_every_place(
    copied: Path, toy: Path, toy_run: Path, redone: list[str], name: str, sealed: bool
) -> None:
    """Everything that reads runs meets it: status, report, merge, resume, reuse of a teacher, memory."""
    payload = pickle.dumps({"record": Code(toy / "executed"), "jobs": Code(toy / "executed")}, protocol=2)
    path = copied / "checkpoints" / name
    (exp.write_sealed if sealed else exp.write_atomic)(path, payload)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert exp.main(["--merge", str(copied), "--output-dir", str(toy / "merged")]) in (0, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "work", lambda *_: "session clock")
        assert new_toy(toy / "new", "--memory", str(copied)) in (0, 2)
    assert resume(copied) == 0
    assert exp.main(["--report-only", "--output-dir", str(copied)]) == 0
    assert not (toy / "executed").exists()
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("name", [f"{DIRECT}.progress", f"{DIRECT}.progress.previous", f"{DIRECT}.failed"])
def test_a_hostile_file_in_progress_is_refused(half_trained: Path, toy: Path, toy_run: Path, name: str) -> None:
    shutil.copytree(half_trained, toy / "run")
    path = toy / "run/checkpoints" / name
    exp.write_sealed(path, pickle.dumps({"model": Code(toy / "executed")}, protocol=2))
    assert exp.main(["--status", "--output-dir", str(toy / "run")]) == 0
    assert resume(toy / "run") == 0
    assert not (toy / "executed").exists()
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_records_cannot_lead_outside(copied: Path, toy: Path, redone: list[str]) -> None:
    """Names of jobs and files in an index are not followed: the jobs are those of the settings, their files are named by them."""
    outside = toy / "outside"
    outside.mkdir()
    state = toy_index(copied)
    state["jobs"] |= {"../../../outside/evil": {**state["jobs"][KD], "file": "../../../outside/evil"}}
    for record in state["jobs"].values():
        record["file"] = "../../../outside/evil"
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", state)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert resume(copied) == 0
    assert toy_index(copied)["jobs"].keys() == set(JOBS)
    assert list(outside.iterdir()) == []


def test_a_link_that_leads_outside_is_replaced_and_not_written_through(copied: Path, toy: Path, redone: list[str]) -> None:
    outside = toy / "outside"
    outside.write_text("mine")
    for name in (f"checkpoints/{DIRECT}.pt", "results.csv"):
        (copied / name).unlink()
        (copied / name).symlink_to(outside)
    assert resume(copied) == 0
    assert outside.read_text() == "mine"
    assert redone == [DIRECT]


# ---- The lock --------------------------------------------------------------------------------------------------------


def holder(path: Path, **changes: Any) -> None:
    """Write a lock: of this machine and process 1, alive a moment ago, unless changed."""
    path.touch()
    mine = {"host": exp.socket.gethostname(), "boot": exp.boot_id(), "pid": 1, "inode": path.stat().st_ino}
    path.write_text(exp.json.dumps({**mine, **changes}))


@pytest.mark.parametrize(
    ("changes", "age", "refused"),
    [
        ({}, 0, True),
        ({}, 299, True),
        ({}, 301, False),  # no sign of life for five minutes
        ({"pid": 2**22 + 1}, 0, False),  # same machine, no such process
        ({"pid": os.getpid()}, 0, False),  # a number that this process got again
        ({"boot": "before the restart"}, 0, True),  # may be another machine with the same name
        ({"boot": "before the restart", "pid": 2**22 + 1}, 301, False),
        ({"host": "elsewhere", "pid": 2**22 + 1}, 0, True),
        ({"host": "elsewhere"}, 301, False),
        ({"inode": 5}, 0, False),  # copied along with the folder
    ],
)
def test_a_lock_is_respected_while_its_process_lives(tmp_path: Path, changes: dict[str, Any], age: float, refused: bool) -> None:
    lock = exp.RunLock(exp.RunFolder(tmp_path))
    holder(lock.path, **changes)
    os.utime(lock.path, (time.time() - age,) * 2)
    if refused:
        with pytest.raises(exp.UsageError, match="is in use by process"):
            lock.acquire()
        lock.release()
        assert lock.path.exists(), "a lock that was not taken is not given back"
    else:
        lock.acquire()
        lock.release()
        assert not lock.path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "a"}', '{"host": 1, "boot": 2, "pid": "x", "inode": null}', "\udcff"])
def test_an_unreadable_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    lock = exp.RunLock(exp.RunFolder(tmp_path))
    lock.path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(exp.UsageError, match="at this moment"):
        lock.acquire()  # its owner may be about to write it
    os.utime(lock.path, (time.time() - 10,) * 2)
    lock.acquire()
    lock.release()
    assert not lock.path.exists()


def test_a_lock_copied_along_with_a_run_is_ignored(copied: Path, toy: Path, redone: list[str]) -> None:
    holder(copied / "run.lock")
    assert resume(copied) == 2
    shutil.copytree(copied, toy / "copy")
    assert resume(toy / "copy") == 0


def test_a_refused_process_changes_nothing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder(copied / "run.lock", host="elsewhere", pid=77)
    before = tree(copied)
    assert resume(copied) == 2
    assert exp.main(["--report-only", "--output-dir", str(copied)]) == 2
    assert "is in use by process 77 on host elsewhere" in capsys.readouterr().out.splitlines()[-1]
    assert tree(copied) == before


# ---- Other versions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["--resume", "--status", "--report-only"])
def test_a_run_of_another_format_is_refused_untouched(copied: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the rest of the index is laid out otherwise: it must not be taken for damaged and set aside."""
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", {"format": 2, "everything": "elsewhere"})
    before = tree(copied / "checkpoints")
    assert exp.main([action, "--output-dir", str(copied)]) == 2
    assert "written in format 2, this script knows format 1" in capsys.readouterr().out.splitlines()[-1]
    assert tree(copied / "checkpoints") == before


@pytest.mark.parametrize("action", ["--resume", "--report-only"])
def test_a_run_of_another_protocol_is_refused_untouched(
    copied: Path, action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script whose seeds produce something else must not throw the finished models away."""
    monkeypatch.setattr(exp, "PROTOCOL", exp.PROTOCOL + 1)
    before = tree(copied / "checkpoints")
    assert exp.main([action, "--output-dir", str(copied)]) == 2
    assert "computes something else" in capsys.readouterr().out.splitlines()[-1]
    assert tree(copied / "checkpoints") == before


def test_a_run_with_a_setting_that_is_missing_or_unknown(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = toy_index(copied)
    del state["settings"]["width"]
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", state)
    assert resume(copied) == 2
    assert "another version" in capsys.readouterr().out.splitlines()[-1]
