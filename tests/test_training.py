"""The training loop: pairing, learning rates, what is looked at and when, leaks, and a stop at any moment."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import do, lab_data, open_lab, pilot, shortcuts, student, teacher, untimed
from second_device import DEVICE, second_device

import run_exp1b_kaggle as exp

pytestmark = pytest.mark.usefixtures("small_networks")

CHOSEN = 1  # the pilots' candidate: not the default, so that no arm is another's copy


def assistant(experiment: exp.Experiment, network: str = "1.5x") -> exp.Job:
    """An assistant's job."""
    return exp.teacher_job(network, experiment.settings.dataset)


# ---- Learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 99, 351 * 20])
def test_the_learning_rate_warms_up_and_decays_to_zero(steps: int) -> None:
    rates, warm = [exp.learning_rate(step, steps, 0.1) for step in range(steps)], steps // 10
    assert rates[:warm] == pytest.approx([0.1 * (step + 1) / warm for step in range(warm)])
    assert max(rates) == pytest.approx(0.1)
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    drops = -np.diff(rates[warm:])
    assert drops == pytest.approx(np.full(len(drops), 0.1 / (steps - warm))), "a straight line"
    assert rates[-1] == pytest.approx(drops[-1]), "one more step would have none"
    assert exp.learning_rate(steps, steps, 0.1) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_schedules_learn_something(steps: int) -> None:
    rates = [exp.learning_rate(step, steps, 0.1) for step in range(steps)]
    assert all(0 < rate <= 0.1 for rate in rates)


