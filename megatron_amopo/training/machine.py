"""What flags ask of the machine: libraries and GPUs. Checked apart from the rest, which can be checked anywhere."""

import argparse
import importlib.util
from types import MappingProxyType

import torch

from megatron_amopo import device
from megatron_amopo.errors import ConfigError

#: Of the GPU, by FP8 recipe: Ada has FP8 units, Hopper those that block-wise scaling is made for.
_LEAST_CAPABILITY = MappingProxyType({"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)})


def runnable_fp8_recipes() -> tuple[str, ...]:
    """The recipes that this machine's libraries and GPU can compute."""
    if importlib.util.find_spec("transformer_engine") is None or not device.has_cuda():
        return ()
    capability = torch.cuda.get_device_capability()
    return tuple(recipe for recipe, least in _LEAST_CAPABILITY.items() if capability >= least)


def check_machine(args: argparse.Namespace) -> None:
    """Whether this machine has what the flags need.

    Raises:
        ConfigError: naming the flag, and what is missing.
    """
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    needed_by = {
        "--transformer-impl transformer_engine": args.transformer_impl == "transformer_engine",
        "--use-precision-aware-optimizer": args.use_precision_aware_optimizer,  # its Adam
        # Megatron's code for it asks Transformer Engine whether FP8 is on.
        "--recompute-modules layernorm": args.recompute_granularity == "selective"
        and "layernorm" in (args.recompute_modules or ()),
    }
    for flag, given in needed_by.items():
        if given and not has_engine:
            raise ConfigError(f"{flag} needs Transformer Engine, which isn't installed (docs/install.md)")
        if given and not device.has_cuda():
            raise ConfigError(f"{flag} needs a GPU, and torch sees none")
    if args.optimizer_cpu_offload and not device.has_cuda():
        raise ConfigError("--optimizer-cpu-offload takes the optimizer from the GPU, and torch sees none")
    if args.fp8:
        least = _LEAST_CAPABILITY[args.fp8_recipe]
        if torch.cuda.get_device_capability() < least:
            raise ConfigError(
                f"--fp8-format with --fp8-recipe {args.fp8_recipe} needs a GPU of compute capability "
                f"{'.'.join(map(str, least))} or higher"
            )
