"""What a rank does for the tests of the launch scripts: read their flags as the training command would."""

import os
import sys
from unittest.mock import patch


def launch_refusal(flags: list[str], world_size: int, allowed: tuple[str, ...] = ()) -> str:
    """The message with which a start with these flags on so many ranks is refused; empty if it isn't. Megatron's
    configuration of the model, which has checks of its own, is made, too.

    Args:
        flags: of the training command.
        world_size: ranks.
        allowed: names of arguments that this project refuses and that are let through, to hear Megatron's word.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_amopo.errors import AmopoError
    from megatron_amopo.training import supported_flags
    from megatron_amopo.training.arguments import parse_arguments
    from megatron_amopo.training.run_record import check_resumed_run

    rest = tuple(flag for flag in supported_flags.UNSUPPORTED if flag.name not in allowed)
    supported = supported_flags.SUPPORTED_MODEL_FLAGS | set(allowed)
    with (
        patch.object(supported_flags, "UNSUPPORTED", rest),
        patch.object(supported_flags, "SUPPORTED_MODEL_FLAGS", supported),
        patch.dict(os.environ, {"WORLD_SIZE": str(world_size)}),
        patch.object(sys, "argv", ["train", *flags]),
    ):
        try:
            args, config = parse_arguments()
            check_resumed_run(args, config)
            core_transformer_config_from_args(args)
        except SystemExit:  # argparse has said what it doesn't know on stderr
            return "Megatron's parser doesn't know a flag"
        except (AmopoError, AssertionError, ValueError) as error:
            return str(error) or repr(error)
    return ""