# ---- Pairing ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Trace:
    """What a training was given: initial weights, and per step the images, their views and the page."""

    weights: bytes
    steps: list[tuple[tuple[int, ...], tuple[int, ...], int]] = dataclasses.field(default_factory=list)

    @property
    def order(self) -> list[tuple[int, ...]]:
        return [step[0] for step in self.steps]

    @property
    def pages(self) -> list[int]:
        return [step[2] for step in self.steps]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """By the name of each training of an experiment with every arm: two ratios, two runs, HPM-KD distinct from the rest."""
    found: dict[str, Trace] = {}

    def step(self: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        weights = b"".join(value.numpy().tobytes() for value in self.model.state_dict().values())
        views = tuple(self.experiment.images.views[index, page].tolist())
        found.setdefault(self.name, Trace(weights)).steps.append((tuple(index.tolist()), views, page))
        return torch.zeros(())

    with shortcuts(CHOSEN) as patch:
        patch.setattr(exp.Training, "_step", step)
        lab = open_lab(
            tmp_path_factory.mktemp("traces") / "lab", compression=("5x", "7x"), runs=2, ablation=True
        )
        records = do(lab)
    assert all(record.done and not record.same_as for record in records.values())
    return found


@pytest.mark.parametrize("compression", ["5x", "7x"])
@pytest.mark.parametrize("run", [1, 2])
def test_the_methods_of_a_run_are_paired(traces: dict[str, Trace], compression: str, run: int) -> None:
    """The same initial weights, batches and views; nothing but the loss differs."""
    mine = [
        name for name in traces if name.startswith(f"student_{compression}_") and name.endswith(f"run{run}")
    ]
    arms = {name: traces[name] for name in mine}
    assert {name.split("_")[2] for name in arms} == set(exp.METHODS) - {"Direct-equal-cost"}
    first, *others = arms.values()
    assert len(first.steps) == 6
    assert all(other == first for other in others)


def test_runs_differ_in_everything(traces: dict[str, Trace]) -> None:
    one, two = (traces[f"student_7x_HPM-KD_run{run}"] for run in (1, 2))
    assert one.weights != two.weights
    assert not set(one.order) & set(two.order)
    assert one.pages != two.pages


def test_ratios_share_batches_and_pages_but_not_weights(traces: dict[str, Trace]) -> None:
    five, seven = (traces[f"student_{compression}_Direct_run2"] for compression in ("5x", "7x"))
    assert five.steps == seven.steps
    assert five.weights != seven.weights


def test_epochs_differ_and_show_no_image_twice(traces: dict[str, Trace]) -> None:
    for trace in traces.values():
        first, second = (sum(trace.order[start : start + 3], ()) for start in (0, 3))
        assert len(set(first)) == len(first) == 180
        assert set(first) == set(range(180))
        assert first != second
        assert len(set(trace.pages[:3])) == 1
        assert trace.pages[0] != trace.pages[3]


def test_the_pages_are_those_of_the_run(traces: dict[str, Trace]) -> None:
    """Assistants follow run 1's, so that their teachers' pages serve run 1 as well; the teacher has its own."""
    for name, run in (
        ("student_5x_Direct_run1", 1),
        ("student_5x_Direct_run2", 2),
        ("assistant_2.3x_SYNTHETIC", 1),
        ("teacher_resnet50_SYNTHETIC", 0),
    ):
        order = exp.page_order(42, run, 2)
        assert traces[name].pages == [order[0]] * 3 + [order[1]] * 3


def test_the_candidates_of_a_pilot_are_paired_and_use_their_own_seed(
    tmp_path: Path, traces: dict[str, Trace]
) -> None:
    found: dict[str, Trace] = {}

    def step(self: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        weights = b"".join(value.numpy().tobytes() for value in self.model.state_dict().values())
        found.setdefault(self.name, Trace(weights)).steps.append((tuple(index.tolist()), (), page))
        return torch.zeros(())

    with shortcuts() as patch:
        patch.setattr(exp.Training, "_step", step)
        lab = open_lab(tmp_path / "lab", compression=("2.3x",), student_epochs=6)
        job = pilot(lab)
        do(lab, teacher(lab), assistant(lab), job)
    for taught in (teacher(lab), assistant(lab)):
        del found[taught.name]
    first = found[f"{job.name}_rung1_candidate1"]
    assert {trace.weights for trace in found.values()} == {first.weights}
    for rung in (1, 2, 3):
        same = [trace for name, trace in found.items() if f"_rung{rung}_" in name]
        assert all(trace == same[0] for trace in same)
        assert len(same) == 8 // 2 ** (rung - 1)
    longest = found[f"{job.name}_rung3_candidate1"]
    assert set(longest.pages) <= set(exp.page_order(42, 1, 6)), "run 1's pages"
    assert first.order[0] not in traces["student_5x_Direct_run1"].order, "but not run 1's batches"


# ---- What is looked at, and when -------------------------------------------------------------------------------------


def test_the_test_set_is_read_once_per_model_after_its_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    predict, epoch = exp.Experiment.predict, exp.Training._epoch

    def counting(self: exp.Experiment, network: Any, split: exp.Split) -> torch.Tensor:
        looks.append(next(name for name in ("fit", "select", "test") if getattr(self.images, name) is split))
        return predict(self, network, split)

    def ended(self: exp.Training, number: int) -> None:
        epoch(self, number)
        looks.append(f"{self.name} {number + 1}/{self.epochs}")

    monkeypatch.setattr(exp.Experiment, "predict", counting)
    monkeypatch.setattr(exp.Training, "_epoch", ended)
    with shortcuts(steps=False):
        lab = open_lab(tmp_path / "lab", compression=("2.3x",))
        records = do(lab)
    trained = [name for name, record in records.items() if record.kind != "pilot"]
    assert looks.count("test") == len(trained)
    for name in trained:
        last = looks.index(f"{name} 2/2")
        assert looks[last - 3 : last] == ["select", f"{name} 1/2", "select"]
        assert looks[last + 1] == "test"
    assert not any(look == "test" for before, look in itertools.pairwise(looks) if "candidate" in before)


def weights_of(raw: exp.RawData, folder: Path) -> dict[str, str]:
    """Checksums of the weights of every model, and the pilots' choices, of an experiment with real pilots and a chain."""
    with shortcuts(CHOSEN):
        lab = open_lab(folder, raw, compression=("5x",), student_epochs=1, teacher_epochs=1)
        records = do(lab)
    return {name: record.weights_sha256 or str(record.chosen) for name, record in records.items()}


def test_nothing_but_the_training_images_reaches_a_model(tmp_path: Path) -> None:
    """Other test and select images change no weight at all; other fit images change only what has attention: HPM-KD's
    student, and the assistant that has two teachers."""
    raw = lab_data()
    _, fit, select = exp.held_out_indices(raw.train_labels, 42)
    base = weights_of(raw, tmp_path / "base")
    assert len(base) == 7
    pixels, rotated = raw.train_pixels.copy(), raw.train_labels
    pixels[select] = 255 - pixels[select]
    unseen = dataclasses.replace(
        raw, train_pixels=pixels, test_pixels=255 - raw.test_pixels, test_labels=np.roll(raw.test_labels, 1)
    )
    assert weights_of(unseen, tmp_path / "unseen") == base
    pixels = raw.train_pixels.copy()
    images = {label: [i for i in fit if rotated[i] == label] for label in range(10)}
    for label in range(10):  # every fit image now shows another class than its label says
        pixels[images[label]] = raw.train_pixels[images[(label + 1) % 10]]
    changed = weights_of(dataclasses.replace(raw, train_pixels=pixels), tmp_path / "fit")
    assert [name for name in base if changed[name] != base[name]] == [
        "assistant_2.3x_SYNTHETIC",
        "student_5x_HPM-KD_run1",
    ]


def test_real_pilots_do_not_see_the_test_set(tmp_path: Path) -> None:
    raw, tables = lab_data(), []
    other = dataclasses.replace(
        raw, test_pixels=255 - raw.test_pixels, test_labels=np.roll(raw.test_labels, 1)
    )
    for number, data in enumerate((raw, other)):
        with shortcuts():
            lab = open_lab(tmp_path / str(number), data, compression=("2.3x",), teacher_epochs=1)
            record = do(lab, teacher(lab), assistant(lab), pilot(lab))[pilot(lab).name]
        tables.append((record.chosen, record.candidates))
    assert tables[0] == tables[1]


# ---- One network -----------------------------------------------------------------------------------------------------


def training(experiment: exp.Experiment, epochs: int = 2, run: int = 1, config: Any = None) -> exp.Training:
    """A training of a 7x student by Direct, as `exp.do_job` would set it up."""
    method = exp.Direct(experiment, config, exp.page_order(42, run, epochs))
    return exp.Training(experiment, student(experiment, "Direct", "7x", run), "x", 3 * epochs, method)


def test_the_history_of_a_training(tmp_path: Path) -> None:
    lab = open_lab(tmp_path / "lab")
    one = training(lab, 3)
    network = one.run()
    assert [epoch.lr for epoch in one.history] == [exp.learning_rate(step, 9, 0.05) for step in (2, 5, 8)]
    assert all(math.isfinite(epoch.loss) and epoch.temperature is None for epoch in one.history)
    assert one.seconds == pytest.approx(sum(epoch.seconds for epoch in one.history))
    network.eval()
    with torch.no_grad():
        right = network(lab.images.normalise(lab.images.select.pixels)).argmax(1) == lab.images.select.labels
    assert one.history[-1].val_accuracy == pytest.approx(100 * right.float().mean().item())


def test_a_record_says_what_the_finished_file_holds(tmp_path: Path) -> None:
    lab = open_lab(tmp_path / "lab", student_epochs=1)
    with shortcuts():
        job = student(lab, "Direct")
        record = do(lab, job)[job.name]
    content = exp.load_checkpoint(lab.run.file(job))
    for part, said in (("test", record.test_accuracy), ("select", record.val_accuracy)):
        hits = content[f"{part}_logits"].float().argmax(1) == getattr(lab.images, part).labels
        assert said == pytest.approx(100 * hits.float().mean().item())
    assert "fit_logits" not in content
    assert (record.seed, len(record.history), record.config, record.same_as, record.taught_by) == (
        43,
        1,
        None,
        "",
        {},
    )
    weights = content["model"]
    assert record.params == sum(
        v.numel() for name, v in weights.items() if "weight" in name or "bias" in name
    )
    assert record.weights_sha256 == exp.tensors_sha256(weights)
    assert exp.from_plain(exp.Record, content["record"]) == record


def test_one_step_is_sgd_with_nesterov_momentum_and_weight_decay(tmp_path: Path) -> None:
    """Two steps computed by hand: v = 0.9 v + g + 5e-4 w; w = w - lr (g + 5e-4 w + 0.9 v)."""
    lab = open_lab(tmp_path / "lab")
    one = training(lab)
    weight = one.model.classifier.weight
    w, v = weight.detach().clone().double(), torch.zeros_like(weight).double()
    one.model.train()
    for number, rate in enumerate((0.05, 0.02)):
        one.optimizer.param_groups[0]["lr"] = rate
        index = torch.arange(60) + number
        probe = copy.deepcopy(one.model)
        torch.nn.functional.cross_entropy(
            probe(lab.images.render(index, 4)), lab.images.labels[index]
        ).backward()
        one._step(index, 4)
        g = probe.classifier.weight.grad.double() + 5e-4 * w
        v = 0.9 * v + g
        w = w - rate * (g + 0.9 * v)
        torch.testing.assert_close(weight.double(), w, rtol=1e-5, atol=1e-7)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    """With the batch normalisation held fixed the gradient is that of the whole batch, whatever the pieces."""
    lab = open_lab(tmp_path / "lab")
    one, gradients = training(lab), []
    one.model.eval()
    for size in (60, 25, 7):
        one.micro_batch = size
        loss = one._gradients(torch.arange(60), 0)
        gradients.append([loss, *(p.grad.clone() for p in one.model.parameters())])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, render = open_lab(tmp_path / "lab", student_epochs=1), exp.Images.render

    def limited(self: exp.Images, index: torch.Tensor, page: int) -> torch.Tensor:
        if len(index) > 20:
            raise torch.OutOfMemoryError
        return render(self, index, page)

    monkeypatch.setattr(exp.Images, "render", limited)
    with shortcuts():
        job = student(lab, "Direct", "7x")
        record = do(lab, job)[job.name]
    assert "micro-batches of 15" in record.notes[0]
    monkeypatch.setattr(exp.Images, "render", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(exp.JobFailed, match="out of memory"):
        training(lab).run()


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([math.nan], 1),
        ([2.0, math.inf, 2.0], 1),
        ([2.0, 2.0, 1e5], 1),
        ([2e3, 2e3, 1e8], 1),
        ([2.0, 2.0, 2.0, 2e5, 2e5, 2e5], 2),
    ],
)
def test_a_divergence_fails_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], epoch: int
) -> None:
    """No number, or 10,000 times what the loss was at the start."""
    given = iter(losses)
    monkeypatch.setattr(exp.Training, "_step", lambda *_: torch.tensor(next(given, losses[-1])))
    with pytest.raises(exp.Diverged, match=f"diverged in epoch {epoch}"):
        training(open_lab(tmp_path / "lab")).run()


