"""What a method may see and hold: features, descriptions in the pages, modules of its own, chance; and its mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lab import do, open_lab, pilot, shortcuts, student, teacher, untimed
from test_outputs import Computed, computed  # noqa: F401 (a fixture)
from test_training import assistant
from torch import nn

import run_exp1b_kaggle as exp

pytestmark = pytest.mark.usefixtures("shallow_networks")


@pytest.fixture(autouse=True)
def methods() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(exp.METHODS)
    yield
    exp.METHODS.clear()
    exp.METHODS.update(before)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment with a finished teacher and assistant 1.5x: copy it."""
    lab = open_lab(tmp_path_factory.mktemp("taught") / "lab", student_epochs=3, teacher_epochs=1)
    with shortcuts():
        do(lab, teacher(lab), assistant(lab))
    return lab.run.path


def lab_with(taught: Path, folder: Path, *names: str, ratio: str = "5x") -> exp.Experiment:
    """An experiment on those teachers that plans these methods."""
    if not folder.exists():
        shutil.copytree(taught, folder)
    lab = open_lab(folder, student_epochs=3, teacher_epochs=1, methods=names, compression=(ratio,))
    lab.run.refresh()
    return lab


class Maps(exp.Method):
    """Attention maps of two stages."""

    stages = ("stage2", "stage4")

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher",)

    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        maps = [F.normalize(feature.square().mean(1).flatten(1)) for feature in features.values()]
        return torch.cat(maps, 1)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        gap = self.describe(self.features) - self.descriptions[index].float()
        return super().loss(logits, index) + 10 * gap.square().mean()


# ---- What it sees ----------------------------------------------------------------------------------------------------


def test_descriptions_are_of_the_views_that_the_student_sees(taught: Path, tmp_path: Path) -> None:
    exp.register("Maps")(Maps)
    lab, seen = lab_with(taught, tmp_path / "lab", "Maps"), []

    class Looking(Maps):
        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            seen.append((index, self.page, self.descriptions[index], dict(self.features)))
            return super().loss(logits, index)

    method = Looking(lab, None, [5, 9, 11])
    exp.Training(lab, student(lab, "Maps", "5x"), "x", 9, method).run()
    network = exp.load_student(lab.run.file(teacher(lab)))[1]
    found = exp.collect_features(network, Maps.stages)
    assert [page for _, page, _, _ in seen] == [5, 5, 5, 9, 9, 9, 11, 11, 11]
    for index, page, descriptions, features in seen:
        with torch.no_grad():
            network(lab.images.render(index, page))
        torch.testing.assert_close(descriptions.float(), Maps.describe(found), rtol=5e-3, atol=5e-4)
        shapes = {stage: tuple(feature.shape[2:]) for stage, feature in features.items()}
        assert shapes == {"stage2": (16, 16), "stage4": (4, 4)}
        assert all(feature.requires_grad for feature in features.values())


def test_features_are_in_the_networks_order() -> None:
    """Also of stages that are named in another one: else a teacher's would meet another stage of the student."""
    attributes = {"__module__": __name__, "stages": ("stage4", "stage2")}
    assert exp.register("Deepest")(type("Deepest", (Maps,), attributes)).stages == ("stage2", "stage4")


def test_several_teachers_give_a_description_each(taught: Path, tmp_path: Path) -> None:
    class Two(Maps):
        @classmethod
        def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
            return ("teacher", "1.5x")

    exp.register("Two")(Two)
    lab = lab_with(taught, tmp_path / "lab", "Two")
    both = lab.outputs.descriptions(Two, ("teacher", "1.5x"), 3)
    assert both.shape == (2, len(lab.images), 16 * 16 + 4 * 4) and both.dtype == torch.float16
    assert torch.equal(both[1], lab.outputs.descriptions(Two, ("1.5x",), 3))
    assert not torch.equal(both[0], both[1])


