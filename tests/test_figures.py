"""Figures: every one is drawn from whatever data there are, shows what it claims, and nothing impossible."""

from __future__ import annotations

import functools
import io
import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_state import change, failed, fake_run, many_methods, without

import run_exp1b_kaggle as exp

ALWAYS = {
    "accuracy_vs_compression",
    "hpmkd_vs_direct",
    "retention_analysis",
    "learning_curves",
    "cost_vs_accuracy",
}
RUN_MARKER, MEAN_MARKER, DASH = 3, 6, 14  # sizes in points


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., exp.Run]:
    """Makes a made-up run in the test's folder."""
    return functools.partial(fake_run, tmp_path / "run")


@pytest.fixture
def plugin() -> Iterator[str]:
    """The name of a method that a plugin has registered."""
    before = dict(exp.METHODS)
    method = type("Mine", (exp.TraditionalKD,), {"__module__": "a_plugin", "__doc__": "Another method."})
    exp.register("Mine")(method)
    yield "Mine"
    exp.METHODS.clear()
    exp.METHODS.update(before)


def draw(name: str, run: exp.Run) -> Any:
    """One figure of a run; None where it has nothing to show."""
    return exp.FIGURES[name](exp.gather_evidence(run))


def texts(figure: Any) -> str:
    """Everything that is written in a figure, lines joined."""
    from matplotlib.text import Text

    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text) if text.get_visible())


