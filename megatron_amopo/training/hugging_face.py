"""Hugging Face folders at both ends of a run: ``--amopo-hf-model`` starts from one, ``--amopo-export-hf`` leaves one.

At the start, before any process group exists, the folder is imported once into a cache of Megatron checkpoints
(``checkpoint/import_cache.py``), and the run goes on as if ``--pretrained-checkpoint`` had named the cache's entry. A
run that resumes from ``--load`` imports nothing. At the end, when all process groups are gone, the first rank exports
the last step's weights.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.hf_files import CONFIG
from megatron_amopo.checkpoint.import_cache import (
    CACHE_VARIABLE,
    TRACKER,
    ImportFailed,
    cache_folder,
    entry_name,
    import_once,
)
from megatron_amopo.checkpoint.iterations import holds_checkpoint
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.errors import AmopoError, CheckpointError, ConfigError


def add_hugging_face_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags of this file."""
    group.add_argument(
        "--amopo-hf-model",
        type=Path,
        metavar="DIR",
        help="start from this Hugging Face folder, imported once; instead of --pretrained-checkpoint",
    )
    group.add_argument(
        "--amopo-hf-cache",
        type=Path,
        metavar="DIR",
        help=f"where imported models are kept (default: ${CACHE_VARIABLE}, else ~/.cache/megatron_amopo)",
    )
    group.add_argument(
        "--amopo-export-hf",
        type=Path,
        metavar="DIR",
        help="after the last step, write the weights as a Hugging Face folder, which must not exist, unless it holds "
        "just these weights",
    )


@dataclass(frozen=True)
class HfStart:
    """A Hugging Face folder that a run starts from, and the cache's entry for it, which may not exist yet."""

    source: Path
    entry: Path

    def import_weights(self, *, quiet: bool) -> None:
        """Make the entry, or wait for the process that does. For all ranks, before ``torch.distributed`` starts.

        Raises:
            ImportFailed: the import failed in this process.
            AmopoError: it can't be done, or failed in another process.
        """
        try:
            entry = import_once(self.source, self.entry.parent, _convert, quiet=quiet)
        except ConfigError:  # names its flag
            raise
        except CheckpointError as error:
            raise type(error)(f"--amopo-hf-model {error}") from error
        if entry != self.entry:
            raise ImportFailed(f"--amopo-hf-model {self.source}: its files changed while the run was starting")


def _convert(source: Path, target: Path) -> None:
    done = hf_to_megatron(source, target, progress=True)
    for note in (*done.notes, *done.warnings):
        print(f"> note: {note}", flush=True)


def find_hf_start(args: argparse.Namespace) -> HfStart | None:
    """What ``--amopo-hf-model`` asks for; None without it, and where ``--load`` holds a checkpoint to go on from.

    Raises:
        AmopoError: it contradicts another flag, or isn't a Hugging Face folder.
    """
    source = args.amopo_hf_model
    if source is None:
        if args.amopo_hf_cache is not None:
            raise ConfigError("--amopo-hf-cache says where --amopo-hf-model is imported to; give that, too")
        return None
    if args.pretrained_checkpoint is not None:
        raise ConfigError("--amopo-hf-model and --pretrained-checkpoint both say what to start from; give one")
    if args.load is not None and holds_checkpoint(Path(args.load)):
        return None
    if not source.is_dir():
        raise ConfigError(f"--amopo-hf-model {source}: no such folder (give a downloaded model, not its name)")
    if (source / TRACKER).is_file():
        raise ConfigError(f"--amopo-hf-model {source} is a Megatron checkpoint: give it as --pretrained-checkpoint")
    if not (source / CONFIG).is_file():
        raise ConfigError(f"--amopo-hf-model {source}: not a Hugging Face folder (no {CONFIG})")
    try:
        return HfStart(source, (args.amopo_hf_cache or cache_folder()) / entry_name(source))
    except CheckpointError as error:
        raise CheckpointError(f"--amopo-hf-model {error}") from error


def check_export(args: argparse.Namespace) -> None:
    """Whether a run can leave a Hugging Face folder where ``--amopo-export-hf`` says, told before it starts, once the
    number of its last step is known. The same command after the end is no error, as its export is there: whether it is
    just that, :func:`export_last_step` sees.

    Raises:
        ConfigError: naming the flag.
    """
    target = args.amopo_export_hf
    if target is None:
        return
    if args.skip_train:
        raise ConfigError("--amopo-export-hf with --skip-train: nothing would be trained")
    if args.save is None:
        raise ConfigError("--amopo-export-hf needs --save: the last step's checkpoint is what is exported")
    if target.exists() and not _has_ended(args):
        raise ConfigError(f"--amopo-export-hf {target} exists already; name another folder, or remove it")
    inner, outer = target.resolve(), Path(args.save).resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ConfigError(f"--amopo-export-hf {target} and --save {args.save}: neither may hold the other")


def _has_ended(args: argparse.Namespace) -> bool:
    """Whether the run's last step is the newest in its folder, and this start goes on from there."""
    if args.load is None or args.finetune or args.ckpt_step is not None or not Path(args.load).is_dir():
        return False
    steps = args.train_samples // args.global_batch_size if args.train_iters is None else args.train_iters
    return Path(args.load).samefile(args.save) and _saved_step(Path(args.save)) == str(steps)


def _saved_step(save: Path) -> str:
    tracker = save / TRACKER
    return tracker.read_text(encoding="utf-8").strip() if tracker.is_file() else "none"


def export_last_step(target: Path, save: Path, train_iters: int) -> None:
    """Write the weights of the last step as a Hugging Face folder; says so where the run ended before.

    Args:
        target: new folder, or one that holds just these weights, as a former call leaves it.
        save: the run's checkpoints.
        train_iters: the number of the last step.

    Raises:
        CheckpointError: naming the command that does it by hand. The checkpoint stays as it is.
    """
    saved = _saved_step(save)
    if saved != str(train_iters):
        print(f"> not exported to {target}: the last step is {train_iters}, the last saved {saved}", flush=True)
        return
    if target.exists():
        _check_exported(target, save, train_iters)
        return
    rescue = (
        f"the checkpoint of step {train_iters} is whole; export it by hand: "
        f"tools/convert_checkpoint.py megatron-to-hf {save} {target}"
    )
    try:
        done = megatron_to_hf(save, target, iteration=train_iters, progress=True)
    except AmopoError as error:
        raise CheckpointError(f"--amopo-export-hf {target}: {error}; {rescue}") from error
    except BaseException:
        print(f"> not exported to {target}; {rescue}", file=sys.stderr, flush=True)
        raise
    for note in (*done.notes, *done.warnings):
        print(f"> note: {note}")
    size = f"{done.tensors} tensors, {done.nbytes:,} bytes"
    print(f"> exported step {train_iters} to {target}: {size}, {done.seconds:.1f} s", flush=True)


def _check_exported(target: Path, save: Path, step: int) -> None:
    otherwise = (
        f"step {step} is not exported; remove {target}, or name another folder: "
        f"tools/convert_checkpoint.py megatron-to-hf {save} OTHER"
    )
    try:
        rows = verify(target, save, iteration=step, progress=True)
    except AmopoError as error:
        raise CheckpointError(f"--amopo-export-hf {target} exists: {error}; {otherwise}") from error
    if differing := [name for row in rows for name in row.differing]:
        raise CheckpointError(
            f"--amopo-export-hf {target} holds other weights ({len(differing)} tensors differ, such as "
            f"{differing[0]}); {otherwise}"
        )
    print(f"> exported already: {target} holds the weights of step {step}, bit by bit", flush=True)