def test_a_large_loss_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published losses have scales of their own."""
    monkeypatch.setattr(exp.Training, "_step", lambda *_: torch.tensor(3e6))
    one = training(open_lab(tmp_path / "lab"))
    one.run()
    assert [epoch.loss for epoch in one.history] == [3e6, 3e6]


@pytest.mark.parametrize(("overflows", "fails"), [(1, False), (2, True)])
def test_an_overflow_that_the_scaler_skips_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overflows: int, fails: bool
) -> None:
    """One of three steps gives no number and leaves none in the running statistics: the epoch counts without it."""
    one, step = training(open_lab(tmp_path / "lab"), epochs=1), exp.Training._step
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    seen = []

    def overflow(self: exp.Training, index: torch.Tensor, page: int) -> torch.Tensor:
        loss = step(self, index, page)
        seen.append(loss.item())
        if len(seen) > overflows:
            return loss
        norm = next(m for m in self.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
        norm.running_mean.fill_(math.nan)
        return torch.tensor(math.inf)

    monkeypatch.setattr(exp.Training, "_step", overflow)
    if fails:
        with pytest.raises(exp.Diverged, match="diverged in epoch 1"):
            one.run()
        return
    one.run()
    assert one.history[0].loss == pytest.approx(sum(seen[1:]) / 2)
    assert all(buffer.isfinite().all() for buffer in one.model.buffers())


def test_an_unfinished_network_is_not_taken_for_another_ones(tmp_path: Path) -> None:
    """A checkpoint of another seed, length or configuration is not continued."""
    lab = open_lab(tmp_path / "lab")
    one = training(lab)
    one._epoch(0)
    one.save()
    for other in (training(lab, run=2), training(lab, 3), training(lab, config=exp.Distillation())):
        exp.restore_training(other)
        assert not other.history
        one.save()
    same = training(lab)
    exp.restore_training(same)
    assert len(same.history) == 1


# ---- A stop at any moment --------------------------------------------------------------------------------------------

DISTILLED = {"compression": ("2.3x", "5x"), "student_epochs": 3, "teacher_epochs": 1}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment with a finished teacher and the assistants 1.5x and 2.3x: copy it."""
    lab = open_lab(tmp_path_factory.mktemp("taught") / "lab", **DISTILLED)
    with shortcuts():
        do(lab, teacher(lab), assistant(lab), assistant(lab, "2.3x"))
    return lab.run.path


