"""Section 13: every statistic against scipy or a closed form, the intervals' coverage by simulation, and the odd cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fake_state import fake_labels, fake_logits, fake_state
from scipy import stats

import run_exp1b_kaggle as exp

DIFFERENCES = [0.31, 0.12, 0.45, -0.05, 0.27]
CONTROL = [85.0, 85.4, 84.9, 85.2, 85.1]


def arms(differences=DIFFERENCES, control=CONTROL):
    runs = range(1, len(differences) + 1)
    return {r: c + d for r, c, d in zip(runs, control, differences, strict=False)}, dict(zip(runs, control, strict=False))


# ---- metrics


def test_nll_is_torch_cross_entropy():
    logits, labels = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * 5, torch.arange(200) % 10
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
            expected += inside.mean() * abs((guess[inside] == labels[inside]).mean() - confidence[inside].mean())
    assert exp.expected_calibration_error(logits, labels) == pytest.approx(expected)


def test_ece_is_zero_for_a_certain_and_right_model_and_one_for_a_certain_and_wrong_one():
    logits = np.array([[1000.0, 0.0]] * 4)
    assert exp.expected_calibration_error(logits, np.zeros(4, int)) == 0
    assert exp.expected_calibration_error(logits, np.ones(4, int)) == 1


# ---- one comparison


def test_comparison_against_scipy():
    treatment, control = arms()
    c = exp.paired_comparison(treatment, control)
    reference = stats.ttest_rel(list(treatment.values()), list(control.values()))
    interval = reference.confidence_interval(0.95)
    assert c.runs == (1, 2, 3, 4, 5) and c.n == 5 and c.unmatched == () and c.no_interval == ""
    assert c.differences == pytest.approx(DIFFERENCES)
    assert (c.mean, c.sd) == pytest.approx((np.mean(DIFFERENCES), np.std(DIFFERENCES, ddof=1)))
    assert (c.low, c.high) == pytest.approx((interval.low, interval.high))
    assert c.t_p == pytest.approx(reference.pvalue) == c.holm_p
    pairs = list(itertools.product(treatment.values(), control.values()))
    assert c.improvement == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_sign_flip_p_is_the_exact_enumeration(n):
    values = np.random.default_rng(n).normal(0.3, 1, n)
    means = [np.dot(signs, values) / n for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean([abs(m) >= abs(values.mean()) - 1e-12 for m in means])
    c = exp.one_sample(values, range(n))
    assert c.sign_flip_p == pytest.approx(expected)
    assert c.sign_flip_floor == 2 / 2**n <= c.sign_flip_p


def test_sign_flip_floors_named_in_the_design():
    assert exp.one_sample([1.0, 2, 3], range(3)).sign_flip_p == exp.one_sample([1.0, 2, 3], range(3)).sign_flip_floor == 0.25
    assert exp.one_sample([1.0, 2, 3, 4, 5], range(5)).sign_flip_p == 0.0625


def test_pairs_are_formed_by_run_number():
    c = exp.paired_comparison({1: 85.0, 3: 86.0, 4: math.nan, 5: 84.0}, {5: 83.0, 2: 80.0, 3: 85.5, 4: 80.0})
    assert c.runs == (3, 5) and c.differences == pytest.approx((0.5, 1.0))
    assert c.unmatched == (1, 2, 4)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_covers_95_percent(n):
    draws = np.random.default_rng(n).normal(0.4, 0.3, (4000, n))
    bounds = np.array([exp.mean_interval(row)[2:] for row in draws])
    covered = ((bounds[:, 0] <= 0.4) & (bounds[:, 1] >= 0.4)).mean()
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


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


def test_identical_by_construction_is_what_has_the_same_weights():
    frame = frame_of({"5x": [0.0, 0.0, 0.0]})
    c = exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]
    assert exp.verdict(c) == "no verdict: all differences are equal", "equal accuracies of different networks"
    frame["weights_sha256"] = frame.run.map(str)
    c = exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]
    assert exp.verdict(c) == "identical by construction" and math.isnan(c.t_p) and math.isnan(c.low)
    assert (c.mean, c.sd, c.improvement) == (0, 0, 0.5)
    frame.loc[frame.run == 2, "weights_sha256"] = ["a", "b"]
    assert exp.verdict(exp.compare_methods(frame, "HPM-KD", "Direct")["5x"]).startswith("no verdict")


def test_two_pairs_give_no_verdict():
    c = exp.compare_methods(frame_of({"5x": [0.50, 0.51]}), "HPM-KD", "Direct")["5x"]
    assert c.holm_p < 0.01, "by chance alone"
    assert exp.verdict(c) == "no verdict: fewer than 3 pairs"
    assert exp.verdict(exp.compare_methods(frame_of({"5x": [0.50, 0.51, 0.52]}), "HPM-KD", "Direct")["5x"]) == "better"


def test_equal_differences_that_are_not_zero_get_no_verdict():
    c = exp.paired_comparison({1: 85.3, 2: 84.3, 3: 80.3}, {1: 85.1, 2: 84.1, 3: 80.1})  # 0.2 with rounding errors
    assert c.sd == 0 and c.mean == pytest.approx(0.2) and math.isnan(c.t_p)
    assert exp.verdict(c) == "no verdict: all differences are equal"


def test_one_pair_and_none():
    one, none = exp.paired_comparison({1: 85.0}, {1: 84.0}), exp.paired_comparison({1: 85.0}, {2: 84.0})
    assert one.mean == 1.0 and math.isnan(one.sd) and math.isnan(one.low) and "no spread" in exp.verdict(one)
    assert none.n == 0 and math.isnan(none.mean) and exp.verdict(none) == "no verdict: no complete pair"
    zero = exp.paired_comparison({1: 85.0}, {1: 85.0})  # one equality proves nothing
    assert exp.verdict(zero).startswith("no verdict")


# ---- Holm, verdicts, hypothesis


def test_holm_by_hand():
    assert exp.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert exp.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    assert exp.holm([0.02]) == [0.02] and exp.holm([]) == []


def test_holm_counts_planned_tests_without_a_p():
    adjusted = exp.holm([0.01, math.nan, 0.03])
    assert adjusted[0] == pytest.approx(0.03) and adjusted[2] == pytest.approx(0.06) and math.isnan(adjusted[1])


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
                             "teacher_accuracy": 92.0, "weights_sha256": f"{method} {run}", "ratio_nominal": exp.RATIOS[ratio],
                             "ratio_actual": (ratio_actual or exp.RATIOS)[ratio]})  # fmt: skip
    return pd.DataFrame(rows)


BETTER, WORSE, UNCLEAR = [0.5, 0.52, 0.48, 0.51, 0.49], [-0.5, -0.52, -0.48, -0.51, -0.49], [0.5, -0.5, 0.2, -0.3, 0.1]


def test_verdicts():
    found = exp.compare_methods(frame_of({"2.3x": UNCLEAR, "5x": BETTER, "7x": WORSE}), "HPM-KD", "Direct")
    assert [exp.verdict(c) for c in found.values()] == ["not distinguishable at 5 runs", "better", "worse"]
    assert [c.holm_p for c in found.values()] == pytest.approx(exp.holm(c.t_p for c in found.values()))


def test_verdict_uses_the_adjusted_p():
    values = [0.5, 0.1, 0.6, 0.05, 0.35]
    alone = exp.compare_methods(frame_of({"5x": values}), "HPM-KD", "Direct")["5x"]
    among = exp.compare_methods(frame_of({"2.3x": UNCLEAR, "5x": values, "7x": UNCLEAR}), "HPM-KD", "Direct")["5x"]
    assert alone.t_p == among.t_p < 0.05 < among.holm_p
    assert exp.verdict(alone) == "better" and exp.verdict(among) == "not distinguishable at 5 runs"


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
    frame.loc[frame.compression == "7x", "teacher_accuracy"] = 85.3  # what the Direct students reach on average
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
    frame = frame_of({"2.3x": [0.1, 0.2, 0.0], "5x": [0.4, 0.6], "7x": [0.7, 1.0, 0.6]})
    assert exp.trend_test(frame).runs == (1, 2) and exp.trend_test(frame).unmatched == (3,)
    assert "two ratios" in exp.trend_test(frame_of({"5x": BETTER})).no_interval
    assert exp.trend_test(exp.results_frame({**fake_state(), "jobs": {}})).n == 0


def test_trend_falls_back_to_nominal_ratios():
    values = {"2.3x": [0.1, 0.2, 0.0], "5x": [0.4, 0.6, 0.3]}
    frame = frame_of(values).assign(ratio_actual=math.nan)
    assert exp.trend_test(frame).differences == exp.trend_test(frame_of(values)).differences


# ---- images


def test_mcnemar_by_hand():
    labels = np.zeros(10, int)
    first, second = np.tile([1.0, 0.0], (10, 1)), np.tile([1.0, 0.0], (10, 1))
    first[:1], second[1:7] = [0.0, 1.0], [0.0, 1.0]  # the first misses image 0, the second images 1 to 6
    assert exp.mcnemar(first, second, labels) == (6, 1, pytest.approx(2 * (1 + 7) / 2**7))
    assert exp.mcnemar(first, first, labels) == (0, 0, 1.0)


def test_bootstrap_over_images_has_the_binomial_width():
    rng = np.random.default_rng(0)
    labels = np.zeros(3000, int)
    right = lambda p: np.stack([(rng.random(3000) < p) * 1.0, np.full(3000, 0.5)], 1)  # noqa: E731
    pairs = [(right(0.9), right(0.8)) for _ in range(2)]
    low, high = exp.image_bootstrap(pairs, labels)
    error = 100 * math.sqrt((0.9 * 0.1 + 0.8 * 0.2) / 2 / 3000)
    assert low < 10 < high and high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert exp.image_bootstrap(pairs, labels) == (low, high)  # a report written twice is the same


# ---- frame and costs


def test_frame_has_the_promised_columns_in_order():
    frame = exp.results_frame(fake_state(3, ablation=True))
    assert list(frame)[: len(exp.CSV_COLUMNS)] == exp.CSV_COLUMNS == [
        "dataset", "compression", "ratio_nominal", "ratio_actual", "method", "run", "seed", "params", "macs", "teacher_accuracy",
        "val_accuracy", "test_accuracy", "retention", "test_nll", "test_ece", "epochs", "train_seconds", "images_per_second",
        "device", "precision", "status", "same_as", "weights_sha256"]  # fmt: skip
    assert frame.compression.drop_duplicates().tolist() == ["2.3x", "5x", "7x"]
    assert frame[frame.compression == "5x"].method.drop_duplicates().tolist()[:3] == list(exp.METHODS)
    row = frame.iloc[0]
    assert row.ratio_actual == pytest.approx(23_520_842 / 10_235_000) and row.teacher_accuracy == 92.4
    assert row.retention == pytest.approx(100 * row.test_accuracy / 92.4)
    copies = frame[(frame.method == "HPM-KD-no-chain") & (frame.compression == "2.3x")]
    assert len(copies) == 3  # an arm that equals another by construction has its rows like any other


def test_frame_of_nothing_and_of_failures():
    state = fake_state(1)
    assert len(exp.results_frame({**state, "jobs": {}})) == 0
    failed = state["jobs"]["student_5x_Direct_run1"]
    state["jobs"] = {failed["job"]: {k: failed[k] for k in ("job", "kind", "compression", "method", "run", "seed")} | {"status": "failed"}}
    frame = exp.results_frame(state)
    assert frame.status.tolist() == ["failed"] and math.isnan(frame.test_accuracy[0])


def tiny_costs():
    state = fake_state(2, ratios=("5x",))
    jobs = state["jobs"]
    for record in jobs.values():
        record.update(pages={}, train_seconds=10.0)
    jobs["teacher_resnet50_CIFAR10"]["train_seconds"] = 1000.0
    jobs["intermediate_2.3x_CIFAR10"].update(train_seconds=200.0, pages={"T": {"0": 1.0, "7": 2.0}})
    jobs["pilot_5x"].update(train_seconds=50.0, pages={"T": {"0": 1.0}, "I": {"0": 0.5}})
    for run, page in ((1, "1"), (2, "2")):
        jobs[f"student_5x_TraditionalKD_run{run}"]["pages"] = {"T": {"0": 1.0, page: 1.0}}
        jobs[f"student_5x_HPM-KD_run{run}"]["pages"] = {"T": {"0": 1.0, page: 1.0}, "I": {"0": 0.5}}
    return state


def test_costs_count_each_page_once_per_method():
    costs = exp.method_costs(tiny_costs())
    assert costs.total["Direct"] == 20  # no teacher
    assert costs.total["TraditionalKD"] == 1000 + 20 + 3  # pages 0, 1 and 2
    assert costs.total["HPM-KD"] == 1000 + 200 + 50 + 20 + 5.5  # pages 0, 1, 2 and 7 of the teacher, 0 of the intermediate
    assert costs.unshared["HPM-KD"] == 3 + 1.5 + 2 * 2.5
    assert costs.students.tolist() == [2, 2, 2]


def test_costs_of_a_reused_pilot_and_of_one_ratio():
    state = tiny_costs()
    state["jobs"]["pilot_5x"].update(train_seconds=0.0, seconds_saved=50.0, reused_from="elsewhere")
    assert exp.method_costs(state).pilots["HPM-KD"] == 50
    full = fake_state(2)
    one = exp.method_costs(full, "2.3x")
    assert one.intermediates["HPM-KD"] == 0 and one.students["HPM-KD"] == 2
    assert exp.method_costs(full, "5x").intermediates["HPM-KD"] == 800
    assert exp.method_costs(full, "7x").intermediates["HPM-KD"] == 1600
    assert exp.method_costs({**full, "jobs": {}}).empty


def test_evidence_lists_what_is_missing():
    state = fake_state(3, ablation=True)
    assert exp.gather_evidence(state, exp.results_frame(state), {}, None).missing == []
    for name in [n for n in state["jobs"] if "student_7x" in n] + ["student_5x_HPM-KD_run2", "teacher_resnet50_CIFAR10"]:
        del state["jobs"][name]
    assert exp.gather_evidence(state, exp.results_frame(state), {}, None).missing == [
        "the teacher", "5x: HPM-KD 2 of 3 runs", "all of 7x"]  # fmt: skip


def test_arms_that_equal_another_method():
    state = fake_state(3, ablation=True)
    record = state["jobs"]["student_5x_HPM-KD-no-manager_run1"]
    for run in (2, 3):
        del state["jobs"][f"student_5x_HPM-KD-no-manager_run{run}"]
    record["same_as"] = "TraditionalKD"
    frame = exp.results_frame(state)
    evidence = exp.gather_evidence(state, frame, {}, None)
    c = exp.compare_cells(frame, "2.3x", "HPM-KD-no-chain", "HPM-KD")
    assert (c.no_interval, c.n) == ("identical by construction", 3)
    assert evidence.twins["5x", "HPM-KD-no-manager"] == "TraditionalKD"
    assert evidence.missing == ["5x: HPM-KD-no-manager 1 of 3 runs"]


# ---- material


def test_fake_logits_are_plausible():  # guards the other files' material
    state, labels = fake_state(1), fake_labels()
    for logits in fake_logits(state, labels).values():
        assert 0.6 < (logits.argmax(1) == labels).mean() < 0.97
