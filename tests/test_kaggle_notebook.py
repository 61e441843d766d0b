"""The notebook that carries the script: what it holds, that it runs on Kaggle, starts there, continues and shows the results."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import make_notebook
import nbclient
import nbformat
import pytest
import torch
from conftest import ROOT
from make_notebook import (
    FOLDER,
    NOTEBOOK,
    QUICK_START,
    SCRIPT,
    build_files,
    build_notebook,
    quick_start_cells,
)
from test_docs import KERNEL_KEYS, README, code_blocks, text_of
from torchvision.transforms.functional import to_pil_image

import run_exp1b_kaggle as exp

SCRIPT_TEXT, QUICK_START_TEXT = ((ROOT / name).read_text(encoding="utf-8") for name in (SCRIPT, QUICK_START))
# Added to the notebook's commands: smoke in seconds.
SMALL = (
    "--width 8 --train-size 200 --batch-size 60 --teacher-epochs 1 --student-epochs 1 --runs 1 --compression 2.3x"
    " --threads 1 --device cpu --max-hours 1"
)
# Left out there, because they take long to draw.
SLOW_FIGURES = {
    "learning_curves": "draw_learning",
    "calibration": "draw_calibration",
    "temperature": "draw_temperature",
}


def sources(text: str, kind: str = "code") -> list[str]:
    return [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == kind]


def test_the_notebook_is_the_script_and_the_quick_start() -> None:
    text = build_notebook(SCRIPT_TEXT, QUICK_START_TEXT)
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3" and len(text.encode()) <= 10**6
    assert all(
        not cell.outputs and cell.execution_count is None for cell in notebook.cells if "outputs" in cell
    )

    first, *others = sources(text)
    assert first == f"%%writefile run_exp1b_kaggle.py\n{SCRIPT_TEXT}"
    assert others[0].count('MODE = "quick"') == 1, "the only thing to choose"
    assert others == [code for _, code in quick_start_cells(QUICK_START_TEXT)]
    assert len(others) == QUICK_START_TEXT.partition("# Português")[0].count("```python")
    assert len(sources(text, "markdown")) == len(others) + 1


def test_it_is_the_same_every_time_and_another_for_another_script() -> None:
    text = build_notebook(SCRIPT_TEXT, QUICK_START_TEXT)
    assert build_notebook(SCRIPT_TEXT, QUICK_START_TEXT) == text
    names = [cell.id for cell in nbformat.reads(text, as_version=4).cells]
    other = [
        cell.id for cell in nbformat.reads(build_notebook("pass\n", QUICK_START_TEXT), as_version=4).cells
    ]
    assert len(set(names)) == len(names)
    assert [a == b for a, b in zip(names, other, strict=True)].count(False) == 1, "one cell is another"


@pytest.mark.parametrize(
    ("script", "quick_start", "said"),
    [("x" * 10**6, QUICK_START_TEXT, "at most"), ("pass", "no cells", "no cells that run")],
)
def test_what_cannot_be_made_is_one_line(script: str, quick_start: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_notebook(script, quick_start)


def test_the_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_notebook, "FOLDER", tmp_path / "made")
    assert make_notebook.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name, text in build_files().items():
        assert (tmp_path / "made" / name).read_text(encoding="utf-8") == text
    (tmp_path / "file").touch()
    monkeypatch.setattr(make_notebook, "FOLDER", tmp_path / "file/made")
    assert make_notebook.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_metadata_are_what_the_client_takes() -> None:
    metadata = json.loads(build_files()["kernel-metadata.json"])
    assert set(metadata) == KERNEL_KEYS
    assert metadata["id"] == f"USERNAME/{metadata['title']}" and metadata["kernel_type"] == "notebook"
    assert metadata["enable_gpu"] and metadata["enable_internet"] and metadata["is_private"]


@pytest.mark.parametrize("name", [NOTEBOOK, "kernel-metadata.json"])
def test_the_files_in_the_repository_are_up_to_date(name: str) -> None:
    assert (FOLDER / name).read_bytes() == build_files()[name].encode(), "run: python tests/make_notebook.py"


# ---- On Kaggle -----------------------------------------------------------------------------------------------------------


def run_all(root: Path, picture: str = "", *more: str) -> list[Any]:
    """Save & Run All: the notebook's code cells and `more`, in a kernel of their own, where `root` stands for /.

    Returns their outputs.
    """
    notebook = nbformat.reads(build_notebook(SCRIPT_TEXT, QUICK_START_TEXT), as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in more]
    changes = {
        'root: Path = Path("/")': f'root: Path = Path("{root}")',
        'MODE = "quick"': 'MODE = "smoke"',
        "--mode {MODE}": f"--mode {{MODE}} {SMALL}",
        'PICTURE = ""': f'PICTURE = "{picture}"',
        'rglob("student_7x_': 'rglob("student_2.3x_',
    }
    changes |= {f'    "{name}": {draw},\n': "" for name, draw in SLOW_FIGURES.items()}
    for old, new in changes.items():
        assert any(old in cell.source for cell in notebook.cells), old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    place = {"metadata": {"path": str(root / "kaggle/working")}}
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place)
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    environment = {**os.environ, "IPYTHONDIR": str(root), "PATH": path, "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    client.execute(env=environment)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def displayed(outputs: list[Any]) -> list[dict[str, str]]:
    return [output.data for output in outputs if output.output_type == "display_data"]


def deployment(student: str) -> str:
    """The README's cell that exports a student, with this one's path."""
    (cell,) = (block for block in code_blocks(text_of(README), "python") if "load_student" in block)
    path = "exp1b_quick_.../checkpoints/student_7x_HPM-KD_run1.pt"
    assert path in cell and "show_results()" in cell
    return cell.replace(path, student)


@pytest.mark.slow
def test_it_starts_a_run_continues_it_from_the_attached_output_and_shows_it(tmp_path: Path) -> None:
    """Two versions; the second has the first one's output as an input, in a working folder that is empty again.

    It also classifies a picture and exports a student, as the quick start and the README say.
    """
    working, inputs = tmp_path / "kaggle/working", tmp_path / "kaggle/input"
    working.mkdir(parents=True)
    inputs.mkdir()
    _, plan, run, show, own = run_all(tmp_path)
    assert "total" in printed(plan)
    assert "there is no run with these settings yet" in printed(run)
    assert "finished: 6 of 6 jobs done" in printed(run)
    assert len(displayed(show)) >= 3
    assert printed(own) == ""
    [folder] = working.glob("exp1b_smoke_*")
    results = (folder / "results.csv").read_text()
    (folder / "checkpoints/student_2.3x_TraditionalKD_run1.pt").unlink()  # that is left to do

    shutil.move(working, inputs / "notebooks/me/exp1b")
    (inputs / "notebooks/me/exp1b" / SCRIPT).write_text("raise SystemExit('the old script')\n")
    working.mkdir()
    data = exp.load_data("SYNTHETIC", [], None, 200, 42, lambda: None)
    picture = inputs / "image.png"
    to_pil_image(torch.from_numpy(data.test_pixels[0]).permute(2, 0, 1)).save(picture)
    student = f"{folder.name}/checkpoints/student_2.3x_HPM-KD_run1.pt"
    _, plan, run, show, own, deploy = run_all(tmp_path, str(picture), deployment(student))
    assert "2.3x Direct" not in printed(plan), "only what is left"
    assert "copying the run" in printed(run)
    assert "finished: 6 of 6 jobs done" in printed(run)
    assert [path.name for path in working.glob("exp1b_smoke_*")] == [folder.name]
    assert len((working / folder.name / "results.csv").read_text().splitlines()) == len(results.splitlines())

    table, report, *figures = displayed(show)
    assert all(method in table["text/html"] for method in ("<table", *exp.MAIN_METHODS))
    written = (working / folder.name / exp.REPORT_NAME).read_text()
    assert report["text/markdown"].startswith(written.splitlines()[0])
    assert "](figures/" not in report["text/markdown"], "a notebook cannot show these"
    assert len(figures) == len(list((working / folder.name / "figures").glob("*.png"))) >= 3
    assert all("image/png" in figure for figure in figures)

    expected = data.classes[exp.load_checkpoint(working / student)["test_logits"][0].argmax()]
    said = re.fullmatch(r"(.+) \((.+)%\), says (.+)", printed(own).strip())
    assert said and said[1] == expected and 0 < float(said[2]) <= 100 and said[3] == student
    assert len(displayed(deploy)) == len(displayed(show))
    assert (working / "student.onnx").stat().st_size > 10_000


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
