"""The order of the jobs, what is planned, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
import heapq
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from lab import do, open_lab, shortcuts, stop_before_epoch, student, teacher

import run_exp1b_kaggle as exp

CHOSEN = exp.HPMKD.default("7x")


def ended(job: exp.Job, failure: str = "") -> exp.Record:
    """The record of a job that has ended; a pilot has chosen CHOSEN."""
    return exp.Record(
        job.name, job.kind, job.compression, job.method, job.run, "", failure=failure, config=CHOSEN
    )


class Simulation:
    """The script's own graph, order and readiness on workers that only count time."""

    def __init__(self, settings: exp.Settings) -> None:
        self.settings, self.jobs = settings, exp.planned_jobs(settings)
        self.seconds = {job.name: exp.job_macs(job, settings, {}) for job in self.jobs}
        self.start: dict[str, float] = {}
        self.end: dict[str, float] = {}
        self.records: dict[str, exp.Record] = {}

    def run(self, workers: int) -> float:
        """Makespan."""
        order = exp.priorities(self.jobs, self.settings, {})
        by_name = {job.name: job for job in self.jobs}
        now, running = 0.0, list[tuple[float, str]]()
        while len(self.records) < len(self.jobs):
            for job in exp.ready_jobs(self.jobs, self.settings, self.records, order):
                if job.name not in self.start and len(running) < workers:
                    assert all(needed.name in self.records for needed in self.needs(job))
                    twin = exp.twin_of(job, self.settings, self.records)
                    self.start[job.name] = now
                    self.end[job.name] = now + (0.0 if twin else self.seconds[job.name])
                    heapq.heappush(running, (self.end[job.name], job.name))
            now, name = heapq.heappop(running)
            self.records[name] = ended(by_name[name])
        return now

    def needs(self, job: exp.Job) -> list[exp.Job]:
        return exp.needs(job, self.settings, self.records)

    def least(self, workers: int) -> float:
        """What no schedule can beat: the longest path; and, from any moment on, all work that cannot start before it."""
        seconds = {name: self.end[name] - self.start[name] for name in self.end}
        earliest: dict[str, float] = {}
        for job in self.jobs:
            before = [earliest[needed.name] + seconds[needed.name] for needed in self.needs(job)]
            earliest[job.name] = max(before, default=0.0)
        longest = max(earliest[name] + seconds[name] for name in seconds)
        later = [
            at + sum(seconds[name] for name in seconds if earliest[name] >= at) / workers
            for at in earliest.values()
        ]
        return max(longest, *later)


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("ablation", [False, True])
@pytest.mark.parametrize(("mode", "runs"), [("quick", 3), ("full", 5)])
def test_workers_are_kept_busy(mode: str, runs: int, ablation: bool, workers: int) -> None:
    """Within a tenth of what no schedule can beat."""
    simulation = Simulation(exp.new_settings({"mode": mode, "runs": runs, "ablation": ablation}))
    makespan = simulation.run(workers)
    assert set(simulation.end) == {job.name for job in simulation.jobs}
    assert makespan <= 1.1 * simulation.least(workers)


def test_direct_students_train_beside_the_teacher() -> None:
    """With two workers one trains the teacher, at once, while the other needs nothing of it."""
    simulation = Simulation(exp.new_settings({"mode": "quick"}))
    simulation.run(2)
    teacher = simulation.jobs[0].name
    assert simulation.start[teacher] == 0.0
    beside = {name for name, start in simulation.start.items() if start < simulation.end[teacher]} - {teacher}
    assert beside
    assert beside <= {job.name for job in simulation.jobs if not job.teacher_networks}


def test_a_failed_job_stops_only_what_needs_it() -> None:
    settings = exp.new_settings({"mode": "quick"})
    jobs = exp.planned_jobs(settings)
    order = exp.priorities(jobs, settings, {})
    pilot = next(job for job in jobs if job.kind == "pilot" and job.compression == "5x")
    records = {pilot.name: ended(pilot, "simulated")}
    while ready := exp.ready_jobs(jobs, settings, records, order):
        records[ready[0].name] = ended(ready[0])
    missing = {job.name for job in jobs if job.name not in records}
    assert missing == {f"student_5x_HPM-KD_run{run}" for run in (1, 2, 3)}


