"""The documents keep step with the script: tables, commands, file names, notebook cells. Nothing is trained here.

`UPDATE_DOCS=1 python -m pytest tests/test_docs.py` rewrites the generated tables (those between `<!-- name -->` markers).
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from lab import do, open_lab, shortcuts
from scipy import stats

import run_exp1b_kaggle as exp

README, QUICK_START, INDEX, TESTS = "README_KAGGLE.md", "QUICK_START_KAGGLE.md", "INDEX.md", "tests/README.md"
DOCUMENTS = (README, QUICK_START, INDEX, TESTS)
SETUP = [
    "pip install -r requirements.txt && python run_exp1b_kaggle.py --mode smoke",
    "pip install -r tests/requirements.txt && python -m pytest tests",
]
KERNEL_KEYS = {
    "id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_internet", "machine_shape",
    "dataset_sources", "competition_sources", "kernel_sources",
}  # fmt: skip
NOT_TRIED = "Nothing was tried on Kaggle itself so far"  # said once, in "Where it runs"
EVIDENCE = ROOT / ".github/evidence"
AT_7X = EVIDENCE / "7x"  # the run with all published methods and the ablation
PUBLISHED = ("DKD", "DIST", "LSKD", "TAKD", "AT", "SP", "RKD", "Hint")
ABLATION_ARMS = [name for name, method in exp.METHODS.items() if method.option == "ablation"]
TUNED = ("TunedKD", "DKD")  # controls whose setting a pilot has chosen, too
CASES = [
    (1, 5.0e12),
    (2, 5.0e12),
    (2, 2.5e12),
]  # devices, multiply-accumulates per second on each: the INDEX's examples
ROLES = {
    "experiment": "fixed once a run exists; another value is refused with exit 2, and the line names the difference",
    "scope": "the run may grow and never shrinks; the report declares what was added after results were seen",
    "session": "may differ in every session; the report notes what can change the last digits",
}
OTHER_OPTIONS = {
    "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint",  # of torchrun
    "--nodes", "--ntasks-per-node", "--gpus-per-task", "--cpus-per-task", "--time", "--signal", "--requeue", "--open-mode",  # Slurm
    "--minutes",  # of a benchmark
}  # fmt: skip
PLUGIN = "at.py"  # what README calls its example of a method


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, *languages: str) -> list[str]:
    """The fenced code blocks in these languages (none given: in any)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for language, code in found if not languages or language in languages]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def shown(value: Any) -> str:
    """A setting's value as one would type it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(value) if isinstance(value, tuple) else str(value)


def settings_table() -> str:
    """Every option of `Settings`, by when it may change."""
    rows = [
        [", ".join(f"`{exp.flag(name)}`" for name in exp.setting_names(role)), when]
        for role, when in ROLES.items()
    ]
    return table(["options", "with `--resume`"], rows)


def presets_table() -> str:
    """What the modes set, and the jobs that follow."""
    first = ["dataset", "teacher_epochs", "student_epochs", "runs"]
    names = [*first, *(n for preset in exp.PRESETS.values() for n in preset if n not in first)]
    names = list(dict.fromkeys([*names, "train_size", "width", "batch_size", "lr"]))
    rows = []
    for mode in exp.MODES:
        settings = exp.new_settings({"mode": mode})
        kinds = [job.kind for job in exp.planned_jobs(settings)]
        values = [shown(getattr(settings, n)).replace("-", "all") for n in names]
        rows.append([f"`--mode {mode}`", *values, str(kinds.count("student")), str(len(kinds))])
    return table(["mode", *(n.replace("_", " ") for n in names), "students", "jobs in all"], rows)


def networks_table() -> str:
    """The networks, counted at full width with 10 classes."""
    teacher = exp.network_cost("teacher", 10, exp.FULL_WIDTH)[0]
    depth = {(3, 4, 6, 3): "ResNet-50", (2, 2, 2, 2): "ResNet-18", (1, 1, 1, 1): "ResNet-10"}
    rows = []
    for name, a in exp.ARCHITECTURES.items():
        roles = [
            role for role, names in (("assistant", exp.ASSISTANTS), ("student", exp.RATIOS)) if name in names
        ]
        params, macs = exp.network_cost(name, 10, exp.FULL_WIDTH)
        counted = [f"{params:,}", f"{teacher / params:.3f}", f"{macs / 1e6:,.0f}"]
        rows.append(
            [
                name,
                " and ".join(roles) or "teacher",
                depth[a.blocks],
                ", ".join(map(str, a.channels)),
                *counted,
            ]
        )
    return table(
        ["network", "role", "depth", "channels", "parameters", "counted ratio", "million MACs per image"],
        rows,
    )


def expected_work(mode: str) -> tuple[dict[str, tuple[int, float]], list[float]]:
    """(jobs, multiply-accumulates) by kind of work; and the hours that `--plan`'s formula makes of it in each of `CASES`."""
    settings, images = exp.new_settings({"mode": mode}), 45_000
    jobs = exp.planned_jobs(settings)
    work: dict[str, tuple[int, float]] = {}
    for job in jobs:
        kind = {"teacher": "teacher", "student": f"students {job.compression}"}.get(job.kind, f"{job.kind}s")
        count, total = work.get(kind, (0, 0.0))
        work[kind] = (count + 1, total + exp.job_macs(job, settings, {}) * images)
    hours = []
    for devices, rate in CASES:
        estimate = exp.Estimate(settings, images, devices, {}, {"teacher": rate})
        hours.append(estimate.seconds_left(jobs) / 3600)
        work["teachers' passes over the images"] = (0, estimate.page_seconds(jobs) * rate)
    return work, hours


