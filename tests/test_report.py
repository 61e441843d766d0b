"""The report says what the numbers say, whatever they are; its first screen answers the question; it is valid Markdown."""

from __future__ import annotations

import re
import warnings
import zipfile
from dataclasses import replace

import pandas as pd
import pytest
from fake_state import change, failed, fake_run, many_methods, without

import run_exp1b_kaggle as exp

UP = {"2.3x": 0.5, "5x": 0.5, "7x": 0.5}


def write(run, figures=False):
    exp.write_outputs(run, figures)
    return (run.path / exp.REPORT_NAME).read_text()


def shifted(run, method, shift, control="Direct", scale=1):
    """Set a method's accuracies to the control's plus `shift[ratio]`, with a little spread over the runs, times `scale`."""
    spread = {"2.3x": 0.01, "5x": -0.02, "7x": 0.015}
    for name, record in list(run.records.items()):
        if (record.kind, record.method) == ("student", method):
            twin = run.records[name.replace(f"_{method}_", f"_{control}_")].test_accuracy
            accuracy = (
                twin + shift[record.compression] + scale * spread[record.compression] * (record.run - 2)
            )
            change(run, name, test_accuracy=accuracy)
    return run


def section(report, title):
    """The text below a heading, up to the next one of the same level."""
    level = title.split()[0]
    return report.split(f"\n{title}", 1)[1].split(f"\n{level} ")[0]


def first_screen(report):
    """The paragraphs before the first section."""
    return report.split("\n## ")[0].strip().split("\n\n")


def tables(text):
    """Every table as a list of rows of cells, heading first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.strip().splitlines()]
        for block in blocks
    ]


CASES = {
    "nothing": lambda path: without(fake_run(path), "_"),
    "only the teacher": lambda path: without(fake_run(path), "student", "pilot", "assistant"),
    "no teacher": lambda path: without(fake_run(path), "teacher", "assistant", "pilot", "KD"),
    "one run": lambda path: fake_run(path, 1),
    "one ratio": lambda path: fake_run(path, ratios=("7x",)),
    "one method": lambda path: fake_run(path, methods=("HPM-KD",)),
    "no HPM-KD": lambda path: fake_run(path, methods=("Direct", "TraditionalKD")),
    "no Direct": lambda path: fake_run(path, methods=("TraditionalKD", "HPM-KD")),
    "no TraditionalKD": lambda path: fake_run(path, methods=("Direct", "HPM-KD")),
    "a run short": lambda path: without(fake_run(path), "student_5x_HPM-KD_run2"),
    "HPM-KD is not there yet": lambda path: without(fake_run(path), "_HPM-KD_"),
    "a ratio short": lambda path: without(fake_run(path), "student_7x"),
    "no pilot yet": lambda path: without(fake_run(path, ablation=True), "pilot", "_HPM-KD", "TunedKD"),
    "a failed teacher": lambda path: failed(
        without(fake_run(path), "student", "pilot", "assistant"), "teacher_resnet50_CIFAR10"
    ),
    "a failed student": lambda path: failed(fake_run(path), "student_5x_Direct_run2"),
    "everything": lambda path: fake_run(path, 5, ablation=True, equal_cost=True),
    "a hundred classes": lambda path: fake_run(path, 2, dataset="CIFAR100"),
    "short trainings": lambda path: fake_run(path, 3, epochs=1, dataset="SYNTHETIC", width=16),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A run in whatever state, and its report, which must be written without a warning."""
    run = CASES[request.param](tmp_path_factory.mktemp("case"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run, write(run)


# ---- the answer


@pytest.mark.parametrize(
    ("shift", "rival", "said"),
    [
        (UP, UP, "HPM-KD beats Direct at every ratio; it beats TraditionalKD at every ratio."),
        ({**UP, "2.3x": 0.0}, {"2.3x": 0.0, "5x": 0.0, "7x": 0.0},
         "HPM-KD beats Direct at 5x and 7x and is not distinguishable from it at 2.3x; "
         "it is not distinguishable from TraditionalKD at any ratio."),
        ({"2.3x": -0.5, "5x": -0.5, "7x": -0.5}, {"2.3x": -0.5, "5x": 0.5, "7x": 0.0},
         "HPM-KD is worse than Direct at every ratio; it beats TraditionalKD at 5x, is worse than it at 2.3x and is not "
         "distinguishable from it at 7x."),
    ],
)  # fmt: skip
def test_the_answer_follows_the_verdicts(tmp_path, shift, rival, said):
    run = shifted(fake_run(tmp_path), "HPM-KD", shift)
    shifted(run, "TraditionalKD", {ratio: -value for ratio, value in rival.items()}, control="HPM-KD")
    assert exp.answer_sentence(exp.gather_evidence(run)) == said
    assert first_screen(write(run))[1] == f"**{said}**"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", "No student has been trained yet."),
        ("only the teacher", "No student has been trained yet."),
        (
            "HPM-KD is not there yet",
            "So far, there is no verdict on HPM-KD: it needs 3 complete pairs of runs.",
        ),
        ("one run", "there is no verdict on HPM-KD: it needs 3 complete pairs of runs."),
        (
            "one method",
            "Direct is not among the methods of this run; HPM-KD is the only method, so that there is nothing to compare.",
        ),
        (
            "no HPM-KD",
            "HPM-KD is not among the methods of this run; TraditionalKD is not distinguishable from Direct at any ratio.",
        ),
        (
            "no Direct",
            "Direct is not among the methods of this run; HPM-KD is not distinguishable from TraditionalKD at any ratio.",
        ),
    ],
)
def test_the_answer_where_there_is_none(tmp_path, case, said):
    assert exp.answer_sentence(exp.gather_evidence(CASES[case](tmp_path))).casefold() == said.casefold()


