"""Images per second of every network, how near the device's matrix products that is, what an epoch costs besides, memory.

    python tests/benchmarks/throughput.py [--images 50000] [--steps 12] [--epoch-network 7x] [--profile]
    for p in fp32 fp16 bf16; do python tests/benchmarks/throughput.py --width 64 --steps 50 --precision $p; done  # on a GPU

Prints `name: value` lines. Random pixels in CIFAR-10's shapes; teachers' pages are taken as computed (their computation is the
inference that is measured). The epoch is a whole one of the network that makes everything else weigh most, the smallest. Operations
are counted on a CPU only (on a GPU the backward pass has a thread of its own); each is a kernel to launch on a GPU, or a few. --profile
adds which share of a distillation epoch torch's profiler finds in each of the main operations.
"""

from __future__ import annotations

import resource
import statistics
from typing import Any

import torch
from bench import cifar_like, clock, experiment, make_training, parser, say, say_device, seconds
from torch.utils._python_dispatch import TorchDispatchMode

import run_exp1b_kaggle as exp


def images_per_second(made: exp.Experiment, network: str, steps: int) -> tuple[float, float]:
    """Training and inference (with folded batch normalisation, as pages are computed): medians over steps and chunks."""
    training = make_training(made, network, "Direct", 1)
    training.model.train()
    size, count = made.settings.batch_size, len(made.images)
    order = torch.randperm(count, device=made.device.torch)
    batches = [order[i * size % (count - size) :][:size] for i in range(steps)]
    times = [seconds(made.device, lambda batch=batch: training._step(batch, 0)) for batch in batches]
    folded = made.place(training.model.folded())
    chunks = torch.arange(count, device=made.device.torch).split(exp.CHUNK)[: max(steps // 2, 3)]
    inference = [
        seconds(made.device, lambda c=c: made.infer(folded, made.images.render(c, 0))) / len(c)
        for c in chunks
    ]
    return size / statistics.median(times[1:]), 1 / statistics.median(inference[1:])


class Operations(TorchDispatchMode):
    """Counts the operations that compute something: those whose result is no view of an argument and is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in operation._schema.returns)
        self.count += not views and "empty" not in operation.name()
        return operation(*values, **(named or {}))


def operations_per_step(made: exp.Experiment, network: str) -> int:
    """Operations of a distillation step, the second one: the first prepares."""
    training = make_training(made, network, "TraditionalKD", 1)
    training.model.train()
    training.method.page = training.method.pages[0]
    training.method.start_epoch(0, [])
    index = torch.arange(4, device=made.device.torch)
    training._step(index, 0)
    with Operations() as counted:
        training._step(index, 0)
    return counted.count


def matrix_product_rate(made: exp.Experiment) -> float:
    """Multiply-accumulates per second of large square matrix products in the experiment's arithmetic: the fastest of five."""
    size = 4096 if made.device.kind == "cuda" else 1024
    with made.autocast():
        matrix = torch.ones(size, size, device=made.device.torch)
        times = [seconds(made.device, lambda: matrix @ matrix) for _ in range(6)]
    return float(size) ** 3 / min(times[1:])


class Stopwatch:
    """Adds up the time inside the network: forward, loss backward, optimizer step."""

    def __init__(self, training: exp.Training) -> None:
        self.inside, self.device = 0.0, training.experiment.device
        training.model.forward = self._timed(training.model.forward)  # type: ignore[method-assign]
        training.optimizer.step = self._timed(training.optimizer.step)  # type: ignore[method-assign]
        self._backward = torch.Tensor.backward

    def _timed(self, action: Any) -> Any:
        def timed(*values: Any, **named: Any) -> Any:
            started = clock(self.device)
            try:
                return action(*values, **named)
            finally:
                self.inside += clock(self.device) - started

        return timed

    def __enter__(self) -> Stopwatch:
        torch.Tensor.backward = self._timed(self._backward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        torch.Tensor.backward = self._backward  # type: ignore[method-assign]


def overhead(made: exp.Experiment, network: str, method: str) -> tuple[float, float]:
    """Seconds of an epoch (validation and checkpoint included), and the share of it outside the network."""
    training = make_training(made, network, method, 2)
    with Stopwatch(training) as watch:
        spent = seconds(made.device, lambda: (training._epoch(0), training.save()))
    return spent, 1 - watch.inside / spent


PARTS = {  # of an epoch -> how the operations and scopes of it are called (lower case); the outermost that fits counts
    "augmentation": ("augmentation",),
    "loss": (
        "loss of a batch",
        "lossbackward",
        "klbackward",
        "divbackward",
        "logsoftmaxbackward",
        "soft targets",
    ),
    "convolution_backward": ("convolutionbackward",),
    "convolution_forward": ("aten::conv2d",),
    "batch_norm": ("batch_norm", "batchnorm"),
    "activation": ("relu",),
    "optimizer": ("optimizer",),
}


def part_of(event: Any) -> str:
    """The part of an epoch that a profiled event belongs to."""
    found = "everything_else"
    while event is not None:
        name = event.name.lower()
        found = next((part for part, names in PARTS.items() if any(n in name for n in names)), found)
        event = event.cpu_parent
    return found


def profile(made: exp.Experiment, network: str, method: str) -> dict[str, float]:
    """Share of an epoch, validation included, of each part: of the GPU's time if there is one, else of the processor's."""
    training, images = make_training(made, network, method, 1), made.images
    scope = torch.profiler.record_function
    images.render = scope("augmentation")(images.render)  # type: ignore[method-assign]
    training.method.start_epoch = scope("soft targets")(training.method.start_epoch)  # type: ignore[method-assign]
    training.method.loss = scope("loss of a batch")(training.method.loss)  # type: ignore[method-assign]
    activities = [torch.profiler.ProfilerActivity.CPU]
    kind = "cpu"
    if made.device.kind == "cuda":
        kind, activities = "device", [*activities, torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            training._epoch(0)
    finally:
        del images.render
    spent = dict.fromkeys([*PARTS, "everything_else"], 0.0)
    for event in profiler.events():
        spent[part_of(event)] += getattr(event, f"self_{kind}_time_total")
    return {part: value / sum(spent.values()) for part, value in spent.items()}


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=50_000, help="training images, held-out ones included")
    options.add_argument("--steps", type=int, default=6, help="training steps to time per network")
    options.add_argument(
        "--profile", action="store_true", help="shares of the operations in a distillation epoch"
    )
    options.add_argument("--epoch-network", choices=list(exp.ARCHITECTURES), default="7x")
    chosen = options.parse_args()
    with experiment(chosen, cifar_like(chosen.images, 10_000)) as made:
        say_device(made)
        rate = matrix_product_rate(made)
        say("matrix_product_tera_macs_per_second", rate / 1e12)
        for network in exp.ARCHITECTURES:
            training, inference = images_per_second(made, network, chosen.steps)
            macs = exp.network_cost(network, len(made.images.classes), chosen.width)[1]
            say(f"{network}_training_images_per_second", training)
            say(f"{network}_training_share_of_the_matrix_product_rate", 3 * macs * training / rate)
            say(f"{network}_inference_images_per_second", inference)
        logits = torch.zeros(len(made.images), 10, dtype=torch.float16)
        exp.TeacherOutputs._compute = lambda *_: {"logits": logits}  # type: ignore[method-assign]
        if made.device.kind == "cpu":
            for network in exp.ARCHITECTURES:
                say(f"{network}_operations_per_step", str(operations_per_step(made, network)))
        for method in ("Direct", "TraditionalKD"):
            spent, share = overhead(made, chosen.epoch_network, method)
            say(f"{chosen.epoch_network}_{method}_epoch_seconds", spent)
            say(f"{chosen.epoch_network}_{method}_epoch_share_outside_the_network", share)
        if chosen.profile:
            for part, share in profile(made, chosen.epoch_network, "TraditionalKD").items():
                say(f"{chosen.epoch_network}_TraditionalKD_share_of_{part}", share)
        for mode in ("quick", "full"):
            say(f"{mode}_page_cache_bytes", str(exp.page_bytes(exp.new_settings({"mode": mode}))))
    say("peak_memory_gigabytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    if made.device.kind == "cuda":
        say("peak_gpu_memory_gigabytes", torch.cuda.max_memory_allocated() / 1e9)


if __name__ == "__main__":
    main()
