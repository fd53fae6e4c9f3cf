"""What a rank does for the tests of launch commands: read their flags as the training command would."""

import contextlib
import os
import sys
from unittest.mock import patch


def launch_refusal(flags: list[str], world_size: int, *, on_hopper: bool = True) -> str:
    """The message with which a start with these flags on so many ranks is refused; empty if it isn't. Megatron's
    configuration of the model, which has checks of its own, is made, too.

    Args:
        flags: of the training command.
        world_size: ranks.
        on_hopper: leave out whether this machine has what the flags need.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_amopo.errors import AmopoError
    from megatron_amopo.training import arguments
    from megatron_amopo.training.run_record import check_resumed_run

    with (
        patch.object(arguments, "check_room"),  # on this machine's disk
        patch.object(arguments, "check_machine") if on_hopper else contextlib.nullcontext(),
        patch.dict(os.environ, {"WORLD_SIZE": str(world_size)}),
        patch.object(sys, "argv", ["train", *flags]),
    ):
        try:
            args, config = arguments.parse_arguments()
            check_resumed_run(args, config)
            core_transformer_config_from_args(args)
        except (AmopoError, AssertionError, ValueError) as error:
            return str(error) or repr(error)
    return ""
