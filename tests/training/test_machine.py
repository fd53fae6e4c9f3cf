"""Flags that need a library or a GPU, on machines that have them and on others."""

from argparse import Namespace

import pytest

from megatron_amopo.errors import ConfigError
from megatron_amopo.training import machine
from megatron_amopo.training.machine import check_machine, runnable_fp8_recipes

ENGINE = {"transformer_impl": "transformer_engine"}
PLAIN = {
    "transformer_impl": "local",
    "use_precision_aware_optimizer": False,
    "optimizer_cpu_offload": False,
    "fp8": None,
    "fp8_recipe": "delayed",
    "recompute_granularity": "selective",
    "recompute_modules": None,
}


def fp8(recipe):
    return {**ENGINE, "fp8": "hybrid", "fp8_recipe": recipe}


@pytest.mark.parametrize(
    ("flags", "installed", "capability", "message"),
    [
        ({}, False, None, None),
        (
            ENGINE,
            False,
            (9, 0),
            "--transformer-impl transformer_engine needs Transformer Engine, which isn't installed",
        ),
        (ENGINE, True, None, "--transformer-impl transformer_engine needs a GPU"),
        (ENGINE, True, (8, 0), None),
        ({"use_precision_aware_optimizer": True}, False, (9, 0), "--use-precision-aware-optimizer needs Transformer"),
        ({"use_precision_aware_optimizer": True}, True, (9, 0), None),
        ({"recompute_modules": ["core_attn", "mlp"]}, False, None, None),
        ({"recompute_modules": ["mlp", "layernorm"]}, False, None, "--recompute-modules layernorm needs Transformer"),
        ({"recompute_modules": ["layernorm"]}, True, (9, 0), None),
        ({"recompute_modules": ["layernorm"], "recompute_granularity": "full"}, False, None, None),
        ({"optimizer_cpu_offload": True}, True, None, "--optimizer-cpu-offload takes the optimizer from the GPU"),
        ({"optimizer_cpu_offload": True}, False, (8, 0), None),
        (fp8("delayed"), True, (8, 0), "compute capability 8.9 or higher"),
        (fp8("blockwise"), True, (8, 9), "compute capability 9.0 or higher"),
        (fp8("blockwise"), True, (9, 0), None),
        (fp8("tensorwise"), True, (8, 9), None),
    ],
)
def test_machines(monkeypatch, flags, installed, capability, message):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(machine.device, "has_cuda", lambda: capability is not None)
    monkeypatch.setattr(machine.torch.cuda, "get_device_capability", lambda: capability)
    args = Namespace(**{**PLAIN, **flags})
    if message is None:
        check_machine(args)
    else:
        with pytest.raises(ConfigError, match=message):
            check_machine(args)


@pytest.mark.parametrize(
    ("installed", "capability", "recipes"),
    [
        (False, (9, 0), ()),
        (True, None, ()),
        (True, (8, 0), ()),
        (True, (8, 9), ("delayed", "tensorwise")),
        (True, (9, 0), ("delayed", "tensorwise", "blockwise")),
    ],
)
def test_recipes_of_a_machine(monkeypatch, installed, capability, recipes):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(machine.device, "has_cuda", lambda: capability is not None)
    monkeypatch.setattr(machine.torch.cuda, "get_device_capability", lambda: capability)
    assert runnable_fp8_recipes() == recipes
