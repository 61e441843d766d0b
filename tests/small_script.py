"""The script for tests of its processes: networks that train in seconds, three candidates of HPM-KD's eight, one figure, and a
checkpoint of every epoch.

    python tests/small_script.py <options>

While there is a file named in the variable HOLD, no student is trained for more epochs than the number in it. So a test can
wait until processes are in the middle of their jobs, and then do something to them.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import run_exp1b_kaggle as exp

ONE_BLOCK_PER_STAGE = {
    name: exp.Architecture(
        exp.Bottleneck if name == "teacher" else exp.BasicBlock, (1, 1, 1, 1), (64, 64, 64, last)
    )
    for name, last in (("teacher", 64), ("1.5x", 64), ("2.3x", 64), ("5x", 56), ("7x", 48))
}
FORWARD, STEP = exp.CifarResNet.forward, exp.Training._step
CANDIDATES = exp.HPMKD.candidates.__func__  # type: ignore[attr-defined]


def forward(network: exp.CifarResNet, images: torch.Tensor) -> torch.Tensor:
    """A network's forward pass that sees a quarter of the pixels."""
    return FORWARD(network, images[:, :, ::2, ::2])


def three_candidates(cls: type[exp.HPMKD], ratio: str) -> list[exp.Distillation]:
    """Three of HPM-KD's eight candidates: still two rungs."""
    return CANDIDATES(cls, ratio)[::3]


def step_when_allowed(training: exp.Training, *arguments: Any) -> torch.Tensor:
    """A training step, as soon as the test allows its epoch; or as soon as a signal has come, which is the script's to handle."""
    while training.job.kind == "student" and len(training.history) >= epochs_allowed():
        if training.experiment.session.signal:
            break
        time.sleep(0.02)
    return STEP(training, *arguments)


def epochs_allowed() -> float:
    """How many epochs a student may be trained now."""
    try:
        return int(Path(os.environ["HOLD"]).read_text() or 0)  # empty: it is being written
    except FileNotFoundError:
        return float("inf")


def shrink() -> None:
    """Make this process's experiments small, for good."""
    exp.ARCHITECTURES.update(ONE_BLOCK_PER_STAGE)
    exp.CifarResNet.forward = forward  # type: ignore[method-assign]
    exp.network_cost.cache_clear()
    exp.HPMKD.candidates = classmethod(three_candidates)  # type: ignore[assignment, arg-type]
    exp.Training.SAVE_SECONDS = 0.0
    if "HOLD" in os.environ:
        exp.Training._step = step_when_allowed  # type: ignore[method-assign]
    for name in list(exp.FIGURES)[1:]:
        del exp.FIGURES[name]


def main(options: list[str]) -> int:
    """exp.main in a process of its own, which it changes."""
    shrink()
    return exp.main(options)


if __name__ == "__mp_main__":  # in its workers
    shrink()
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
