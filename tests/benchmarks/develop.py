"""Development of HPM-KD's default: variants of the soft targets, judged on training images that no network has seen.

    python tests/benchmarks/develop.py --data-dir DIR --output-dir DIR [--compression 7x] [--runs 3] [--variants NAME ...]

The test set is not looked at for any choice. Of the 50,000 training images of CIFAR-10, 40,000 are used (seed 1000); the other
10,000 are the judge. All variants share weights, batches and views. Each result is one line of `develop.csv` in the output
folder; what is there is not done again, so that a killed development goes on with the same command. At the end the table of
paired differences from TraditionalKD is printed. A variant is a method and a configuration: add one to VARIANTS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: F401 (puts the script on the path)
import numpy as np
import pandas as pd
import torch

import run_exp1b_kaggle as exp

SEED, SIZE = 1000, 40_000
Config = exp.Distillation


class LogitMean(exp.HPMKD):
    """The teachers' logits are averaged instead of their probabilities."""

    def soft_targets_of(self, page: int) -> torch.Tensor:
        logits = self.experiment.outputs.page(self.config.teachers, page).float().mean(0, keepdim=True)
        return exp.mixture(logits, exp.uniform_weights(logits), self.temperature)


class Anchored(exp.HPMKD):
    """The student's view is the teacher's alone; the mixture of all teachers is what is averaged over the views."""

    def soft_targets_of(self, page: int) -> torch.Tensor:
        mixed = super().soft_targets_of(page)
        logits, weights = self._stack(page)
        anchor = exp.mixture(logits[:1], weights[:, :1], self.temperature)
        return mixed + self.config.view_share * (anchor - exp.mixture(logits, weights, self.temperature))


class HandOver(exp.HPMKD):
    """The smallest assistant teaches first, the teacher last: the weights move along the chain with the epochs."""

    def start_epoch(self, epoch: int, losses: exp.Sequence[float]) -> None:
        self._share = epoch / max(1, len(self.pages) - 1)
        super().start_epoch(epoch, losses)

    def _stack(self, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits, weights = super()._stack(page)
        place = torch.linspace(1, 0, len(logits), device=logits.device)  # teacher 1, smallest assistant 0
        nearness = torch.softmax(-8 * (place - getattr(self, "_share", 0.0)) ** 2, 0)
        return logits, nearness.expand(weights.shape)


class SofterWhereTheyDisagree(exp.HPMKD):
    """Images on which the teachers disagree get a flatter mixture."""

    def soft_targets_of(self, page: int) -> torch.Tensor:
        soft = super().soft_targets_of(page)
        p = torch.softmax(self.experiment.outputs.page(self.config.teachers, page).float(), 2)
        disagreement = 1 - (p[:1] * p[1:]).sum(2).mean(0).clamp(0, 1)
        flat = torch.full_like(soft, 1 / soft.shape[1])
        share = 0.2 * disagreement[:, None]
        return (1 - share) * soft + share * flat


def only(*teachers: str) -> dict[str, object]:
    """A configuration's teachers; attention where there are several."""
    return {"teachers": teachers, "attention": len(teachers) > 1}


Variant = Callable[[str], tuple[type[exp.Direct], Config | None]]
VARIANTS: dict[str, Variant] = {
    "Direct": lambda ratio: (exp.Direct, None),
    "TraditionalKD": lambda ratio: (exp.TraditionalKD, Config()),
    "views": lambda ratio: (exp.HPMKD, Config(view_share=0.5)),
    "views, convergence": lambda ratio: (exp.HPMKD, Config(schedule="convergence", view_share=0.5)),
    "views only": lambda ratio: (exp.HPMKD, Config(view_share=0.0)),
    "views, T loss 6": lambda ratio: (exp.HPMKD, Config(temperature=6.0, schedule="loss", view_share=0.5)),
    "default": lambda ratio: (exp.HPMKD, exp.HPMKD.default(ratio)),
    "default, constant T": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), schedule="constant")),
    "default, cosine": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), schedule="cosine")),
    "default, cosine from 6": lambda ratio: (
        exp.HPMKD,
        replace(exp.HPMKD.default(ratio), schedule="cosine", temperature=6.0),
    ),
    "default, convergence": lambda ratio: (
        exp.HPMKD,
        replace(exp.HPMKD.default(ratio), schedule="convergence"),
    ),
    "default, convergence from 6": lambda ratio: (
        exp.HPMKD,
        replace(exp.HPMKD.default(ratio), schedule="convergence", temperature=6.0),
    ),
    "default, convergence, 1.5x only": lambda ratio: (
        exp.HPMKD,
        replace(exp.HPMKD.default(ratio), schedule="convergence", **only("teacher", "1.5x")),
    ),
    "anchored": lambda ratio: (
        Anchored,
        replace(exp.HPMKD.default(ratio), schedule="convergence", **only("teacher", "1.5x")),
    ),
    "anchored, from 6": lambda ratio: (
        Anchored,
        replace(exp.HPMKD.default(ratio), schedule="convergence", temperature=6.0, **only("teacher", "1.5x")),
    ),
    "anchored, constant T": lambda ratio: (
        Anchored,
        replace(exp.HPMKD.default(ratio), schedule="constant", **only("teacher", "1.5x")),
    ),
    "anchored, chain": lambda ratio: (
        Anchored,
        replace(exp.HPMKD.default(ratio), schedule="convergence", **only(*exp.HPMKD.teachers(ratio))),
    ),
    "default, alpha .7": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), alpha=0.7)),
    "default, alpha .9": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), alpha=0.9)),
    "default, uniform": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), attention=False)),
    "default, 1.5x only": lambda ratio: (
        exp.HPMKD,
        replace(exp.HPMKD.default(ratio), **only("teacher", "1.5x")),
    ),
    "default, same view": lambda ratio: (exp.HPMKD, replace(exp.HPMKD.default(ratio), view_share=1.0)),
    "logit mean": lambda ratio: (LogitMean, replace(exp.HPMKD.default(ratio), view_share=1.0)),
    "hand over": lambda ratio: (HandOver, replace(exp.HPMKD.default(ratio), attention=False)),
    "softer on disagreement": lambda ratio: (SofterWhereTheyDisagree, exp.HPMKD.default(ratio)),
}


