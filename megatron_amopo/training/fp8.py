"""FP8 training through Megatron's own flags and Transformer Engine's layers: what it asks of a run.

Takes Megatron's arguments; gives the multiple that a rank's token counts are padded to, and refuses what Transformer
Engine would refuse, or quietly compute in another precision, in the middle of a run. Attention, norms and the head
compute in bf16 as ever: the fused head reads the output weight itself.
"""

import argparse
from collections.abc import Mapping
from types import MappingProxyType

from megatron_amopo.errors import ConfigError

#: Of a rank's tokens, and of the sizes of every weight matrix on a rank, by the recipe's name in ``--fp8-recipe``:
#: Hopper's FP8 matrix products read 16 values at a time (Megatron's ``get_fp8_align_size``); block-wise scaling has one
#: scale for 128 values of a row, or for 128 × 128 of a weight (arXiv 2412.19437 §3.3.2).
ALIGNMENT: Mapping[str, int] = MappingProxyType({"delayed": 16, "tensorwise": 16, "blockwise": 128})

#: The flags that ask for each. A scale per block leaves gradients no need of e5m2's wider range; delayed scales are of
#: the largest values of the last steps.
RECIPE_FLAGS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "delayed": (
            *("--fp8-format", "hybrid", "--fp8-amax-history-len", "1024", "--fp8-amax-compute-algo", "max"),
            *("--fp8-recipe", "delayed"),
        ),
        "tensorwise": ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
        "blockwise": ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise"),
    }
)

_FURTHER_FLAGS = ("first_last_layers_bf16", "amopo_fp8_check_interval")


def token_multiple(args: argparse.Namespace) -> int:
    """What a micro-batch's tokens are padded to a multiple of, so that each rank's layers get equal parts of aligned
    size: context parallelism splits the tokens evenly, then sequence parallelism each rank's part.
    """
    parts = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    return parts * (ALIGNMENT[args.fp8_recipe] if args.fp8 else 1)


def check_fp8(args: argparse.Namespace) -> None:
    """Whether recipe, layers and layout go together. Needs the model's shape in ``args``, and no GPU.

    Raises:
        ConfigError: naming the flag.
    """
    if not args.fp8:
        for name in _FURTHER_FLAGS:
            if getattr(args, name):
                raise ConfigError(f"--{name.replace('_', '-')} is about FP8, which --fp8-format switches on")
        return
    if args.fp8_recipe not in ALIGNMENT:
        raise ConfigError(f"--fp8-recipe {args.fp8_recipe} is not supported; known: {', '.join(ALIGNMENT)}")
    if args.transformer_impl != "transformer_engine":
        raise ConfigError("--fp8-format needs Transformer Engine's layers: --transformer-impl transformer_engine")
    if not args.bf16:
        raise ConfigError("--fp8-format needs --bf16, the precision of everything else")
    if args.fp8_recipe == "delayed" and args.first_last_layers_bf16:
        raise ConfigError(
            "--first-last-layers-bf16 doesn't work with --fp8-recipe delayed, whose scales are of the whole model; "
            "take tensorwise or blockwise"
        )
    _check_weights(args)


def precision_of(args: argparse.Namespace) -> str:
    """What the forward pass is computed in, in a word: float32, bfloat16 or fp8-RECIPE, with the numbers of first and
    last layers that stay in bfloat16. Both formats have e4m3 in the forward pass.
    """
    if args.fp8 is None:
        return "bfloat16" if args.bf16 else "float32"
    if not args.first_last_layers_bf16:
        return f"fp8-{args.fp8_recipe}"
    return f"fp8-{args.fp8_recipe}-bf16-{args.num_layers_at_start_in_bf16}-{args.num_layers_at_end_in_bf16}"


def _check_weights(args: argparse.Namespace) -> None:
    """Whether each rank's part of every weight matrix is aligned."""
    tp, multiple = args.tensor_model_parallel_size, ALIGNMENT[args.fp8_recipe]
    heads = args.num_attention_heads + 2 * args.num_query_groups
    sizes = {
        "hidden size": (args.hidden_size, 1),
        "feed-forward size": (args.ffn_hidden_size, tp),
        "attention heads' size": (args.num_attention_heads * args.kv_channels, tp),
        "queries', keys' and values' size": (heads * args.kv_channels, tp),
    }
    for what, (size, parts) in sizes.items():
        if size // parts % multiple:
            of_rank = f" / --tensor-model-parallel-size {parts}" if parts > 1 else ""
            raise ConfigError(
                f"--fp8-recipe {args.fp8_recipe} needs sizes that are multiples of {multiple} on every rank; the "
                f"model's {what} is {size}{of_rank} = {size // parts}"
            )