def seconds_in(text: str) -> float:
    """A time as the script prints it."""
    number, unit = text.split()
    return float(number) * {"ms": 1e-3, "s": 1, "min": 60, "h": 3600}[unit]


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_plan_says_what_there_is_to_do(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs per kind, hours, sessions and disk add up, at made-up speeds; nothing is written; 80 columns suffice."""
    speeds = {name: 3 * exp.network_cost(name, 10, 64)[1] * 128 / 0.36 for name in exp.ARCHITECTURES}

    def measured(experiment: exp.Experiment, networks: Iterable[str]) -> None:
        experiment.progress.estimate.speeds = {name: speeds[name] for name in networks}

    monkeypatch.setattr(exp, "measure_speeds", measured)
    monkeypatch.chdir(tmp_path)
    assert exp.main(["--plan", "--mode", mode, "--device", "cpu", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    settings = exp.new_settings({"mode": mode})
    runs, epochs, steps = settings.runs, settings.student_epochs, 45_000 // 128
    rows = {}
    for line in said.splitlines():
        if found := re.match(r"(\S.*?)  +(\d+) +(\S+ \w+) +(\S+ \w+)$", line):
            rows[found[1]] = (int(found[2]), seconds_in(found[3]), seconds_in(found[4]))
    for method in ("Direct", "TraditionalKD", "HPM-KD"):
        for ratio in exp.RATIOS:
            number, each, together = rows[f"{ratio} {method}"]
            assert number == runs
            assert each == pytest.approx(epochs * steps * 0.36, rel=0.05)
            assert together == pytest.approx(runs * each, rel=0.05)
    assert len([name for name in rows if name.startswith("assistant")]) == 3
    assert len([name for name in rows if name.startswith("pilot")]) == 3
    pages = exp.pages_used(exp.planned_jobs(settings), settings)
    training = settings.teacher_epochs + epochs * (3 + 3 * 1.5 + 9 * runs)
    total = training * steps * 0.36 + len(pages) * 45_000 * 0.36 / 128 / 3
    one, here = re.search(r"total (\S+ \w+) of one device, (\S+ \w+) here", said).groups()  # type: ignore[union-attr]
    assert seconds_in(one) == pytest.approx(total, rel=0.02)
    assert seconds_in(here) == pytest.approx(total / 2, rel=0.02)
    assert f"{-int(-total / 2 / 3600 // exp.KAGGLE_SESSION_HOURS)} session" in said
    assert "Kaggle keeps 20 GB" in said
    assert max(map(len, said.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


def test_plan_of_a_run_uses_its_settings_and_leaves_it_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lab = open_lab(tmp_path / "run", student_epochs=50)
    lab.run.save_index()  # it is written at most every 30 s: the files say what is done
    with shortcuts(steps=False):
        do(lab, student(lab, "Direct"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(exp.Training, "run", lambda self: pytest.fail("something was trained"))
    assert exp.main(["--plan", "--resume", "--output-dir", str(lab.run.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "SYNTHETIC, 200 training images, width 8" in said
    assert "2.3x Direct" not in said, "it is done"
    assert "5x Direct" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["--plan", "--status"])
def test_equal_cost_is_planned_at_what_it_costs(command: str) -> None:
    """Not as Direct: its epochs come from the index."""
    settings = exp.new_settings({"mode": "quick", "equal_cost": True})
    epochs = exp.equal_cost_epochs(settings)
    estimate = exp.Estimate(settings, 45_000, 1, epochs, {"teacher": 1e12})
    for ratio in exp.RATIOS:
        arm = next(name for name, method in exp.METHODS.items() if method.option == "equal_cost")
        seconds = [
            estimate.job_seconds(exp.Job("student", "CIFAR10", ratio, method, 1))
            for method in ("Direct", arm)
        ]
        assert seconds[1] / seconds[0] == pytest.approx(epochs[ratio] / settings.student_epochs)
        assert seconds[1] > 2 * seconds[0]


def test_the_time_left_is_known_before_the_first_epoch_and_learns_from_epochs(tmp_path: Path) -> None:
    """One network is measured; the others count as fast per multiply-accumulate until their epochs say otherwise."""
    experiment = open_lab(tmp_path, compression=("5x",))
    estimate = experiment.progress.estimate
    assert estimate.seconds_left(experiment.run.left) == 0, "nothing is known yet"
    exp.measure_speeds(experiment, ["teacher"])
    assert list(estimate.speeds) == ["teacher"]
    jobs, classes = experiment.run.left, len(experiment.images.classes)
    work = sum(exp.job_macs(job, experiment.settings, {}) for job in jobs)
    pages = exp.pages_used(jobs, experiment.settings)
    work += sum(exp.network_cost(name, classes, 8)[1] for name, _ in pages)
    expected = work * len(experiment.images) / estimate.speeds["teacher"]
    assert estimate.seconds_left(jobs) == pytest.approx(expected)
    assert exp.Estimate(experiment.settings, len(experiment.images), 99, {}, estimate.speeds).seconds_left(
        jobs
    ) == pytest.approx(
        sum(
            estimate.job_seconds(job)
            for job in jobs
            if job.kind in ("teacher", "assistant", "pilot") or job.method == "HPM-KD"
        )
    ), "the longest chain: teacher, assistants, pilot, student"
    with shortcuts():
        do(experiment, student(experiment, "Direct", "5x"))
    assert list(estimate.speeds) == ["teacher", "5x"]
    epoch = experiment.run.records["student_5x_Direct_run1"].history[-1]
    assert experiment.progress.epoch_seconds("5x", 3) == pytest.approx(epoch.seconds)


def test_the_time_left_shrinks_with_every_epoch_of_a_job(tmp_path: Path) -> None:
    """Not at the job's end alone: the teacher takes hours. A resume counts what was done before."""
    experiment = open_lab(tmp_path, compression=("5x",), teacher_epochs=4)
    estimate, job = experiment.progress.estimate, teacher(experiment)
    seen: list[float] = []
    with shortcuts(steps=False), pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "learn", lambda *_: estimate.speeds.update(teacher=1e9))  # always as fast
        estimate.learn("teacher", 0, 0)
        whole, rest = estimate.job_seconds(job), estimate.seconds_left(experiment.run.left)
        experiment.progress.after_epoch = lambda: seen.append(estimate.seconds_left(experiment.run.left))
        patch.setattr(exp.Training, "SAVE_SECONDS", 0.0)
        with pytest.MonkeyPatch.context() as stopped:
            stop_before_epoch(stopped, 2)
            for _ in range(2):  # the second time nothing is trained
                estimate.trained.clear()
                with pytest.raises(exp.Stopped):
                    do(experiment, job)
                assert estimate.trained == {job.name: 0.5}
        do(experiment, job)
    assert seen == pytest.approx([rest - whole * done / 4 for done in (1, 2, 3, 4)])


