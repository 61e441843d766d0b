"""Section 15: the report says what the numbers say, whatever they are, and is valid Markdown."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from fake_state import fake_labels, fake_logits, fake_state
from test_figures import CASES, failed, without

import run_exp1b_kaggle as exp


def write(tmp_path, state, logits=None, labels=None):
    exp.write_tables_and_report(tmp_path, state, logits or {}, labels)
    return (tmp_path / "experiment_report.md").read_text()


def shifted(state, method, shift):
    """Set an arm's accuracy to Direct's plus `shift[ratio]`, with a little spread over the runs."""
    for name, record in state["jobs"].items():
        if record["kind"] == "student" and record["method"] == method:
            twin = state["jobs"][name.replace(f"_{method}_", "_Direct_")]["test_accuracy"]
            spread = {"2.3x": 0.01, "5x": -0.02, "7x": 0.015}[record["compression"]]
            record["test_accuracy"] = twin + shift[record["compression"]] + spread * (record["run"] - 2)
    return state


def first_paragraph(report):
    return report.split("\n\n")[1]


# ---- the answer


def test_the_first_paragraph_is_three_sentences(tmp_path):
    answer = first_paragraph(write(tmp_path, fake_state(5)))
    assert len(re.findall(r"\.(?:\s|$)", answer)) == 3


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ({"2.3x": 0.1, "5x": 0.5, "7x": 0.9}, ["beats Direct at 5x and above holds", "grows with the compression ratio"]),
        ({"2.3x": 0.9, "5x": 0.5, "7x": 0.1}, ["holds", "shrinks with the compression ratio"]),
        ({"2.3x": -0.5, "5x": -0.5, "7x": -0.5}, ["is not supported (5x: worse; 7x: worse)", "-0.50 pp at 2.3x", "no distinguishable trend"]),
        ({"2.3x": 0.5, "5x": 0.5, "7x": 0.0}, ["is not supported (5x: better; 7x: not distinguishable at 3 runs)"]),
    ],
)  # fmt: skip
def test_the_answer_follows_the_numbers(tmp_path, shift, said):
    state = shifted(fake_state(3), "HPM-KD", shift)
    answer = first_paragraph(write(tmp_path, state))
    assert all(text in answer for text in said), answer


def test_the_answer_says_how_plain_distillation_does(tmp_path):
    """A gain over Direct may be distillation's alone."""
    state = fake_state(3)
    theirs = {(r["compression"], r["run"]): r["test_accuracy"] for r in state["jobs"].values() if r.get("method") == "TraditionalKD"}
    for record in state["jobs"].values():
        if (record["kind"], record["method"]) == ("student", "HPM-KD"):
            record["test_accuracy"] = theirs[record["compression"], record["run"]] + 0.01 * record["run"] - 1.0
    assert "against TraditionalKD, HPM-KD is -0.98 pp at 2.3x (worse), -0.98 pp at 5x (worse)" in first_paragraph(write(tmp_path, state))


def test_a_weak_teacher_is_flagged(tmp_path):
    state = fake_state(3)
    assert "Premise" not in write(tmp_path, state)
    state["jobs"]["teacher_resnet50_CIFAR10"]["test_accuracy"] = 86.5
    report = write(tmp_path, state)
    assert "**Premise of distillation not met** at 2.3x" in report and "not met** at 5x" not in report


def test_synthetic_data_are_no_evidence(tmp_path):
    assert "nothing about the method" in write(tmp_path, fake_state(2, dataset="SYNTHETIC", width=16))


# ---- partial data


@pytest.mark.parametrize("case", CASES)
def test_partial_experiments_are_reported(tmp_path, case):
    state = CASES[case]()
    report = write(tmp_path, state)
    missing = exp.gather_evidence(state, exp.results_frame(state), {}, None).missing
    assert ("**Partial experiment**" in report) == bool(missing)
    assert all(gap in report for gap in missing)
    assert not re.search(r"\bnan\b|\binf\b|None(?! yet|\.)", report)


