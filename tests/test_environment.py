"""Devices and precision, by simulated GPUs: what is chosen, what is refused, and what a resume does with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from lab import do, lab_data, open_lab, shortcuts, student
from toy import cut_networks, new_toy, stopped_at_once

import run_exp1b_kaggle as exp

P100, T4, A100, H100, BLACKWELL = (6, 0), (7, 5), (8, 0), (9, 0), (12, 0)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nmore lines"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that the machine has GPUs of these compute capabilities. What is made on them is made on the CPU."""
    ones = torch.ones

    def pretend(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(
            torch.cuda, "get_arch_list", lambda: pytest.fail("the build's architectures decide")
        )
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))

    return pretend


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the first `count` convolutions fail with this message."""
    conv2d = exp.F.conv2d

    def fail(message: str, count: int = 9) -> None:
        left = [count]

        def convolution(*args: torch.Tensor) -> torch.Tensor:
            left[0] -= 1
            if left[0] >= 0:
                raise RuntimeError(message)
            return conv2d(*args)

        monkeypatch.setattr(exp.F, "conv2d", convolution)

    return fail


def gpu(capability: tuple[int, int]) -> exp.Device:
    return exp.Device("cuda", 0, "GPU", capability)


CPU = exp.Device("cpu", 0, "CPU")


def pretend_files(patch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Below /proc and /sys there are only these text files."""
    read = Path.read_text

    def read_text(path: Path, *args: str, **options: str) -> str:
        if not str(path).startswith(("/proc/", "/sys/")):
            return read(path, *args, **options)
        if str(path) not in files:
            raise FileNotFoundError(str(path))
        return files[str(path)]

    patch.setattr(Path, "read_text", read_text)


# ---- Which devices ---------------------------------------------------------------------------------------------------


def test_every_gpu_is_used(gpus: Callable[..., None]) -> None:
    gpus(T4, T4)
    assert [
        (d.kind, d.index, d.capability) for d in exp.find_devices("auto", kaggle=True, allow_cpu=False)
    ] == [
        ("cuda", 0, T4),
        ("cuda", 1, T4),
    ]
    assert [d.kind for d in exp.find_devices("cpu", kaggle=True, allow_cpu=False)] == ["cpu"]


