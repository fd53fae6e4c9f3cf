"""The budget of tokens and the balance that is reported, against a plain walk over the run."""

from functools import partial

import numpy as np
import pytest

from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.planning import Balance, GlobalBatches, Schedule, fits


def batches(tokens, *, num_samples=None, size=16, dp_size=2, seed=1):
    return GlobalBatches(np.asarray(tokens), SampleOrder(len(tokens), seed), num_samples or len(tokens), size, dp_size)


def lengths(seed=0, records=200):
    return np.random.default_rng(seed).lognormal(6, 0.5, records).astype(np.int64)


def longest_of_several(run, micro_batch_size):
    """The most tokens of any micro-batch of the run that holds more than one record."""
    return max(
        (
            int(run.tokens[run.order(samples)[0]][list(batch.items)].sum())
            for samples, plan in zip(global_batches(run), run.plans(micro_batch_size), strict=True)
            for own in plan.ranks
            for batch in own
            if len(batch.items) > 1
        ),
        default=0,
    )


def global_batches(run):
    return [range(at, min(at + run.size, run.num_samples)) for at in range(0, run.num_samples, run.size)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [700, 1000, 2000, 5000])
def test_the_budget_holds_in_every_step_and_no_larger_size_would_do(budget, seed):
    """Two epochs and a half, the last batch incomplete."""
    run = batches(lengths(seed), num_samples=500)
    size = run.micro_batch_size_within(budget, Schedule())
    assert longest_of_several(run, size) <= budget
    for larger in (other for other in (2, 4, 8) if other > size):
        assert longest_of_several(run, larger) > budget


def test_a_generous_budget_takes_one_micro_batch():
    assert batches(lengths()).micro_batch_size_within(10**9, Schedule()) == 8


@pytest.mark.parametrize(
    ("schedule", "taken"),
    [
        (Schedule(), range(1, 10)),
        (Schedule(2, 2), (2, 4, 6, 8)),
        (Schedule(4, 2), (4, 6, 7, 8)),
        (Schedule(4, 4), (4, 8)),
    ],
)
def test_numbers_of_micro_batches_that_a_schedule_takes(schedule, taken):
    assert [number for number in range(10) if schedule.takes(number)] == list(taken)


def test_the_number_of_micro_batches_is_one_that_the_schedule_takes():
    run = batches(lengths(), size=24)  # 12 records on a rank
    assert run.micro_batch_size_within(10**9, Schedule(2, 2)) == 6
    assert run.micro_batch_size_within(10**9, Schedule(4, 4)) == 3
    assert run.micro_batch_size_within(10**9, Schedule(5, 5)) == 1  # takes none of them


@pytest.mark.parametrize("num_samples", [200, 193, 177])
def test_a_record_longer_than_the_budget_has_a_micro_batch_of_its_own(num_samples):
    tokens = lengths()
    tokens[[17, 90]] = 40_000
    run = batches(tokens, num_samples=num_samples)
    for budget in (3000, 10):  # 10: every record is longer
        size = run.micro_batch_size_within(budget, Schedule())
        assert size >= 1
        assert longest_of_several(run, size) <= budget
        for samples, plan in zip(global_batches(run), run.plans(size), strict=True):
            own_tokens = tokens[run.order(samples)[0]]
            for batch in (batch for own in plan.ranks for batch in own):
                assert len(batch.items) == 1 or own_tokens[list(batch.items)].max() <= budget


def test_fits_asks_for_every_micro_batch():
    run = batches([10, 10, 10, 50], size=4, dp_size=1)
    (plan,) = run.plans(2)
    assert sorted(plan.tokens.flatten().tolist()) == [30, 50]
    assert fits(plan, 30)
    assert not fits(plan, 29)


def test_balance_is_that_of_the_ranks():
    run = batches(lengths(), size=32, dp_size=4)
    totals = [plan.tokens.sum(1) for plan in run.plans(2)]
    balance = Balance.of(run.plans(2))
    ratios = [each.max() / each.mean() for each in totals]
    assert (balance.steps, balance.worst) == (len(run), max(ratios)) == (7, pytest.approx(balance.worst))
    assert balance.mean == pytest.approx(np.mean(ratios))
    assert balance.longest == max(plan.tokens.max() for plan in run.plans(2))
    assert Balance.of(run.plans(2, most=3)).steps == 3


def test_the_plan_is_a_pure_function():
    make = partial(batches, lengths(), num_samples=333)
    assert make().micro_batch_size_within(1500, Schedule()) == make().micro_batch_size_within(1500, Schedule())
    for one, other in zip(make().plans(2), make().plans(2), strict=True):
        assert one.ranks == other.ranks