def open_development(options: argparse.Namespace) -> tuple[exp.Experiment, exp.Split]:
    """The experiment on the 40,000 images, and the images that judge it, on the device."""
    given = {
        "dataset": "CIFAR10", "width": options.width, "train_size": SIZE, "seed": SEED, "threads": options.threads,
        "teacher_epochs": options.teacher_epochs, "student_epochs": options.student_epochs, "runs": options.runs,
        "compression": (options.compression,), "precision": "fp32", "device": "cpu", "output_dir": options.output_dir,
    }  # fmt: skip
    settings = exp.new_settings(given)
    full = exp.load_data("CIFAR10", [options.data_dir], None, None, SEED, lambda: None)
    numbered = replace(full, train_pixels=np.arange(len(full.train_labels)))
    kept = exp.keep_stratified(numbered, SIZE, SEED).train_pixels
    data = exp.keep_stratified(full, SIZE, SEED)
    unseen = np.setdiff1d(np.arange(len(full.train_labels)), kept)

    exp.make_run_folder(options.output_dir)
    exp.start_logging(options.output_dir / "experiment.log")
    index = exp.new_index(settings, "fp32", exp.describe_data(data, SEED), {})
    run = exp.Run(options.output_dir, index)
    device = exp.Device("cpu", 0, f"CPU: {exp.processor_name()}")
    progress = exp.make_progress(run, [device], False)
    experiment = exp.make_experiment(run, device, [device], data, exp.Session(), progress)
    experiment.outputs.places = [options.output_dir / "pages"]
    judge = exp.Split(
        torch.from_numpy(full.train_pixels[unseen]), torch.from_numpy(full.train_labels[unseen])
    )
    return experiment, judge


def prepare(experiment: exp.Experiment, job: exp.Job) -> None:
    """Train what teaches a student, unless it has been trained."""
    for teacher in exp.teachers_of(job):
        experiment.run.refresh()
        if teacher.name not in experiment.run.records:
            exp.do_job(experiment, teacher)
    experiment.run.refresh()


def measure(
    experiment: exp.Experiment, judge: exp.Split, variant: str, ratio: str, run: int
) -> dict[str, object]:
    """Train one student; returns its line of the results."""
    method, config = VARIANTS[variant](ratio)
    known = next(
        name for name in (exp.SUBJECT, exp.RIVAL, exp.BASELINE) if issubclass(method, exp.METHODS[name])
    )
    job = exp.Job("student", "CIFAR10", ratio, known, run)
    prepare(experiment, job)
    epochs = experiment.settings.student_epochs
    pages = exp.page_order(SEED, run, epochs)
    steps = epochs * (len(experiment.images) // experiment.settings.batch_size)
    name = f"develop_{ratio}_{''.join(c if c.isalnum() else '_' for c in variant)}_run{run}"
    training = exp.Training(experiment, job, name, steps, method(experiment, config, pages))
    network = training.run()
    accuracy = exp.percent_correct(experiment.predict(network, judge).argmax(1), judge.labels)
    training.forget()
    last = training.history[-1]
    return {
        "ratio": ratio, "variant": variant, "run": run, "unseen": accuracy, "select": last.val_accuracy,
        "loss": last.loss, "seconds": round(training.seconds), "epochs": epochs,
    }  # fmt: skip


def summary(table: pd.DataFrame) -> str:
    """Per ratio and variant: mean accuracy, and its paired difference from TraditionalKD with the p of a paired t-test."""
    lines = []
    for ratio, group in table.groupby("ratio"):
        wide = group.pivot(index="run", columns="variant", values="unseen")
        for variant in [name for name in VARIANTS if name in wide]:
            line = f"{ratio}  {variant:<26} {wide[variant].mean():6.2f}% ({wide[variant].count()})"
            if exp.RIVAL in wide and variant != exp.RIVAL:
                difference = exp.one_sample(*paired(wide[variant] - wide[exp.RIVAL]))
                line += f"  minus {exp.RIVAL} {difference.mean:+.2f} pp, p {difference.t_p:.3f}"
            lines.append(line)
    return "\n".join(lines)


def paired(differences: pd.Series) -> tuple[list[float], list[int]]:
    """The differences that are known, and their runs."""
    known = differences.dropna()
    return list(known), list(known.index)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--compression", default="7x", choices=tuple(exp.RATIOS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--student-epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    experiment, judge = open_development(options)
    path = options.output_dir / "develop.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    for run in range(1, options.runs + 1):
        for variant in options.variants:
            if any(
                (row["ratio"], row["variant"], row["run"]) == (options.compression, variant, run)
                for row in rows
            ):
                continue
            rows.append(measure(experiment, judge, variant, options.compression, run))
            exp.write_atomic(path, pd.DataFrame(rows).to_csv(index=False).encode())
            print(rows[-1], flush=True)
    print(summary(pd.DataFrame(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
