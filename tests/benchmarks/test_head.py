"""The head's benchmark: it runs, its candidates compute the same gradients, and it measures Liger-Kernel's loss, on a
stand-in, because that needs a GPU.
"""

import json
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import head
from benchmarks.support import MIB

ROWS, VOCABULARY, HIDDEN = 1024, 4096, 16


def run(folder, *flags):
    """What the benchmark measured of each case, and the lines of its table."""
    sizes = ["--rows", str(ROWS), "--vocabulary", str(VOCABULARY), "--hidden", str(HIDDEN), "--repetitions", "2"]
    assert head.main([*sizes, "--dtype", "float32", "--output", str(folder), *flags]) == 0
    table = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
    return json.loads((folder / "results.json").read_text())["cases"], table


def row_of(name, rows, columns):
    return f"| {name} | {rows:,} | {columns:,} |"


def test_head(tmp_path):
    cases, table = run(tmp_path, "--tp", "1", "2")
    assert [(case["rows"], case["columns"], case["tp"]) for case in cases] == [
        (ROWS, VOCABULARY, 1),
        (ROWS, VOCABULARY // 2, 2),
    ]
    for case in cases:
        found = case["candidates"]
        assert {head.PLAIN, head.FUSED, head.MAIN_GRAD} <= found.keys()
        for name, candidate in found.items():
            assert len(candidate["seconds"]["values"]) == 2
            assert all(seconds > 0 for seconds in candidate["seconds"]["values"])
            assert sum(line.startswith(row_of(name, ROWS, case["columns"])) for line in table) == 1
        # The log-softmax, kept for the backward pass.
        assert found[head.PLAIN]["extra_bytes"] > 4 * ROWS * case["columns"] - MIB
    assert (tmp_path / "head.png").stat().st_size > 0


def test_plain_is_left_out_where_its_three_arrays_do_not_fit():
    case = head.Case(30, 200, 1, HIDDEN)
    for most_bytes, fits in ((3 * 4 * 30 * 200, True), (3 * 4 * 30 * 200 - 1, False)):
        found = head.measure(case, torch.float32, 1, most_bytes)
        assert (head.PLAIN in found) == fits
        fused = next(x for x in head.report({case: found}, "float32").splitlines() if x.startswith("| fused |"))
        assert ("| – |" in fused) != fits  # the ratio


@pytest.fixture
def liger_calls(monkeypatch):
    """A stand-in for Liger-Kernel where its loss' GPU is said to be, and the arguments of the loss' calls."""
    calls = []

    class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
        """Its order of arguments: the weight comes first."""

        def __init__(self, ignore_index=-100, reduction="mean"):
            super().__init__()
            self.ignore_index, self.reduction = ignore_index, reduction

        def forward(self, lin_weight, _input, target, bias=None):
            calls.append((lin_weight, _input, target))
            return F.cross_entropy(
                _input @ lin_weight.t(), target, ignore_index=self.ignore_index, reduction=self.reduction
            )

    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = ModuleSpec("liger_kernel", None, is_package=True)
    transformers.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(head.sys.modules, "liger_kernel", package)
    monkeypatch.setitem(head.sys.modules, "liger_kernel.transformers", transformers)
    # In this module alone: what measures memory is to look at this process, whatever the machine has.
    monkeypatch.setattr("megatron_amopo.device.has_cuda", lambda: False)
    monkeypatch.setattr(
        head, "device", SimpleNamespace(has_cuda=lambda: True, current_device=lambda: torch.device("cpu"))
    )
    return calls


def test_all_candidates_compute_the_same_gradients(liger_calls):
    """Liger's loss is the negative sum of log-probabilities: an incoming gradient of 1, where the others' differ."""
    runs = head.candidates(head.Case(30, 200, 1, HIDDEN), torch.float32)
    assert list(runs) == [head.PLAIN, head.FUSED, head.MAIN_GRAD, head.LIGER]
    plain, fused, into_main_grad, liger = (candidate() for candidate in runs.values())
    assert [len(gradients) for gradients in (plain, fused, into_main_grad, liger)] == [2, 2, 1, 2]
    for expected, *found in (plain[:1] + fused[:1] + into_main_grad, plain[1:] + fused[1:]):
        for gradient in found:
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)

    ((weight, hidden, targets),) = liger_calls
    assert (weight.shape, hidden.shape, targets.shape) == ((200, HIDDEN), (30, HIDDEN), (30,))
    logps = head.response_logps(hidden, weight, targets)
    for gradient, expected in zip(liger, torch.autograd.grad(-logps.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_liger_is_measured_where_it_is_installed(liger_calls, tmp_path):
    cases, table = run(tmp_path, "--tp", "1", "--most-gib", "1")
    assert len(liger_calls) == 1 + 2 + 2  # warming up, repetitions, what it returns and its peak
    assert cases[0]["candidates"][head.LIGER]["extra_bytes"] > 0
    assert len(cases[0]["candidates"][head.LIGER]["seconds"]["values"]) == 2
    assert sum(line.startswith(row_of(head.LIGER, ROWS, VOCABULARY)) for line in table) == 1
