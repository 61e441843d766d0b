"""The documents' notebook cells, executed: find the script, continue a run, show its results, classify an image with a student."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT
from test_docs import QUICK_START, README, code_blocks, text_of
from torchvision.transforms.functional import to_pil_image

import run_exp1b_kaggle as exp

STUDENT = "checkpoints/student_7x_HPM-KD_run1.pt"


def cells() -> list[str]:
    """The quick start's four cells, then the README's prediction, as a reader copies them."""
    quick_start = code_blocks(text_of(QUICK_START).partition("\n# Português\n")[0], "python")
    assert len(quick_start) == 4
    show, predict = (block for block in code_blocks(text_of(README), "python") if "run_exp1b_kaggle import" in block)
    assert show.partition("  #")[0] == quick_start[2].rstrip("\n"), "three lines, the same in both documents"
    return [*quick_start, predict]


@pytest.fixture(scope="module")
def picture(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first test image as a file, and the class that the stored logits give it."""
    folder = tmp_path_factory.mktemp("picture")
    data = exp.load_data("SYNTHETIC", None, folder, [], 400, 42)
    to_pil_image(torch.from_numpy(data.test_pixels[0]).permute(2, 0, 1)).save(folder / "image.png")
    return folder / "image.png", data.classes[exp.load_checkpoint(finished_run / STUDENT)["test_logits"][0].argmax()]


@pytest.fixture(scope="module")
def outputs(finished_run: Path, picture: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each cell put out, in a kernel of its own, in a folder that stands for /kaggle, where a finished run waits."""
    root = tmp_path_factory.mktemp("notebook") / "kaggle"
    working, code = root / "working", root / "input/datasets/me/exp1b-code"
    code.mkdir(parents=True)
    shutil.copy(ROOT / "run_exp1b_kaggle.py", code)
    shutil.copytree(finished_run, working / finished_run.name)
    shutil.copy(picture[0], working)
    texts = [text.replace('"/kaggle', f'"{root}').replace('PICTURE = ""', 'PICTURE = "image.png"') for text in cells()]
    assert texts[0].count('MODE = "quick"') == 1, "the only thing to choose"
    texts[0] = texts[0].replace('MODE = "quick"', 'MODE = "smoke"')
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(working)}})
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    client.execute(env={**os.environ, "IPYTHONDIR": str(root), "PATH": path})
    assert [path.name for path in working.glob("exp1b*")] == [finished_run.name], "looking makes no new run"
    return [cell.outputs for cell in notebook.cells]


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_first_cell_plans_and_the_second_continues(outputs: list[list[Any]]) -> None:
    assert "total" in printed(outputs[0])
    assert printed(outputs[1]).startswith("continuing an earlier run\n")
    assert "finished: 24 of 24 jobs done; report: " in printed(outputs[1])


def test_three_lines_show_table_report_and_figures(outputs: list[list[Any]], finished_run: Path) -> None:
    shown = [output for output in outputs[2] if output.output_type == "display_data"]
    table, report, *figures = (output.data for output in shown)
    assert "<table" in table["text/html"]
    assert all(method in table["text/html"] for method in ("Direct", "TraditionalKD", "HPM-KD"))
    first = (finished_run / "experiment_report.md").read_text().splitlines()[0]
    assert report["text/markdown"].startswith(first)
    assert "](figures/" not in report["text/markdown"], "a notebook cannot show these"
    assert len(figures) == len(list((finished_run / "figures").glob("*.png"))) >= 3
    assert all("image/png" in figure for figure in figures)


@pytest.mark.parametrize("cell", [3, 4], ids=["quick start", "README"])
def test_five_lines_classify_a_picture(outputs: list[list[Any]], picture: tuple[Path, str], cell: int) -> None:
    lines = [line for line in cells()[cell].splitlines() if line.strip() and not line.startswith(("from", "import", "PICTURE", "if"))]
    assert len(lines) == 5
    name, share = printed(outputs[cell]).split()
    assert name == picture[1]
    assert 0 < float(share.rstrip("%")) <= 100
