"""A made-up finished experiment in the format of INTERFACE.md, for the tests of statistics, figures and report."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARAMS = {"2.3x": 10_235_000, "5x": 4_716_000, "7x": 3_357_000}
LEVEL = {"2.3x": 88.6, "5x": 86.0, "7x": 84.4}
GAIN = {
    "Direct": 0.0,
    "TraditionalKD": 0.35,
    "HPM-KD": 0.6,
    "TunedKD": 0.45,
    "HPM-KD-no-chain": 0.5,
    "HPM-KD-no-attention": 0.58,
    "HPM-KD-no-temperature": 0.5,
    "HPM-KD-no-manager": 0.4,
    "Direct-equal-cost": 0.3,
}


def fake_labels(n: int = 2000) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, n)


def fake_logits(state: dict[str, Any], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Logits whose accuracy is near the record's, over-confident as networks are."""
    out = {}
    for k, (name, record) in enumerate(state["jobs"].items()):
        if record["kind"] in ("student", "teacher") and record["status"] == "done" and not record.get("same_as"):
            rng = np.random.default_rng(k)
            z = rng.normal(size=(len(labels), 10)) * 1.6
            z[np.arange(len(labels)), labels] += 3.2 + (record["test_accuracy"] - 85) / 12
            out[name] = (z * (1.7 if record["method"] == "Direct" else 1.3)).astype(np.float16)
    return out


