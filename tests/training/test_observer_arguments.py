"""The observers' flags: what they ask for, and each that would record nothing refused by its name."""

from argparse import Namespace

import pytest

from megatron_amopo.errors import ConfigError
from megatron_amopo.training.observer_arguments import ObserverConfig, read_observers

OFF = {
    "amopo_ledger": False,
    "amopo_leakage": False,
    "amopo_conflict_interval": None,
    "amopo_fp8_check_interval": None,
    "save": "run",
    "skip_train": False,
    "train_iters": 10,
    "train_samples": None,
    "global_batch_size": 4,
}


def read(dimensions=("general", "quality"), scored=("quality", "style"), has_validation=True, **flags):
    return read_observers(Namespace(**{**OFF, **flags}), dimensions, scored, has_validation=has_validation)


def test_nothing_by_default():
    assert (
        read(save=None, skip_train=True, dimensions=("general",), scored=(), has_validation=False) == ObserverConfig()
    )


def test_a_conflict_interval_may_be_the_whole_run():
    assert read(amopo_conflict_interval=10).conflict_interval == 10
    assert read(amopo_conflict_interval=2, train_iters=None, train_samples=11).conflict_interval == 2


def test_what_is_asked_for():
    asked = read(amopo_ledger=True, amopo_leakage=True, amopo_conflict_interval=5, amopo_fp8_check_interval=2)
    assert asked == ObserverConfig(True, ("quality", "style"), conflict_interval=5, fp8_check_interval=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"amopo_ledger": True, "save": None}, "--amopo-ledger writes into the --save folder"),
        ({"amopo_ledger": True, "skip_train": True}, "--amopo-ledger is of training steps"),
        ({"amopo_conflict_interval": 1, "skip_train": True}, "--amopo-conflict-interval is of training steps"),
        ({"amopo_conflict_interval": 1, "dimensions": ("quality",)}, "--amopo-conflict-interval compares dimensions"),
        ({"amopo_conflict_interval": 11}, "--amopo-conflict-interval 11 is more than the run's 10 steps"),
        ({"amopo_fp8_check_interval": 11}, "--amopo-fp8-check-interval 11 is more than the run's 10 steps"),
        ({"amopo_fp8_check_interval": 1, "skip_train": True}, "--amopo-fp8-check-interval is of training steps"),
        (
            {"amopo_conflict_interval": 3, "train_iters": None, "train_samples": 11},
            "--amopo-conflict-interval 3 is more than the run's 2 steps",
        ),
        ({"amopo_leakage": True, "scored": ()}, "--amopo-leakage: the data has no scored dimension"),
        ({"amopo_leakage": True, "has_validation": False}, "--amopo-leakage is measured at evaluation"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(" ")[0],
)
def test_what_would_record_nothing_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        read(**flags)
