"""What it costs that OpenMP's threads sleep while they wait (OMP_WAIT_POLICY=passive) instead of spinning.

    python tests/benchmarks/waiting.py [--rounds 5] [--steps 40] [--threads 2] [--width 16] [--batch-size 128]

Forward and backward passes of the 7x network, with both policies by turns, each in a process of its own. Prints `name: value` lines:
the median of the rounds per policy, and their ratio. Run it on a quiet machine: what spinning costs other programs is not measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

from bench import parser, say

POLICIES = ("passive", "active")


def seconds_per_step(threads: int, width: int, batch: int, steps: int) -> float:
    """Seconds of a pass, in this process."""
    import torch

    import run_exp1b_kaggle as exp

    exp.configure_torch(threads, False)
    network = exp.build_network("7x", 10, width).to(memory_format=torch.channels_last).train()
    images, labels = torch.randn(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.long)
    for step in range(steps + 3):
        if step == 3:
            started = time.perf_counter()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
    return (time.perf_counter() - started) / steps


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--once", action="store_true", help="measure in this process, as it was started")
    options = made.parse_args()
    if options.once:
        print(seconds_per_step(options.threads, options.width, options.batch_size, options.steps))
        return
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(options.rounds):
        for policy in POLICIES:
            ended = subprocess.run(
                [sys.executable, *sys.argv, "--once"], env={**os.environ, "OMP_WAIT_POLICY": policy},
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            times[policy].append(float(ended.stdout))
    medians = {policy: statistics.median(values) for policy, values in times.items()}
    for policy, seconds in medians.items():
        say(f"{policy}_ms_per_step", 1000 * seconds)
        say(f"{policy}_slowest_over_fastest", max(times[policy]) / min(times[policy]))
    say("passive_over_active", medians["passive"] / medians["active"])


if __name__ == "__main__":
    main()
