"""Devices and precision, by simulated GPUs: what is chosen, what is refused, and what a resume does with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from lab import do, lab_data, open_lab, shortcuts

import run_exp1b_kaggle as exp

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
P100, T4, A100, H100, BLACKWELL = (6, 0), (7, 5), (8, 0), (9, 0), (12, 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that the machine has GPUs of these compute capabilities, and a torch build of these architectures."""

    def pretend(*capabilities: tuple[int, int], build: list[str] = CU128) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: build)

    return pretend


def gpu(capability: tuple[int, int]) -> exp.Device:
    return exp.Device("cuda", 0, "GPU", capability)


CPU = exp.Device("cpu", 0, "CPU")


@pytest.mark.parametrize(
    ("capability", "build", "usable"),
    [
        (P100, CU126, True),
        (P100, CU128, False),
        (T4, CU128, True),
        ((8, 9), CU128, True),  # runs sm_86 code: same major version, lower minor
        ((8, 0), ["sm_86"], False),  # but not the other way round
        (H100, ["sm_90a"], True),
        (BLACKWELL, CU128, True),
        (BLACKWELL, CU126, False),
        (BLACKWELL, [*CU126, "compute_90"], True),  # intermediate code runs on anything newer
        ((13, 0), CU128, True),
        (T4, ["compute_80"], False),
        (T4, [], False),
        (T4, ["gfx90a", "sm_x"], False),
    ],
)
def test_kernels_of_a_build(capability: tuple[int, int], build: list[str], usable: bool) -> None:
    assert exp.has_kernels(capability, build) is usable


