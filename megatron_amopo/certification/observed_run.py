"""A training run with its first gradients and its weights laid open: what certificates and tests compare.

Takes the flags of a training command, on every rank of a job of :class:`~megatron_amopo.certification.ranks.RankPool`;
gives a :class:`TrainedRun` whose tensors are whole, under the names and in the shapes of a checkpoint, whatever layout
computed them. The run itself is the one that ``torchrun`` would start.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class TrainedRun:
    """What a run left, assembled from all ranks; on rank 0, empty elsewhere. Names and shapes are those of a
    checkpoint.
    """

    initial: dict[str, Tensor]  # weights before the first step
    gradients: dict[str, Tensor]  # of the first step, after all reductions
    weights: dict[str, Tensor]  # after the last step
    printed: str  # by rank 0
    copies_error: float = 0.0  # how far ranks differ that hold the same gradients or weights: a relative norm


def train(flags: list[str], *, want_tensors: bool = True) -> TrainedRun:
    """``torchrun … -m megatron_amopo.training.train FLAGS`` within this process, through Megatron's ``pretrain``."""
    from megatron.training import training

    from megatron_amopo.training.train import prepare, run

    sys.argv = ["train", *flags]
    captured: dict[str, Any] = {}
    errors: dict[str, float] = {}
    printed = io.StringIO()
    with clean_megatron(), contextlib.redirect_stdout(printed):
        args, config = prepare()
        if want_tensors:
            args.save_wgrads_interval = 1

        def keep_model(*a: Any, **k: Any) -> Any:
            result = original_setup(*a, **k)
            captured["model"] = result[0]
            for chunk in result[0]:
                _keep_gradients_whole(chunk)
            return result

        def keep_first_gradients(_folder: Any, _state: Any, iteration: int, _label: str) -> None:
            captured["initial"], _ = assemble(captured["model"], lambda parameter: parameter.data)
            captured["gradients"], errors["gradients"] = assemble(captured["model"], lambda p: p.main_grad)
            args.save_wgrads_interval = None

        original_setup, original_save = training.setup_model_and_optimizer, training.save_grads
        training.setup_model_and_optimizer, training.save_grads = keep_model, keep_first_gradients
        try:
            try:
                run(args, config)
            except SystemExit as stop:  # Megatron's way to stop early, as asked by --exit-interval
                if stop.code:
                    raise
            weights: dict[str, Tensor] = {}
            if want_tensors:
                weights, errors["weights"] = assemble(captured["model"], lambda parameter: parameter.data)
        finally:
            training.setup_model_and_optimizer, training.save_grads = original_setup, original_save
            for chunk in captured.get("model", ()):
                _let_go(chunk)
        return TrainedRun(
            captured.get("initial", {}),
            captured.get("gradients", {}),
            weights,
            printed.getvalue(),
            copies_error=max(errors.values(), default=0.0),
        )


def _let_go(chunk: Any) -> None:
    """Let the model be collected, and with it its process groups, whose threads would pile up over many runs: its
    configuration refers to the optimizer, and that back to it through autograd's nodes, where Python can't see it."""
    for name in ("grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func", "finalize_model_grads_func"):
        setattr(chunk.config, name, None)


def _keep_gradients_whole(chunk: Any) -> None:
    """Where gradients are saved, Megatron sums them for all ranks, though the distributed optimizer needs each rank's
    part alone. Its pipeline schedules forget that when they start the sum themselves (overlapped), which this mends.
    """

    def start_grad_sync(*_: Any) -> None:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group.start_grad_sync(force_all_reduce=chunk.force_all_reduce)

    chunk.start_grad_sync = start_grad_sync


@contextlib.contextmanager
def clean_megatron() -> Iterator[None]:
    """Megatron keeps its state in globals; leave none of it to the next job."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.parallel_state import destroy_model_parallel
    from megatron.training import checkpointing, training

    reduce_scatter = param_and_grad_buffer.dist_reduce_scatter_func  # a flag replaces it
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            training.destroy_global_state()
        destroy_model_parallel()
        # A rank that has these takes part in a collective that a fresh rank doesn't.
        training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
        param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter
        checkpointing._LOADED_ITERATION = None
        checkpointing._CHECKPOINT_VERSION = None
        if dist.is_initialized():
            dist.destroy_process_group()


def assemble(model_chunks: list[torch.nn.Module], value: Callable[[Any], Tensor]) -> tuple[dict[str, Tensor], float]:
    """Whole tensors from all ranks, on rank 0: ``value`` of each parameter put together as a checkpoint would be.

    The second result says how far ranks differ that hold the same part: the norm of the copies' differences from the
    first one over the norm of all copies.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.utils import unwrap_model

    pieces: list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]] = []
    for chunk in unwrap_model(model_chunks):
        backup = {parameter: parameter.data for parameter in chunk.parameters()}
        try:
            for parameter in backup:
                # Another type would make autograd forget the parameter's hooks, by which gradients are accumulated.
                parameter.data = value(parameter).detach().to(parameter.dtype).view_as(parameter)
            state = chunk.sharded_state_dict()
            apply_factories(state)
            for shard in nested_values(state):
                if isinstance(shard, ShardedTensor) and shard.data is not None:
                    data = shard.data.detach().float().cpu().clone().reshape(shard.local_shape)
                    pieces.append((shard.key, shard.global_shape, shard.global_offset, data))
        finally:
            for parameter, data in backup.items():
                parameter.data = data
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, pieces)
    if dist.get_rank() != 0:
        return {}, 0.0
    whole: dict[str, Tensor] = {}
    difference = total = 0.0
    for key, shape, offset, data in (piece for rank in gathered for piece in rank):
        target = whole.setdefault(key, torch.full(shape, float("nan")))
        # Leading axes that the local tensor lacks (the layer) are of size one.
        window = tuple(
            slice(o, o + s) for o, s in zip(offset, (1,) * (len(shape) - data.dim()) + tuple(data.shape), strict=True)
        )
        copy = data.reshape(target[window].shape)
        if not target[window].isnan().all():
            difference += (copy - target[window]).double().square().sum().item()
            total += copy.double().square().sum().item()
        else:
            target[window] = copy
    return whole, (difference / total) ** 0.5 if total else 0.0


def metrics(folder: Path, split: str = "train", file: str = "metrics.jsonl") -> list[dict[str, float]]:
    """The metrics of a run, in order, with their iteration."""
    lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    return [{"iteration": line["iteration"], **line["metrics"]} for line in lines if line["split"] == split]