# ---- Out of memory -------------------------------------------------------------------------------------------

# What torch raises where memory does not suffice: its allocator, cuDNN (two versions), CUDA, cuBLAS, the CPU's allocator.
SHORTAGES = [
    torch.OutOfMemoryError("simulated"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
]


class LimitedMemory(torch.nn.Module):
    """A network that runs out of memory beyond `most` images, and notes the sizes that it was given."""

    def __init__(self, network: torch.nn.Module, most: int, shortage: RuntimeError = SHORTAGES[0]) -> None:
        super().__init__()
        self.network, self.most, self.shortage, self.sizes = network, most, shortage, list[int]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.shortage
        return self.network(images)


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_every_way_to_say_out_of_memory_is_understood(
    shortage: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a training step, in inference, and while speeds are measured; any other error is not taken for one."""
    experiment = open_lab(tmp_path, compression=("7x",), methods=("Direct",))
    images = experiment.images.normalise(experiment.images.test.pixels[:30])
    build = exp.build_network
    for error, understood in (
        (shortage, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ):
        training = exp.Training(
            experiment, student(experiment, "Direct", "7x"), "job", 3, exp.Direct(experiment, None, [0])
        )
        training.model = LimitedMemory(build("7x", 10, 8), 20, error)
        limited = LimitedMemory(build("7x", 10, 8), 20, error)
        monkeypatch.setattr(exp, "build_network", lambda *_, network=limited: network)
        monkeypatch.setattr(exp.Experiment, "place", lambda _, network: network)
        for action in (
            lambda training=training: training._step(torch.arange(60), 0),
            lambda training=training: experiment.infer(training.model, images),
            lambda: exp.measure_speeds(experiment, ["7x"]),
        ):
            with (
                contextlib.nullcontext()
                if understood
                else pytest.raises(RuntimeError, match="illegal memory access")
            ):
                action()
        monkeypatch.undo()


def test_no_memory_for_the_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SHORTAGES[0]

    monkeypatch.setattr(exp, "Images", full)
    with pytest.raises(exp.UsageError, match=r"^CPU has no memory for the data: stop what else uses it$"):
        open_lab(tmp_path / "run")


def test_inference_halves_as_far_as_needed(tmp_path: Path) -> None:
    experiment = open_lab(tmp_path)
    network = exp.build_network("7x", 10, 8).eval()
    images = experiment.images.normalise(experiment.images.test.pixels[:30])
    limited = LimitedMemory(network, 1)
    torch.testing.assert_close(experiment.infer(limited, images), experiment.infer(network, images))
    with pytest.raises(exp.JobFailed, match="even with 1 image at a time"):
        experiment.infer(LimitedMemory(network, 0), images)


def test_micro_batches_are_told_to_the_reader_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One arm of a pair runs in micro-batches, another does not fit at all: both are in the record and in the report."""
    forward, build = exp.CifarResNet.forward, exp.Training.__init__
    limit: dict[str, int] = {"student_5x_Direct_run1": 20, "student_5x_Direct_run2": 2}
    current = {"most": 20}  # before the first job, while speeds are measured

    def start(self: exp.Training, experiment: exp.Experiment, job: exp.Job, name: str, *rest: object) -> None:
        build(self, experiment, job, name, *rest)  # type: ignore[arg-type]
        current["most"] = limit.get(name, 1_000)

    def limited(self: exp.CifarResNet, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > current["most"]:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, images)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exp.Training, "__init__", start)
    monkeypatch.setattr(exp.CifarResNet, "forward", limited)
    scope = [
        "--runs",
        "2",
        "--methods",
        "Direct",
        "--train-size",
        "200",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert exp.main([*SMALL, *scope]) == 1
    assert "out of memory; going on with micro-batches of 15" in capsys.readouterr().out
    records = exp.load_index(tmp_path / "run", {}).jobs
    assert "micro-batches of 15" in records["student_5x_Direct_run1"].notes[0]
    assert "out of memory" in records["student_5x_Direct_run2"].failure
    report = (tmp_path / "run/experiment_report.md").read_text()
    assert "micro-batches of 15" in report
    assert "out of memory even with 4 images" in report


def test_the_pages_of_a_plan_are_those_that_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every student and assistant by what it learns from; of candidates that leave early only their first epochs."""
    settings = exp.new_settings({"methods": ("HPM-KD",), "compression": ("7x",), "runs": 2})
    orders = [set(exp.page_order(settings.seed, run, settings.student_epochs)) for run in (1, 2)]

    def pages() -> dict[str, set[int]]:
        used = exp.pages_used(exp.planned_jobs(settings), settings)
        return {name: {page for network, page in used if network == name} for name in exp.ARCHITECTURES}

    assert pages() == dict.fromkeys(("teacher", "1.5x", "2.3x", "5x"), orders[0] | orders[1]) | {"7x": set()}
    count = len(orders[0] | orders[1])
    described = 4 * 10 + exp.PROJECTED  # the logits of all, the descriptions of the teacher
    assert exp.page_bytes(settings) == count * 45_000 * described * 2

    default = exp.HPMKD.default("7x")
    of_two, of_all = (replace(default, weight=0.0, teachers=default.teachers[:n]) for n in (2, 4))
    monkeypatch.setattr(exp.HPMKD, "default", lambda _: of_two)
    monkeypatch.setattr(exp.HPMKD, "candidates", lambda _: [of_two, of_all])
    found = pages()
    assert found["teacher"] == found["1.5x"] == orders[0] | orders[1]
    assert found["2.3x"] == orders[0], "the assistant 5x learns from it, on the views of run 1"
    share = math.ceil(exp.PILOT_SHARE * settings.student_epochs / 2)  # two candidates have one rung
    assert found["5x"] == set(exp.page_order(settings.seed, 1, share)), (
        "a candidate of the pilot, for its first rung"
    )
    count = sum(map(len, found.values()))
    assert exp.page_bytes(settings) == count * 45_000 * 10 * 2, "without descriptions"
