"""Make the Kaggle notebook: the whole script in its first cell, then the cells of the quick start.

    python tests/make_notebook.py

Writes exp1b.ipynb and kernel-metadata.json into .github/kaggle. Upload the notebook by hand, or write your user name for USERNAME
in the metadata and run `kaggle kernels push -p .github/kaggle`. The same script and quick start give the same bytes.
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
SEARCH = 'next(Path("/kaggle").rglob("run_exp1b_kaggle.py"))'  # in the quick start, whose script is an input
HERE = 'Path("run_exp1b_kaggle.py").resolve()'  # an attached output of an earlier version holds another one
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


def quick_start_cells(text: str) -> list[tuple[str, str]]:
    """What the English quick start says about each of its notebook's cells, and the cell's code."""
    section = text.partition("\n# Português\n")[0].partition("\n## The notebook\n")[2].partition("\n## ")[0]
    return re.findall(r"^Cell \d+: (.*?)\n\n```python\n(.*?)\n```$", section, re.MULTILINE | re.DOTALL)


def build_notebook(script: str, quick_start: str) -> str:
    """The notebook as text. Raises ValueError where the quick start is not what is expected, or it is too large."""
    cells = [("markdown", "# Experiment 1B\n\nThis cell writes the script.")]
    cells.append(("code", f"%%writefile {SCRIPT}\n{script}"))
    for said, code in quick_start_cells(quick_start):
        cells.append(("markdown", said[0].upper() + said[1:]))
        cells.append(("code", code.replace(SEARCH, HERE)))
    if quick_start.count(SEARCH) != 2 or len(cells) < 4:
        raise ValueError(f"{QUICK_START}: no cells that find the script by {SEARCH}, in both languages")

    makers = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = []
    for kind, source in cells:
        identity = hashlib.sha256(f"{kind} {source}".encode()).hexdigest()[:16]
        made.append(makers[kind](source, id=identity))
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