def work_table() -> str:
    """What the modes compute, and the hours that `--plan`'s formula makes of it."""
    quick, full = expected_work("quick")[0], expected_work("full")[0]
    rows = []
    for kind, (count, total) in quick.items():
        others, more = full[kind]
        rows.append(
            [kind, str(count or "-"), f"{total / 1e15:.1f}", str(others or "-"), f"{more / 1e15:.1f}"]
        )
    sums = [
        (sum(jobs for jobs, _ in work.values()), sum(macs for _, macs in work.values()) / 1e15)
        for work in (quick, full)
    ]
    rows.append(["**all**", *(text for jobs, macs in sums for text in (str(jobs), f"**{macs:.1f}**"))])
    return table(["work", "quick: jobs", "peta-MACs", "full: jobs", "peta-MACs"], rows)


def hours_table() -> str:
    """How long the modes take at assumed speeds, and what they need on disk."""
    labels = [f"{devices} GPU{'s' if devices > 1 else ''} at {rate / 1e12:.1f}" for devices, rate in CASES]
    rows = []
    for mode in ("quick", "full"):
        settings = exp.new_settings({"mode": mode})
        sizes = (exp.disk_bytes(settings), exp.page_bytes(settings))
        hours = [f"{hours:.1f} h" for hours in expected_work(mode)[1]]
        rows.append([f"`--mode {mode}`", *hours, *(f"{size / 1e9:.1f} GB" for size in sizes)])
    return table(["mode", *labels, "run folder", "cache, in TMPDIR"], rows)


def evidence_text() -> str:
    """Answer, main table, the sentence below it, trend and times, as the evidence's report has them."""
    report = (EVIDENCE / exp.REPORT_NAME).read_text(encoding="utf-8")
    [trend] = re.findall(rf"^{exp.SUBJECT}'s advantage over {exp.BASELINE} .*$", report, re.MULTILINE)
    [closed] = re.findall(rf"^{exp.SUBJECT} closes .*$", report, re.MULTILINE)
    [times] = re.findall(r"^- (Device time per student.*)$", report, re.MULTILINE)
    return "\n\n".join([first_screen(report), trend, closed, times])


def first_screen(report: str) -> str:
    """Answer, main table and the sentence below it."""
    parts = [part.strip() for part in report.partition("\n## ")[0].split("\n\n")]
    return "\n\n".join(part for part in parts if part and not part.startswith(("# ", "![", "- ")))


def ranking_text() -> str:
    """The first screen of the run with all methods, and what it says of the controls that were tuned."""
    accuracy, arms = ablation_results()
    accuracy = pd.concat({"7x": accuracy}, axis=1)
    said = []
    for name in TUNED:
        family = PUBLISHED if name in PUBLISHED else [name]
        shown = compared(accuracy, [exp.SUBJECT], name)["7x", exp.SUBJECT].rpartition(" ")[0]
        word = compared(accuracy, family, exp.SUBJECT)["7x", name].rpartition(" ")[2]
        words = {"worse": "beats", "better": "is worse than", "unclear": "is not distinguishable from"}
        said.append(f"{exp.SUBJECT} {words[word]} {name} ({shown} pp)")
    report = (AT_7X / exp.REPORT_NAME).read_text(encoding="utf-8")
    return f"{first_screen(report)}\n\nThe controls that a pilot has tuned, too: **{'; '.join(said)}**."