def test_a_ratio_without_a_verdict_is_said(tmp_path):
    run = without(shifted(fake_run(tmp_path), "HPM-KD", UP), "student_7x_HPM-KD_run2")
    answer = exp.answer_sentence(exp.gather_evidence(run))
    assert answer.startswith(
        "So far, HPM-KD beats Direct at 2.3x and 5x and has no verdict against it at 7x;"
    )


def test_equal_results_are_no_verdict(tmp_path):
    run = fake_run(tmp_path, methods=("Direct", "HPM-KD"))
    for name, record in list(run.records.items()):
        change(run, name, test_accuracy=85.0 if record.kind == "student" else 92.4)
    assert (
        exp.answer_sentence(exp.gather_evidence(run))
        == "There is no verdict on HPM-KD: all differences are equal."
    )


def test_synthetic_data_are_no_evidence(tmp_path):
    said = exp.answer_sentence(exp.gather_evidence(fake_run(tmp_path, dataset="SYNTHETIC", width=16)))
    assert said.startswith(
        "On synthetic images (this shows that the program works, nothing about the method), HPM-KD "
    )


def test_a_method_of_a_plugin_is_in_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(exp, "METHODS", dict(exp.METHODS))
    exp.register("MyKD")(type("MyKD", (exp.TraditionalKD,), {"__doc__": "Mine.", "__module__": "plugin"}))
    run = shifted(
        fake_run(tmp_path, methods=("Direct", "HPM-KD", "MyKD")), "MyKD", {"2.3x": 5, "5x": 5, "7x": 5}
    )
    assert exp.answer_sentence(exp.gather_evidence(run)).endswith("; MyKD beats HPM-KD at every ratio.")
    report = write(run)
    assert "minus HPM-KD" in first_screen(report)[3]
    assert "MyKD minus Direct" in section(report, "## Statistics")


# ---- the first screen


