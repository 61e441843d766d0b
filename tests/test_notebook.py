"""The documents' notebook cells, executed: continue a run, show its results, classify an image with a student."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT, SMALL
from test_docs import QUICK_START, README, code_blocks, text_of
from torchvision.transforms.functional import to_pil_image

import run_exp1b_kaggle as exp

NAME = "exp1b_smoke_20260101_000000"
STUDENT = "checkpoints/student_7x_HPM-KD_run1.pt"


def cells() -> list[str]:
    """The quick start's four cells, then the README's deployment of a student, as a reader copies them."""
    quick_start = code_blocks(text_of(QUICK_START).partition("\n# Português\n")[0], "python")
    assert len(quick_start) == 4
    (deploy,) = (block for block in code_blocks(text_of(README), "python") if "load_student" in block)
    assert "show_results()" in deploy and "show_results()" in quick_start[2]
    path = "exp1b_quick_.../checkpoints/student_7x_HPM-KD_run1.pt"
    assert path in deploy
    return [*quick_start, deploy.replace(path, f"{NAME}/{STUDENT}")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], Path, str]:
    """What each cell put out, in a kernel of its own, in a folder that stands for /kaggle, where a finished run waits.

    With the run's folder, and the class that the stored logits give to the picture.
    """
    root = tmp_path_factory.mktemp("notebook") / "kaggle"
    working = root / "working"
    working.mkdir(parents=True)
    shutil.copy(ROOT / "run_exp1b_kaggle.py", working)
    torch.set_num_threads(1)
    small = [
        *SMALL,
        "--compression",
        "7x",
        "--train-size",
        "200",
        "--teacher-epochs",
        "1",
        "--student-epochs",
        "1",
    ]
    assert small[:2] == ["--mode", "smoke"]
    assert exp.main([*small, "--output-dir", str(working / NAME)]) == 0

    data = exp.load_data("SYNTHETIC", [], None, 200, 42, lambda: None)
    to_pil_image(torch.from_numpy(data.test_pixels[0]).permute(2, 0, 1)).save(working / "image.png")
    expected = data.classes[exp.load_checkpoint(working / NAME / STUDENT)["test_logits"][0].argmax()]

    texts = [text.replace('PICTURE = ""', 'PICTURE = "image.png"') for text in cells()]
    assert texts[0].count('MODE = "quick"') == 1, "the only thing to choose"
    texts[0] = texts[0].replace('MODE = "quick"', 'MODE = "smoke"')
    texts = [text.replace("--mode {MODE}", f"--mode {{MODE}} {' '.join(small[2:])}") for text in texts]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    place = {"metadata": {"path": str(working)}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    client.execute(env={**os.environ, "IPYTHONDIR": str(root), "PATH": path})
    assert [folder.name for folder in working.glob("exp1b*")] == [NAME], "looking makes no new run"
    return [cell.outputs for cell in notebook.cells], working / NAME, expected


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_results_shown_are_the_last_active_runs(
    toy: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy has the files' times of today: what counts is when a run was last worked on. Which one is shown is said."""
    display = pytest.importorskip("IPython.display")
    monkeypatch.setattr(display, "display", lambda _: None)
    for name, moment in (("exp1b_new", "2999"), ("exp1b_old", "2998"), ("exp1b_plugin", "2997")):
        shutil.copytree(toy_run, toy / name)
        index = exp.load_index(toy / name, {})
        index.created, index.sessions[-1].started = "1999", moment
        index.plugins = {"mine.py": "0"} if name == "exp1b_plugin" else {}
        exp.save_plain(toy / name / "checkpoints" / exp.STATE_NAME, exp.to_plain(index))
        os.utime(toy / name / exp.REPORT_NAME)
    exp.show_results()
    shutil.rmtree(toy / "exp1b_new")
    exp.show_results()
    shutil.rmtree(toy / "exp1b_old")
    exp.show_results()
    assert capsys.readouterr().out.split() == [
        str(toy / f"exp1b_{name}") for name in ("new", "old", "plugin")
    ]


@pytest.mark.slow
def test_the_cells_plan_continue_show_and_classify(outputs: tuple[list[list[Any]], Path, str]) -> None:
    plan, again, show, own, deploy = outputs[0]
    folder, expected = outputs[1:]
    assert "total" in printed(plan)
    assert f"run folder {folder}" in printed(again)
    assert "finished: 8 of 8 jobs done" in printed(again)

    shown = [output for output in show if output.output_type == "display_data"]
    table, report, *figures = (output.data for output in shown)
    assert all(method in table["text/html"] for method in ("<table", "Direct", "TraditionalKD", "HPM-KD"))
    assert report["text/markdown"].startswith((folder / "experiment_report.md").read_text().splitlines()[0])
    assert "](figures/" not in report["text/markdown"], "a notebook cannot show these"
    assert len(figures) == len(list((folder / "figures").glob("*.png"))) >= 3
    assert all("image/png" in figure for figure in figures)

    said = re.fullmatch(r"(.+) \((.+)%\), says (.+)", printed(own).strip())
    assert said and said[1] == expected and 0 < float(said[2]) <= 100
    assert folder.parent / said[3] == folder / "checkpoints/student_7x_HPM-KD_run1.pt"

    assert len([output for output in deploy if output.output_type == "display_data"]) == len(shown)
    assert (folder.parent / "student.onnx").stat().st_size > 10_000
