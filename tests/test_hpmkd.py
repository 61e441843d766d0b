"""HPM-KD: its components are there at every ratio, each can be taken away, and they compute what they should."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import do, hundred_classes, open_lab, pilot, shortcuts, student, teacher

import run_exp1b_kaggle as exp

pytestmark = pytest.mark.usefixtures("small_networks")

RATIOS = list(exp.RATIOS)


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_configuration_is_hpmkd(ratio: str) -> None:
    """Default and candidates: teacher and assistants, attention, a moving temperature; averaged views and both extensions.

    Those of HPM-KD-paper have the first three and none of the rest.
    """
    for method in (exp.HPMKD, exp.HPMKDPaper):
        candidates = method.candidates(ratio)
        assert len(set(candidates)) == len(candidates) == 8 and candidates[0] == method.default(ratio)
        for config in candidates:
            assert config.teachers[0] == "teacher" and len(config.teachers) >= 2
            assert set(config.teachers[1:]) <= set(exp.larger_assistants(ratio))
            assert config.attention and config.schedule != "constant"
            extended = (config.view_share < 1, config.beta > 0, config.weight > 0)
            assert set(extended) == {method is exp.HPMKD}
        by_first_epoch = {(c.alpha, c.beta, c.weight, c.temperature, c.teachers) for c in candidates}
        assert len(by_first_epoch) == 8, "the first rung of a pilot ends before a schedule acts"
    assert {config.beta for config in exp.HPMKD.candidates(ratio)} == {1, 2, 4, 8}
    assert exp.HPMKD.described(ratio) == ("teacher",)
    assert exp.HPMKDPaper.described(ratio) == exp.METHODS["HPM-KD-no-relations"].described(ratio) == ()


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_arm_of_the_ablation_differs_in_its_component(ratio: str) -> None:
    """And in nothing else; without the manager it is the default, whatever the pilot chose."""
    chosen = exp.HPMKD.candidates(ratio)[-1]
    components = {
        "HPM-KD-no-chain": {"teachers", "attention"}, "HPM-KD-no-attention": {"attention"},
        "HPM-KD-no-temperature": {"schedule"}, "HPM-KD-no-memory": {"view_share"},
        "HPM-KD-coupled": {"beta"}, "HPM-KD-no-relations": {"weight"},
    }  # fmt: skip
    full = dataclasses.asdict(exp.HPMKD.configure(ratio, chosen))
    for name, expected in components.items():
        arm = dataclasses.asdict(exp.METHODS[name].configure(ratio, chosen))
        assert {key for key in full if full[key] != arm[key]} == expected
    assert exp.METHODS["HPM-KD-no-manager"].configure(ratio, chosen) == exp.HPMKD.default(ratio)


def test_the_assistants_that_teach_are_planned() -> None:
    """1.5x for 2.3x; 1.5x and 2.3x for 5x; all three for 7x; none without HPM-KD."""
    for ratio, expected in (("2.3x", ["1.5x"]), ("5x", ["1.5x", "2.3x"]), ("7x", ["1.5x", "2.3x", "5x"])):
        jobs = exp.planned_jobs(exp.new_settings({"compression": (ratio,)}))
        assert [job.compression for job in jobs if job.kind == "assistant"] == expected
    jobs = exp.planned_jobs(exp.new_settings({"methods": ("Direct", "TraditionalKD")}))
    assert {job.kind for job in jobs} == {"teacher", "student"}


def test_the_papers_components_have_a_pilot_of_their_own() -> None:
    """So its configuration does not depend on what HPM-KD's pilot has chosen; the other arms follow that."""
    jobs = exp.planned_jobs(exp.new_settings({"compression": ("7x",), "ablation": True}))
    assert [job.method for job in jobs if job.kind == "pilot"] == ["HPM-KD", "TunedKD", "HPM-KD-paper"]
    of_arm = {job.method: exp.pilot_of(job) for job in jobs if job.kind == "student"}
    assert {name: pilot.method for name, pilot in of_arm.items() if pilot and pilot.method != "HPM-KD"} == {
        "TunedKD": "TunedKD",
        "HPM-KD-paper": "HPM-KD-paper",
    }


