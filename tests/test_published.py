"""The gallery: every published method's loss and gradient against its formula, written again in NumPy, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lab import do, lab_data, open_lab, shortcuts
from scipy import special, stats

import run_exp1b_kaggle as exp

PLUGIN = Path(__file__).parent / "published_methods.py"
NAMES = ["DKD", "DIST", "LSKD", "TAKD", "AT", "SP", "RKD", "Hint"]
FEATURE_METHODS = NAMES[4:]
IMAGES, CLASSES = 12, 5
INDEX = np.array([7, 2, 11, 0, 5, 8])  # the batch
SIZES = {
    "stage2": (3, 4),
    "stage3": (4, 3),
    "stage4": (5, 2),
}  # channels and height of the student's; the teacher has one more


@pytest.fixture(scope="module")
def methods() -> Iterator[dict[str, Any]]:
    """The gallery's classes by name; the methods are as before afterwards."""
    known = dict(exp.METHODS)
    exp.load_plugins([PLUGIN])
    yield {name: method for name, method in exp.METHODS.items() if name not in known}
    exp.METHODS.clear()
    exp.METHODS.update(known)


def test_all_eight_register_and_can_be_chosen(methods: dict[str, Any]) -> None:
    """With a description of their own, and the command line takes them."""
    assert list(methods) == NAMES
    for method in methods.values():
        assert "arXiv" in method.__doc__ and method.about.split()[0] == method.__doc__.split()[0]
        assert method.teachers("7x")
    chosen = ["Direct", "AT", "DKD", "TAKD"]
    given = exp.parse_args(["--plugin", str(PLUGIN), "--methods", *chosen]).given
    assert exp.new_settings(given).methods == tuple(exp.in_order(chosen))


# ---- The data ----------------------------------------------------------------------------------------------------------

LABELS = np.arange(IMAGES) * 3 % CLASSES


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32).astype(np.float64)


TEACHER_LOGITS = numbers(1, IMAGES, CLASSES)
STUDENT_LOGITS = numbers(2, len(INDEX), CLASSES)


def feature_maps(seed: int, images: int, more: int = 0) -> dict[str, np.ndarray]:
    """What follows a ReLU, for every stage: [images, channels + more, height, width]."""
    return {
        stage: np.maximum(numbers(seed + number, images, channels + more, height, height), 0)
        for number, (stage, (channels, height)) in enumerate(SIZES.items())
    }


TEACHER_FEATURES = feature_maps(10, IMAGES, more=1)
STUDENT_FEATURES = feature_maps(20, len(INDEX))
REGRESSOR = numbers(30, 6, 5), numbers(31, 6)  # weight and bias


