"""Pages of teacher outputs: the same bytes whoever computes them, computed once, and lost or damaged without harm."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import do, open_lab, shortcuts, teacher
from toy import forbid, make_folder

import run_exp1b_kaggle as exp

NAME = "teacher_resnet50_SYNTHETIC"
HEAD = 40  # bytes in front of the logits: which page it is, and the seconds that it took


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> exp.Experiment:
    """An experiment with a finished teacher. Its scratch folder is not to be used: take `apart`."""
    lab = open_lab(tmp_path_factory.mktemp("taught") / "lab", teacher_epochs=1, train_size=400)
    with shortcuts():
        do(lab, teacher(lab))
    return lab


def apart(experiment: exp.Experiment, scratch: Path) -> exp.TeacherOutputs:
    """The outputs of a finished teacher with a scratch folder of their own."""
    return exp.TeacherOutputs(exp.dataclasses.replace(experiment, scratch=scratch))


def page_bytes(outputs: exp.TeacherOutputs, page: int) -> bytes:
    """The logits of a page as they lie on the disk."""
    outputs.page(NAME, page)
    return exp.read_sealed(outputs._folder(NAME) / f"page_{page:03d}")[HEAD:]


def test_a_page_holds_the_teachers_logits_for_its_views_in_image_order(taught: exp.Experiment, tmp_path: Path) -> None:
    """Against the unfolded network on another batch size, within fp16's rounding."""
    logits, seconds = apart(taught, tmp_path).page(NAME, 17)
    network = exp.load_student(taught.folder.model_file(NAME))[1]
    with torch.no_grad():
        parts = [network(taught.images.render(index, 17)) for index in torch.arange(360).split(77)]
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), torch.cat(parts), rtol=2e-3, atol=2e-3)
    assert seconds > 0


def test_the_bytes_do_not_depend_on_the_order(taught: exp.Experiment, tmp_path: Path) -> None:
    one, other = apart(taught, tmp_path / "one"), apart(taught, tmp_path / "other")
    pages = {number: page_bytes(one, number) for number in (3, 161, 0)}
    assert {number: page_bytes(other, number) for number in (0, 3, 161)} == pages
    assert len(set(pages.values())) == 3
    assert len(pages[0]) == 360 * 10 * 2


def fetch(experiment: exp.Experiment, scratch: Path, folder: Path) -> None:
    """In another process: get page 5, noting each computation."""
    compute = exp.TeacherOutputs._compute

    def slow(self: exp.TeacherOutputs, name: str, page: int) -> bytes:
        (folder / f"computed by {os.getpid()}").touch()
        time.sleep(0.5)
        return compute(self, name, page)

    exp.TeacherOutputs._compute = slow  # type: ignore[method-assign]
    logits, _ = apart(experiment, scratch).page(NAME, 5)
    (folder / f"bytes {os.getpid()}").write_bytes(logits.numpy().tobytes())


def test_processes_that_want_a_page_compute_it_once(taught: exp.Experiment, tmp_path: Path) -> None:
    """Three at the same time; and they get the bytes that this process computes by itself."""
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=fetch, args=(taught, tmp_path / "scratch", tmp_path)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(list(tmp_path.glob("computed by *"))) == 1
    assert {path.read_bytes() for path in tmp_path.glob("bytes *")} == {page_bytes(apart(taught, tmp_path / "own"), 5)}


def test_whoever_waits_for_a_page_can_be_stopped(taught: exp.Experiment, tmp_path: Path) -> None:
    lock, stop = tmp_path / "page.lock", threading.Event()

    def check() -> None:
        raise exp.Stopped("SIGTERM")

    with exp.file_lock(lock, check):
        with pytest.raises(exp.Stopped), exp.file_lock(lock, check):
            stop.set()
    assert not stop.is_set()
    with exp.file_lock(lock, check):
        pass


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[tuple[str, int]]:
    """How often each page has been computed: (teacher, page) -> times."""
    counter: collections.Counter[tuple[str, int]] = collections.Counter()
    compute = exp.TeacherOutputs._compute

    def counting(self: exp.TeacherOutputs, name: str, page: int) -> bytes:
        counter[name, page] += 1
        return compute(self, name, page)

    monkeypatch.setattr(exp.TeacherOutputs, "_compute", counting)
    return counter


def test_a_damaged_page_is_computed_again(taught: exp.Experiment, tmp_path: Path, computed: collections.Counter[tuple[str, int]]) -> None:
    outputs = apart(taught, tmp_path)
    good = page_bytes(outputs, 9)
    path = outputs._folder(NAME) / "page_009"
    sound = path.read_bytes()
    for times, damaged in enumerate((sound[:-1], sound[:100], b"", sound[:500] + b"?" + sound[501:]), 2):
        path.write_bytes(damaged)
        assert page_bytes(outputs, 9) == good
        assert computed[NAME, 9] == times
    assert page_bytes(outputs, 9) == good and computed[NAME, 9] == 5, "a sound one is not"