def ablation_results() -> tuple[pd.DataFrame, dict[str, tuple[pd.Series, float]]]:
    """Test accuracies by run and method; and for each arm its differences from HPM-KD and their p."""
    results = pd.read_csv(AT_7X / "results.csv")
    accuracy = results.pivot(index="run", columns="method", values="test_accuracy")
    differences = {arm: accuracy[arm] - accuracy[exp.SUBJECT] for arm in ABLATION_ARMS}
    return accuracy, {arm: (d, float(stats.ttest_1samp(d, 0).pvalue)) for arm, d in differences.items()}


def ablation_text() -> str:
    """The table of the ablation, as its report has it, and what follows from it."""
    report = (AT_7X / exp.REPORT_NAME).read_text(encoding="utf-8")
    section = report.partition("## Ablation and equal cost")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]

    accuracy, arms = ablation_results()
    said = [f"Below zero, HPM-KD, with {accuracy[exp.SUBJECT].mean():.2f}%, is ahead."]
    tuned, _ = arms["TunedKD"]
    shown = [
        f"{arm} ({d.mean():+.2f} pp, p {p:.3f})"
        for arm, (d, p) in arms.items()
        if arm != "TunedKD" and p < 0.05
    ]
    said.append(
        f"Arms that differ from {exp.SUBJECT} (p below 5%, not adjusted): {exp.listed(shown) or 'none'}."
    )
    found = tuned.std() * exp.detectable_effect(len(tuned))
    needed = exp.runs_needed(tuned.std())
    said.append(f"From TunedKD, three runs find a true difference of {found:.1f} pp with 80% probability;")
    said.append(f"{exp.RELEVANT_PP} pp at this spread takes {needed} runs.")
    return "\n".join([*lines, "", *textwrap.wrap(" ".join(said), 128)])


def answer_text() -> str:
    """The evidence's answer in one sentence."""
    return evidence_text().partition("\n")[0]


def parts_table() -> str:
    """The script's parts with their contents, as its comments name them, and about how many lines each has."""
    source = text_of("run_exp1b_kaggle.py")
    _, *parts = re.split(r"^# =+\n# Part (.*)\n# =+$", source, flags=re.MULTILINE)
    rows = []
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        titles = re.findall(r"^# -- (.*?) --+$", text, re.MULTILINE)
        contents = dict.fromkeys(title.partition(":")[0] for title in titles)
        rows.append([name.replace(": the", " The"), "; ".join(contents), about(text.count("\n"))])
    rows.append(["the whole script, with its head", "", about(source.count("\n"))])
    return table(["part", "contents", "lines, about"], rows)


def about(count: int) -> str:
    """A number, rounded to hundreds."""
    return f"{round(count, -2):,}"


