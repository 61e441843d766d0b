"""Settings: defaults, presets, overrides; every wrong command line is one line and exit code 2."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import open_lab, student, teacher

import run_exp1b_kaggle as exp

PLUGIN = Path(__file__).parent / "pytest.ini"  # stands for a plugin where none is imported
FIELDS = {field.name: field for field in exp.dataclasses.fields(exp.Settings)}
ACTIONS = ["--resume", "--status", "--plan", "--report-only", "--merge", "--help"]


def parsed(*argv: str) -> dict[str, Any]:
    """The settings that a command line gives explicitly."""
    return exp.parse_args(argv).given


# ---- Presets and overrides -------------------------------------------------------------------------------------------


def test_without_a_mode_it_is_quick() -> None:
    """A Kaggle kernel of type script gets no arguments."""
    assert exp.new_settings(parsed()) == exp.new_settings(parsed("--mode", "quick")) == exp.Settings()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("quick", {"teacher_epochs": 50, "student_epochs": 20, "runs": 3, "dataset": "CIFAR10", "width": 64}),
        ("full", {"teacher_epochs": 100, "student_epochs": 50, "runs": 5, "dataset": "CIFAR10", "width": 64}),
        ("smoke", {"runs": 3, "dataset": "SYNTHETIC"}),
    ],
)
def test_presets(mode: str, expected: dict[str, Any]) -> None:
    chosen = exp.new_settings(parsed("--mode", mode))
    assert {name: getattr(chosen, name) for name in expected} == expected
    assert chosen.compression == ("2.3x", "5x", "7x")
    assert chosen.methods == ("Direct", "TraditionalKD", "HPM-KD")
    assert (chosen.batch_size, chosen.lr) == (128, 0.1) or mode == "smoke"


OVERRIDES = {
    "dataset": "CIFAR100", "teacher_epochs": 7, "student_epochs": 8, "batch_size": 32, "lr": 0.5, "width": 24, "train_size": 999,
    "seed": 5, "precision": "fp32", "deterministic": True, "compression": ("7x",), "methods": ("Direct", "HPM-KD"), "runs": 9,
    "ablation": True, "equal_cost": True, "device": "cpu", "workers": 3, "threads": 2, "max_hours": 1.5, "data_dir": Path("d"),
    "output_dir": Path("o"), "plugin": (PLUGIN,), "fresh_teacher": True,
}  # fmt: skip


def option(name: str, value: Any) -> list[str]:
    """The command line that gives a setting."""
    flag = "--" + name.replace("_", "-")
    return [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize("mode", exp.MODES)
@pytest.mark.parametrize("name", OVERRIDES)
def test_every_setting_can_be_overridden_and_changes_nothing_else(
    mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exp, "load_plugins", lambda _: {})
    plain, changed = (
        exp.new_settings(parsed("--mode", mode, *more)) for more in ([], option(name, OVERRIDES[name]))
    )
    assert getattr(changed, name) == OVERRIDES[name]
    assert exp.replace(changed, **{name: getattr(plain, name)}) == plain


def test_every_setting_has_an_option_and_is_tested_here() -> None:
    assert set(OVERRIDES) | {"mode"} == set(FIELDS)
    for field in FIELDS.values():
        assert field.metadata["role"] in ("experiment", "scope", "session")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--compression", "7x", "2.3x"], ("2.3x", "7x")),
        (["--compression", "7x,2.3x"], ("2.3x", "7x")),
        (["--compression", "5x", "5x"], ("5x",)),
        (["--compression", "all"], ("2.3x", "5x", "7x")),
    ],
)
def test_ratios_are_a_set_in_a_fixed_order(argv: list[str], expected: tuple[str, ...]) -> None:
    assert parsed(*argv)["compression"] == expected


def test_the_command_is_kept_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp.sys, "argv", ["../my folder/run_exp1b_kaggle.py"])
    command = exp.parse_args(["--output-dir", "a run"]).command
    assert shlex.split(command) == ["python", "../my folder/run_exp1b_kaggle.py", "--output-dir", "a run"]


# ---- What is wrong is said -------------------------------------------------------------------------------------------

WRONG = [
    ["--mode", "fast"], ["--mode"], ["--mode", ""], ["--dataset", "MNIST"], ["--teacher-epochs", "0"], ["--teacher-epochs", "-3"],
    ["--teacher-epochs", "1.5"], ["--teacher-epochs", "many"], ["--teacher-epochs", "1000000000"], ["--student-epochs", "0"],
    ["--batch-size", "1"], ["--batch-size", "0"], ["--batch-size", "1000000000000"], ["--lr", "0"], ["--lr", "-1"], ["--lr", "nan"],
    ["--lr", "inf"], ["--lr", "101"], ["--lr", "fast"], ["--width", "0"], ["--width", "12"], ["--width", "-8"], ["--width", "1000"],
    ["--seed", "-1"], ["--seed", "2147483648"], ["--seed", "9" * 5000], ["--precision", "int8"], ["--compression"],
    ["--compression", "3x"], ["--compression", ""], ["--compression", ","], ["--compression", "all", "5x"], ["--methods", "Magic"],
    ["--methods", "direct"], ["--methods"], ["--runs", "0"], ["--runs", "-1"], ["--runs", "1000000"], ["--device", "tpu"],
    ["--workers", "0"], ["--workers", "100000"], ["--threads", "0"], ["--threads", "100000000000000000000"], ["--max-hours", "0"],
    ["--max-hours", "-1"], ["--max-hours", "nan"], ["--max-hours", "soon"], ["--output-dir"], ["--unknown"], ["positional"],
    ["--tea", "5"], ["--teacher_epochs", "5"], ["--status", "--plan"], ["--merge"], ["--merge", "a", "--report-only"],
    ["--status", "--report-only"], ["--ablation", "--methods", "Direct"], ["--equal-cost", "--methods", "Direct", "TraditionalKD"],
    ["--resume=yes"], ["-h5"], ["--", "--status"], ["--output-dir", ""], ["--data-dir="], ["--plugin", ""], ["--merge", "a", ""],
]  # fmt: skip


@pytest.mark.parametrize("argv", WRONG, ids=lambda argv: " ".join(argv)[:40])
def test_a_wrong_command_line_is_one_line(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one line, nothing on the disk."""
    monkeypatch.chdir(tmp_path)
    assert exp.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert captured.out.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_help_is_not_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        exp.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in FIELDS:
        assert "--" + name.replace("_", "-") in text
    assert "exit codes: 0" in text