def test_one_pass_gives_the_logits_and_all_descriptions(
    taught: Path,
    tmp_path: Path,
    computed: Computed,  # noqa: F811
) -> None:
    class Pooled(Maps):
        describe = exp.Method.describe

    exp.register("Maps")(Maps)
    exp.register("Pooled")(Pooled)
    plain = lab_with(taught, tmp_path / "plain", "TraditionalKD").outputs.page(("teacher",), 3)
    lab = lab_with(taught, tmp_path / "lab", "TraditionalKD", "Maps", "Pooled")
    assert torch.equal(lab.outputs.page(("teacher",), 3), plain), (
        "the logits' bytes do not depend on descriptions"
    )
    lab.outputs.descriptions(Maps, ("teacher",), 3)
    lab.outputs.descriptions(Pooled, ("teacher",), 3)
    assert computed["teacher", 3] == 2, "once for each of the two experiments"


def test_a_method_of_features_is_interrupted_without_a_trace(taught: Path, tmp_path: Path) -> None:
    """Parameters, momentum and buffers of its module, and what it draws, are those of the whole training."""

    @exp.register("Everything")
    class Everything(Maps):
        last: ClassVar[nn.Module]

        def modules(self, student: Mapping[str, int], teacher: Mapping[str, int]) -> nn.Module:
            module = nn.Linear(student["stage4"], teacher["stage4"])
            module.register_buffer("memory", torch.zeros(len(self.experiment.images), 10))
            return module

        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            Everything.last = self.module
            memory = self.module.memory
            memory[index] = 0.5 * memory[index] + 0.5 * logits.detach() + 0.01 * torch.randn_like(logits)
            guess = self.module(self.features["stage4"].mean((2, 3)))
            return (
                super().loss(logits, index) + guess.square().mean() + (logits - memory[index]).square().mean()
            )

    def looking(states: list[dict[str, torch.Tensor]], evaluate: Any) -> Any:
        """`evaluate`, which also keeps the state of the module of the method that was made last."""

        def look(*args: Any) -> Any:
            states.append(Everything.last.state_dict())
            return evaluate(*args)

        return look

    records, modules = [], []
    for name, stops in (("whole", ()), ("cut", (4, 7))):
        lab = lab_with(taught, tmp_path / name, "Everything")
        job = student(lab, "Everything", "5x")
        for stop in stops:
            lab.session = StopsAt(stop)
            with shortcuts(), pytest.raises(exp.Stopped):
                do(lab, job)
            lab = lab_with(taught, tmp_path / name, "Everything")
        with shortcuts() as patch:
            patch.setattr(exp, "evaluate", looking(modules, exp.evaluate))
            records.append(untimed(do(lab, job)[job.name]))
    assert repr(records[0]) == repr(records[1])
    assert all(torch.equal(value, modules[1][name]) for name, value in modules[0].items())
    assert (
        not torch.equal(modules[0]["weight"], nn.Linear(1, 1).weight) and modules[0]["memory"].abs().sum() > 0
    )
    student_file = exp.load_checkpoint(tmp_path / "whole/checkpoints/student_5x_Everything_run1.pt")
    assert not any("module" in name for name in student_file["model"])


