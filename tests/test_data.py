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


# ---- What is refused -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


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


# ---- Size ------------------------------------------------------------------------------------------------------------


# ---- SYNTHETIC -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    "EXP1B_CIFAR" not in os.environ, reason="EXP1B_CIFAR names no folder with the real CIFAR-10"
)
def test_the_real_cifar10(tmp_path: Path) -> None:
    data = load(tmp_path, data_dir=Path(os.environ["EXP1B_CIFAR"]))
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert set(np.bincount(data.train_labels)) == {5000} and set(np.bincount(data.test_labels)) == {1000}
    assert data.train_pixels.reshape(-1, 3).mean(axis=0) / 255 == pytest.approx(
        [0.4914, 0.4822, 0.4465], abs=1e-4
    )