@pytest.mark.parametrize(
    ("capability", "precision"),
    [(P100, "fp32"), ((7, 0), "fp16"), (T4, "fp16"), (A100, "bf16"), (H100, "bf16"), (BLACKWELL, "bf16")],
)
def test_precision_follows_capability(capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The T4 says that it supports bf16 (by emulation), so torch must not be asked."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert exp.choose_precision("auto", gpu(capability), native_cpu_bf16=True) == precision
    assert all(exp.choose_precision(wanted, gpu(capability), False) == wanted for wanted in exp.PRECISIONS)


def test_precision_on_a_cpu() -> None:
    assert exp.choose_precision("auto", CPU, native_cpu_bf16=False) == "fp32"
    assert exp.choose_precision("auto", CPU, native_cpu_bf16=True) == "bf16"
    assert exp.choose_precision("bf16", CPU, native_cpu_bf16=False) == "bf16"
    with pytest.raises(exp.UsageError, match="fp16 needs a GPU"):
        exp.choose_precision("fp16", CPU, native_cpu_bf16=True)


def test_every_gpu_is_used(gpus: Callable[..., None]) -> None:
    gpus(T4, T4)
    assert [(d.kind, d.index, d.capability) for d in exp.find_devices("auto", kaggle=True, allow_cpu=False)] == [
        ("cuda", 0, T4),
        ("cuda", 1, T4),
    ]
    assert [d.kind for d in exp.find_devices("cpu", kaggle=True, allow_cpu=False)] == ["cpu"]


def test_looking_for_devices_takes_no_memory_on_them(gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent of several workers looks at every GPU, where a tensor would cost some hundred megabytes of context."""
    gpus(T4, T4)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a CUDA context was made"))
    exp.find_devices("auto", kaggle=True, allow_cpu=False)


def test_a_gpu_without_kernels_is_refused_with_the_remedy(gpus: Callable[..., None]) -> None:
    gpus(P100)
    with pytest.raises(exp.UsageError, match=r"GPU 0 \(compute capability 6.0\).*GPU T4 x2.*cu126"):
        exp.find_devices("auto", kaggle=True, allow_cpu=False)
    gpus(P100, build=CU126)
    assert len(exp.find_devices("auto", kaggle=True, allow_cpu=False)) == 1


def test_a_gpu_that_fails_at_its_first_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore lines")

    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(exp.UsageError, match=r"fails at the first convolution \(.*execution on the device\)"):
        exp.probe_gpu(gpu(T4))


def test_no_gpu(gpus: Callable[..., None]) -> None:
    gpus()
    with pytest.raises(exp.UsageError, match="no GPU: choose Settings > Accelerator"):
        exp.find_devices("auto", kaggle=True, allow_cpu=False)
    with pytest.raises(exp.UsageError, match="--device cuda, but torch sees no GPU"):
        exp.find_devices("cuda", kaggle=False, allow_cpu=True)
    for kaggle, allow_cpu in ((True, True), (False, False)):
        assert exp.find_devices("auto", kaggle, allow_cpu)[0].kind == "cpu"


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert exp.main([*SMALL, "--precision", "fp16", "--output-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_cores_are_shared_among_the_workers_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    settings = exp.Settings()
    assert exp.thread_count(settings, [CPU]) == 8
    assert exp.thread_count(settings, [gpu(T4)] * 2) == 4
    assert exp.thread_count(exp.replace(settings, workers=4), [CPU]) == 2
    assert exp.thread_count(exp.replace(settings, workers=4, threads=1), [CPU]) == 1
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert (exp.worker_count(settings, [CPU]), exp.thread_count(settings, [CPU])) == (8, 2)


def test_precision_is_chosen_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bf16 run, resumed on another processor that has no bf16: it stays bf16, and the change is said."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "5x"):  # emulated bf16 is slow
        monkeypatch.setitem(exp.ARCHITECTURES, name, exp.Architecture(exp.BasicBlock, (1, 1, 1, 1), (64, 64, 64, 64)))
    raw = lab_data()
    monkeypatch.setattr(exp, "load_data", lambda *_: raw)
    monkeypatch.setattr(exp, "measure_speeds", lambda *_: {})
    monkeypatch.setattr(exp, "latency_ms", lambda *_: {})
    monkeypatch.setattr(exp, "cpu_has_bf16", lambda: True)
    options = ["--methods", "Direct", "--teacher-epochs", "1", "--student-epochs", "1", "--output-dir", "run"]
    exp.network_cost.cache_clear()
    try:
        assert exp.main([*SMALL, *options]) == 0
        monkeypatch.setattr(exp, "cpu_has_bf16", lambda: False)
        monkeypatch.setattr(exp, "processor_name", lambda: "another processor")
        capsys.readouterr()
        assert exp.main(["--resume", "--runs", "2", "--threads", "1", "--device", "cpu", "--output-dir", "run"]) == 0
    finally:
        exp.network_cost.cache_clear()
    said = capsys.readouterr().out
    assert list(exp.pd.read_csv("run/results.csv").precision) == ["bf16", "bf16"]
    assert "another processor" in said
    assert "differs from the one before" in said
    assert "another processor" in Path("run/experiment_report.md").read_text()


@pytest.mark.parametrize(
    ("device", "native", "slow"),
    [(gpu(T4), True, True), (gpu(P100), True, True), (gpu(A100), False, False), (CPU, False, True), (CPU, True, False)],
)
def test_a_device_that_only_emulates_bf16_is_said(
    device: exp.Device, native: bool, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whoever asks for it, or continues a run of an A100 on a T4."""
    raw = lab_data()
    monkeypatch.setattr(exp, "load_data", lambda *_: raw)
    monkeypatch.setattr(exp, "find_devices", lambda *_: [device])
    monkeypatch.setattr(exp, "cpu_has_bf16", lambda: native)
    request = exp.parse_request([*SMALL, "--precision", "bf16", "--output-dir", str(tmp_path / "run")])
    with exp.open_run(request, exp.detect_platform(tmp_path), exp.Session(None)) as run:
        assert run.state["precision"] == "bf16"
    assert ("only emulates bf16" in capsys.readouterr().out) == slow


def test_a_run_in_fp16_is_not_continued_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = open_lab(tmp_path)
    exp.save_plain(experiment.folder.index_file, exp.new_index(experiment.settings, "fp16", experiment.state["data"]))
    assert exp.main(["--resume", "--device", "cpu", "--output-dir", str(experiment.folder.path)]) == 2
    assert "this run computes in fp16, which needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("first", [False, True])
def test_a_step_with_a_loss_scaler_is_the_step_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """The scaler of fp16 (here around fp32, so that it runs on a CPU): the same step, and none where a gradient is inf.

    Not in the very first step either, where torch's fused SGD would leave behind a momentum of whatever the memory held.
    """
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **named: empty(*args, **named).fill_(1e9))

    def fitting(scaled: bool) -> exp.Fitting:
        experiment = open_lab(tmp_path)
        schedule = exp.Schedule("7x", 4, 4, 0.05, 1, 1)
        made = exp.Fitting(experiment, "job", "identity", schedule, exp.DirectTrainer(experiment))
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        made.model.train()
        return made

    plain, scaled = fitting(False), fitting(True)
    index, loss = torch.arange(20), scaled.trainer.loss

    def step_both() -> None:
        for each in (plain, scaled):
            each._step(index, 0)
        for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    if not first:
        step_both()
    before = [p.clone() for p in scaled.model.parameters()]
    scaled.trainer.loss = lambda logits, index: logits.sum() * float("inf")  # type: ignore[method-assign]
    scaled._step(index, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.model.parameters(), strict=True))
    assert scaled.scaler.get_scale() == 512.0
    scaled.trainer.loss = loss  # type: ignore[method-assign]
    plain.model.train()(plain.experiment.images.render(index, 0))  # the step left out has moved batch normalisation's statistics
    step_both()


def test_deterministic_reaches_torch_and_ends_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation of training and evaluation has a deterministic form (torch raises where one has none)."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with shortcuts():
        lab = open_lab(tmp_path / "run", compression=("7x",), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert exp.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert {record["status"] for record in do(lab).values()} == {"done"}
    open_lab(tmp_path / "other")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
