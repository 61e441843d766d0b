"""The documents keep step with the script: tables, commands, file names, notebook cells. Nothing is trained here.

`UPDATE_DOCS=1 python -m pytest tests/test_docs.py` rewrites the generated tables (those between `<!-- name -->` markers).
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT

import run_exp1b_kaggle as exp

README, QUICK_START, INDEX = "README_KAGGLE.md", "QUICK_START_KAGGLE.md", "INDEX.md"
DOCUMENTS = (README, QUICK_START, INDEX)
SETUP = [
    "pip install -r requirements.txt && python run_exp1b_kaggle.py --mode smoke",
    "pip install -r tests/requirements.txt && python -m pytest tests",
]
KERNEL_KEYS = {
    "id", "title", "code_file", "language", "kernel_type", "is_private", "enable_gpu", "enable_internet", "machine_shape",
    "dataset_sources", "competition_sources", "kernel_sources",
}  # fmt: skip
NOT_TRIED = {
    README: ["Nothing of this was tried on Kaggle itself or on a GPU"],
    QUICK_START: ["Nothing of this was tried on Kaggle itself or on a GPU", "Nada disto foi testado no próprio Kaggle nem em uma GPU"],
    INDEX: ["Nothing of this was tried on Kaggle itself or on a GPU"],
}
CASES = [(1, 5.0e12), (2, 5.0e12), (2, 2.5e12)]  # devices, multiply-accumulates per second on each: the README's examples
ROLES = {"experiment": "fixed once a run exists", "scope": "may grow with `--resume`", "session": "this session only"}


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
    """Every field of `Settings`: option, default, meaning, and when it may change."""
    rows = []
    for field in dataclasses.fields(exp.Settings):
        meta = field.metadata
        choices = meta["argparse"].get("choices")
        meaning = meta["help"] + (f" ({', '.join(choices)})" if choices and choices[0] not in meta["help"] else "")
        option = f"`--{field.name.replace('_', '-')}`"
        rows.append([option, shown(field.default), meaning.replace("|", "\\|"), ROLES[meta["role"]]])
    return table(["option", "default", "meaning", "when it may change"], rows)


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
    teacher = exp.network_cost("teacher", 10, 64)[0]
    depth = {(3, 4, 6, 3): "ResNet-50", (2, 2, 2, 2): "ResNet-18", (1, 1, 1, 1): "ResNet-10"}
    rows = []
    for name, a in exp.ARCHITECTURES.items():
        params, macs = exp.network_cost(name, 10, 64)
        widths = ", ".join(map(str, a.channels))
        rows.append([name, depth[a.blocks], widths, f"{params:,}", f"{teacher / params:.3f}", f"{macs / 1e6:,.0f}"])
    return table(["network", "depth", "channels", "parameters", "counted ratio", "million MACs per image"], rows)


def commands_table() -> str:
    """What the script can do instead of starting a new run: every such option of its parser."""
    (actions,) = (group for group in exp.build_parser()._action_groups if group.title == "what to do instead of starting a new run")
    wanted = [action for action in actions._group_actions if action.option_strings]
    assert {action.dest for action in wanted} == {f.name for f in dataclasses.fields(exp.Request)} - {"given", "command"}
    rows = [[f"`{' '.join([a.option_strings[0], *([f'{a.metavar} ...'] if a.metavar else [])])}`", str(a.help)] for a in wanted]
    return table(["command", "what it does"], rows)


def expected_work(mode: str) -> tuple[dict[str, tuple[int, float]], list[float]]:
    """(jobs, multiply-accumulates) by kind of work; and the hours that `--plan`'s formula makes of it in each of `CASES`."""
    settings, classes, images = exp.new_settings({"mode": mode}), 10, 45_000
    macs = {name: exp.network_cost(name, classes, settings.width)[1] for name in exp.ARCHITECTURES}
    work: dict[str, tuple[int, float]] = {}
    for job in exp.planned_jobs(settings):
        kind = {"teacher": "teacher", "student": f"students {job.compression}"}.get(job.kind, f"{job.kind}s")
        count, total = work.get(kind, (0, 0.0))
        work[kind] = (count + 1, total + exp.job_cost(job, settings, classes) * images)
    hours = []
    for devices, rate in CASES:
        progress = exp.Progress(settings, classes, images, False, devices)
        progress.expect({name: exp.Speed(3 * macs[name] * settings.batch_size / rate, macs[name] / rate) for name in macs}, {})
        hours.append(progress.seconds_left() / 3600)
        work["teachers' passes over the images"] = (0, progress.page_seconds() * rate)
    return work, hours


def work_table() -> str:
    """What the modes compute, and the hours that `--plan`'s formula makes of it."""
    quick, full = expected_work("quick"), expected_work("full")
    rows = []
    for kind, (count, total) in quick[0].items():
        others, more = full[0][kind]
        rows.append([kind, str(count or "-"), f"{total / 1e15:.1f}", str(others or "-"), f"{more / 1e15:.1f}"])
    sums = [(sum(jobs for jobs, _ in work.values()), sum(macs for _, macs in work.values()) / 1e15) for work, _ in (quick, full)]
    rows.append(["**all**", *(text for jobs, macs in sums for text in (str(jobs), f"**{macs:.1f}**"))])
    for (devices, rate), short, long in zip(CASES, quick[1], full[1], strict=True):
        label = f"hours on {devices} device{'s' * (devices > 1)} at {rate / 1e12:.1f} tera-MACs/s"
        rows.append([label, "", f"{short:.1f} h", "", f"{long:.1f} h"])
    return table(["work", "quick: jobs", "peta-MACs", "full: jobs", "peta-MACs"], rows)


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "presets": presets_table,
    "networks": networks_table,
    "commands": commands_table,
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


