"""Files that are sealed and plain, but whose content is not what this script writes: noticed, and never the end of a report."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import results_without_times
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from toy import DIRECT, HPMKD, KD, PILOT, TEACHER, leftovers, resume

import run_exp1b_kaggle as exp

# ---- Shapes ----------------------------------------------------------------------------------------------------------

FITS: list[tuple[Any, list[Any], list[Any]]] = [
    (str, ["", "a"], [1, None, b"a", ["a"]]),
    (bool, [True], [1, "", None]),
    (float, [1, 1.5, -1e15, float("nan")], [True, "1", None, float("inf"), 10**400, [1.0]]),
    (range(1, 5), [1, 4], [0, 5, 1.0, True, "1"]),
    ([str], [[], ["a", "b"]], ["a", ["a", 1], ("a",), {}]),
    ([str, float], [["a", 1]], [[], ["a"], ["a", 1, "a"], [1, "a"]]),
    ({"a": str, "b?": float}, [{"a": ""}, {"a": "", "b": 1, "c": {}}], [{}, {"a": 1}, {"a": "", "b": ""}, [], "a"]),
    ({str: str}, [{}, {"a": ""}], [{"a": 1}, {1: "a"}, []]),
    (exp.NOTHING, [{}], [{"a": {}}, [], None]),
    (("a", None, [float]), ["a", None, [1]], ["b", [""], {}, 0]),
    (1, [1], [True, 1.0, 2, "1"]),
    (torch.Tensor, [torch.zeros(1)], [[0.0], None]),
]


@pytest.mark.parametrize(("shape", "fitting", "strange"), FITS)
def test_what_fits_a_shape(shape: Any, fitting: list[Any], strange: list[Any]) -> None:
    assert [exp.misfit(value, shape) for value in fitting] == [""] * len(fitting)
    assert all(exp.misfit(value, shape) for value in strange)


def test_what_does_not_fit_is_named() -> None:
    value = {"history": [{"loss": 1.0}, {"loss": "small"}]}
    assert exp.misfit(value, {"history": [{"loss": float}]}, "record") == "record.history[1].loss"


# ---- Any field of any record, missing or replaced ----------------------------------------------------------------------

EXAMPLES = int(os.environ.get("EXAMPLES", "30"))  # EXAMPLES=20000 for a run of an hour, with new examples each time
SOME = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 30,
    phases=[Phase.generate],  # there is little to shrink, and every attempt makes a report
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MISSING = object()
STRANGE = st.sampled_from([MISSING, None, True, 0, -1, 1, 10**30, 0.0, float("nan"), float("inf"), "", "a", [], {}, [0], ["a"], {"a": 1}])


@pytest.fixture(scope="module")
def whole(finished_run: Path) -> dict[str, Any]:
    """The 5x part of a finished run: its index with the records, its jobs, and what their files hold."""
    folder = exp.RunFolder(finished_run)
    state = exp.load_index(folder, repair=False)
    chosen = replace(exp.Settings.from_plain(state["settings"]), compression=("5x",))
    jobs = {job.name: job for job in exp.planned_jobs(chosen)}
    contents = {name: exp.load_checkpoint(folder.model_file(name)) for name in jobs}
    records = {name: content["record"] for name, content in contents.items()}
    return {"state": {**state, "settings": chosen.plain(), "jobs": records}, "jobs": jobs, "contents": contents}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every part of nested dicts and lists (of a list: to its last item)."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[-1], (*path, len(value) - 1))


def altered(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another part at the end of a path, or without it."""
    result = copy.deepcopy(value)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return result


def assert_reported(folder: Path, state: dict[str, Any]) -> None:
    """Tables, report, figures, --status and the start of a session take this index without complaint."""
    evidence = exp.gather_evidence(state, exp.results_frame(state), {}, None)  # logits are looked at below
    "\n".join(line for section in exp.SECTIONS for line in section(evidence)).encode()
    exp.summary_table(evidence)
    exp.latex_table(evidence)
    for name in exp.FIGURES.keys() - {"calibration"}:  # which shows nothing but logits
        exp.FIGURES[name](evidence)
    run = exp.RunFolder(folder)
    run.create()
    exp.write_sealed(run.index_file, exp.pickle.dumps(state))
    assert exp.main(["--status", "--output-dir", str(folder)]) == 0
    session = exp.continued_settings(state, {})
    exp.note_session(copy.deepcopy(state), session, exp.Request({}), [exp.Device("cpu", 0, "CPU")])


