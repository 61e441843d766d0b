"""A fixed small run against stored figures: what no refactoring and no optimisation may change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lab import open_lab, shortcuts, teacher

import run_exp1b_kaggle as exp

# Found with torch 2.14.1 on two cores of an AMD EPYC (AVX-512), one thread, fp32, in November 2026. Another processor rounds
# differently: initial weights that differ by 1e-7 or 1e-6 of themselves changed these figures by at most 1.3e-3, most by 4e-4;
# another order of the views or the pages changes one of each network's by 1e-2, the loss without T^2 by 1e-1.
TOLERANCE = 5e-3
LOSSES = {
    "teacher": [2.0705372, 1.3516143, 1.0181055],
    "Direct": [2.2261165, 1.9177486, 1.6961729],
    "TraditionalKD": [1.2890682, 1.1215676, 1.0047911],
}


def losses(folder: Path) -> dict[str, list[float]]:
    """Mean loss per epoch of a teacher, and of a student by each of the plain methods."""
    lab = open_lab(folder, width=16, train_size=400, teacher_epochs=3)
    found: dict[str, list[float]] = {}
    with shortcuts():
        exp.JobRunner(lab, teacher(lab)).run()
        exp.Collector(lab.folder, lab.settings, lab.state, None, writes=False).refresh()
    found["teacher"] = [entry["loss"] for entry in lab.record(teacher(lab).name)["history"]]
    for method in ("Direct", "TraditionalKD"):
        steps = len(lab.images) // lab.settings.batch_size
        schedule = exp.Schedule("7x", 3 * steps, steps, lab.settings.lr, lab.settings.seed + 1, 1)
        trainer = exp.make_trainer(lab, method, None)
        training = exp.Fitting(lab, method, "pinned", schedule, trainer)
        training.run()
        found[method] = [entry["loss"] for entry in training.history]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return losses(tmp_path_factory.mktemp("pinned") / "run")


@pytest.mark.parametrize("name", LOSSES)
def test_a_fixed_run_gives_the_stored_losses(found: dict[str, list[float]], name: str) -> None:
    """They depend on weights, split, views, pages, batches, learning rates, loss and optimizer: all that makes a result."""
    np.testing.assert_allclose(found[name], LOSSES[name], rtol=TOLERANCE)