def test_readme_has_every_generated_table() -> None:
    text = text_of(README)
    assert all(f"<!-- {n} -->" in text and f"<!-- /{n} -->" in text for n in GENERATED)


def test_first_code_block_is_the_two_commands_that_ci_runs() -> None:
    assert re.search(r"^```(\w*)$", text_of(README), re.MULTILINE)[1] == "bash"  # type: ignore[index]
    assert code_blocks(text_of(README))[0].splitlines() == SETUP


def test_exit_codes_are_the_scripts() -> None:
    """The README's table and the script's own text name the same codes."""
    assert exp.__doc__
    said = re.search(r"Exit codes: (.*?)\n\n", exp.__doc__, re.DOTALL)
    assert said
    ours = set(re.findall(r"\b(\d{1,3})\b", said[1]))
    section = re.search(r"^## Exit codes\n(.*?)^## ", text_of(README), re.MULTILINE | re.DOTALL)
    assert section
    codes = ", ".join(re.findall(r"^\| ([\d, ]+) \|", section[1], re.MULTILINE))
    assert set(codes.split(", ")) == ours == {"0", "1", "2", "130", "143"}


def test_outputs_are_described() -> None:
    text = text_of(README)
    assert [c for c in exp.CSV_COLUMNS if f"`{c}`" not in text] == []
    assert [name for name in exp.FIGURES if f"`{name}`" not in text] == []
    assert exp.STATE_NAME in text


def test_constants_that_the_text_repeats() -> None:
    text = text_of(README)
    assert f"{exp.KAGGLE_SESSION_HOURS} h" in text
    assert all(source in text for source in exp.ATTACHABLE.values())
    for ratio, (direct, student, difference) in exp.PREDICTION.items():
        row = f"| {ratio} | {direct:.1f} | {student:.1f} | +{difference:.1f} pp |"
        assert all(row in text_of(document) for document in (README, INDEX)), row
    hours = [expected_work(mode)[1][1:] for mode in ("quick", "full")]
    quick, full = (f"{fast:.1f} ({slow:.1f}) h" for fast, slow in hours)
    assert f"quick {quick}, full {full} (computed, not measured)" in " ".join(text_of(INDEX).split())


def commands(text: str) -> list[list[str]]:
    """The arguments of every `... run_exp1b_kaggle.py ...` command line in code blocks and inline code."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`([^`\n]+)`", prose)
    found = []
    for line in lines:
        start = re.match(r"^\s*(?:!|(?:.*&& ))?(?:torchrun .*?|python3? )(?:run_exp1b_kaggle\.py|\{SCRIPT\})(.*)$", line)
        if start:
            found.append(shlex.split(start[1].replace("{RESUME}", "--resume").replace("{MODE}", "quick"), comments=True))
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_parses(document: str) -> None:
    found = commands(text_of(document))
    assert len(found) >= 3
    for arguments in found:
        request = exp.parse_request(arguments)
        if not (request.resume or request.merge or request.status or request.report_only):
            exp.new_settings(request.given)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_option_mentioned_exists(document: str) -> None:
    known = {option for action in exp.build_parser()._actions for option in action.option_strings}
    known |= {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--index-url", "--profile"}  # of other programs
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text_of(document))) - known) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_mentioned_exists(document: str) -> None:
    text = text_of(document)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [path for path, _, _ in links if path and not (ROOT / path).exists()]
    inline = re.findall(r"`((?:tests/|\.ci/)[\w./-]*|[\w.-]+_KAGGLE\.md|INDEX\.md|requirements\.txt)`", text)
    missing += [path for path in inline if not (ROOT / path).exists()]
    assert sorted(set(missing)) == []


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text_of(README))
    assert len(named) > 20
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / "tests" / file).read_text()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_anchor_exists(document: str) -> None:
    text = text_of(document)
    for path, anchor in re.findall(r"\]\(([^)\s#]*)#([^)\s]+)\)", text):
        if "://" in path:
            continue
        headings = re.findall(r"^#+ (.*)$", text_of(path or document), re.MULTILINE)
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
    blocks = [json.loads(block) for block in code_blocks(text_of(README), "json")]
    assert blocks
    for metadata in blocks:
        assert metadata.keys() == KERNEL_KEYS
        assert metadata["machine_shape"] == "NvidiaTeslaT4"
        assert metadata["enable_gpu"] is metadata["enable_internet"] is metadata["is_private"] is True
        assert metadata["language"] == "python"
        assert f"`{metadata['code_file']}`" in text_of(README)
        assert metadata["kernel_sources"] == [], "before the first push there is no output to mount"
        assert f'`"kernel_sources": ["{metadata["id"]}"]`' in text_of(README), "what the later pushes need"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_plain_text(document: str) -> None:
    """No emoji, and no path of anybody's machine: an absolute one is Kaggle's or a stated example."""
    text = text_of(document)
    assert re.findall("[\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff]", text) == []
    paths = re.findall(r"(?<![\w.:/~>*<-])/[a-z]\w+(?:/[\w.<>-]+)+", text)
    assert [p for p in paths if not p.startswith(("/kaggle/", "/shared/"))] == []
    assert "\t" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_was_not_tried_is_said(document: str) -> None:
    assert [sentence for sentence in NOT_TRIED[document] if sentence not in text_of(document)] == []


def test_lengths() -> None:
    assert len(text_of(README).splitlines()) <= 560
    assert len(text_of(INDEX).splitlines()) <= 110


def test_the_workflow_is_drawn() -> None:
    (diagram,) = code_blocks(text_of(INDEX), "mermaid")
    assert diagram.startswith("flowchart")
    for step in ("disconnect", "--resume", "--compression", "--merge", "report"):
        assert step in diagram