class StopsAt(exp.Session):
    """A session that ends at the n-th step."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.left = asked

    def check(self, needed_seconds: float = 0.0) -> None:
        self.left -= 1
        if self.left < 0:
            raise exp.Stopped("session clock")


def test_chance_is_a_function_of_seed_run_and_epoch(taught: Path, tmp_path: Path) -> None:
    """Two starts agree; another run draws something else; the other methods' weights do not change."""

    @exp.register("Noisy")
    class Noisy(exp.Method):
        """Draws from torch, NumPy and Python, also when it is made."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.start = torch.randn(1).item()

        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            drawn.append((self.start, torch.rand(1).item(), exp.np.random.rand(), exp.random.random()))
            return super().loss(logits + 0.1 * torch.randn_like(logits), index)

    results, drawn = [], []
    for folder in ("one", "other"):
        lab = lab_with(taught, tmp_path / folder, "Noisy", "Direct")
        torch.manual_seed(len(results))
        with shortcuts():
            do(lab, *(student(lab, name, "5x", run) for name in ("Noisy", "Direct") for run in (1, 2)))
        results.append({name: record.weights_sha256 for name, record in lab.run.records.items()})
    half = len(drawn) // 2
    assert results[0] == results[1] and drawn[:half] == drawn[half:]
    assert len(set(drawn[:half])) == half, "every step draws anew"
    direct = lab_with(taught, tmp_path / "direct", "Direct")
    with shortcuts():
        do(direct, student(direct, "Direct", "5x"))
    assert direct.run.records["student_5x_Direct_run1"].weights_sha256 == results[0]["student_5x_Direct_run1"]


# ---- Mistakes --------------------------------------------------------------------------------------------------------


class OwnParameter(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.tensor(4.0))


class OwnModuleInAList(exp.Method):
    def start_epoch(self, epoch: int, losses: Any) -> None:
        self.heads = [nn.Linear(2, 2)]


class OwnParameterOfTheClass(exp.Method):
    shared: ClassVar[dict[str, Any]] = {"scale": nn.Parameter(torch.tensor(4.0))}


class NoScalar(exp.Method):
    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return logits.mean(1)


class NoGradient(exp.Method):
    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return logits.detach().mean()


class NoNumber(exp.Method):
    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return logits.mean() * float("nan")


class Raises(exp.Method):
    def start_epoch(self, epoch: int, losses: Any) -> None:
        raise ValueError("what I say")


class RaisesWhenMade(exp.Method):
    def __init__(self, *args: Any) -> None:
        raise KeyError("what I say")


class ModulesRaises(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Linear(student["stage9"], 1)


class Batchwise(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pooled = features["stage4"].mean((2, 3))
        return pooled - pooled.mean(0)


class Drawn(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.randn(len(features["stage4"]), 3)


class TooMany(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return features["stage2"].flatten(1).repeat(1, 2)


class NoRow(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return features["stage4"]


class TooLarge(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return Maps.describe(features) * 1e6


MISTAKES = {
    OwnParameter: "holds parameters that nothing trains or saves (scale)",
    OwnModuleInAList: "(heads)",
    OwnParameterOfTheClass: "(shared)",
    NoScalar: "loss of .* (test_methods.py, line .*): it returns no scalar",
    NoGradient: "no scalar tensor with a gradient",
    NoNumber: "the loss (test_methods.py, line .*) diverged in epoch 1",
    Raises: "start_epoch of .* (test_methods.py, line .*): ValueError: what I say",
    RaisesWhenMade: "__init__ of .* (test_methods.py, line .*): KeyError",
    ModulesRaises: "modules of .* (test_methods.py, line .*): KeyError: 'stage9'",
    Batchwise: "describe of .*: an image's description depends on the other images, or on chance",
    Drawn: "depends on the other images, or on chance",
    TooMany: "numbers per image, 4096 at most: pool them",
    NoRow: "for .* images on cpu, not [n, D]",
    TooLarge: "does not fit into fp16: scale it",
}


def test_a_mistake_is_one_line_and_fails_that_methods_jobs_only(taught: Path, tmp_path: Path) -> None:
    names = {method: method.__name__ for method in MISTAKES}
    for method, name in names.items():
        exp.register(name)(method)
    lab = lab_with(taught, tmp_path / "lab", *names.values(), "TraditionalKD")
    with shortcuts():
        records = do(lab)
    assert records["student_5x_TraditionalKD_run1"].done
    for method, said in MISTAKES.items():
        failed = records[f"student_5x_{names[method]}_run1"]
        pattern = exp.re.escape(said).replace(r"\.\*", ".*")
        assert exp.re.search(pattern, failed.failure), failed.failure
        assert "\n" not in failed.failure and failed.final, "it would fail again"


def test_state_that_a_resume_would_lose_is_told(taught: Path, tmp_path: Path) -> None:
    """What `loss` changes and the next epoch finds again; not what every epoch makes anew."""

    @exp.register("Stateful")
    class Stateful(Maps):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.average, self.array, self.steps, self.seen = torch.zeros(10), exp.np.zeros(3), 0, []

        def start_epoch(self, epoch: int, losses: Any) -> None:
            self.anew = torch.zeros(10)

        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            self.average.add_(logits.detach().mean(0))
            self.array[0] += 1
            self.steps += 1
            self.seen.append(1)
            self.anew.add_(1)
            return super().loss(logits, index)

    lab = lab_with(taught, tmp_path / "lab", "Stateful", "TraditionalKD")
    with shortcuts():
        records = do(lab, student(lab, "Stateful", "5x"), student(lab, "TraditionalKD", "5x"))
    expected = "its method keeps array, average, seen and steps outside modules(): a resume loses it"
    assert records["student_5x_Stateful_run1"].notes == [expected]
    assert records["student_5x_TraditionalKD_run1"].notes == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stages": ("stage9",)}, "stages"),
        ({"stages": ("stage4",)}, "no teachers"),
        ({"pilot": "Nobody"}, "no pilot"),
        ({"teachers": classmethod(lambda cls, ratio: ("7x",))}, "teachers('2.3x')"),
        ({"teachers": classmethod(lambda cls, ratio: ("teacher", "5x"))}, "teachers('2.3x')"),
        ({"candidates": classmethod(lambda cls, ratio: [])}, "at least two"),
        ({"candidates": classmethod(lambda cls, ratio: [exp.Distillation()])}, "at least two"),
        ({"candidates": classmethod(lambda cls, ratio: [1, 2])}, "at least two"),
        ({"configure": classmethod(lambda cls, ratio, chosen: {"alpha": 1})}, "no Distillation"),
        ({"look": ("no colour", "o", "-")}, "no colour"),
        ({"temperature": 2.0}, "temperature would have no effect"),
    ],
)
def test_a_method_that_could_not_be_trained_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(exp.UsageError) as refused:
        exp.register("Wrong")(type("Wrong", (exp.Method,), {"__module__": __name__, **changes}))
    assert text in str(refused.value) and "Wrong" not in exp.METHODS


def test_candidates_of_its_own_are_enough_for_a_pilot(taught: Path, tmp_path: Path) -> None:
    @exp.register("Mine")
    class Mine(exp.HPMKD):
        @classmethod
        def candidates(cls, compression: str) -> list[exp.Distillation]:
            default = cls.default(compression)
            return [default, replace(default, alpha=0.1)]

    lab = lab_with(taught, tmp_path / "lab", "Mine", ratio="2.3x")
    assert pilot(lab, "Mine") in lab.run.jobs
    with shortcuts(1):
        do(lab, pilot(lab, "Mine"), job := student(lab, "Mine"))
    assert lab.run.records[job.name].config.alpha == 0.1
    other = exp.register("Other")(type("Other", (Mine,), {"__module__": __name__}))
    assert other.pilot == "Other", "another loss has another best weight"


def test_teachers_of_its_own_are_those_that_teach() -> None:
    """HPM-KD's pilot would choose others."""

    @exp.register("Alone")
    class Alone(exp.HPMKD):
        @classmethod
        def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
            return ("teacher",)

    assert Alone.pilot == "Alone"
    assert {config.teachers for config in Alone.candidates("7x")} == {("teacher",)}
    with pytest.raises(exp.UsageError, match="other teachers than teachers"):
        exp.register("Wrong")(type("Wrong", (Alone,), {"__module__": __name__, "pilot": "HPM-KD"}))


