"""Section 14: every figure is drawn from whatever data there are, and shows what it claims."""

from __future__ import annotations

import io
import itertools
import struct

import numpy as np
import pytest
from fake_state import fake_labels, fake_logits, fake_state
from matplotlib.colors import to_rgb

import run_exp1b_kaggle as exp

ALWAYS = {"accuracy_vs_compression", "hpmkd_vs_direct", "retention_analysis", "learning_curves", "cost_vs_accuracy", "calibration"}


def without(state, *parts):
    """The state without the jobs whose name contains one of `parts`."""
    return {**state, "jobs": {n: r for n, r in state["jobs"].items() if not any(part in n for part in parts)}}


def failed(state, name):
    """The state with one job failed: no results, no history."""
    keep = ("job", "kind", "compression", "method", "run", "seed")
    record = {k: state["jobs"][name][k] for k in keep} | {"status": "failed", "reason": "loss became NaN"}
    return {**state, "jobs": {**state["jobs"], name: record}}


def draw(name, state, logits=True):
    labels = fake_labels(400)
    z = fake_logits(state, labels) if logits else {}
    evidence = exp.gather_evidence(state, exp.results_frame(state), z, labels if logits else None)
    return exp.FIGURES[name](evidence)


def texts(figure):
    """Everything written in a figure, lines joined."""
    from matplotlib.text import Text

    return " ".join(" ".join(t.get_text().split()) for t in figure.findobj(Text))


