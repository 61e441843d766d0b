"""What an epoch of a method costs, as a multiple of TraditionalKD's, with the teachers' outputs at hand.

    python tests/benchmarks/methods.py [--images 4000] [--rounds 10] [--network 7x] [--methods AT SP RKD Hint]

Prints `name: value` lines: for Direct, HPM-KD's default (its whole chain), and methods of the gallery (tests/published_methods.py). Epochs alternate in one process, and each method's fastest epoch counts: what else
the machine does only adds. On a CPU it is processor time.
"""

from __future__ import annotations

import torch
from bench import cifar_like, experiment, parser, say, say_device, seconds
from conftest import ROOT

import run_exp1b_kaggle as exp

MAIN = ["Direct", "TraditionalKD", "HPM-KD"]


def trainings(made: exp.Experiment, network: str, names: list[str], epochs: int) -> dict[str, exp.Training]:
    """A training by each method, the pages of all that teach computed."""
    jobs = {name: exp.Job("student", "SYNTHETIC", network, name, 1) for name in names}
    few = made.images.render(torch.arange(4, device=made.images.device), 0)
    for name, known in list(made.outputs._networks.items()):
        seeing = exp.described_by(jobs.values(), name, made.settings.width)
        described = made.outputs._networks[name] = exp.DescribedNetwork(known.network, seeing.values())
        with torch.no_grad(), made.autocast():
            for key, method in seeing.items():
                described.add(key, method, few)

    pages = exp.page_order(made.settings.seed, 1, epochs)
    steps = epochs * (len(made.images) // made.settings.batch_size)
    found = {}
    exp.fit_attention = lambda _, teachers: (untrained_attention(made, len(teachers)), {})
    for name, job in jobs.items():
        made.outputs.prepare(job.teacher_networks, pages)
        method = job.method_class(made, job.method_class.configure(network, None), pages)
        found[name] = exp.Training(made, job, f"training {len(found)}", steps, method)
    return found


def untrained_attention(made: exp.Experiment, teachers: int) -> exp.AttentionNetwork:
    """It costs what a fitted one costs; fitting it comes before the first epoch."""
    return exp.AttentionNetwork(teachers, len(made.images.classes)).to(made.device.torch).eval()


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=4_000, help="training images, held-out ones included")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--network", choices=list(exp.RATIOS), default="7x")
    options.add_argument("--methods", nargs="+", default=["AT", "SP", "RKD", "Hint"])
    chosen = options.parse_args()
    exp.load_plugins([ROOT / "tests/published_methods.py"])
    names = [*MAIN, *chosen.methods]
    with experiment(chosen, cifar_like(chosen.images), student_epochs=chosen.rounds + 1) as made:
        say_device(made)
        ours = trainings(made, chosen.network, names, chosen.rounds + 1)
        times: dict[str, list[float]] = {name: [] for name in names}
        for epoch in range(chosen.rounds + 1):  # the first is the warm-up
            for name, training in ours.items():
                action = lambda training=training, epoch=epoch: training._epoch(epoch)  # noqa: E731
                times[name].append(seconds(made.device, action))
    plain = min(times["TraditionalKD"][1:])
    say("TraditionalKD_epoch_seconds", plain)
    for name, values in times.items():
        say(f"{name}_over_TraditionalKD", min(values[1:]) / plain)


if __name__ == "__main__":
    main()