def test_first_screen(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/accuracy_vs_compression.png").write_bytes(b"")
    parts = first_screen(write(without(shifted(fake_run(tmp_path), "HPM-KD", UP), "student_7x_Direct_run3")))
    title, answer, _, table, note, figure, remarks = parts
    assert title == "# Experiment 1B: HPM-KD on CIFAR10 (quick)"
    assert answer.count("**") == 2 and answer.count(".**") == 1 and len(answer.split()) < 50
    head, _, *rows = tables(table + "\n")[0]
    assert head == ["Ratio", "method", "accuracy", "minus Direct", "minus TraditionalKD"]
    assert [row[0] for row in rows] == ["2.3x"] * 3 + ["5x"] * 3 + ["7x"] * 3
    found = {(row[0], row[1]): row[2:] for row in rows}
    accuracy, minus_direct, _ = found["2.3x", "HPM-KD"]
    assert re.fullmatch(r"\d\d\.\d\d ± \d\.\d\d", accuracy)
    assert re.fullmatch(r"\+0\.50 \[\+0\.4\d, \+0\.5\d\] better", minus_direct)
    assert found["7x", "Direct"][0].endswith("(2 runs)") and re.fullmatch(
        r"\+0\.\d\d", found["7x", "HPM-KD"][1]
    ), "two pairs have no verdict"
    assert "paired t-test" in note and "Holm" in note and "92.40%" in note
    assert figure == "![accuracy vs compression](figures/accuracy_vs_compression.png)"
    what, cost, missing = remarks.splitlines()
    assert what.count("beta 2,") == 1 and "at 2.3x and 7x" in what, "said once where two ratios share it"
    assert re.search(r"Direct 3 min, TraditionalKD \d+ min and HPM-KD \d+ min", cost)
    assert "7x: Direct 2 of 3 runs" in missing


def test_the_first_table_holds_the_statistics(tmp_path):
    run = fake_run(tmp_path, 5)
    rows = tables(first_screen(write(run))[3] + "\n")[0][2:]
    evidence = exp.gather_evidence(run)
    for ratio, method, accuracy, *differences in rows:
        values = exp.values_of(evidence.frame, ratio, method)
        assert accuracy == f"{values.mean():.2f} ± {values.std():.2f}"
        for control, text in zip(("Direct", "TraditionalKD"), differences, strict=True):
            if (method, control) in evidence.pairs:
                c = evidence.pairs[method, control][ratio]
                assert text == f"{c.mean:+.2f} [{c.low:+.2f}, {c.high:+.2f}] {exp.short_verdict(c)}"


@pytest.mark.parametrize("runs", [1, 2])
def test_too_few_pairs_are_said_once_and_have_no_interval(tmp_path, runs):
    report = write(fake_run(tmp_path, runs, dataset="SYNTHETIC", width=16))
    assert report.count("3 complete pairs") == 1 and "fewer than" not in "\n\n".join(first_screen(report))
    assert "[" not in first_screen(report)[3] and "verdict" not in first_screen(report)[3]
    assert "± sd" in report if runs == 2 else "±" not in first_screen(report)[2]
    assert "1 runs" not in report and "95% interval" not in report


def test_a_weak_teacher_is_flagged(tmp_path):
    run = fake_run(tmp_path)
    assert "Premise" not in write(run)
    report = write(change(run, "teacher_resnet50_CIFAR10", test_accuracy=86.5))
    assert "Premise not met at 2.3x: the teacher is no better than Direct" in first_screen(report)[-1]


def test_chance_level_is_called_that(tmp_path):
    run = fake_run(tmp_path)
    assert "chance level" not in write(run)
    report = write(change(run, "student_7x_HPM-KD_run1", test_accuracy=10.4))
    assert "At chance level, no better than guessing: 1 network (see Notes)." in first_screen(report)[-1]
    assert "- student_7x_HPM-KD_run1 is at chance level." in section(report, "## Notes")
    for name in [name for name in run.records if "HPM-KD_run" in name]:
        change(run, name, test_accuracy=10.4)
    assert "9 networks (see Notes)" in first_screen(write(run))[-1]


# ---- more than three methods are a ranking


def test_many_methods_are_rows_the_best_first(tmp_path, monkeypatch):
    methods = many_methods(monkeypatch, 8)
    run = fake_run(tmp_path, methods=methods, ratios=("5x", "7x"))
    evidence, report = exp.gather_evidence(run), write(run)
    head, _, *rows = tables(first_screen(report)[3] + "\n")[0]
    assert head == ["Ratio", "method", "accuracy", "minus Direct", "minus TraditionalKD", "minus HPM-KD"]
    assert [row[0] for row in rows] == ["5x"] * 8 + ["7x"] * 8
    for ratio in ("5x", "7x"):
        means = {name: exp.values_of(evidence.frame, ratio, name).mean() for name in methods}
        assert [row[1] for row in rows if row[0] == ratio] == sorted(means, key=means.get, reverse=True)
    for row in rows:
        for control, text in zip(exp.MAIN_METHODS, row[3:], strict=True):
            if (row[1], control) in evidence.pairs:
                c = evidence.pairs[row[1], control][row[0]]
                assert text == f"{c.mean:+.2f} [{c.low:+.2f}, {c.high:+.2f}] {exp.short_verdict(c)}"
            else:
                assert text == "", "a method is compared with those before it"
    said = "14 comparisons with Direct, 12 comparisons with TraditionalKD and 10 comparisons with HPM-KD"
    assert f"Holm-adjusted over {said}" in first_screen(report)[4]
    assert "All 36 comparisons" in section(report, "## Statistics")
    assert len(tables(section(report, "## Results"))[0]) == 2 + 2 * 8


def test_many_methods_share_holms_family(tmp_path, monkeypatch):
    methods = many_methods(monkeypatch, 6)
    run = fake_run(tmp_path, methods=methods, ratios=("5x", "7x"))
    evidence = exp.gather_evidence(run)
    assert evidence.controls == list(exp.MAIN_METHODS)
    for control, size in zip(exp.MAIN_METHODS, (10, 8, 6), strict=True):
        family = [c for pair, found in evidence.pairs.items() if pair[1] == control for c in found.values()]
        assert len(family) == size
        assert [c.holm_p for c in family] == pytest.approx(exp.holm(c.t_p for c in family))
    write(run)
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "compression"])
    c = evidence.pairs["Plugin-4", "Direct"]["7x"]
    assert summary.loc[("Plugin-4", "7x"), "minus_direct_p_holm"] == pytest.approx(c.holm_p, abs=1e-6)