def test_failures_and_unmatched_runs_are_said(tmp_path):
    report = write(tmp_path, failed(fake_state(3), "student_5x_Direct_run2"))
    assert "- Failed: student_5x_Direct_run2 (loss became NaN)." in report
    assert "HPM-KD vs Direct at 5x: run 2" in report
    assert "Missing: 5x: Direct 2 of 3 runs" in report


# ---- sections


def test_prediction_beside_the_measurement(tmp_path):
    state = shifted(fake_state(3), "HPM-KD", {"2.3x": 0.2, "5x": 0.2, "7x": 4.0})
    section = write(tmp_path, state).split("## Original prediction")[1].split("##")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ") and "x |" in line}
    assert "88.5" in rows["2.3x"] and "88.7" in rows["2.3x"] and rows["2.3x"].endswith("| yes |")
    assert "+2.5 | +0.20" in rows["5x"] and rows["5x"].endswith("| no |")
    assert rows["7x"].endswith("| yes |")
    assert "does not apply" in write(tmp_path, fake_state(2, width=16))
    assert "does not apply" in write(tmp_path, fake_state(2, dataset="CIFAR100"))


def test_attention_that_does_not_help_is_said(tmp_path):
    state = fake_state(2)
    section = write(tmp_path, state).split("### Attention")[1].split("##")[0]
    assert "not better than uniform; better than best single (teacher)" in section  # the fake's numbers on `select`
    for record in state["jobs"].values():
        if record["attention"]:
            record["attention"]["select"] = {**record["attention"]["select"], "nll_mixture": 0.29}
    assert "not better than uniform" not in write(tmp_path, state)
    assert "No finished HPM-KD student has used attention" in write(tmp_path, without(state, "_HPM-KD_"))


def test_pilot_table(tmp_path):
    state = fake_state(2)
    state["jobs"]["pilot_5x"].update(reused_from="/kaggle/input/old", seconds_saved=100.0)
    report = write(tmp_path, state)
    assert "| 2 | alpha 0.5, T 6 (cosine), teacher + 2.3x by attention | 2: 61.00; 4: 71.50 | 1.30 | 0.60 | chosen |" in report
    assert "Reason: beat candidate 1 by 2.2 standard errors." in report and "Reused from /kaggle/input/old" in report


def test_ablation_and_equal_cost(tmp_path):
    report = write(tmp_path, fake_state(3, ablation=True, equal_cost=True))
    assert "| 2.3x | HPM-KD-no-chain | 20 | 3 | +0.00 | n/a | n/a | identical by construction |" in report
    assert re.search(r"\| 5x \| Direct-equal-cost \| 20 \| 3 \| -?\+?\d", report)
    assert "= HPM-KD" in report  # in the accuracy table
    assert "## Ablation" not in write(tmp_path, fake_state(3))


def test_late_runs_are_declared(tmp_path):
    state = fake_state(3)
    assert "extended after results" not in write(tmp_path, state)
    state["sessions"].append({**state["sessions"][0], "extended": "runs from 2 to 3 after results were seen"})
    assert "**The experiment was extended after results were seen** (runs from 2 to 3" in write(tmp_path, state)


def test_notes_and_mixed_hardware(tmp_path):
    state = fake_state(2)
    state["notes"] = ["the session of today ran on another GPU"]
    state["jobs"]["student_5x_HPM-KD_run1"].update(notes=["micro-batch 64 after running out of memory"], device="Tesla P100")
    report = write(tmp_path, state)
    assert "- the session of today ran on another GPU" in report
    assert "- student_5x_HPM-KD_run1: micro-batch 64" in report and "differ in device: Tesla T4 and Tesla P100" in report


def test_reproduction_and_citation(tmp_path):
    report = write(tmp_path, fake_state(2))
    assert "```\npython run_exp1b_kaggle.py --mode quick --dataset CIFAR10\n```" in report
    assert "ef" * 32 in report and "12" * 32 in report and "torch 2.10.0" in report and "arXiv 2512.09886" in report


