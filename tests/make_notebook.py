"""Make the Kaggle notebook: the whole script in its first cell, then the cells of the quick start.

    python tests/make_notebook.py

Writes exp1b.ipynb and kernel-metadata.json into .github/kaggle. Run it again whenever the script or the quick start has changed: the
same script and quick start give the same bytes. Users import the notebook by hand, or push the folder with Kaggle's client.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github/kaggle"
SCRIPT, QUICK_START, NOTEBOOK = "run_exp1b_kaggle.py", "QUICK_START_KAGGLE.md", "exp1b.ipynb"
MOST_BYTES = 10**6  # what Kaggle takes
METADATA = {
    "id": "USERNAME/exp1b",
    "title": "exp1b",
    "code_file": NOTEBOOK,
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_internet": True,
    "machine_shape": "NvidiaTeslaT4",  # that is two of them
    "dataset_sources": ["pankrzysiu/cifar10-python"],
    "competition_sources": [],
    "kernel_sources": [],
}

HIDDEN = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}}  # folds a cell on Kaggle and in Jupyter


def quick_start_cells(text: str) -> list[tuple[str, str]]:
    """What the English quick start says about each of its notebook's cells, and the cell's code."""
    section = text.partition("\n# Português\n")[0].partition("\n## The notebook\n")[2].partition("\n## ")[0]
    return re.findall(r"^Cell \d+: (.*?)\n\n```python\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)


def build_notebook(script: str, quick_start: str) -> str:
    """The notebook as text. Raises ValueError where the quick start is not what is expected, or it is too large."""
    cells = [
        (
            "markdown",
            "# Experiment 1B\n\nThe next cell writes the script, thousands of lines. Cell 1 is below it.",
        )
    ]
    cells.append(("code", f"%%writefile {SCRIPT}\n{script}"))
    for number, (said, code) in enumerate(quick_start_cells(quick_start), 1):
        cells.append(("markdown", f"**Cell {number}**: {said}"))
        cells.append(("code", code))
    if not any(f"!python {SCRIPT} " in code for _, code in cells[2:]):
        raise ValueError(f"{QUICK_START}: no cells that run {SCRIPT}")

    makers = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = []
    for kind, source in cells:
        identity = hashlib.sha256(f"{kind} {source}".encode()).hexdigest()[:16]
        made.append(makers[kind](source, id=identity))
    made[1].metadata |= HIDDEN
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    text = nbformat.writes(nbformat.v4.new_notebook(cells=made, metadata=metadata, nbformat_minor=5)) + "\n"
    if len(text.encode()) > MOST_BYTES:
        raise ValueError(f"the notebook has {len(text.encode()):,} bytes, {MOST_BYTES:,} at most")
    return text


def build_files() -> dict[str, str]:
    """File name -> content of everything that belongs into FOLDER."""
    script, quick_start = ((ROOT / name).read_text(encoding="utf-8") for name in (SCRIPT, QUICK_START))
    return {
        NOTEBOOK: build_notebook(script, quick_start),
        "kernel-metadata.json": json.dumps(METADATA, indent=2) + "\n",
    }


def main() -> int:
    """Write the files; 2 if that cannot be done."""
    try:
        files = build_files()
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(f"{FOLDER / name}: {len(text.encode()):,} bytes")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
