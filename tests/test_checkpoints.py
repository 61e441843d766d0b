"""What is on the disk: whole or not there, verified when it is read, never executed; every damage of every file."""

from __future__ import annotations

import errno
import functools
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results_without_times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import lab_data, shortcuts
from toy import (
    ASSISTANT,
    DAMAGES,
    DIRECT,
    HPMKD,
    JOBS,
    KD,
    PILOT,
    SECOND_ASSISTANT,
    TEACHER,
    Code,
    epochs_in_log,
    flip,
    forbid,
    leftovers,
    make_folder,
    new_toy,
    resume,
    stopped_at_once,
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
    with pytest.raises(exp.Damaged, match="persistent"):
        exp.load_plain(path)
    assert not witness.exists()


@pytest.mark.parametrize("content", [[1], "text", None, {1, 2}])
def test_a_checkpoint_is_a_dictionary(tmp_path: Path, content: object) -> None:
    exp.save_checkpoint(tmp_path / "tensors", content)  # type: ignore[arg-type]
    with pytest.raises(exp.Damaged):
        exp.load_checkpoint(tmp_path / "tensors")


def test_an_error_of_the_system_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stale handle, too many open files ...: it is tried again, said once, and if it lasts one line says what to do."""
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        exp.read_sealed(path)
    exp.write_sealed(path, b"content")
    exp.start_logging(None)
    with monkeypatch.context() as patch:
        assert len(forbid(patch, path, 4)) == 0
        assert exp.read_sealed(path) == b"content"
        assert exp.read_sealed(path) == b"content"
    assert (
        capsys.readouterr().out.count(f"{path} cannot be opened now (Stale file handle): trying again") == 1
    )
    forbid(monkeypatch, path)
    with pytest.raises(exp.UsageError, match=f"cannot open {path} .*--resume"):
        exp.read_sealed(path)


def test_a_path_through_a_file_is_missing_and_a_folder_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError):
        exp.read_sealed(tmp_path / "file/inside")
    with pytest.raises(exp.Damaged):
        exp.read_sealed(tmp_path)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_a_run_that_cannot_be_looked_at_is_not_started_over(
    copied: Path, redone: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:  # fmt: skip
    """A new run in its place would throw it away."""

    def refused(_: Path) -> list[str]:
        raise OSError(number, os.strerror(number))

    before = tree(copied)
    monkeypatch.setattr(exp.os, "listdir", refused)
    monkeypatch.setattr(exp, "READ_PAUSES", (0.0,))
    assert new_toy(copied) == 2
    assert "cannot open" in capsys.readouterr().out.splitlines()[-1]
    assert tree(copied) == before


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
            assert is_plain(load(path))
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
        assert is_plain(exp.load_plain(tmp_path / "file"))
    except exp.Damaged:
        pass


def is_plain(value: object) -> bool:
    """Whether a value is made of builtin types alone."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    parts = inner if isinstance(inner, list | tuple | set | frozenset) else []
    return type(value).__module__ == "builtins" and not callable(value) and all(map(is_plain, parts))


@ONCE
@given(value=st.dictionaries(st.text(), PLAIN, max_size=5))
def test_plain_data_comes_back(tmp_path: Path, value: dict[str, Any]) -> None:
    exp.write_sealed(tmp_path / "file", pickle.dumps(value, protocol=4))
    assert repr(exp.load_plain(tmp_path / "file")) == repr(value)


# ---- The index -----------------------------------------------------------------------------------------------


@functools.cache
def new_index() -> exp.Index:
    """An index of a run that has nothing yet."""
    return exp.new_index(exp.new_settings({"mode": "smoke"}), "fp32", exp.describe_data(lab_data(), 42), {})


def good_index() -> dict[str, Any]:
    """An index that is accepted, as it is stored."""
    plain: dict[str, Any] = exp.to_plain(new_index())
    return plain


def stored_index(folder: Path) -> dict[str, Any]:
    """The index of a run, as it is stored."""
    content: dict[str, Any] = exp.load_plain(folder / "checkpoints" / exp.STATE_NAME)
    return content


def store_index(folder: Path, **changes: Any) -> None:
    """Write a run's index with these changes, sealed."""
    exp.save_plain(folder / "checkpoints" / exp.STATE_NAME, {**stored_index(folder), **changes})


def test_a_new_index_is_accepted() -> None:
    assert exp.to_plain(exp.index_from_plain(good_index(), {})) == good_index()


@pytest.mark.parametrize("count", [9, 11])
def test_an_index_names_every_class_of_its_data_set(count: int) -> None:
    """Tables per class would be of another length."""
    index = good_index()
    index["data"] |= {"classes": [str(number) for number in range(count)]}
    with pytest.raises(exp.Damaged):
        exp.index_from_plain(index, {})


STRANGE: list[dict[str, Any]] = [
    {"sessions": [1]}, {"jobs": {"x": 5}}, {"jobs": {"x": {"kind": "student"}}},
    {"precision": "fp8"}, {"equal_cost_epochs": []}, {"settings": None}, {"data": {}}, {"unknown": 1},
]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE, ids=str)
def test_a_strange_index_ends_no_command(copied: Path, redone: list[str], strange: dict[str, Any]) -> None:
    """Sealed and plain, but not what this script writes: it is taken from its copy, or refused in one line."""
    store_index(copied, **strange)
    codes = [exp.main([action, "--output-dir", str(copied)]) for action in ("--status", "--report-only")]
    codes.append(resume(copied))
    assert set(codes) in ({0}, {2})
    assert redone == []
    assert not list(copied.rglob("*.corrupt"))


