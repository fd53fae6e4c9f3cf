"""State of ours that lies among the arguments which Megatron keeps in every checkpoint.

Whatever kind of checkpoint it is (persistent or not, global or local), Megatron compares its arguments with those of
the run, and doesn't where it only takes the weights: so that is where a resumed run hears of them.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.training import checkpointing


@contextmanager
def resumed_arguments_told(*listeners: Callable[[Namespace], None]) -> Iterator[None]:
    """While it lasts, ``listeners`` are given the arguments of the checkpoint that a run is resumed from."""
    original = checkpointing.check_checkpoint_args

    def check_and_tell(checkpoint_args: Any, *rest: Any, **options: Any) -> None:
        original(checkpoint_args, *rest, **options)
        for listener in listeners:
            listener(checkpoint_args)

    checkpointing.check_checkpoint_args = check_and_tell
    try:
        yield
    finally:
        checkpointing.check_checkpoint_args = original
