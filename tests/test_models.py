"""Networks: sizes and costs counted by hand, initial weights, folding, and loading a finished one."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lab import do, lab_data, open_lab, shortcuts, student, teacher
from torch import nn

import run_exp1b_kaggle as exp

ASSISTANT = exp.Job("assistant", "SYNTHETIC", "1.5x")
NETWORKS = ["teacher", "1.5x", "2.3x", "5x", "7x"]
# Written out from the design, not read from the script: bottleneck?, blocks, channels at width 64
DESIGN = {
    "teacher": (True, (3, 4, 6, 3), (64, 128, 256, 512)),
    "1.5x": (False, (2, 2, 2, 2), (64, 128, 256, 648)),
    "2.3x": (False, (2, 2, 2, 2), (64, 128, 256, 480)),
    "5x": (False, (1, 1, 1, 1), (64, 128, 256, 496)),
    "7x": (False, (1, 1, 1, 1), (56, 112, 224, 408)),
}


def counted_by_hand(name: str, classes: int, width: int) -> tuple[int, int]:
    """(parameters, multiply-accumulates) by arithmetic."""
    bottleneck, blocks, channels = DESIGN[name]
    parameters = macs = 0

    def conv(inputs: int, outputs: int, kernel: int, side: int) -> None:
        nonlocal parameters, macs
        weights = inputs * outputs * kernel**2
        parameters += weights + 2 * outputs  # and the batch normalisation's scale and shift
        macs += weights * side**2

    widths = [max(8, full * width // 64) for full in channels]
    inputs, side = widths[0], 32
    conv(3, inputs, 3, side)
    for stage, (count, planes) in enumerate(zip(blocks, widths, strict=True)):
        outputs = planes * 4 if bottleneck else planes
        for block in range(count):
            before, side = side, side // 2 if stage and not block else side
            if bottleneck:
                conv(inputs, planes, 1, before)
                conv(planes, planes, 3, side)
                conv(planes, outputs, 1, side)
            else:
                conv(inputs, planes, 3, side)
                conv(planes, outputs, 3, side)
            if inputs != outputs or before != side:
                conv(inputs, outputs, 1, side)
            inputs = outputs
    return parameters + inputs * classes + classes, macs + inputs * classes


@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_macs_by_hand(name: str, width: int) -> None:
    for classes in (10, 100):
        assert exp.network_cost(name, classes, width) == counted_by_hand(name, classes, width)


def test_the_teacher_is_resnet_50_and_the_ratios_are_within_a_percent() -> None:
    teacher = exp.network_cost("teacher", 10, 64)[0]
    assert teacher == 23_520_842
    counted_ratios = {
        "1.5x": 1.490,
        "2.3x": 2.298,
        "5x": 4.987,
        "7x": 7.006,
    }  # the first is an assistant only
    assert set(counted_ratios) == {*exp.RATIOS, *exp.ASSISTANTS}
    for name, counted in counted_ratios.items():
        nominal = {**exp.RATIOS, **exp.ASSISTANTS}[name]
        ratio = teacher / exp.network_cost(name, 10, 64)[0]
        assert ratio == pytest.approx(counted, abs=5e-4)
        assert abs(ratio / nominal - 1) < 0.01


@pytest.mark.parametrize(
    ("classes", "width", "ratios"),
    [
        (100, 64, (2.306, 4.978, 6.985)),
        (10, 32, (2.302, 4.989, 7.007)),
        (10, 16, (2.310, 4.995, 7.008)),
        (10, 8, (2.325, 5.006, 6.953)),
    ],
)
def test_the_ratios_at_other_widths_and_with_a_hundred_classes(
    classes: int, width: int, ratios: tuple[float, ...]
) -> None:
    """Within 1.1% of nominal everywhere; the exact values are noted here."""
    teacher = exp.network_cost("teacher", classes, width)[0]
    counted = [teacher / exp.network_cost(name, classes, width)[0] for name in exp.RATIOS]
    assert counted == pytest.approx(ratios, abs=1e-3)
    assert all(abs(c / nominal - 1) < 0.011 for c, nominal in zip(counted, exp.RATIOS.values(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_stem_keeps_the_size_and_four_pixels_remain(name: str) -> None:
    network, shapes = exp.build_network(name, 10, 8).eval(), []
    for layer in network.features:
        layer.register_forward_hook(lambda _layer, _inputs, output: shapes.append(tuple(output.shape[2:])))
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert shapes[0] == (32, 32)
    assert shapes[-1] == (4, 4)
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in network.modules())


def weights(network: nn.Module) -> list[bytes]:
    return [value.numpy().tobytes() for value in network.state_dict().values()]


def test_initial_weights_are_a_function_of_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = weights(exp.build_network("5x", 10, 8, 43))
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    torch.rand(3)
    expected = torch.get_rng_state()
    assert weights(exp.build_network("5x", 10, 8, 43)) == first
    assert torch.equal(torch.get_rng_state(), expected), "the global generator is left alone"
    assert weights(exp.build_network("5x", 10, 8, 44)) != first


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    network = exp.build_network(name, 10, 8).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2.0)
    before, images = weights(network), torch.randn(4, 3, 32, 32)
    folded = network.folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(
            folded(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )
    assert weights(network) == before
    assert not network.training


def test_folding_a_network_in_training_leaves_it_in_training() -> None:
    network = exp.build_network("7x", 10, 8).train()
    assert not network.folded().training
    assert network.training


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> exp.Experiment:
    """A finished teacher, an assistant that learned from it, and a student. Read only."""
    torch.set_num_threads(1)
    experiment = open_lab(tmp_path_factory.mktemp("models") / "lab")
    with shortcuts():
        do(experiment, teacher(experiment), ASSISTANT, student(experiment, "Direct", "7x"))
    return experiment


@pytest.mark.parametrize(
    "job", ["teacher_resnet50_SYNTHETIC", "assistant_1.5x_SYNTHETIC", "student_7x_Direct_run1"]
)
def test_load_student_reproduces_the_stored_test_logits(finished: exp.Experiment, job: str) -> None:
    path = finished.run.checkpoints / f"{job}.pt"
    network, content = exp.load_student(str(path)), exp.load_checkpoint(path)
    data = lab_data()
    images = torch.from_numpy(data.test_pixels).permute(0, 3, 1, 2) / 255  # what ToTensor gives
    assert not network.training
    with torch.no_grad():
        logits = network(images)
    torch.testing.assert_close(logits, content["test_logits"].float(), rtol=2e-3, atol=2e-3)
    accuracy = 100 * (logits.argmax(1).numpy() == data.test_labels).mean()
    assert accuracy == pytest.approx(
        finished.run.records[job].test_accuracy, abs=3.4
    )  # two of 60 may tie in fp16


def test_load_student_refuses_a_damaged_file(finished: exp.Experiment, tmp_path: Path) -> None:
    content = bytearray(finished.run.file(student(finished, "Direct", "7x")).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(exp.Damaged, match="checksum"):
        exp.load_student(tmp_path / "x.pt")


def test_no_network_has_a_layer_so_narrow_that_onednn_fails() -> None:
    """Below 8 channels the gradient of a strided 1x1 convolution overran its buffer (seen with AVX2)."""
    for name in NETWORKS:
        convolutions = [m for m in exp.build_network(name, 10, 8).modules() if isinstance(m, nn.Conv2d)]
        assert min(conv.out_channels for conv in convolutions) >= 8


@pytest.mark.filterwarnings("ignore")  # the exporters warn about themselves
def test_a_student_can_be_deployed(finished: exp.Experiment, tmp_path: Path) -> None:
    """ONNX, torch.export and a TorchScript trace; the traced one gives the same logits after a round trip."""
    network = exp.load_student(finished.run.file(student(finished, "Direct", "7x")))
    images = torch.rand(2, 3, 32, 32)
    expected = network(images)
    torch.onnx.export(network, (images,), str(tmp_path / "student.onnx"))
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load(str(tmp_path / "student.onnx")))
    torch.testing.assert_close(torch.export.export(network, (images,)).module()(images), expected)
    torch.jit.save(torch.jit.trace(network, images), str(tmp_path / "student.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "student.pt"))(images), expected)
