"""A made-up experiment, for the tests of statistics, figures and report: every job has ended, nothing was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import run_exp1b_kaggle as exp

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARAMS = {"teacher": 23_520_842, "1.5x": 15_780_000, "2.3x": 10_235_000, "5x": 4_716_000, "7x": 3_357_000}
MACS = {
    "teacher": 1_297_829_888,
    "1.5x": 580_000_000,
    "2.3x": 480_000_000,
    "5x": 230_000_000,
    "7x": 177_000_000,
}
LATENCY = {"teacher": (4.1, 0.9), "1.5x": (1.9, 0.4), "2.3x": (1.8, 0.3), "5x": (1.0, 0.2), "7x": (0.9, 0.15)}
ACCURACY = {"teacher": 92.4, "1.5x": 90.1, "2.3x": 88.6, "5x": 86.0, "7x": 84.4}
GAIN = {
    "Direct": 0.0,
    "TraditionalKD": 0.35,
    "HPM-KD": 0.6,
    "TunedKD": 0.45,
    "HPM-KD-no-chain": 0.5,
    "HPM-KD-no-attention": 0.58,
    "HPM-KD-no-temperature": 0.5,
    "HPM-KD-no-manager": 0.4,
    "HPM-KD-no-memory": 0.3,
    "Direct-equal-cost": 0.3,
}
CHOSEN = {
    ("HPM-KD", "5x"): 1,
    ("TunedKD", "5x"): 2,
    ("TunedKD", "7x"): 1,
}  # every other pilot keeps its first candidate
EQUAL_COST_EPOCHS = {"2.3x": 54, "5x": 82, "7x": 100}


def fake_run(
    folder: Path,
    runs: int = 3,
    ratios: Sequence[str] = ("2.3x", "5x", "7x"),
    methods: Sequence[str] = ("Direct", "TraditionalKD", "HPM-KD"),
    ablation: bool = False,
    equal_cost: bool = False,
    dataset: str = "CIFAR10",
    width: int = 64,
    epochs: int = 20,
    seed: int = 0,
    images: int = 0,
) -> exp.Run:
    """A run in `folder` whose records are made up, whatever its files say. `images`: also labels and logits, of so many."""
    given = {
        "dataset": dataset, "compression": tuple(ratios), "methods": tuple(methods), "runs": runs, "ablation": ablation,
        "equal_cost": equal_cost, "width": width, "student_epochs": epochs,
    }  # fmt: skip
    classes = CLASSES if dataset != "CIFAR100" else [f"class {number}" for number in range(100)]
    data = exp.DataDescription(dataset, classes, 45_000, 2_500, 2_500, 10_000, "a test", "34" * 32)
    session = exp.SessionRecord(
        started="2026-11-24T03:41:57+00:00", ended="2026-11-24T05:10:00+00:00", devices=["Tesla T4", "Tesla T4"],
        command=f"python run_exp1b_kaggle.py --mode quick --dataset {dataset}", processor="Xeon", workers=2, threads=2,
        versions={"python": "3.12.1", "torch": "2.10.0"}, script_sha256="12" * 32,
    )  # fmt: skip
    index = exp.Index(
        exp.new_settings(given), "fp16", data, "ef" * 32, created="2026-11-24T03:41:57+00:00", sessions=[session],
        equal_cost_epochs={ratio: EQUAL_COST_EPOCHS[ratio] for ratio in ratios} if equal_cost else {},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    run = exp.Run(folder, index)
    luck = np.random.default_rng(seed)
    shared = luck.normal(0, 0.25, (len(exp.RATIOS), runs))  # a run's own luck, common to all methods
    for job in run.jobs:
        run.records[job.name] = fake_record(run, job, luck, shared)
    if images:
        run.labels = np.random.default_rng(0).integers(0, len(classes), images)
        run.logits = fake_logits(run)
    return run


def fake_record(run: exp.Run, job: exp.Job, luck: np.random.Generator, shared: np.ndarray) -> exp.Record:
    """The record of a finished job."""
    identity = run.job_fields(job)
    twin = exp.twin_of(job, run.settings, run.records)
    if twin is not None:
        return replace(run.records[twin.name], **identity, same_as=twin.method)
    if job.kind == "pilot":
        return fake_pilot(run, job)

    config = exp.config_of(job, run.records)
    accuracy = ACCURACY[job.network] + luck.normal(0, 0.12)
    if job.kind == "teacher":
        accuracy = ACCURACY["teacher"]
    if job.kind == "student":
        accuracy += GAIN.get(job.method, 0.2) * exp.RATIOS[job.compression] / 5
        accuracy += shared[list(exp.RATIOS).index(job.compression), job.run - 1]
    epochs = int(exp.job_epochs(job, run.settings, run.index.equal_cost_epochs))
    seconds = {"teacher": 4000.0, "assistant": 800.0}.get(job.kind, 10.0 * epochs + (40.0 if config else 0.0))
    taught_by = (
        {exp.teacher_job(name, job.dataset).name: "cd" * 32 for name in config.teachers} if config else {}
    )
    return exp.Record(
        **identity, seed=run.settings.seed + job.run, network=job.network, classes=len(run.index.data.classes),
        width=run.settings.width, params=PARAMS[job.network], macs=MACS[job.network], mean=[0.5] * 3, std=[0.25] * 3,
        config=config, taught_by=taught_by, attention=fake_attention(config), history=fake_history(epochs, accuracy, seconds, config, luck),
        train_seconds=seconds, images_per_second=5500.0, val_accuracy=round(accuracy + 0.2, 2), test_accuracy=round(accuracy, 2),
        test_class_accuracy=[accuracy + offset % 10 - 4.5 for offset in range(len(run.index.data.classes))], test_nll=0.5,
        test_ece=0.03, weights_sha256=hashlib.sha256(job.name.encode()).hexdigest(),
        latency_ms=dict(zip(("1", "256"), LATENCY[job.network], strict=True)) if job.run <= 1 else {}, inference_seconds=10 / 45_000, device="Tesla T4",
        precision="fp16", threads=2, torch="2.10.0", finished="2026-11-24T05:00:00+00:00",
    )  # fmt: skip


def fake_history(
    epochs: int, accuracy: float, seconds: float, config: exp.Distillation | None, luck: np.random.Generator
) -> list[exp.Epoch]:
    """A learning curve that ends near an accuracy; the temperature follows the schedule."""
    history: list[exp.Epoch] = []
    for number in range(epochs):
        reached = accuracy * (1 - 0.6 * np.exp(-5 * (number + 1) / epochs)) + luck.normal(0, 0.3)
        losses = [epoch.loss for epoch in history]
        temperature = (
            exp.temperature_at(config.schedule, config.temperature, epochs, losses) if config else None
        )
        loss = 0.3 + 1.7 * np.exp(-3 * number / epochs)
        history.append(
            exp.Epoch(float(loss), float(reached), 0.1 * (1 - number / epochs), seconds / epochs, temperature)
        )
    return history


def fake_pilot(run: exp.Run, job: exp.Job) -> exp.Record:
    """A pilot of two rungs: half of the candidates go on to the second."""
    candidates = []
    for number, config in enumerate(job.method_class.candidates(job.compression)):
        accuracies = [60.1 + number / 10, 70.2 + number][: 2 if number < 4 else 1]
        candidates.append(
            exp.Candidate(
                config, [240, 480][: len(accuracies)], accuracies, 0.3 * number, 0.6 if number else 0.0
            )
        )
    chosen = CHOSEN.get((job.method, job.compression), 0)
    return exp.Record(
        **run.job_fields(job), seed=run.settings.seed, network=job.network, config=candidates[chosen].config, candidates=candidates,
        chosen=chosen, reason=f"candidate 2 {'leads' if chosen else 'does not lead'} candidate 1 by more than one standard error",
        train_seconds=500.0, device="Tesla T4", precision="fp16",
    )  # fmt: skip


def fake_attention(config: exp.Distillation | None) -> dict[str, exp.AttentionReport]:
    """What attention has learned: no better than uniform weights on `select`."""
    if config is None or not config.attention:
        return {}
    count = len(config.teachers)
    weights = [2 / (count + 1), *([1 / (count + 1)] * (count - 1))]
    select = exp.AttentionReport(weights, [0.1] * count, 0.31, 0.30, 0.33, 91.4, 91.5, 91.0, "teacher")
    return {"select": select, "train": replace(select, nll_mixture=0.1, nll_uniform=0.2)}


def fake_logits(run: exp.Run) -> dict[str, np.ndarray]:
    """Logits whose accuracy is near the record's, over-confident as networks are."""
    assert run.labels is not None
    logits = {}
    for number, (name, record) in enumerate(run.records.items()):
        if record.kind == "pilot" or not record.done:
            continue
        luck = np.random.default_rng(number)
        values = luck.normal(size=(len(run.labels), record.classes)) * 1.6
        values[np.arange(len(run.labels)), run.labels] += 3.2 + (record.test_accuracy - 85) / 12
        logits[name] = (values * (1.3 if record.config else 1.7)).astype(np.float32)
    return logits


