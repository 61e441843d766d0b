"""Losses, temperatures and metrics: against the textbook's formulas, computed independently in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import open_lab, student

import run_exp1b_kaggle as exp


def textbook(z: np.ndarray, y: np.ndarray, q: np.ndarray, temperature: float, alpha: float) -> float:
    """alpha T^2 KL(q || p_T) + (1 - alpha) CE, image by image in float64."""
    total = 0.0
    for logits, label, target in zip(z.astype(float), y, q.astype(float), strict=True):
        scaled = logits / temperature
        log_p = scaled - scaled.max() - math.log(sum(math.exp(s - scaled.max()) for s in scaled))
        plain = logits - logits.max() - math.log(sum(math.exp(s - logits.max()) for s in logits))
        divergence = sum(t * (math.log(t) - p) for t, p in zip(target, log_p, strict=True))
        total += alpha * temperature**2 * divergence - (1 - alpha) * plain[label]
    return total / len(z)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def batch(images: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student's logits, labels, teacher's logits."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (images, 10)), rng.integers(0, 10, images), rng.normal(0, 5, (images, 10))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 6.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_distillation_loss_is_the_textbooks(temperature: float, alpha: float) -> None:
    z, y, teacher = batch()
    q = softmax(teacher / temperature)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        loss = exp.distillation_loss(
            torch.tensor(z, dtype=dtype), torch.tensor(y), torch.tensor(q, dtype=dtype), temperature, alpha
        )
        assert loss.item() == pytest.approx(textbook(z, y, q, temperature, alpha), rel=tolerance)


def test_its_gradient_is_the_textbooks() -> None:
    """alpha T (p_T - q) + (1 - alpha) (p - y), over n; and autograd's agrees with finite differences."""
    z, y, teacher = batch(8)
    logits, temperature, alpha = torch.tensor(z, requires_grad=True), 4.0, 0.7
    q = softmax(teacher / temperature)
    exp.distillation_loss(logits, torch.tensor(y), torch.tensor(q), temperature, alpha).backward()
    expected = alpha * temperature * (softmax(z / temperature) - q) + (1 - alpha) * (
        softmax(z) - np.eye(10)[y]
    )
    np.testing.assert_allclose(logits.grad.numpy(), expected / 8, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda z: exp.distillation_loss(z, torch.tensor(y), torch.tensor(q), temperature, alpha), logits
    )


def test_a_student_that_equals_its_teacher_has_no_divergence() -> None:
    z, y, _ = batch()
    loss = exp.distillation_loss(torch.tensor(z), torch.tensor(y), torch.tensor(softmax(z / 4)), 4.0, 1.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_the_mixture_of_teachers() -> None:
    rng = np.random.default_rng(3)
    logits, weights = rng.normal(0, 4, (3, 20, 10)), softmax(rng.normal(0, 1, (20, 3)))
    expected = np.stack(
        [sum(weights[n, m] * softmax(logits[m, n] / 2.5) for m in range(3)) for n in range(20)]
    )
    q = exp.mixture(torch.tensor(logits), torch.tensor(weights).float(), 2.5).numpy()
    np.testing.assert_allclose(q, expected, atol=1e-6)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-6)


# ---- What the methods make of it -------------------------------------------------------------------------------------

PAGES = [3, 7, 11, 5]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> exp.Experiment:
    """An untrained experiment whose teachers' pages are random numbers, different for every teacher and page."""

    def page(outputs: exp.TeacherOutputs, teachers: Sequence[exp.Network], number: int) -> torch.Tensor:
        stack = []
        for teacher in teachers:
            rng = np.random.default_rng(sum(teacher.encode()) * 1000 + number)
            stack.append(rng.normal(0, 4, (len(outputs.experiment.images), 10)))
        return torch.from_numpy(np.stack(stack)).half()

    monkeypatch.setattr(exp.TeacherOutputs, "page", page)
    monkeypatch.setattr(exp.TeacherOutputs, "prepare", lambda *_: None)
    return open_lab(tmp_path / "lab")


def started(experiment: exp.Experiment, name: str, config: exp.Distillation | None = None) -> exp.Method:
    """A method at its second of four epochs, on page 7."""
    method = exp.METHODS[name](experiment, config, PAGES)
    method.start_epoch(1, [1.5])
    return method


INDEX = torch.tensor([3, 170, 42, 3, 99])


def student_logits() -> torch.Tensor:
    return torch.randn(len(INDEX), 10, generator=torch.Generator().manual_seed(0)) * 3