def test_looking_for_devices_takes_no_memory_on_them(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent of several workers looks at every GPU, where a tensor would cost some hundred megabytes of context."""
    gpus(T4, T4)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a CUDA context was made"))
    exp.find_devices("auto", kaggle=True, allow_cpu=False)


def test_a_run_on_the_cpu_does_not_ask_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken driver does not concern it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    assert [d.kind for d in exp.find_devices("cpu", kaggle=True, allow_cpu=False)] == ["cpu"]


def test_a_gpu_without_kernels_is_refused_with_the_remedy(
    gpus: Callable[..., None],
    failing: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line that names the GPU, the error and what to do; nothing stays on the disk."""
    gpus(P100)
    failing(NO_KERNEL)
    assert exp.main([*SMALL, "--device", "cuda", "--output-dir", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "error: GPU 0 fails at the first convolution (CUDA error: no kernel image is available"
    )
    assert "GPU T4 x2" in last and "cu126" in last and "--device cpu" in last
    assert not (tmp_path / "run").exists()


def test_a_convolution_decides_and_not_a_name(gpus: Callable[..., None]) -> None:
    """An AMD GPU under ROCm, whose architecture is called gfx942, is a device like any other."""
    gpus((9, 4))
    (device,) = exp.find_devices("auto", kaggle=False, allow_cpu=False)
    exp.probe(device)
    assert exp.choose_precision("auto", device) == "bf16"


def test_a_gpu_that_another_process_fills_is_no_gpu_without_kernels(
    gpus: Callable[..., None], failing: Callable[..., None]
) -> None:
    gpus(T4)
    failing("CUDA error: out of memory")
    with pytest.raises(exp.UsageError, match=r"CUDA error: out of memory.*another process") as caught:
        exp.probe(gpu(T4))
    assert "cu126" not in str(caught.value)


def test_several_workers_try_their_own_devices(
    gpus: Callable[..., None], failing: Callable[..., None], tmp_path: Path
) -> None:
    """Their parent tries none, where it would take memory; what does not work is one line before it is used."""
    gpus(T4, T4)
    failing(NO_KERNEL)
    assert len(exp.choose_devices(exp.Settings(), exp.Platform(False, tmp_path, (), False))) == 2
    with pytest.raises(exp.UsageError, match=r"CPU fails at the first convolution .*no kernel image"):
        open_lab(tmp_path)


@pytest.mark.parametrize("kind", ["mps", "xpu", ""])
def test_the_first_lines_say_what_computes_and_what_does_not(
    toy: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Device and precision of every run; an accelerator that torch offers and this script cannot use is named."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: bool(kind))
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(kind or "cpu")
    )
    monkeypatch.setattr(exp, "processor_name", lambda: "the processor")
    monkeypatch.setattr(exp, "work", stopped_at_once)
    assert new_toy(toy / "run") == 0
    first = capsys.readouterr().out.splitlines()[:3]
    assert "device: CPU: the processor; fp32, 1 worker of 1 thread" in first
    assert any(f"torch also offers {kind}: not used, because" in line for line in first) == bool(kind)


def test_no_gpu(gpus: Callable[..., None]) -> None:
    gpus()
    with pytest.raises(exp.UsageError, match="no GPU: choose Settings > Accelerator"):
        exp.find_devices("auto", kaggle=True, allow_cpu=False)
    with pytest.raises(exp.UsageError, match="--device cuda, but torch sees no GPU"):
        exp.find_devices("cuda", kaggle=False, allow_cpu=True)
    for kaggle, allow_cpu in ((True, True), (False, False)):
        assert exp.find_devices("auto", kaggle, allow_cpu)[0].kind == "cpu"


# ---- Precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "precision"),
    [(P100, "fp32"), ((7, 0), "fp16"), (T4, "fp16"), (A100, "bf16"), (H100, "bf16"), (BLACKWELL, "bf16")],
)
def test_precision_follows_capability(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The T4 says that it supports bf16 (by emulation), so torch must not be asked."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert exp.choose_precision("auto", gpu(capability)) == precision
    assert all(exp.choose_precision(wanted, gpu(capability)) == wanted for wanted in exp.PRECISIONS)


@pytest.mark.parametrize(
    ("flags", "precision"), [("avx2 avx512f", "fp32"), ("avx512_bf16", "bf16"), ("amx_bf16 avx2", "bf16")]
)
def test_precision_on_a_cpu(flags: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_files(monkeypatch, {"/proc/cpuinfo": f"model name : x\nflags : fpu {flags}\n"})
    assert exp.choose_precision("auto", CPU) == precision
    assert exp.choose_precision("bf16", CPU) == "bf16"
    with pytest.raises(exp.UsageError, match="fp16 needs a GPU"):
        exp.choose_precision("fp16", CPU)


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    assert exp.main([*SMALL, "--precision", "fp16", "--output-dir", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_in_fp16_is_not_continued_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_lab(tmp_path).run
    index = exp.new_index(run.settings, "fp16", run.index.data, {})
    exp.save_plain(run.checkpoints / exp.STATE_NAME, exp.to_plain(index))
    assert exp.main(["--resume", "--device", "cpu", "--output-dir", str(tmp_path)]) == 2
    assert "this run computes in fp16, which needs a GPU" in capsys.readouterr().out


def test_what_auto_has_become_may_be_asked_for(tmp_path: Path) -> None:
    """A run that is fp16 by `auto` is fp16; asking for another precision is refused."""
    run = open_lab(tmp_path, precision="auto").run
    index = exp.new_index(run.settings, "fp16", run.index.data, {})
    for wanted in ("fp16", "auto"):
        assert exp.continued_settings(index, {"precision": wanted}).precision == "auto"
    with pytest.raises(exp.UsageError, match="--precision: the run has fp16, you gave bf16"):
        exp.continued_settings(index, {"precision": "bf16"})


def test_precision_is_chosen_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bf16 run, resumed on another processor that has no bf16: it stays bf16, and the change is said."""
    monkeypatch.chdir(tmp_path)
    cut_networks(monkeypatch)  # emulated bf16 is slow
    raw = lab_data()
    monkeypatch.setattr(exp, "load_data", lambda *_: raw)
    monkeypatch.setattr(exp, "measure_speeds", lambda *_: {})
    monkeypatch.setattr(exp, "latency_ms", lambda *_: {})
    monkeypatch.setattr(exp, "FIGURES", {})
    monkeypatch.setattr(exp, "emulates_bf16", lambda _: False)
    options = ["--methods", "Direct", "--teacher-epochs", "1", "--student-epochs", "1", "--output-dir", "run"]
    assert exp.main([*SMALL, *options]) == 0
    monkeypatch.setattr(exp, "emulates_bf16", lambda _: True)
    monkeypatch.setattr(exp, "processor_name", lambda: "another processor")
    capsys.readouterr()
    assert (
        exp.main(["--resume", "--runs", "2", "--threads", "1", "--device", "cpu", "--output-dir", "run"]) == 0
    )
    said = capsys.readouterr().out
    assert list(exp.pd.read_csv("run/results.csv").precision) == ["bf16", "bf16"]
    assert "only emulates bf16" in said
    assert "another processor" in said and "differs from the one before" in said
    assert "another processor" in Path("run/experiment_report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("first", [False, True])
def test_a_step_with_a_loss_scaler_is_the_step_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """The scaler of fp16 (here around fp32, so that it runs on a CPU): the same step, and none where a gradient is inf.

    Not in the very first step either, where torch's fused SGD would leave behind a momentum of whatever the memory held.
    """
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **named: empty(*args, **named).fill_(1e9))

    def training(scaled: bool) -> exp.Training:
        experiment = open_lab(tmp_path)
        made = exp.Training(
            experiment, student(experiment, "Direct", "5x"), "job", 12, exp.Direct(experiment, None, [1] * 4)
        )
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        made.model.train()
        return made

    plain, scaled = training(False), training(True)
    index, loss = torch.arange(20), scaled.method.loss

    def step_both() -> None:
        for each in (plain, scaled):
            each._step(index, 0)
        for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    if not first:
        step_both()
    before = [p.clone() for p in scaled.model.parameters()]
    scaled.method.loss = lambda logits, index: logits.sum() * float("inf")  # type: ignore[method-assign]
    scaled._step(index, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, scaled.model.parameters(), strict=True))
    assert scaled.scaler.get_scale() == 512.0
    scaled.method.loss = loss  # type: ignore[method-assign]
    # the step left out has moved batch normalisation's statistics
    plain.model.train()(plain.experiment.images.render(index, 0))
    step_both()


def test_deterministic_reaches_torch_and_ends_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every operation of training and evaluation has a deterministic form (torch raises where one has none)."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "what the end of the test removes")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cut_networks(monkeypatch)
    with shortcuts(chosen=0):
        lab = open_lab(tmp_path / "run", compression=("2.3x",), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert exp.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        records = do(lab)
    assert records.keys() == {job.name for job in lab.run.jobs}
    assert all(record.done for record in records.values())
    open_lab(tmp_path / "other")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark


# ---- Cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"/sys/fs/cgroup/cpu.max": "270000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"/sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        ({"/sys/fs/cgroup/cpu.max": "100000 0\n"}, 8),
    ],
)
def test_a_containers_quota_bounds_the_threads(
    files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smaller of affinity and quota."""
    pretend_files(monkeypatch, files)
    monkeypatch.setattr(exp.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert exp.usable_cores() == cores
    assert exp.thread_count(exp.Settings(), [CPU]) == cores


def test_cores_are_shared_among_the_workers_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_files(monkeypatch, {})
    monkeypatch.setattr(exp.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings = exp.Settings()
    assert exp.thread_count(settings, [CPU]) == 8
    assert exp.thread_count(settings, [gpu(T4)] * 2) == 4
    assert exp.thread_count(exp.replace(settings, workers=4), [CPU]) == 2
    assert exp.thread_count(exp.replace(settings, workers=4, threads=1), [CPU]) == 1
    sizes = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", **sizes}.items():
        monkeypatch.setenv(name, value)
    assert (exp.worker_count(settings, [CPU]), exp.thread_count(settings, [CPU])) == (8, 2)