def fake_state(
    runs: int = 3,
    ratios=("2.3x", "5x", "7x"),
    methods=("Direct", "TraditionalKD", "HPM-KD"),
    ablation: bool = False,
    equal_cost: bool = False,
    dataset: str = "CIFAR10",
    width: int = 64,
    epochs: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arms = [
        *methods,
        *(["TunedKD", "HPM-KD-no-chain", "HPM-KD-no-attention", "HPM-KD-no-temperature", "HPM-KD-no-manager"] if ablation else []),
        *(["Direct-equal-cost"] if equal_cost else []),
    ]
    teacher_name = f"teacher_resnet50_{dataset}"
    jobs: dict[str, Any] = {}

    def add(name: str, kind: str, method: str, compression: str, run: int, accuracy: float, seconds: float, **more: Any) -> None:
        history = [
            {
                "epoch": e,
                "loss": 2 - e / epochs,
                "val_accuracy": accuracy * (1 - 0.6 * np.exp(-5 * (e + 1) / epochs)) + float(rng.normal(0, 0.3)),
                "lr": 0.1,
                "temperature": 2 + 2 * (1 + np.cos(np.pi * e / (epochs - 1))) / 2,
                "seconds": seconds / epochs,
            }
            for e in range(epochs)
        ]
        jobs[name] = {
            "job": name,
            "kind": kind,
            "compression": compression,
            "method": method,
            "run": run,
            "seed": 42 + run,
            "status": "done",
            "reason": "",
            "params": PARAMS.get(compression, 23_520_842),
            "macs": 1_300_000_000 if kind == "teacher" else 170_000_000,
            "epochs": epochs,
            "file": name + ".pt",
            "file_bytes": 4 * PARAMS.get(compression, 23_520_842),
            "weights_sha256": hashlib.sha256(name.encode()).hexdigest(),
            "taught_by": {} if method in ("", "Direct") else {"teacher_resnet50_CIFAR10": "cd" * 32},
            "val_accuracy": accuracy + 0.2,
            "test_accuracy": round(accuracy, 2),
            "test_nll": 0.5,
            "test_ece": 0.03,
            "test_class_accuracy": [accuracy + d for d in range(-5, 5)],
            "teacher_agreement": 91.0,
            "latency_ms": {"1": 2.1, "256": 0.2},
            "train_seconds": seconds,
            "pages": {},
            "prepare_seconds": 1.0,
            "images_per_second": 5500.0,
            "device": "Tesla T4",
            "precision": "fp16",
            "notes": [],
            "history": history,
            "config": {},
            "attention": {},
            "same_as": "",
            **more,
        }

    add(teacher_name, "teacher", "", "", 0, 92.4, 4000.0)
    config = {"alpha": 0.5, "temperature": 4.0, "schedule": "constant", "teachers": ["teacher"], "attention": False}
    pages = {teacher_name: {str(p): 10.0 for p in range(epochs)}}
    if "HPM-KD" in arms:
        for r in ("2.3x", "5x"):
            if any(float(x[:-1]) > float(r[:-1]) for x in ratios):
                add(f"intermediate_{r}_{dataset}", "intermediate", "HPM-KD", r, 0, LEVEL[r], 800.0, pages=pages, config=config)
        for r in ratios:
            better = {
                **config,
                "temperature": 6.0,
                "schedule": "cosine",
                "teachers": ["teacher", "2.3x"] if r != "2.3x" else ["teacher"],
                "attention": r != "2.3x",
            }
            candidates = [
                {"config": config, "rungs": [[2, 60.1], [4, 70.2]], "difference": 0.0, "standard_error": 0.0, "kept": True},
                {"config": better, "rungs": [[2, 61.0], [4, 71.5]], "difference": 1.3, "standard_error": 0.6, "kept": True},
                {"config": config, "rungs": [[2, 55.0]], "difference": -5.1, "standard_error": 0.7, "kept": False},
            ]
            add(
                f"pilot_{r}",
                "pilot",
                "",
                r,
                0,
                70.0,
                500.0,
                pages=pages,
                candidates=candidates,
                chosen=1,
                reason_chosen="beat candidate 1 by 2.2 standard errors",
                pilot_for="HPM-KD",
                reused_from="",
                seconds_saved=0.0,
                config=better,
            )
    shared = {(r, i): rng.normal(0, 0.25) for r in ratios for i in range(runs)}  # the run's own luck, common to the arms
    for r in ratios:
        for method in arms:
            for i in range(runs):
                more: dict[str, Any] = {}
                if method not in ("Direct", "Direct-equal-cost"):
                    start = i * epochs // 2
                    more = {"config": config, "pages": {teacher_name: {str(p): 10.0 for p in range(start, start + epochs)}}}
                if method == "HPM-KD" and r != "2.3x":
                    block = {
                        "mean_weight": [0.6, 0.4],
                        "weight_sd": [0.1, 0.1],
                        "nll_mixture": 0.31,
                        "nll_uniform": 0.30,
                        "nll_best_single": 0.33,
                        "best_single": "teacher",
                    }
                    more["attention"] = {
                        "teachers": ["teacher", "2.3x"],
                        "select": block,
                        "train": {**block, "nll_mixture": 0.1, "nll_uniform": 0.2},
                    }
                accuracy = LEVEL[r] + GAIN[method] * float(r[:-1]) / 5 + shared[r, i] + rng.normal(0, 0.12)
                if r == "2.3x" and method in ("HPM-KD-no-chain", "HPM-KD-no-attention"):
                    twin = jobs[f"student_{r}_HPM-KD_run{i + 1}"]
                    accuracy = twin["test_accuracy"]
                    more |= {"same_as": "HPM-KD", "weights_sha256": twin["weights_sha256"]}
                add(
                    f"student_{r}_{method}_run{i + 1}",
                    "student",
                    method,
                    r,
                    i + 1,
                    accuracy,
                    200.0 if method == "Direct" else 240.0,
                    **more,
                )
    session = {
        "started": "2026-11-24T03:41:57+00:00",
        "ended": "2026-11-24T05:10:00+00:00",
        "command": f"python run_exp1b_kaggle.py --mode quick --dataset {dataset}",
        "host_gpu": "2 x Tesla T4",
        "python": "3.12.1",
        "torch": "2.10.0",
        "torchvision": "0.25.0",
        "numpy": "2.0.2",
        "threads": 2,
        "workers": 2,
        "devices": ["cuda:0", "cuda:1"],
        "stopped": "",
        "extended": "",
    }
    return {
        "format": 1,
        "script": {"version": "1.0.0", "sha256": "12" * 32},
        "created": "2026-11-24T03:41:57+00:00",
        "settings": {
            "mode": "quick",
            "dataset": dataset,
            "compression": list(ratios),
            "methods": list(methods),
            "runs": runs,
            "teacher_epochs": 50,
            "student_epochs": epochs,
            "batch_size": 128,
            "lr": 0.1,
            "width": width,
            "train_size": None,
            "seed": 42,
            "precision": "auto",
            "ablation": ablation,
            "equal_cost": equal_cost,
        },
        "fingerprint": "ef" * 32,
        "precision": "fp16",
        "data": {
            "name": dataset,
            "classes": CLASSES,
            "train": 45000,
            "fit": 2500,
            "select": 2500,
            "test": 10000,
            "source": "a test",
            "sha256": "34" * 32,
        },
        "sessions": [session],
        "notes": [],
        "jobs": jobs,
    }
