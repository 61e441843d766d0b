"""HPM-KD's components: attention, successive halving, candidates and chains, the job graph, twins, memory, costs."""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lab import do, open_lab, pilot, shortcuts, student, teacher

import run_exp1b_kaggle as exp

TRADITIONAL = exp.Distillation(alpha=0.5, temperature=4.0, schedule="constant", teachers=("teacher",), attention=False)

# ---- Attention -------------------------------------------------------------------------------------------------------


def half_right(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Two teachers, each right and sure on one half of the images, and wrong and unsure on the other."""
    rng = np.random.default_rng(seed)
    labels, first = rng.integers(0, 10, images), rng.random(images) < 0.5
    logits = rng.normal(0, 0.5, (2, images, 10))
    for teacher_number, knows in enumerate((first, ~first)):
        said = np.where(knows, labels, (labels + rng.integers(1, 10, images)) % 10)
        logits[teacher_number, np.arange(images), said] += np.where(knows, 6.0, 2.0)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), first


def nll(logits: torch.Tensor, labels: torch.Tensor, weights: np.ndarray) -> float:
    p = logits.double().softmax(2).numpy()
    mixed = sum(weights[:, m, None] * p[m] for m in range(len(p)))
    return float(-np.log(mixed[np.arange(len(labels)), labels.numpy()]).mean())


def test_a_new_attention_is_the_uniform_mean_and_weights_sum_to_one() -> None:
    logits = torch.randn(3, 50, 10) * 4
    network = exp.AttentionNetwork(3, 10)
    assert torch.equal(exp.attention_weights(network, logits), torch.full((50, 3), 1 / 3))
    torch.nn.init.normal_(network.scores.weight)
    weights = exp.attention_weights(network, logits)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert weights.min() >= 0
    assert weights.std(0).min() > 0


def test_the_attention_learns_which_teacher_is_right_and_beats_the_uniform_mean() -> None:
    """Judged on images that it was not fitted on."""
    network = exp.train_attention(*half_right(400, 0)[:2], seed=1)
    logits, labels, first = half_right(1_000, 9)
    weights = exp.attention_weights(network, logits).numpy().astype(float)
    assert weights[first, 0].mean() > 0.8
    assert weights[~first, 1].mean() > 0.8
    assert nll(logits, labels, weights) < nll(logits, labels, np.full((1_000, 2), 0.5)) - 0.2
    said = exp.attention_diagnostics(network, logits, labels, ("teacher", "2.3x"))
    singles = [nll(logits, labels, np.tile(np.eye(2)[m], (1_000, 1))) for m in range(2)]
    assert said["nll_mixture"] == pytest.approx(nll(logits, labels, weights), rel=1e-4)
    assert said["nll_uniform"] == pytest.approx(nll(logits, labels, np.full((1_000, 2), 0.5)), rel=1e-4)
    assert said["nll_best_single"] == pytest.approx(min(singles), rel=1e-4)
    assert said["best_single"] == ("teacher", "2.3x")[int(np.argmin(singles))]
    assert said["mean_weight"] == pytest.approx(weights.mean(0), rel=1e-4)


def test_the_attention_is_a_function_of_its_arguments() -> None:
    logits, labels, _ = half_right(60, 0)
    torch.manual_seed(1)
    first = exp.train_attention(logits, labels, 1).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = exp.train_attention(logits, labels, 1).state_dict(), exp.train_attention(logits, labels, 2).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_the_entropy_term_keeps_the_weights_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sign: the more of it, the closer the weights stay to uniform where one teacher is better."""
    logits, labels, _ = half_right(200, 0)
    spread = []
    for bonus in (0.0, 0.01, 5.0):
        monkeypatch.setattr(exp.AttentionNetwork, "ENTROPY_BONUS", bonus)
        weights = exp.attention_weights(exp.train_attention(logits, labels, 1), logits)
        spread.append((weights - 0.5).abs().mean().item())
    assert spread[0] >= spread[1] > spread[2] + 0.1


# ---- Successive halving ----------------------------------------------------------------------------------------------


def images_right(shares: dict[int, float], images: int = 1_000) -> Any:
    """An objective: candidate c gets the first shares[c] of the images right, whatever the steps; and the calls made."""
    calls: list[tuple[int, int, int]] = []

    def evaluate(rung: int, candidate: int, steps: int) -> np.ndarray:
        calls.append((rung, candidate, steps))
        return np.arange(images) < images * shares.get(candidate, 0.1)

    return evaluate, calls


def test_halving_keeps_the_better_half_and_always_candidate_one() -> None:
    evaluate, calls = images_right({0: 0.05, 3: 0.6, 5: 0.7, 6: 0.5, 1: 0.4})
    result = exp.successive_halving(8, 2_400, evaluate)
    assert [alive for _, alive in result.rungs] == [list(range(8)), [0, 3, 5, 6], [0, 5]]
    assert result.chosen == 5
    assert [(rung, candidate) for rung, candidate, _ in calls] == [(r, c) for r, (_, alive) in enumerate(result.rungs) for c in alive]
    assert [steps for steps, _ in result.rungs] == [100, 200, 400], "every rung gets a third of the budget"
    assert "candidate 6 beat TraditionalKD" in result.reason
    assert result.compared(3) == pytest.approx((55.0, 100 * np.std([1] * 550 + [0] * 450, ddof=1) / math.sqrt(1_000)))


@pytest.mark.parametrize("budget", [24, 25, 47, 337, 10_530, 26_325])
def test_halving_never_spends_more_than_its_budget(budget: int) -> None:
    evaluate, calls = images_right({4: 0.9})
    exp.successive_halving(8, budget, evaluate)
    assert sum(steps for *_, steps in calls) <= budget
    assert sum(steps for *_, steps in calls) > 0.5 * budget, "and not much less"


def test_the_incumbent_stays_unless_beaten_by_more_than_one_paired_standard_error() -> None:
    """k images gained and one lost out of n: the paired error is far below that of two independent shares."""

    def gaining(gained: int, lost: int, images: int = 400) -> exp.Halving:
        base = np.arange(images) < images // 2
        other = base.copy()
        other[images // 2 : images // 2 + gained] = True
        other[:lost] = False
        return exp.successive_halving(2, 100, lambda rung, candidate, steps: other if candidate else base)

    for gained, lost in ((0, 0), (1, 1), (1, 0), (2, 1), (2, 0), (5, 4), (9, 4), (3, 0), (0, 9)):
        changes = np.array([1.0] * gained + [-1.0] * lost + [0.0] * (400 - gained - lost))
        beaten = changes.mean() > changes.std(ddof=1) / 20
        result = gaining(gained, lost)
        assert result.chosen == int(beaten), (gained, lost)
        assert ("did not beat" in result.reason) == (not beaten)
    assert gaining(9, 4).chosen == 1, "13 images of 400 that change suffice, since runs are paired"
    assert gaining(1, 0).chosen == 0, "one image does not: its standard error is as large"


def test_a_candidate_that_only_starts_well_is_not_chosen() -> None:
    def evaluate(rung: int, candidate: int, steps: int) -> np.ndarray:
        share = (0.9 if rung < 2 else 0.4) if candidate == 2 else 0.5
        return np.arange(1_000) < 1_000 * share

    assert exp.successive_halving(8, 2_400, evaluate).chosen == 0


def test_a_real_pilot_stays_in_its_budget_and_tabulates_what_it_did(tmp_path: Path) -> None:
    """1.5 times a student's steps, counted in optimizer steps; whatever the number of runs."""
    steps: dict[str, int] = {}

    def step(self: exp.Fitting, index: torch.Tensor, page: int) -> torch.Tensor:
        steps[self.name] = steps.get(self.name, 0) + 1
        return torch.zeros(())

    with shortcuts() as patch:
        patch.setattr(exp.Fitting, "_step", step)
        lab = open_lab(tmp_path / "lab", student_epochs=6, runs=5, compression=("2.3x",))
        record = do(lab, teacher(lab), pilot(lab))[pilot(lab).name]
    del steps[teacher(lab).name]
    assert sum(steps.values()) == 24 <= 1.5 * 6 * 3
    assert record["chosen"] == 0, "untrained candidates are equal"
    assert exp.Distillation.from_plain(record["config"]) == TRADITIONAL
    table = record["candidates"]
    assert [entry["config"] for entry in table] == [c.plain() for c in exp.pilot_candidates("2.3x", "HPM-KD")]
    assert [len(entry["rungs"]) for entry in table] == [3, 3, 2, 2, 1, 1, 1, 1]
    assert [entry["kept"] for entry in table] == [True] + [False] * 7
    assert set(record["pages"][teacher(lab).name]) == {str(page) for page in exp.page_order(42, 1, 2)}


# ---- Candidates, chains, switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["HPM-KD", "TunedKD"])
@pytest.mark.parametrize("compression", exp.RATIOS)
def test_the_candidates_of_a_pilot(compression: str, method: str) -> None:
    candidates = exp.pilot_candidates(compression, method)
    assert len(candidates) >= 8
    assert candidates[0] == TRADITIONAL == exp.Distillation()
    assert len(set(candidates)) == len(candidates)
    allowed = {"2.3x": set(), "5x": {"2.3x"}, "7x": {"2.3x", "5x"}}[compression]
    for candidate in candidates:
        assert candidate.alpha in (0.3, 0.5, 0.7, 0.9)
        assert candidate.temperature in (2.0, 4.0, 6.0)
        assert len(set(candidate.teachers)) == len(candidate.teachers) >= 1
        assert set(candidate.teachers) <= {"teacher", *allowed}
        assert len(candidate.teachers) > 1 or not candidate.attention
    varied = {name: {getattr(c, name) for c in candidates} for name in ("schedule", "teachers", "attention")}
    if method == "TunedKD":
        assert varied == {"schedule": {"constant"}, "teachers": {("teacher",)}, "attention": {False}}
    else:
        assert varied["schedule"] == {"constant", "cosine", "loss", "convergence"}
        assert {name for teachers in varied["teachers"] for name in teachers} == {"teacher", *allowed}
        assert varied["attention"] == ({False, True} if allowed else {False})


def test_the_ladder_and_the_intermediates() -> None:
    assert [exp.ladder_above(compression) for compression in ("2.3x", "5x", "7x")] == [(), ("2.3x",), ("2.3x", "5x")]
    assert exp.intermediate_config("2.3x") == TRADITIONAL
    assert exp.intermediate_config("5x") == replace(TRADITIONAL, teachers=("teacher", "2.3x"), attention=True)


CHOSEN = [config for r in exp.RATIOS for config in exp.pilot_candidates(r, "HPM-KD")]


@pytest.mark.parametrize("chosen", dict.fromkeys(CHOSEN), ids=str)
def test_each_switch_changes_what_it_names_and_nothing_else(chosen: exp.Distillation) -> None:
    expected: dict[str, exp.Distillation | None] = {
        "Direct": None,
        "Direct-equal-cost": None,
        "TraditionalKD": TRADITIONAL,
        "HPM-KD": chosen,
        "TunedKD": chosen,  # of its own pilot
        "HPM-KD-no-chain": replace(chosen, teachers=("teacher",), attention=False),
        "HPM-KD-no-attention": replace(chosen, attention=False),
        "HPM-KD-no-temperature": replace(chosen, schedule="constant"),
        "HPM-KD-no-manager": replace(chosen, alpha=0.5, temperature=4.0),
    }
    assert {method: exp.method_config(method, chosen) for method in expected} == expected
    assert set(expected) == {*exp.METHODS, *exp.ABLATIONS, exp.EQUAL_COST}


# ---- The graph -------------------------------------------------------------------------------------------------------


def settings_of(**given: Any) -> exp.Settings:
    return exp.new_settings({"mode": "smoke", "width": 8, **given})


@pytest.mark.parametrize(("ratios", "runs", "students"), [(3, 2, 18), (3, 3, 27), (3, 5, 45), (1, 1, 3)])
def test_nine_student_files_per_run(ratios: int, runs: int, students: int) -> None:
    jobs = exp.planned_jobs(settings_of(runs=runs, compression=tuple(exp.RATIOS)[:ratios]))
    assert sum(job.kind == "student" for job in jobs) == students
    assert len({job.name for job in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("compression", "intermediates"),
    [(("2.3x",), []), (("5x",), ["2.3x"]), (("7x",), ["2.3x", "5x"]), (("2.3x", "5x"), ["2.3x"]), (("2.3x", "7x"), ["2.3x", "5x"])],
)
def test_intermediates_only_where_the_chain_needs_them(compression: tuple[str, ...], intermediates: list[str]) -> None:
    def planned(**given: Any) -> list[str]:
        jobs = exp.planned_jobs(settings_of(compression=compression, **given))
        return [job.compression for job in jobs if job.kind == "intermediate"]

    assert planned() == planned(ablation=True) == planned(methods=("HPM-KD",)) == intermediates
    assert planned(methods=("Direct", "TraditionalKD")) == []


def subsets(values: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [chosen for n in range(1, len(values) + 1) for chosen in itertools.combinations(values, n)]


def chosen_by(job: exp.Job, number: int) -> dict[str, Any]:
    """The record of a finished job, whose pilot chose this candidate."""
    record: dict[str, Any] = {"status": "done"}
    if job.kind == "pilot":
        record["config"] = exp.pilot_candidates(job.compression, job.method)[number].plain()
    return record


@pytest.mark.parametrize("compression", subsets(tuple(exp.RATIOS)), ids=str)
def test_every_graph_can_be_worked_off(compression: tuple[str, ...]) -> None:
    """For all methods and arms, and for every choice of the pilots: no cycle, no job that waits for one not planned."""
    for methods, ablation, equal_cost in itertools.product(subsets(exp.METHODS), (False, True), (False, True)):
        if (ablation or equal_cost) and "HPM-KD" not in methods:
            continue
        settings = settings_of(compression=compression, methods=methods, ablation=ablation, equal_cost=equal_cost, runs=2)
        jobs = exp.planned_jobs(settings)
        order = exp.priorities(jobs, settings, 10)
        names = [job.name for job in jobs]
        for job in jobs:
            assert all(names.index(needed.name) < names.index(job.name) for needed in exp.needs(job, settings, {}))
        for number in (0, 1, 7) if ablation else (0,):
            records: dict[str, Any] = {}
            while ready := exp.ready_jobs(jobs, settings, records, order):
                records[ready[-1].name] = chosen_by(ready[-1], number)
            assert set(records) == set(names)


def test_what_each_job_waits_for() -> None:
    settings = settings_of(ablation=True, equal_cost=True, runs=1)
    waits = {job.name: {needed.name for needed in exp.needs(job, settings, {})} for job in exp.planned_jobs(settings)}
    first = "teacher_resnet50_SYNTHETIC"
    assert waits[first] == waits["student_7x_Direct_run1"] == set()
    assert waits["student_5x_TraditionalKD_run1"] == waits["pilot_7x_TunedKD_SYNTHETIC"] == {first}
    assert waits["intermediate_5x_SYNTHETIC"] == {first, "intermediate_2.3x_SYNTHETIC"}
    assert waits["pilot_7x_HPM-KD_SYNTHETIC"] == {first, "intermediate_2.3x_SYNTHETIC", "intermediate_5x_SYNTHETIC"}
    assert waits["student_7x_HPM-KD_run1"] == waits["student_7x_HPM-KD-no-chain_run1"] == {"pilot_7x_HPM-KD_SYNTHETIC"}
    assert waits["student_7x_TunedKD_run1"] == {"pilot_7x_TunedKD_SYNTHETIC"}
    assert waits["student_7x_Direct-equal-cost_run1"] == {"student_7x_Direct_run1", "student_7x_HPM-KD_run1"}


# ---- Twins: arms that are identical by construction ------------------------------------------------------------------


def twins(number: int, compression: str = "5x", methods: tuple[str, ...] = exp.METHODS) -> dict[str, str]:
    """Which arm is whose copy when HPM-KD's pilot chose that candidate and TunedKD's its first."""
    settings = settings_of(compression=(compression,), runs=1, ablation=True, methods=methods)
    jobs = exp.planned_jobs(settings)
    records = {job.name: chosen_by(job, 0 if job.method == "TunedKD" else number) for job in jobs}
    found = {job.method: exp.twin_of(job, settings, records) for job in jobs if job.kind == "student"}
    return {method: twin.method for method, twin in found.items() if twin is not None}


def test_which_arms_are_not_trained_again() -> None:
    arms = ("HPM-KD", *exp.ABLATIONS)
    assert twins(0) == dict.fromkeys(arms, "TraditionalKD"), "the pilot kept TraditionalKD's setting"
    own = {"TunedKD": "TraditionalKD", "HPM-KD-no-temperature": "HPM-KD"}
    assert twins(1) == own, "a chain with attention at a constant temperature"
    assert twins(3) == {"TunedKD": "TraditionalKD", "HPM-KD-no-manager": "HPM-KD"}, "alpha and T are TraditionalKD's"
    assert twins(4) == {**own, "HPM-KD-no-chain": "HPM-KD", "HPM-KD-no-attention": "HPM-KD", "HPM-KD-no-manager": "TraditionalKD"}
    alone = twins(0, methods=("HPM-KD",))
    assert "HPM-KD" not in alone
    assert "TunedKD" not in alone, "another pilot's choice is not known when it starts"


def test_a_copy_is_a_full_result_that_says_whose_it_is(tmp_path: Path) -> None:
    """HPM-KD's rows are in the results although nothing was trained for them, with the cost that training has."""
    trained = []
    fit = exp.Fitting.run
    with shortcuts(0, steps=False) as patch:
        patch.setattr(exp.Fitting, "run", lambda self: (trained.append(self.name), fit(self))[1])
        lab = open_lab(tmp_path / "lab", compression=("5x",), ablation=True)
        records = do(lab)
    students = ["student_5x_Direct_run1", "student_5x_TraditionalKD_run1"]
    assert sorted(trained) == ["intermediate_2.3x_SYNTHETIC", *students, "teacher_resnet50_SYNTHETIC"]
    original = student(lab, "TraditionalKD", "5x")
    source = exp.load_checkpoint(lab.folder.model_file(original.name))
    for method in ("HPM-KD", *exp.ABLATIONS):
        job = student(lab, method, "5x")
        content, record = exp.load_checkpoint(lab.folder.model_file(job.name)), records[job.name]
        assert content["record"] == record
        assert record["same_as"] == "TraditionalKD"
        own = {
            "job": job.name,
            "method": method,
            "file": f"{job.name}.pt",
            "fingerprint": exp.job_fingerprint(lab.settings, lab.state, job),
            "taught_by": exp.taught_by(job, records),
        }
        assert {key: record[key] for key in own} == own
        rest = {key: value for key, value in record.items() if key not in (*own, "same_as")}
        assert rest == {key: source["record"][key] for key in rest}
        assert torch.equal(content["test_logits"], source["test_logits"])
        assert all(torch.equal(content["model"][key], value) for key, value in source["model"].items())
    assert records[original.name]["same_as"] == ""
    frame = exp.results_frame(lab.state)
    rows = frame[frame.method.isin(["TraditionalKD", "HPM-KD"])].set_index("method")
    assert rows.status.tolist() == ["done", "done"]
    assert rows.test_accuracy.nunique() == rows.train_seconds.nunique() == 1


def test_two_components_that_change_nothing_share_one_original(tmp_path: Path) -> None:
    """A copy of a copy names the arm that was trained; distinct arms are trained."""
    with shortcuts(4, steps=False):
        lab = open_lab(tmp_path / "lab", compression=("2.3x",), ablation=True)
        records = do(lab)
    same = {record["method"]: record["same_as"] for record in records.values() if record["kind"] == "student"}
    original = dict.fromkeys(("TunedKD", "HPM-KD-no-manager"), "TraditionalKD")
    original |= dict.fromkeys(("HPM-KD-no-chain", "HPM-KD-no-attention", "HPM-KD-no-temperature"), "HPM-KD")
    assert same == {**dict.fromkeys(exp.METHODS, ""), **original}
    for method, value in same.items():
        if value:
            twin = records[student(lab, value).name]
            assert twin["same_as"] == ""
            assert records[student(lab, method).name]["weights_sha256"] == twin["weights_sha256"]


# ---- Costs -----------------------------------------------------------------------------------------------------------


class Clock(SimpleNamespace):
    """Stands for the module `time`: what a test says takes time does, nothing else."""

    def __init__(self) -> None:
        super().__init__(now=0.0, time=lambda: 0.0, sleep=lambda _: None, monotonic=lambda: 0.0)

    def perf_counter(self) -> float:
        return self.now


def test_every_second_is_counted_once(tmp_path: Path) -> None:
    """A step takes 1 s, a pass of a teacher 100, a fit of the attention 10: pages are not in the seconds of training."""
    clock = Clock()
    compute, attention = exp.TeacherOutputs._compute, exp.train_attention

    def slow(seconds: float, action: Any) -> Any:
        def acting(*arguments: Any) -> Any:
            clock.now += seconds
            return action(*arguments)

        return acting

    with shortcuts() as patch:
        patch.setattr(exp, "time", clock)
        patch.setattr(exp.Fitting, "_step", slow(1, lambda *_: torch.zeros(())))
        patch.setattr(exp, "train_attention", slow(10, attention))
        lab = open_lab(tmp_path / "lab", compression=("5x",), student_epochs=2)
        patch.setattr(exp.Experiment, "infer", slow(100, exp.Experiment.infer))
        predict = exp.Experiment.predict
        patch.setattr(
            exp.Experiment,
            "predict",
            lambda self, network, split: slow(-100 * len(split.pixels.split(exp.CHUNK)), predict)(self, network, split),
        )
        records = do(lab)
    assert compute is exp.TeacherOutputs._compute
    seconds = {name: record["train_seconds"] for name, record in records.items()}
    assert seconds[teacher(lab).name] == seconds["student_5x_Direct_run1"] == seconds["student_5x_TraditionalKD_run1"] == 6
    tuned = records[pilot(lab, compression="5x").name]
    candidates = exp.pilot_candidates("5x", "HPM-KD")
    fits = sum(len(entry["rungs"]) for entry, config in zip(tuned["candidates"], candidates, strict=True) if config.attention)
    steps = sum(steps for entry in tuned["candidates"] for steps, _ in entry["rungs"])
    assert fits > 0
    assert seconds[pilot(lab, compression="5x").name] == steps + 10 * fits
    pages = {cost for record in records.values() for used in record.get("pages", {}).values() for cost in used.values()}
    assert pages == {100}


def test_hpmkds_students_are_charged_for_their_attention(tmp_path: Path) -> None:
    clock = Clock()
    attention = exp.train_attention

    def slow(*arguments: Any) -> Any:
        clock.now += 10
        return attention(*arguments)

    with shortcuts(1, steps=False) as patch:
        patch.setattr(exp, "time", clock)
        patch.setattr(exp, "train_attention", slow)
        lab = open_lab(tmp_path / "lab", compression=("5x",), methods=("HPM-KD",), student_epochs=1)
        record = do(lab)[student(lab, "HPM-KD", "5x").name]
    assert record["train_seconds"] == record["prepare_seconds"] == 10


def macs(name: str) -> int:
    return exp.network_cost(name, 10, 8)[1]


def test_the_equal_cost_arm_gets_the_whole_computation_of_hpmkd(tmp_path: Path) -> None:
    """One ratio, one run: teacher, intermediate, pilot, student and pages, each counted here; three passes per trained image."""
    lab = open_lab(tmp_path / "lab", compression=("5x",), student_epochs=4, teacher_epochs=6, equal_cost=True)
    pages = len(set(exp.page_order(42, 1, 4)))
    total = 3 * 6 * macs("teacher") + 3 * 4 * macs("2.3x") + 3 * 1.5 * 4 * macs("5x") + 3 * 4 * macs("5x")
    total += pages * (macs("teacher") + macs("2.3x"))
    assert exp.job_epochs(lab, student(lab, exp.EQUAL_COST, "5x")) == round(total / (3 * macs("5x")))
    assert exp.job_epochs(lab, student(lab, "Direct", "5x")) == 4
    shared = open_lab(tmp_path / "shared", compression=("2.3x", "5x"), student_epochs=4, teacher_epochs=6, equal_cost=True, runs=2)
    pages = len({page for run in (1, 2) for page in exp.page_order(42, run, 4)})
    common = 3 * 6 * macs("teacher") + 3 * 4 * macs("2.3x") + pages * (macs("teacher") + macs("2.3x"))
    total = common / 4 + 3 * 1.5 * 4 * macs("5x") / 2 + 3 * 4 * macs("5x")
    assert exp.job_epochs(shared, student(shared, exp.EQUAL_COST, "5x", 2)) == round(total / (3 * macs("5x")))


def test_the_equal_cost_arm_is_direct_for_longer(tmp_path: Path) -> None:
    with shortcuts(1, steps=False):
        lab = open_lab(tmp_path / "lab", compression=("2.3x",), student_epochs=1, teacher_epochs=1, equal_cost=True)
        record = do(lab)[student(lab, exp.EQUAL_COST).name]
    assert record["epochs"] == len(record["history"]) == exp.equal_cost_epochs(lab, student(lab, exp.EQUAL_COST)) > 1
    assert (record["config"], record["pages"], record["taught_by"]) == ({}, {}, {})


# ---- Memory ----------------------------------------------------------------------------------------------------------


def remembered(folder: Path, **given: Any) -> Path:
    """A run folder with finished pilots at 5x that chose candidate 2 and took 12.5 seconds."""
    with shortcuts(1):
        lab = open_lab(folder, compression=("5x",), ablation=True, **given)
        records = do(lab, pilot(lab, "HPM-KD", "5x"), pilot(lab, "TunedKD", "5x"))
    for record in records.values():
        record["train_seconds"] = 12.5
    exp.save_plain(lab.folder.index_file, lab.state)
    return folder


def recalling(folder: Path, memory: Path, **given: Any) -> exp.Experiment:
    lab = open_lab(folder, **{"compression": ("5x",), "ablation": True, **given})
    lab.state["memory"] = exp.read_memory(memory)
    return lab


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What is logged, also where an earlier test has started the script's own logging."""
    monkeypatch.setattr(exp.log, "propagate", True)
    caplog.set_level(logging.INFO, exp.log.name)
    return caplog


def test_an_identical_problem_skips_the_pilot_and_records_what_that_saved(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    memory = remembered(tmp_path / "first")
    with shortcuts() as patch:  # a pilot would now be run in earnest
        patch.setattr(exp, "successive_halving", lambda *_: pytest.fail("a pilot was run"))
        lab = recalling(tmp_path / "second", memory, seed=7, runs=4)
        record = do(lab, pilot(lab, compression="5x"))[pilot(lab, compression="5x").name]
        assert exp.Distillation.from_plain(record["config"]) == exp.pilot_candidates("5x", "HPM-KD")[1]
        assert (record["chosen"], record["reused_from"], len(record["candidates"])) == (1, "first", 8)
        assert (record["seconds_saved"], record["train_seconds"], record["pages"]) == (12.5, 0.0, {})
        assert exp.method_costs({**lab.state, "jobs": {**lab.state["jobs"], "x": STUDENT}}).pilots["HPM-KD"] == 12.5
        exp.save_plain(lab.folder.index_file, lab.state)
        third = recalling(tmp_path / "third", lab.folder.path)
        again = do(third, pilot(third, compression="5x"))[pilot(third, compression="5x").name]
    assert again["seconds_saved"] == 12.5, "a memory of a memory"
    assert "configuration reused from first" in said.text


STUDENT = {"kind": "student", "status": "done", "method": "HPM-KD", "compression": "5x", "train_seconds": 0.0}


@pytest.mark.parametrize(
    ("given", "differs"),
    [
        ({"student_epochs": 1}, "student_epochs 2 there, 1 here"),
        ({"teacher_epochs": 5}, "teacher_epochs 2 there, 5 here"),
        ({"train_size": 400}, "train 180 there, 360 here"),
        ({"width": 16}, "width 8 there, 16 here"),
        ({"lr": 0.1}, "lr 0.05 there, 0.1 here"),
        ({"batch_size": 30}, "batch_size 60 there, 30 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_problem_is_said_and_the_memory_ignored(
    tmp_path: Path, said: pytest.LogCaptureFixture, given: dict[str, Any], differs: str
) -> None:
    lab = recalling(tmp_path / "second", remembered(tmp_path / "first"), **given)
    assert exp.recall_pilot(lab, pilot(lab, compression="5x")) is None
    assert "about another problem and is not used" in said.text
    assert differs in said.text


def test_another_data_set_ratio_or_protocol_is_no_identical_problem(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = remembered(tmp_path / "first")
    lab = recalling(tmp_path / "second", memory, compression=("7x",))
    assert exp.recall_pilot(lab, pilot(lab, compression="7x")) is None
    assert exp.recall_pilot(lab, exp.Job("pilot", "5x", "HPM-KD", dataset="CIFAR10")) is None
    assert said.text.count("holds no such pilot") == 2
    assert exp.recall_pilot(lab, pilot(lab, compression="5x")) is not None
    monkeypatch.setattr(exp, "PROTOCOL", exp.PROTOCOL + 1)
    assert exp.recall_pilot(lab, pilot(lab, compression="5x")) is None


def test_an_unusable_memory_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run, a broken index, another version, no finished pilot; and nothing is created."""
    good = remembered(tmp_path / "good")
    state = exp.load_plain(exp.RunFolder(good).index_file)
    cases = {
        "nowhere": "there is no run",
        "empty": "there is no run",
        "broken": "checksum",
        "version": "version 0.1",
        "pilotless": "no finished pilot",
    }
    for name in list(cases)[1:]:
        exp.RunFolder(tmp_path / name).create()
    broken = exp.RunFolder(tmp_path / "broken").index_file
    broken.write_bytes(exp.RunFolder(good).index_file.read_bytes().replace(b"SYNTHETIC", b"SYNTHETIK", 1))
    exp.save_plain(exp.RunFolder(tmp_path / "version").index_file, {**state, "script": {"version": "0.1", "sha256": ""}})
    exp.save_plain(exp.RunFolder(tmp_path / "pilotless").index_file, {**state, "jobs": {}})
    for name, reason in cases.items():
        before = sorted((tmp_path / name).rglob("*"))
        code = exp.main(["--mode", "smoke", "--output-dir", str(tmp_path / "new"), "--memory", str(tmp_path / name)])
        lines = capsys.readouterr().out.splitlines()
        assert code == 2
        assert len(lines) == 1
        assert reason in lines[0]
        assert sorted((tmp_path / name).rglob("*")) == before
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["--ablation", "--equal-cost"])
def test_an_arm_without_hpmkd_to_compare_with_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exp.main(["--mode", "smoke", "--methods", "Direct", "TraditionalKD", option]) == 2
    assert "compares with HPM-KD" in capsys.readouterr().out
