"""What is on the disk: whole or not there, verified when it is read, never executed; every damage of every file."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import results_without_times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import lab_data
from toy import (
    ASSISTANT,
    DAMAGES,
    DIRECT,
    KD,
    PILOT,
    TEACHER,
    Code,
    epochs_in_log,
    forbid,
    leftovers,
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
@pytest.mark.parametrize(
    ("code", "expected"),
    [(errno.ENOSPC, exp.DiskFull), (errno.EDQUOT, exp.DiskFull), (errno.EROFS, exp.UsageError)],
)
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, point: str, code: int, expected: type[Exception]
) -> None:
    def fail() -> None:
        raise OSError(code, os.strerror(code))

    exp.write_sealed(tmp_path / "file", b"old")
    with struck(point, 1, fail), pytest.raises(expected, match="file"):
        exp.write_sealed(tmp_path / "file", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert exp.read_sealed(tmp_path / "file") == b"old"


def test_a_disk_that_returns_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exp.write_sealed(tmp_path / "file", b"old")
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path)[:-1] if path.suffix == ".tmp" else read(path)
    )
    with pytest.raises(exp.UsageError, match="something else"):
        exp.write_sealed(tmp_path / "file", b"new")
    assert exp.read_sealed(tmp_path / "file") == b"old"


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


def test_an_unreadable_file_is_damaged_and_a_missing_one_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        exp.read_sealed(tmp_path / "file")
    exp.write_sealed(tmp_path / "file", b"content")
    forbid(monkeypatch, tmp_path / "file")
    with pytest.raises(exp.Damaged, match="cannot be read"):
        exp.read_sealed(tmp_path / "file")


# ---- Arbitrary content -----------------------------------------------------------------------------------------------

EXAMPLES = int(
    os.environ.get("EXAMPLES", "150")
)  # EXAMPLES=20000 for a run of minutes, with new examples each time
ONCE = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
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
def test_altered_pickles_are_plain_or_damaged(
    tmp_path: Path, value: object, position: int, byte: int
) -> None:
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


# ---- Every file of a run, every damage -------------------------------------------------------------------------------


REPRESENTATIVE = ["empty", "cut at 50%", "bit at 30%", "a folder"]


@pytest.mark.parametrize("damage", REPRESENTATIVE)
@pytest.mark.parametrize("job", [TEACHER, ASSISTANT, PILOT, DIRECT, KD])
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


def toy_index(folder: Path) -> dict[str, Any]:
    return exp.load_index(exp.RunFolder(folder), repair=False)


def toy_settings(folder: Path) -> exp.Settings:
    return exp.Settings.from_plain(toy_index(folder)["settings"])


@pytest.mark.parametrize("other", [TEACHER, ASSISTANT, KD])
def test_the_file_of_another_job_is_not_taken(
    copied: Path, toy_run: Path, redone: list[str], other: str
) -> None:
    shutil.copyfile(copied / f"checkpoints/{other}.pt", copied / f"checkpoints/{DIRECT}.pt")
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("job", [TEACHER, ASSISTANT, PILOT, DIRECT, KD])
def test_the_file_of_another_run_is_not_taken(
    copied: Path, toy_run: Path, redone: list[str], job: str
) -> None:
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


def test_weights_that_are_not_those_of_the_record_are_noticed(copied: Path, redone: list[str]) -> None:
    """The seal is right: somebody wrote it. One network in the place of another of the same run."""
    contents = {name: exp.load_checkpoint(copied / f"checkpoints/{name}.pt") for name in (DIRECT, KD)}
    exp.save_checkpoint(
        copied / f"checkpoints/{DIRECT}.pt", {**contents[DIRECT], "model": contents[KD]["model"]}
    )
    assert resume(copied) == 0
    assert redone == [DIRECT]


def test_an_index_without_anything_else_is_not_started_over(
    copied: Path, redone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    (copied / "checkpoints/experiment_state.pkl").write_bytes(b"")
    assert resume(copied) == 2
    assert "holds no run that can be continued" in capsys.readouterr().out.splitlines()[-1]
    assert redone == []


@pytest.mark.parametrize("damage", ["empty", "bit at 30%", "a text"])
@pytest.mark.parametrize("name", ["results.csv", "experiment_report.md", "summary.csv"])
def test_results_are_written_anew(
    copied: Path, toy_run: Path, redone: list[str], name: str, damage: str
) -> None:
    DAMAGES[damage](copied / name)
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)
    assert (copied / "summary.csv").read_bytes() == (toy_run / "summary.csv").read_bytes()


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


# ---- Checkpoints in progress -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damaged", "epochs"),
    [((), [3]), (("progress",), [2, 3]), (("progress", "progress.previous"), [1, 2, 3])],
)
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


def test_the_checkpoint_of_another_job_or_run_is_not_continued(
    half_trained: Path, toy: Path, toy_run: Path
) -> None:
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


# ---- Data ------------------------------------------------------------------------------------------------------------


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
def test_a_hostile_file_in_progress_is_refused(
    half_trained: Path, toy: Path, toy_run: Path, name: str
) -> None:
    shutil.copytree(half_trained, toy / "run")
    path = toy / "run/checkpoints" / name
    exp.write_sealed(path, pickle.dumps({"model": Code(toy / "executed")}, protocol=2))
    assert exp.main(["--status", "--output-dir", str(toy / "run")]) == 0
    assert resume(toy / "run") == 0
    assert not (toy / "executed").exists()
    assert results_without_times(toy / "run") == results_without_times(toy_run)


def test_a_link_that_leads_outside_is_replaced_and_not_written_through(
    copied: Path, toy: Path, redone: list[str]
) -> None:
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


# ---- Other versions --------------------------------------------------------------------------------------------------


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