@pytest.mark.parametrize("damage", ["another page", "of another teacher", "sealed rubbish", "unreadable"])
def test_a_page_that_is_none_is_computed_again(
    taught: exp.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: collections.Counter[tuple[str, int]], damage: str
) -> None:
    """Sound files, but not the page: taken for it, they would teach something else without a word."""
    outputs = apart(taught, tmp_path)
    good, other = page_bytes(outputs, 9), page_bytes(outputs, 10)
    assert good != other
    path = outputs._folder(NAME) / "page_009"
    if damage == "another page":
        shutil.copyfile(path.with_name("page_010"), path)
    elif damage == "of another teacher":
        state = exp.copy.deepcopy(taught.state)
        state["jobs"][NAME]["weights_sha256"] = "0" * 64
        stranger = apart(exp.dataclasses.replace(taught, state=state), tmp_path)
        stranger.page(NAME, 9)
        shutil.copyfile(stranger._folder(NAME) / "page_009", path)
    elif damage == "sealed rubbish":
        exp.write_sealed(path, b"rubbish")
    else:
        forbid(monkeypatch, path)
    before = computed[NAME, 9]
    logits, _ = outputs.page(NAME, 9)
    assert computed[NAME, 9] == before + 1
    assert logits.numpy().tobytes() == good


def test_a_folder_in_the_place_of_a_page_is_one_line(taught: exp.Experiment, tmp_path: Path) -> None:
    outputs = apart(taught, tmp_path)
    outputs.page(NAME, 9)
    make_folder(outputs._folder(NAME) / "page_009")
    with pytest.raises(exp.UsageError, match=r"cannot write .*page_009"):
        outputs.page(NAME, 9)


def test_a_lost_scratch_folder_does_no_harm(taught: exp.Experiment, tmp_path: Path, computed: collections.Counter[tuple[str, int]]) -> None:
    outputs = apart(taught, tmp_path / "scratch")
    first = [page_bytes(outputs, number) for number in (1, 2)]
    shutil.rmtree(tmp_path / "scratch")
    assert [page_bytes(outputs, number) for number in (1, 2)] == first
    assert computed[NAME, 1] == 2


def test_pages_of_other_weights_data_seeds_precisions_and_threads_lie_elsewhere(taught: exp.Experiment, tmp_path: Path) -> None:
    state = exp.copy.deepcopy(taught.state)
    state["jobs"][NAME]["weights_sha256"] = "0" * 64
    data = {**taught.state, "data": {**taught.state["data"], "sha256": "0" * 64}}
    replace = exp.dataclasses.replace
    others = [
        taught,
        replace(taught, state=state),
        replace(taught, state=data),
        replace(taught, settings=replace(taught.settings, seed=7)),
        replace(taught, precision="bf16"),
        replace(taught, device=replace(taught.device, name="another")),
    ]
    folders = [exp.TeacherOutputs(other)._folder(NAME) for other in others]
    torch.set_num_threads(2)
    folders.append(exp.TeacherOutputs(taught)._folder(NAME))
    assert len(set(folders)) == 7


def test_a_whole_experiment_computes_every_distinct_page_once(tmp_path: Path, computed: collections.Counter[tuple[str, int]]) -> None:
    """All ratios, methods and runs, the chain and the pilots: as many passes of each teacher as there are distinct pages."""
    runs, epochs = 3, 9
    with shortcuts(1, steps=False) as patch:  # HPM-KD learns from all teachers above it
        patch.setattr(exp.Experiment, "infer", lambda _self, _network, images: torch.zeros(len(images), 10))  # whatever they say
        lab = open_lab(tmp_path / "lab", runs=runs, student_epochs=epochs, methods=("TraditionalKD", "HPM-KD"))
        records = do(lab)
    distinct = {page for run in range(1, runs + 1) for page in exp.page_order(42, run, epochs)}
    assert len(distinct) < runs * epochs, "runs share pages in this case"
    teachers = [NAME, "intermediate_2.3x_SYNTHETIC", "intermediate_5x_SYNTHETIC"]
    assert computed == dict.fromkeys(itertools.product(teachers, distinct), 1)
    check_recorded_pages(records, epochs)


def check_recorded_pages(records: dict[str, Any], epochs: int) -> None:
    """The records name the pages that were used, each with the seconds that it cost when it was computed."""
    chains = {"2.3x": [NAME], "5x": [NAME, "intermediate_2.3x_SYNTHETIC"]}
    chains["7x"] = [*chains["5x"], "intermediate_5x_SYNTHETIC"]
    cost: dict[tuple[str, str], set[float]] = collections.defaultdict(set)
    for record in records.values():
        for name, pages in record.get("pages", {}).items():
            for page, seconds in pages.items():
                cost[name, page].add(seconds)
        if record["kind"] == "student":
            chain = chains[record["compression"]] if record["method"] == "HPM-KD" else [NAME]
            pages = set(map(str, exp.page_order(42, record["run"], epochs)))
            assert {name: set(used) for name, used in record["pages"].items()} == dict.fromkeys(chain, pages)
    assert all(len(seconds) == 1 and min(seconds) > 0 for seconds in cost.values()), "one cost, known to all who used it"


def test_direct_needs_no_page(tmp_path: Path, computed: collections.Counter[tuple[str, int]]) -> None:
    with shortcuts(steps=False):
        records = do(open_lab(tmp_path / "lab", methods=("Direct",)))
    assert not computed
    assert sorted(record["kind"] for record in records.values()) == ["student"] * 3 + ["teacher"]
