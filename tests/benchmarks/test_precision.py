"""What the benchmark of precisions takes from the machine: recipes that it computes, and the peak of its card."""

import pytest
import torch

from benchmarks import precision, support
from megatron_amopo.planning.hardware import GPUS, gpu_of_device


@pytest.mark.parametrize(
    ("layers", "recipes", "expected"),
    [
        # Megatron's own layers know no FP8: they would compute in bf16 under its name.
        ("local", ("delayed", "tensorwise", "blockwise"), []),
        ("transformer_engine", (), []),
        ("transformer_engine", ("delayed", "tensorwise"), ["FP8 delayed", "FP8 tensorwise"]),
        ("transformer_engine", ("delayed", "tensorwise", "blockwise"), list(precision.FP8)),
    ],
)
def test_only_what_is_computed_in_fp8_is_called_so(monkeypatch, layers, recipes, expected):
    monkeypatch.setattr(precision, "runnable_fp8_recipes", lambda: recipes)
    assert precision.runnable(layers) == expected


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_row_of_a_card(name, row):
    assert gpu_of_device(name) == GPUS.get(row)


def test_the_peak_is_the_cards_unless_it_is_given(monkeypatch):
    monkeypatch.setattr(support.device, "has_cuda", lambda: False)
    assert support.device_peak_tflops(None, torch.bfloat16) is None
    monkeypatch.setattr(support.device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert support.device_peak_tflops(None, torch.bfloat16) == pytest.approx(989.4)
    assert support.device_peak_tflops(None, torch.float32) is None
    assert support.device_peak_tflops(700.0, torch.bfloat16) == 700.0