def test_the_answer_says_who_beats_whom_and_whether_one_beats_all(tmp_path, monkeypatch):
    methods = many_methods(monkeypatch, 5)
    run = fake_run(tmp_path, methods=methods, ratios=("5x", "7x"))
    steps = {
        "TraditionalKD": (0.0, 0.0),
        "HPM-KD": (3.0, 3.0),
        "Plugin-4": (6.0, 0.0),
        methods[-1]: (9.0, 9.0),
    }
    for scale, (method, (at_5x, at_7x)) in enumerate(steps.items(), start=1):
        shifted(run, method, {"5x": at_5x, "7x": at_7x}, scale=scale)
    assert exp.answer_sentence(exp.gather_evidence(run)) == (
        "HPM-KD beats Direct at every ratio; it beats TraditionalKD at every ratio; "
        f"{methods[-1]} beats Direct at every ratio, Plugin-4 at 5x; "
        f"{methods[-1]} beats TraditionalKD at every ratio, Plugin-4 at 5x; "
        f"{methods[-1]} beats HPM-KD at every ratio, Plugin-4 at 5x; "
        f"{methods[-1]} beats all others at every ratio."
    )
    assert f"{methods[-1]} over Plugin-4 +3.00 [+" in first_screen(write(run))[4]
    assert f"{methods[-1]} over HPM-KD +6.00 [+" in first_screen(write(run))[4]
    shifted(run, methods[-1], {"5x": 9.0, "7x": 3.0}, scale=7)
    assert exp.answer_sentence(exp.gather_evidence(run)).endswith(f"{methods[-1]} beats all others at 5x.")
    shifted(run, methods[-1], {"5x": 6.0, "7x": 3.0}, scale=7)
    assert exp.answer_sentence(exp.gather_evidence(run)).endswith("no method beats all others.")


@pytest.mark.parametrize("gone", ["student", "student_7x", "_run1", "Direct", "5x_Plugin-4", "teacher"])
def test_many_methods_in_every_state(tmp_path, monkeypatch, gone):
    run = without(fake_run(tmp_path, methods=many_methods(monkeypatch, 6), ratios=("5x", "7x")), gone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = write(run)
    assert not re.search(r"\bnan\b|\binf\b|None(?!\.)", report) and "\n\n\n" not in report
    for draw in exp.FIGURES.values():
        draw(exp.gather_evidence(run))


def test_plugins_beside_the_baseline_are_in_the_answer(tmp_path, monkeypatch):
    names = many_methods(monkeypatch, 6)[3:]
    run = fake_run(tmp_path, methods=["Direct", *names], ratios=("5x", "7x"))
    for scale, (name, gain) in enumerate(zip(names, (3.0, 6.0, -3.0), strict=True), start=1):
        shifted(run, name, {"5x": gain, "7x": gain}, scale=scale)
    assert exp.answer_sentence(exp.gather_evidence(run)) == (
        f"HPM-KD is not among the methods of this run; {names[0]} and {names[1]} beat Direct at every ratio; "
        f"{names[1]} beats all others at every ratio."
    )
    for name in names:
        shifted(run, name, {"5x": -1.0, "7x": -1.0})
    answer = exp.answer_sentence(exp.gather_evidence(run))
    assert answer.endswith("; no other method beats Direct; Direct beats all others at every ratio.")


def test_methods_without_the_main_ones_are_compared_with_the_first(tmp_path, monkeypatch):
    methods = many_methods(monkeypatch, 7)[3:]
    evidence = exp.gather_evidence(fake_run(tmp_path, methods=methods, ratios=("5x",)))
    assert evidence.controls == [methods[0]]
    answer = exp.answer_sentence(evidence)
    assert answer.startswith("HPM-KD is not among the methods of this run; Direct is not among")


# ---- whatever there is


def test_every_state_is_reported(case):
    run, report = case
    missing = exp.gather_evidence(run).missing
    assert ("verdicts are provisional" in report) == bool(missing)
    assert all(f"- Missing: {gap}." in report for gap in missing)
    assert not re.search(r"\bnan\b|\binf\b|None(?!\.)|\b1 (runs|epochs|images|students)\b", report)
    assert "\n\n\n" not in report


def test_tables_are_well_formed_narrow_and_full(case):
    for head, rule, *rows in tables(case[1]):
        assert len(head) == len(rule) and all(re.fullmatch(r":--|--:", cell) for cell in rule)
        assert rows and all(len(row) == len(head) for row in rows)
        for column in zip(head, *rows, strict=True):
            assert set(column[1:]) - {"", "n/a"}, f"empty column {column[0]}"
            assert not all(re.fullmatch(r"[-+]?0(\.0+)?( \w+)?", cell) for cell in column[1:]), (
                f"column {column[0]} is zero"
            )
        for row in rows:
            assert sum(map(len, row)) <= 100, row


def test_sections_open_with_a_sentence(case):
    for text in case[1].split("\n## ")[1:]:
        opening = text.split("\n\n")[1]
        assert opening[0] not in "|#!<`" and opening.rstrip()[-1] in ".:", opening


def test_terms_are_explained_where_they_are_used_first(tmp_path):
    report = write(fake_run(tmp_path, ablation=True))
    for term, explanation in (("page", "is one view"), ("rungs", "better half goes on"), ("`select`", "held-out training images"),
                              ("assistants", "teach beside the teacher")):  # fmt: skip
        first = report.index(term)
        assert explanation in report[max(0, first - 50) : first + 250], term


def test_failures_are_said(tmp_path):
    report = write(failed(fake_run(tmp_path), "student_5x_Direct_run2"))
    assert "- Failed: student_5x_Direct_run2 (the loss became NaN)." in report
    assert "Failed: student_5x_Direct_run2." in first_screen(report)[-1]
    assert "- Missing: 5x: Direct 2 of 3 runs." in report


# ---- sections


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ({"2.3x": 0.1, "5x": 0.5, "7x": 0.9}, ["at 5x and above holds", "grows with the compression ratio"]),
        ({"2.3x": 0.9, "5x": 0.5, "7x": 0.1}, ["holds", "shrinks with the compression ratio"]),
        (
            {"2.3x": -0.5, "5x": -0.5, "7x": -0.5},
            ["is not supported (5x: worse; 7x: worse)", "no distinguishable trend"],
        ),
        ({"2.3x": 0.5, "5x": 0.5, "7x": 0.0}, ["is not supported (5x: better; 7x: not distinguishable)"]),
    ],
)
def test_hypothesis_and_trend_follow_the_numbers(tmp_path, shift, said):
    statistics = section(write(shifted(fake_run(tmp_path), "HPM-KD", shift)), "## Statistics")
    assert all(text in statistics for text in said), statistics