def test_environment_variables_never_appear(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "hunter2")
    assert "hunter2" not in write(tmp_path, fake_state(2))


def test_image_level_part(tmp_path):
    state, labels = fake_state(2), fake_labels(400)
    z = fake_logits(state, labels)
    report = write(tmp_path, state, z, labels)
    a, b, p = exp.mcnemar(z["student_5x_HPM-KD_run1"], z["student_5x_Direct_run1"], labels)
    assert f"run 1: {a} / {b} (p {exp.p_value(p)})" in report
    assert "Left out" in write(tmp_path, state, z, None) and "Left out" in write(tmp_path, state, {}, labels)
    del z["student_5x_HPM-KD_run1"]  # only that pair is left out
    assert f"run 1: {a} / {b} (p" not in write(tmp_path, state, z, labels)


def test_many_classes_are_cut_to_those_that_differ_most(tmp_path):
    state = fake_state(2)
    state["data"]["classes"] = [f"class {i}" for i in range(100)]
    for record in state["jobs"].values():
        record["test_class_accuracy"] = [50.0] * 99 + [90.0 if record["method"] == "HPM-KD" else 10.0]
    section = write(tmp_path, state).split("### Accuracy per class")[1].split("##")[0]
    assert "the 20 of 100" in section and "| class 99 |" in section and section.count("| class ") == 20


# ---- form


def test_tables_are_well_formed(tmp_path):
    report = write(tmp_path, fake_state(3, ablation=True, equal_cost=True))
    for block in re.findall(r"(?:^\|.*\n)+", report, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
        assert re.fullmatch(r"\| (---:? \| ?)+", block.splitlines()[1]), block
    assert "\n\n\n\n" not in report


def test_table_cells_are_escaped():
    lines = exp.markdown_table(pd.DataFrame({"a|b": ["x | y\nz"], "n": [1.0]}))
    assert lines[2] == "| x \\| y z | 1.00 |"


def test_figures_are_embedded_by_relative_path_if_they_exist(tmp_path):
    assert "![" not in write(tmp_path, fake_state(2))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "hpmkd_vs_direct.png").write_bytes(b"")
    report = write(tmp_path, fake_state(2))
    assert re.findall(r"!\[.*?\]\((.*?)\)", report) == ["figures/hpmkd_vs_direct.png"]


def test_tables_on_disk(tmp_path):
    state = fake_state(3)
    write(tmp_path, state)
    results, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "summary.csv")
    assert list(results) == exp.CSV_COLUMNS and len(results) == 27
    one = summary[(summary.compression == "5x") & (summary.method == "HPM-KD")].iloc[0]
    mine = results[(results.compression == "5x") & (results.method == "HPM-KD")].test_accuracy
    assert (one.n, one.test_accuracy_mean, one.test_accuracy_sd) == pytest.approx((3, mine.mean(), mine.std()))
    assert one.minus_direct == pytest.approx(exp.compare_methods(results, "HPM-KD", "Direct")["5x"].mean)


def test_latex(tmp_path):
    write(tmp_path, fake_state(3))
    text = (tmp_path / "results_table.tex").read_text()
    assert (
        text.count(r"\\") == 9
        and "teacher (ResNet-50): 92.40" in text
        and r"\toprule" in text
        and r"\bottomrule" in text
        and "Complete." in text
    )
    columns = len(re.search(r"begin{tabular}{(.*)}", text)[1])
    for line in (line for line in text.splitlines() if line.endswith(r"\\")):
        spanned = [int(number) - 1 for number in re.findall(r"multicolumn{(\d+)}", line)]
        assert 1 + line.count("&") + sum(spanned) == columns == 8
    write(tmp_path, without(fake_state(3), "student_7x"))
    assert "PARTIAL, missing: all of 7x" in (tmp_path / "results_table.tex").read_text()


def test_writing_twice_gives_the_same_files(tmp_path):
    state, labels = fake_state(2), fake_labels(200)
    z = fake_logits(state, labels)
    write(tmp_path, state, z, labels)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, state, z, labels)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
