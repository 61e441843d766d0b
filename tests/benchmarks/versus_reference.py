"""Epochs of this project against those of a plain reference: torchvision's transforms, a DataLoader, the teacher in every step.

    python tests/benchmarks/versus_reference.py [--images 2000] [--rounds 3] [--networks 2.3x 5x 7x] [--loader-workers 0]

Prints `name: value` lines; ratios above 1 mean that this project is faster. The reference is what public distillation code does:
PIL images, RandomCrop and RandomHorizontalFlip, `.item()` for the running loss and accuracy, a validation per epoch. Networks,
data, batch size and threads are the same; everything alternates in one process, and medians are compared. On a CPU, processor
time is compared, so that other programs on the machine do not matter (workers of the DataLoader would not be counted: 0 of them).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench import cifar_like, clock, experiment, make_training, parser, say, say_device, seconds
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import run_exp1b_kaggle as exp


class ImageDataset(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision's CIFAR10: an array of images, each made a PIL image and transformed when asked for."""

    def __init__(
        self, pixels: torch.Tensor, labels: torch.Tensor, transform: Callable[[Image.Image], torch.Tensor]
    ) -> None:
        self.pixels, self.labels, self.transform = pixels.numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Reference:
    """Plain training on the images of an experiment."""

    def __init__(self, made: exp.Experiment, raw: exp.RawData, loader_workers: int) -> None:
        self.made, self.device = made, made.device.torch
        finish = [transforms.ToTensor(), transforms.Normalize(made.images.mean, made.images.std)]
        augment = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *finish]
        )
        train = exp.held_out_indices(raw.train_labels, made.settings.seed)[0]
        pixels, labels = (torch.from_numpy(values[train]) for values in (raw.train_pixels, raw.train_labels))
        select = made.images.select
        size = made.settings.batch_size
        shared = {"num_workers": loader_workers, "pin_memory": made.device.kind == "cuda"}
        self.train = DataLoader(
            ImageDataset(pixels, labels, augment), size, shuffle=True, drop_last=True, **shared
        )
        held_out = ImageDataset(select.pixels.cpu(), select.labels.cpu(), transforms.Compose(finish))
        self.select = DataLoader(held_out, size, **shared)
        self.teacher = exp.build_network("teacher", 10, made.settings.width).to(self.device).eval()

    def epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer, distil: bool) -> float:
        """One epoch and its validation; returns the accuracy."""
        model.train()
        running, right, seen = 0.0, 0, 0
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.made.precision == "fp16")
        for images, labels in self.train:
            images, labels = (
                images.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            with self.made.autocast():
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
                if distil:
                    with torch.no_grad():
                        soft = F.softmax(self.teacher(images) / 4, dim=1)
                    loss = (
                        0.5 * 16 * F.kl_div(F.log_softmax(logits / 4, dim=1), soft, reduction="batchmean")
                        + 0.5 * loss
                    )
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            running += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
        model.eval()
        right = 0
        with torch.no_grad(), self.made.autocast():
            for images, labels in self.select:
                right += (model(images.to(self.device)).argmax(1).cpu() == labels).sum().item()
        return right / len(self.select.dataset)  # type: ignore[arg-type]


def compare(made: exp.Experiment, reference: Reference, network: str, rounds: int) -> dict[str, float]:
    """Median seconds per epoch of the four kinds, alternating; the pages are at hand."""
    ours = {
        method: make_training(made, network, method, rounds + 1) for method in ("Direct", "TraditionalKD")
    }
    for page in ours["TraditionalKD"].method.pages:
        made.outputs.page(("teacher",), page)
    plain = exp.build_network(network, 10, made.settings.width).to(made.device.torch)
    optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    kinds: dict[str, Callable[[int], object]] = {
        "Direct": ours["Direct"]._epoch,
        "reference_Direct": lambda _: reference.epoch(plain, optimizer, False),
        "distillation": ours["TraditionalKD"]._epoch,
        "reference_distillation": lambda _: reference.epoch(plain, optimizer, True),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for epoch in range(rounds + 1):  # the first is the warm-up
        for kind, action in kinds.items():
            times[kind].append(seconds(made.device, lambda action=action, epoch=epoch: action(epoch)))
    return {kind: statistics.median(values[1:]) for kind, values in times.items()}


def fill_seconds(made: exp.Experiment) -> float:
    """Seconds that computing a teacher's page takes."""
    started = clock(made.device)
    made.outputs.page(("teacher",), 161)
    return clock(made.device) - started


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=2_000, help="training images, held-out ones included")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--networks", nargs="+", choices=list(exp.RATIOS), default=list(exp.RATIOS))
    options.add_argument("--loader-workers", type=int, default=None, help="default: 0 on a CPU, 2 on a GPU")
    chosen = options.parse_args()
    raw = cifar_like(chosen.images)
    with experiment(chosen, raw, student_epochs=chosen.rounds + 1) as made:
        workers = (
            chosen.loader_workers if chosen.loader_workers is not None else 2 * (made.device.kind == "cuda")
        )
        reference = Reference(made, raw, workers)
        say_device(made)
        totals: dict[str, float] = {}
        for network in chosen.networks:
            found = compare(made, reference, network, chosen.rounds)
            for kind, value in found.items():
                say(f"{network}_{kind}_epoch_seconds", value)
                totals[kind] = totals.get(kind, 0.0) + value
            say(f"{network}_distillation_over_Direct", found["distillation"] / found["Direct"])
            say(f"{network}_speedup_Direct", found["reference_Direct"] / found["Direct"])
            say(
                f"{network}_speedup_distillation_warm",
                found["reference_distillation"] / found["distillation"],
            )
        fill = fill_seconds(made)
    settings = exp.new_settings({"mode": "quick"})
    pages = exp.pages_used(exp.planned_jobs(settings), settings)
    # Of two methods that distil from this teacher, at each ratio.
    epochs = 2 * settings.runs * settings.student_epochs
    say("page_seconds", fill)
    say("distillation_over_Direct", totals["distillation"] / totals["Direct"])
    say("speedup_Direct", totals["reference_Direct"] / totals["Direct"])
    say("speedup_distillation_warm", totals["reference_distillation"] / totals["distillation"])
    distinct = sum(name == "teacher" for name, _ in pages)
    schedule = epochs * totals["distillation"] + distinct * fill
    say("speedup_distillation_quick_schedule", epochs * totals["reference_distillation"] / schedule)


if __name__ == "__main__":
    main()