@ONCE
@given(name=st.sampled_from(exp.setting_names("experiment") + exp.setting_names("scope")), value=PLAIN)
def test_stored_settings_are_read_or_refused(name: str, value: object) -> None:
    index = good_index()
    index["settings"][name] = value
    try:
        read = exp.index_from_plain(index, {}).settings
    except (exp.UsageError, exp.Damaged):
        return
    assert set(read.compression) <= set(exp.RATIOS)
    assert set(read.methods) <= set(exp.METHODS)
    assert read.dataset in exp.DATASETS
    assert exp.planned_jobs(read)


@pytest.mark.parametrize("name", ["compression", "methods"])
def test_stored_settings_without_a_ratio_or_a_method_are_refused(name: str) -> None:
    """Nobody can ask for that, and a report of nothing cannot be drawn."""
    index = good_index()
    index["settings"][name] = []
    with pytest.raises((exp.UsageError, exp.Damaged)):
        exp.index_from_plain(index, {})


@pytest.mark.parametrize("evil", ["../../evil", "/etc", "5x/../.."])
@pytest.mark.parametrize("name", ["compression", "methods", "dataset", "mode"])
def test_stored_settings_lead_nowhere_outside(name: str, evil: str) -> None:
    index = good_index()
    index["settings"][name] = [evil] if isinstance(index["settings"][name], list) else evil
    with pytest.raises((exp.UsageError, exp.Damaged)):
        exp.index_from_plain(index, {})