def test_prediction_beside_the_measurement(tmp_path):
    run = shifted(fake_run(tmp_path), "HPM-KD", {"2.3x": 0.2, "5x": 0.2, "7x": 4.0})
    _, _, *rows = tables(section(write(run), "## Original prediction"))[0]
    assert [row[0] for row in rows] == ["2.3x", "5x", "7x"] and [row[-1] for row in rows] == [
        "yes",
        "no",
        "yes",
    ]
    assert rows[1][1:4] == ["85.0", "87.5", "+2.5"] and rows[1][4].startswith("+0.20 [")


@pytest.mark.parametrize(
    "other",
    [{"width": 16}, {"dataset": "CIFAR100"}, {"epochs": 19}, {"methods": ("Direct", "TraditionalKD")}],
)
def test_prediction_is_left_out_where_it_does_not_apply(tmp_path, other):
    assert "## Original prediction" not in write(fake_run(tmp_path, 2, **other))


def test_networks_are_counted(tmp_path):
    head, _, *rows = tables(section(write(fake_run(tmp_path)), "## Results"))[1]
    assert [row[0] for row in rows] == ["teacher", "1.5x", "2.3x", "5x", "7x"]
    assert [row[head.index("counted ratio")] for row in rows] == ["1.000", "1.491", "2.298", "4.987", "7.007"]
    accuracies = [row[-1] for row in rows]
    assert (
        accuracies[0] == "92.40" and all(accuracies[1:4]) and accuracies[4] == ""
    )  # nobody is taught by a 7x
    assert [row[head.index("ms, batch 1")] for row in rows] == ["4.10", "1.90", "1.80", "1.00", "0.90"]


def test_costs_choose_their_unit(tmp_path):
    run = fake_run(tmp_path)
    head, _, *rows = tables(section(write(run), "## Costs"))[0]
    found = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert (
        found["Direct"]["total"] == "30 min"
        and found["Direct"]["teacher"] == ""
        and found["HPM-KD"]["teacher"] == "67 min"
    )
    assert found["HPM-KD"]["total"].endswith(" h") and found["HPM-KD"]["students"] == "9"
    assert "Without sharing the pages HPM-KD would take" in section(write(run), "## Costs")
    for name, record in list(run.records.items()):
        change(
            run,
            name,
            train_seconds=record.train_seconds / 1000,
            inference_seconds=record.inference_seconds / 1000,
        )
    assert " h |" not in section(write(run), "## Costs") and re.search(
        r"\| \d+ s \|", section(write(run), "## Costs")
    )
    direct = write(without(run, "KD"))
    assert tables(section(direct, "## Costs"))[0][0] == ["Method", "students", "student training", "total"]


def test_controls_that_were_not_trained_are_named(tmp_path):
    bare, full = write(fake_run(tmp_path)), write(fake_run(tmp_path, ablation=True, equal_cost=True))
    assert "(`--equal-cost`)" in bare and "(`--ablation`)" in bare
    assert "(`--equal-cost`)" not in full and "(`--ablation`)" not in full
    planned = exp.equal_cost_epochs(fake_run(tmp_path, equal_cost=True).settings)
    longer = exp.listed(f"{count} at {ratio}" for ratio, count in planned.items())
    assert f"could train longer (epochs: {longer}; here 20)" in bare


