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


def load(tmp: Path, name: str = "CIFAR10", **options: Any) -> exp.RawData:
    given: dict[str, Any] = {"data_dir": None, "search": [tmp / "input"], "train_size": None, "seed": 42}
    return exp.load_data(name, download_dir=tmp / "run" / "data", **{**given, **options})


# ---- Finding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cifar-10-batches-py", "datasets/owner/slug/cifar-10-batches-py", "other name"])
def test_batch_files_are_found_at_any_depth_in_a_folder_of_any_name(tiny: Tiny, tmp_path: Path, place: str) -> None:
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


def test_a_read_only_mount_is_read_and_its_archive_is_unpacked_elsewhere(tiny: Tiny, tmp_path: Path) -> None:
    mount = tmp_path / "input" / "slug"
    mount.mkdir(parents=True)
    (mount / tiny.archive_name).write_bytes(tiny.archive)
    mount.chmod(0o555)
    try:
        data = load(tmp_path)
        assert [path.name for path in mount.iterdir()] == [tiny.archive_name]
    finally:
        mount.chmod(0o755)
    assert sorted(p.name for p in (tmp_path / "run/data").iterdir()) == [tiny.folder]
    assert load(tmp_path, search=[]).sha256 == data.sha256, "what was unpacked serves the next run"


def test_earlier_sources_win(tiny: Tiny, tmp_path: Path) -> None:
    tiny.write(tmp_path / "first" / "a")
    tiny.write(tmp_path / "input" / "b")
    tiny.write(tmp_path / "given" / "c")
    assert "first" in load(tmp_path, search=[tmp_path / "missing", tmp_path / "first", tmp_path / "input"]).source
    assert "given" in load(tmp_path, data_dir=tmp_path / "given").source


def test_symlink_loops_and_unreadable_folders_do_no_harm(tiny: Tiny, tmp_path: Path) -> None:
    root = tmp_path / "input"
    tiny.write(root / "z" / "data")
    (root / "a").symlink_to(root, target_is_directory=True)
    (root / "z" / "up").symlink_to(root / "z", target_is_directory=True)
    (root / "b").mkdir(mode=0o000)
    assert load(tmp_path).train_labels.size == 300
    assert sum(1 for _ in exp.walk_folders(root)) <= 4
    (root / "b").chmod(0o755)


def test_a_link_to_the_data_is_followed(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "slug").symlink_to(tiny.write(tmp_path / "cache" / "v1"), target_is_directory=True)
    assert load(tmp_path).train_labels.size == 300


def test_the_search_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "/".join("abcdefghijklmnop")).mkdir(parents=True)
    assert sum(1 for _ in exp.walk_folders(tmp_path)) == exp.WALK_DEPTH + 1
    for i in range(20):
        (tmp_path / f"x{i:02}").mkdir()
    monkeypatch.setattr(exp, "WALK_FOLDERS", 15)
    assert sum(1 for _ in exp.walk_folders(tmp_path)) == 15


# ---- What is refused -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_hostile_pickle_is_never_executed(tiny: Tiny, tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    hostile = pickle.dumps(Bomb(tmp_path / "executed"))
    tiny.write(tmp_path / "input" / "a", **{file: hostile})
    with pytest.raises(exp.UsageError, match="found nowhere"):
        load(tmp_path)
    assert str(tmp_path / "input" / "a" / file) in caplog.text and "wrong md5" in caplog.text
    tiny.write(tmp_path / "input" / "b")
    assert "input/b" in load(tmp_path).source, "the search goes on"
    assert not (tmp_path / "executed").exists()
    pickle.loads(hostile)
    assert (tmp_path / "executed").exists(), "the bomb works"


