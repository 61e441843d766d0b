"""Shared by all tests: the script on the path, one thread, and tiny experiments that take seconds."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes that share two cores must not spin
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import run_exp1b_kaggle as exp  # noqa: E402

# One ratio, one run, two assistants: about ten seconds.
SMALL = [
    "--mode", "smoke", "--width", "8", "--train-size", "400", "--batch-size", "60", "--lr", "0.05", "--teacher-epochs", "2",
    "--student-epochs", "2", "--compression", "5x", "--runs", "1", "--threads", "1", "--device", "cpu",
]  # fmt: skip
SIGNALS = [getattr(signal, name) for name in exp.Session.SIGNALS]


def pytest_configure() -> None:
    """No fsync: what the tests write need not survive a power cut, and waiting for the disk was a fifth of their time."""
    os.fsync = lambda _: None  # type: ignore[assignment]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that the processes of pytest-xdist end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bit-equal arithmetic, and a scratch folder of teacher outputs that no other test shares."""
    torch.set_num_threads(1)
    monkeypatch.setattr(exp.Training, "SAVE_SECONDS", 0.0)  # every epoch is saved
    monkeypatch.setattr(exp.tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Every test starts with the usual handlers, whatever was ignored where the tests were started, and leaves what it found."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def small_networks() -> Iterator[None]:
    """Networks of one block per stage that see a quarter of the pixels, for modules that do not look at the networks."""
    from toy import cut_networks

    with pytest.MonkeyPatch.context() as patch:
        cut_networks(patch)
        yield


@pytest.fixture(scope="module")
def shallow_networks() -> Iterator[None]:
    """Networks of one block per stage, whose features have the sizes of the real ones."""
    from toy import cut_networks

    with pytest.MonkeyPatch.context() as patch:
        cut_networks(patch, all_pixels=True)
        yield


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in while every experiment is a toy of two seconds (toy.py)."""
    from toy import install_toy

    install_toy(monkeypatch, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def kaggle(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Kaggle batch session: its root, with an empty /kaggle/working and no inputs."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    (tmp_path / "kaggle/working").mkdir(parents=True)
    (tmp_path / "kaggle/input").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy. Read only: copy it before changing anything."""
    from toy import install_toy, new_toy

    folder = tmp_path_factory.mktemp("toy") / "exp1b_smoke_20260102_000000"
    with pytest.MonkeyPatch.context() as patch:
        install_toy(patch, folder.parent)
        assert new_toy(folder) == 0
    return folder


@pytest.fixture
def copied(toy: Path, toy_run: Path) -> Path:
    """A copy of a finished toy, to be damaged."""
    shutil.copytree(toy_run, toy / "run")
    return toy / "run"


@pytest.fixture
def redone(monkeypatch: pytest.MonkeyPatch, toy_run: Path) -> list[str]:
    """The jobs that are done again; doing one means copying its file from the undamaged run."""
    names: list[str] = []

    def again(experiment: exp.Experiment, job: exp.Job) -> None:
        names.append(job.name)
        target = experiment.run.file(job)
        shutil.copyfile(toy_run / "checkpoints" / target.name, target)

    monkeypatch.setattr(exp, "do_job", again)
    return names


@pytest.fixture(scope="session")
def half_trained(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished toy whose Direct student has only two of its three epochs. Read only."""
    from lab import stop_before_epoch
    from toy import DIRECT, install_toy, resume

    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exp.Training, "SAVE_SECONDS", 0.0)
        install_toy(patch, folder.parent)
        shutil.copytree(toy_run, folder)
        (folder / f"checkpoints/{DIRECT}.pt").unlink()
        stop_before_epoch(patch, 2)
        assert resume(folder) == 0
    return folder


def results_without_times(folder: Path) -> str:
    """results.csv without the columns that hold times: what two runs of the same experiment must agree on digit for digit."""
    table = exp.pd.read_csv(folder / "results.csv", dtype=str)
    return str(table.drop(columns=["train_seconds", "images_per_second"]).to_csv(index=False))
