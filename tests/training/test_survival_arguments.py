"""Which checkpoints stay, and what the flags of survival refuse."""

import argparse

import pytest

from megatron_amopo.errors import ConfigError
from megatron_amopo.training.survival_arguments import Retention, add_survival_arguments, read_survival

STEPS = [50, 40, 30, 20, 10]


def parsed(*flags, save="run", retain=None):
    parser = argparse.ArgumentParser()
    add_survival_arguments(parser)
    args = parser.parse_args(flags)
    args.save, args.save_retain_interval, args.check_for_nan_in_loss_and_grad = save, retain, True
    return args


@pytest.mark.parametrize(
    ("retention", "steps", "current", "expected"),
    [
        (Retention(), STEPS, 50, []),
        (Retention(2), STEPS, 50, [30, 20, 10]),
        (Retention(9), STEPS, 50, []),
        (Retention(1), STEPS, 50, [40, 30, 20, 10]),
        (Retention(1, every=20), STEPS, 50, [30, 10]),
        (Retention(2), STEPS, 30, [10]),  # 40 and 50 are of a future that was given up
        (Retention(1), [50, 10], 30, []),  # the newest of the past is not the current one: it is all there is
        (Retention(1), [10], 10, []),
        (Retention(1), [], 10, []),
    ],
)
def test_what_is_superfluous(retention, steps, current, expected):
    assert retention.superfluous(steps, current) == expected


def test_flags():
    args = parsed()
    assert read_survival(args).retention == Retention()
    assert read_survival(args).bad_steps.action == "stop"
    assert not args.check_for_nan_in_loss_and_grad

    args = parsed("--amopo-keep-checkpoints", "3", retain=100)
    assert read_survival(args).retention == Retention(3, every=100)
    assert args.save_retain_interval is None  # Megatron deletes nothing by itself
    assert read_survival(parsed(retain=100)).retention == Retention(1, every=100)

    config = read_survival(
        parsed("--amopo-on-bad-step", "skip", "--amopo-loss-spike", "3", "--amopo-grad-norm-spike", "5")
    )
    assert (config.bad_steps.action, config.bad_steps.loss_spike, config.bad_steps.grad_norm_spike) == ("skip", 3, 5)


@pytest.mark.parametrize(
    ("flags", "save", "message"),
    [
        (["--amopo-keep-checkpoints", "2"], None, "--amopo-keep-checkpoints is of the checkpoints in --save"),
        (["--amopo-loss-spike", "1"], "run", "--amopo-loss-spike is 1.0; expected more than 1"),
        (["--amopo-grad-norm-spike", "nan"], "run", "--amopo-grad-norm-spike is nan; expected more than 1"),
    ],
)
def test_refusals(flags, save, message):
    with pytest.raises(ConfigError, match=message):
        read_survival(parsed(*flags, save=save))
