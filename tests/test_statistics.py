"""Statistics: every number against scipy or a closed form, the intervals' coverage by simulation, and the odd cases."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_state import change, failed, fake_run, without
from scipy import stats

import run_exp1b_kaggle as exp

DIFFERENCES = [0.31, 0.12, 0.45, -0.05, 0.27]
CONTROL = [85.0, 85.4, 84.9, 85.2, 85.1]


def arms(differences=DIFFERENCES, control=CONTROL):
    runs = range(1, len(differences) + 1)
    return {r: c + d for r, c, d in zip(runs, control, differences, strict=False)}, dict(
        zip(runs, control, strict=False)
    )


# ---- metrics


def test_nll_is_torch_cross_entropy():
    logits, labels = (
        torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 5,
        torch.arange(200) % 10,
    )
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert exp.negative_log_likelihood(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert exp.negative_log_likelihood(logits.numpy(), labels.numpy()) == pytest.approx(expected, abs=1e-12)


def test_nll_survives_extreme_fp16_logits():
    logits = np.array([[6e4, -6e4], [0.0, 0.0]], dtype=np.float16)
    assert exp.negative_log_likelihood(logits, np.array([0, 1])) == pytest.approx(math.log(2) / 2)


def test_ece_by_hand():
    # Two images at confidence 0.9 of which one is right, two at 0.6 that are both right: (2 x 0.4 + 2 x 0.4) / 4.
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert exp.expected_calibration_error(logits, np.array([0, 1, 0, 0])) == pytest.approx(0.4)


def test_bins_include_their_upper_edge():
    bins = exp.calibration_bins(np.zeros((4, 5)), np.array([0, 0, 1, 1]), bins=5)  # every confidence is 1/5
    assert bins.share.tolist() == [1, 0, 0, 0, 0] and bins.accuracy[0] == 0.5 and math.isnan(bins.accuracy[1])


def test_ece_against_a_loop_over_bins():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(500, 10)) * 2, rng.integers(0, 10, 500)
    p = torch.softmax(torch.tensor(logits), 1)
    confidence, guess = (x.numpy() for x in p.max(1))
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(
                (guess[inside] == labels[inside]).mean() - confidence[inside].mean()
            )
    assert exp.expected_calibration_error(logits, labels) == pytest.approx(expected)


def test_ece_is_zero_for_a_certain_and_right_model_and_one_for_a_certain_and_wrong_one():
    logits = np.array([[1000.0, 0.0]] * 4)
    assert exp.expected_calibration_error(logits, np.zeros(4, int)) == 0
    assert exp.expected_calibration_error(logits, np.ones(4, int)) == 1


# ---- one comparison


def compared(treatment: dict[int, float], control: dict[int, float]) -> exp.Comparison:
    """HPM-KD against Direct at 5x, given as run number -> test accuracy."""
    rows = []
    for method, accuracies in (("Direct", control), ("HPM-KD", treatment)):
        for run, accuracy in accuracies.items():
            row = {"compression": "5x", "method": method, "run": run, "status": "done", "same_as": ""}
            rows.append(row | {"test_accuracy": accuracy, "weights_sha256": f"{method} {run}"})
    return exp.compare_methods(pd.DataFrame(rows), "HPM-KD", "Direct")["5x"]


def test_comparison_against_scipy():
    treatment, control = arms()
    c = compared(treatment, control)
    reference = stats.ttest_rel(list(treatment.values()), list(control.values()))
    interval = reference.confidence_interval(0.95)
    assert c.runs == (1, 2, 3, 4, 5) and c.n == 5 and c.no_interval == ""
    assert c.differences == pytest.approx(DIFFERENCES)
    assert (c.mean, c.sd) == pytest.approx((np.mean(DIFFERENCES), np.std(DIFFERENCES, ddof=1)))
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
    assert c.t_p == pytest.approx(reference.pvalue) == c.holm_p


def test_pairs_are_formed_by_run_number():
    treatment = {1: 85.0, 3: 86.0, 4: math.nan, 5: 84.0, 6: 81.0}
    c = compared(treatment, {5: 83.0, 2: 80.0, 3: 85.5, 4: 80.0, 6: 81.5})
    assert c.runs == (3, 5, 6) and c.differences == pytest.approx((0.5, 1.0, -0.5))


@pytest.mark.parametrize("n", [3, 5])
def test_interval_covers_95_percent(n):
    draws = np.random.default_rng(n).normal(0.4, 0.3, (2000, n))
    bounds = np.array([exp.t_interval(row) for row in draws])
    covered = ((bounds[:, 0] <= 0.4) & (bounds[:, 1] >= 0.4)).mean()
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_equal_values_and_single_ones_have_no_interval():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ([], [85.0], [85.0, 85.0 + 1e-14, 85.0]):
            assert np.isnan(exp.t_interval(values)).all()
        c = exp.one_sample([0.1 + 0.2, 0.3, 0.3], (1, 2, 3))
    assert (c.sd, c.no_interval) == (0.0, "all differences are equal") and math.isnan(c.low)


# ---- power


@pytest.mark.parametrize(("n", "effect"), [(3, 2.0), (5, 1.0), (10, 0.9), (30, 0.3)])
def test_power_against_the_noncentral_t(n, effect):
    critical, shift = stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    expected = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert exp.paired_t_power(effect, n) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_detectable_difference_is_detected_in_80_percent_of_simulations(n):
    draws = np.random.default_rng(n).normal(exp.detectable_effect(n), 1, (20000, n))
    detected = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert abs(detected - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 20000)


def test_known_sample_size():
    # Any power table: a paired t-test needs 34 pairs for an effect of half a standard deviation (80%, two-sided 5%).
    assert exp.runs_needed(sd=0.4, difference=0.2) == 34


@pytest.mark.parametrize("sd", [0.001, 0.05, 0.1, 0.3, 1.0, 5.0])
def test_runs_needed_is_the_smallest_number(sd):
    n = exp.runs_needed(sd)
    assert exp.paired_t_power(0.2 / sd, n) >= 0.8
    assert n == 2 or exp.paired_t_power(0.2 / sd, n - 1) < 0.8


# ---- odd cases


def test_identical_is_what_has_the_same_weights():
    frame = frame_of({"5x": [0.0, 0.0, 0.0]})
    c = exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]
    assert exp.verdict(c) == "no verdict: all differences are equal", "equal accuracies of different networks"
    frame["weights_sha256"] = frame.run.map(str)
    c = exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]
    assert exp.verdict(c) == "identical weights", "trained twice, by losses that come to the same"
    frame.loc[frame.method == "HPM-KD", "same_as"] = "Direct"
    c = exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]
    assert exp.verdict(c) == "identical by construction" and math.isnan(c.t_p) and math.isnan(c.low)
    assert (c.mean, c.sd) == (0, 0)
    frame.loc[frame.run == 2, "weights_sha256"] = ["a", "b"]
    assert exp.verdict(exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]).startswith("no verdict")


def test_two_pairs_give_no_verdict():
    c = exp.compare_methods(frame_of({"5x": [0.50, 0.51]}), "HPM-KD", "Direct")["5x"]
    assert math.isnan(c.holm_p), "it would be below 0.01 by chance alone"
    assert exp.verdict(c) == "no verdict: fewer than 3 pairs"
    assert (
        exp.verdict(exp.compare_methods(frame_of({"5x": [0.50, 0.51, 0.52]}), "HPM-KD", "Direct")["5x"])
        == "better"
    )


def test_equal_differences_that_are_not_zero_get_no_verdict():
    c = compared({1: 85.3, 2: 84.3, 3: 80.3}, {1: 85.1, 2: 84.1, 3: 80.1})  # 0.2 with rounding errors
    assert c.sd == 0 and c.mean == pytest.approx(0.2) and math.isnan(c.t_p)
    assert exp.verdict(c) == "no verdict: all differences are equal"


def test_one_pair_and_none():
    one, none = compared({1: 85.0}, {1: 84.0}), compared({1: 85.0}, {2: 84.0})
    assert one.mean == 1.0 and math.isnan(one.sd) and math.isnan(one.low)
    assert exp.verdict(one) == "no verdict: fewer than 3 pairs"
    assert none.n == 0 and math.isnan(none.mean) and exp.verdict(none) == "no verdict: no complete pair"
    zero = compared({1: 85.0}, {1: 85.0})  # one equality proves nothing
    assert exp.verdict(zero).startswith("no verdict")


# ---- Holm, verdicts, hypothesis


def test_holm_by_hand():
    assert exp.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert exp.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert exp.holm([0.02]) == [0.02] and exp.holm([]) == []


def test_holm_counts_planned_tests_without_a_p():
    adjusted = exp.holm([0.01, math.nan, 0.03])
    assert (
        adjusted[0] == pytest.approx(0.03) and adjusted[2] == pytest.approx(0.06) and math.isnan(adjusted[1])
    )


def test_holm_keeps_the_family_wise_error():
    p = np.random.default_rng(0).uniform(size=(4000, 3))
    wrong = np.mean([min(exp.holm(row)) < 0.05 for row in p])
    assert abs(wrong - (1 - (1 - 0.05 / 3) ** 3)) < 0.015


def frame_of(differences: dict[str, list[float]], ratio_actual=None) -> pd.DataFrame:
    rows = []
    for ratio, values in differences.items():
        for run, value in enumerate(values, 1):
            for method, accuracy in (("Direct", 85.0 + run / 10), ("HPM-KD", 85.0 + run / 10 + value)):
                rows.append({"compression": ratio, "method": method, "run": run, "status": "done", "test_accuracy": accuracy,
                             "teacher_accuracy": 92.0, "weights_sha256": f"{method} {run}", "same_as": "", "ratio_nominal": exp.RATIOS[ratio],
                             "ratio_actual": (ratio_actual or exp.RATIOS)[ratio]})  # fmt: skip
    return pd.DataFrame(rows)


BETTER, WORSE, UNCLEAR = (
    [0.5, 0.52, 0.48, 0.51, 0.49],
    [-0.5, -0.52, -0.48, -0.51, -0.49],
    [0.5, -0.5, 0.2, -0.3, 0.1],
)


def test_verdicts():
    found = exp.compare_methods(frame_of({"2.3x": UNCLEAR, "5x": BETTER, "7x": WORSE}), "HPM-KD", "Direct")
    assert [exp.verdict(c) for c in found.values()] == ["not distinguishable", "better", "worse"]
    assert [c.holm_p for c in found.values()] == pytest.approx(exp.holm(c.t_p for c in found.values()))


def test_verdict_uses_the_adjusted_p():
    values = [0.5, 0.1, 0.6, 0.05, 0.35]
    alone = exp.compare_methods(frame_of({"5x": values}), "HPM-KD", "Direct")["5x"]
    among = exp.compare_methods(frame_of({"2.3x": UNCLEAR, "5x": values, "7x": UNCLEAR}), "HPM-KD", "Direct")[
        "5x"
    ]
    assert alone.t_p == among.t_p < 0.05 < among.holm_p
    assert exp.verdict(alone) == "better" and exp.verdict(among) == "not distinguishable"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"2.3x": UNCLEAR, "5x": BETTER, "7x": BETTER}, "holds"),
        ({"2.3x": BETTER, "5x": BETTER, "7x": UNCLEAR}, "is not supported"),
        ({"2.3x": BETTER, "5x": WORSE, "7x": BETTER}, "is not supported"),
        ({"5x": BETTER}, "cannot be judged yet"),
        ({"5x": UNCLEAR}, "is not supported"),
        ({"5x": [0.0] * 3, "7x": BETTER}, "cannot be judged yet"),
        ({"5x": BETTER, "7x": [0.5]}, "cannot be judged yet"),
        ({}, "cannot be judged yet"),
    ],
)
def test_hypothesis_needs_both_ratios(cells, expected):
    found = exp.compare_methods(frame_of(cells), "HPM-KD", "Direct") if cells else {}
    assert exp.hypothesis(found).startswith(expected)


def test_failed_runs_do_not_count():
    frame = frame_of({"5x": BETTER})
    frame.loc[frame.run == 2, "status"] = "failed"
    assert exp.compare_methods(frame, "HPM-KD", "Direct")["5x"].runs == (1, 3, 4, 5)


def test_premise():
    frame = frame_of({"5x": BETTER, "7x": BETTER})
    assert exp.unmet_premises(frame, ["5x", "7x", "2.3x"]) == []
    frame.loc[frame.compression == "7x", "teacher_accuracy"] = (
        85.3  # what the Direct students reach on average
    )
    assert exp.unmet_premises(frame, ["5x", "7x"]) == ["7x"]
    assert exp.unmet_premises(frame.assign(teacher_accuracy=math.nan), ["5x", "7x"]) == []


# ---- trend


def test_trend_is_the_slope_per_doubling_of_the_counted_ratio():
    counted = {"2.3x": 2.0, "5x": 4.0, "7x": 8.0}
    frame = frame_of({"2.3x": [0.1, 0.2, 0.0], "5x": [0.4, 0.6, 0.3], "7x": [0.7, 1.0, 0.6]}, counted)
    trend = exp.trend_test(frame)
    assert trend.differences == pytest.approx([0.3, 0.4, 0.3]) and trend.runs == (1, 2, 3)
    assert trend.t_p == pytest.approx(stats.ttest_1samp([0.3, 0.4, 0.3], 0).pvalue)
    assert exp.verdict(trend) == "better"


def test_trend_uses_complete_runs_and_says_when_it_cannot():
    frame = frame_of({"2.3x": [0.1, 0.2, 0.0, 0.1], "5x": [0.4, 0.6, 0.5], "7x": [0.7, 1.0, 0.6, 0.8]})
    assert exp.trend_test(frame).runs == (1, 2, 3)
    assert "two ratios" in exp.trend_test(frame_of({"5x": BETTER})).no_interval


def test_trend_falls_back_to_nominal_ratios():
    values = {"2.3x": [0.1, 0.2, 0.0], "5x": [0.4, 0.6, 0.3]}
    frame = frame_of(values).assign(ratio_actual=math.nan)
    assert exp.trend_test(frame).differences == exp.trend_test(frame_of(values)).differences


# ---- scipy's warnings


@pytest.mark.parametrize("n", [2, 3, 5, 50])
def test_power_is_computed_without_a_warning(n):
    exp.detectable_effect.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < exp.detectable_effect(n) < 50
        assert exp.runs_needed(0.3) > 2
        with pytest.raises(RuntimeWarning), np.errstate(divide="warn"):
            np.float64(1) / np.float64(0)  # others are still seen


# ---- chance level


@pytest.mark.parametrize(("accuracy", "images", "guessing"), [(10.0, 10_000, True), (11.0, 10_000, True), (12.0, 10_000, False),
                                                             (12.0, 1_000, True), (15.0, 1_000, False), (5.0, 1_000, True)])  # fmt: skip
def test_chance_level(tmp_path, accuracy, images, guessing):
    record = fake_run(tmp_path, 1).records["student_5x_Direct_run1"]
    assert exp.chance_level(replace(record, test_accuracy=accuracy), images) == guessing


def test_metrics_of_known_logits():
    logits = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [4.0, 0, 0], [0, 4.0, 0]], dtype=torch.float16)
    metrics = exp.test_metrics(logits, torch.tensor([0, 1, 1, 1]))
    assert metrics["test_accuracy"] == 75.0
    assert metrics["test_class_accuracy"][:2] == pytest.approx([100, 200 / 3]) and math.isnan(
        metrics["test_class_accuracy"][2]
    )
    assert metrics["test_nll"] == pytest.approx(math.log(math.exp(4) + 2) - 3)  # one of the four lacks 4 nats
    assert metrics["test_ece"] == pytest.approx(abs(0.75 - math.exp(4) / (math.exp(4) + 2)))


# ---- frame


def test_frame_has_the_promised_columns_in_order(tmp_path):
    run = fake_run(tmp_path, 3, ablation=True, equal_cost=True)
    frame = exp.results_frame(run)
    assert list(frame) == [*exp.CSV_COLUMNS, "job"]
    assert exp.CSV_COLUMNS == [
        "dataset", "compression", "ratio_nominal", "ratio_actual", "method", "run", "seed", "params", "macs", "teacher_accuracy",
        "val_accuracy", "test_accuracy", "retention", "test_nll", "test_ece", "epochs", "train_seconds", "images_per_second",
        "device", "precision", "status", "same_as", "weights_sha256"]  # fmt: skip
    assert frame.compression.drop_duplicates().tolist() == ["2.3x", "5x", "7x"]
    assert frame[frame.compression == "5x"].method.drop_duplicates().tolist() == exp.in_order(exp.METHODS)
    row = frame.iloc[0]
    assert (row.dataset, row.seed, row.epochs, row.status) == ("CIFAR10", 43, 20, "done")
    assert row.ratio_actual == pytest.approx(23_520_842 / 10_235_000) and row.teacher_accuracy == 92.4
    assert row.retention == pytest.approx(100 * row.test_accuracy / 92.4)
    assert exp.values_of(frame, "5x", "Direct-equal-cost", "epochs").tolist() == [82, 82, 82]
    copies = frame[(frame.method == "HPM-KD-no-manager") & (frame.compression == "7x")]
    assert copies.same_as.tolist() == ["HPM-KD"] * 3  # an arm that equals another has its rows like any other


def test_frame_of_nothing_and_of_failures(tmp_path):
    nothing = exp.results_frame(without(fake_run(tmp_path, 1), "student"))
    assert len(nothing) == 0 and list(nothing) == [*exp.CSV_COLUMNS, "job"]
    assert exp.trend_test(nothing).n == 0
    run = failed(fake_run(tmp_path, 1), "student_5x_Direct_run1")
    frame = exp.results_frame(run)
    row = frame[frame.job == "student_5x_Direct_run1"].iloc[0]
    assert (
        (row.status, row.seed, row.epochs) == ("failed", 43, 0)
        and math.isnan(row.test_accuracy)
        and pd.isna(row.params)
    )
    assert len(exp.values_of(frame, "5x", "Direct")) == 0
    text = frame.to_csv()
    assert (
        ",4716000," in text and "4716000.0" not in text
    )  # one missing number does not turn counts into fractions


# ---- costs


def pages(run, runs):
    """The distinct pages of some runs."""
    return {
        page
        for number in runs
        for page in exp.page_order(run.settings.seed, number, run.settings.student_epochs)
    }


def tiny_costs(tmp_path):
    """One ratio, two runs; a page of the teacher takes 10 s, of an assistant 1 s."""
    run = fake_run(tmp_path, 2, ratios=("5x",))
    for name, record in run.records.items():
        seconds = {"teacher": 1000.0, "assistant": 100.0, "pilot": 50.0, "student": 10.0}[record.kind]
        per_page = {"teacher": 10.0, "assistant": 1.0}.get(record.kind, math.nan)
        change(run, name, train_seconds=seconds, inference_seconds=per_page / run.index.data.train)
    return run


def test_costs_count_each_page_once_per_method(tmp_path):
    run = tiny_costs(tmp_path)
    costs, distinct = exp.method_costs(run), len(pages(run, (1, 2)))
    assert costs.students.tolist() == [2, 2, 2]
    assert costs.total["Direct"] == 20 and costs.teacher["Direct"] == 0  # it needs no teacher
    assert costs.teacher_outputs["TraditionalKD"] == pytest.approx(10 * distinct)
    assert costs.total["TraditionalKD"] == pytest.approx(1000 + 20 + 10 * distinct)
    assert costs.unshared["TraditionalKD"] == pytest.approx(10 * 2 * 20)
    # HPM-KD: students, assistants and pilot, together, see every page of the teacher, 1.5x and 2.3x.
    assert costs.teacher_outputs["HPM-KD"] == pytest.approx(12 * distinct)
    assert costs.assistants["HPM-KD"] == 200 and costs.pilots["HPM-KD"] == 50
    assert costs.student_training["HPM-KD"] == 20
    assert costs.total["HPM-KD"] == pytest.approx(1000 + 200 + 50 + 20 + 12 * distinct)
    # Run 2's attention is judged on run 1's first page. The pilot needs two pages. The assistants have one and two teachers.
    judged = len(pages(run, (2,)) | {exp.page_order(run.settings.seed, 1, 1)[0]})
    students = 12 * (20 + judged)
    assert costs.unshared["HPM-KD"] == pytest.approx(students + 2 * 12 + 20 * 10 + 20 * 11)


def test_a_pilot_pays_for_the_pages_that_its_candidates_used_and_no_more(tmp_path):
    run = without(tiny_costs(tmp_path), "run2")
    pilot, student = "pilot_5x_HPM-KD_CIFAR10", "student_5x_HPM-KD_run1"
    change(run, student, config=replace(run.records[student].config, teachers=("teacher",)))
    change(run, "assistant_1.5x_CIFAR10", history=[])
    change(run, "assistant_2.3x_CIFAR10", history=[])
    steps = 45_000 // run.settings.batch_size  # of an epoch
    config = exp.Distillation(teachers=("teacher", "1.5x"))
    candidates = [
        exp.Candidate(config, [steps, 3 * steps + 1], [60.0, 70.0], 0.0, 0.0),
        exp.Candidate(replace(config, teachers=("teacher", "2.3x")), [steps], [60.0], 0.0, 0.0),
    ]
    change(run, pilot, candidates=candidates, config=config)
    costs = exp.method_costs(run)
    assert costs.teacher_outputs["HPM-KD"] == pytest.approx(20 * 10 + 4 * 1 + 1 * 1)
    change(run, pilot, candidates=[replace(candidates[0], steps=[])])  # a single candidate is never trained
    assert exp.method_costs(run).teacher_outputs["HPM-KD"] == pytest.approx(20 * 10)


def test_a_method_pays_for_the_networks_that_it_needed_and_for_theirs(tmp_path):
    run = fake_run(tmp_path, 1, ratios=("7x",), ablation=True)
    arm = "student_7x_HPM-KD-no-manager_run1"
    change(run, arm, same_as="", config=exp.Distillation(teachers=("teacher", "1.5x")))
    costs = exp.method_costs(run)
    assert costs.assistants["HPM-KD"] == 2400
    assert costs.assistants["HPM-KD-no-manager"] == 800
    student = "student_7x_TraditionalKD_run1"
    change(run, student, config=exp.Distillation(teachers=("5x",)))
    costs = exp.method_costs(run)
    assert costs.assistants["TraditionalKD"] == 2400 and costs.teacher["TraditionalKD"] == 4000


def test_costs_of_one_ratio_and_of_nothing(tmp_path):
    run = fake_run(tmp_path, 2)
    assert [exp.method_costs(run, ratio).assistants["HPM-KD"] for ratio in run.settings.compression] == [
        800,
        1600,
        2400,
    ]
    assert exp.method_costs(run, "2.3x").students["HPM-KD"] == 2
    total = exp.method_costs(run)
    assert (
        total.assistants["HPM-KD"] == 2400 and total.pilots["HPM-KD"] == 1500
    )  # assistants are shared, pilots are not
    # Pages of 10 s. Two, three and four teachers for two students per ratio, 20 pages for run 1 and `judged` for run 2; two
    # pages for the pilots; one, two and three teachers for the assistants, once.
    judged = len(pages(run, (2,)) | {exp.page_order(run.settings.seed, 1, 1)[0]})
    assert total.unshared["HPM-KD"] == pytest.approx(
        10 * ((2 + 3 + 4) * (20 + judged) + 2 * (2 + 3 + 4) + 20 * (1 + 2 + 3))
    )
    assert exp.method_costs(without(run, "student")).empty


def test_a_copy_costs_what_its_training_costs_and_a_control_its_own_pilot(tmp_path):
    costs = exp.method_costs(fake_run(tmp_path, 2, ablation=True))
    assert costs.student_training["HPM-KD-no-manager"] == costs.student_training["HPM-KD"] > 0
    assert costs.pilots["TunedKD"] == 1500 and costs.assistants["TunedKD"] == 0
    assert costs.pilots["HPM-KD"] == costs.pilots["HPM-KD-no-chain"] == 1500
    assert costs.pilots["HPM-KD-no-manager"] == 0


# ---- evidence


def test_evidence_lists_what_is_missing(tmp_path):
    assert exp.gather_evidence(fake_run(tmp_path, 3, ablation=True)).missing == []
    run = without(fake_run(tmp_path, 3, ablation=True), "student_7x", "student_5x_HPM-KD_run2", "teacher")
    assert exp.gather_evidence(run).missing == ["the teacher", "5x: HPM-KD 2 of 3 runs", "all of 7x"]
    run = without(fake_run(tmp_path, 2), "run1")
    assert exp.gather_evidence(run).missing[0] == "2.3x: Direct 1, TraditionalKD 1 and HPM-KD 1 of 2 runs"


def test_every_method_is_compared_with_those_before_it(tmp_path):
    evidence = exp.gather_evidence(fake_run(tmp_path, 3, ablation=True, equal_cost=True))
    assert evidence.methods == ["Direct", "TraditionalKD", "HPM-KD"]
    assert evidence.extra_methods[0] == "Direct-equal-cost" and len(evidence.extra_methods) == 10
    assert list(evidence.pairs) == [
        ("TraditionalKD", "Direct"),
        ("HPM-KD", "Direct"),
        ("HPM-KD", "TraditionalKD"),
    ]
    assert evidence.main is evidence.pairs["HPM-KD", "Direct"]
    assert [c.holm_p for c in evidence.main.values()] == pytest.approx(
        exp.holm(c.t_p for c in evidence.main.values())
    )
    assert exp.gather_evidence(fake_run(tmp_path, 3, methods=("Direct", "TraditionalKD"))).main == {}


def test_holm_counts_the_planned_ratios(tmp_path):
    run = fake_run(tmp_path, 3)
    before = exp.gather_evidence(run).main["5x"]
    after = exp.gather_evidence(without(run, "student_7x", "student_2.3x")).main["5x"]
    assert after.t_p == before.t_p and after.holm_p == pytest.approx(min(1, 3 * after.t_p))


def test_arms_that_equal_another_method(tmp_path):
    evidence = exp.gather_evidence(fake_run(tmp_path, 3, ablation=True))
    copies = evidence.frame[evidence.frame.same_as != ""]
    found = {(row.compression, row.method): row.same_as for row in copies.itertuples()}
    assert found == {
        ("2.3x", "TunedKD"): "TraditionalKD",
        ("2.3x", "HPM-KD-no-manager"): "HPM-KD",
        ("7x", "HPM-KD-no-manager"): "HPM-KD",
    }
    c = exp.compare_cells(evidence.frame, "7x", "HPM-KD-no-manager", "HPM-KD")
    assert (c.no_interval, c.n) == ("identical by construction", 3)


def test_evidence_finds_records_and_figures(tmp_path):
    run = failed(fake_run(tmp_path, 2), "student_5x_HPM-KD_run1")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/ablation.png").write_bytes(b"")
    evidence = exp.gather_evidence(run)
    assert exp.embed(evidence, "ablation") == "![ablation](figures/ablation.png)"
    assert exp.embed(evidence, "temperature") == ""
    assert [record.job for record in evidence.records("student", "HPM-KD", "5x")] == [
        "student_5x_HPM-KD_run2"
    ]
    assert len(evidence.records("student")) == 17 and len(evidence.records("assistant")) == 3


# ---- material


def test_fake_logits_are_plausible(tmp_path):  # guards the other files' material
    run = fake_run(tmp_path, 1, images=2000)
    for logits in run.logits.values():
        assert 0.6 < (logits.argmax(1) == run.labels).mean() < 0.97