TOKENS = (
    st.sampled_from([*ACTIONS, *("--" + name.replace("_", "-") for name in FIELDS), "--no-ablation", "--"])
    | st.sampled_from(
        [
            "quick",
            "full",
            "5x",
            "all",
            "Direct",
            "HPM-KD",
            "0",
            "1",
            "-1",
            "3",
            "1e309",
            "nan",
            "",
            "%s",
            "CIFAR10",
            "cpu",
        ]
    )
    | st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8)
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(TOKENS, max_size=8))
def test_arbitrary_command_lines_are_requests_or_usage_errors(argv: list[str]) -> None:
    with contextlib.redirect_stdout(None):
        try:
            chosen = exp.new_settings(parsed(*argv))
        except exp.UsageError as error:
            assert str(error)
            return
        except SystemExit as stop:
            assert stop.code == 0
            assert {"--help", "-h"} & {token[:6] for token in argv} or any(
                token.startswith("-h") for token in argv
            )
            return
    plain = exp.to_plain(chosen)
    assert exp.to_plain(exp.from_plain(exp.Settings, plain)) == plain
    assert exp.run_fingerprint(exp.from_plain(exp.Settings, plain), "fp32", "0") == exp.run_fingerprint(
        chosen, "fp32", "0"
    )


# ---- Identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERRIDES)
def test_the_fingerprint_follows_what_the_arithmetic_depends_on(name: str) -> None:
    """Scope and session do not matter, the precision counts as it was chosen, and the mode is only a name."""
    changed = exp.replace(exp.Settings(), **{name: OVERRIDES[name]})
    same = exp.run_fingerprint(exp.Settings(), "bf16", "0" * 64) == exp.run_fingerprint(
        changed, "bf16", "0" * 64
    )
    assert same == (FIELDS[name].metadata["role"] != "experiment" or name == "precision")


def test_the_fingerprint_follows_precision_data_and_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = exp.Settings()
    prints = {
        exp.run_fingerprint(chosen, precision, data) for precision in ("fp32", "bf16") for data in ("a", "b")
    }
    monkeypatch.setattr(exp, "PROTOCOL", exp.PROTOCOL + 1)
    prints.add(exp.run_fingerprint(chosen, "fp32", "a"))
    assert len(prints) == 5
    assert exp.run_fingerprint(exp.replace(chosen, mode="full"), "fp32", "a") in prints


def test_a_teachers_identity_does_not_depend_on_the_students(tmp_path: Path) -> None:
    """So that runs that differ in the students' epochs alone can share a teacher."""
    short, long = (open_lab(tmp_path / str(epochs), student_epochs=epochs) for epochs in (2, 3))
    for job, same in ((teacher(short), True), (student(short, "Direct"), False)):
        assert (short.run.fingerprint(job) == long.run.fingerprint(job)) == same


def test_random_numbers_depend_on_their_purpose_alone() -> None:
    draws = {
        exp.rng(*key).integers(2**62)
        for key in [(1, "order", 0), (1, "order", 1), (2, "order", 0), (1, "pages", 0)]
    }
    assert len(draws) == 4
    assert exp.rng(1, "order").integers(2**62) in draws