GENERATED: dict[str, Callable[[], str]] = {
    "answer": answer_text,
    "parts": parts_table,
    "evidence": evidence_text,
    "ranking": ranking_text,
    "ablation": ablation_text,
    "settings": settings_table,
    "presets": presets_table,
    "networks": networks_table,
    "hours": hours_table,
    "work": work_table,
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_generated_tables_are_in_step(document: str) -> None:
    text = updated = text_of(document)
    for name, make in GENERATED.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if pattern.search(updated):
            body = make()
            updated = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", updated)
    if os.environ.get("UPDATE_DOCS") and updated != text:
        (ROOT / document).write_text(updated, encoding="utf-8")
        text = updated
    assert text == updated, "run: UPDATE_DOCS=1 python -m pytest tests/test_docs.py"


def test_every_generated_table_is_in_a_document() -> None:
    texts = [text_of(document) for document in DOCUMENTS]
    for name in GENERATED:
        places = sum(f"<!-- {name} -->" in text and f"<!-- /{name} -->" in text for text in texts)
        assert places == 1, name


def test_first_code_block_is_the_two_commands_that_ci_runs() -> None:
    assert re.search(r"^```(\w*)$", text_of(README), re.MULTILINE)[1] == "bash"  # type: ignore[index]
    assert code_blocks(text_of(README))[0].splitlines() == SETUP


def test_exit_codes_are_the_scripts() -> None:
    """The README's table and the script's own text name the same codes, those of the signals that it obeys."""
    assert exp.__doc__
    said = re.search(r"Exit codes: (.*?)\n\n", exp.__doc__, re.DOTALL)
    assert said
    ours = set(re.findall(r"\b(\d{1,3})\b", said[1])) - {"128"}
    section = re.search(r"^## Exit codes\n(.*?)^## ", text_of(README), re.MULTILINE | re.DOTALL)
    assert section
    codes = ", ".join(re.findall(r"^\| ([\d, ]+) \|", section[1], re.MULTILINE))
    assert set(codes.split(", ")) == ours
    assert all(name in section[1] and name in said[1] for name in exp.Session.SIGNALS)
    if sys.platform == "linux":
        assert ours == {"0", "1", "2", *(str(128 + getattr(signal, name)) for name in exp.Session.SIGNALS)}


def test_outputs_are_described() -> None:
    text = text_of(README)
    assert [name for name in exp.FIGURES if f"`{name}`" not in text] == []
    assert exp.STATE_NAME in text and exp.REPORT_NAME in text
    columns = re.findall(
        r"`(\w+)`",
        "".join(re.findall(r"^\| (`.*?) \|", text_of(INDEX).partition("## Columns of")[2], re.MULTILINE)),
    )
    assert columns == exp.CSV_COLUMNS, "all of them, in their order"


def test_every_kind_of_file_in_checkpoints_is_described() -> None:
    text = text_of(README)
    kinds = {job.kind: job for job in exp.planned_jobs(exp.new_settings({}))}
    assert kinds.keys() == {"teacher", "assistant", "pilot", "student"}
    for job in kinds.values():
        pattern = job.name.replace(job.dataset, "<dataset>")
        if job.compression:
            pattern = pattern.replace(job.compression, "<ratio>").replace(job.method or " ", "<method>")
        pattern = re.sub(r"run\d+$", "run<n>", pattern)
        assert f"{pattern}.pt`" in text


def test_constants_that_the_text_repeats() -> None:
    text = text_of(README)
    assert f"{exp.KAGGLE_SESSION_HOURS} h" in text and f"{exp.KAGGLE_LONGEST_HOURS} h" in text
    assert f"keeps {exp.KAGGLE_DISK_BYTES // 10**9} GB" in text
    assert all(source in text for source in exp.ATTACHABLE.values())
    for ratio, (direct, student, difference) in exp.PREDICTION.items():
        assert f"| {ratio} | {direct:.1f} | {student:.1f} | +{difference:.1f} pp |" in text_of(TESTS)


def test_the_method_is_the_scripts() -> None:
    """What "Method" and "Protocol" say of configurations, arms and verdicts."""
    text = " ".join(text_of(README).split())
    plain = exp.TraditionalKD.configure("7x", None)
    assert f"alpha {plain.alpha:g}, T {plain.temperature:g}" in text
    assert f"T starts between {exp.TEMPERATURE_MIN:g} and {exp.TEMPERATURE_MAX:g}" in text
    assert f"assistants at {exp.listed(exp.ASSISTANTS)}" in text
    numbers = {8: "eight", 9: "nine", 10: "ten", 12: "twelve", 16: "sixteen"}
    sizes = {numbers[len(exp.HPMKD.candidates(ratio))] for ratio in exp.RATIOS}
    assert set(re.findall(r"compares (\w+) configurations", text)) == sizes
    default = exp.HPMKD.default("7x")
    assert (default.view_share == 0.5) == ("half of each soft target is the mean over all views" in text)
    assert (default.teachers == exp.HPMKD.teachers("7x")) == ("(by default from all of them)" in text)
    arms = [name for name, method in exp.METHODS.items() if method.option != "methods"]
    assert [name for name in arms if f"`{name}`" not in text and f"**{name}**" not in text] == []
    assert f"needs {exp.LEAST_PAIRS} pairs" in text and f"below {exp.LEVEL:.0%}" in text


def test_the_messages_that_troubleshooting_quotes_exist() -> None:
    """Each is a piece of the script."""
    computed = {
        "found no full run in": "found no {what} in",
        "ended its process 2 times": "ended its process {count} times",
    }
    assert exp.Worker.MOST_ATTEMPTS == 2
    source = text_of("run_exp1b_kaggle.py")
    symptoms = re.findall(r"^\| (.*?) \|", text_of(README).partition("## Troubleshooting\n")[2], re.MULTILINE)
    quoted = [quote.removesuffix(" ...") for symptom in symptoms for quote in re.findall(r'"(.*?)"', symptom)]
    assert len(quoted) > 5
    assert [quote for quote in quoted if computed.get(quote, quote) not in source] == []


def test_the_python_that_is_needed() -> None:
    source = (ROOT / "run_exp1b_kaggle.py").read_text(encoding="utf-8")
    wanted = re.search(r"sys\.version_info < \((\d+), (\d+)\)", source)
    assert wanted
    version = f"Python {wanted[1]}.{wanted[2]}"
    assert version in " ".join(text_of(README).split())
    assert text_of(QUICK_START).count(version) == 2, "in both languages"
    assert f"py{wanted[1]}{wanted[2]}" in text_of(".ruff.toml")


def commands(text: str) -> list[list[str]]:
    """The arguments of every `... run_exp1b_kaggle.py ...` command line in code blocks and inline code."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    found = []
    for line in lines:
        start = re.match(r"^\s*(?:!|.*&& |srun )?(?:torchrun .*?|python3? )run_exp1b_kaggle\.py(.*)$", line)
        if start:
            found.append(shlex.split(start[1].replace("{MODE}", "quick"), comments=True))
    return found


def plugin_code() -> str:
    """README's example of a method of one's own."""
    (code,) = [block for block in code_blocks(text_of(README), "python") if "register(" in block]
    return code


@pytest.fixture
def plugin_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """README's plugin in the current folder, beside the tests; the methods are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/published_methods.py", tmp_path / "tests")
    (tmp_path / PLUGIN).write_text(plugin_code(), encoding="utf-8")
    with known_methods():
        yield tmp_path / PLUGIN


@contextlib.contextmanager
def known_methods() -> Iterator[None]:
    """Afterwards the methods are as before."""
    before = dict(exp.METHODS)
    yield
    exp.METHODS.clear()
    exp.METHODS.update(before)


@pytest.mark.parametrize("document", [README, QUICK_START, INDEX])
@pytest.mark.usefixtures("plugin_here")
def test_every_command_parses(document: str) -> None:
    found = commands(text_of(document))
    assert len(found) >= 3
    for arguments in found:
        with known_methods():
            args = exp.parse_args(arguments)
            if args.action in ("run", "plan") and args.resume is not True and not args.join:
                exp.new_settings(args.given)


def test_the_commands_that_the_help_shows_parse(plugin_here: Path) -> None:
    plugin_here.rename("my_kd.py").write_text(plugin_code().replace('"AT"', '"MyKD"'), encoding="utf-8")
    lines = [line.strip().split("  ")[0] for line in exp.EXAMPLES.splitlines() if line.startswith("  --")]
    assert len(lines) >= 5
    for line in lines:
        args = exp.parse_args(shlex.split(line))
        if not args.resume:
            exp.new_settings(args.given)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_mentioned_exists(document: str) -> None:
    known = {option for action in exp.build_parser()._actions for option in action.option_strings}
    known |= OTHER_OPTIONS
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of(document))) - known) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_mentioned_exists(document: str) -> None:
    text = text_of(document)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    here = (ROOT / document).parent
    missing = [path for path, _, _ in links if path and not (here / path).exists()]
    inline = re.findall(r"`((?:tests/|\.ci/)[\w./-]*|[\w.-]+_KAGGLE\.md|INDEX\.md|requirements\.txt)`", text)
    missing += [path for path in inline if not (ROOT / path).exists()]
    assert sorted(set(missing)) == []


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text_of(TESTS))
    assert len(named) > 20
    assert [
        (file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()
    ] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_anchor_exists(document: str) -> None:
    text = text_of(document)
    for path, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", text):
        if "://" in path:
            continue
        target = (ROOT / document).parent / path if path else ROOT / document
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
        assert anchor in anchors, anchor


def as_python(cell: str) -> str:
    """A notebook cell with its shell lines (`!...`) made into calls."""
    return re.sub(r"^(\s*)[!%](.*)$", lambda m: f"{m[1]}shell({m[2]!r})", cell, flags=re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_notebook_cells_compile(document: str) -> None:
    for cell in code_blocks(text_of(document), "python"):
        ast.parse(as_python(cell))


def test_names_that_the_cells_import_exist() -> None:
    for document in DOCUMENTS:
        for cell in code_blocks(text_of(document), "python"):
            for node in ast.walk(ast.parse(as_python(cell))):
                if isinstance(node, ast.ImportFrom) and node.module == "run_exp1b_kaggle":
                    assert [a.name for a in node.names if not hasattr(exp, a.name)] == []


def test_quick_start_is_the_same_in_both_languages() -> None:
    english, heading, portuguese = text_of(QUICK_START).partition("\n# Português\n")
    assert heading
    assert code_blocks(english) == code_blocks(portuguese) != []
    assert english.count("\n## ") == portuguese.count("\n## ")


def test_kernel_metadata_is_complete() -> None:
    metadata = json.loads(text_of(".github/kaggle/kernel-metadata.json"))
    assert metadata.keys() == KERNEL_KEYS
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["dataset_sources"] == [exp.ATTACHABLE["CIFAR10"]]
    assert metadata["kernel_sources"] == [], "before the first push there is no output to mount"
    assert f'`"kernel_sources": ["{metadata["id"]}"]`' in text_of(TESTS), "what the later pushes need"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_plain_text(document: str) -> None:
    """No emoji, and no path of anybody's machine: an absolute one is Kaggle's or a stated example."""
    text = text_of(document)
    assert re.findall("[\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff]", text) == []
    paths = re.findall(r"(?<![\w.:/~>*<-])/[a-z]\w+(?:/[\w.<>-]+)+", text)
    assert [p for p in paths if not p.startswith(("/kaggle/", "/shared/", "/bin/bash"))] == []
    assert "\t" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_what_was_not_tried_is_said_once() -> None:
    section = text_of(README).partition("## Where it runs\n")[2].partition("\n## ")[0]
    assert NOT_TRIED in section
    assert sum(text_of(document).count(NOT_TRIED) for document in DOCUMENTS) == 1
    for place in ("Linux", "Kaggle", "Colab", "macOS", "Windows", "AMD", "Apple", "clusters"):
        assert place in section


def holm_adjusted(p: pd.Series) -> pd.Series:
    """p-values after Holm, in their order."""
    steps = p.sort_values() * np.arange(len(p), 0, -1)
    return steps.cummax().clip(upper=1)[p.index]


def compared(accuracy: pd.DataFrame, methods: Sequence[str], control: str) -> dict[tuple[str, str], str]:
    """What a table says about methods and a control, one family of comparisons, by ratio and method.

    `accuracy` has a column per (ratio, method).
    """
    cells = [(ratio, method) for ratio in accuracy.columns.unique(0) for method in methods]
    differences = {cell: accuracy[cell] - accuracy[cell[0], control] for cell in cells}
    p = pd.Series([stats.ttest_1samp(d, 0).pvalue for d in differences.values()])
    said = {}
    for (cell, d), adjusted in zip(differences.items(), holm_adjusted(p), strict=True):
        low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), d.sem())
        verdict = "unclear"
        if adjusted < 0.05:
            verdict = "better" if d.mean() > 0 else "worse"
        said[cell] = f"{d.mean():+.2f} [{low:+.2f}, {high:+.2f}] {verdict}"
    return said