def without(run: exp.Run, *parts: str) -> exp.Run:
    """The run without the jobs whose name contains one of `parts`."""
    run.records = {
        name: record for name, record in run.records.items() if not any(part in name for part in parts)
    }
    return run


def failed(run: exp.Run, name: str, reason: str = "the loss became NaN") -> exp.Run:
    """The run with one job failed: no results, no history."""
    job = next(job for job in run.jobs if job.name == name)
    run.records[name] = exp.Record(**run.job_fields(job), failure=reason, final=True)
    return run


def change(run: exp.Run, name: str, **values: object) -> exp.Run:
    """The run with one record changed."""
    run.records[name] = replace(run.records[name], **values)
    return run


def many_methods(patch: pytest.MonkeyPatch, count: int) -> list[str]:
    """The main methods and plugins' methods, `count` together, each plugin better than the one before it."""
    patch.setattr(exp, "METHODS", dict(exp.METHODS))
    names = [f"Plugin-{number}" for number in range(4, count)] + ["A-name-of-thirty-one-letters-WMW"[:31]]
    for number, name in enumerate(names):
        attributes = {"__module__": "a_plugin", "__doc__": "A published method."}
        exp.register(name)(type(f"Method{number}", (exp.TraditionalKD,), attributes))
        patch.setitem(GAIN, name, 0.8 + 0.1 * number)
    return [*exp.MAIN_METHODS, *names]
