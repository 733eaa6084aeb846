"""What the counter counts is held against counts by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dovetail.run.flops import (
    FlopCount,
    FlopMeter,
    count_elements,
    count_flops,
    peak_flops,
    peak_of,
)


def count(model: nn.Module, inputs: Tensor) -> FlopCount | None:
    model.eval()
    with torch.no_grad():
        return count_flops(lambda: model(inputs), model, inputs.numel())


def test_count_flops_of_linear_layers_are_two_per_product() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    counted = count(model, torch.zeros(8, 6))
    assert counted == FlopCount(2 * 8 * (6 * 16 + 16 * 2), 48, is_convolutional=False)
    # Forward and backward take three times the forward.
    assert counted is not None
    assert counted.training_per_element * 48 == 3 * counted.forward


def test_count_flops_of_a_convolution_are_those_of_its_products() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 25, 2))
    counted = count(model, torch.zeros(2, 3, 5, 5))
    assert counted is not None
    assert counted.forward == 2 * 2 * (25 * 4 * 3 * 9 + 100 * 2)
    assert counted.is_convolutional


def test_count_flops_sees_into_torchs_fused_encoder_layer() -> None:
    width, hidden, length, batch = 32, 64, 10, 2
    layer = nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True)
    counted = count(layer, torch.zeros(batch, length, width))
    tokens = batch * length
    products = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = 2 * 2 * batch * length * length * width
    assert counted is not None
    assert counted.forward == products + attention
    assert torch.backends.mha.get_fastpath_enabled()


def test_count_flops_is_none_for_recurrent_layers_which_the_counter_leaves_out() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(6, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = self.head(self.memory(features)[0])
            return logits

    assert count(Tagger(), torch.zeros(2, 3, 6)) is None


def test_count_flops_is_none_where_a_part_of_the_weights_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 2))
    model[0].requires_grad_(False)
    assert count(model, torch.zeros(8, 6)) is None


def test_count_flops_is_none_without_a_single_known_operation() -> None:
    assert count(nn.ReLU(), torch.zeros(8, 6)) is None
    assert count(nn.Linear(6, 2), torch.zeros(0, 6)) is None


def test_count_flops_is_none_where_the_pass_does_not_run_under_the_counter() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, features: Tensor) -> Tensor:
            from torch.utils._python_dispatch import _get_current_dispatch_mode

            if _get_current_dispatch_mode() is not None:
                raise RuntimeError("no modes, please")
            logits: Tensor = self.layer(features)
            return logits

    assert count(Picky(), torch.zeros(8, 6)) is None
    assert torch.backends.mha.get_fastpath_enabled()


class Counting(nn.Module):
    """Counts its calls in a buffer, draws a number and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        warnings.warn("called", stacklevel=1)
        logits: Tensor = self.layer(features)
        return logits


def test_count_flops_leaves_buffers_as_they_were_and_repeats_no_warning() -> None:
    model = Counting()
    assert count(model, torch.zeros(8, 6)) is not None
    assert float(model.calls) == 0


def test_meter_keeps_the_last_count() -> None:
    meter = FlopMeter()
    assert meter.count is None
    model = nn.Linear(6, 2)
    meter.measure(lambda: model(torch.zeros(8, 6)), model, 48)
    assert meter.count == FlopCount(2 * 8 * 6 * 2, 48, is_convolutional=False)


def test_count_elements_takes_the_primary_input_or_the_first() -> None:
    batch = {"mask": torch.zeros(2), "input_ids": torch.zeros(2, 7)}
    assert count_elements(batch, "input_ids") == 14
    assert count_elements(batch, "features") == 2


@pytest.mark.parametrize(
    ("name", "precision", "allows_tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 80GB HBM3", "fp32", False, 67.0),
        ("NVIDIA H100 80GB HBM3", "fp32", True, 494.7),
        ("NVIDIA H100 PCIe", "bf16", True, 756.5),
        ("NVIDIA H200", "fp16", False, 989.4),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", True, 156.0),
        ("NVIDIA A100-PCIE-40GB", "fp16", False, 312.0),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125.0),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),  # it has no TF32
        ("Tesla T4", "fp16", False, 65.0),
        ("NVIDIA L4", "bf16", False, 121.0),
        ("NVIDIA L40S", "bf16", False, 362.0),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
    ],
)
def test_peak_flops_are_those_of_the_data_sheet(
    name: str, precision: str, allows_tf32: bool, tflops: float
) -> None:
    found = peak_flops(name, precision, allows_tf32=allows_tf32)
    assert found == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bf16"),  # a slice of it
        ("NVIDIA L40", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("AMD Instinct MI300X", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),  # it has no bf16
    ],
)
def test_peak_flops_is_none_for_what_no_data_sheet_says(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_peak_of_is_none_on_the_cpu() -> None:
    counted = FlopCount(100, 10, is_convolutional=False)
    assert peak_of(torch.device("cpu"), "fp32", counted) is None


@pytest.fixture
def precision_switches() -> Iterator[Callable[[str, bool], None]]:
    def switch(matmul: str, is_cudnn: bool) -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = is_cudnn

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield switch
    switch(*before)


@pytest.mark.parametrize(
    ("matmul", "is_cudnn", "is_convolutional", "tflops"),
    [
        ("highest", True, False, 19.5),
        ("high", True, False, 156.0),
        ("highest", True, True, 156.0),
        ("high", False, True, 19.5),
    ],
)
def test_peak_of_follows_the_switch_of_what_the_model_computes(
    monkeypatch: pytest.MonkeyPatch,
    precision_switches: Callable[[str, bool], None],
    matmul: str,
    is_cudnn: bool,
    is_convolutional: bool,
    tflops: float,
) -> None:
    # The name is all that is asked of the device, which need not be there.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    precision_switches(matmul, is_cudnn)
    counted = FlopCount(100, 10, is_convolutional=is_convolutional)
    assert peak_of(torch.device("cuda"), "fp32", counted) == pytest.approx(tflops * 1e12)