def test_the_distance_to_the_teacher_that_is_closed(tmp_path):
    """Also where nothing is closed, or there is no distance."""
    run = fake_run(tmp_path)
    values = {"teacher_resnet50_CIFAR10": 90.0}
    for number in (1, 2, 3):
        values |= {
            f"student_2.3x_Direct_run{number}": 85.0,
            f"student_2.3x_HPM-KD_run{number}": 84.0 + number,
        }
        values |= {f"student_5x_Direct_run{number}": 80.0, f"student_5x_HPM-KD_run{number}": 76.5 + number}
        values |= {f"student_7x_Direct_run{number}": 91.0, f"student_7x_HPM-KD_run{number}": 90.0 + number}
    for name, accuracy in values.items():
        change(run, name, test_accuracy=accuracy)
    assert "HPM-KD closes 20% at 2.3x and -15% at 5x of the distance from Direct to the teacher" in write(run)


def test_pilot_table(tmp_path):
    report = write(fake_run(tmp_path, 2))
    assert (
        "**HPM-KD at 5x: decoupled, beta 1, T 4 (cosine), gamma 3,000, attention, averaged views, "
        "from teacher + 1.5x + 2.3x.** Reason: candidate 2 leads" in report
    )
    chain = "teacher + 1.5x + 2.3x"
    assert f"| 2 | 1 | 3,000 | 4 | cosine | {chain} | 60.20, 71.20 | +0.30 ± 0.60 | chosen |" in report
    assert "| 8 | 2 | 3,000 | 3 | cosine | teacher + 1.5x | 60.80 | +2.10 ± 0.60 | dropped |" in report
    assert report.count("<details>") == report.count("</details>") == 3
    assert report.count("Epochs by rung: 0.7 and 1.4 (a student has 20).") == 3, (
        "240 and 480 of 351 steps each"
    )


def test_decoupled_targets_and_relations_are_said(tmp_path):
    plain = exp.Distillation(0.7, 3.0)
    assert exp.say_config(plain) == "alpha 0.7, T 3 (constant), from teacher"
    assert exp.say_config(replace(plain, beta=2.0)) == "decoupled, beta 2, T 3 (constant), from teacher"
    assert "T 3 (constant), gamma 0.5, from teacher" in exp.say_config(replace(plain, weight=0.5))
    records = fake_run(tmp_path, 1, ablation=True).records
    head, *_ = tables(exp.candidate_table(records["pilot_5x_HPM-KD_CIFAR10"]) + "\n")[0]
    assert head[:4] == ["#", "beta", "gamma", "T0"]
    pilot = records["pilot_5x_HPM-KD-paper_CIFAR10"]
    head, *_ = tables(exp.candidate_table(pilot) + "\n")[0]
    assert head[:4] == ["#", "alpha", "T0", "schedule"]
    first, *others = pilot.candidates
    changed = replace(first, config=replace(first.config, beta=2.0, weight=0.5))
    table = tables(exp.candidate_table(replace(pilot, candidates=[changed, *others])) + "\n")[0]
    assert table[0][:5] == ["#", "alpha", "beta", "gamma", "T0"]
    assert table[2][:5] == ["1", "", "2", "0.5", "4"] and table[3][:5] == ["2", "0.7", "", "", "4"]


def test_attention_that_does_not_help_is_said(tmp_path):
    run = fake_run(tmp_path, 2)
    attention = section(write(run), "### Attention")
    assert (
        "uniform weights at no ratio and the best single teacher at 2.3x, 5x and 7x" in attention
    )  # the fake's numbers
    assert "- 5x, `select`: teacher 0.50 ± 0.10, 1.5x 0.25 ± 0.10, 2.3x 0.25 ± 0.10\n" in attention
    assert "| 5x | select | 0.310 (91.40%) | 0.300 (91.50%) | 0.330 (91.00%) |" in attention
    for name, record in list(run.records.items()):
        if record.method == "HPM-KD" and record.compression == "5x" and record.attention:
            change(
                run,
                name,
                attention={
                    **record.attention,
                    "select": replace(record.attention["select"], nll_mixture=0.29),
                },
            )
    assert "uniform weights at 5x and the best" in section(write(run), "### Attention")
    assert "### Attention" not in write(without(run, "_HPM-KD_"))


