"""Where a run goes on: from the checkpoint that ``latest_checkpointed_iteration.txt`` names, or, where that can't be
loaded, from the newest one before it that can.

Takes the ``--load`` folder; gives nothing but a folder that Megatron can load from, with a line about what was wrong.
"""

import argparse
from pathlib import Path

from megatron_amopo.checkpoint.iterations import (
    current_iteration,
    iteration_folder,
    iterations,
    newest_usable,
    tracked,
    why_unusable,
)
from megatron_amopo.checkpoint.megatron import RELEASE, TRACKER
from megatron_amopo.errors import CheckpointError
from megatron_amopo.files import write_whole


def check_loadable(args: argparse.Namespace, flag: str, folder: Path) -> None:
    """See to it that what Megatron will load from a folder with a checkpoint is complete.

    All ranks look, as each decides by itself whether the run starts from here; the first one mends the tracker file.

    Raises:
        CheckpointError: nothing in the folder can be loaded, or not what ``--ckpt-step`` names.
    """
    if flag == "--load" and args.ckpt_step:
        wanted = iteration_folder(folder, args.ckpt_step)
        if reason := why_unusable(wanted):
            others = ", ".join(str(n) for n in iterations(folder) if not why_unusable(iteration_folder(folder, n)))
            raise CheckpointError(f"--ckpt-step {args.ckpt_step}: {wanted}: {reason}; usable are: {others or 'none'}")
        return
    named = tracked(folder)
    reason = f"{TRACKER} is missing or damaged" if named is None else why_unusable(named)
    if reason is None:
        return
    said = reason if named is None else f"{TRACKER} names {named.name}, which can't be loaded: {reason}"
    most = current_iteration(folder)  # what lies beyond it is a future that somebody went back from
    usable = newest_usable(folder, most)
    if usable is None or (named is not None and named.name == RELEASE):
        raise CheckpointError(f"{flag} {folder}: {said}; no {'earlier' if most else 'other'} checkpoint in it can be")
    if flag != "--load":  # a starting point may be anybody's, and is left as it is
        raise CheckpointError(f"{flag} {folder}: {said}. To start from step {usable}, write {usable} into {TRACKER}")
    if args.rank == 0:
        print(f"> {flag} {folder}: {said}. Going on from step {usable}, the newest that can be loaded", flush=True)
        try:
            write_tracker(folder, usable)
        except OSError as error:
            raise CheckpointError(f"{flag} {folder}: {TRACKER} can't be mended ({error.strerror})") from error


def write_tracker(folder: Path, iteration: int) -> None:
    """Name the newest checkpoint, beside and renamed."""
    write_whole(folder / TRACKER, str(iteration))