class ShortSession(exp.Session):
    """A session whose clock runs out at the n-th time that it is asked (at every step, and more often)."""

    def __init__(self, asked: int) -> None:
        super().__init__(None)
        self.left = asked

    def check(self, needed_seconds: float = 0.0) -> None:
        self.left -= 1
        if self.left < 0:
            raise exp.Stopped("session clock")


def in_sessions(folder: Path, compression: str, kind: str, asked: int) -> tuple[exp.Record, int]:
    """The record of HPM-KD's pilot or student, done in sessions of that length, and how many it took."""
    for number in range(1, 100):
        lab = open_lab(folder, **DISTILLED)
        jobs = [pilot(lab, compression=compression), student(lab, "HPM-KD", compression)][
            : 1 if kind == "pilot" else 2
        ]
        lab.session = ShortSession(asked)
        lab.run.refresh()
        try:
            do(lab, *(job for job in jobs if job.name not in lab.run.records))
        except exp.Stopped:
            continue
        return lab.run.records[jobs[-1].name], number
    raise AssertionError("no progress")


@pytest.mark.parametrize(
    ("kind", "compression", "chosen", "asked"),
    [("student", "5x", 4, 7), ("student", "5x", 4, 9), ("pilot", "2.3x", None, 8)],
)
def test_a_stop_at_any_moment_changes_no_bit(
    taught: Path, tmp_path: Path, kind: str, compression: str, chosen: int | None, asked: int
) -> None:
    """In the middle of an epoch, between epochs, while a page is computed, between and within a pilot's candidates."""
    records = []
    for name, length in (("whole", 10**9), ("cut", asked)):
        shutil.copytree(taught, tmp_path / name)
        with shortcuts(chosen):
            record, sessions = in_sessions(tmp_path / name, compression, kind, length)
        assert (sessions == 1) == (name == "whole")
        records.append(record)
    whole, cut = map(untimed, records)
    assert repr(cut) == repr(whole), "NaN equals NaN here"
    if kind == "student":
        assert whole.config is not None and whole.config.schedule == "cosine"
        assert len({epoch.temperature for epoch in whole.history}) == 3
        assert set(whole.attention) == {"select", "train"} and len(whole.attention["train"].mean_weight) == 3


