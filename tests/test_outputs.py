"""Pages of teacher outputs: the same bytes whoever computes them, computed once, and lost or damaged without harm."""

from __future__ import annotations

import collections
import multiprocessing
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from lab import do, open_lab, shortcuts, teacher
from toy import forbid, make_folder

import run_exp1b_kaggle as exp

pytestmark = pytest.mark.usefixtures("small_networks")

Computed = collections.Counter[tuple[str, int]]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> exp.Experiment:
    """An experiment with a finished teacher. Its scratch folder is not to be used: take `apart`."""
    lab = open_lab(tmp_path_factory.mktemp("taught") / "lab", teacher_epochs=1)
    with shortcuts():
        do(lab, teacher(lab))
    return lab


def apart(experiment: exp.Experiment, scratch: Path) -> exp.TeacherOutputs:
    """The outputs of a finished teacher with a scratch folder of their own."""
    store = exp.PageStore(scratch)
    store.places = [scratch]
    return exp.TeacherOutputs(experiment, store)


def page(outputs: exp.TeacherOutputs, number: int) -> bytes:
    """The teacher's logits for a page."""
    return outputs.page(("teacher",), number).numpy().tobytes()


def page_file(outputs: exp.TeacherOutputs, number: int) -> Path:
    return outputs.store.places[0] / outputs.key(teacher(outputs.experiment)) / f"page_{number:03d}_logits"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """How often each page has been computed: (teacher, page) -> times."""
    counter: Computed = collections.Counter()
    compute = exp.TeacherOutputs._compute

    def counting(self: exp.TeacherOutputs, job: exp.Job, number: int) -> dict[str, torch.Tensor]:
        counter[job.network, number] += 1
        return compute(self, job, number)

    monkeypatch.setattr(exp.TeacherOutputs, "_compute", counting)
    return counter


def test_a_page_holds_the_teachers_logits_for_its_views_in_image_order(
    taught: exp.Experiment, tmp_path: Path
) -> None:
    """Against the unfolded network on another batch size, within fp16's rounding."""
    logits = apart(taught, tmp_path).page(("teacher",), 17)[0]
    network = exp.load_student(taught.run.file(teacher(taught)))[1]
    with torch.no_grad():
        parts = [
            network(taught.images.render(index, 17)) for index in torch.arange(len(taught.images)).split(77)
        ]
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), torch.cat(parts), rtol=2e-3, atol=2e-3)


def test_the_bytes_do_not_depend_on_the_order(taught: exp.Experiment, tmp_path: Path) -> None:
    one, other = apart(taught, tmp_path / "one"), apart(taught, tmp_path / "other")
    pages = {number: page(one, number) for number in (3, 161, 0)}
    assert {number: page(other, number) for number in (0, 3, 161)} == pages
    assert len(set(pages.values())) == 3


def fetch(experiment: exp.Experiment, scratch: Path, folder: Path) -> None:
    """In another process: get page 5, noting each computation."""
    compute = exp.TeacherOutputs._compute

    def slow(self: exp.TeacherOutputs, job: exp.Job, number: int) -> dict[str, torch.Tensor]:
        (folder / f"computed by {os.getpid()}").touch()
        time.sleep(0.5)
        return compute(self, job, number)

    exp.TeacherOutputs._compute = slow  # type: ignore[method-assign]
    (folder / f"bytes {os.getpid()}").write_bytes(page(apart(experiment, scratch), 5))


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
    assert {path.read_bytes() for path in tmp_path.glob("bytes *")} == {
        page(apart(taught, tmp_path / "own"), 5)
    }


def test_whoever_waits_for_a_page_can_be_stopped(tmp_path: Path) -> None:
    def check() -> None:
        raise exp.Stopped("SIGTERM")

    one, other = exp.PageStore(tmp_path), exp.PageStore(tmp_path)
    one.places = other.places = [tmp_path / "pages"]
    with one.claim("teacher", 3) as held, other.claim("teacher", 3) as held_too:
        assert (held, held_too) == (True, False), "without waiting it is left to who has it"
        with pytest.raises(exp.Stopped), other.claim("teacher", 3, check):
            pytest.fail("two hold the lock")


def other_page(outputs: exp.TeacherOutputs, path: Path) -> None:
    page(outputs, 10)
    shutil.copyfile(path.with_name("page_010_logits"), path)


