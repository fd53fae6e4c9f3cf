"""Plans as a whole: what is considered, what fits, and in which order it comes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_amopo.planning.efficiency import DEFAULT
from megatron_amopo.planning.layout import Layout
from megatron_amopo.planning.planner import (
    CLOSE,
    Fixed,
    candidates,
    distinct,
    estimate,
    model_flops,
    plan,
    ranked,
    shortage,
)
from megatron_amopo.planning.scaling import grow, plot
from tests.planning.models import QWEN_7B, QWEN_32B, question


def test_all_layouts_use_all_gpus():
    asked = question(QWEN_32B, gpus=16)
    found = list(candidates(asked))
    assert len(found) == len(set(found))
    assert all(layout.gpus == 16 for layout in found)
    assert Layout(tp=8, pp=2, chunks=4) in found
    assert Layout(tp=8, pp=2, count_ends=True, chunks=3, recompute="mlp") in found


def test_a_plan_counts_every_layout_once():
    result = plan(question(QWEN_32B, gpus=16))
    estimated = {one.layout for one in result.fitting + result.too_large}
    assert len(estimated) == len(result.fitting) + len(result.too_large) < result.considered
    times = [one.time.total for one in result.fitting]
    assert times == sorted(times)
    asked = question(QWEN_32B, gpus=16)
    assert all(one.peak_memory <= asked.usable_memory for one in result.fitting)
    assert all(one.peak_memory > asked.usable_memory for one in result.too_large)


def test_distinct_layouts_are_the_plainest_of_the_quickest():
    result = plan(question())
    best = distinct(result.fitting)
    splits = [(one.layout.tp, one.layout.cp, one.layout.pp, one.layout.dp) for one in best]
    assert len(splits) == len(set(splits))
    assert best[0].time.total <= result.fitting[0].time.total * 1.01
    assert [one.time.total for one in best] == sorted(one.time.total for one in best)


def test_memory_to_spare_is_worth_a_little_time():
    """Qwen2.5-32B on 16 GPUs: the quickest layout leaves hardly anything free."""
    fitting = plan(question(QWEN_32B, gpus=16)).fitting
    quickest, (best, *others) = distinct(fitting)[0], ranked(fitting)
    assert set(ranked(fitting)) == set(distinct(fitting))
    assert best.peak_memory < quickest.peak_memory
    assert best.time.total <= quickest.time.total * (1 + CLOSE)
    for other in others:
        assert other.peak_memory >= best.peak_memory or other.time.total > quickest.time.total * (1 + CLOSE)
    assert [one.time.total for one in others] == sorted(one.time.total for one in others)
    assert ranked(()) == ()


def test_a_model_that_is_too_large():
    asked = question(QWEN_32B, gpus=2)
    result = plan(asked)
    assert result.fitting == ()
    said = shortage(result, asked)
    assert said is not None
    assert "GiB per GPU; of h100's 79 GiB, 75.0 GiB may be used" in said
    offloaded = replace(
        asked, options=replace(asked.options, precision_aware_optimizer=True, optimizer_cpu_offload=True)
    )
    assert plan(offloaded).too_large[0].peak_memory < result.too_large[0].peak_memory


def test_what_is_fixed_is_kept_and_its_refusal_said():
    asked = question(fixed=Fixed(tp=2, pp=2, cp=1, chunks=7, recompute="mlp"))
    assert list(candidates(asked)) == [
        Layout(tp=2, dp=2, pp=2, chunks=7, recompute="mlp"),
        Layout(tp=2, dp=2, pp=2, chunks=7, count_ends=True, recompute="mlp"),
    ]
    refused = plan(question(fixed=Fixed(tp=3)))
    assert refused.fitting == ()
    reasons = [refusal.reason for refusal, _ in refused.refused]
    assert any("--tensor-model-parallel-size 3 doesn't divide" in reason for reason in reasons)
    too_many = plan(question(gpus=32, fixed=Fixed(pp=32)))
    assert any("is more than the model's 28 layers" in refusal.reason for refusal, _ in too_many.refused)


def test_fp8_is_faster():
    assert plan(question(precision="fp8-tensorwise")).fitting[0].time.total < plan(question()).fitting[0].time.total


def test_long_data_is_refused():
    result = plan(question(longest_sequence=40_000))
    assert result.fitting == result.too_large == ()
    assert any("--cutoff-len 32768" in refusal.reason for refusal, _ in result.refused)


def test_more_of_everything_takes_more():
    asked, layout = question(), Layout(tp=2, dp=4)
    base = estimate(asked, layout)
    for changes in ({"global_batch": 128}, {"sizes": QWEN_32B}):
        other = {**changes}
        sizes = other.pop("sizes", QWEN_7B)
        assert estimate(question(sizes, **other), layout).time.total > base.time.total
    assert estimate(question(micro_batch=2), layout).peak_memory > base.peak_memory
    assert estimate(question(efficiency=replace(DEFAULT, gemm_bf16=0.5)), layout).time.total > base.time.total


def test_model_operations():
    """6 per token and weight, 12 per pair and channel, 6 per row and output weight."""
    batch = question().records.step(global_batch=1, micro_batch=1, dp=1).mean
    expected = 6 * batch.tokens * 28 * QWEN_7B.layer_linear_weights
    expected += 12 * batch.pairs * 28 * 3_584 + 6 * batch.rows * 152_064 * 3_584
    assert model_flops(QWEN_7B, batch) == pytest.approx(expected)
    one = estimate(question(), Layout(tp=2, dp=4))
    assert one.model_flops_per_gpu * one.time.total * 8 == pytest.approx(64 * expected, rel=1e-6)


def test_growth():
    asked = question(QWEN_7B, global_batch=32)
    growth = grow(asked, (8, 16, 64))
    assert [row.global_batch for row in growth.fixed] == [32, 32, 32]
    assert [row.global_batch for row in growth.growing] == [32, 64, 256]
    assert growth.fixed[0].efficiency(growth.fixed[0]) == 1
    strong, weak = growth.fixed[-1].efficiency(growth.fixed[0]), growth.growing[-1].efficiency(growth.growing[0])
    assert strong is not None
    assert weak is not None
    assert strong < weak <= 1.05
    nowhere = grow(question(QWEN_32B, gpus=2), (2,))
    assert nowhere.fixed[0].best is None
    assert "GiB" in nowhere.fixed[0].reason
    assert len(plot(growth, "growth").axes) == 2
