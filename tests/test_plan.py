"""The order of the jobs, the plan, teacher passes, and what happens when memory runs out."""

from __future__ import annotations

import contextlib
import heapq
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from lab import do, open_lab, shortcuts

import run_exp1b_kaggle as exp

# ---- The scheduler, on made-up durations -----------------------------------------------------------------------------


class Simulation:
    """The script's own graph, order and readiness on workers that only count time; every pilot chooses `chosen`."""

    def __init__(self, settings: exp.Settings, chosen: exp.Distillation | None = None) -> None:
        self.settings, self.jobs = settings, exp.planned_jobs(settings)
        self.chosen = chosen or exp.Distillation(0.7, 4.0, "cosine", ("teacher", "2.3x"), attention=True)
        self.seconds = {job.name: exp.job_cost(job, settings, 10) for job in self.jobs}
        self.start: dict[str, float] = {}
        self.end: dict[str, float] = {}
        self.records: dict[str, dict[str, exp.Plain]] = {}

    def run(self, workers: int) -> float:
        """Makespan."""
        order = exp.priorities(self.jobs, self.settings, 10)
        now, running = 0.0, list[tuple[float, str]]()
        while len(self.records) < len(self.jobs):
            for job in exp.ready_jobs(self.jobs, self.settings, self.records, order):
                if job.name not in self.start and len(running) < workers:
                    assert all(n.name in self.records for n in exp.needs(job, self.settings, self.records))
                    twin = exp.twin_of(job, self.settings, self.records)
                    self.start[job.name], self.end[job.name] = now, now + (0.0 if twin else self.seconds[job.name])
                    heapq.heappush(running, (self.end[job.name], job.name))
            now, name = heapq.heappop(running)
            self.records[name] = {"status": "done", "config": self.chosen.plain()}
        return now

    def simple_bound(self, workers: int) -> float:
        """The longest path, or all work shared out evenly. Call it after `run`."""
        seconds, path = {name: self.end[name] - self.start[name] for name in self.end}, dict[str, float]()
        for job in self.jobs:
            needed = exp.needs(job, self.settings, self.records)
            path[job.name] = seconds[job.name] + max((path[n.name] for n in needed), default=0.0)
        return max(*path.values(), sum(seconds.values()) / workers)

    def least(self, workers: int) -> float:
        """What no schedule can beat: the longest path; and, from any moment on, all work that cannot start before it.

        (From the first moment on that is all work, shared out evenly.) Call it after `run`.
        """
        seconds = {name: self.end[name] - self.start[name] for name in self.end}
        earliest: dict[str, float] = {}
        for job in self.jobs:
            before = [earliest[n.name] + seconds[n.name] for n in exp.needs(job, self.settings, self.records)]
            earliest[job.name] = max(before, default=0.0)
        longest = max(earliest[name] + seconds[name] for name in seconds)
        later = [at + sum(seconds[n] for n in seconds if earliest[n] >= at) / workers for at in earliest.values()]
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


@pytest.mark.parametrize("workers", [2, 8])
@pytest.mark.parametrize(("mode", "runs"), [("quick", 3), ("full", 5)])
@pytest.mark.parametrize("seed", range(5))
def test_the_default_experiment_is_shared_out_evenly(mode: str, runs: int, workers: int, seed: int) -> None:
    """Within a tenth of max(critical path, total work / workers), though no job takes quite as long as it was expected to.

    (With --ablation on eight workers nothing can, see below.)
    """
    simulation = Simulation(exp.new_settings({"mode": mode, "runs": runs}))
    noise = exp.rng(seed, "noise").uniform(0.9, 1.1, len(simulation.jobs))
    simulation.seconds = {name: seconds * factor for (name, seconds), factor in zip(simulation.seconds.items(), noise, strict=True)}
    assert simulation.run(workers) <= 1.1 * simulation.simple_bound(workers)


