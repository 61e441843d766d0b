"""Peak memory of a whole experiment: what is resident, how much of it is anonymous and how much file-backed, by stage.

    python tests/benchmarks/memory.py [--images 50000] [--steps 4] [--data-dir DIR]

Prints `name: value` lines, in gigabytes. Every kind of job is done in full shapes, but for the length of epochs and pages, which are
cut to a few steps and chunks: the peak does not depend on them. Without --data-dir the images are SYNTHETIC, which needs no file.
File-backed memory is what has been read of the libraries' code; the kernel may drop it, and another build of torch has less of it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import no_output, parser, say

import run_exp1b_kaggle as exp

SECONDS = 0.005  # between two looks


def resident() -> dict[str, int]:
    """Bytes of this process that are resident, by kind."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "RssAnon:", "RssFile:")
    }


class Watch:
    """Looks at the memory again and again, and remembers the fullest moment of every stage."""

    def __init__(self) -> None:
        self.stage, self.fullest = "start", dict[str, tuple[int, int]]()
        threading.Thread(target=self._watch, daemon=True).start()

    def look(self) -> None:
        now = resident()
        anonymous, files = now["RssAnon"], now["RssFile"]
        if anonymous + files > sum(self.fullest.get(self.stage, (0, 0))):
            self.fullest[self.stage] = anonymous, files

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(SECONDS)

    def during(self, stage: Callable[..., str], action: Callable[..., Any]) -> Callable[..., Any]:
        """`action`, as a stage whose name is `stage` of its arguments."""

        def watched(*values: Any, **named: Any) -> Any:
            self.stage = stage(*values)
            try:
                return action(*values, **named)
            finally:
                self.look()
                self.stage = "between"

        return watched


def cut_short(steps: int) -> None:
    """Epochs have only this many steps; pages and predictions are made from the outputs for as many chunks."""
    predict = exp.Experiment.predict

    def chunks(self: exp.TeacherOutputs, job: exp.Job, page: int) -> dict[str, exp.torch.Tensor]:
        images, network = self.experiment.images, self._network(job)
        index = exp.torch.arange(len(images), device=images.device).split(exp.CHUNK)[:steps]
        with exp.torch.no_grad():
            outputs = [self.experiment.infer(network, images.render(part, page)) for part in index]
        whole = exp.storable(exp.torch.cat(outputs)).cpu()
        whole = whole.repeat(-(-len(images) // len(whole)), 1)[: len(images)]
        columns = whole.split(list(network.sizes.values()), 1)
        parts = {name: column.contiguous() for name, column in zip(network.sizes, columns, strict=True)}
        self.store.save(self.key(job), page, parts)
        return parts

    def epoch(self: exp.Training, number: int) -> float:
        batches = exp.torch.arange(len(self.experiment.images)).split(self.experiment.settings.batch_size)
        self.model.train()
        return sum(self._step(batch, self.method.pages[number]).item() for batch in batches[:steps]) / steps

    def predicted(self: exp.Experiment, network: exp.nn.Module, split: exp.Split) -> exp.torch.Tensor:
        count = len(split.labels)
        part = exp.Split(split.pixels[: steps * exp.CHUNK], split.labels[: steps * exp.CHUNK])
        logits = predict(self, network, part)
        return logits.repeat(-(-count // len(logits)), 1)[:count]

    exp.Experiment.predict = predicted  # type: ignore[method-assign]
    exp.TeacherOutputs._compute = chunks  # type: ignore[method-assign]
    exp.Training._train_epoch = epoch  # type: ignore[method-assign]


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=50_000, help="training images, held-out ones included")
    options.add_argument("--steps", type=int, default=3, help="steps of an epoch and chunks of a page")
    options.add_argument(
        "--data-dir", type=Path, help="folder with CIFAR-10, to be used instead of SYNTHETIC"
    )
    options.add_argument(
        "--compression", nargs="+", default=["7x"], help="7x has every kind of job and three teachers"
    )
    chosen = options.parse_args()
    watch = Watch()
    cut_short(chosen.steps)
    exp.load_data = watch.during(lambda *_: "data", exp.load_data)
    exp.make_experiment = watch.during(lambda *_: "images", exp.make_experiment)
    exp.measure_speeds = watch.during(lambda *_: "speeds", exp.measure_speeds)
    exp.do_job = watch.during(lambda _, job: job.name, exp.do_job)
    exp.conclude = watch.during(lambda *_: "report", exp.conclude)
    source = ["--dataset", "SYNTHETIC", "--train-size", str(chosen.images)]
    if chosen.data_dir:
        source = [
            "--dataset",
            "CIFAR10",
            "--data-dir",
            str(chosen.data_dir),
            "--train-size",
            str(chosen.images),
        ]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "--mode", "quick", *source, "--width", str(chosen.width), "--batch-size", str(chosen.batch_size),
            "--teacher-epochs", "2", "--student-epochs", "1", "--runs", "1", "--compression", *chosen.compression, "--fresh-teacher",
            "--device", chosen.device, "--threads", str(chosen.threads), "--workers", "1", "--output-dir", str(Path(folder) / "run"),
        ]  # fmt: skip
        with no_output():
            code = exp.main(command)
    assert code == 0, f"the experiment ended with {code}"
    for stage, parts in watch.fullest.items():
        say(f"peak_during_{stage}", sum(parts) / 1e9)
    anonymous, files = max(watch.fullest.values(), key=sum)
    say("peak", resident()["VmHWM"] / 1e9)
    say("peak_anonymous", anonymous / 1e9)
    say("peak_file_backed", files / 1e9)


if __name__ == "__main__":
    main()