@SOME
@given(data=st.data())
def test_a_strange_record_is_set_aside_or_does_no_harm(tmp_path: Path, whole: dict[str, Any], data: st.DataObject) -> None:
    """What is accepted (another number for a number) is reported as it stands; nothing else gets past `check_content`."""
    kind = data.draw(st.sampled_from(("teacher", "intermediate", "pilot", "student")))
    name = data.draw(st.sampled_from([n for n, job in whole["jobs"].items() if job.kind == kind]))
    record = whole["contents"][name]["record"]
    path = data.draw(st.sampled_from(sorted({*places(record)}, key=repr)))
    strange = altered(record, path, data.draw(STRANGE))
    chosen, job, teachers = exp.Settings.from_plain(whole["state"]["settings"]), whole["jobs"][name], {}
    for content in (whole["contents"][name], {**whole["contents"][name], "record": strange}):
        try:
            exp.check_content(content, job, chosen, whole["state"], teachers)
        except exp.Damaged:
            assert content["record"] is strange
            return
    assert_reported(tmp_path, {**whole["state"], "jobs": {**whole["state"]["jobs"], name: strange}})


@SOME
@given(data=st.data())
def test_a_strange_index_is_refused_or_does_no_harm(tmp_path: Path, whole: dict[str, Any], data: st.DataObject) -> None:
    state = {**whole["state"], "merged": {"sources": ["a"], "teachers": {"5x": next(iter(whole["state"]["jobs"].values()))}}}
    path = data.draw(st.sampled_from(sorted({p for p in places(state) if "jobs" not in p[:-1]}, key=repr)))
    strange = altered(state, path, data.draw(STRANGE))
    exp.check_index(state)
    try:
        exp.check_index(strange)
    except (exp.Damaged, exp.UsageError):
        return
    assert_reported(tmp_path, strange)


# ---- As files --------------------------------------------------------------------------------------------------------


def rewrite(path: Path, keys: tuple[Any, ...], new: Any) -> None:
    """Alter a sealed torch file and seal it again."""
    exp.save_checkpoint(path, altered(exp.load_checkpoint(path), keys, new))


CONTENTS = [
    (TEACHER, ("record", "history"), MISSING),
    (TEACHER, ("fit_logits",), MISSING),
    (PILOT, ("record", "config", "teachers"), ["nobody"]),
    (PILOT, ("record", "candidates", 0, "rungs"), MISSING),
    (DIRECT, ("record",), torch.zeros(2)),
    (DIRECT, ("record", "test_accuracy"), "high"),
    (KD, ("record", "taught_by"), [TEACHER]),
    (DIRECT, ("record", "method"), "TraditionalKD"),
    (KD, ("test_logits",), torch.zeros(7, 10)),
    (HPMKD, ("record", "config", "alpha"), 0.123),
]


@pytest.mark.parametrize(("job", "keys", "new"), CONTENTS)
def test_a_sealed_file_of_another_content_is_redone(
    copied: Path, toy_run: Path, redone: list[str], job: str, keys: tuple[Any, ...], new: Any
) -> None:
    """Looked at, reported on and merged without complaint or with one line; then that job alone is done again."""
    rewrite(copied / f"checkpoints/{job}.pt", keys, new)
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert exp.main(["--merge", str(copied), "--output-dir", str(copied.parent / "merged")]) in (0, 2)
    assert resume(copied) == 0
    assert redone == [job]
    assert leftovers(copied) == [f"checkpoints/{job}.pt.corrupt"]
    assert results_without_times(copied) == results_without_times(toy_run)


@pytest.mark.parametrize("index", [MISSING, 5, {}, {"format": 1}])
def test_a_lost_index_is_not_rebuilt_from_something_else(copied: Path, redone: list[str], index: Any) -> None:
    """Of models whose own copy of the index is none, the others are used."""
    for path in (copied / "checkpoints").glob("experiment_state*"):
        path.unlink()
    for name in (TEACHER, KD):
        rewrite(copied / f"checkpoints/{name}.pt", ("index",), index)
    rewrite(copied / f"checkpoints/{DIRECT}.pt", ("record",), "none")
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert resume(copied) == 0
    assert redone == [DIRECT]


@pytest.mark.parametrize("field", ["config", "candidates", "train_seconds", "problem"])
def test_a_memory_without_sound_pilots_is_one_line(copied: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = exp.load_index(exp.RunFolder(copied), repair=False)
    exp.save_plain(copied / "checkpoints/experiment_state.pkl", altered(state, ("jobs", PILOT, field), MISSING))
    assert exp.main(["--mode", "smoke", "--output-dir", str(copied.parent / "new"), "--memory", str(copied)]) == 2
    assert f"holds no sound index.jobs.{PILOT}" in capsys.readouterr().out.splitlines()[-1]


def test_a_teacher_that_gets_everything_wrong(whole: dict[str, Any]) -> None:
    """Zero percent is a possible accuracy; the students' share of it is not known."""
    records = {n: {**r, "test_accuracy": 0.0} if r["kind"] == "teacher" else r for n, r in whole["state"]["jobs"].items()}
    assert np.isnan(exp.results_frame({**whole["state"], "jobs": records}).retention).all()