def test_the_looks_of_many_methods_differ() -> None:
    looks = {
        exp.register(f"M{i}")(type(f"M{i}", (exp.Method,), {"__module__": __name__})).look for i in range(50)
    }
    assert len(looks) == 50


# ---- HPM-KD's extensions ---------------------------------------------------------------------------------------------


def test_the_decoupled_loss_is_the_papers() -> None:
    """Loss and gradient in float64, with loops over images and classes."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    q = torch.softmax(torch.randn(6, 5, generator=generator, dtype=torch.float64) * 2, 1)
    labels, temperature, beta = torch.tensor([0, 1, 2, 3, 4, 0]), 3.0, 2.5
    one, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for n, y in enumerate(labels.tolist()):
        p, rest = torch.softmax(other[n] / temperature, 0), [c for c in range(5) if c != y]
        b_p, b_q = [p[y], sum(p[c] for c in rest)], [q[n, y], sum(q[n, c] for c in rest)]
        expected = expected - torch.log_softmax(other[n], 0)[y]
        for a, b in zip(b_q, b_p, strict=True):
            expected = expected + temperature**2 * a * torch.log(a / b)
        for c in rest:
            r_q, r_p = q[n, c] / b_q[1], p[c] / b_p[1]
            expected = expected + temperature**2 * beta * r_q * torch.log(r_q / r_p)
    found = exp.decoupled_loss(one, labels, q, temperature, beta)
    torch.testing.assert_close(found, expected / 6)
    found.backward()
    (expected / 6).backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_with_the_teachers_own_weight_the_decoupled_loss_is_plain_distillation() -> None:
    """KL(q || p) = target part + (1 - q_y) others: with one image and beta = 1 - q_y the losses differ by the CE's weight."""
    z, q = torch.randn(1, 10).double(), torch.softmax(torch.randn(1, 10).double(), 1)
    y = torch.tensor([3])
    decoupled = exp.decoupled_loss(z, y, q, 4.0, float(1 - q[0, 3])) - F.cross_entropy(z, y)
    torch.testing.assert_close(decoupled, exp.distillation_loss(z, y, q, 4.0, 1.0))