def page_logits(experiment: exp.Experiment, teacher: str, page: int) -> np.ndarray:
    """What the teacher of the test says about the images of INDEX."""
    return experiment.outputs.page([teacher], page)[0][INDEX].double().numpy()


def test_the_methods_losses_by_hand(experiment: exp.Experiment) -> None:
    """Direct is cross-entropy, TraditionalKD the textbook at T = 4, alpha = 0.5, HPM-KD a uniform mixture."""
    z, y = student_logits(), experiment.images.labels[INDEX].numpy()
    pages = [page_logits(experiment, name, 7) for name in ("teacher", "2.3x")]
    direct = started(experiment, "Direct").loss(z, INDEX).item()
    assert direct == pytest.approx(-np.log(softmax(z.double().numpy()))[range(5), y].mean(), rel=1e-6)
    traditional = (
        started(experiment, "TraditionalKD", exp.TraditionalKD.configure("5x", None)).loss(z, INDEX).item()
    )
    assert traditional == pytest.approx(textbook(z.numpy(), y, softmax(pages[0] / 4), 4.0, 0.5), rel=1e-5)
    method = started(experiment, "HPM-KD", exp.Distillation(0.7, 6.0, "cosine", ("teacher", "2.3x")))
    temperature = 2 + 4 * (1 + math.cos(math.pi / 3)) / 2
    q = (softmax(pages[0] / temperature) + softmax(pages[1] / temperature)) / 2
    assert method.temperature == pytest.approx(temperature)
    hpmkd = method.loss(z, INDEX).item()
    assert hpmkd == pytest.approx(textbook(z.numpy(), y, q, temperature, 0.7), rel=1e-5)
    assert len({round(loss, 4) for loss in (direct, traditional, hpmkd)}) == 3, "the three methods differ"


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_other_share_of_the_soft_targets_is_the_mean_over_the_views_of_the_training(
    experiment: exp.Experiment, share: float
) -> None:
    """Component 6: every page of the training once, at the epoch's temperature."""
    method = started(experiment, "HPM-KD", exp.Distillation(0.5, 3.0, view_share=share))
    by_page = {page: softmax(page_logits(experiment, "teacher", page) / 3) for page in PAGES}
    expected = share * by_page[7] + (1 - share) * sum(by_page.values()) / 4
    np.testing.assert_allclose(method.soft_targets[INDEX].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(method.soft_targets.sum(1).numpy(), 1, atol=1e-5)


def test_hpmkd_with_one_teacher_and_one_view_is_traditional_kd_exactly(experiment: exp.Experiment) -> None:
    z = student_logits()
    expected = started(experiment, "TraditionalKD", exp.Distillation()).loss(z, INDEX)
    for attention in (False, True):
        assert torch.equal(
            started(experiment, "HPM-KD", exp.Distillation(attention=attention)).loss(z, INDEX), expected
        )
    for changed in ({"teachers": ("2.3x",)}, {"view_share": 0.5}):
        other = started(experiment, "HPM-KD", exp.Distillation(**changed)).loss(z, INDEX)
        assert not torch.equal(other, expected), "the teacher and the views matter"


def test_the_attentions_weights_reach_the_soft_targets(
    experiment: exp.Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image's own weights, for a fitted network that looks at the first teacher for even images alone."""
    first = torch.arange(len(experiment.images)) % 2 == 0
    weights = torch.stack([first, ~first], 1).float()
    monkeypatch.setattr(exp, "fit_attention", lambda *_: (object(), {}))
    monkeypatch.setattr(exp, "attention_weights", lambda *_: weights)
    for share in (1.0, 0.5):
        config = exp.Distillation(teachers=("teacher", "2.3x"), attention=True, view_share=share)
        mixed = started(experiment, "HPM-KD", config).soft_targets
        alone = [
            started(experiment, "HPM-KD", exp.Distillation(teachers=(name,), view_share=share)).soft_targets
            for name in config.teachers
        ]
        torch.testing.assert_close(mixed, torch.where(first[:, None], *alone))


def trained(experiment: exp.Experiment, name: str, method: exp.Method) -> dict[str, torch.Tensor]:
    """The weights of a student of seed 43 after two epochs."""
    training = exp.Training(experiment, student(experiment, "Direct", "7x"), name, 6, method)
    return copy.deepcopy(training.run().state_dict())


def test_alpha_zero_is_direct_digit_for_digit(experiment: exp.Experiment) -> None:
    """After two epochs every weight has the same bits; with any alpha above zero it has not."""
    direct = trained(experiment, "direct", exp.Direct(experiment, None, PAGES))
    for alpha, equal in ((0.0, True), (0.1, False)):
        other = trained(
            experiment, f"kd{alpha}", exp.TraditionalKD(experiment, exp.Distillation(alpha), PAGES)
        )
        assert all(torch.equal(other[key], value) for key, value in direct.items()) == equal


# ---- Temperature -----------------------------------------------------------------------------------------------------

FALLING = [2.0, 1.2, 0.8, 0.6, 0.5, 0.45, 0.42, 0.4, 0.39, 0.385]


def temperatures(schedule: str, start: float, losses: list[float]) -> list[float]:
    """The temperature of every epoch of a training with these losses (the last one's follows no epoch)."""
    return [exp.temperature_at(schedule, start, len(losses), losses[:epoch]) for epoch in range(len(losses))]


def smoothed(losses: list[float]) -> list[float]:
    return [
        0.5**k * losses[0] + sum(0.5 ** (k - j + 1) * losses[j] for j in range(1, k + 1))
        for k in range(len(losses))
    ]


@pytest.mark.parametrize("start", [2.0, 4.0, 6.0])
def test_constant_and_cosine(start: float) -> None:
    assert temperatures("constant", start, FALLING) == [start] * 10
    cosine = temperatures("cosine", start, FALLING)
    assert cosine[0] == start
    assert cosine[-1] == 2.0
    assert temperatures("cosine", start, FALLING[:9])[4] == pytest.approx((start + 2) / 2), (
        "half-way in the middle"
    )
    assert cosine == sorted(cosine, reverse=True)


@pytest.mark.parametrize("start", [2.0, 4.0, 6.0])
def test_the_loss_schedule_follows_the_loss_between_its_extremes(start: float) -> None:
    falling = temperatures("loss", start, FALLING)
    assert falling[:2] == [start, start], "no range is known yet"
    assert falling[2:] == [2.0] * 8, "a falling loss is at its minimum"
    losses = [2.0, 1.0, 0.4, 1.6, 1.3]
    s = smoothed(losses[:4])
    expected = 2 + (start - 2) * (s[-1] - min(s)) / (max(s) - min(s))
    assert exp.temperature_at("loss", start, 9, losses[:4]) == pytest.approx(expected)
    assert exp.temperature_at("loss", start, 9, [1.0, 2.0, 3.0]) == start, "a loss at its maximum"


@pytest.mark.parametrize("start", [2.0, 4.0, 6.0])
def test_the_convergence_schedule_rises_as_the_training_settles(start: float) -> None:
    values = temperatures("convergence", start, FALLING)
    assert values[:2] == [start, start], "no slope is known yet"
    assert values[2] == pytest.approx(2 + (start - 2) * math.exp(-1)), "at the first slope itself"
    s = smoothed(FALLING[:6])
    assert values[6] == pytest.approx(2 + (start - 2) * math.exp(-abs(s[5] - s[4]) / abs(s[1] - s[0])))
    assert values[2:] == sorted(values[2:])
    assert values[-1] == pytest.approx(start, rel=0.06)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "loss", "convergence"])