def test_an_assistants_ratio_is_no_students(capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2."""
    assert exp.main(["--compression", "1.5x"]) == 2
    assert "--compression knows 2.3x, 5x, 7x and all, not 1.5x" in capsys.readouterr().out


def test_soft_targets_are_half_the_view_and_half_the_mean_over_views(tmp_path: Path) -> None:
    """Against the formula in float64, with fitted attention and a temperature that is not 1."""
    with shortcuts(chosen=0):
        lab = open_lab(tmp_path, compression=("2.3x",))
        do(lab, teacher(lab), exp.Job("assistant", "SYNTHETIC", "1.5x"))
        pages = exp.page_order(42, 1, 3)
        method = exp.HPMKD(lab, exp.HPMKD.default("2.3x"), pages)
        method.start_epoch(1, [2.0])
    means = []
    for page in pages:
        logits = lab.outputs.page(("teacher", "1.5x"), page)
        weights = exp.attention_weights(method.attention, logits).double().numpy()
        scaled = logits.double().numpy() / method.temperature
        soft = np.exp(scaled) / np.exp(scaled).sum(2, keepdims=True)
        means.append(np.einsum("nm,mnc->nc", weights, soft))
    expected = 0.5 * means[1] + 0.5 * np.mean(means, axis=0)
    assert np.allclose(method.soft_targets.numpy(), expected, atol=1e-5)
    assert np.abs(means[1] - means[0]).max() > 1e-3


def test_a_student_of_hpmkd_is_not_traditional_kds(tmp_path: Path) -> None:
    """Other weights, attention in the record, checksums of both teachers, and a temperature that moves."""
    with shortcuts(chosen=0):
        lab = open_lab(tmp_path, compression=("2.3x",), student_epochs=3)
        records = do(lab)
    hpmkd, plain = (records[student(lab, name).name] for name in (exp.SUBJECT, exp.RIVAL))
    assert hpmkd.weights_sha256 != plain.weights_sha256 and not hpmkd.same_as
    assert set(hpmkd.attention) == {"select", "train"} and len(hpmkd.taught_by) == 2
    assert len({epoch.temperature for epoch in hpmkd.history}) > 1
    assert {epoch.temperature for epoch in plain.history} == {4.0}


def test_a_finalist_must_win_by_a_standard_error() -> None:
    """Candidate 0 stays unless another is clearly better; the finalists share half of the budget."""
    right = np.arange(100) < 50
    better = np.arange(100) < 70
    steps: dict[tuple[int, int], int] = {}

    def evaluate(rung: int, candidate: int, count: int) -> np.ndarray:
        steps[rung, candidate] = count
        return better if candidate == winner else right

    for winner in (5, 99):
        halving = exp.successive_halving(8, 3200, evaluate)
        assert halving.chosen == (5 if winner == 5 else 0)
        assert [count for count, _ in halving.rungs] == [100, 200, 800]
    assert exp.Halving.compared(halving, 0) == (0.0, 0.0)


def test_attention_starts_uniform_and_finds_the_better_teacher() -> None:
    """A teacher that is right gets more weight than one that guesses; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (400,), generator=generator)
    good = 4 * torch.nn.functional.one_hot(labels, 10).float() + torch.randn(400, 10, generator=generator)
    bad = 4 * torch.randn(400, 10, generator=generator)
    logits = torch.stack([good, bad])
    assert torch.allclose(exp.AttentionNetwork(2, 10).eval()(logits), torch.full((400, 2), 0.5))
    network = exp.train_attention(logits, labels, 1)
    weights = exp.attention_weights(network, logits)
    assert weights[:, 0].mean() > 0.8
    assert torch.equal(weights, exp.attention_weights(exp.train_attention(logits, labels, 1), logits))


def test_tuned_kd_that_keeps_the_setting_is_a_copy(tmp_path: Path) -> None:
    """Its student is TraditionalKD's, and the record says so; HPM-KD without its manager is HPM-KD's here."""
    with shortcuts(chosen=0):
        lab = open_lab(tmp_path, compression=("2.3x",), ablation=True, student_epochs=3)
        records = do(lab)
    assert records[student(lab, "TunedKD").name].same_as == exp.RIVAL
    assert records[student(lab, "HPM-KD-no-manager").name].same_as == exp.SUBJECT
    arms = [
        name for name in exp.METHODS if exp.METHODS[name].twin == exp.SUBJECT and name != "HPM-KD-no-manager"
    ]
    weights = {records[student(lab, name).name].weights_sha256 for name in [*arms, exp.SUBJECT]}
    assert len(weights) == len(arms) + 1
    assert records[pilot(lab).name].chosen == 0


def test_equal_cost_counts_what_hpmkd_costs() -> None:
    """More epochs than a student, at every ratio; the estimate of hours uses them."""
    settings = exp.new_settings({"equal_cost": True})
    epochs = exp.equal_cost_epochs(settings)
    assert all(epochs[ratio] > 2 * settings.student_epochs for ratio in RATIOS)
    job = exp.Job("student", "CIFAR10", "7x", "Direct-equal-cost", 1)
    assert exp.job_epochs(job, settings, epochs) == epochs["7x"]


def test_a_hundred_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages, memory, relations and beta with 100 classes; the pilot leaves a beta that is far too large."""
    default = exp.HPMKD.default("2.3x")
    candidates = [dataclasses.replace(default, beta=beta) for beta in (10_000.0, 2.0)]
    monkeypatch.setattr(exp.HPMKD, "candidates", lambda _: candidates)
    given = {"dataset": "CIFAR100", "methods": ("HPM-KD",), "compression": ("2.3x",), "train_size": 2_000}
    raw = hundred_classes(2_000)
    experiment = open_lab(tmp_path, raw, teacher_epochs=7, student_epochs=8, **given)
    records = do(experiment)
    images = len(experiment.images)

    chosen = records["pilot_2.3x_HPM-KD_CIFAR100"]
    assert chosen.config == candidates[1], chosen.reason
    assert experiment.outputs.page(default.teachers, 0).shape == (2, images, 100)
    assert experiment.outputs.descriptions(exp.HPMKD, ("teacher",), 0).shape == (images, exp.PROJECTED)
    used = exp.pages_used(experiment.run.jobs, experiment.settings)
    numbers = sum(100 + exp.PROJECTED * (network == "teacher") for network, _ in used)
    assert exp.page_bytes(experiment.settings) == pytest.approx(numbers * images * 2, rel=0.05), (
        "the split of 100 small classes rounds"
    )
    losses = [epoch.loss for epoch in records["student_2.3x_HPM-KD_run1"].history]
    assert losses[-1] < 0.6 * losses[0], "it learns"