def test_a_teacher_that_is_sure_gives_finite_losses() -> None:
    logits = torch.full((4, 10), -40.0).scatter(1, torch.arange(4)[:, None], 40.0).requires_grad_()
    loss = exp.decoupled_loss(logits, torch.arange(4), torch.softmax(logits.detach(), 1), 1.0, 8.0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_the_relations_are_the_papers() -> None:
    """Loss and gradient in float64, with loops over pairs of images."""
    generator = torch.Generator().manual_seed(2)
    student_map, teacher_map = (torch.randn(5, d, generator=generator, dtype=torch.float64) for d in (12, 7))
    one, other = student_map.clone().requires_grad_(), student_map.clone().requires_grad_()

    def relations(rows: torch.Tensor) -> list[list[torch.Tensor]]:
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        return [[value / sum(v**2 for v in row) ** 0.5 for value in row] for row in products]

    ours, theirs = relations(other), relations(teacher_map)
    expected = sum((ours[i][j] - theirs[i][j]) ** 2 for i in range(5) for j in range(5)) / 25
    found = exp.relation_loss(one, teacher_map)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(one.grad, other.grad)
    third = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    of_both = (exp.relation_loss(one, teacher_map) + exp.relation_loss(one, third)) / 2
    torch.testing.assert_close(exp.relation_loss(one, torch.stack([teacher_map, third])), of_both)


def test_a_projected_map_keeps_its_relations() -> None:
    """Rows of the Gram matrix scaled to length 1, 128 rectified maps of noise (real ones are easier): mean error of an entry."""
    maps = torch.randn(128, 2048 * 4, generator=torch.Generator().manual_seed(3)).relu()
    projected = maps @ exp.projection(maps.shape[1], torch.device("cpu"))
    whole, kept = (F.normalize(rows @ rows.T) for rows in (maps, projected))
    assert (whole - kept).abs().mean() / whole.abs().mean() < 0.1


def test_hpmkd_adds_the_relations_of_the_teacher(taught: Path, tmp_path: Path) -> None:
    lab = lab_with(taught, tmp_path / "lab", "HPM-KD", ratio="2.3x")
    config = replace(exp.HPMKD.default("2.3x"), attention=False, view_share=1.0, beta=2.0)
    totals = []
    for weight in (0.0, 1000.0):
        method = exp.HPMKD(lab, replace(config, weight=weight), [4])
        training = exp.Training(lab, student(lab, "HPM-KD"), "x", 3, method)
        method.page = 4
        method.descriptions = lab.outputs.descriptions(exp.HPMKD, ("teacher",), 4)
        method.start_epoch(0, [])
        index = torch.arange(60)
        totals.append(training._gradients(index, 4).item())
    own = training.method.features["stage4"].flatten(1).detach()
    known = lab.outputs.descriptions(exp.HPMKD, ("teacher",), 4)[index].float()
    assert totals[1] - totals[0] == pytest.approx(1000 * exp.relation_loss(own, known).item(), rel=1e-4)
    soft = method.soft_targets[index]
    assert totals[0] == pytest.approx(
        exp.decoupled_loss(
            training.model(lab.images.render(index, 4)),
            lab.images.labels[index],
            soft,
            method.temperature,
            2.0,
        ).item(),
        rel=1e-4,
    )
