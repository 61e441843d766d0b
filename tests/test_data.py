"""Where data comes from, what is refused, and SYNTHETIC. No test needs the network or the real CIFAR."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10, CIFAR100

import run_exp1b_kaggle as exp

PER_CLASS = 30


def md5(payload: bytes) -> str:
    return hashlib.md5(payload).hexdigest()


def tar_gz(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


class Tiny:
    """A data set in CIFAR's format with a torchvision reader that knows its md5s: 300 training and 20 test images."""

    def __init__(self, base: type[CIFAR10], label_key: str) -> None:
        rng = np.random.default_rng(1)
        names = [file for file, _ in base.train_list + base.test_list]
        self.files: dict[str, bytes] = {}
        for file in names:
            count = 20 if "test" in file else 10 * PER_CLASS // len(base.train_list)
            images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            batch = {"data": images, label_key: [i % 10 for i in range(count)]}
            self.files[file] = pickle.dumps(batch, protocol=2)
        classes = [f"class {i}" for i in range(10)]
        self.files[base.meta["filename"]] = pickle.dumps({base.meta["key"]: classes}, protocol=2)
        self.archive = tar_gz({f"{base.base_folder}/{file}": payload for file, payload in self.files.items()})
        self.folder, self.archive_name = base.base_folder, base.filename
        self.reader = self.known(base)

    def known(self, base: type[CIFAR10]) -> type[CIFAR10]:
        """A subclass of the torchvision reader that expects the md5s of these files."""
        sums = {file: md5(payload) for file, payload in self.files.items()}
        fields: dict[str, Any] = {
            "train_list": [[file, sums[file]] for file, _ in base.train_list],
            "test_list": [[file, sums[file]] for file, _ in base.test_list],
            "meta": {**base.meta, "md5": sums[base.meta["filename"]]},
            "tgz_md5": md5(self.archive),
            "url": "http://127.0.0.1:9/unreachable",
        }
        return type("TinyReader", (base,), fields)

    def write(self, folder: Path, **changed: bytes | None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for file, payload in {**self.files, **changed}.items():
            if payload is not None:
                (folder / file).write_bytes(payload)
        return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return install(monkeypatch, "CIFAR10", CIFAR10, "labels")


@pytest.fixture
def tiny100(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    return install(monkeypatch, "CIFAR100", CIFAR100, "fine_labels")


def install(monkeypatch: pytest.MonkeyPatch, name: str, base: type[CIFAR10], key: str) -> Tiny:
    data = Tiny(base, key)
    monkeypatch.setitem(exp.READERS, name, data.reader)
    monkeypatch.setitem(exp.MIRRORS, name, ())
    return data


@pytest.fixture(autouse=True)
def _log_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier test has done to the log."""
    monkeypatch.setattr(exp.log, "propagate", True)


def load(tmp: Path, name: str = "CIFAR10", **options: Any) -> exp.RawData:
    """The data set from tmp/input, or downloaded into tmp/run/data."""
    given = {
        "folders": [tmp / "run/data", tmp / "input"],
        "download_to": tmp / "run/data",
        "size": None,
        "seed": 42,
    }
    return exp.load_data(name, **{"check": lambda: None, **given, **options})


def load_from(folder: Path) -> exp.RawData:
    """What --data-dir does: this folder, or an error."""
    return exp.load_data("CIFAR10", [folder], None, None, 42, lambda: None)


# ---- Finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", ["cifar-10-batches-py", "datasets/owner/slug/cifar-10-batches-py", "other name"]
)
def test_batch_files_are_found_at_any_depth_in_a_folder_of_any_name(
    tiny: Tiny, tmp_path: Path, place: str
) -> None:
    tiny.write(tmp_path / "input" / place)
    data = load(tmp_path)
    assert data.train_pixels.shape == (300, 32, 32, 3) and data.train_pixels.dtype == np.uint8
    assert data.test_pixels.shape == (20, 32, 32, 3) and data.test_pixels.flags.c_contiguous
    assert data.train_labels.dtype == np.int64 and data.train_labels[:12].tolist() == [*range(10), 0, 1]
    assert data.classes == tuple(f"class {i}" for i in range(10))
    first = pickle.loads(tiny.files["data_batch_1"])["data"][0]
    assert (data.train_pixels[0] == first.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert place in data.source
    assert not (tmp_path / "run").exists(), "nothing had to be stored"


def test_cifar100_with_its_files_at_the_root_of_the_mount(tiny100: Tiny, tmp_path: Path) -> None:
    tiny100.write(tmp_path / "input" / "datasets" / "fedesoriano" / "cifar100")
    assert load(tmp_path, "CIFAR100").train_labels.shape == (300,)


def test_an_archive_in_a_read_only_mount_is_read_in_memory(tiny: Tiny, tmp_path: Path) -> None:
    mount = tmp_path / "input" / "slug"
    mount.mkdir(parents=True)
    (mount / tiny.archive_name).write_bytes(tiny.archive)
    mount.chmod(0o555)
    try:
        data = load(tmp_path)
    finally:
        mount.chmod(0o755)
    assert left_in(tmp_path) == ["input", "input/slug", f"input/slug/{tiny.archive_name}"], (
        "nothing is unpacked"
    )
    assert load_from(tiny.write(tmp_path / "folder")).sha256 == data.sha256


def test_earlier_sources_win(tiny: Tiny, tmp_path: Path) -> None:
    tiny.write(tmp_path / "first" / "a")
    tiny.write(tmp_path / "input" / "b")
    folders = [tmp_path / "missing", tmp_path / "first", tmp_path / "input"]
    assert str(tmp_path / "first") in load(tmp_path, folders=folders).source


def test_symlink_loops_and_unreadable_folders_do_no_harm(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "input"
    tiny.write(root / "z" / "data")
    (root / "a").symlink_to(root, target_is_directory=True)
    (root / "z" / "up").symlink_to(root / "z", target_is_directory=True)
    (root / "b").mkdir(mode=0o000)
    assert load(tmp_path).train_labels.size == 300
    assert sum(1 for _ in exp.walk(root)) <= 4
    (root / "b").chmod(0o755)


def test_a_link_to_the_data_is_followed(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "slug").symlink_to(tiny.write(tmp_path / "cache" / "v1"), target_is_directory=True)
    assert load(tmp_path).train_labels.size == 300


# ---- What is refused -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_hostile_pickle_is_never_executed(
    tiny: Tiny, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    hostile = pickle.dumps(Bomb(tmp_path / "executed"))
    tiny.write(tmp_path / "input" / "a", **{file: hostile})
    with pytest.raises(exp.UsageError, match="CIFAR10 was not found"):
        load(tmp_path)
    assert f"{tmp_path / 'input' / 'a' / file} ({len(hostile)} bytes) has the wrong md5" in caplog.text
    tiny.write(tmp_path / "input" / "b")
    assert "input/b" in load(tmp_path).source, "the search goes on"
    assert not (tmp_path / "executed").exists()
    pickle.loads(hostile)
    assert (tmp_path / "executed").exists(), "the bomb works"


def test_the_bytes_that_were_checked_are_the_ones_that_are_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is exchanged after it was read changes nothing: it is not opened a second time."""
    folder, read = tiny.write(tmp_path / "input" / "a"), Path.read_bytes

    def read_then_exchange(path: Path) -> bytes:
        content = read(path)
        if path.parent == folder:
            path.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
        return content

    monkeypatch.setattr(Path, "read_bytes", read_then_exchange)
    assert load(tmp_path).train_labels.size == 300
    assert not (tmp_path / "executed").exists()


def test_a_broken_archive_is_skipped(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / tiny.archive_name).write_bytes(tiny.archive[:-50])
    with pytest.raises(exp.UsageError):
        load(tmp_path)
    assert tiny.archive_name in caplog.text and "wrong md5" in caplog.text


def test_an_archive_that_reaches_outside_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Members are read in memory, by their names; other members, and what they are called, do not matter."""
    evil = tarfile.TarInfo("link")
    evil.type, evil.linkname = tarfile.SYMTYPE, "/etc"
    files = {f"{tiny.folder}/{file}": payload for file, payload in tiny.files.items()}
    archive = tar_gz({**files, "../outside": b"1", "/tmp/exp1b-outside": b"1"}, evil)
    tiny.reader.tgz_md5 = md5(archive)
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / tiny.archive_name).write_bytes(archive)
    assert load(tmp_path).train_labels.size == 300
    assert left_in(tmp_path) == ["input", f"input/{tiny.archive_name}"]
    assert not Path("/tmp/exp1b-outside").exists()


def test_data_dir_says_what_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(exp.UsageError, match=r"there is no folder .*nowhere"):
        load_from(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        exp.UsageError, match=r"no such file in .*empty.*data_batch_1.*cifar-10-python.tar.gz"
    ):
        load_from(tmp_path / "empty")
    with pytest.raises(exp.UsageError, match="lacking lacks data_batch_4"):
        load_from(tiny.write(tmp_path / "lacking", data_batch_4=None))
    wrong = tiny.write(tmp_path / "wrong", data_batch_2=b"x")
    with pytest.raises(
        exp.UsageError, match=rf"data_batch_2 \(1 bytes\) has the wrong md5 .{md5(b'x')} instead"
    ) as caught:
        load_from(wrong)
    assert "\n" not in str(caught.value)


def test_a_remedy_fits_what_was_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    """Who gave --data-dir is not told to give it."""
    with pytest.raises(exp.UsageError) as caught:
        load_from(tmp_path)
    assert "Give the --data-dir that holds it, or leave --data-dir out" in str(caught.value)
    assert "Add Input" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_what_numpy_says_about_the_files_of_numpy_1_is_not_shown(tiny: Tiny, tmp_path: Path) -> None:
    """CIFAR's files have `dtype("u1", 0, ...)` in them, where numpy 2.4 wants a boolean."""
    for file in list(tiny.files):
        tiny.files[file] = tiny.files[file].replace(b"\x89\x88", b"K\x00\x88")
    assert any(b"K\x00\x88" in payload for payload in tiny.files.values())
    tiny.reader.train_list = tiny.known(CIFAR10).train_list
    tiny.reader.test_list = tiny.known(CIFAR10).test_list
    tiny.write(tmp_path / "input")
    assert load(tmp_path).train_labels.size == 300


def test_data_dir_alone_is_searched(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --data-dir nothing else is taken and nothing is downloaded."""
    from toy import TOY

    (tmp_path / "empty").mkdir()
    assert exp.main([*TOY, "--data-dir", str(tmp_path / "empty")]) == 2
    assert "no such file in" in capsys.readouterr().out.splitlines()[-1]
    assert list(toy.glob("exp1b*")) == []


# ---- Downloading -----------------------------------------------------------------------------------------------------


class Server:
    """A local web server; `replies` maps a path to a body or to a function that writes the reply itself."""

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                reply = outer.replies.get(self.path)
                if callable(reply):
                    reply(self)
                elif reply is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Any:
    running = Server()
    yield running
    running.server.shutdown()


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_mirrors_first_then_home_and_only_verified_files_stay(
    tiny: Tiny,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.replies = {"/bad": b"<html>log in</html>", "/home": tiny.archive}
    monkeypatch.setitem(exp.MIRRORS, "CIFAR10", (f"{server.url}/missing", f"{server.url}/bad"))
    monkeypatch.setattr(tiny.reader, "url", f"{server.url}/home")
    data = load(tmp_path)
    assert server.asked == ["/missing", "/bad", "/home"]
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "404" in said and "19 bytes) has the wrong md5" in said
    assert left_in(tmp_path / "run" / "data") == [tiny.archive_name]
    server.replies.clear()
    assert load(tmp_path).sha256 == data.sha256, "the next run finds it on the disk"


def test_a_download_that_is_wrong_does_not_stay(tiny: Tiny, tmp_path: Path, server: Server) -> None:
    server.replies = {"/home": b"<html>log in</html>"}
    tiny.reader.url = f"{server.url}/home"
    with pytest.raises(exp.UsageError, match="wrong md5"):
        load(tmp_path)
    assert left_in(tmp_path / "run" / "data") == []


def test_when_nothing_works_the_remedies_are_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(
        exp.UsageError, match=r"not downloaded.*attach.*pankrzysiu/cifar10-python.*Internet on.*--data-dir"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and left_in(tmp_path / "run" / "data") == []


class Stop(Exception):
    """What a signal or the session clock raises from `check`."""


def stop_after(seconds: float) -> Any:
    begun = time.monotonic()

    def check() -> None:
        if time.monotonic() - begun > seconds:
            raise Stop

    return check


def drip(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    for _ in range(600):
        try:
            handler.wfile.write(b"x")
            time.sleep(0.05)
        except OSError:
            return


def silent(handler: Any) -> None:
    time.sleep(20)


def test_a_stop_is_obeyed_while_a_download_goes_on_and_leaves_nothing(
    tiny: Tiny, tmp_path: Path, server: Server
) -> None:
    server.replies = {"/home": drip}
    tiny.reader.url = f"{server.url}/home"
    with pytest.raises(Stop):
        load(tmp_path, check=stop_after(0.3))
    assert left_in(tmp_path / "run" / "data") == []


@pytest.mark.parametrize(("reply", "limit"), [(drip, "HOME_SECONDS"), (silent, "STALL_SECONDS")])
def test_a_slow_or_silent_source_is_given_up(
    tiny: Tiny, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, reply: Any, limit: str
) -> None:
    server.replies = {"/home": reply}
    tiny.reader.url = f"{server.url}/home"
    monkeypatch.setattr(exp, limit, 1.0)
    with pytest.raises(exp.UsageError, match=r"slow|timed out"):
        load(tmp_path)
    assert left_in(tmp_path / "run" / "data") == []


def test_a_connection_that_breaks_off_and_a_flood_leave_nothing(
    tiny: Tiny,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def breaks_off(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(tiny.archive)))
        handler.end_headers()
        handler.wfile.write(tiny.archive[:1000])

    server.replies = {"/half": breaks_off, "/flood": bytes(3_000_000)}
    monkeypatch.setitem(exp.MIRRORS, "CIFAR10", (f"{server.url}/half", f"{server.url}/flood"))
    monkeypatch.setattr(exp, "FILE_LIMIT", 2_000_000)
    with pytest.raises(exp.UsageError):
        load(tmp_path)
    assert "the connection ended after 1,000" in caplog.text and "too large" in caplog.text
    assert left_in(tmp_path / "run" / "data") == []


def test_a_folder_that_cannot_be_made_is_not_taken_for_a_network_error(
    tiny: Tiny, tmp_path: Path, server: Server
) -> None:
    server.replies = {"/home": tiny.archive}
    tiny.reader.url = f"{server.url}/home"
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(exp.UsageError, match=r"cannot create .*run"):
        load(tmp_path)


# ---- Size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200, 205, 299, 300])
def test_a_subset_is_stratified_and_fixed_by_the_seed(tiny: Tiny, tmp_path: Path, size: int) -> None:
    tiny.write(tmp_path / "input")
    whole, part = load(tmp_path), load(tmp_path, size=size)
    counts = np.bincount(part.train_labels)
    assert len(part.train_labels) == size and counts.max() - counts.min() <= 1
    assert (part.test_pixels == whole.test_pixels).all()
    assert load(tmp_path, size=size).sha256 == part.sha256
    assert (load(tmp_path, size=size, seed=7).sha256 == part.sha256) == (size == 300)
    rows = {
        image.tobytes(): label for image, label in zip(whole.train_pixels, whole.train_labels, strict=True)
    }
    assert all(
        rows[i.tobytes()] == label for i, label in zip(part.train_pixels, part.train_labels, strict=True)
    )
    assert len({image.tobytes() for image in part.train_pixels}) == size


@pytest.mark.parametrize("size", [-1, 0, 199, 301])
def test_a_size_that_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path, size: int) -> None:
    tiny.write(tmp_path / "input")
    with pytest.raises(exp.UsageError, match=f"--train-size {size} .*at least 200 .*at most 300"):
        load(tmp_path, size=size)


@pytest.mark.parametrize("size", [0, 199, 100_001])
def test_a_size_that_synthetic_does_not_draw_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(exp.UsageError, match="--train-size"):
        load(tmp_path, "SYNTHETIC", size=size)


def test_the_hash_covers_pixels_and_labels() -> None:
    pixels, labels = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)
    hashes = set()
    for part in range(4):
        for change in (0, 1):
            arrays = [pixels.copy(), labels.copy(), pixels.copy(), labels.copy()]
            arrays[part].flat[-1] = change
            raw = exp.RawData("X", ("a",), *arrays, "")
            hashes.add(raw.sha256)
    assert len(hashes) == 5


# ---- SYNTHETIC -------------------------------------------------------------------------------------------------------


def test_synthetic_images_are_all_different_and_classes_can_be_told_apart(tmp_path: Path) -> None:
    """The mean images of the classes alone recognise three times as many test images as guessing."""
    data = load(tmp_path, "SYNTHETIC", size=600)
    assert data.train_pixels.dtype == np.uint8 and data.train_pixels.shape == (600, 32, 32, 3)
    assert data.train_labels.dtype == np.int64
    together = [*data.train_pixels, *data.test_pixels]
    assert len({image.tobytes() for image in together}) == len(together)
    means = np.stack([data.train_pixels[data.train_labels == k].mean(0).ravel() for k in range(10)])
    means /= np.linalg.norm(means - means.mean(0), axis=1, keepdims=True)
    tests = data.test_pixels.reshape(len(data.test_pixels), -1) - data.train_pixels.mean(0).ravel()
    assert ((tests @ means.T).argmax(1) == data.test_labels).mean() > 0.3


def test_synthetic_is_balanced_needs_no_file_and_has_a_fitting_test_set(tmp_path: Path) -> None:
    data = load(tmp_path, "SYNTHETIC", size=205)
    counts = np.bincount(data.train_labels)
    assert len(data.classes) == 10 and counts.tolist() == [21] * 5 + [20] * 5
    assert len(data.test_labels) == 1_000 and set(np.bincount(data.test_labels)) == {100}
    assert "seed 42" in data.source and list(tmp_path.iterdir()) == []
    assert load(tmp_path, "SYNTHETIC", size=205).sha256 == data.sha256
    assert load(tmp_path, "SYNTHETIC", size=205, seed=43).sha256 != data.sha256


@pytest.mark.skipif(
    "EXP1B_CIFAR" not in os.environ, reason="EXP1B_CIFAR names no folder with the real CIFAR-10"
)
def test_the_real_cifar10(tmp_path: Path) -> None:
    data = load_from(Path(os.environ["EXP1B_CIFAR"]))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert set(np.bincount(data.train_labels)) == {5000} and set(np.bincount(data.test_labels)) == {1000}
    assert data.train_pixels.reshape(-1, 3).mean(axis=0) / 255 == pytest.approx(
        [0.4914, 0.4822, 0.4465], abs=1e-4
    )