def test_every_temperature_lies_in_its_bounds_and_is_a_pure_function(schedule: str) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        start = float(rng.uniform(2, 6))
        losses = [float(v) for v in rng.exponential(2, rng.integers(0, 12))]
        before, epochs = list(losses), len(losses) + 1
        value = exp.temperature_at(schedule, start, epochs, losses)
        assert 2.0 <= value <= start + 1e-12 <= 6.0 + 1e-12
        assert exp.temperature_at(schedule, start, epochs, losses) == value
        assert losses == before
    for losses in ([], [1.0], [1.0, 1.0], [1.0] * 5, [0.0, 0.0]):
        assert exp.temperature_at(schedule, 4.0, len(losses) + 1, losses) == pytest.approx(
            4.0 if schedule != "cosine" or not losses else 2.0
        )


# ---- Metrics ---------------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_model() -> None:
    z, y, _ = batch(500, seed=9)
    y[y == 9] = 0  # a class without images
    metrics = exp.test_metrics(torch.tensor(z), torch.tensor(y))
    p, hit = softmax(z), z.argmax(1) == y
    assert metrics["test_accuracy"] == pytest.approx(100 * hit.mean())
    assert metrics["test_class_accuracy"][:9] == pytest.approx([100 * hit[y == c].mean() for c in range(9)])
    assert math.isnan(metrics["test_class_accuracy"][9])
    assert metrics["test_nll"] == pytest.approx(-np.log(p[np.arange(500), y]).mean())
    confidence, error = p.max(1), 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(hit[inside].mean() - confidence[inside].mean())
    assert metrics["test_ece"] == pytest.approx(error)
