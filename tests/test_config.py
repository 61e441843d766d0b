"""Settings: defaults, presets, overrides; every wrong command line is one line and exit code 2."""

from __future__ import annotations

import contextlib
import multiprocessing
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
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


@pytest.mark.parametrize(
    ("argv", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "--compression", "7x"], True),
        (["--compression", "7x", "--resume"], True),
        (["--resume", "auto"], "auto"),
        (["--resume=auto", "--compression", "7x"], "auto"),
    ],
)
def test_resume_takes_auto_and_nothing_else(argv: list[str], resume: bool | str) -> None:
    args = exp.parse_args(argv)
    assert args.resume == resume
    assert args.given.get("compression", ("7x",)) == ("7x",)


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
    ["--resume=yes"], ["--resume", "5x"], ["-h5"], ["--", "--status"], ["--output-dir", ""], ["--data-dir="], ["--plugin", ""], ["--merge", "a", ""],
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


# ---- Plugins ---------------------------------------------------------------------------------------------------------

METHOD = """\
import run_exp1b_kaggle as exp
{imports}
@exp.register("{name}")
class Mine(exp.Direct):
    SCALE = {value}
"""


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a plugin (with `value`, after `imports`) and load it: its checksum. What was loaded is gone at the end."""
    monkeypatch.setattr(exp, "METHODS", dict(exp.METHODS))
    monkeypatch.setattr(exp, "HELPERS", {})
    before = set(sys.modules)

    def load(name: str = "mine", value: str = "1", imports: str = "", again: bool = False) -> str:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(METHOD.format(imports=imports, name=path.stem, value=value))
        if again:  # as a new process
            exp.METHODS.pop(path.stem)
            exp.HELPERS.clear()
            for module in set(sys.modules) - before:
                del sys.modules[module]
        return exp.load_plugins([path])[path.name]

    yield load
    for module in set(sys.modules) - before:
        del sys.modules[module]


def test_a_plugin_may_import_what_lies_beside_it(plugins: Any, tmp_path: Path) -> None:
    """A module and a package; its folder is on the path for as long as it is imported, and no longer."""
    (tmp_path / "exp1b_beside.py").write_text("VALUE = 7\n")
    (tmp_path / "exp1b_package").mkdir()
    (tmp_path / "exp1b_package/part.py").write_text("from exp1b_beside import VALUE\n")
    path = list(sys.path)
    checksum = plugins(value="VALUE", imports="from exp1b_package.part import VALUE")
    assert sys.path == path
    assert exp.METHODS["mine"].SCALE == 7
    assert exp.METHODS["mine"].source_sha256 == checksum
    assert exp.load_plugins([tmp_path / "mine.py"]) == {"mine.py": checksum}, (
        "a second command of this process"
    )


def test_a_spawned_worker_finds_what_lies_beside_a_plugin(plugins: Any, tmp_path: Path) -> None:
    (tmp_path / "exp1b_beside.py").write_text("VALUE = 7\n")
    checksum = plugins(imports="from exp1b_beside import VALUE")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(exp.load_plugins, [tmp_path / "mine.py"]).result() == {"mine.py": checksum}


@pytest.mark.parametrize("changed", ["exp1b_beside.py", "exp1b_package/part.py", "mine.py", "", "unused.py"])
def test_the_checksum_follows_every_file_of_a_plugin(plugins: Any, tmp_path: Path, changed: str) -> None:
    """Its own, and those of modules beside it or below that it imports; not what it takes from elsewhere."""
    (tmp_path / "exp1b_package").mkdir()
    for name in ("exp1b_beside.py", "exp1b_package/part.py", "unused.py"):
        (tmp_path / name).write_text("VALUE = 7\n")
    imports = "import wave\nfrom exp1b_beside import VALUE\nimport exp1b_package.part"
    first = plugins(imports=imports)
    if changed not in ("", "mine.py"):
        (tmp_path / changed).write_text("VALUE = 77\n")
    second = plugins(imports=imports, again=True, value="2" if changed == "mine.py" else "1")
    assert (first == second) == (changed in ("", "unused.py"))


def test_a_plugin_without_helpers_is_identified_by_its_file(plugins: Any, tmp_path: Path) -> None:
    """As before there were helpers, so that its runs can be continued."""
    checksum = plugins(imports="import wave, numpy")
    assert checksum == exp.hashlib.sha256((tmp_path / "mine.py").read_bytes()).hexdigest()


def test_plugins_do_not_share_helpers(plugins: Any, tmp_path: Path) -> None:
    """Two folders may hold modules of one name; who is loaded first changes no checksum."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "exp1b_beside.py").write_text(f"VALUE = '{folder}'\n")
    imports = "from exp1b_beside import VALUE"
    sums = [plugins(name, "VALUE", imports) for name in ("a/one", "a/two", "b/three")]
    assert [exp.METHODS[name].SCALE for name in ("one", "two", "three")] == ["a", "a", "b"]
    assert plugins("a/two", "VALUE", imports, again=True) == sums[1]


@pytest.mark.parametrize(
    ("beside", "imports", "place"),
    [
        ("1 / 0", "", "ZeroDivisionError: division by zero, mine.py, line 2)"),
        ("1 / 0", "import exp1b_beside", "ZeroDivisionError: division by zero, exp1b_beside.py, line 1)"),
        ("a b", "import exp1b_beside", "SyntaxError: invalid syntax (exp1b_beside.py, line 1))"),
        ("", "import nowhere_to_be_found", "No module named 'nowhere_to_be_found', mine.py, line 2)"),
        ("", "exp.register('?')(exp.Direct)", "'.', '+' and '-', mine.py, line 2)"),
        ("", "import json; json.loads('[')", "JSONDecodeError: Expecting value: line 1 column 2 (char 1), mine.py, line 2)"),
    ],
)  # fmt: skip
def test_an_error_in_a_plugin_says_where(
    plugins: Any, tmp_path: Path, beside: str, imports: str, place: str
) -> None:
    (tmp_path / "exp1b_beside.py").write_text(beside)
    with pytest.raises(exp.UsageError) as caught:
        plugins(imports=imports or beside)
    assert str(caught.value).endswith(place)
    assert "mine" not in exp.METHODS


def test_an_error_in_a_package_beside_a_plugin_is_at_the_plugins_line(
    plugins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment may lie in the plugin's folder: its packages are not the plugin's own files."""
    packages = tmp_path / "venv/lib/site-packages"
    packages.mkdir(parents=True)
    (packages / "exp1b_package.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(packages)
    with pytest.raises(exp.UsageError, match=r"division by zero, mine\.py, line 2\)$"):
        plugins(imports="import exp1b_package")