def test_ablation_and_equal_cost(tmp_path):
    report = write(fake_run(tmp_path, ablation=True, equal_cost=True))
    arms = section(report, "## Ablation")
    for name, method in exp.METHODS.items():
        assert (f"- {name}: {method.about}.\n" in arms) == (method.option != "methods")
    assert "| HPM-KD-no-manager | 7x |" in arms and "| +0.00 | n/a | copy of HPM-KD |" in arms
    words = "beats|is worse than|is not distinguishable from"
    assert re.search(
        rf"\*\*HPM-KD ({words}) Direct-equal-cost .*; HPM-KD ({words}) TunedKD .*\*\* \(p below", arms
    )
    assert re.search(r"\| Direct-equal-cost \| 5x \| [\d.]+ ± [\d.]+ \| 82 \| -\d", arms)
    evidence = exp.gather_evidence(fake_run(tmp_path, ablation=True, equal_cost=True))
    c = exp.compare_cells(evidence.frame, "5x", "HPM-KD-no-chain", "HPM-KD")
    assert f"| {c.mean:+.2f} [{c.low:+.2f}, {c.high:+.2f}] | {exp.p_text(c.t_p)} |" in arms
    assert "## Ablation" not in write(fake_run(tmp_path))


@pytest.mark.parametrize("extension", [{}, {"beta": 2.0}, {"weight": 0.5}])
def test_the_note_on_the_arms_holds_for_every_default(tmp_path, monkeypatch, extension):
    default = replace(exp.HPMKD.default("5x"), **extension)
    monkeypatch.setattr(exp.HPMKD, "default", classmethod(lambda cls, compression: default))
    note = " ".join(section(write(fake_run(tmp_path, 1, ablation=True)), "## Ablation").split())
    assert "HPM-KD-no-chain comes nearest, with all that HPM-KD has beside its chain and attention." in note
    bare = exp.METHODS["HPM-KD-no-chain"].configure("5x", None)
    assert bare == replace(default, teachers=("teacher",), attention=False) and bare.view_share < 1


def test_late_runs_are_declared(tmp_path):
    run = fake_run(tmp_path)
    assert "extended after results" not in write(run)
    run.index.sessions.append(replace(run.index.sessions[0], extended="runs from 2 to 3"))
    assert "**The experiment was extended after results were seen** (runs from 2 to 3)" in write(run)


def test_sessions_and_protocol(tmp_path):
    run = fake_run(tmp_path, 1, epochs=1)
    run.index.sessions.append(replace(run.index.sessions[0], ended="", stopped=""))
    report = write(run)
    assert "| 2026-11-24 03:41 | 2026-11-24 05:10 | 2 x Tesla T4 | 2 | 2 |" in report
    assert "| not recorded (killed, or still running) |" in report and "stopped by" not in report
    assert "Students:\n1 epoch, 1 run per" in report and "45,000 images" in report
    run.index.sessions[0].stopped = "SIGTERM"
    assert "| stopped by |" in write(run)


def test_notes_and_mixed_hardware(tmp_path):
    run = fake_run(tmp_path, 2)
    run.index.notes = ["the session of today ran on another GPU"]
    change(run, "student_5x_Direct_run1", torch="2.1")
    report = write(
        change(
            run,
            "student_5x_HPM-KD_run1",
            notes=["micro-batch 64 after running out of memory"],
            device="Tesla P100",
            torch="2.0",
        )
    )
    assert "- the session of today ran on another GPU" in report
    assert "- student_5x_HPM-KD_run1: micro-batch 64" in report
    assert "not all trained with the same device: Tesla P100 and Tesla T4." in report
    assert "not all trained with the same torch: 2.0, 2.1 and 2.10.0." in report


def test_power_is_a_limitation(tmp_path):
    run = fake_run(tmp_path)
    c = exp.gather_evidence(run).main["5x"]
    limits = section(write(run), "## Limitations")
    assert f"{c.detectable:.2f} pp at 5x (n = 3)" in limits and f"{min(c.runs_needed, 1000)} at 5x" in limits
    assert "Few runs" not in section(write(fake_run(tmp_path, 2)), "## Limitations")


def test_reproduction_and_citation(tmp_path):
    run = fake_run(tmp_path, 2)
    run.index.plugins = {"mine.py": "56" * 32}
    report = write(run)
    assert "```\npython run_exp1b_kaggle.py --mode quick --dataset CIFAR10\n```" in report
    assert "- Plugin: mine.py, sha256 " + "56" * 32 in report
    assert (
        "ef" * 32 in report
        and "12" * 32 in report
        and "torch 2.10.0" in report
        and "arXiv 2512.09886" in report
    )
    run.index.merged_from = ["/runs/a", "/runs/b c"]
    assert "python run_exp1b_kaggle.py --merge /runs/a '/runs/b c'\n```" in write(run)


def test_environment_variables_never_appear(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "hunter2")
    assert "hunter2" not in write(fake_run(tmp_path, 2))


# ---- form