def test_files_sizes_and_resolution(tmp_path):
    state, labels = fake_state(2, ablation=True, equal_cost=True), fake_labels(400)
    drawn = exp.draw_figures(state, exp.results_frame(state), fake_logits(state, labels), labels, tmp_path / "figures")
    assert {path.stem for path in drawn} == ALWAYS | {"temperature", "ablation"}
    for path in drawn:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20])[0] == round(3.4 * 300)  # one column at 300 DPI
        at = data.index(b"pHYs") + 4
        assert struct.unpack(">I", data[at : at + 4])[0] == round(300 / 0.0254)
        pdf = path.with_suffix(".pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf  # vector throughout


@pytest.mark.parametrize(("epochs", "cut"), [(2, False), (3, True)])
def test_epochs_that_are_left_out_are_said(epochs, cut):
    state = fake_state(2)
    for record in state["jobs"].values():
        record["history"] = record.get("history", [])[:epochs]
    assert ("first third of the epochs is left out" in texts(draw("learning_curves", state))) == cut


def test_same_data_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(exp, "FIGURES", {name: exp.FIGURES[name] for name in ("hpmkd_vs_direct", "temperature")})
    state = fake_state(2, ratios=("5x",))
    frame = exp.results_frame(state)
    first = {p.name: p.read_bytes() for p in exp.draw_figures(state, frame, {}, None, tmp_path / "a")}
    assert first == {p.name: p.read_bytes() for p in exp.draw_figures(state, frame, {}, None, tmp_path / "b")}


CASES = {
    "nothing": lambda: {**fake_state(3), "jobs": {}},
    "only the teacher": lambda: without(fake_state(3), "student", "pilot", "intermediate"),
    "no teacher": lambda: without(fake_state(3), "teacher", "intermediate", "pilot", "KD"),
    "one run": lambda: fake_state(1),
    "one ratio": lambda: fake_state(3, ratios=("7x",)),
    "a ratio missing": lambda: without(fake_state(3), "student_5x"),
    "a method missing": lambda: without(fake_state(3), "_HPM-KD_"),
    "a failure": lambda: failed(fake_state(3), "student_5x_Direct_run2"),
    "only failures": lambda: failed({**fake_state(1), "jobs": {"student_5x_Direct_run1": fake_state(1)["jobs"]["student_5x_Direct_run1"]}}, "student_5x_Direct_run1"),
    "methods not planned": lambda: fake_state(2, methods=("Direct",)),
    "no Direct": lambda: fake_state(2, methods=("TraditionalKD", "HPM-KD")),
    "ablation without HPM-KD": lambda: without(fake_state(2, ablation=True), "_HPM-KD_"),
    "one epoch": lambda: fake_state(2, epochs=2),
    "other data": lambda: fake_state(2, dataset="SYNTHETIC", width=16),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_partial_data_still_give_valid_figures(case):
    state = CASES[case]()
    drawn = {name: draw(name, state, logits=False) for name in exp.FIGURES}
    assert all(drawn[name] is not None for name in ALWAYS)
    for figure in filter(None, drawn.values() if case in ("nothing", "no teacher", "a failure") else ()):
        figure.savefig(io.BytesIO(), format="png", dpi=40)  # the layout could fail too


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_figures_say_what_is_missing(name):
    state = without(fake_state(3), "student_7x", "student_5x_HPM-KD_run1", "teacher")
    assert "Missing: the teacher; 5x: HPM-KD 2 of 3 runs; all of 7x." in texts(draw(name, state))
    assert "Missing" not in texts(draw(name, fake_state(3)))


@pytest.mark.parametrize("name", ["accuracy_vs_compression", "retention_analysis", "hpmkd_vs_direct", "cost_vs_accuracy"])
def test_error_bars_are_explained(name):
    assert "95% t-interval" in texts(draw(name, fake_state(3)))


@pytest.mark.parametrize(("name", "column"), [("accuracy_vs_compression", "test_accuracy"), ("retention_analysis", "retention")])
def test_every_run_is_a_dot(name, column):
    state = fake_state(4)
    axis = draw(name, state).axes[0]
    dots = [line for line in axis.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 4]
    shown = sorted(np.concatenate([line.get_ydata() for line in dots]))
    assert shown == pytest.approx(sorted(exp.results_frame(state)[column]))


def test_axis_is_the_counted_ratio():
    axis = draw("accuracy_vs_compression", fake_state(2)).axes[0]
    assert axis.get_xscale() == "log" and "counted" in axis.get_xlabel()
    assert axis.get_xticks() == pytest.approx([23_520_842 / n for n in (10_235_000, 4_716_000, 3_357_000)])
    no_teacher = draw("accuracy_vs_compression", without(fake_state(2), "teacher")).axes[0]
    assert no_teacher.get_xticks() == pytest.approx([2.3, 5, 7]) and "(nominal" in no_teacher.get_xlabel()


def test_titles_follow_the_data():
    state = fake_state(3)
    for name, record in state["jobs"].items():
        if "_HPM-KD_" in name:
            twin = state["jobs"][name.replace("HPM-KD", "Direct")]["test_accuracy"]
            record["test_accuracy"] = twin - {"2.3x": 0.0, "5x": 1.0, "7x": -1.0}[record["compression"]] + record["run"] / 100
    title = texts(draw("accuracy_vs_compression", state))
    assert "worse at 5x" in title and "better at 7x" in title
    differences = texts(draw("hpmkd_vs_direct", state))
    assert "HPM-KD minus Direct +0.02 pp at 2.3x, -0.98 pp at 5x" in differences and "(3 pairs)" in differences
    trained = draw("hpmkd_vs_direct", fake_state(2, methods=("Direct", "HPM-KD")))
    assert "TraditionalKD" not in texts(trained)


def test_a_temperature_that_never_moves_is_no_figure(tmp_path):
    state = fake_state(2)
    assert draw("temperature", state) is not None
    for record in state["jobs"].values():
        record["history"] = [{**entry, "temperature": 4.0} for entry in record["history"]]
    assert draw("temperature", state) is None
    frame, labels = exp.results_frame(state), fake_labels(200)
    (tmp_path / "temperature.png").touch()
    drawn = exp.draw_figures(state, frame, {}, labels, tmp_path)
    assert drawn and not (tmp_path / "temperature.png").exists(), "of an earlier version"


def test_prediction_is_shown_only_where_it_applies():
    assert "predicted" in texts(draw("hpmkd_vs_direct", fake_state(2)))
    assert "predicted" not in texts(draw("hpmkd_vs_direct", fake_state(2, width=16)))
    assert "predicted" not in texts(draw("hpmkd_vs_direct", fake_state(2, dataset="CIFAR100")))


def test_calibration_shows_the_mean_ece_of_the_runs():
    state, labels = fake_state(2), fake_labels(400)
    z = fake_logits(state, labels)
    ece = np.mean([exp.expected_calibration_error(z[f"student_5x_Direct_run{run}"], labels) for run in (1, 2)])
    assert f"ECE {100 * ece:.1f}%" in texts(draw("calibration", state))
    assert "no logits" in texts(draw("calibration", state, logits=False))


def test_temperature_and_ablation_only_with_data():
    assert draw("temperature", without(fake_state(2), "_HPM-KD_")) is None
    assert draw("ablation", fake_state(2)) is None
    state = fake_state(2, ablation=True)
    assert "identical by construction" in texts(draw("ablation", state))
    assert "from 4.0 to 2.0 at 2.3x, 5x and 7x" in texts(draw("temperature", state))
    for name, record in state["jobs"].items():
        if name.startswith("student_7x_HPM-KD_"):
            record["history"] = [{**h, "temperature": 4.0} for h in record["history"]]
    assert "4.0 throughout at 7x" in texts(draw("temperature", state))


def test_methods_can_be_told_apart_in_colour_in_grey_and_by_shape():
    looks = [exp.LOOKS[method] for method in exp.METHODS]
    grey = [np.dot((0.2126, 0.7152, 0.0722), np.array(to_rgb(colour)) ** 2.2) ** (1 / 2.2) for colour, *_ in looks]
    assert min(abs(a - b) for a, b in itertools.combinations(grey, 2)) > 0.2
    assert len({marker for _, marker, _ in looks}) == len({line for *_, line in looks}) == 3
    assert len(set(exp.LOOKS.values())) == len(exp.LOOKS) == 9 and set(exp.LOOKS) == set(exp.ARMS)


def test_global_matplotlib_settings_are_left_alone(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(exp, "FIGURES", {"temperature": exp.draw_temperature})
    before = dict(matplotlib.rcParams)
    state = fake_state(1, ratios=("5x",))
    exp.draw_figures(state, exp.results_frame(state), {}, None, tmp_path)
    assert dict(matplotlib.rcParams) == before
