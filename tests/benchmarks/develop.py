"""Development of HPM-KD's default: variants of its loss and of what teaches, judged on training images that no network has seen.

    python tests/benchmarks/develop.py --data-dir DIR --output-dir DIR [--compression 7x] [--runs 3] [--variants NAME ...]
        [--device cuda] [--workers 8]

The test set is not looked at for any choice. Of the 50,000 training images of CIFAR-10, 40,000 are used (seed 1000); the other
10,000 are the judge. All variants share weights, batches and views. Each result is one line of `develop.csv` in the output
folder; what is there is not done again, so that a killed development goes on with the same command. At the end the table of
paired differences from TraditionalKD is printed. A variant is a method and a configuration: add one to VARIANTS. Several
workers share the device: a network of a quarter of the width leaves a large GPU mostly idle.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: F401 (puts the script on the path)
import filelock
import numpy as np
import pandas as pd
import torch

import run_exp1b_kaggle as exp

SEED, SIZE = 1000, 40_000
Config = exp.Distillation


@exp.register("HPM-KD-of-the-teacher")
class OfTheTeacher(exp.HPMKD):
    """From the teacher alone, so that no assistant has to be trained."""

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher",)

    @classmethod
    def default(cls, compression: str) -> Config:
        return Config()

    @classmethod
    def described(cls, compression: str) -> tuple[exp.Network, ...]:
        return cls.teachers(compression)


@exp.register("HPM-KD-of-two")
class OfTwo(OfTheTeacher):
    """From the teacher and the largest assistant."""

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher", "1.5x")


@exp.register("HPM-KD-of-all")
class OfAll(OfTheTeacher):
    """From the teacher and all assistants that are larger than the student."""

    @classmethod
    def teachers(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher", *exp.larger_assistants(compression))


@exp.register("HPM-KD-stages-3-and-4")
class TwoStages(OfTheTeacher):
    """Relations in the last two stages."""

    stages = ("stage3", "stage4")

    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        flat = [feature.flatten(1) for feature in features.values()]
        return torch.cat([rows @ exp.projection(rows.shape[1], rows.device) for rows in flat], 1)

    def loss(self, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        own = [self.features[stage].flatten(1) for stage in self.stages]
        known = self.descriptions[index].float().split(exp.PROJECTED, 1)
        losses = [exp.relation_loss(*pair) for pair in zip(own, known, strict=True)]
        return exp.TraditionalKD.loss(self, logits, index) + self.config.weight * sum(losses)


@exp.register("HPM-KD-means-kept")
class MeansKept(OfTheTeacher):
    """The channels' means are kept as they are, and only the deviations from them projected."""

    @staticmethod
    def describe(features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        maps = features["stage4"].flatten(2)
        means = maps.mean(2, keepdim=True)
        deviations = (maps - means).flatten(1)
        kept = means.flatten(1) * maps.shape[2] ** 0.5
        return torch.cat([kept, deviations @ exp.projection(deviations.shape[1], maps.device)], 1)


@exp.register("HPM-KD-relations-of-the-teacher")
class RelationsOfTheTeacher(OfTwo):
    """Soft targets of all teachers, relations of the largest alone."""

    @classmethod
    def described(cls, compression: str) -> tuple[exp.Network, ...]:
        return ("teacher",)


Variant = Callable[[str], tuple[str, Config | None]]  # ratio -> registered method, configuration
BETA, GAMMA = 2.0, 3000.0  # the best so far, for the variants that vary something else


def hpmkd(method: str = "HPM-KD-of-the-teacher", **changes: Any) -> Variant:
    """HPM-KD at T 4, from all that its class names and on the student's view alone, with changes."""

    def variant(ratio: str) -> tuple[str, Config]:
        teachers = exp.METHODS[method].teachers(ratio)
        return method, replace(Config(teachers=teachers, attention=len(teachers) > 1), **changes)

    return variant


def default(**changes: Any) -> Variant:
    """HPM-KD's default configuration, with changes."""
    return lambda ratio: ("HPM-KD", replace(exp.HPMKD.default(ratio), **changes))


VARIANTS: dict[str, Variant] = {
    "Direct": lambda ratio: ("Direct", None),
    "TraditionalKD": lambda ratio: ("TraditionalKD", Config()),
    "alpha .9": lambda ratio: ("TraditionalKD", Config(0.9)),
    **{f"beta {beta}": hpmkd(beta=float(beta)) for beta in (1, 2, 4, 8)},
    **{f"beta, T {T}": hpmkd(beta=BETA, temperature=float(T)) for T in (2, 3, 6)},
    **{f"beta, gamma {gamma:,}": hpmkd(beta=BETA, weight=float(gamma)) for gamma in (1_000, 3_000, 10_000)},
    **{f"beta {beta}, gamma": hpmkd(beta=float(beta), weight=GAMMA) for beta in (1, 4)},
    **{f"labels, gamma {gamma:,}": hpmkd(alpha=0.0, weight=float(gamma)) for gamma in (1_000, 3_000, 10_000)},
    "alpha .5, gamma": hpmkd(weight=GAMMA),
    "beta, gamma, stages 3 and 4": hpmkd("HPM-KD-stages-3-and-4", beta=BETA, weight=GAMMA),
    "beta, gamma, means kept": hpmkd("HPM-KD-means-kept", beta=BETA, weight=GAMMA),
    "beta, views": hpmkd(beta=BETA, view_share=0.5),
    "beta, gamma, views": hpmkd(beta=BETA, weight=GAMMA, view_share=0.5),
    "beta, with 1.5x": hpmkd("HPM-KD-of-two", beta=BETA),
    "beta, gamma, with 1.5x": hpmkd("HPM-KD-of-two", beta=BETA, weight=GAMMA),
    "beta, gamma of the teacher, with 1.5x": hpmkd(
        "HPM-KD-relations-of-the-teacher", beta=BETA, weight=GAMMA
    ),
    "beta, of all": hpmkd("HPM-KD-of-all", beta=BETA),
    "beta, of all, uniform": hpmkd("HPM-KD-of-all", beta=BETA, attention=False),
    "beta, gamma, of all": hpmkd("HPM-KD-of-all", beta=BETA, weight=GAMMA),
    "beta, gamma, of all, views": hpmkd("HPM-KD-of-all", beta=BETA, weight=GAMMA, view_share=0.5),
    **{
        f"beta, T {schedule}": hpmkd(beta=BETA, schedule=schedule)
        for schedule in ("cosine", "loss", "convergence")
    },
    "beta, T cosine from 6": hpmkd(beta=BETA, schedule="cosine", temperature=6.0),
    "default": default(),
    "default, KL": default(beta=0.0),
    "default, constant T": default(schedule="constant"),
    "default, same view": default(view_share=1.0),
}


def open_development(options: argparse.Namespace) -> tuple[exp.Experiment, exp.Split]:
    """The experiment on the 40,000 images, and the images that judge it, on the device."""
    given = {
        "dataset": "CIFAR10", "width": options.width, "train_size": SIZE, "seed": SEED, "threads": options.threads,
        "teacher_epochs": options.teacher_epochs, "student_epochs": options.student_epochs, "runs": options.runs,
        "compression": tuple(options.compression), "precision": "auto", "device": options.device,
        "output_dir": options.output_dir, "workers": options.workers,
    }  # fmt: skip
    settings = exp.new_settings(given)
    full = exp.load_data("CIFAR10", [options.data_dir], None, None, SEED, lambda: None)
    numbered = replace(full, train_pixels=np.arange(len(full.train_labels)))
    kept = exp.keep_stratified(numbered, SIZE, SEED).train_pixels
    data = exp.keep_stratified(full, SIZE, SEED)
    unseen = np.setdiff1d(np.arange(len(full.train_labels)), kept)

    device = exp.find_devices(options.device, False, True)[0]
    precision = exp.choose_precision("auto", device)
    run = exp.Run(options.output_dir, exp.new_index(settings, precision, exp.describe_data(data, SEED), {}))
    for ratio, variant in itertools.product(options.compression, options.variants):
        method, _ = VARIANTS[variant](ratio)
        run.jobs.append(exp.Job("student", "CIFAR10", ratio, method, 1))  # so pages hold what it describes
    progress = exp.Progress(run, 1)
    experiment = exp.make_experiment(run, device, [device], data, exp.Session(), progress)
    experiment.outputs.store.places = [options.output_dir / "pages"]
    pixels, labels = (torch.from_numpy(values[unseen]) for values in (full.train_pixels, full.train_labels))
    return experiment, exp.Split(pixels.to(device.torch), labels.to(device.torch))


def prepare(experiment: exp.Experiment, job: exp.Job) -> None:
    """Train what teaches a student, and what teaches its assistants, unless that has been done."""
    named = job.teacher_networks
    above = {larger for name in named if name != "teacher" for larger in exp.larger_assistants(name)}
    for name in [name for name in ("teacher", *exp.ASSISTANTS) if name in (*named, *above)]:
        teacher = exp.teacher_job(name, "CIFAR10")
        with filelock.FileLock(experiment.run.path / f"{teacher.name}.lock"):
            experiment.run.refresh()
            if teacher.name not in experiment.run.records:
                exp.do_job(experiment, teacher)
    experiment.run.refresh()


def measure(
    experiment: exp.Experiment, judge: exp.Split, variant: str, ratio: str, run: int
) -> dict[str, object]:
    """Train one student; returns its line of the results."""
    method, config = VARIANTS[variant](ratio)
    job = exp.Job("student", "CIFAR10", ratio, method, run)
    prepare(experiment, job)
    epochs = experiment.settings.student_epochs
    pages = exp.page_order(SEED, run, epochs)
    steps = epochs * (len(experiment.images) // experiment.settings.batch_size)
    name = f"develop_{ratio}_{''.join(c if c.isalnum() else '_' for c in variant)}_run{run}"
    training = exp.Training(experiment, job, name, steps, exp.make_method(experiment, job, config, pages))
    network = training.run()
    accuracy = exp.percent_correct(experiment.predict(network, judge).argmax(1), judge.labels)
    training.path.unlink(missing_ok=True)
    last = training.history[-1]
    return {
        "ratio": ratio, "variant": variant, "run": run, "unseen": accuracy, "select": last.val_accuracy,
        "loss": last.loss, "seconds": round(training.seconds, 1), "epochs": epochs,
    }  # fmt: skip


OPENED: list[tuple[exp.Experiment, exp.Split]] = []  # in a worker: what it works with


def start_worker(options: argparse.Namespace) -> None:
    """Open the development in a worker."""
    exp.start_logging(None, console_level=logging.WARNING)
    OPENED.append(open_development(options))


def measure_in_worker(task: tuple[str, str, int]) -> dict[str, object]:
    """`measure` of (variant, ratio, run)."""
    return measure(*OPENED[0], *task)


def summary(table: pd.DataFrame) -> str:
    """Per ratio and variant: mean accuracy, and its paired difference from TraditionalKD with the p of a paired t-test."""
    lines = []
    for ratio, group in table.groupby("ratio"):
        wide = group.pivot(index="run", columns="variant", values="unseen")
        for variant in [name for name in VARIANTS if name in wide]:
            line = f"{ratio}  {variant:<38} {wide[variant].mean():6.2f}% ({wide[variant].count()})"
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
    parser.add_argument("--compression", nargs="+", default=["7x"], choices=tuple(exp.RATIOS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--teacher-epochs", type=int, default=10)
    parser.add_argument("--student-epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()

    exp.make_run_folder(options.output_dir)
    path = options.output_dir / "develop.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["variant"], row["ratio"], row["run"]) for row in rows}
    runs = range(1, options.runs + 1)
    tasks = [(v, r, run) for run in runs for r in options.compression for v in options.variants]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, start_worker, (options,)) as pool:
        for future in as_completed([pool.submit(measure_in_worker, t) for t in tasks if t not in done]):
            rows.append(future.result())
            exp.write_atomic(path, pd.DataFrame(rows).to_csv(index=False).encode())
            print(rows[-1], flush=True)
    print(summary(pd.DataFrame(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
