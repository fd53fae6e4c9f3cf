"""Room for a checkpoint, told before a run starts."""

import shutil
from argparse import Namespace
from collections import namedtuple

import pytest

from megatron_amopo.certification.tiny import tiny_config
from megatron_amopo.errors import ConfigError
from megatron_amopo.training.checks import check_room, checkpoint_bytes

CONFIG = tiny_config(architectures=["Qwen2ForCausalLM"]).to_dict()
USAGE = namedtuple("usage", "total used free")


def arguments(**changes):
    return Namespace(
        **{"save": "run", "skip_train": False, "bf16": True, "optimizer": "adam", "no_save_optim": None} | changes
    )


def test_bytes_per_parameter():
    """Weights in the type that they are computed in; float32 weights beside bfloat16 ones; two moments."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for changes, each in (
        ({}, 14),
        ({"bf16": False}, 12),
        ({"optimizer": "sgd"}, 6),
        ({"no_save_optim": True}, 2),
        ({"bf16": False, "no_save_optim": True}, 4),
    ):
        assert checkpoint_bytes(arguments(**changes), CONFIG) == numbers * each


def test_too_little_room(monkeypatch):
    needed = checkpoint_bytes(arguments(), CONFIG)
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(2 * needed, 0, free))
    check_room(arguments(), CONFIG)
    free = needed - 1
    for without in ({"save": None}, {"skip_train": True}):
        check_room(arguments(**without), CONFIG)
    with pytest.raises(ConfigError, match=r"--save run: a checkpoint takes about .* GiB; .* GiB are free"):
        check_room(arguments(), CONFIG)