@pytest.mark.parametrize(("mode", "runs"), [("quick", 3), ("full", 5)])
def test_the_ablation_on_eight_workers_waits_for_its_pilots_whatever_the_order(mode: str, runs: int) -> None:
    """Its many students cannot start before the pilots, at the end of the chain: no schedule comes within a quarter of that bound."""
    simulation = Simulation(exp.new_settings({"mode": mode, "runs": runs, "ablation": True}))
    makespan = simulation.run(8)
    assert simulation.least(8) > 1.25 * simulation.simple_bound(8)
    assert makespan <= 1.03 * simulation.least(8)


def test_direct_students_train_beside_the_teacher() -> None:
    """With two workers one trains the teacher, at once, while the other needs nothing of it."""
    simulation = Simulation(exp.new_settings({"mode": "quick"}))
    simulation.run(2)
    teacher = simulation.jobs[0].name
    assert simulation.start[teacher] == 0.0
    beside = [name for name, start in simulation.start.items() if start < simulation.end[teacher] and name != teacher]
    direct = {job.name for job in simulation.jobs if not exp.distils(job)} - {teacher}
    assert set(beside) <= direct
    assert set(beside) == direct or max(simulation.end[name] for name in beside) >= simulation.end[teacher]


def test_a_failed_job_stops_only_what_needs_it() -> None:
    settings = exp.new_settings({"mode": "quick"})
    jobs = exp.planned_jobs(settings)
    order = exp.priorities(jobs, settings, 10)
    records: dict[str, dict[str, exp.Plain]] = {"pilot_5x_HPM-KD_CIFAR10": {"status": "failed"}}
    while ready := exp.ready_jobs(jobs, settings, records, order):
        records[ready[0].name] = {"status": "done", "config": exp.Distillation().plain()}
    missing = {job.name for job in jobs if job.name not in records}
    assert missing == {f"student_5x_HPM-KD_run{run}" for run in (1, 2, 3)}


