"""Every reason against a layout, one by one. ``tests/distributed/test_planning.py`` asks Megatron itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_amopo.checkpoint.families import SequenceLimit
from megatron_amopo.planning.hardware import gpu
from megatron_amopo.planning.layout import Layout, Options
from megatron_amopo.planning.refusals import HARDWARE, MEGATRON, PROJECT, refusals, sequence_refusal
from tests.planning.models import QWEN_7B

OPTIONS = Options(global_batch=64)

REFUSED = {
    "heads": (Layout(tp=8), 8, {}, PROJECT, "--tensor-model-parallel-size 8 doesn't divide the model's 28 attention"),
    "key-value heads": (Layout(tp=7), 7, {}, PROJECT, "size 7 doesn't divide the model's 4 key-value heads"),
    "heads over context": (Layout(cp=8), 8, {}, PROJECT, "--context-parallel-size 8 doesn't divide the model's 28"),
    "world size": (Layout(tp=2), 9, {}, PROJECT, "9 rank(s) were started, which is not a multiple of"),
    "batch": (Layout(dp=8), 8, {"global_batch": 60}, PROJECT, "--global-batch-size 60 is not a multiple of"),
    "more stages than layers": (Layout(pp=32), 32, {}, PROJECT, "size 32 is more than the model's 28 layers"),
    "layers": (Layout(pp=8), 8, {}, MEGATRON, "--pipeline-model-parallel-size 8 doesn't divide 28 layers"),
    "ends": (Layout(pp=4, count_ends=True), 4, {}, MEGATRON, "size 4 doesn't divide 30 layers (embedding and loss"),
    "chunks": (Layout(pp=4, chunks=2), 4, {}, MEGATRON, "2 model chunks don't divide 7 layers of a pipeline stage"),
    "chunks of one stage": (Layout(chunks=2), 1, {}, MEGATRON, "need --pipeline-model-parallel-size 2 or more"),
    "groups of micro-batches": (
        Layout(pp=4, chunks=7), 4, {"global_batch": 6}, PROJECT, "makes 6 micro-batch(es) of 1 on 1 data-parallel",
    ),
    "precision-aware": (
        Layout(), 1, {"distributed_optimizer": False, "precision_aware_optimizer": True}, MEGATRON,
        "--use-precision-aware-optimizer needs --use-distributed-optimizer",
    ),
    "offload": (
        Layout(), 1, {"optimizer_cpu_offload": True}, MEGATRON,
        "--optimizer-cpu-offload needs --use-precision-aware-optimizer",
    ),
}  # fmt: skip


def reasons(layout: Layout, world_size: int, *, on: str = "h100", sizes=QWEN_7B, **options) -> list[str]:
    return [str(one) for one in refusals(sizes, gpu(on), layout, replace(OPTIONS, **options), world_size)]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    layout, world_size, options, by, message = REFUSED[name]
    found = reasons(layout, world_size, **options)
    assert any(one.startswith(f"{by}: ") and message in one for one in found), found


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=4, pp=2, chunks=14), Layout(cp=4, pp=7), Layout(pp=3, count_ends=True, dp=2)]
)
def test_nothing_else_is_refused(layout):
    assert reasons(layout, layout.gpus) == []


def test_fp8_needs_sizes_of_whole_blocks():
    odd = replace(QWEN_7B, ffn=18_944 + 64)
    (found,) = reasons(Layout(tp=4), 4, sizes=odd, precision="fp8-blockwise")
    assert found.startswith(f"{PROJECT}: --fp8-recipe blockwise needs sizes that are multiples of 128")
    assert reasons(Layout(tp=4), 4, precision="fp8-blockwise") == []
    (found,) = reasons(Layout(tp=4), 4, sizes=replace(odd, ffn=100), precision="fp8-delayed")
    assert "feed-forward size is 100" in found


def test_fp8_needs_fp8_units():
    assert any(one.startswith(f"{HARDWARE}: a100") for one in reasons(Layout(), 1, on="a100", precision="fp8-delayed"))


def test_long_sequences():
    limit = SequenceLimit(4_096, "sliding_window")
    assert sequence_refusal(4_096, limit) is None
    assert "--cutoff-len 4096" in str(sequence_refusal(4_097, limit))
