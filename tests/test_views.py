"""Views, pages and the held-out split: against torchvision and numpy, and as pure functions of the seed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from lab import lab_data
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import crop, hflip, pad

import run_exp1b_kaggle as exp

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def raw() -> exp.RawData:
    return lab_data()


@pytest.fixture(scope="module")
def images(raw: exp.RawData) -> exp.Images:
    return exp.Images(raw, 42, CPU)


def every_view(pixels: np.ndarray) -> dict[bytes, Image.Image]:
    """All crops and flips of an image as torchvision makes them, by their pixels."""
    padded = pad(Image.fromarray(pixels), [4])
    crops = [crop(padded, top, left, 32, 32) for top in range(9) for left in range(9)]
    return {np.asarray(view).tobytes(): view for view in [*crops, *map(hflip, crops)]}


@pytest.mark.parametrize("image", [0, 77, 179])
def test_the_162_views_are_torchvisions_crops_and_flips(
    raw: exp.RawData, images: exp.Images, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit-equal pixels, each view on exactly one page, and the same numbers after normalisation."""
    train = exp.held_out_indices(raw.train_labels, 42)[0]
    expected = every_view(raw.train_pixels[train[image]])
    assert len(expected) == 162
    index = torch.tensor([image])
    normalised = [images.render(index, page)[0] for page in range(162)]
    monkeypatch.setattr(images, "normalise", lambda pixels: pixels)
    shown = [images.render(index, page)[0].numpy().tobytes() for page in range(162)]
    assert set(shown) == set(expected)
    assert len(set(shown)) == 162
    reference = v2.Compose(
        [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(images.mean, images.std)]
    )
    for pixels, result in zip(shown, normalised, strict=True):
        torch.testing.assert_close(result, reference(expected[pixels]), rtol=0, atol=2e-6)


def test_an_image_looks_the_same_whatever_the_batch(images: exp.Images) -> None:
    index = torch.tensor([170, 3, 3, 0, 99])
    batch = images.render(index, 11)
    assert batch.shape == (5, 3, 32, 32)
    assert batch.dtype == torch.float32
    for row, image in enumerate(index):
        assert torch.equal(batch[row], images.render(image.view(1), 11)[0])


def test_the_views_differ_between_images_of_a_batch(images: exp.Images) -> None:
    assert len(images.views[:, 5].unique()) > 80  # 180 draws of 162


def test_the_table_is_a_permutation_per_image_fixed_by_the_seed() -> None:
    table = exp.view_table(500, 7)
    assert table.dtype == np.uint8
    assert table.shape == (500, 162)
    assert (np.sort(table, axis=1) == np.arange(162)).all()
    assert len({row.tobytes() for row in table}) == 500
    assert (exp.view_table(500, 7) == table).all()
    assert (exp.view_table(500, 8) != table).any()
    # every view is about equally likely on every page: 500 / 162 = 3.1 expected
    counts = np.stack([np.bincount(table[:, page], minlength=162) for page in range(162)])
    assert counts.max() < 16
    assert abs(counts.var() - 500 / 162) < 0.3


def test_every_page_comes_once_before_any_comes_again() -> None:
    order = exp.page_order(42, 3, 400)
    assert sorted(order[:162]) == list(range(162))
    assert order[162:324] == order[:162]
    assert order[324:] == order[:76]
    assert exp.page_order(42, 3, 20) == order[:20], "a longer training begins like a shorter one"
    assert exp.page_order(42, 4, 20) != order[:20]
    assert exp.page_order(43, 3, 20) != order[:20]


def test_the_number_of_distinct_pages_is_what_the_design_says() -> None:
    """About 53 in quick and 136 in full."""
    for runs, epochs, expected in ((3, 20, 53), (5, 50, 136)):
        distinct = {page for run in range(1, runs + 1) for page in exp.page_order(42, run, epochs)}
        assert len(distinct) == pytest.approx(expected, abs=5)


@pytest.mark.parametrize(
    ("classes", "per_class", "half"), [(10, 5_000, 250), (100, 500, 25), (10, 20, 1), (3, 59, 2)]
)
def test_the_held_out_split(classes: int, per_class: int, half: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), per_class))
    train, fit, select = parts = exp.held_out_indices(labels, 42)
    assert sorted(np.concatenate(parts)) == list(range(len(labels))), "disjoint, and nothing is lost"
    for part, count in ((train, per_class - 2 * half), (fit, half), (select, half)):
        assert (np.bincount(labels[part], minlength=classes) == count).all()
    again, other = exp.held_out_indices(labels, 42), exp.held_out_indices(labels, 43)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert all((a != b).any() for a, b in zip(parts, other, strict=True))


def test_held_out_images_are_in_no_view_of_the_training_images(raw: exp.RawData, images: exp.Images) -> None:
    plain = images.pixels.reshape(len(images), -1)
    trained = {row.numpy().tobytes() for row in plain}
    for part in (images.fit, images.select, images.test):
        assert not trained & {image.numpy().tobytes() for image in part.pixels}
    together = len(trained) + len(images.fit.labels) + len(images.select.labels)
    assert together == len(raw.train_labels)
    assert (images.test.pixels.numpy() == raw.test_pixels).all()


def test_labels_stay_with_their_images(raw: exp.RawData, images: exp.Images) -> None:
    label = {image.tobytes(): int(k) for image, k in zip(raw.train_pixels, raw.train_labels, strict=True)}
    for pixels, labels in (
        (images.pixels, images.labels),
        (images.fit.pixels, images.fit.labels),
        (images.select.pixels, images.select.labels),
    ):
        assert [label[image.numpy().tobytes()] for image in pixels] == labels.tolist()


def test_the_statistics_are_those_of_the_training_images_alone(raw: exp.RawData, images: exp.Images) -> None:
    train, fit, select = exp.held_out_indices(raw.train_labels, 42)
    values = raw.train_pixels[train].astype(np.float64) / 255
    assert images.mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-12)
    assert images.std == pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-12)
    changed = raw.train_pixels.copy()
    changed[np.concatenate([fit, select])] = 255
    assert exp.Images(dataclasses.replace(raw, train_pixels=changed), 42, CPU).mean == images.mean


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    assert exp.channel_statistics(np.full((2, 32, 32, 3), 51, np.uint8)) == ([0.2] * 3, [1e-3] * 3)


def test_a_hundred_classes() -> None:
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (2_000, 32, 32, 3), dtype=np.uint8), np.arange(2_000) % 100
    raw = exp.RawData("CIFAR100", tuple(map(str, range(100))), pixels, labels, pixels[:9], labels[:9], "")
    images = exp.Images(raw, 0, CPU)
    assert len(images) == 1_800
    assert sorted(images.fit.labels.tolist()) == sorted(images.select.labels.tolist()) == list(range(100))
    network = exp.build_network("7x", 100, 8)
    assert network(images.render(torch.arange(4), 0)).shape == (4, 100)
