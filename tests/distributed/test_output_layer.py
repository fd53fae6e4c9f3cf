"""The fused head within Megatron's data parallelism: weights that arrive late (``--overlap-param-gather``), gradients
that leave early (``--overlap-grad-reduce``) or go into ``main_grad`` (gradient accumulation fusion). Everything equals
one rank that does none of this.
"""

import pytest

from megatron_amopo.certification.observed_run import metrics, train
from tests.distributed.layout_runs import OVERLAP, PP2, SGD, SGD_BY_ADAM, STEPS, TP2, check, flags
from tests.support.jobs_head import train_with_fused_weight_gradients, train_with_late_weights

# Buckets so small that the output layer doesn't travel with the layers before it.
SMALL_BUCKETS = ["--use-distributed-optimizer", *OVERLAP, "--ddp-bucket-size", "1000"]


@pytest.mark.parametrize(
    ("num_ranks", "layout", "tied"),
    [(2, [], False), (2, [], True), (4, PP2, True)],
    ids=["dp2-untied", "dp2-tied", "pp2-dp2-tied"],
)
def test_overlap_of_param_gather_and_grad_reduce(num_ranks, layout, tied, ranks, workplace, one_rank, tmp_path):
    reference = one_rank(tied=tied, optimizer=SGD_BY_ADAM)
    run = ranks.run(train, num_ranks, flags(workplace, tmp_path, *SGD_BY_ADAM, *layout, *SMALL_BUCKETS, tied=tied))[0]
    check(run, tmp_path, *reference)


@pytest.mark.parametrize(
    ("num_ranks", "layout", "tied"), [(2, [], False), (4, PP2, True)], ids=["dp2-untied", "pp2-dp2-tied"]
)
def test_no_stale_gathered_weights_in_the_head(num_ranks, layout, tied, ranks, workplace, one_rank, tmp_path):
    """Weights that nobody waited for are NaN in this run."""
    reference = one_rank(tied=tied, optimizer=SGD_BY_ADAM)
    arguments = flags(workplace, tmp_path, *SGD_BY_ADAM, *layout, *SMALL_BUCKETS, tied=tied)
    run = ranks.run(train_with_late_weights, num_ranks, arguments)[0]
    check(run, tmp_path, *reference)


def test_stale_gathered_weights_would_be_noticed(ranks, workplace, tmp_path):
    """The same run with the head outside its layer's call, as it must not be."""
    go_on = ["--no-check-for-nan-in-loss-and-grad", "--amopo-on-bad-step", "skip"]
    arguments = flags(workplace, tmp_path, *SGD_BY_ADAM, *SMALL_BUCKETS, *go_on, tied=False)
    ranks.run(train_with_late_weights, 2, arguments, outside_the_call=True)
    steps = metrics(tmp_path, "bad_step")
    assert len(steps) == STEPS
    assert {step["loss"] for step in steps} == {None}  # not finite
    assert metrics(tmp_path) == []


# 5 steps of 8 micro-batches through 4 layers, of which each has 4 weights.
MICRO_BATCHES, WEIGHTS = 40, 16


@pytest.mark.parametrize(
    ("num_ranks", "layout", "tied", "head_calls", "kernel_calls"),
    [
        (1, [], True, [MICRO_BATCHES], MICRO_BATCHES * WEIGHTS),
        (2, [*TP2, "--sequence-parallel"], False, [MICRO_BATCHES] * 2, MICRO_BATCHES * WEIGHTS),
        (4, [*PP2, *SMALL_BUCKETS], True, [0, 0, *[MICRO_BATCHES // 2] * 2], MICRO_BATCHES // 2 * WEIGHTS // 2),
    ],
    ids=["one-rank-tied", "tp2-sp-untied", "pp2-dp2-overlap-tied"],
)
def test_fused_weight_gradients(
    num_ranks, layout, tied, head_calls, kernel_calls, ranks, workplace, one_rank, tmp_path
):
    """Gradient accumulation fusion equals autograd's gradients, the head's and, if tied, the embedding's added up."""
    optimizer = SGD_BY_ADAM if "--use-distributed-optimizer" in layout else SGD
    reference = one_rank(tied=tied, optimizer=optimizer)
    arguments = flags(workplace, tmp_path, *optimizer, *layout, tied=tied)
    results = ranks.run(train_with_fused_weight_gradients, num_ranks, arguments)
    check(results[0].run, tmp_path, *reference)
    assert [result.by_head for result in results] == head_calls
    assert [result.by_kernel for result in results] == [kernel_calls] * num_ranks


def test_the_kernel_is_called_under_fusion_alone(ranks, workplace, tmp_path):
    """The head adds to ``main_grad`` either way."""
    result = ranks.run(train_with_fused_weight_gradients, 1, flags(workplace, tmp_path, *SGD), fused=False)[0]
    assert (result.by_kernel, result.by_head) == (0, MICRO_BATCHES)
