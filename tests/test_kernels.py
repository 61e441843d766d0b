"""Kernels and host synchronisations of a training step, counted on a CPU: neither may creep in.

On a GPU a kernel costs microseconds to launch, and a step that waits for a number of its own leaves the GPU idle. Counts do not
depend on the width, so the narrowest networks are counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from lab import open_lab, student, teacher

import run_exp1b_kaggle as exp

sys.path.append(str(ROOT / "tests/benchmarks"))
from throughput import Operations

# What was counted when this was written. More by a twentieth is an error; where it is meant, count again.
KERNELS = {
    ("teacher", "Direct"): 432,
    ("2.3x", "Direct"): 187,
    ("2.3x", "TraditionalKD"): 206,
    ("5x", "Direct"): 123,
    ("5x", "TraditionalKD"): 142,
    ("7x", "Direct"): 123,
    ("7x", "TraditionalKD"): 142,
}


class Counted(Operations):
    """Also counts by name, and those for which the host has to wait until the device has caught up."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        name = operation.name().partition(".")[0]
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            masks = [place for place in values[1] if place is not None and place.dtype == torch.bool]
            name += " by a mask" if masks else ""  # a device has to say how many places it names
        self.names[name] += 1
        return super().__torch_dispatch__(operation, types, values, named)

    @property
    def waits(self) -> dict[str, int]:
        """Operations that make the host wait, and how often."""
        return {n: c for n, c in self.names.items() if n in self.WAITING or n.endswith(" by a mask")}


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> exp.Experiment:
    """An experiment whose pages are at hand: zeros."""

    def page(outputs: exp.TeacherOutputs, teachers: Any, number: int, part: str = "logits") -> torch.Tensor:
        return torch.zeros(len(teachers), len(outputs.experiment.images), 10, dtype=torch.float16)

    monkeypatch.setattr(exp.TeacherOutputs, "page", page)
    opened = open_lab(tmp_path / "run", batch_size=4)
    for network in ("teacher", *exp.ASSISTANTS):
        job = exp.teacher_job(network, "SYNTHETIC")
        opened.run.records[job.name] = exp.Record(**opened.run.job_fields(job), weights_sha256="untrained")
    return opened


def trained(experiment: exp.Experiment, network: str, name: str) -> exp.Training:
    """A training that has made its first step, in which an optimizer prepares."""
    job = teacher(experiment) if network == "teacher" else student(experiment, name, network)
    method = job.method_class(experiment, job.method_class.configure(network, None), [0])
    training = exp.Training(experiment, job, job.name, 3, method)
    method.page = 0
    if method.stages:
        channels = exp.ARCHITECTURES["teacher"].outputs(experiment.settings.width)
        height = dict(zip(exp.STAGES, (32, 16, 8, 4), strict=True))
        maps = {s: torch.ones(1, channels[s], height[s], height[s]) for s in method.stages}
        method.descriptions = method.describe(maps).half().expand(len(experiment.images), -1)
    method.start_epoch(0, [])
    training.trained.train()
    training._step(torch.arange(4), 0)
    return training


@pytest.mark.parametrize(("network", "name"), KERNELS)
def test_a_step_launches_few_kernels_and_never_waits(
    experiment: exp.Experiment, network: str, name: str
) -> None:
    training = trained(experiment, network, name)
    with Counted() as counted:
        training._step(torch.arange(4), 0)
    assert counted.waits == {}
    bound = KERNELS[network, name]
    assert 0.5 * bound < counted.count <= 1.05 * bound, counted.names.most_common()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_epoch_never_waits_between_its_steps(experiment: exp.Experiment, precision: str) -> None:
    """With loss scaling too; what the loop does besides the steps is less than one of them."""
    experiment.precision = precision
    training = trained(experiment, "7x", "TraditionalKD")
    with Counted() as step:
        training._step(torch.arange(4), 0)
    with Counted() as epoch:
        training._train_epoch(0)
    assert epoch.waits == {}
    assert epoch.count <= 4 * step.count, "three steps"


@pytest.mark.parametrize("name", ["DKD", "DIST", "LSKD", "TAKD", "AT", "SP", "RKD", "Hint"])
def test_a_step_of_a_published_method_never_waits(experiment: exp.Experiment, name: str) -> None:
    """With its descriptions and its module."""
    known = dict(exp.METHODS)
    try:
        exp.load_plugins([ROOT / "tests/published_methods.py"])
        training = trained(experiment, "7x", name)
    finally:
        exp.METHODS.clear()
        exp.METHODS.update(known)
    with Counted() as counted:
        training._step(torch.arange(4), 0)
    assert counted.waits == {}


@pytest.mark.parametrize("name", ["HPM-KD", "HPM-KD-coupled", "HPM-KD-no-relations", "HPM-KD-no-memory"])
def test_a_step_of_hpmkd_never_waits(
    experiment: exp.Experiment, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With relations, decoupled soft targets and attention."""
    experiment.outputs.store.places = []
    weights = exp.AttentionNetwork(4, 10).requires_grad_(False)
    monkeypatch.setattr(exp, "fit_attention", lambda *_: (weights, {}))
    training = trained(experiment, "7x", name)
    with Counted() as counted:
        training._step(torch.arange(4), 0)
    assert counted.waits == {}
    assert counted.count <= 1.05 * 219, "as many as were counted when this was written"


def test_waiting_is_noticed(experiment: exp.Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.item()` in a loss, and a choice by a mask."""
    for mistake, found in (
        (lambda loss: loss * (1 if loss.item() else 2), "aten::_local_scalar_dense"),
        (lambda loss: loss + loss.detach().view(1)[torch.tensor([True])].sum(), "aten::index by a mask"),
    ):
        training = trained(experiment, "7x", "Direct")
        loss = training.method.loss
        monkeypatch.setattr(training.method, "loss", lambda *a, m=mistake, loss=loss: m(loss(*a)))
        with Counted() as counted:
            training._step(torch.arange(4), 0)
        assert counted.waits == {found: 1}