def test_a_second_device_refuses_to_mix() -> None:
    with second_device():
        elsewhere, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert (elsewhere + 1).cpu().tolist() == [2, 2, 2]
        assert elsewhere[torch.tensor([0, 2])].device == DEVICE
        for mixed in (
            lambda: elsewhere + here,
            lambda: here[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()


def test_every_kind_of_job_on_a_second_device(tmp_path: Path) -> None:
    """Nothing mixes devices, also not after a resume or when speeds are measured, and the results are the CPU's."""
    given = {"compression": ("5x",), "methods": ("Direct", "TraditionalKD", "HPM-KD")}

    def stop(*_: object) -> None:
        raise exp.Stopped("the test")

    with shortcuts():
        expected = do(open_lab(tmp_path / "cpu", **given))
        with second_device():
            interrupted = open_lab(tmp_path / "second", **given)
            assert interrupted.images.pixels.device == DEVICE
            interrupted.progress.after_epoch = stop
            with pytest.raises(exp.Stopped):
                do(interrupted)
            experiment = open_lab(tmp_path / "second", **given)
            records = do(experiment)
            assert [record.failure for record in records.values() if record.failure] == []
            assert not list(experiment.run.path.rglob("*.corrupt"))
            exp.do_job(experiment, student(experiment, "HPM-KD-no-attention", "5x"))
            networks = ["teacher", "1.5x", "2.3x", "5x"]
            exp.measure_speeds(experiment, networks)
            assert set(networks) <= set(experiment.progress.estimate.speeds)
    with second_device():
        network = experiment.place(exp.build_network("5x", 10, 8))
        assert set(exp.latency_ms(experiment, network)) == {"1", "256"}
    assert list(records) == list(expected)
    for name, record in records.items():
        assert str(untimed(record)) == str(untimed(expected[name]))  # a NaN differs from itself