def legend(figure: Any) -> list[str]:
    """The entries of a figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def rows(axis: Any) -> list[str]:
    """The labels of the rows, from the top, lines joined."""
    labels = [label.get_text().replace("-\n", "-") for label in axis.get_yticklabels()]
    return [" ".join(label.split()) for label in labels]


def points(axis: Any, size: float) -> list[tuple[float, float]]:
    """Positions of all markers of this size that no line joins."""
    lines = [line for line in axis.lines if line.get_linestyle() == "None" and line.get_markersize() == size]
    return [tuple(map(float, point)) for line in lines for point in line.get_xydata()]


def bars(figure: Any) -> list[np.ndarray]:
    """The ends of every interval bar."""
    groups = [container[2][0] for axis in figure.axes for container in axis.containers]
    return [segment for group in groups for segment in group.get_segments()]


def all_equal(run: exp.Run) -> exp.Run:
    """The run with the same accuracy everywhere."""
    for name, record in run.records.items():
        if record.kind == "student":
            change(
                run,
                name,
                test_accuracy=80.0,
                history=[replace(epoch, val_accuracy=80.0) for epoch in record.history],
            )
    return run


def noisy(run: exp.Run) -> exp.Run:
    """The run as a smoke test may end: some percent, spread widely, better than the teacher here and there."""
    luck = np.random.default_rng(1)
    for name, record in run.records.items():
        if record.kind == "student":
            change(run, name, test_accuracy=float(abs(luck.normal(20, 15))), train_seconds=1.0)
        elif record.kind in ("teacher", "assistant"):
            change(run, name, test_accuracy=25.0, train_seconds=10.0)
    return run


# -- files -------------------------------------------------------------------------------------------------------------
def test_files_their_sizes_and_resolution(fake: Any, tmp_path: Path) -> None:
    run = fake(3, ablation=True, equal_cost=True, images=400)
    exp.draw_figures(exp.gather_evidence(run), tmp_path / "figures")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == set(exp.FIGURES)
    for path in (tmp_path / "figures").glob("*.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", data[16:20])[0] == 1200
        at = data.index(b"pHYs") + 4
        assert struct.unpack(">I", data[at : at + 4])[0] == round(300 / 0.0254)
        pdf = path.with_suffix(".pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf  # vector throughout


def test_same_data_same_bytes_whatever_order_the_jobs_ended_in(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("learning_curves", "calibration")
    monkeypatch.setattr(exp, "FIGURES", {name: exp.FIGURES[name] for name in names})
    run = fake(2, ratios=("5x",), images=300)

    def written(folder: str) -> dict[str, bytes]:
        exp.draw_figures(exp.gather_evidence(run), tmp_path / folder)
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    first = written("a")
    assert len(first) == 2 * len(names)
    run.records = dict(reversed(run.records.items()))
    assert first == written("b")


def test_a_figure_that_has_nothing_to_show_is_removed(fake: Any, tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in exp.FIGURES:
        (folder / f"{name}.png").touch()
        (folder / f"{name}.pdf").touch()
    run = fake(3)
    run.records = {}
    exp.draw_figures(exp.gather_evidence(run), folder)
    assert not list(folder.iterdir())


# -- whatever there is -------------------------------------------------------------------------------------------------
CASES: dict[str, tuple[Callable[[Any], exp.Run], set[str]]] = {
    "only the teacher": (lambda fake: without(fake(3), "student", "pilot", "assistant"), {"learning_curves"}),
    "no teacher": (
        lambda fake: without(fake(3), "teacher", "assistant", "pilot", "KD"),
        {"accuracy_vs_compression", "learning_curves", "cost_vs_accuracy"},
    ),
    "one run": (lambda fake: fake(1), {*ALWAYS, "temperature"}),
    "one student": (
        lambda fake: fake(1, ratios=("7x",), methods=("Direct",)),
        ALWAYS - {"hpmkd_vs_direct"},
    ),
    "two runs": (lambda fake: fake(2), {*ALWAYS, "temperature"}),
    "five runs": (lambda fake: fake(5, ratios=("5x",)), {*ALWAYS, "temperature"}),
    "one ratio": (lambda fake: fake(3, ratios=("7x",)), {*ALWAYS, "temperature"}),
    "a ratio missing": (lambda fake: without(fake(3), "student_5x"), {*ALWAYS, "temperature"}),
    "the subject missing": (lambda fake: without(fake(3), "_HPM-KD_"), ALWAYS),
    "a failure": (lambda fake: failed(fake(3), "student_5x_Direct_run2"), {*ALWAYS, "temperature"}),
    "only failures": (lambda fake: failed(without(fake(1), "_"), "student_5x_Direct_run1"), set()),
    "no baseline": (lambda fake: fake(3, methods=("TraditionalKD", "HPM-KD")), {*ALWAYS, "temperature"}),
    "an ablation": (
        lambda fake: fake(3, ablation=True, equal_cost=True),
        {*ALWAYS, "temperature", "ablation"},
    ),
    "an ablation without its subject": (lambda fake: without(fake(2, ablation=True), "_HPM-KD_"), ALWAYS),
    "only arms at a ratio": (
        lambda fake: without(fake(3, ablation=True), "5x_Direct", "5x_Trad", "5x_HPM-KD_"),
        {*ALWAYS, "temperature", "ablation"},
    ),
    "one epoch": (lambda fake: fake(3, epochs=1), ALWAYS),
    "equal values": (lambda fake: all_equal(fake(3)), {*ALWAYS, "temperature"}),
    "smoke": (lambda fake: noisy(fake(3, dataset="SYNTHETIC", width=16, epochs=4)), {*ALWAYS, "temperature"}),
    "CIFAR-100": (
        lambda fake: fake(3, dataset="CIFAR100", images=300),
        {*ALWAYS, "temperature", "calibration"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_state_gives_the_figures_that_it_can(case: str, fake: Any) -> None:
    make, expected = CASES[case]
    evidence = exp.gather_evidence(make(fake))
    figures = {name: make_figure(evidence) for name, make_figure in exp.FIGURES.items()}
    assert {name for name, figure in figures.items() if figure is not None} == expected
    for name, figure in figures.items():
        if figure is None:
            continue
        if case in ("one student", "a failure", "an ablation", "smoke"):
            figure.savefig(io.BytesIO(), format="png", dpi=40)  # the layout could fail too
        assert "nan" not in texts(figure)
        for axis in figure.axes:
            of_values = int(name in ("learning_curves", "cost_vs_accuracy", "calibration"))  # 0: the x-axis
            low, high = (axis.get_xlim(), axis.get_ylim())[of_values]
            if of_values or name == "accuracy_vs_compression":
                assert low >= 0 and high <= 100
            if name == "cost_vs_accuracy":
                assert axis.get_xlim()[0] == 0
            if name in ("accuracy_vs_compression", "retention_analysis", "cost_vs_accuracy"):
                assert high - low >= 1.9, "an axis around nothing"
                shown = [
                    point[of_values]
                    for size in (RUN_MARKER, MEAN_MARKER, DASH)
                    for point in points(axis, size)
                ]
                assert all(low <= value <= high for value in shown)


def test_a_method_of_a_plugin_stands_beside_the_others(fake: Any, plugin: str) -> None:
    run = fake(3, methods=("Direct", "HPM-KD", plugin), images=300)
    for name in [*ALWAYS, "calibration"]:
        assert plugin in texts(draw(name, run)), name
    assert "minus Direct's" in texts(draw("hpmkd_vs_direct", run))
    only = draw("hpmkd_vs_direct", fake(3, methods=("HPM-KD", plugin)))
    assert "minus HPM-KD's" in texts(only) and rows(only.axes[0]) == [plugin]


@pytest.mark.parametrize("count", [3, 4, 8, 14])
def test_methods_are_rows_the_best_on_top(count: int, fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = list(exp.MAIN_METHODS) if count == 3 else many_methods(monkeypatch, count)
    run = fake(3, methods=methods, images=300)
    evidence = exp.gather_evidence(run)
    ranking = evidence.ranking()
    others = [method for method in ranking if method != "Direct"]
    for name, labels in (
        ("accuracy_vs_compression", ranking),
        ("hpmkd_vs_direct", [*others, "HPM-KD minus TraditionalKD"]),
    ):
        figure = exp.FIGURES[name](evidence)
        figure.draw_without_rendering()
        headings = [axis.get_title("left").split()[0] for axis in figure.axes]
        assert headings == list(run.settings.compression)
        assert figure.get_size_inches()[1] < 9, "higher than a page"
        for axis in figure.axes:
            assert rows(axis) == labels
            assert len(points(axis, MEAN_MARKER)) == len(labels)
            assert axis.get_xlim() == figure.axes[0].get_xlim()
            low, high = axis.get_xlim()
            assert all(low <= x <= high for x, _ in points(axis, RUN_MARKER))
            assert min(label.get_window_extent().x0 for label in axis.get_yticklabels()) >= 0
    for name in ("learning_curves", "cost_vs_accuracy"):
        figure = exp.FIGURES[name](evidence)
        names = legend(figure)
        assert len(names) == min(count, 5) and {"Direct", "HPM-KD", evidence.ranking()[0]} <= set(names)
        assert ("Shown of" in texts(figure)) == (count > 5)
        assert len({exp.METHODS[method].look for method in names}) == len(names), "alike"


def test_a_name_of_31_letters_is_not_cut(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = many_methods(monkeypatch, 4)[-1]
    assert len(name) == 31
    run = fake(3, methods=("Direct", "HPM-KD", name), ratios=("5x",))
    figure = draw("learning_curves", run)
    figure.draw_without_rendering()
    assert name in legend(figure)
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize("name", sorted(ALWAYS))
def test_figures_say_what_is_missing(name: str, fake: Any) -> None:
    run = without(fake(3), "student_7x", "student_5x_HPM-KD_run1")
    assert "Missing: 5x: HPM-KD 2 of 3 runs; all of 7x." in texts(draw(name, run))
    assert "Missing" not in texts(draw(name, fake(3)))


@pytest.mark.parametrize("name", [*exp.FIGURES])
def test_titles_name_what_is_plotted(name: str, fake: Any) -> None:
    title = draw(name, fake(3, ablation=True, images=300)).legends[0].get_title().get_text()
    assert 0 < len(title) < 50 and "\n" not in title
    assert not any(character.isdigit() for character in title.replace("CIFAR10", ""))


def test_the_legend_names_what_is_drawn(fake: Any) -> None:
    run = without(fake(3, equal_cost=True), "_HPM-KD_", "_Direct-equal-cost_")
    for name in ("learning_curves", "cost_vs_accuracy"):
        assert legend(draw(name, run)) == ["Direct", "TraditionalKD"]
    assert rows(draw("accuracy_vs_compression", run).axes[0]) == ["TraditionalKD", "Direct"]
    assert rows(draw("hpmkd_vs_direct", run).axes[0]) == ["TraditionalKD"]
    assert legend(draw("cost_vs_accuracy", fake(3, equal_cost=True))) == [
        *exp.MAIN_METHODS,
        "Direct-equal-cost",
    ]


# -- runs, means, intervals --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "column"), [("accuracy_vs_compression", "test_accuracy"), ("retention_analysis", "retention")]
)
def test_every_run_is_a_marker_of_its_own(name: str, column: str, fake: Any) -> None:
    run = fake(4)
    frame = exp.results_frame(run)
    for axis in draw(name, run).axes:
        here = frame[frame.compression == axis.get_title("left")]
        assert sorted(x for x, _ in points(axis, RUN_MARKER)) == pytest.approx(sorted(here[column]))
        means = here.groupby("method")[column].mean()
        assert sorted(x for x, _ in points(axis, MEAN_MARKER)) == pytest.approx(sorted(means))
    same = draw(name, all_equal(run)).axes[0]
    assert len({y for _, y in points(same, RUN_MARKER)}) == len(here), "equal runs hide each other"


def test_every_pair_is_visible_on_one_scale(fake: Any) -> None:
    run = fake(3)
    pairs = exp.gather_evidence(run).pairs
    for axis, ratio in zip(draw("hpmkd_vs_direct", run).axes, run.settings.compression, strict=True):
        expected = [value for by_ratio in pairs.values() for value in by_ratio[ratio].differences]
        assert sorted(x for x, _ in points(axis, RUN_MARKER)) == pytest.approx(sorted(expected))
        low, high = axis.get_xlim()
        assert low < 0 < high and low <= min(expected) and high >= max(expected)
        zero = [line for line in axis.lines if list(line.get_xdata()) == [0, 0]]
        assert len(zero) == 1 and zero[0].get_color() == "black"


def test_methods_at_one_ratio_are_not_joined(fake: Any) -> None:
    for name in ("accuracy_vs_compression", "retention_analysis", "hpmkd_vs_direct"):
        for axis in draw(name, fake(3)).axes:
            colours = {exp.METHODS[method].look[0] for method in exp.MAIN_METHODS} - {"#000000"}
            assert all(line.get_linestyle() == "None" for line in axis.lines if line.get_color() in colours)


@pytest.mark.parametrize(
    "name",
    ["accuracy_vs_compression", "retention_analysis", "hpmkd_vs_direct", "ablation"],
)
def test_an_interval_needs_three_runs(name: str, fake: Any) -> None:
    assert not bars(draw(name, fake(2, ablation=True)))
    three = draw(name, fake(3, ablation=True))
    assert bars(three) and "95% t-interval" in texts(three)
    assert not bars(draw(name, all_equal(fake(3, ablation=True)))), "no spread, no interval"


def test_no_interval_reaches_beyond_what_is_possible(fake: Any) -> None:
    run = fake(3, ratios=("5x",))
    for number, accuracy in enumerate((1.0, 2.0, 30.0), start=1):
        change(run, f"student_5x_Direct_run{number}", test_accuracy=accuracy)
        change(run, f"student_5x_HPM-KD_run{number}", test_accuracy=100.0 - accuracy)
    ends = np.concatenate(bars(draw("accuracy_vs_compression", run)))[:, 0]
    assert ends.min() == 0 and ends.max() == 100
    teacher = exp.gather_evidence(run).teacher.test_accuracy
    ends = np.concatenate(bars(draw("retention_analysis", run)))[:, 0]
    assert ends.min() == 0 and ends.max() == pytest.approx(10_000 / teacher)


def test_one_long_interval_does_not_set_the_axis(fake: Any) -> None:
    run = fake(3)
    for number, accuracy in enumerate((85.0, 85.1, 91.0), start=1):
        change(run, f"student_7x_Direct_run{number}", test_accuracy=accuracy)
    figure = draw("hpmkd_vs_direct", run)
    low, high = figure.axes[0].get_xlim()
    ends = np.concatenate(bars(figure))[:, 0]
    assert ends.min() < low and ends.max() > high
    differences = [x for axis in figure.axes for x, _ in points(axis, RUN_MARKER)]
    assert low < min(differences) and high > max(differences)


# -- one figure at a time ----------------------------------------------------------------------------------------------
def test_ratios_are_named_as_in_the_text(fake: Any) -> None:
    for name in ("accuracy_vs_compression", "retention_analysis"):
        assert [axis.get_title("left") for axis in draw(name, fake(2)).axes] == ["2.3x", "5x", "7x"]


def test_the_teachers_line_carries_its_name(fake: Any) -> None:
    assert "teacher 92.4%" in texts(draw("accuracy_vs_compression", fake(2)))
    assert "teacher 100%" in texts(draw("retention_analysis", fake(2)))
    for axis in draw("accuracy_vs_compression", fake(2)).axes:
        assert any(list(line.get_xdata()) == [92.4, 92.4] for line in axis.lines)
    assert "teacher 9" not in texts(draw("accuracy_vs_compression", without(fake(2), "teacher")))


def test_learning_curves_show_every_run_and_the_networks_that_teach(fake: Any) -> None:
    run = fake(3)
    panels = {axis.get_title(): axis for axis in draw("learning_curves", run).axes}
    assert list(panels) == ["students 2.3x", "students 5x", "students 7x", "networks that teach"]
    thin = [line for line in panels["students 5x"].lines if line.get_linewidth() < 1]
    assert len(thin) == 3 * 3
    note = "Networks that teach: teacher solid, 1.5x dashed, 2.3x dashdot and 5x dotted."
    assert note in texts(draw("learning_curves", run))
    styles = [line.get_linestyle() for line in panels["networks that teach"].lines]
    assert styles == ["-", "--", "-.", ":"]


def test_one_epoch_has_whole_epochs_on_its_axis(fake: Any) -> None:
    axis = draw("learning_curves", fake(3, epochs=1)).axes[0]
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]
    assert all(line.get_marker() not in ("", "None") for line in axis.lines), "one epoch makes no line"


def test_costs_stand_where_they_are_and_hide_no_run(fake: Any) -> None:
    run = fake(3)
    for axis, ratio in zip(draw("cost_vs_accuracy", run).axes, run.settings.compression, strict=True):
        minutes = {name: cost / 60 for name, cost in exp.method_costs(run, ratio).total.items()}
        means = points(axis, MEAN_MARKER)
        assert sorted(x for x, _ in means) == pytest.approx(sorted(minutes.values()))
        assert len(points(axis, DASH)) == 3 * len(means), "dashes are wider than the mean's marker"
        assert {x for x, _ in points(axis, DASH)} == {x for x, _ in means}, "a run has another cost"


def test_calibration_shows_the_bins_and_the_mean_error_of_the_runs(fake: Any) -> None:
    run = fake(2, images=400)
    change(run, "student_5x_Direct_run1", test_ece=0.05)
    figure = draw("calibration", run)
    assert "ECE 4.0%" in texts(figure)
    panel = next(axis for axis in figure.axes if axis.get_title() == "ECE 4.0%")
    table = exp.calibration_bins(run.logits["student_5x_Direct_run1"], run.labels)
    table = table[table.share * 400 >= 20]
    assert any(list(line.get_ydata()) == list(table.accuracy) for line in panel.lines)
    run.logits = {}
    assert draw("calibration", run) is None


def test_the_temperature_is_drawn_only_if_it_moves(fake: Any) -> None:
    run = fake(2)
    assert [axis.get_title() for axis in draw("temperature", run).axes] == ["2.3x", "5x", "7x"]
    for name, record in run.records.items():
        change(run, name, history=[replace(epoch, temperature=4.0) for epoch in record.history])
    assert draw("temperature", run) is None


def test_the_ablation_names_its_arms_in_order_and_its_copies(fake: Any) -> None:
    run = fake(3, ablation=True, equal_cost=True)
    figure = draw("ablation", run)
    arms = exp.gather_evidence(run).extra_methods
    first = figure.axes[0]
    assert rows(first) == arms
    assert first.get_ylim()[0] > first.get_ylim()[1], "the first arm on top"
    assert "All at 0: the same as HPM-KD by construction." in texts(figure)
    copied = rows(first).index("HPM-KD-no-manager")  # at 2.3x and 7x the pilot kept the default
    for axis, is_copy in zip(figure.axes, (True, False, True), strict=True):
        values = [x for x, y in points(axis, RUN_MARKER) if copied < y < copied + 0.5]
        assert len(values) == 3 and (set(values) == {0.0}) == is_copy
    assert len(points(figure.axes[1], MEAN_MARKER)) == len(arms)
    for axis in figure.axes:
        assert axis.get_xlim() == first.get_xlim()
        assert any(list(line.get_xdata()) == [0, 0] for line in axis.lines)


def test_methods_can_be_told_apart_in_colour_in_grey_and_by_shape() -> None:
    from matplotlib.colors import to_rgb

    looks = [exp.METHODS[name].look for name in exp.MAIN_METHODS]
    rgb = [np.array(to_rgb(colour)) ** 2.2 for colour, _, _ in looks]
    grey = [float(np.dot((0.2126, 0.7152, 0.0722), values)) ** (1 / 2.2) for values in rgb]
    assert min(abs(a - b) for a, b in itertools.combinations(grey, 2)) > 0.2
    assert len({marker for _, marker, _ in looks}) == len({line for _, _, line in looks}) == 3
    everything = [method.look for method in exp.METHODS.values()]
    assert (
        len({colour for colour, _, _ in everything})
        == len({marker for _, marker, _ in everything})
        == len(everything)
    )


# -- the user's own plotting -------------------------------------------------------------------------------------------
def test_the_settings_of_the_process_are_left_alone(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    monkeypatch.setattr(exp, "FIGURES", {"temperature": exp.draw_temperature})
    evidence = exp.gather_evidence(fake(1, ratios=("5x",)))
    exp.draw_figures(evidence, tmp_path / "a")
    with matplotlib.rc_context(
        {"lines.linewidth": 9, "font.size": 30, "savefig.bbox": "tight", "backend": "svg"}
    ):
        before = matplotlib.rcParams.copy()
        exp.draw_figures(evidence, tmp_path / "b")
        for name in ("temperature.png", "temperature.pdf"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert matplotlib.rcParams.copy() == before


CHILD = """
import os, sys
from pathlib import Path