DAMAGES = {
    "cut": lambda outputs, path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda outputs, path: path.write_bytes(b""),
    "another page": other_page,
    "sealed rubbish": lambda outputs, path: exp.write_sealed(path, b"rubbish"),
    "no page": lambda outputs, path: exp.save_checkpoint(
        path, {"page": [path.parent.name, 9, "logits"], "values": [1]}
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_page_that_is_none_is_computed_again(
    taught: exp.Experiment, tmp_path: Path, computed: Computed, damage: str
) -> None:
    """Taken for the page, it would teach something else without a word."""
    outputs = apart(taught, tmp_path)
    good = page(outputs, 9)
    DAMAGES[damage](outputs, page_file(outputs, 9))
    assert page(outputs, 9) == good
    assert computed["teacher", 9] == 2
    assert page(outputs, 9) == good
    assert computed["teacher", 9] == 2, "a sound one is not"


def test_an_unreadable_page_is_computed_again(
    taught: exp.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = apart(taught, tmp_path)
    good = page(outputs, 9)
    forbid(monkeypatch, page_file(outputs, 9))
    assert page(outputs, 9) == good


@pytest.mark.parametrize("place", ["a folder in the place of the page", "a file in the place of the folder"])
def test_where_pages_cannot_be_kept_the_next_place_is_used(
    taught: exp.Experiment, tmp_path: Path, computed: Computed, place: str
) -> None:
    outputs = apart(taught, tmp_path / "scratch")
    outputs.store.places.append(tmp_path / "elsewhere")
    good = page(outputs, 9)
    if place.startswith("a folder"):
        make_folder(page_file(outputs, 9))
    else:
        shutil.rmtree(tmp_path / "scratch")
        (tmp_path / "scratch").write_text("mine")
    assert page(outputs, 9) == page(outputs, 9) == good
    assert outputs.store.usable == [tmp_path / "elsewhere"]
    outputs.store.places.clear()
    assert page(outputs, 9) == good, "without any place a page is computed whenever it is needed"


def test_what_a_full_place_holds_is_used_and_removed(
    taught: exp.Experiment, tmp_path: Path, computed: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = apart(taught, tmp_path / "scratch")
    outputs.store.places.append(tmp_path / "elsewhere")
    good = page(outputs, 1)
    write = exp.write_atomic

    def full(path: Path, payload: bytes) -> None:
        if path.is_relative_to(tmp_path / "scratch"):
            raise exp.DiskFull("no room")
        write(path, payload)

    monkeypatch.setattr(exp, "write_atomic", full)
    for number in (2, 3):
        page(outputs, number)
    assert page(outputs, 1) == good and computed["teacher", 1] == 1
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*_logits")) == [
        "page_002_logits",
        "page_003_logits",
    ]
    outputs.store.remove([outputs.key(teacher(taught))])
    assert list(tmp_path.rglob("*_logits")) == []


def test_waiting_for_another_process_is_no_training(taught: exp.Experiment, tmp_path: Path) -> None:
    """The seconds count among those of the teacher outputs, which the clock leaves out."""
    outputs = apart(taught, tmp_path)
    folder = tmp_path / outputs.key(teacher(taught))
    folder.mkdir()
    lock = filelock.FileLock(folder / "page_005.lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.6, lock.release).start()
    started, begun = outputs.clock(), time.perf_counter()
    page(outputs, 5)
    assert outputs.seconds > 0.5
    assert outputs.clock() - started < time.perf_counter() - begun - 0.5


def test_pages_of_a_killed_run_go_after_some_days(tmp_path: Path) -> None:
    place = exp.PageStore(tmp_path).places[0]
    for name, days in (("old", 4), ("new", 2)):
        (place / name).mkdir(parents=True)
        (place / name / "page_001_logits").touch()
        os.utime(place / name, (time.time() - days * 86_400,) * 2)
    exp.PageStore(tmp_path)
    assert [folder.name for folder in place.iterdir()] == ["new"]


def test_a_lost_scratch_folder_does_no_harm(
    taught: exp.Experiment, tmp_path: Path, computed: Computed
) -> None:
    outputs = apart(taught, tmp_path / "scratch")
    first = [page(outputs, number) for number in (1, 2)]
    shutil.rmtree(tmp_path / "scratch")
    assert [page(outputs, number) for number in (1, 2)] == first
    assert computed["teacher", 1] == 2


def test_pages_of_other_weights_data_seeds_precisions_and_threads_lie_elsewhere(
    taught: exp.Experiment,
) -> None:
    def key(**changes: object) -> str:
        experiment = exp.copy.copy(taught)
        experiment.run = exp.copy.copy(taught.run)
        for name, value in changes.items():
            setattr(experiment if hasattr(experiment, name) else experiment.run, name, value)
        return exp.TeacherOutputs(experiment, taught.outputs.store).key(teacher(taught))

    name = teacher(taught).name
    record, index = taught.run.records[name], taught.run.index
    keys = [
        key(),
        key(records={name: replace(record, weights_sha256="0" * 64)}),
        key(index=replace(index, data=replace(index.data, sha256="0" * 64))),
        key(settings=replace(taught.settings, seed=7)),
        key(precision="bf16"),
        key(device=replace(taught.device, name="another")),
    ]
    torch.set_num_threads(2)
    keys.append(key())
    assert len(set(keys)) == 7


def say_nothing(_self: exp.Experiment, network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Instead of inference: zeros of the right size."""
    return torch.zeros(len(images), sum(getattr(network, "sizes", {"logits": 10}).values()))


def test_a_whole_experiment_computes_every_distinct_page_once(tmp_path: Path, computed: Computed) -> None:
    """All ratios, methods and runs, the chain and the pilots: as many passes of each teacher as there are distinct pages."""
    runs, epochs = 3, 9
    with shortcuts(0, steps=False) as patch:
        patch.setattr(exp.Experiment, "infer", say_nothing)
        lab = open_lab(
            tmp_path / "lab", runs=runs, student_epochs=epochs, methods=("TraditionalKD", "HPM-KD")
        )
        records = do(lab)
    assert all(record.done for record in records.values())
    distinct = {number for run in range(1, runs + 1) for number in exp.page_order(42, run, epochs)}
    assert len(distinct) < runs * epochs, "runs share pages in this case"
    chain = exp.HPMKD.teachers("7x")  # the students learn from all of it, on the pages of every run
    assert computed == {(network, number): 1 for network in chain for number in distinct}


def test_direct_needs_no_page(tmp_path: Path, computed: Computed) -> None:
    with shortcuts(steps=False):
        records = do(open_lab(tmp_path / "lab", methods=("Direct",)))
    assert not computed
    assert sorted(record.kind for record in records.values()) == ["student"] * 3 + ["teacher"]
