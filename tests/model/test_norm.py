"""RMSNorm's own autograd function against the formula in float64, value and gradients, whatever the tiles."""

from types import SimpleNamespace

import pytest
import torch

from megatron_amopo.model import tiles
from megatron_amopo.model.norm import RMSNorm

SIZE, EPSILON = 24, 1e-3
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def norm(dtype):
    module = RMSNorm(SimpleNamespace(sequence_parallel=True), SIZE, eps=EPSILON).to(dtype)
    generator = torch.Generator().manual_seed(4)
    module.weight.data.copy_(1 + torch.randn(SIZE, generator=generator))
    return module, *torch.randn(2, 11, 1, SIZE, generator=generator).to(dtype)


def plain(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * weight


@pytest.mark.parametrize("rows_per_tile", [100, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]
)
def test_equals_the_formula_in_float64(dtype, tolerance, rows_per_tile, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_TILE", rows_per_tile * SIZE // torch.get_num_threads())
    module, x, incoming = norm(dtype)
    x.requires_grad_()
    actual = module(x)
    found = [actual, *torch.autograd.grad(actual, (x, module.weight), incoming)]

    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, module.weight))
    wide = plain(wide_x, wide_weight)
    expected = [wide, *torch.autograd.grad(wide, (wide_x, wide_weight), incoming.double())]
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == right.shape
        assert (mine - right).norm() <= TOLERANCES[dtype] * right.norm()


def test_gradient_by_finite_differences():
    module, x, _ = norm(torch.float64)
    assert torch.autograd.gradcheck(module, x.requires_grad_())


def test_keeps_its_input_its_weight_and_one_number_per_row():
    module, x, _ = norm(torch.float32)
    x.requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    assert sorted(t.numel() for t in kept) == [11, SIZE, 11 * SIZE]
    assert {x.data_ptr(), module.weight.data_ptr()} < {t.data_ptr() for t in kept}


def test_weight_is_summed_over_sequence_parallel_ranks():
    assert norm(torch.float32)[0].weight.sequence_parallel
