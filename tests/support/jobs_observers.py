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


def fp8_contexts(mcore: Path) -> tuple[int, int, int, str | None]:
    """How many layers of a converted checkpoint's model Megatron would compute in FP8: with it on, within
    :func:`without_fp8`, which then fails, and after that; and the format that is on in the end.
    """
    from contextlib import nullcontext, suppress

    import torch
    from megatron.core.transformer import transformer_block

    from megatron_amopo.certification.tiny import random_groups
    from megatron_amopo.data.batching import pack
    from megatron_amopo.model.builder import forward_logps
    from megatron_amopo.training.fp8_check import without_fp8
    from tests.support.jobs_model import loaded_model

    batch = pack(random_groups(1, dimensions=2), torch.zeros(1, 2, 2), [True])
    with loaded_model(mcore) as (model, vocab_size):
        model.config.fp8, model.config.fp8_recipe = "hybrid", "tensorwise"

        def layers_in_fp8() -> int:
            with patch.object(transformer_block, "get_fp8_context", side_effect=lambda *_: nullcontext()) as context:
                forward_logps(model, batch, vocab_size=vocab_size)
            return context.call_count

        before, within = layers_in_fp8(), -1
        with suppress(InterruptedError), without_fp8([model]):
            within = layers_in_fp8()
            raise InterruptedError
        return before, within, layers_in_fp8(), model.config.fp8
