"""Memory against figures worked out by hand; ``tests/distributed/test_planning.py`` holds what layers keep against
autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_amopo.planning.layout import Layout, Options
from megatron_amopo.planning.memory import chunks_in_flight, host_bytes, kept_by_layer, padded, rank_memory
from megatron_amopo.planning.sizes import ModelSizes
from megatron_amopo.planning.work import MicroBatch, StepWork
from tests.planning.models import QWEN_32B

BATCH = MicroBatch(tokens=4_096, pairs=1e6, keys=6_000, rows=1_800)
WORK = StepWork(micro_batches=8, mean=BATCH, longest=BATCH, imbalance=1.0)
OPTIONS = Options(global_batch=32)
SMALL = ModelSizes(4, 64, 96, 4, 2, 16, 151, tied=False)


def test_weights_gradients_and_optimizer_of_qwen_32b():
    parameters = 2_048_356_352  # tests/planning/test_sizes.py
    first = rank_memory(QWEN_32B, Layout(tp=8, pp=2, dp=4), OPTIONS, WORK, 0)
    assert first.weights == 2 * parameters == 4_096_712_704
    assert first.gradients == 4 * parameters
    assert first.optimizer == 12 * parameters / 4
    for changes, optimizer in (
        ({"distributed_optimizer": False}, 12 * parameters),
        ({"precision_aware_optimizer": True}, 6 * parameters / 4),
        ({"precision_aware_optimizer": True, "optimizer_cpu_offload": True}, 0),
    ):
        options = replace(OPTIONS, **changes)
        assert rank_memory(QWEN_32B, Layout(tp=8, pp=2, dp=4), options, WORK, 0).optimizer == optimizer
        offloaded = 16 * (parameters + 5_120) / 4 if options.optimizer_cpu_offload else 0
        assert host_bytes(QWEN_32B, Layout(tp=8, pp=2, dp=4), options) == offloaded
    reduced = rank_memory(QWEN_32B, Layout(tp=8, pp=2, dp=4), replace(OPTIONS, bf16_gradients=True), WORK, 0)
    assert reduced.gradients == 2 * parameters


def test_fp8_keeps_two_more_copies_of_products_weights():
    plain, fp8 = (
        rank_memory(QWEN_32B, Layout(tp=8, pp=2), replace(OPTIONS, precision=precision), WORK, 0)
        for precision in ("bf16", "fp8-tensorwise")
    )
    assert fp8.weights - plain.weights == 2 * 32 * 487_587_840 / 8
    assert fp8.activations < plain.activations


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, True), (2, True), (2, False)])
def test_what_a_layer_keeps(tp, sequence_parallel):
    """h 64, q 64, kv 64, f 96; two norms' and four heads' statistics in float32."""
    layout = Layout(tp=tp, sequence_parallel=sequence_parallel)
    split = tp if sequence_parallel else 1
    tokens, keys = BATCH.tokens, BATCH.keys
    hidden = tokens * (2 * (2 * 64 + 2 * 64) + 4 * 2) / split
    heads = (tokens * (2 * (2 * 64 + 96 + 2 * 96) + 4 * 4) + keys * 2 * 64) / tp
    assert kept_by_layer(SMALL, layout, BATCH) == pytest.approx(hidden + heads)
    assert kept_by_layer(SMALL, replace(layout, recompute="full"), BATCH) == tokens * 2 * 64 / split
    without_mlp = hidden + heads - tokens * 2 * 3 * 96 / tp
    assert kept_by_layer(SMALL, replace(layout, recompute="mlp"), BATCH) == pytest.approx(without_mlp)


def test_context_parallelism_splits_all_that_a_layer_keeps():
    one, two, four = (kept_by_layer(SMALL, Layout(cp=cp), BATCH) for cp in (1, 2, 4))
    assert two == pytest.approx(one / 2)
    # Four ranks share two key-value heads: each has one, of all tokens, where a half would be its part.
    assert four == pytest.approx(one / 4 + BATCH.keys * 2 * 16)


def test_chunks_in_flight():
    """1F1B: a stage holds as many micro-batches as there are stages from it on. Interleaved, as Megatron's schedule
    counts its warm-up: 2·(PP − stage − 1) + (chunks − 1)·PP, and one."""
    assert [chunks_in_flight(Layout(pp=4), stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(Layout(pp=4), 0, 2) == 2
    assert [chunks_in_flight(Layout(pp=4, chunks=2), stage, 8) for stage in range(4)] == [11, 9, 7, 5]
    assert chunks_in_flight(Layout(), 0, 8) == 1


def test_activations_are_chunks_in_flight_times_their_layers():
    of_layer = kept_by_layer(QWEN_32B, Layout(tp=8), BATCH)
    plain = rank_memory(QWEN_32B, Layout(tp=8, pp=4), OPTIONS, WORK, 0)
    assert plain.activations == pytest.approx(4 * 16 * of_layer)
    interleaved = rank_memory(QWEN_32B, Layout(tp=8, pp=4, chunks=2), OPTIONS, WORK, 0)
    assert interleaved.activations == pytest.approx(11 * 8 * of_layer)


def test_the_head_never_takes_rows_times_vocabulary():
    last = rank_memory(QWEN_32B, Layout(tp=8, pp=2), OPTIONS, WORK, 1)
    assert rank_memory(QWEN_32B, Layout(tp=8, pp=2), OPTIONS, WORK, 0).head == 0
    # Two hidden states of all tokens, an eighth on each rank; rows and their gradient whole; the buffer.
    assert last.head == 2 * 2 * 5_120 * 4_096 / 8 + 2 * 2 * 5_120 * 1_800 + 64 * 2**20
    assert last.head < BATCH.rows * QWEN_32B.vocabulary * 2 / 8 + 64 * 2**20


def test_padding():
    odd = MicroBatch(tokens=1_001, pairs=5, keys=6, rows=7)
    assert padded(odd, Layout(tp=4, cp=2), OPTIONS).tokens == 1_008
    assert padded(odd, Layout(tp=4, cp=2, sequence_parallel=False), OPTIONS).tokens == 1_002
    fp8 = replace(OPTIONS, precision="fp8-blockwise")
    assert padded(odd, Layout(tp=4, cp=2), fp8) == MicroBatch(1_024, 5, 6, 7)


def test_parts_add_up():
    memory = rank_memory(QWEN_32B, Layout(tp=8, pp=2), OPTIONS, WORK, 1)
    assert sum(memory.parts().values()) == memory.total
    assert all(part >= 0 for part in memory.parts().values())