def test_table_cells_are_escaped_and_empty_columns_left_out():
    table = exp.markdown_table([{"a|b": "x | y\nz", "n": 1, "none": "", "unknown": "n/a"}])
    assert table.splitlines() == ["| a&#124;b | n |", "| :-- | --: |", "| x &#124; y z | 1 |"]
    assert exp.markdown_table([]) == exp.markdown_table([{"Ratio": "5x", "x": ""}]) == ""


def test_figures_are_embedded_by_relative_path_if_they_exist(tmp_path):
    run = fake_run(tmp_path, 2)
    assert "![" not in write(run)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/hpmkd_vs_direct.png").write_bytes(b"")
    assert re.findall(r"!\[.*?\]\((.*?)\)", write(run)) == ["figures/hpmkd_vs_direct.png"]


def test_every_figure_is_shown(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in exp.FIGURES:
        (tmp_path / f"figures/{name}.png").write_bytes(b"")
    report = write(fake_run(tmp_path, ablation=True, equal_cost=True))
    assert sorted(re.findall(r"figures/(\w+).png", report)) == sorted(exp.FIGURES)


def test_figures_that_fail_cost_no_table(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no font")

    monkeypatch.setattr(exp, "draw_figures", fail)
    with pytest.raises(ValueError, match="no font"):
        write(fake_run(tmp_path, 2), figures=True)
    assert "## Results" in (tmp_path / exp.REPORT_NAME).read_text() and (tmp_path / "results.csv").exists()


def test_tables_on_disk(tmp_path):
    write(fake_run(tmp_path))
    results, summary = (
        pd.read_csv(tmp_path / "results.csv", keep_default_na=False),
        pd.read_csv(tmp_path / "summary.csv"),
    )
    results.test_accuracy = results.test_accuracy.astype(float)
    assert list(results) == exp.CSV_COLUMNS and len(results) == 27
    one = summary[(summary.compression == "5x") & (summary.method == "HPM-KD")].iloc[0]
    mine = results[(results.compression == "5x") & (results.method == "HPM-KD")].test_accuracy
    assert (one.n, one.test_accuracy_mean, one.test_accuracy_sd) == pytest.approx(
        (3, mine.mean(), mine.std())
    )
    c = exp.compare_methods(results, "HPM-KD", "Direct", ["2.3x", "5x", "7x"])["5x"]
    found = (one.minus_direct, one.minus_direct_low, one.minus_direct_p, one.minus_direct_p_holm)
    assert found == pytest.approx((c.mean, c.low, c.t_p, c.holm_p), abs=1e-6)
    assert "minus_hpm-kd" not in summary, "the reverse of a planned comparison"


@pytest.mark.parametrize("runs", [1, 3])
def test_latex(tmp_path, runs):
    write(fake_run(tmp_path, runs))
    text = (tmp_path / "results_table.tex").read_text()
    columns = len(re.search(r"begin{tabular}{(.*)}", text)[1])
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + 9 and all(1 + line.count("&") == columns == 5 for line in lines)
    assert (
        all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        and "Teacher (ResNet-50): 92.40. Complete." in text
    )
    assert ("$\\pm$" in text) == ("better" in text or "unclear" in text) == (runs == 3)
    assert "±" not in text and not re.search(r"(?<!\$)[-+]\d", text.split("midrule")[1])
    write(without(fake_run(tmp_path), "student_7x"))
    assert "PARTIAL, missing: all of 7x" in (tmp_path / "results_table.tex").read_text()


def test_writing_twice_gives_the_same_files(tmp_path):
    run = fake_run(tmp_path, 2, ablation=True)
    write(run)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(run)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and len(before) == 4


# ---- archive


def test_the_archive_holds_the_files_of_the_run_and_nothing_else(tmp_path):
    run = fake_run(tmp_path / "exp1b_quick_1", 1)
    write(run)
    own = [f"figures/{name}.{kind}" for name in ("ablation", "calibration") for kind in ("png", "pdf")]
    others = [
        "thesis.docx",
        "notes.csv",
        "run.lock",
        ".hidden.tmp",
        "checkpoints/a.pt",
        "figures/holiday.png",
    ]
    for name in ("experiment.log", *own, *others):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("x")
    exp.write_archive(run)
    exp.write_archive(run)
    archive = zipfile.ZipFile(run.path / "exp1b_quick_1_results.zip")
    names = {name.removeprefix("exp1b_quick_1_results/") for name in archive.namelist()}
    tables = {"experiment_report.md", "results.csv", "results_table.tex", "summary.csv"}
    assert names == {"experiment.log", *tables, *own}


def test_an_archive_without_room_is_only_a_warning(tmp_path, monkeypatch, caplog):
    def full(path, payload):
        raise exp.DiskFull("no room to write it")

    run = fake_run(tmp_path, 1)
    monkeypatch.setattr(exp, "write_atomic", full)
    monkeypatch.setattr(exp.log, "propagate", True)
    exp.write_archive(run)
    assert "no room to write it" in caplog.text
