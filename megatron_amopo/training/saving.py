"""Checkpoints that are usable or absent, and how many of them stay.

Takes Megatron's saving, synchronous or not; changes where it writes: into ``.iter_0000100.partial``, which is renamed
to ``iter_0000100`` when every rank has written its part and Megatron its metadata, before the tracker file names it. So
a run that is killed at any moment leaves folders of complete checkpoints, and the tracker's is one of them. Older ones
are renamed out of sight before they are deleted, when the tracker names a newer one. What killed runs left out of sight
is removed at the next start; what a failed save left, at once.

Everything here is the first rank's work, in step with the others.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.training import checkpointing, training
from torch.distributed.checkpoint.api import CheckpointException

from megatron_amopo.checkpoint.iterations import (
    current_iteration,
    iteration_folder,
    iterations,
    leftovers,
    tracked,
    why_unusable,
)
from megatron_amopo.checkpoint.megatron import FORMAT, TRACKER
from megatron_amopo.checkpoint.output_folder import sync
from megatron_amopo.errors import AmopoError
from megatron_amopo.training.resuming import write_tracker
from megatron_amopo.training.survival_arguments import Retention, superfluous
from megatron_amopo.training.together import FailedTogether, gathered, together


class SaveFailed(AmopoError):
    """A checkpoint couldn't be written; raised on all ranks alike: one of them has to say it."""


class Saving:
    """The saving of one run, while it lasts as a context.

    Args:
        folder: ``--save``; None where nothing is saved.
        retention: which checkpoints stay.
    """

    def __init__(self, folder: str | None, retention: Retention):
        self._folder, self._retention = Path(folder or ""), retention
        self._saves = folder is not None
        self._loaded: Path | None = None  # the checkpoint that the run went on from
        self._complete: set[Path] = set()  # of whose checkpoints that is known: a large model's take a while to look at
        self._partial: Path | None = None  # what is being written
        self._unnamed = False  # whether a checkpoint was published since superfluous ones were looked for
        self._deleting: list[threading.Thread] = []

    def __enter__(self) -> None:
        self._write = checkpointing.dist_checkpointing.save
        self._finalize = training.maybe_finalize_async_save
        checkpointing.dist_checkpointing.save = self._save
        training.maybe_finalize_async_save = self._finalize_and_thin_out

    def __exit__(self, *exc: Any) -> None:
        checkpointing.dist_checkpointing.save = self._write
        training.maybe_finalize_async_save = self._finalize
        for thread in self._deleting:
            thread.join()

    def begin(self, iteration: int) -> None:
        """Training begins after step ``iteration``: remove what killed runs left, superfluous checkpoints, too.

        Raises:
            SaveFailed: the file system doesn't let it.
        """
        if not self._saves:
            return
        of_step = iteration_folder(self._folder, iteration)
        resumed = iteration > 0 and tracked(self._folder) == of_step and why_unusable(of_step) is None
        if gathered(resumed)[0]:  # the first rank's word for all, whatever the others' file systems show by now
            self._loaded = of_step
            self._unnamed = True  # a run that was killed had no time to thin out
        with self.failures():
            self.on_first_rank(self._clean)
        self.thin_out()

    def _clean(self) -> None:
        for path in leftovers(self._folder):
            shutil.rmtree(path, ignore_errors=True)
        for number in iterations(self._folder):
            with suppress(OSError):  # of Megatron's making, and empty until it is complete
                iteration_folder(self._folder, number).rmdir()

    def prepare(self, iteration: int) -> None:
        """Make the folder that Megatron would make on the first rank alone: where that can't be, all hear of it."""
        self.on_first_rank(lambda: iteration_folder(self._folder, iteration).mkdir(parents=True, exist_ok=True))

    @property
    def newest(self) -> str:
        """What a run that is started again goes on from, in words."""
        named = tracked(self._folder)
        return f"the newest checkpoint is {named.name}" if named else "there is no checkpoint"

    def is_saved(self, iteration: int) -> bool:
        """Whether the checkpoint of ``iteration`` is the one that the run went on from: it has taken no step since."""
        return self._loaded == iteration_folder(self._folder, iteration)

    def thin_out(self) -> None:
        """Delete superfluous checkpoints, now that the tracker names the newest; doesn't wait for it. One that can't be
        deleted stays: it hinders nothing but the disk.
        """
        if not self._unnamed or dist.get_rank() != 0:
            return
        current = current_iteration(self._folder)
        if current is None or not self._is_complete(iteration_folder(self._folder, current)):
            return
        self._unnamed = False
        for old in superfluous(self._folder, self._retention, current, self._is_complete):
            doomed = old.with_name(f".{old.name}.deleted")
            try:
                old.rename(doomed)
            except OSError as error:
                print(f"> {old} is superfluous, and can't be deleted: {error}", flush=True)
                continue
            thread = threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True})
            thread.start()
            self._deleting = [*(other for other in self._deleting if other.is_alive()), thread]

    def _is_complete(self, path: Path) -> bool:
        if path not in self._complete and why_unusable(path) is None:
            self._complete.add(path)
        return path in self._complete

    def _finalize_and_thin_out(self, *rest: Any, **options: Any) -> None:
        with self.failures():
            self._finalize(*rest, **options)
        self.thin_out()

    def _save(self, state: Any, folder: str, *rest: Any, **options: Any) -> Any:
        """Megatron's ``dist_checkpointing.save``, into a folder out of sight."""
        final = Path(folder)
        partial = final.with_name(f".{final.name}.partial")
        with self.failures():
            self.on_first_rank(lambda: _make_anew(partial, final))
            self._partial = partial
            request = self._write(state, str(partial), *rest, **options)
            if request is None:
                self._publish(partial, final)
            else:  # runs when all ranks have written, before Megatron's update of the tracker file
                request.finalize_fns.append(lambda: self._publish(partial, final))
        return request

    def _publish(self, partial: Path, final: Path) -> None:
        self.on_first_rank(lambda: _publish(partial, final))
        self._partial, self._unnamed = None, True

    def on_first_rank(self, work: Callable[[], None]) -> None:
        """Work on the file system; where it fails, all ranks hear of it (:func:`together`)."""
        together(work if dist.get_rank() == 0 else lambda: None)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Failures to write as our error, without what was half written. Megatron raises most of them on all ranks,
        with the reason on the first.
        """
        try:
            yield
        except (CheckpointException, CheckpointingException, FailedTogether, OSError) as error:
            if self._partial is not None and dist.get_rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise SaveFailed(
                f"--save {self._folder}: a checkpoint can't be written: {_reason(error)}; {self._free()}; {self.newest}"
            ) from error

    def _free(self) -> str:
        try:  # Megatron's errors don't always tell of a full disk
            return f"{shutil.disk_usage(self._folder).free / 2**30:.1f} GiB are free there"
        except OSError as error:
            return f"the folder can't be looked at ({error.strerror})"


def _make_anew(partial: Path, final: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with suppress(OSError):  # Megatron has just made it, empty
        final.rmdir()


def _publish(partial: Path, final: Path) -> None:
    sync(partial / FORMAT)  # the other files are on the disk already
    sync(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # saved by a run that somebody has gone back from: the tracker names an older one
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    # Before Megatron writes the same, into a file that is empty for a moment, on one rank alone.
    write_tracker(final.parent, int(final.name.removeprefix("iter_")))
    sync(final.parent / TRACKER)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return str(error)