# ---- --plan ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["quick", "full"])
def test_plan_says_what_there_is_to_do(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Jobs per kind, hours, sessions and disk add up, at made-up speeds; nothing is written."""
    speeds = {name: exp.Speed(0.36, 0.001) for name in exp.ARCHITECTURES}
    monkeypatch.setattr(exp, "measure_speeds", lambda *_: speeds)
    monkeypatch.chdir(tmp_path)
    assert exp.main(["--plan", "--mode", mode, "--device", "cpu", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    settings = exp.new_settings({"mode": mode})
    runs, epochs, steps = settings.runs, settings.student_epochs, 45_000 // 128
    rows = {tuple(line.split()[:3]): line.split() for line in said.splitlines()}
    for method in exp.METHODS:
        for ratio in exp.RATIOS:
            row = rows["student", ratio, method]
            assert int(row[3]) == runs
            assert float(row[4]) == pytest.approx(epochs * steps * 0.36 / 3600, abs=6e-4)
    assert len([key for key in rows if key[0] == "intermediate"]) == 2
    assert len([key for key in rows if key[0] == "pilot"]) == 3
    pages = {p for run in range(1, runs + 1) for p in exp.page_order(42, run, epochs)}
    passes = next(line for line in said.splitlines() if line.startswith("teacher passes"))
    assert float(passes.split()[-1]) == pytest.approx(len(pages) * 45_000 * 0.001 * 3 / 3600, abs=6e-3)
    training = settings.teacher_epochs + epochs * (2 + 3 * 1.5 + 9 * runs)
    total = (training * steps * 0.36 + len(pages) * 45_000 * 0.003) / 3600
    assert f"total {total:.2f} device hours, {total / 2:.2f} hours here" in said
    assert f"{-int(-total / 2 // 11.5)} session(s) of 12 h" in said
    assert "GB of Kaggle's 20 GB" in said
    assert list(tmp_path.iterdir()) == []


def test_plan_measures_and_leaves_a_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real measurements, at width 8, of a run that was begun: its settings are used and not a byte of it changes."""
    monkeypatch.chdir(tmp_path)
    settings = exp.new_settings(exp.parse_request([*SMALL, "--student-epochs", "5000"]).given)
    folder = exp.RunFolder(tmp_path / "run")
    folder.create()
    raw = exp.load_data("SYNTHETIC", None, tmp_path, [], 400, 42)
    exp.save_plain(folder.index_file, exp.new_index(settings, "fp32", exp.describe_data(raw, 42)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(exp.Fitting, "run", lambda self: pytest.fail("something was trained"))
    assert exp.main(["--plan", "--resume", "--output-dir", str(folder.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "smoke, SYNTHETIC, 400 training images, fp32, 1 worker(s): CPU" in said
    hours = float(said.split("total ")[1].split()[0])
    assert 0 < hours < 100
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- Teacher passes --------------------------------------------------------------------------------------------------


def test_every_page_of_a_teacher_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole experiment, interrupted and resumed: a teacher sees the training images once per distinct page."""
    computed: list[tuple[str, int]] = []
    before_the_stop: list[tuple[str, int]] = []
    compute, epoch_done = exp.TeacherOutputs._compute, exp.Progress.epoch_done

    def counted(self: exp.TeacherOutputs, teacher: str, page: int) -> bytes:
        computed.append((teacher, page))
        return compute(self, teacher, page)

    def interrupted(self: exp.Progress, name: str, *rest: object) -> None:
        if name.startswith("student_5x_TraditionalKD_run1") and not before_the_stop:
            before_the_stop.extend(computed)
            raise exp.Stopped("session clock")
        epoch_done(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(exp.TeacherOutputs, "_compute", counted)
    monkeypatch.setattr(exp.Progress, "epoch_done", interrupted)
    with shortcuts(1, steps=False):
        with pytest.raises(exp.Stopped):
            do(open_lab(tmp_path, compression=("5x",), runs=2))
        assert before_the_stop
        records = do(open_lab(tmp_path, compression=("5x",), runs=2))
    assert all(record["status"] == "done" for record in records.values())
    assert len(computed) == len(set(computed))
    used = {page for run in (1, 2) for page in exp.page_order(42, run, 2)}
    assert {page for teacher, page in computed if teacher.startswith("teacher")} == used
    assert {page for _, page in computed} <= used


def test_pages_are_shared_by_methods_ratios_and_runs() -> None:
    """Quick needs 53 pages and full 141 of at most 162, whatever the number of methods and ratios."""
    for mode, expected in (("quick", 53), ("full", 141)):
        settings = exp.new_settings({"mode": mode})
        progress = exp.Progress(settings, 10, 45_000, False, 1)
        progress.speeds = {"teacher": exp.Speed(0.0, 1 / 45_000)}
        assert round(progress.page_seconds()) == expected
    assert len(set(exp.page_order(42, 1, 1_000))) == exp.VIEWS == 162


# ---- Out of memory ---------------------------------------------------------------------------------------------------


# What torch raises where memory does not suffice: its allocator, cuDNN (two versions), CUDA, cuBLAS, the CPU's allocator.
SHORTAGES = [
    torch.OutOfMemoryError("simulated"), RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("GET was unable to find an engine to execute this computation"), RuntimeError("CUDA error: out of memory\nCUDA kernel"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]  # fmt: skip


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


def fitting(experiment: exp.Experiment, most: int) -> exp.Fitting:
    schedule = exp.Schedule("7x", 3, 3, 0.05, 1, 1)
    made = exp.Fitting(experiment, "job", "identity", schedule, exp.DirectTrainer(experiment))
    made.model = LimitedMemory(made.model, most)
    return made


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Micro-batches of 60, 30, 15, 8 (uneven): the same loss and gradients, where BatchNorm uses its stored statistics."""
    experiment, index = open_lab(tmp_path), torch.arange(60)
    whole, parts = fitting(experiment, 60), fitting(experiment, 10)
    results = []
    for each in (whole, parts):
        each.model.eval()  # BatchNorm in training mode sees the micro-batch: said in the report
        each.optimizer.step = lambda *_: None  # type: ignore[method-assign]
        loss = each._step(index, 3)
        results.append((loss, [p.grad for p in each.model.parameters()]))
    assert parts.model.sizes[:4] == [60, 30, 15, 8]
    assert parts.model.sizes[4:] == [8] * 6 + [4]
    assert (whole.micro_batch, parts.micro_batch) == (60, 8)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_training_goes_on_in_micro_batches(tmp_path: Path) -> None:
    """The halving happens once, not at every step; it is kept across a resume."""
    experiment = open_lab(tmp_path)
    limited = fitting(experiment, 20)
    limited.run()
    assert limited.micro_batch == 15
    assert sum(size > 20 for size in limited.model.sizes) == 2 + (len(experiment.images.select.labels) > 20)
    limited._save()
    resumed = fitting(experiment, 20)
    resumed.model = limited.model
    resumed._restore()
    assert resumed.micro_batch == 15


def test_no_micro_batch_is_small_enough(tmp_path: Path) -> None:
    hopeless = fitting(open_lab(tmp_path), 2)
    with pytest.raises(exp.JobFailed, match="out of memory even with 4 images at a time"):
        hopeless._step(torch.arange(60), 0)
    assert min(hopeless.model.sizes) == 4


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_every_way_to_say_out_of_memory_is_understood(shortage: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a training step, in inference, and while speeds are measured; any other error is not taken for one."""
    experiment = open_lab(tmp_path)
    images = experiment.images.normalise(experiment.images.test.pixels[:30])
    build = exp.build_network
    for error, understood in ((shortage, True), (RuntimeError("CUDA error: an illegal memory access was encountered"), False)):
        made = fitting(experiment, 60)
        made.model = LimitedMemory(build("7x", 10, 8), 20, error)
        monkeypatch.setattr(exp, "build_network", lambda *_, e=error: LimitedMemory(build("7x", 10, 8), 20, e))
        monkeypatch.setattr(exp.Experiment, "place", lambda _, network: network)
        for action in (
            lambda made=made: made._step(torch.arange(60), 0),
            lambda made=made: experiment.infer(made.model, images),
            lambda: exp.measure_speeds(experiment, ["7x"]),
        ):
            with contextlib.nullcontext() if understood else pytest.raises(RuntimeError, match="illegal memory access"):
                action()
        monkeypatch.undo()


def test_inference_halves_as_far_as_needed(tmp_path: Path) -> None:
    experiment = open_lab(tmp_path)
    network = exp.build_network("7x", 10, 8).eval()
    images = experiment.images.normalise(experiment.images.test.pixels[:30])
    limited = LimitedMemory(network, 1)
    torch.testing.assert_close(experiment.infer(limited, images), experiment.infer(network, images))
    with pytest.raises(exp.JobFailed, match="a single image does not fit"):
        experiment.infer(LimitedMemory(network, 0), images)


def test_micro_batches_are_told_to_the_reader_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One arm of a pair runs in micro-batches, another does not fit at all: both are in the record and in the report."""
    forward, build = exp.CifarResNet.forward, exp.Fitting.__init__
    limit: dict[str, int] = {"student_5x_Direct_run1": 20, "student_5x_Direct_run2": 2}
    current = {"most": 20}  # before the first job, while speeds are measured

    def start(self: exp.Fitting, experiment: exp.Experiment, name: str, *rest: object) -> None:
        build(self, experiment, name, *rest)  # type: ignore[arg-type]
        current["most"] = limit.get(name, 1_000)

    def limited(self: exp.CifarResNet, images: torch.Tensor) -> torch.Tensor:
        if self.training and len(images) > current["most"]:
            raise torch.OutOfMemoryError("simulated")
        return forward(self, images)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exp.Fitting, "__init__", start)
    monkeypatch.setattr(exp.CifarResNet, "forward", limited)
    command = [
        *SMALL,
        "--runs",
        "2",
        "--methods",
        "Direct",
        "--train-size",
        "200",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert exp.main(command) == 1
    assert "out of memory; going on with micro-batches of 15" in capsys.readouterr().out
    state = exp.load_plain(tmp_path / "run/checkpoints" / exp.STATE_NAME)
    notes, failed = (state["jobs"][f"student_5x_Direct_run{run}"] for run in (1, 2))
    assert notes["status"] == "done"
    assert "micro-batches of 15" in notes["notes"][0]
    assert failed["status"] == "failed"
    assert "out of memory" in failed["reason"]
    report = (tmp_path / "run/experiment_report.md").read_text()
    assert "micro-batches of 15" in report
    assert "out of memory even with 4 images" in report