@pytest.mark.parametrize("damage", [*DAMAGES, "removed"])
def test_a_damaged_index_is_taken_from_its_copy(
    copied: Path, toy_run: Path, redone: list[str], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without --output-dir. It is said, and nothing is trained again."""
    path = copied / "checkpoints" / exp.STATE_NAME
    path.unlink() if damage == "removed" else DAMAGES[damage](path)
    code = exp.main(["--resume", "--threads", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    if damage == "a folder":
        assert (code, path.name in out.splitlines()[-1]) == (2, True)
        return
    assert code == 0
    assert "is lost; it is taken from experiment_state.pkl.bak" in out
    assert "The index was lost and taken from" in (copied / "experiment_report.md").read_text()
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_run_with_a_copied_index_alone_is_found_and_dated(copied: Path) -> None:
    """`show_results` asks for the date of every run."""
    (copied / "checkpoints" / exp.STATE_NAME).unlink()
    assert exp.is_run(copied)
    assert exp.last_activity(copied) == exp.load_index(copied, {}).sessions[-1].started


@pytest.mark.parametrize("action", ["--resume", "--status", "--report-only"])
def test_an_index_that_is_lost_with_its_copy_is_one_line(
    copied: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    """Nothing is started over and nothing removed: the models can still be read."""
    for path in (copied / "checkpoints").glob("experiment_state*"):
        path.write_bytes(b"")
    before = tree(copied)
    assert exp.main([action, "--output-dir", str(copied)]) == 2
    assert "no sound experiment_state.pkl, nor its copy .bak" in capsys.readouterr().out.splitlines()[-1]
    assert tree(copied / "checkpoints") == {
        name.removeprefix("checkpoints/"): value
        for name, value in before.items()
        if name.startswith("checkpoints/")
    }


def test_status_of_a_run_without_an_index(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows everything that is done, and touches nothing."""
    (copied / "checkpoints" / exp.STATE_NAME).unlink()
    before = tree(copied)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert f"{len(JOBS)} of {len(JOBS)} jobs done" in capsys.readouterr().out
    assert tree(copied) == before


def test_an_index_without_anything_else_is_not_started_over(
    copied: Path, redone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").mkdir()
    (copied / "checkpoints" / exp.STATE_NAME).write_bytes(b"")
    assert resume(copied) == 2
    assert "holds no run that can be continued" in capsys.readouterr().out.splitlines()[-1]
    assert redone == []


def test_the_index_of_another_run_throws_nothing_away(copied: Path, redone: list[str]) -> None:
    """Sound, but its settings are not those of the models beside it."""
    state = stored_index(copied)
    index = exp.index_from_plain(state, {})
    other = exp.new_index(exp.replace(index.settings, seed=7), index.precision, index.data, {})
    exp.save_plain(copied / "checkpoints" / exp.STATE_NAME, exp.to_plain(other))
    before = {name: value for name, value in tree(copied / "checkpoints").items() if name.endswith(".pt")}
    assert resume(copied) in (0, 2)
    assert redone == []
    after = {name: value for name, value in tree(copied / "checkpoints").items() if name.endswith(".pt")}
    assert after == before


# ---- Every file of a run, every damage -----------------------------------------------------------------------

REPRESENTATIVE = ["empty", "cut at 50%", "bit at 30%", "a folder"]
CASES = [(TEACHER, d) for d in REPRESENTATIVE] + [
    (ASSISTANT, "bit at 60%"), (PILOT, "empty"), (PILOT, "a folder"), (DIRECT, "cut at 99%"), (KD, "a text"),
    (HPMKD, "bit at 100%"),
]  # fmt: skip


@pytest.mark.parametrize(("job", "damage"), CASES)
def test_a_damaged_model_is_set_aside_and_its_job_done_again(
    copied: Path, toy_run: Path, redone: list[str], job: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """That job alone."""
    DAMAGES[damage](copied / f"checkpoints/{job}.pt")
    assert resume(copied) == 0
    assert redone == [job]
    assert f"{job}.pt " in capsys.readouterr().out
    inside = [f"checkpoints/{job}.pt.corrupt/something"] if damage == "a folder" else []
    assert leftovers(copied) == [f"checkpoints/{job}.pt.corrupt", *inside]
    assert results_without_times(copied) == results_without_times(toy_run)


def test_a_model_that_cannot_be_read_now_is_not_done_again(
    copied: Path, toy_run: Path, redone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is read when that is possible; if it never is, one line says so, and all files stay as they are."""
    path = copied / f"checkpoints/{TEACHER}.pt"
    before = tree(copied / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch, path)
        assert resume(copied) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"cannot open {path} (" in last and "nothing is lost" in last
    assert tree(copied / "checkpoints") == before
    with pytest.MonkeyPatch.context() as patch:
        assert forbid(patch, path, 3) == []
        assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("other", [TEACHER, ASSISTANT, KD])
def test_the_file_of_another_job_is_not_taken(
    copied: Path, toy_run: Path, redone: list[str], other: str
) -> None:
    shutil.copyfile(copied / f"checkpoints/{other}.pt", copied / f"checkpoints/{DIRECT}.pt")
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert results_without_times(copied) == results_without_times(toy_run)


def edit_record(folder: Path, job: str, **changes: Any) -> None:
    """Change a job's record in its file, sealed."""
    path = folder / f"checkpoints/{job}.pt"
    content = exp.load_checkpoint(path)
    exp.save_checkpoint(path, {**content, "record": {**content["record"], **changes}})


@pytest.mark.parametrize("job", [TEACHER, ASSISTANT, PILOT, DIRECT, KD])
def test_the_file_of_another_run_is_not_taken(
    copied: Path, toy_run: Path, redone: list[str], job: str
) -> None:
    """Sound, of the right job, but trained with other settings."""
    edit_record(copied, job, fingerprint="0" * 64)
    assert resume(copied) == 0
    assert redone == [job]
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize(
    ("job", "teacher"),
    [(KD, TEACHER), (ASSISTANT, TEACHER), (SECOND_ASSISTANT, ASSISTANT), (HPMKD, SECOND_ASSISTANT)],
)
def test_a_student_of_another_chain_is_not_taken(
    copied: Path, redone: list[str], job: str, teacher: str
) -> None:
    """On a GPU, a teacher or assistant that is trained again has other weights."""
    taught_by = exp.load_checkpoint(copied / f"checkpoints/{job}.pt")["record"]["taught_by"]
    edit_record(copied, job, taught_by={**taught_by, teacher: "0" * 64})
    assert teacher in taught_by
    assert resume(copied) == 0
    assert redone == [job]


def test_weights_that_are_not_those_of_the_record_are_noticed(copied: Path, redone: list[str]) -> None:
    """The seal is right: somebody wrote it. One network in the place of another of the same run."""
    contents = {name: exp.load_checkpoint(copied / f"checkpoints/{name}.pt") for name in (DIRECT, KD)}
    mixed = {**contents[DIRECT], "model": contents[KD]["model"]}
    exp.save_checkpoint(copied / f"checkpoints/{DIRECT}.pt", mixed)
    assert resume(copied) == 0
    assert redone == [DIRECT]


def test_a_pilot_that_chooses_otherwise_the_second_time_gets_its_students_redone(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that can happen; within the session, or its students would be missed at its end."""
    path, student = copied / f"checkpoints/{PILOT}.pt", copied / f"checkpoints/{HPMKD}.pt"
    before = exp.load_checkpoint(path)["record"]
    other = 2 if before["chosen"] != 2 else 1
    path.unlink()
    with shortcuts(other):
        assert resume(copied) == 0
    assert exp.load_checkpoint(path)["record"]["chosen"] == other
    config = exp.load_checkpoint(student)["record"]["config"]
    assert config == before["candidates"][other]["config"]
    assert f"{len(JOBS)} of {len(JOBS)} jobs done" in capsys.readouterr().out.splitlines()[-1]


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


@pytest.mark.parametrize("name", ["results.csv", "run.lock", "figures", "checkpoints"])
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
    code, out = resume(copied), capsys.readouterr().out
    last = out.splitlines()[-1]
    if name == "run.lock":  # a folder that cannot be locked is no reason to train nothing
        assert (code, "files cannot be locked" in out) == (0, True)
    else:
        assert code == 2
        assert last.startswith("error: ")
        assert name in last or "holds no run to continue" in last
    assert redone == []


def test_a_log_that_cannot_be_opened_costs_no_training(
    copied: Path, toy_run: Path, redone: list[str]
) -> None:
    make_folder(copied / "experiment.log")
    assert resume(copied) == 0
    assert results_without_times(copied) == results_without_times(toy_run)


# ---- Failure records -----------------------------------------------------------------------------------------


def fail(folder: Path, job: str, final: bool) -> Path:
    """Let a job of a finished run have failed; returns the failure record's path."""
    error: exp.JobFailed = exp.Diverged("it diverged") if final else exp.JobFailed("it ended its process")

    def failing(*_: object) -> None:
        raise error

    (folder / f"checkpoints/{job}.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "do_job", failing)
        assert resume(folder) == 1
    return folder / f"checkpoints/{job}.failed"


@pytest.fixture
def failed(copied: Path) -> Path:
    """A run in which the Direct student has diverged; returns the failure record's path."""
    return fail(copied, DIRECT, True)


def test_what_may_succeed_the_next_time_is_tried_again(
    copied: Path, toy_run: Path, request: pytest.FixtureRequest
) -> None:
    """A crash or a lack of memory is no verdict on the job: the next session does it, and the failure is forgotten."""
    path = fail(copied, DIRECT, False)
    redone = request.getfixturevalue("redone")
    assert path.exists()
    assert resume(copied) == 0
    assert redone == [DIRECT]
    assert not path.exists()
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


@pytest.mark.parametrize(
    "change",
    [{"job": KD}, {"fingerprint": "0"}, {"failure": ""}, {"failure": 5}, {"fingerprint": None}],
    ids=str,
)
def test_the_failure_of_another_job_or_run_is_not_taken(
    failed: Path, redone: list[str], change: dict[str, Any]
) -> None:
    exp.save_plain(failed, {**exp.load_plain(failed), **change})
    assert resume(failed.parent.parent) == 0
    assert redone == [DIRECT]


# ---- Logits --------------------------------------------------------------------------------------------------


def test_logits_are_kept_in_half_precision_and_only_where_the_report_is_written(copied: Path) -> None:
    """600 MB per process they would be, for all arms on CIFAR-100."""
    index = exp.load_index(copied, {})
    for labels, count in ((None, 0), (np.zeros(0), len(JOBS) - 1)):  # a pilot has none
        run = exp.Run(copied, index, labels)
        run.refresh(touch=False)
        assert len(run.records) == len(JOBS)
        assert [values.dtype for values in run.logits.values()] == [np.float16] * count


# ---- Checkpoints in progress ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit at 60%", "cut at 99%", "a folder"])
def test_a_damaged_checkpoint_in_progress_costs_its_job(
    half_trained: Path, toy: Path, toy_run: Path, damage: str
) -> None:
    """Only this job starts over."""
    shutil.copytree(half_trained, toy / "run")
    before = len(epochs_in_log(toy / "run"))
    DAMAGES[damage](toy / f"run/checkpoints/{DIRECT}.progress")
    assert resume(toy / "run") == 0
    assert epochs_in_log(toy / "run")[before:] == [f"{DIRECT} epoch {number}" for number in (1, 2, 3)]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "the identity of another": lambda content: content.update(identity="another's"),
    "no momentum": lambda content: content.pop("momentum"),
    "momentum of fewer parameters": lambda content: content["momentum"].popitem(),
    "momentum under another name": lambda content: content["momentum"].update(x=torch.zeros(1)),
    "momentum of another shape": lambda content: content["momentum"].update(
        {name: torch.zeros(1) for name in content["momentum"]}
    ),
    "momentum that is no tensor": lambda content: content["momentum"].update(
        dict.fromkeys(content["momentum"])
    ),
    "momentum of another type": lambda content: content["momentum"].update(
        {name: value.double() for name, value in content["momentum"].items()}
    ),
    "an optimizer's own state": lambda content: content.update(momentum={"state": {}, "param_groups": []}),
    "a list for momentum": lambda content: content.update(momentum=[]),
    "a model without a layer": lambda content: content["trained"].popitem(),
    "no scaler": lambda content: content.pop("scaler"),
    "a strange scaler": lambda content: content.update(scaler={"scale": "large"}),
    "a history that is too long": lambda content: content.update(history=content["history"] * 2),
    "a strange history": lambda content: content.update(history=[{"loss": "small"}]),
    "no seconds": lambda content: content.update(seconds=None),
    "a micro-batch of nothing": lambda content: content.update(micro_batch=0),
}


@pytest.mark.parametrize("state", STATES)
def test_a_sealed_checkpoint_with_strange_state_counts_as_damaged(
    half_trained: Path, toy: Path, toy_run: Path, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also that of the optimizer: it is set aside, and the job starts over and does not fail."""
    shutil.copytree(half_trained, toy / "run")
    before = len(epochs_in_log(toy / "run"))
    progress = toy / f"run/checkpoints/{DIRECT}.progress"
    content = exp.load_checkpoint(progress)
    STATES[state](content)
    exp.save_checkpoint(progress, content)
    assert resume(toy / "run") == 0
    assert f"set aside as {progress.name}.corrupt" in capsys.readouterr().out
    assert epochs_in_log(toy / "run")[before:] == [f"{DIRECT} epoch {number}" for number in (1, 2, 3)]
    assert results_without_times(toy / "run") == results_without_times(toy_run)


# ---- Data ----------------------------------------------------------------------------------------------------


def test_a_damaged_archive_of_data_is_fetched_again(
    copied: Path, toy_run: Path, redone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Or, where there is no source, one line says what to do."""
    (archive,) = (copied / "data").glob("*.tar.gz")
    flip(archive, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "fetch", no_network)
        assert resume(copied) == 2
    assert "switch Internet on" in capsys.readouterr().out.splitlines()[-1]
    assert resume(copied) == 0
    assert redone == []
    assert results_without_times(copied) == results_without_times(toy_run)


def no_network(*_: object) -> None:
    raise OSError("no network")


# ---- Hostile files in every place ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sealed"),
    [
        (exp.STATE_NAME, True),
        (exp.STATE_NAME, False),
        (f"{TEACHER}.pt", True),
        (f"{PILOT}.pt", True),
        (f"{KD}.pt", False),
    ],
)
def test_a_hostile_file_is_refused_in_every_place(
    copied: Path, toy: Path, toy_run: Path, redone: list[str], name: str, sealed: bool
) -> None:
    """Everything that reads runs meets it: status, report, merge, resume, reuse of a teacher."""
    payload = pickle.dumps({"record": Code(toy / "executed"), "format": Code(toy / "executed")}, protocol=2)
    path = copied / "checkpoints" / name
    (exp.write_sealed if sealed else exp.write_atomic)(path, payload)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert exp.main(["--merge", str(copied), "--output-dir", str(toy / "merged")]) in (0, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "work", stopped_at_once)
        assert new_toy(toy / "new") == 0
    assert resume(copied) == 0
    assert exp.main(["--report-only", "--output-dir", str(copied)]) == 0
    assert not (toy / "executed").exists()
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("name", [f"{DIRECT}.progress", f"{DIRECT}.failed"])
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


def test_records_cannot_lead_outside(copied: Path, toy: Path, redone: list[str]) -> None:
    """Names of jobs in an index are not followed: the jobs are those of the settings, their files are named by them."""
    outside = toy / "outside"
    outside.mkdir()
    jobs = stored_index(copied)["jobs"]
    evil = {"../../../outside/evil": {**jobs[KD], "job": "../../../outside/evil"}}
    store_index(copied, jobs={**jobs, **evil})
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert resume(copied) == 0
    assert stored_index(copied)["jobs"].keys() == set(JOBS)
    assert list(outside.iterdir()) == []


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


# ---- Other versions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["--resume", "--status", "--report-only"])
@pytest.mark.parametrize(
    "content",
    [
        {"format": 9, "version": "9.0"},
        {"format": 2, "version": "2.0.0", "jobs": {}},
        {"format": 1, "everything": "elsewhere"},
    ],
    ids=["later", "version 2", "version 1"],
)
def test_a_run_of_another_format_is_refused_untouched(
    copied: Path, action: str, content: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the rest of the index is laid out otherwise: it must not be taken for damaged."""
    exp.save_plain(copied / "checkpoints" / exp.STATE_NAME, content)
    before = tree(copied / "checkpoints")
    assert exp.main([action, "--output-dir", str(copied)]) == 2
    version = content.get("version", "1")
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"written by version {version} of this script, whose files are others than those of {exp.VERSION}"
        in last
    )
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
