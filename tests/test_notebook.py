"""In a notebook: three lines show a run's table, report and figures, five lines classify an image with a student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from conftest import ROOT

SHOW = """\
import run_exp1b_kaggle as exp
run = {run!r}
exp.show_results(run)"""
PREDICT = """\
import torch
student = exp.load_student(run + "/checkpoints/student_7x_HPM-KD_run1.pt")
data = exp.load_data("SYNTHETIC", None, exp.Path(), [], 400, 42)
image = torch.from_numpy(data.test_pixels[:1]).permute(0, 3, 1, 2) / 255
print(data.classes[student(image).argmax(1).item()])"""
CHECK = """\
state = exp.load_checkpoint(exp.Path(run) / "checkpoints/student_7x_HPM-KD_run1.pt")
print(data.classes[state["test_logits"][0].argmax().item()])"""


@pytest.fixture(scope="module")
def outputs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each cell put out, in a kernel of its own that can import the script and nothing else of the repository."""
    cells = [nbformat.v4.new_code_cell(text) for text in (SHOW.format(run=str(finished_run)), PREDICT, CHECK)]
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "run_exp1b_kaggle.py").write_bytes((ROOT / "run_exp1b_kaggle.py").read_bytes())
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "IPYTHONDIR": str(folder)})
    assert sorted(path.name for path in folder.glob("exp1b*")) == [], "looking writes nothing"
    return [cell.outputs for cell in cells]


def test_three_lines_show_table_report_and_figures(outputs: list[list[Any]], finished_run: Path) -> None:
    assert SHOW.count("\n") == 2
    shown = [output for output in outputs[0] if output.output_type == "display_data"]
    table, report, *figures = (output.data for output in shown)
    assert "<table" in table["text/html"]
    assert all(method in table["text/html"] for method in ("Direct", "TraditionalKD", "HPM-KD"))
    first = (finished_run / "experiment_report.md").read_text().splitlines()[0]
    assert report["text/markdown"].startswith(first)
    assert "](figures/" not in report["text/markdown"], "a notebook cannot show these"
    assert len(figures) == len(list((finished_run / "figures").glob("*.png"))) >= 3
    assert all("image/png" in figure for figure in figures)


def test_five_lines_classify_an_image(outputs: list[list[Any]]) -> None:
    assert PREDICT.count("\n") == 4
    (predicted,), (stored,) = outputs[1:]
    assert predicted.text == stored.text != ""
