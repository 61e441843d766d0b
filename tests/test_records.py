"""Files that are sealed and plain, but whose content is not what this script writes: noticed, and never the end of a report."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import results_without_times
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from toy import DIRECT, HPMKD, JOBS, KD, PILOT, TEACHER, leftovers, resume

import run_exp1b_kaggle as exp

MISSING = object()


# ---- Dataclasses as plain data ---------------------------------------------------------------------------------

FITS: list[tuple[Any, list[Any], list[Any]]] = [
    (str, ["", "a"], [1, None, b"a", ["a"]]),
    (bool, [True], [1, "", None]),
    (int, [0, -3], [1.0, "1", None]),
    (float, [1, 1.5, -1e15, float("nan")], ["a", None, 10**400, [1.0]]),
    (float | None, [None, 1.0], ["", {}]),
    (list[str], [[], ["a", "b"]], [["a", 1], 5]),
    (dict[str, str], [{}, {"a": ""}], [{"a": 1}, []]),
    (tuple[exp.Network, ...], [["teacher"]], [7]),
    (exp.Distillation, [{}, {"alpha": 0.3}], [{"gamma": 1}, {"alpha": "a"}, []]),
    (exp.Settings, [{}], [{"output_dir": "/"}, {"plugin": []}]),  # of one session: not stored
]


@pytest.mark.parametrize(("kind", "fitting", "strange"), FITS)
def test_what_fits_an_annotation(kind: Any, fitting: list[Any], strange: list[Any]) -> None:
    for value in fitting:
        exp.from_plain(kind, value)
    for value in strange:
        with pytest.raises(exp.Damaged):
            exp.from_plain(kind, value)


def test_what_does_not_fit_is_named() -> None:
    plain = exp.to_plain(exp.Record("", "student", "", "", 1, "", history=[exp.Epoch(1.0, 2.0, 3.0, 4.0)]))
    assert exp.to_plain(exp.from_plain(exp.Record, plain, "record")) == plain
    plain["history"][0]["loss"] = "small"
    with pytest.raises(exp.Damaged, match=r"holds no sound record .*small"):
        exp.from_plain(exp.Record, plain, "record")


# ---- Any field of any record, missing or replaced ----------------------------------------------------------------

EXAMPLES = int(
    os.environ.get("EXAMPLES", "60")
)  # EXAMPLES=20000 for a run of an hour, with new examples each time
SOME = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 60,
    phases=[Phase.generate],  # there is little to shrink, and every attempt makes a report
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
STRANGE = st.sampled_from(
    [
        MISSING,
        None,
        True,
        0,
        -1,
        1,
        10**30,
        0.0,
        float("nan"),
        float("inf"),
        "",
        "a",
        [],
        {},
        [0],
        ["a"],
        {"a": 1},
    ]
)


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


def assert_reported(run: exp.Run) -> None:
    """Every section of the report, every table and every figure takes these records without complaint."""
    evidence = exp.gather_evidence(run)
    for section in exp.SECTIONS:
        section(evidence)
    exp.summary_table(evidence)
    exp.latex_table(evidence)
    for draw in exp.FIGURES.values():
        draw(evidence)


@SOME
@given(data=st.data())
def test_a_strange_record_is_refused_or_does_no_harm(toy_run: Path, data: st.DataObject) -> None:
    """What is accepted (another number for a number) is reported as it stands."""
    run = exp.Run(toy_run, exp.load_index(toy_run, {}))
    run.refresh(touch=False)
    job = data.draw(st.sampled_from(run.jobs))
    content = exp.load_checkpoint(run.file(job))
    path = data.draw(st.sampled_from(sorted({*places(content["record"])}, key=repr)))
    content["record"] = altered(content["record"], path, data.draw(STRANGE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp, "load_checkpoint", lambda *_: content)
        try:
            run.records[job.name] = run.load(job)[0]
        except exp.Damaged:
            return
    assert_reported(run)


@SOME
@given(data=st.data())
def test_a_strange_index_is_refused_or_does_no_harm(toy_run: Path, data: st.DataObject) -> None:
    plain = exp.to_plain(exp.load_index(toy_run, {}))
    plain["merged_from"] = ["a"]
    path = data.draw(st.sampled_from(sorted({p for p in places(plain) if "jobs" not in p[:-1]}, key=repr)))
    try:
        index = exp.index_from_plain(altered(plain, path, data.draw(STRANGE)), {})
    except (exp.Damaged, exp.UsageError):
        return
    run = exp.Run(toy_run, index)
    run.refresh(touch=False)
    assert_reported(run)


# ---- As files ----------------------------------------------------------------------------------------------------

CONTENTS = [
    (TEACHER, ("record", "history"), MISSING),
    (TEACHER, ("fit_logits",), MISSING),
    (PILOT, ("record", "config", "teachers"), ["nobody"]),
    (PILOT, ("record", "candidates"), []),
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
    """Looked at and merged without complaint or with one line; then that job alone is done again."""
    path = copied / f"checkpoints/{job}.pt"
    exp.save_checkpoint(path, altered(exp.load_checkpoint(path), keys, new))
    assert exp.main(["--status", "--output-dir", str(copied)]) == 0
    assert exp.main(["--merge", str(copied), "--output-dir", str(copied.parent / "merged")]) in (0, 2)
    assert resume(copied) == 0
    assert redone == [job]
    assert leftovers(copied) == [f"checkpoints/{job}.pt.corrupt"]
    assert results_without_times(copied) == results_without_times(toy_run)


def test_every_kind_of_job_is_in_the_toy() -> None:
    assert {name.split("_")[0] for name in JOBS} == {"teacher", "assistant", "pilot", "student"}