def check_main_table(text: str, accuracy: pd.DataFrame, methods: Sequence[str], one_family: bool) -> None:
    """Every cell of a first screen's table; with many methods all comparisons with a control are one family."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    controls = [title.removeprefix("minus ") for title in header[3:]]
    assert controls == list(exp.MAIN_METHODS[: len(controls)])
    order = [(exp.RATIOS[row[0]], -float(row[2].partition(" ")[0])) for row in rows]
    assert order == sorted(order)
    assert {(row[0], row[1]) for row in rows} == {(r, m) for r in accuracy.columns.unique(0) for m in methods}
    for ratio, method, shown, *cells in rows:
        values = accuracy[ratio, method]
        assert shown == f"{values.mean():.2f} ± {values.std():.2f}"
        for cell, control in zip(cells, controls, strict=True):
            later = methods[methods.index(control) + 1 :]
            family = later if one_family else [method]
            assert cell == (compared(accuracy, family, control)[ratio, method] if method in later else "")


def test_the_evidence_follows_from_its_results() -> None:
    """Every number that the documents show, worked out anew from `results.csv` with pandas and scipy alone."""
    results = pd.read_csv(EVIDENCE / "results.csv")
    accuracy = results.pivot(index="run", columns=["compression", "method"], values="test_accuracy")
    text = evidence_text()
    check_main_table(text, accuracy, exp.MAIN_METHODS, one_family=False)

    lead = accuracy.xs(exp.SUBJECT, axis=1, level=1) - accuracy.xs(exp.RIVAL, axis=1, level=1)
    found = math.sqrt(lead.var().mean()) * exp.detectable_effect(len(lead))  # at the pooled sd
    assert f"a true difference of about {found:.1f} pp from TraditionalKD" in " ".join(
        text_of(README).split()
    )
    assert f"million parameters) reaches {results.teacher_accuracy.iloc[0]:.2f}%." in text

    gains = accuracy.xs(exp.SUBJECT, axis=1, level=1) - accuracy.xs(exp.BASELINE, axis=1, level=1)
    distance = results.teacher_accuracy.iloc[0] - accuracy.xs(exp.BASELINE, axis=1, level=1).mean()
    for ratio, share in (gains.mean() / distance).items():
        assert f"{share:.0%} at {ratio}" in text
    counted = results.groupby("compression").ratio_actual.mean()[gains.columns]
    for ratios in (["2.3x", "5x", "7x"], ["5x", "7x"]):
        doublings = np.log2(counted[ratios])
        slopes = gains[ratios].apply(lambda run, x=doublings: stats.linregress(x, run).slope, axis=1)
        low, high = stats.t.interval(0.95, len(slopes) - 1, slopes.mean(), slopes.sem())
        assert f"({slopes.mean():+.2f} [{low:+.2f}, {high:+.2f}] pp per doubling, p " in text

    summary = pd.read_csv(EVIDENCE / "summary.csv")
    for row in summary.itertuples():
        values = accuracy[row.compression, row.method]
        assert row.test_accuracy_mean == pytest.approx(values.mean(), abs=1e-5)
        assert row.test_accuracy_sd == pytest.approx(values.std(), abs=1e-5)


def test_the_readme_shows_the_run_at_full_width() -> None:
    results = pd.read_csv(EVIDENCE / "full_width/results.csv").set_index("method")
    reached = results.test_accuracy
    said = f"Direct reached {reached['Direct']:.2f}%, TraditionalKD {reached['TraditionalKD']:.2f}%, HPM-KD "
    said += f"{reached['HPM-KD']:.2f}% and the teacher {results.teacher_accuracy.iloc[0]:.2f}%"
    assert said in " ".join(text_of(README).split())
    assert results.params["Direct"] == exp.network_cost("7x", 10, exp.FULL_WIDTH)[0]


def test_the_ranking_follows_from_its_results() -> None:
    """Every number of its table, worked out anew as above."""
    accuracy, _ = ablation_results()
    methods = (*exp.MAIN_METHODS, *PUBLISHED)
    check_main_table(ranking_text(), pd.concat({"7x": accuracy}, axis=1), methods, one_family=True)
    own = pd.read_csv(EVIDENCE / "results.csv").query("compression == '7x'")
    same = own.pivot(index="run", columns="method", values="test_accuracy")
    assert same.equals(accuracy[same.columns]), "the same seeds, in another run"


def test_what_the_readme_says_of_the_ablation() -> None:
    """Which parts make the difference, and who is not distinguishable from HPM-KD at 7x."""
    accuracy, arms = ablation_results()
    said = " ".join(text_of(README).split())
    assert f"(`HPM-KD-paper`), HPM-KD loses {-arms['HPM-KD-paper'][0].mean():.1f} pp" in said
    parts = [p for arm, (_, p) in arms.items() if arm not in ("TunedKD", "HPM-KD-paper")]
    tested = [p for p in parts if p == p]  # the pilot kept the default: HPM-KD-no-manager is HPM-KD itself
    assert len(tested) == len(parts) - 1 == 6 and min(tested) >= 0.05
    assert "Leaving out one of six parts [shows no detectable difference]" in said
    tuned = accuracy["TunedKD"] - accuracy["TraditionalKD"]
    p = stats.ttest_1samp(tuned, 0).pvalue
    assert p >= 0.05 and f"Nor does tuning alone show a gain (+{tuned.mean():.1f} pp, p {p:.2f})" in said
    assert f"HPM-KD is {-arms['TunedKD'][0].mean():.1f} pp ahead of TunedKD" in said

    rows = [line.split(" | ") for line in ranking_text().splitlines() if line.startswith("| 7x")]
    assert [row[1] for row in rows if row[-1].endswith(" unclear |")] == [
        "Hint", "DKD", "SP", "DIST",
    ]  # fmt: skip
    assert "Hint (2015), DKD with a tuned beta, SP and DIST are not distinguishable from HPM-KD" in said
    summary = pd.read_csv(AT_7X / "summary.csv").set_index("method")
    adjusted = summary.loc[exp.SUBJECT, "minus_traditionalkd_p_holm"]
    assert adjusted >= 0.05 and f"TraditionalKD is not either (p {adjusted:.2f})" in said


def test_the_ablation_follows_from_its_results() -> None:
    """Every number of its table, worked out anew as above."""
    results = pd.read_csv(AT_7X / "results.csv")
    accuracy, arms = ablation_results()
    rows = [
        line.strip("| ").split(" | ") for line in ablation_text().splitlines()[2:] if line.startswith("|")
    ]
    assert [row[0] for row in rows] == list(arms)
    for arm, ratio, shown, epochs, difference, p, *remark in rows:
        d, expected = arms[arm]
        low, high = stats.t.interval(0.95, len(d) - 1, d.mean(), d.sem())
        assert ({ratio}, {epochs}) == (set(results.compression), set(results.epochs.astype(str)))
        assert shown == f"{accuracy[arm].mean():.2f} ± {accuracy[arm].std():.2f}"
        if (d == 0).all():  # the pilot kept the default, so that the arm is HPM-KD itself
            assert (difference, p, remark) == ("+0.00", "n/a", ["copy of HPM-KD"])
            continue
        assert difference == f"{d.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        assert p == (f"{expected:.3f}" if expected >= 0.001 else "< 0.001")


def test_the_evidences_figures_are_shown() -> None:
    assert "](.github/figures/accuracy_vs_compression.png)" in text_of(README)
    reports = (".github/evidence/experiment_report.md", ".github/evidence/7x/experiment_report.md")
    for name in (README, INDEX, *reports):
        for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text_of(name)):
            assert (ROOT / name).parent.joinpath(link).read_bytes().startswith(b"\x89PNG")


def test_the_reading_guide_names_what_is_there() -> None:
    guide = text_of(INDEX).partition("## Read part 1\n")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+)`", guide)
    assert len(names) > 15
    assert [name for name in names if not hasattr(exp, name)] == []
    assert [row.partition(" ")[0] for row in parts_table().split("\n| ")[2:]] == ["1", "2", "3", "4", "the"]


def test_lengths() -> None:
    """What people write stays short; the generated tables are as long as the results are."""
    for document, most in ((README, 325), (INDEX, 100)):
        written = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text_of(document), flags=re.DOTALL)
        assert len(written.splitlines()) <= most


def attention_map(feature: np.ndarray) -> np.ndarray:
    """Q / ||Q|| of Zagoruyko and Komodakis (2017): the mean of squares over channels [C, H, W], as a vector of length one."""
    flat = np.square(feature).mean(0).ravel()
    return flat / np.linalg.norm(flat)


@pytest.mark.usefixtures("plugin_here")
def test_the_readmes_plugin_is_attention_transfer() -> None:
    """The example registers; its loss is the paper's formula, here with loops over images and stages in float64."""
    args = exp.parse_args(["--plugin", PLUGIN, "--methods", "Direct", "HPM-KD", "AT"])
    assert args.given["methods"] == ("Direct", "HPM-KD", "AT")
    method = exp.METHODS["AT"]
    assert method.teachers("7x") == ("teacher",)

    generator = torch.Generator().manual_seed(5)
    images, index, sizes = 12, torch.tensor([7, 2, 11, 0]), {"stage2": 16, "stage3": 8, "stage4": 4}

    def draw(count: int, channels: int) -> dict[str, torch.Tensor]:
        shapes = {stage: (count, channels, size, size) for stage, size in sizes.items()}
        return {
            stage: torch.rand(shape, generator=generator, dtype=torch.float64)
            for stage, shape in shapes.items()
        }

    student, teacher = draw(len(index), 3), draw(images, 5)
    logits = torch.randn(len(index), 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (images,), generator=generator)
    expected = 0.0
    for row, image in enumerate(index.tolist()):
        z = logits[row].numpy()
        expected += (np.log(np.exp(z).sum()) - z[labels[image]]) / len(index)
        for stage in sizes:
            maps = (
                attention_map(features.numpy()) for features in (student[stage][row], teacher[stage][image])
            )
            expected += 1000 * np.square(np.subtract(*maps)).mean() / len(index)

    made = method.__new__(method)
    made.experiment = types.SimpleNamespace(images=types.SimpleNamespace(labels=labels))  # type: ignore[assignment]
    made.features, made.descriptions = student, method.describe(teacher)
    assert made.loss(logits, index).item() == pytest.approx(expected, rel=1e-5), (
        "float() rounds the teacher's"
    )


@pytest.mark.usefixtures("plugin_here", "small_networks")
def test_the_readmes_plugin_trains(tmp_path: Path) -> None:
    """A teacher and a student of the example; the student's loss is not the one of Direct."""
    exp.load_plugins([Path(PLUGIN)])
    with shortcuts():
        experiment = open_lab(tmp_path / "run", methods=("Direct", "AT"), compression=("7x",))
        records = do(experiment)
    losses = {name: [epoch.loss for epoch in record.history] for name, record in records.items()}
    assert all(record.done for record in records.values())
    direct, own = (losses[f"student_7x_{name}_run1"] for name in ("Direct", "AT"))
    assert own[0] > direct[0] + 0.1


def test_the_workflow_is_drawn() -> None:
    (diagram,) = code_blocks(text_of(INDEX), "mermaid")
    assert diagram.startswith("flowchart")
    for step in ("disconnect", "--resume", "--compression", "--merge", "report"):
        assert step in diagram
