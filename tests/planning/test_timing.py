"""Step time: single parts against their formulas written out, and the directions in which everything must go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_amopo.planning.efficiency import DEFAULT
from megatron_amopo.planning.hardware import GPUS
from megatron_amopo.planning.layout import THIS_PROJECT, Layout, Options, Software
from megatron_amopo.planning.timing import StepTime, TimeModel
from megatron_amopo.planning.work import MicroBatch, StepWork, sequences
from tests.planning.models import QWEN_7B

WORK = sequences(length=4_096, micro_batch=1, micro_batches=8)
OPTIONS = Options(global_batch=64)


ALONE = Layout()


def step(layout=ALONE, work=WORK, *, gpu="h100", sizes=QWEN_7B, software=THIS_PROJECT, **options) -> StepTime:
    return TimeModel(sizes, GPUS[gpu], layout, replace(OPTIONS, **options), software=software).step(work)


def test_matrix_products_of_one_gpu():
    """Each of the four products three times: m × n outputs in waves of 132 tiles of 128 × 256, half a wave lost."""

    def seconds(m: int, n: int, k: int) -> float:
        waves = m * n / (128 * 256 * 132)
        return 2 * m * n * k / (989.4e12 * DEFAULT.gemm_bf16) * (waves + 0.5) / waves

    tokens, layer = 4_096, 0.0
    for outputs, inputs in ((3_584 + 1_024, 3_584), (3_584, 3_584), (2 * 18_944, 3_584), (3_584, 18_944)):
        layer += seconds(tokens, outputs, inputs) + seconds(tokens, inputs, outputs) + seconds(outputs, inputs, tokens)
    assert step().matmul == pytest.approx(8 * 28 * layer)


def test_attention_counts_pairs():
    forward, backward = (DEFAULT.attention("varlen", 4_097, backward=b) for b in (False, True))
    operations = 4 * 3_584 * 4_096 * 4_097 / 2
    expected = 8 * 28 * operations * (1 / forward + 2.5 / backward) / 989.4e12
    assert step().attention == pytest.approx(expected)
    assert step(attention="fa3").attention == pytest.approx(expected * DEFAULT.varlen_of_fa3)


def test_the_bubble_is_what_filling_and_draining_takes():
    headless = replace(WORK, mean=replace(WORK.mean, rows=1))  # then all stages take equally long
    plain, interleaved = (step(Layout(pp=4, chunks=chunks), headless) for chunks in (1, 7))
    assert plain.bubble == pytest.approx(
        3 / 8 * (plain.total - plain.bubble - plain.optimizer - DEFAULT.step_seconds), rel=0.01
    )
    assert interleaved.bubble == pytest.approx(plain.bubble / 7, rel=0.1)


def test_parts_that_one_gpu_has_none_of():
    alone = step()
    for part in ("tensor_parallel", "context_parallel", "pipeline_transfers", "data_parallel", "bubble", "recompute"):
        assert getattr(alone, part) == 0
    assert alone.imbalance == 0
    assert sum(alone.parts().values()) == alone.total


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        (Layout(tp=4), "tensor_parallel"),
        (Layout(tp=4, sequence_parallel=False), "tensor_parallel"),
        (Layout(cp=4), "context_parallel"),
        (Layout(pp=4), "pipeline_transfers"),
        (Layout(dp=8), "data_parallel"),
        (Layout(recompute="mlp"), "recompute"),
        (Layout(recompute="full"), "recompute"),
    ],
)
def test_each_kind_of_parallelism_costs_its_part(layout, part):
    assert getattr(step(layout), part) > 0


def test_slower_in_every_way_that_must_be_slower():
    def is_slower(one: StepTime, other: StepTime) -> bool:
        return one.total > other.total

    longer = sequences(length=8_192, micro_batch=1, micro_batches=8)
    assert is_slower(step(work=longer), step())
    assert is_slower(step(work=sequences(length=4_096, micro_batch=1, micro_batches=9)), step())
    assert is_slower(step(work=replace(WORK, imbalance=1.1)), step())
    assert step(work=replace(WORK, imbalance=1.1)).imbalance == pytest.approx(
        0.1 * (step().total - step().optimizer - DEFAULT.step_seconds), rel=1e-3
    )
    assert is_slower(step(Layout(recompute="full")), step(Layout(recompute="mlp")))
    assert is_slower(step(Layout(recompute="mlp")), step())
    assert is_slower(step(gpu="a100"), step())
    assert is_slower(step(), step(gpu="b200"))
    assert is_slower(step(), step(precision="fp8-delayed"))
    assert is_slower(step(precision="fp8-tensorwise"), step(precision="fp8-delayed"))
    assert is_slower(step(), step(software=Software(trains_weights=False)))
    assert is_slower(step(Layout(tp=8)), step(Layout(tp=8), software=Software(tp_overlap=True)))
    assert is_slower(step(Layout(cp=2, tp=8)), step(Layout(cp=2, tp=8), software=Software(ring_context=True)))
    assert is_slower(step(Layout(dp=8), software=Software(fsdp=True)), step(Layout(dp=8)))
    assert is_slower(step(Layout(dp=8), distributed_optimizer=False), step(Layout(dp=8)))
    assert is_slower(
        step(precision_aware_optimizer=True, optimizer_cpu_offload=True), step(precision_aware_optimizer=True)
    )


def test_tensor_parallelism_beyond_a_node_is_slow():
    beyond = TimeModel(QWEN_7B, replace(GPUS["h100"], per_node=2), Layout(tp=4), OPTIONS).step(WORK)
    assert beyond.tensor_parallel > 3 * step(Layout(tp=4)).tensor_parallel


def test_tiny_micro_batches_wait_for_launches():
    tiny = MicroBatch(tokens=16, pairs=136, keys=16, rows=8)
    time = step(work=StepWork(8, tiny, tiny, 1.0), sizes=replace(QWEN_7B, hidden=256, ffn=512))
    layers = time.total - time.head - time.optimizer - DEFAULT.step_seconds
    assert layers == pytest.approx(8 * 28 * DEFAULT.host_seconds_per_layer)
