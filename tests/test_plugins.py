"""What a plugin could get wrong without a word: each kind is mended, or told with one line."""

from __future__ import annotations

import collections
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lab import do, open_lab, shortcuts, student, untimed
from test_config import plugins  # noqa: F401 (a fixture)
from test_methods import Maps, StopsAt, lab_with, methods, taught  # noqa: F401 (two are fixtures)
from torch import nn

import run_exp1b_kaggle as exp

pytestmark = pytest.mark.usefixtures("small_networks")
COUNTER = {"steps": 0}  # what a plugin's file holds


# ---- What is described -----------------------------------------------------------------------------------------------


class Base(exp.Method):
    """Registered by nobody: it only shares its `describe`."""

    stages = ("stage4",)
    power: ClassVar[float] = 1.0

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher",)

    @classmethod
    def describe(cls, features: Mapping[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        return features["stage4"].mean((2, 3)) ** cls.power


def test_descriptions_are_told_apart_by_what_they_are() -> None:
    """Not by the names of classes: a changed base, a class method and a closure describe something else."""

    def made(factor: float) -> type[exp.Method]:
        class Local(Base):
            @staticmethod
            def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
                return features["stage4"].mean((2, 3)) * factor

        return Local

    def cut(most: float) -> type[exp.Method]:
        class Local(Base):
            @staticmethod
            def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
                return features["stage4"].clamp(max=most).mean((2, 3))

        return Local

    squared = type("Squared", (Base,), {"__module__": __name__, "power": 2.0})
    pooled = type("Pooled", (exp.Method,), {"__module__": __name__, "stages": ("stage4",)})
    others = type("Others", (Base,), {"__module__": __name__})
    different = (Base, squared, pooled, made(2.0), made(3.0), cut(6.0), cut(9.0))
    keys = [exp.description_key(method, 8) for method in different]
    assert len(set(keys)) == len(different)
    assert exp.description_key(others, 8) == keys[0], "the same numbers are kept once"


def drawing() -> type[exp.Method]:
    """A class whose objects share a matrix, which is drawn when it is needed."""

    class Random(Base):
        matrix: ClassVar[torch.Tensor | None] = None

        @classmethod
        def describe(cls, features: Mapping[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            flat = features["stage4"].mean((2, 3))
            if cls.matrix is None:
                cls.matrix = torch.randn(flat.shape[1], 3) + np.random.rand() + random.random()
            return flat @ cls.matrix

    return Random


def test_a_matrix_that_is_drawn_when_it_is_needed_is_the_same_in_every_process() -> None:
    Random, keys = drawing(), set()
    for seed in (1, 2):
        exp.seed_globally(seed, 0, 0)
        before = torch.get_rng_state()
        exp.describe_noise.cache_clear()
        keys.add(exp.description_key(Random, 8))
        assert torch.equal(torch.get_rng_state(), before), "nothing else is drawn in another way"
        assert Random.matrix is None, "on a GPU it would be on the wrong device"
    assert len(keys) == 1


class InPlace(Base):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return features["stage4"].clamp_(max=0.1).mean((2, 3))


class TooSmall(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return Maps.describe(features) * 1e-8


class PartlyBatchwise(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pooled = features["stage4"].mean((2, 3))
        return torch.cat([2_000 * pooled, pooled - pooled.mean(0)], 1)


class OnlyOfFew(Maps):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if len(features["stage4"]) > 4:
            raise ValueError("what I say")
        return Maps.describe(features)


class InfiniteLater(Maps):
    """Sound where it is looked at, not in the first page."""

    calls: ClassVar[int] = 0

    @classmethod
    def describe(cls, features: Mapping[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        cls.calls += 1
        return Maps.describe(features) * (1 if cls.calls <= 5 else float("inf"))


class UnequalTeachers(exp.Method):
    """The base's description has as many numbers as the teacher has channels."""

    stages = ("stage4",)

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher", "1.5x")


class NotOfItsTeachers(exp.HPMKD):
    @classmethod
    def candidates(cls, compression: str) -> list[exp.Distillation]:
        alone = exp.Distillation(teachers=("1.5x",), weight=1.0)
        return [alone, replace(alone, weight=2.0)] if compression == "5x" else super().candidates(compression)

    @classmethod
    def configure(cls, compression: str, chosen: exp.Distillation | None) -> exp.Distillation:
        return (
            exp.Distillation(teachers=("1.5x",), weight=1.0)
            if compression == "5x"
            else cls.default(compression)
        )


# ---- Mistakes that are one line --------------------------------------------------------------------------------------


class Holder:
    """An object of the user's."""

    def __init__(self) -> None:
        self.inner = {"layers": [nn.Linear(2, 2)]}


class ParameterInAnObject(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.holder = Holder()


class Growing(nn.Module):
    """It makes its layer when it is first used."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "layer"):
            self.layer = nn.Linear(values.shape[1], 2)
        return self.layer(values)


class ParameterThatComesLater(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return Growing()

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, index) + self.module(logits).square().mean()


class Lazy(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.LazyLinear(3)


class BufferThatComesLater(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        module = nn.Module()
        module.register_buffer("memory", None)
        return module

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.module.memory = logits.detach()
        return super().loss(logits, index)


class WithoutSuper(exp.Method):
    def __init__(self, *_: Any) -> None:
        pass


class NotOfTheStudent(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Linear(10, 2)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return self.module(logits.detach()).square().mean()


class ReplacesALayer(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(10, 2))

    def start_epoch(self, epoch: int, losses: Any) -> None:
        self.module[0] = nn.Linear(10, 2)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, index) + self.module(logits).square().mean()


class NotOnTheCPU(Base):
    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.zeros(len(features["stage4"]), 3, device="meta")


class KeepsTheGraph(exp.Method):
    def start_epoch(self, epoch: int, losses: Any) -> None:
        self.last = torch.zeros(())

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.last = self.last + super().loss(logits, index)
        return self.last


class RaisesLater(InfiniteLater):
    """It fails for images that it is not tried with."""

    calls: ClassVar[int] = 0

    @classmethod
    def describe(cls, features: Mapping[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        if not super().describe(features).isfinite().all():
            raise ValueError("a singular matrix")
        return Maps.describe(features)


class OwnBackward(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Linear(10, 1)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.module(logits.detach()).square().mean().backward()
        return super().loss(logits, index)


class Exits(exp.Method):
    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise SystemExit("what I say")


class MadeInTheFirstEpoch(exp.Method):
    def start_epoch(self, epoch: int, losses: Any) -> None:
        if epoch == 0:
            self.centres = torch.zeros(10)
        self.used = self.centres + 1


class TemperaturePerClass(exp.Method):
    def start_epoch(self, epoch: int, losses: Any) -> None:
        self.temperature = torch.full((10,), 4.0)


MISTAKES = {
    RaisesLater: "describe of .* (test_plugins.py, line .*): ValueError: a singular matrix",
    OwnBackward: "loss of .*: it calls backward() itself",
    Exits: "loss of .* (test_plugins.py, line .*): SystemExit: what I say",
    MadeInTheFirstEpoch: "AttributeError: .* (in a method made anew, as a resume would make it",
    TemperaturePerClass: "start_epoch of .* (test_plugins.py, line .*): .*Error",
    InPlace: "changes the features",
    TooSmall: "does not fit into fp16: scale it",
    PartlyBatchwise: "depends on the other images, or on chance",
    OnlyOfFew: "describe of .* (test_plugins.py, line .*): ValueError: what I say",
    InfiniteLater: "a description is not finite",
    UnequalTeachers: "describe of .*: .* and .* numbers of teacher and 1.5x",
    NotOfItsTeachers: "describe of .*: no numbers of no teacher",
    ParameterInAnObject: "holds parameters that nothing trains or saves (holder)",
    ParameterThatComesLater: "what modules() lacked at the start",
    Lazy: "modules of .*: a lazy layer has no size yet",
    BufferThatComesLater: "what modules() returns has got other buffers since",
    WithoutSuper: "does not call super().__init__",
    NotOfTheStudent: "its gradient does not reach the student",
    KeepsTheGraph: "loss of .* (test_plugins.py, line .*): RuntimeError",
    ReplacesALayer: "what modules() lacked at the start",
    NotOnTheCPU: "for .* images on cpu, not [n, D]",
}


def test_mistakes_are_one_line_each_and_spoil_no_other_method(
    taught: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    names = [exp.register(method.__name__)(method).name for method in MISTAKES]
    plain = ("Direct", "TraditionalKD")
    with shortcuts(0):
        records = do(lab_with(taught, tmp_path / "lab", *names, *plain))
        others = do(lab_with(taught, tmp_path / "plain", *plain))
    for method, said in MISTAKES.items():
        failed = records.get(f"student_5x_{method.__name__}_run1")
        failed = failed or records[f"pilot_5x_{method.__name__}_SYNTHETIC"]
        text = exp.re.escape(said).replace(r"\.\*", ".*")
        assert exp.re.search(text, failed.failure), (method, failed.failure)
        assert "\n" not in failed.failure and failed.final, "it would fail again"
    for name in plain:
        job = f"student_5x_{name}_run1"
        assert records[job].weights_sha256 == others[job].weights_sha256


# ---- State that a resume would lose ----------------------------------------------------------------------------------


class InStartEpoch(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.factor = 1.0

    def start_epoch(self, epoch: int, losses: Any) -> None:
        self.factor *= 0.5


class OwnGenerator(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.generator = np.random.default_rng(0)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, index) * (1 + 0.01 * self.generator.random())


class InADict(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.means = {"classes": torch.zeros(10)}

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.means["classes"] = 0.9 * self.means["classes"] + logits.detach().mean(0)
        return super().loss(logits, index)


class OfTheClass(exp.Method):
    bank: ClassVar[torch.Tensor] = torch.zeros(10)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.bank.mul_(0.9).add_(logits.detach().mean(0))
        return super().loss(logits, index)


class OfTheFile(exp.Method):
    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        COUNTER["steps"] += 1
        return super().loss(logits, index)


class NotInTheStateDict(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        module = nn.Linear(10, 1)
        module.register_buffer("memory", torch.zeros(10), persistent=False)
        return module

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.module.memory.add_(logits.detach().mean(0))
        return super().loss(logits, index) + self.module(logits).square().mean()


class InADeque(exp.Method):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bank = collections.deque(maxlen=4)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.bank.append(logits.detach().mean(0))
        return super().loss(logits, index)


class Late(exp.Method):
    """Only from the last epoch but one on."""

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if self.page == self.pages[1]:
            self.remembered = logits.detach().mean(0)
        return super().loss(logits, index)


class Private(nn.Module):
    """What it holds is no parameter, no buffer, and not public."""

    def __init__(self) -> None:
        super().__init__()
        self._place = 0


class PrivateInAModule(exp.Method):
    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return Private()

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.module._place += 1
        return super().loss(logits, index)


class WithItsGraph(exp.Method):
    """Detached when it is read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.centre: torch.Tensor | None = None

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        before = logits.mean(0) if self.centre is None else self.centre.detach()
        self.centre = 0.9 * before + 0.1 * logits.mean(0)
        return super().loss(logits, index) + self.centre.square().mean()


class Freezes(exp.Method):
    """In the second epoch: after a resume in the third one it trains."""

    def modules(self, student: Any, teacher: Any) -> nn.Module:
        return nn.Linear(10, 1)

    def start_epoch(self, epoch: int, losses: Any) -> None:
        if epoch == 1:
            self.module.requires_grad_(False)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return super().loss(logits, index) + self.module(logits).square().mean()


class OwnOptimizer(exp.Method):
    """It leaves no gradient behind."""

    def modules(self, student: Any, teacher: Any) -> nn.Module:
        module = nn.Linear(10, 1)
        self.optimizer = torch.optim.Adam(module.parameters())
        return module

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        self.module(logits.detach()).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return super().loss(logits, index)


STATE = {
    PrivateInAModule: "module",
    WithItsGraph: "centre",
    Freezes: "module",
    OwnOptimizer: "optimizer",
    InStartEpoch: "factor",
    OwnGenerator: "generator",
    InADict: "means",
    OfTheClass: "bank",
    OfTheFile: "COUNTER",
    NotInTheStateDict: "module",
    InADeque: "bank",
    Late: "remembered",
}


def trained(taught: Path, folder: Path, method: str, stops: tuple[int, ...]) -> exp.Record:  # noqa: F811
    """The record of a student whose sessions end at these steps, and then at its end."""
    for stop in stops:
        lab = lab_with(taught, folder, method)
        lab.session = StopsAt(stop)
        with shortcuts(), pytest.raises(exp.Stopped):
            do(lab, student(lab, method, "5x"))
    lab = lab_with(taught, folder, method)
    with shortcuts():
        return do(lab, student(lab, method, "5x"))[f"student_5x_{method}_run1"]


@pytest.mark.parametrize("method", STATE, ids=lambda method: method.__name__)
def test_state_that_a_resume_would_lose_is_told(
    taught: Path,  # noqa: F811
    tmp_path: Path,
    method: type[exp.Method],
) -> None:
    """Also by the one that was resumed, and lost it."""
    exp.register("Stateful")(method)
    expected = f"its method keeps {STATE[method]} outside modules(): a resume loses it"
    for name, stops in (("whole", ()), ("cut", (3 * 3 + 1,))):
        notes = trained(taught, tmp_path / name, "Stateful", stops).notes
        assert notes == ([] if method in (Late, Freezes) and name == "cut" else [expected])


class Sound(exp.TraditionalKD):
    """State in `modules`, a generator made anew for each epoch, and a module that stays in its mode."""

    modes: ClassVar[list[bool]] = []

    made: ClassVar[int] = 0
    cache: ClassVar[dict[int, Any]] = {}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        type(self).made += 1
        self.cache[len(self.cache)] = float("nan")
        self.nothing = torch.full((3,), float("nan"))

    def modules(self, student: Mapping[str, int], teacher: Mapping[str, int]) -> nn.Module:
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(10, 2))
        self.head = nn.Sequential(nn.BatchNorm1d(10), normed).eval()
        self.head.register_forward_hook(lambda *_: None)
        self.head.register_buffer("factor", torch.ones(()))
        return self.head

    def start_epoch(self, epoch: int, losses: Any) -> None:
        super().start_epoch(epoch, losses)
        self.module.factor.mul_(0.5)
        self.generator = np.random.default_rng(epoch)
        self.noise = torch.randn(10)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        noise = float(self.generator.random()) * self.noise
        self.step = logits.square().mean()  # for this step alone
        return super().loss(logits + noise, index) + self.head(logits).square().mean() * (
            not self.module.training
        )


def test_sound_methods_are_left_in_peace(taught: Path, tmp_path: Path) -> None:  # noqa: F811
    exp.register("Sound")(Sound)
    records = []
    for name, stops in (("whole", ()), ("cut", (5, 9))):
        records.append(trained(taught, tmp_path / name, "Sound", stops))
    assert Sound.made == len(Sound.cache) == 4, "what is only tried leaves nothing"
    assert records[0].notes == [] and repr(untimed(records[0])) == repr(untimed(records[1]))


def test_an_index_out_of_range_on_a_gpu_is_the_plugins_mistake(
    taught: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It loses the device to this process and would lose it again: a resume must not meet it for ever."""
    exp.register("Sound")(Sound)
    lab = lab_with(taught, tmp_path / "lab", "Sound", "HPM-KD")

    def lost(device: exp.Device) -> None:
        raise exp.UsageError("the device fails")

    monkeypatch.setattr(exp, "probe", lost)
    error = RuntimeError("CUDA error: device-side assert triggered")
    for name in ("Sound", "HPM-KD"):
        with pytest.raises(exp.DeviceLost, match="device-side assert"):
            exp.Worker(lab, writes=False).crashed(student(lab, name, "5x"), error)
    lab.run.refresh()
    assert lab.run.failed == ["student_5x_Sound_run1"]
    failed = lab.run.records["student_5x_Sound_run1"]
    assert failed.final and failed.failure.startswith("an index out of range (RuntimeError: CUDA error")


def test_what_only_describe_makes_is_no_state(taught: Path, tmp_path: Path) -> None:  # noqa: F811
    exp.register("Drawn")(drawing())
    assert trained(taught, tmp_path / "lab", "Drawn", ()).notes == []


def test_a_module_without_a_gradient_is_told(
    taught: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    @exp.register("Detached")
    class Detached(exp.Method):
        def modules(self, student: Any, teacher: Any) -> nn.Module:
            return nn.ModuleDict({"used": nn.Linear(10, 1), "unused": nn.Linear(10, 1)})

        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return super().loss(logits, index) + self.module["used"](logits).square().mean()

    trained(taught, tmp_path / "lab", "Detached", ())
    said = "Detached: in an epoch no gradient has reached module.unused.weight and module.unused.bias"
    assert caplog.messages.count(said) == 1


# ---- Configurations --------------------------------------------------------------------------------------------------


def test_a_configuration_is_what_is_trained(taught: Path, tmp_path: Path) -> None:  # noqa: F811
    """A constant temperature as it stands; the teachers that `teachers` names; the pilot by `configure`; plain numbers."""
    assert exp.temperature_at("constant", 20.0, 9, [1.0, 0.5]) == 20

    @exp.register("Two")
    class Two(exp.TraditionalKD):
        @classmethod
        def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
            return ("teacher", "1.5x")

    assert Two.configure("5x", None).teachers == ("teacher", "1.5x")
    given = exp.Distillation(np.float64(0.3), np.float32(4), teachers=["teacher"])  # type: ignore[arg-type]
    assert [type(value) for value in (given.alpha, given.temperature, given.teachers)] == [
        float,
        float,
        tuple,
    ]

    trained = []

    @exp.register("Weighted")
    class Weighted(exp.TraditionalKD):
        @classmethod
        def candidates(cls, compression: str) -> list[exp.Distillation]:
            return [exp.Distillation(temperature=t) for t in np.linspace(2, 10, 3)]

        @classmethod
        def configure(cls, compression: str, chosen: exp.Distillation | None) -> exp.Distillation:
            return replace(chosen or exp.Distillation(), weight=50.0)

        def start_epoch(self, epoch: int, losses: Any) -> None:
            super().start_epoch(epoch, losses)
            trained.append((self.config.weight, self.temperature))
            self.temperature = torch.tensor(self.temperature)

    lab = lab_with(taught, tmp_path / "lab", "Weighted")
    with shortcuts():
        records = do(lab)
    assert {weight for weight, _ in trained} == {50.0} and {6.0, 10.0} <= {t for _, t in trained}
    assert records["student_5x_Weighted_run1"].done


@pytest.mark.parametrize(
    "unfit", [{"schedule": "linear"}, {"temperature": 0}, {"temperature": 20, "schedule": "cosine"}]
)
def test_an_unfit_configuration_is_refused(unfit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|schedule"):
        exp.Distillation(**unfit)


def test_candidates_of_another_class_are_refused() -> None:
    mine = type("Mine", (exp.Distillation,), {"gamma": 1.0})
    candidates = classmethod(lambda cls, ratio: [mine(), mine(alpha=0.9)])
    with pytest.raises(exp.UsageError, match="list of at least two Distillation"):
        exp.register("Wrong")(
            type("Wrong", (exp.TraditionalKD,), {"__module__": __name__, "candidates": candidates})
        )


@pytest.mark.parametrize("name", ["all", "All", "hpm-kd", "direct"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    with pytest.raises(exp.UsageError, match="choose another name"):
        exp.register(name)(type("Wrong", (exp.Method,), {"__module__": __name__}))


@pytest.mark.parametrize("method", [exp.Direct, Maps])
def test_a_class_has_one_name(method: type[exp.Method]) -> None:
    """Two names of one class would be two rows of the last one."""
    with pytest.raises(exp.UsageError, match="already: register a subclass"):
        exp.register("Second")(exp.register("First")(method))


# ---- fp16, costs and verdicts ----------------------------------------------------------------------------------------


def test_gradients_that_are_never_finite_are_no_training(tmp_path: Path) -> None:
    """fp16's scaler skips such steps without a word, and the losses stay finite."""

    @exp.register("Root")
    class Root(exp.Method):
        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            distances = (logits[:, None] - logits[None]).pow(2).sum(2).sqrt()  # its gradient at 0 is NaN
            return super().loss(logits, index) + distances.mean()

    lab = open_lab(tmp_path / "lab", methods=("Root", "Direct"), compression=("5x",))
    steps = len(lab.images) // lab.settings.batch_size
    for name in ("Root", "Direct"):
        job = student(lab, name, "5x")
        method = exp.make_method(lab, job, None, list(range(30 // steps + 1)))
        training = exp.Training(lab, job, "x", 30, method)
        training.scaler = torch.amp.GradScaler("cpu", enabled=True)
        if name == "Direct":
            training.run()
            continue
        with pytest.raises(exp.Diverged, match="not finite again and again"):
            training.run()


def test_costs_are_charged_to_who_causes_them(taught: Path, tmp_path: Path) -> None:  # noqa: F811
    """A method of features without a configuration uses pages; one of labels with candidates uses none."""

    @exp.register("Labels")
    class Labels(exp.Method):
        @classmethod
        def candidates(cls, compression: str) -> list[exp.Distillation]:
            return [exp.Distillation(weight=weight) for weight in (0.0, 1.0)]

    exp.register("Maps")(Maps)
    lab = lab_with(taught, tmp_path / "lab", "Labels", "Maps", "TraditionalKD")
    with shortcuts(0):
        do(lab)
    costs = exp.method_costs(lab.run)
    assert costs.teacher_outputs["Maps"] == pytest.approx(costs.teacher_outputs["TraditionalKD"])
    assert costs.teacher["Labels"] == costs.teacher_outputs["Labels"] == 0
    labels = [job for job in lab.run.jobs if job.method == "Labels"]
    assert exp.pages_used(labels, lab.settings) == set()


def test_a_loss_without_effect_is_called_that(taught: Path, tmp_path: Path) -> None:  # noqa: F811
    @exp.register("NoEffect")
    class NoEffect(Maps):
        def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                extra = F.mse_loss(self.describe(self.features), self.descriptions[index].float())
            return exp.Method.loss(self, logits, index) + extra

    lab = lab_with(taught, tmp_path / "lab", "Direct", "NoEffect")
    with shortcuts():
        do(lab)
    c = exp.compare_cells(exp.results_frame(lab.run), "5x", "NoEffect", "Direct")
    assert exp.verdict(c) == "identical weights"
    assert "NoEffect has the very weights of Direct" in exp.answer_sentence(exp.gather_evidence(lab.run))


# ---- Files -----------------------------------------------------------------------------------------------------------

USES_LATE = """\
import run_exp1b_kaggle as exp

@exp.register("late")
class Late(exp.Method):
    def loss(self, logits, index):
        from exp1b_late import VALUE
        return VALUE * super().loss(logits, index)
"""


def test_what_is_imported_in_a_function_is_refused(
    plugins: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its changes would go unnoticed: it is in no checksum."""
    (tmp_path / "exp1b_late.py").write_text("VALUE = 1\n")
    (tmp_path / "late.py").write_text(USES_LATE)
    monkeypatch.syspath_prepend(tmp_path)
    exp.load_plugins([tmp_path / "late.py"])
    lab = open_lab(tmp_path / "lab", methods=("late",), compression=("5x",), runs=2)
    do(lab, exp.Job("teacher", "SYNTHETIC"))
    exp.Worker(lab, writes=False).attempt(student(lab, "late", "5x"))
    lab.run.refresh()
    exp.Worker(lab, writes=False).attempt(student(lab, "late", "5x", 2))
    lab.run.refresh()
    for run in (1, 2):
        failure = lab.run.records[f"student_5x_late_run{run}"].failure
        assert "late.py imports exp1b_late in a function: import it at the top" in failure


def test_a_helper_that_was_imported_before_belongs_to_the_checksum(
    plugins: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "exp1b_beside.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    earlier = exp.importlib.import_module("exp1b_beside")
    plugins(value="VALUE", imports="from exp1b_beside import VALUE")
    assert [path.name for path in exp.HELPERS[tmp_path / "mine.py"].values()] == ["exp1b_beside.py"]
    assert sys.modules["exp1b_beside"] is earlier, "who had it keeps it"


def test_an_edited_plugin_takes_the_place_of_the_old_one(plugins: Any, tmp_path: Path) -> None:  # noqa: F811
    """In a notebook, two commands of one kernel; the helper, too, and both have their checksums."""
    sums = []
    for value in ("1", "22"):
        (tmp_path / "exp1b_edited.py").write_text(f"VALUE = {value}\n")
        sums.append(plugins(value="VALUE", imports=f"from exp1b_edited import VALUE  # {value}"))
        assert exp.METHODS["mine"].SCALE == sys.modules["exp1b_edited"].VALUE == int(value)
        assert exp.METHODS["mine"].source_sha256 == sums[-1]
    assert sums[0] != sums[1]


def test_no_method_changes_the_labels_of_the_others(tmp_path: Path) -> None:
    images = open_lab(tmp_path / "lab").images
    before = images.labels
    images.labels[:5] = 9
    assert torch.equal(images.labels, before)
    with pytest.raises(AttributeError):
        images.labels = before + 1  # type: ignore[misc]


def test_an_import_leaves_the_process_as_it_was(plugins: Any) -> None:  # noqa: F811
    """Neither torch's default type nor the generators; and what it draws is the same in every process."""
    draws = "import torch, numpy\ntorch.set_default_dtype(torch.float64)\n"
    before = torch.get_rng_state(), np.random.get_state()[2]
    plugins(value="float(torch.rand(1)) + numpy.random.rand()", imports=draws)
    first = exp.METHODS["mine"].SCALE
    assert torch.get_default_dtype() is torch.float32
    switches = "import torch\ntorch.set_default_device('meta')\ntorch.set_grad_enabled(False)\n"
    plugins(value="1", imports=f"{switches}torch.set_float32_matmul_precision('high')\n")
    assert torch.zeros(1).device.type == "cpu" and torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[2] == before[1]
    torch.manual_seed(5)
    plugins(value="float(torch.rand(1)) + numpy.random.rand()", imports=draws, again=True)
    assert exp.METHODS["mine"].SCALE == first
