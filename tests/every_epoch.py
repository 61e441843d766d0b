"""The script as a process that saves every epoch and draws one figure, for tests that kill it.

python tests/every_epoch.py <options>
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_exp1b_kaggle as exp


def main(options: list[str]) -> int:
    """exp.main, with one figure; in a process of its own, which it changes."""
    for name in list(exp.FIGURES)[1:]:
        del exp.FIGURES[name]
    return exp.main(options)


if __name__ in ("__main__", "__mp_main__"):  # the second: in its workers
    exp.Training.SAVE_SECONDS = 0.0
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