def of_stages(method: Any, features: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {stage: torch.tensor(features[stage], dtype=torch.float32) for stage in method.stages}


def prepared(method: Any, **config: Any) -> Any:
    """A method at the start of an epoch, on page 3, for a 7x student; only what losses look at is there."""

    def page(teachers: tuple[str, ...], number: int) -> torch.Tensor:
        assert (teachers, number) == (made.config.teachers, 3)
        return torch.tensor(TEACHER_LOGITS, dtype=torch.float32)[None]

    images = SimpleNamespace(labels=torch.tensor(LABELS))
    experiment = SimpleNamespace(images=images, outputs=SimpleNamespace(page=page))
    made = method(experiment, exp.replace(method.configure("7x", None), **config), [3])
    if method.stages:
        made.descriptions = method.describe(of_stages(method, TEACHER_FEATURES))
        made.module = made.modules({"stage4": 5}, {"stage4": 6})
    if made.stages and made.module is not None:
        weight, bias = (torch.tensor(values, dtype=torch.float32) for values in REGRESSOR)
        made.module[0].load_state_dict({"weight": weight, "bias": bias})
    made.page = 3
    made.start_epoch(0, [])
    return made


# ---- The formulas ------------------------------------------------------------------------------------------------------


def log_softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    return special.log_softmax(z / temperature, -1)


def cross_entropy(z: np.ndarray) -> float:
    return -float(np.mean([log_softmax(row)[label] for row, label in zip(z, LABELS[INDEX], strict=True)]))


def divergence(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    """Mean over images of KL(teacher || student) at a temperature, of logits."""
    q, p = (np.exp(log_softmax(z, temperature)) for z in (teacher, student))
    return float(stats.entropy(q, p, axis=1).mean())


def dkd(z: np.ndarray, _: Any, beta: float = 8.0) -> float:
    """CE + T^2 (TCKD + beta NCKD), with the other classes' logits alone in the second."""
    parts = []
    for student, teacher, label in zip(z, TEACHER_LOGITS[INDEX], LABELS[INDEX], strict=True):
        q, p = (np.exp(log_softmax(v, 4))[label] for v in (teacher, student))
        others = [np.delete(v, label)[None] for v in (teacher, student)]
        target = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        parts.append(target + beta * divergence(*others, 4))
    return cross_entropy(z) + 16 * float(np.mean(parts))


def dist(z: np.ndarray, _: Any) -> float:
    """CE + T^2 (2 (1 - mean correlation of rows) + 2 (1 - mean correlation of columns))."""
    p, q = (np.exp(log_softmax(v, 4)) for v in (z, TEACHER_LOGITS[INDEX]))
    rows, columns = (
        [np.corrcoef(a, b)[0, 1] for a, b in zip(*pair, strict=True)] for pair in ((p, q), (p.T, q.T))
    )
    return cross_entropy(z) + 16 * (2 * (1 - float(np.mean(rows))) + 2 * (1 - float(np.mean(columns))))


def lskd(z: np.ndarray, _: Any) -> float:
    """0.1 CE + 9 T^2 KL of z-scores at T 2."""
    teacher, student = (stats.zscore(v, axis=1, ddof=1) for v in (TEACHER_LOGITS[INDEX], z))
    return 0.1 * cross_entropy(z) + 9 * 4 * divergence(teacher, student, 2)


def takd(z: np.ndarray, _: Any) -> float:
    """Hinton's loss."""
    return 0.5 * 16 * divergence(TEACHER_LOGITS[INDEX], z, 4) + 0.5 * cross_entropy(z)


def at(z: np.ndarray, features: dict[str, np.ndarray]) -> float:
    """CE + 1000 times the sum over stages of the mean squared difference of normalised maps."""
    total = 0.0
    for stage, maps in features.items():
        squares = []
        for student, teacher in zip(maps, TEACHER_FEATURES[stage][INDEX], strict=True):
            a, b = (np.mean(f**2, axis=0).ravel() for f in (student, teacher))
            squares.append((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)
        total += float(np.mean(squares))
    return cross_entropy(z) + 1000 * total


def similarity(flat: np.ndarray) -> np.ndarray:
    gram = np.array([[a @ b for b in flat] for a in flat])
    return np.array([row / math.sqrt(row @ row) for row in gram])


def sp(z: np.ndarray, features: dict[str, np.ndarray], teacher: np.ndarray | None = None) -> float:
    """CE + 3000 / n^2 times the squared Frobenius norm of the difference of row-normalised Gram matrices."""
    assert teacher is not None
    difference = similarity(features["stage4"].reshape(len(INDEX), -1)) - similarity(teacher[INDEX])
    return cross_entropy(z) + 3000 * np.linalg.norm(difference, "fro") ** 2 / len(INDEX) ** 2


def huber(error: float) -> float:
    return error**2 / 2 if abs(error) < 1 else abs(error) - 0.5


def rkd(z: np.ndarray, features: dict[str, np.ndarray]) -> float:
    """CE + 25 Huber(distances over their mean) + 50 Huber(cosines), means over all pairs and triples."""
    count = len(INDEX)
    both = [maps["stage4"].mean((2, 3)) for maps in (features, {"stage4": TEACHER_FEATURES["stage4"][INDEX]})]
    distances, angles = [], []
    for points in both:
        mean = np.mean([math.dist(points[i], points[j]) for i, j in itertools.combinations(range(count), 2)])
        distances.append([math.dist(a, b) / mean for a in points for b in points])
        cosines = []
        for i, j, k in itertools.product(range(count), repeat=3):
            a, b = points[i] - points[j], points[k] - points[j]
            lengths = np.linalg.norm(a) * np.linalg.norm(b)
            cosines.append(a @ b / lengths if lengths else 0.0)
        angles.append(cosines)
    of_distances, of_angles = (
        float(np.mean([huber(a - b) for a, b in zip(*pair, strict=True)])) for pair in (distances, angles)
    )
    return cross_entropy(z) + 25 * of_distances + 50 * of_angles


def hint(z: np.ndarray, features: dict[str, np.ndarray]) -> float:
    """CE + 100 MSE: ReLU of the batch-normalised linear prediction, and the teacher's pooled features over their sd."""
    weight, bias = REGRESSOR
    target = TEACHER_FEATURES["stage4"].mean((2, 3))
    linear = np.array([weight @ f.mean((1, 2)) + bias for f in features["stage4"]])
    predicted = np.maximum((linear - linear.mean(0)) / np.sqrt(linear.var(0) + 1e-5), 0)
    return cross_entropy(z) + 100 * float(np.mean((predicted - target[INDEX] / target.std(ddof=1)) ** 2))


FORMULAS: dict[str, Callable[..., float]] = {
    "DKD": dkd, "DIST": dist, "LSKD": lskd, "TAKD": takd, "AT": at, "SP": sp, "RKD": rkd, "Hint": hint,
}  # fmt: skip


def slope(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """The gradient by central differences."""
    found = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = 1e-5
        found[place] = (function(at + step) - function(at - step)) / 2e-5
    return found


# ---- The comparison ----------------------------------------------------------------------------------------------------


def computed(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of the batch, and the student's logits, with gradients there and in `made.features`."""
    logits = torch.tensor(STUDENT_LOGITS, dtype=torch.float32, requires_grad=True)
    if made.stages:
        made.features = {stage: f.requires_grad_() for stage, f in of_stages(made, STUDENT_FEATURES).items()}
    loss = made.loss(logits, torch.tensor(INDEX))
    loss.backward()
    return loss, logits


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_the_formulas(methods: dict[str, Any], name: str) -> None:
    made = prepared(methods[name])
    features = {stage: STUDENT_FEATURES[stage] for stage in made.stages}
    more = {"teacher": made.descriptions.double().numpy()} if name == "SP" else {}

    def formula(z: np.ndarray, maps: dict[str, np.ndarray]) -> float:
        return FORMULAS[name](z, maps, **more)

    loss, logits = computed(made)
    assert loss.item() == pytest.approx(formula(STUDENT_LOGITS, features), rel=1e-5)
    expected = slope(lambda z: formula(z, features), STUDENT_LOGITS)
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-4, atol=1e-5)
    for stage, maps in features.items():
        expected = slope(lambda f, stage=stage: formula(STUDENT_LOGITS, {**features, stage: f}), maps)
        assert np.abs(expected).max() > 1e-3, "the features matter"
        scale = np.abs(expected).max()
        np.testing.assert_allclose(made.features[stage].grad, expected, rtol=1e-3, atol=1e-4 * scale)


def test_dkds_pilot_chooses_beta(methods: dict[str, Any]) -> None:
    """The published weight is the incumbent, and the chosen one is used."""
    assert [candidate.beta for candidate in methods["DKD"].candidates("7x")] == [8, 1, 2, 4]
    loss, _ = computed(prepared(methods["DKD"], beta=2.0))
    assert loss.item() == pytest.approx(dkd(STUDENT_LOGITS, None, beta=2.0), rel=1e-5)


def test_the_assistant_is_the_smallest_that_is_larger(methods: dict[str, Any]) -> None:
    teachers = {ratio: methods["TAKD"].teachers(ratio) for ratio in exp.RATIOS}
    assert teachers == {"2.3x": ("1.5x",), "5x": ("2.3x",), "7x": ("5x",)}


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_a_description_is_small_finite_and_of_one_image(methods: dict[str, Any], name: str) -> None:
    """At most 4,096 numbers at full width; fp16 is enough; no image sees another, and the zero map is no trouble."""
    method = methods[name]
    shapes = {"stage2": (512, 16), "stage3": (1024, 8), "stage4": (2048, 4)}
    features = {
        stage: torch.randn(3, channels, height, height, generator=torch.Generator().manual_seed(1)).relu()
        for stage, (channels, height) in shapes.items()
        if stage in method.stages
    }
    together = method.describe(features)
    assert together.dtype == torch.float32 and together.shape[1] <= 4096
    alone = [method.describe({stage: f[i : i + 1] for stage, f in features.items()}) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-3, atol=1e-3)  # another order of sums
    zero = method.describe({stage: torch.zeros_like(f) for stage, f in features.items()})
    assert together.half().isfinite().all() and not zero.any()

    made = prepared(method)
    exact, _ = computed(made)
    made.descriptions = made.descriptions.half()
    rounded, _ = computed(made)
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3) and rounded.item() != exact.item()


def test_the_projection_keeps_similarities(methods: dict[str, Any]) -> None:
    """Exactly where maps are flat, nearly where they are not, and better than the pooled maps alone."""
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(64, 128, 1, 1, generator=generator)
    deviations = torch.randn(64, 128, 4, 4, generator=generator)
    flat = means.relu().expand(-1, -1, 4, 4)
    maps = (means + deviations).relu()

    def error(maps: torch.Tensor, kept: torch.Tensor) -> float:
        true, found = (similarity(x.flatten(1).double().numpy()) for x in (maps, kept))
        return float(np.linalg.norm(true - found) / np.linalg.norm(true))

    describe = methods["SP"].describe
    assert error(flat, describe({"stage4": flat})) < 1e-6
    assert error(maps, describe({"stage4": maps})) < min(0.09, 0.7 * error(maps, maps.mean((2, 3))))


@pytest.mark.usefixtures("small_networks")
def test_all_eight_train_in_one_run(methods: dict[str, Any], tmp_path: Path) -> None:
    """The whole graph, DKD's pilot and the assistants included: every job ends well, and the methods differ."""
    chosen = {"methods": tuple(methods), "compression": ("7x",), "student_epochs": 1, "teacher_epochs": 1}
    experiment = open_lab(tmp_path / "run", lab_data(), **chosen)
    with shortcuts():
        records = do(experiment)
    assert [record.failure for record in records.values()] == [""] * len(experiment.run.jobs)
    assert {"pilot_7x_DKD_SYNTHETIC", "assistant_5x_SYNTHETIC"} <= set(records)
    losses = [records[f"student_7x_{name}_run1"].history[0].loss for name in methods]
    assert all(map(math.isfinite, losses)) and len(set(losses)) == len(NAMES)