import run_exp1b_kaggle as exp
from fake_state import fake_run

assert not any(name.startswith(("matplotlib", "scipy.stats")) for name in sys.modules), "they are imported late"
exp.FIGURES = {"temperature": exp.draw_temperature}
before = dict(os.environ)
run = fake_run(Path(sys.argv[1]) / "run", 3, ratios=("5x",))
try:
    exp.write_outputs(run, figures=True)
except ValueError as error:  # logged by Run.save
    assert "nonsense" in str(error)
assert before == dict(os.environ) and "matplotlib.pyplot" not in sys.modules
"""
STYLED = "text.usetex: True\nlines.linewidth: 7\nfont.size: 30\nsavefig.bbox: tight\nbackend: svg\n"


def drawn_in_a_child(folder: Path, variables: dict[str, str], style: str = "") -> dict[str, bytes]:
    """The figures that a fresh process draws with these variables and this matplotlibrc; it has to write the report."""
    folder.mkdir()
    (folder / "matplotlibrc").write_text(style)
    here = [str(Path(exp.__file__).parent), str(Path(__file__).parent), *sys.path]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "MATPLOTLIB"))}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, here)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(folder)]
    subprocess.run(command, check=True, timeout=300, env={**kept, **paths, **variables}, cwd=folder)
    assert (folder / "run" / exp.REPORT_NAME).exists() and (folder / "run/results.csv").exists()
    return {path.name: path.read_bytes() for path in (folder / "run/figures").glob("*")}


def test_the_users_style_and_notebook_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp, "FIGURES", {"temperature": exp.draw_temperature})
    exp.draw_figures(exp.gather_evidence(fake_run(tmp_path / "run", 3, ratios=("5x",))), tmp_path / "plain")
    plain = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    assert set(plain) == {"temperature.png", "temperature.pdf"}
    assert plain == drawn_in_a_child(tmp_path / "styled", notebook, STYLED)


def test_a_matplotlib_that_cannot_be_imported_costs_the_figures_only(tmp_path: Path) -> None:
    assert drawn_in_a_child(tmp_path / "nonsense", {"MPLBACKEND": "nonsense"}) == {}
