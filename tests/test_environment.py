"""Devices and precision, by simulated GPUs: what is chosen, what is refused, and what a resume does with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL

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