def test_a_file_exchanged_after_its_check_is_not_read(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.write(tmp_path / "input" / "a")
    check = exp.check_integrity

    def check_then_exchange(path: Path, expected: str) -> bool:
        good = check(path, expected)
        (folder / Path(path).name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
        return bool(good)

    monkeypatch.setattr(exp, "check_integrity", check_then_exchange)
    assert load(tmp_path).train_labels.size == 300
    assert not (tmp_path / "executed").exists()


def test_a_broken_archive_is_skipped(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / tiny.archive_name).write_bytes(tiny.archive[:-50])
    with pytest.raises(exp.UsageError):
        load(tmp_path)
    assert tiny.archive_name in caplog.text and "wrong md5" in caplog.text


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside"),
        member("a/../../outside"),
        member("/tmp/exp1b-outside"),
        member("..\\outside"),
        member("link", tarfile.SYMTYPE, "/etc"),
        member("link", tarfile.LNKTYPE, "/etc/passwd"),
        member("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)
def test_an_archive_that_reaches_outside_is_refused_whole(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(tar_gz({"good": b"1"}, evil))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(exp.BadData, match="refused"):
        exp._extract(archive, into)
    assert list(into.iterdir()) == [] and not (tmp_path / "outside").exists()


def test_data_dir_says_what_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    tiny.write(tmp_path / "input" / "good")
    with pytest.raises(exp.UsageError, match="there is no such folder"):
        load(tmp_path, data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(exp.UsageError, match=r"no such file is there.*data_batch_1.*cifar-10-python.tar.gz"):
        load(tmp_path, data_dir=tmp_path / "empty")
    lacking = tiny.write(tmp_path / "lacking", data_batch_4=None)
    with pytest.raises(exp.UsageError, match="lacking lacks data_batch_4"):
        load(tmp_path, data_dir=lacking)
    wrong = tiny.write(tmp_path / "wrong", data_batch_2=b"x")
    with pytest.raises(exp.UsageError, match=f"data_batch_2 has the wrong md5 .{md5(b'x')} instead") as caught:
        load(tmp_path, data_dir=wrong)
    assert "\n" not in str(caught.value)


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
    tiny: Tiny, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = {"/bad": b"<html>log in</html>", "/home": tiny.archive}
    monkeypatch.setitem(exp.MIRRORS, "CIFAR10", (f"{server.url}/missing", f"{server.url}/bad"))
    monkeypatch.setattr(tiny.reader, "url", f"{server.url}/home")
    data = load(tmp_path)
    assert server.asked == ["/missing", "/bad", "/home"]
    assert data.source.startswith(f"downloaded from {server.url}/home")
    failures = [record.getMessage() for record in caplog.records if "Not downloaded" in record.getMessage()]
    assert len(failures) == 2 and "404" in failures[0] and "wrong md5" in failures[1] and "19 bytes" in failures[1]
    stored = tmp_path / "run" / "data"
    assert left_in(stored) == sorted([tiny.folder, *(f"{tiny.folder}/{file}" for file in tiny.files)])
    server.replies.clear()
    assert load(tmp_path).sha256 == data.sha256, "the next run finds it on the disk"


def test_when_nothing_works_the_remedies_are_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(exp.UsageError, match=r"Internet ON.*attach.*pankrzysiu/cifar10-python.*--data-dir") as caught:
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


@pytest.mark.parametrize("reply", [drip, silent])
def test_a_stop_is_obeyed_at_once_and_leaves_nothing(tiny: Tiny, tmp_path: Path, server: Server, reply: Any) -> None:
    server.replies = {"/home": reply}
    tiny.reader.url = f"{server.url}/home"
    begun = time.monotonic()
    with pytest.raises(Stop):
        load(tmp_path, check=stop_after(0.5))
    assert time.monotonic() - begun < 3 and left_in(tmp_path / "run" / "data") == []


@pytest.mark.parametrize(("reply", "limit"), [(drip, "HOME_SECONDS"), (silent, "STALL_SECONDS")])
def test_a_slow_or_silent_source_is_given_up(
    tiny: Tiny, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, reply: Any, limit: str
) -> None:
    server.replies = {"/home": reply}
    tiny.reader.url = f"{server.url}/home"
    monkeypatch.setattr(exp, limit, 1.0)
    begun = time.monotonic()
    with pytest.raises(exp.UsageError):
        load(tmp_path)
    assert time.monotonic() - begun < 5 and left_in(tmp_path / "run" / "data") == []


def test_a_connection_that_breaks_off_and_a_flood_leave_nothing(
    tiny: Tiny, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    assert "/half" in caplog.text and "too large" in caplog.text
    assert left_in(tmp_path / "run" / "data") == []


def test_progress_is_logged_where_there_is_no_terminal(
    tiny: Tiny, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = {"/home": drip}
    tiny.reader.url = f"{server.url}/home"
    monkeypatch.setattr(exp, "PROGRESS_SECONDS", 0.3)
    with caplog.at_level("INFO"), pytest.raises(Stop):
        load(tmp_path, check=stop_after(1.5))
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Downloaded ")]
    assert 2 <= len(lines) <= 5 and all("B/s" in line and "/1.00M" in line for line in lines)


def test_what_a_killed_download_left_is_removed_and_a_live_one_is_not(tiny: Tiny, tmp_path: Path, server: Server) -> None:
    stored = tmp_path / "run" / "data"
    for name, age in (("dead.part", 3600.0), ("live.part", 0.0)):
        (stored / name).mkdir(parents=True)
        (stored / name / "x").write_bytes(b"half")
        for path in (stored / name / "x", stored / name):
            os.utime(path, (time.time() - age, time.time() - age))
    server.replies = {"/home": tiny.archive}
    tiny.reader.url = f"{server.url}/home"
    load(tmp_path)
    assert sorted(path.name for path in stored.iterdir()) == [tiny.folder, "live.part"]


def test_a_full_disk_is_not_taken_for_a_network_error(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(exp.UsageError, match="cannot be stored in"):
        load(tmp_path)


# ---- Size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [200, 205, 299, 300])
def test_a_subset_is_stratified_and_fixed_by_the_seed(tiny: Tiny, tmp_path: Path, size: int) -> None:
    tiny.write(tmp_path / "input")
    whole, part = load(tmp_path), load(tmp_path, train_size=size)
    counts = np.bincount(part.train_labels)
    assert len(part.train_labels) == size and counts.max() - counts.min() <= 1
    assert (part.test_pixels == whole.test_pixels).all()
    assert load(tmp_path, train_size=size).sha256 == part.sha256
    assert (load(tmp_path, train_size=size, seed=7).sha256 == part.sha256) == (size == 300)
    rows = {image.tobytes(): label for image, label in zip(whole.train_pixels, whole.train_labels, strict=True)}
    assert all(rows[i.tobytes()] == label for i, label in zip(part.train_pixels, part.train_labels, strict=True))
    assert len({image.tobytes() for image in part.train_pixels}) == size


@pytest.mark.parametrize("size", [-1, 0, 199, 301])
def test_a_size_that_does_not_fit_is_refused(tiny: Tiny, tmp_path: Path, size: int) -> None:
    tiny.write(tmp_path / "input")
    with pytest.raises(exp.UsageError, match=f"--train-size {size} .*at least 200 .*at most 300"):
        load(tmp_path, train_size=size)


@pytest.mark.parametrize("size", [0, 199, 100_001])
def test_a_size_that_synthetic_does_not_draw_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(exp.UsageError, match="--train-size"):
        load(tmp_path, "SYNTHETIC", train_size=size)


def test_the_hash_covers_pixels_and_labels() -> None:
    pixels, labels = np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)
    hashes = set()
    for part in range(4):
        for change in (0, 1):
            arrays = [pixels.copy(), labels.copy(), pixels.copy(), labels.copy()]
            arrays[part].flat[-1] = change
            raw = exp._raw_data("X", ("a",), (arrays[0], arrays[1]), (arrays[2], arrays[3]), "")
            hashes.add(raw.sha256)
    assert len(hashes) == 5


# ---- SYNTHETIC -------------------------------------------------------------------------------------------------------


def test_synthetic_is_a_function_of_seed_split_and_index() -> None:
    whole, labels = exp.synthetic_images(42, 0, 0, 600)
    for start, stop in ((0, 1), (249, 251), (250, 500), (333, 600)):
        part, part_labels = exp.synthetic_images(42, 0, start, stop)
        assert (part == whole[start:stop]).all() and (part_labels == labels[start:stop]).all()
    assert whole.dtype == np.uint8 and whole.shape == (600, 32, 32, 3) and labels.dtype == np.int64
    for seed, split in ((43, 0), (42, 1)):
        assert (exp.synthetic_images(seed, split, 0, 20)[0] != whole[:20]).any(axis=(1, 2, 3)).all()
    assert len({image.tobytes() for image in whole}) == 600


def test_synthetic_is_balanced_needs_no_file_and_has_a_fitting_test_set(tmp_path: Path) -> None:
    data = load(tmp_path, "SYNTHETIC", train_size=205)
    counts = np.bincount(data.train_labels)
    assert len(data.classes) == 10 and counts.tolist() == [21] * 5 + [20] * 5
    assert len(data.test_labels) == 1_000 and set(np.bincount(data.test_labels)) == {100}
    assert "seed 42" in data.source and list(tmp_path.iterdir()) == []
    assert load(tmp_path, "SYNTHETIC", train_size=205).sha256 == data.sha256
    assert load(tmp_path, "SYNTHETIC", train_size=205, seed=43).sha256 != data.sha256


def test_every_synthetic_shape_is_its_own_mirror_image_up_to_a_rotation() -> None:
    y, x = np.mgrid[-40:41, -40:41] / 32.0
    for name, shape in exp.SHAPES.items():
        turns = [shape(x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)) for a in np.radians(range(360))]
        mirrored = shape(-x, y)
        assert min(np.abs(turn - mirrored).max() for turn in turns) < 0.03, name
        inside = (shape(x, y) < 0).mean()
        assert 0.1 < inside < 0.4, name


@pytest.mark.skipif("EXP1B_CIFAR" not in os.environ, reason="EXP1B_CIFAR names no folder with the real CIFAR-10")
def test_the_real_cifar10(tmp_path: Path) -> None:
    data = load(tmp_path, data_dir=Path(os.environ["EXP1B_CIFAR"]))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert set(np.bincount(data.train_labels)) == {5000} and set(np.bincount(data.test_labels)) == {1000}
    assert data.train_pixels.reshape(-1, 3).mean(axis=0) / 255 == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
