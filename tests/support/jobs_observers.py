"""Jobs for :class:`megatron_amopo.certification.ranks.RankPool` about what a run records beyond its metrics."""

from concurrent.futures import wait
from pathlib import Path
from unittest.mock import patch


class _KilledError(Exception):
    pass


def command_on_a_full_disk(flags: list[str]) -> tuple[int, str, str]:
    """:func:`tests.support.jobs.command` where no part of a ledger can be written."""
    from megatron_amopo.training import ledger
    from tests.support.jobs import command

    with patch.object(ledger.pq, "write_table", side_effect=OSError(28, "No space left on device")):
        return command(flags)


def train_until_killed(flags: list[str], *, after_step: int, saved_step: int, part_rows: int) -> None:
    """A training run that ends without warning after a step, in the middle of writing a part. The checkpoint that it
    last saved is ``saved_step``'s; parts of the ledger have ``part_rows`` rows or a step more.
    """
    from megatron_amopo.certification.observed_run import train
    from megatron_amopo.training import ledger, observers

    original = observers.Observers.end_step
    saved = Path(flags[flags.index("--save") + 1]) / "latest_checkpointed_iteration.txt"

    def end_step(self: observers.Observers, step: int) -> dict[str, float] | None:
        result = original(self, step)
        if step == after_step:
            if self._ledger is not None:
                wait(self._ledger._running)
                (self._ledger.folder / ".part-000000005-000000005-00000.parquet").write_bytes(b"PAR1")
            assert saved.read_text() == str(saved_step)
            raise _KilledError
        return result

    with patch.object(observers.Observers, "end_step", end_step), patch.object(ledger, "_PART_ROWS", part_rows):
        try:
            train(flags, want_tensors=False)
        except _KilledError:
            return
    raise AssertionError("the run came to its end")


def train_with_fp8_check(flags: list[str], factor: float) -> None:
    """A training run on the CPU whose FP8 check compares with a final norm of ``factor`` times the weight."""
    from collections.abc import Iterator
    from contextlib import contextmanager
    from functools import partial
    from typing import Any

    from megatron.core.utils import unwrap_model

    from megatron_amopo.certification.observed_run import train
    from megatron_amopo.training import arguments, hooks
    from megatron_amopo.training.fp8_check import fp8_differences

    @contextmanager
    def other_arithmetic(model: Any) -> Iterator[None]:
        norms = [chunk.decoder.final_layernorm for chunk in unwrap_model(list(model)) if chunk.post_process]
        for norm in norms:
            norm.weight.data *= factor
        yield
        for norm in norms:
            norm.weight.data /= factor

    check = partial(fp8_differences, in_bf16=other_arithmetic)
    with patch.object(arguments, "check_fp8"), patch.object(hooks, "fp8_differences", check):
        train(flags, want_tensors=False)


def fp8_switched_off() -> tuple[list[str | None], list[str | None]]:
    """The formats of a model's two chunks within :func:`without_fp8` that fails, and after it."""
    from types import SimpleNamespace
    from typing import Any

    from megatron_amopo.training.fp8_check import without_fp8

    chunks: list[Any] = [SimpleNamespace(decoder=SimpleNamespace(config=SimpleNamespace(fp8="hybrid"))) for _ in "ab"]
    try:
        with without_fp8(chunks):
            within = [chunk.decoder.config.fp8 for chunk in chunks]
            raise InterruptedError
    except InterruptedError:
        return within, [chunk.decoder.config.fp8 for chunk in chunks]
