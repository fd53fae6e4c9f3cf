"""Megatron's `torch_dist` checkpoints in and out, without a model and without a process group.

A `torch_dist` checkpoint is a torch.distributed.checkpoint (DCP) folder: data files, `.metadata` that says which file
holds which part of which tensor, and Megatron's `metadata.json` that names the format. Beside it lie the other
iterations, and above them `latest_checkpointed_iteration.txt`. Megatron stores what isn't a tensor as pickled objects
under `name/shard_<place>_<places>`.

`write_checkpoint` plans all parts from the table of parameters and asks for each tensor when it is written.
`MegatronCheckpoint` reads the model's tensors of any checkpoint that Megatron saved, whatever TP, PP, DP and optimizer
it was saved with.

DCP's metadata and Megatron's objects are pickles, which run code when read: open only checkpoints that you trust.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_amopo.checkpoint.parameters import Parameter
from megatron_amopo.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_FORMAT = "metadata.json"
_DCP_METADATA = ".metadata"
# Version 3 orders linear_qkv's rows by query group; Megatron reorders those of older checkpoints.
_CHECKPOINT_VERSION = 3.0
_OPTIMIZER_PREFIXES = ("optimizer.", "chained_")

Source = Callable[[Parameter, int | None], torch.Tensor]
"""Gives one layer's tensor of a parameter (layer None where it exists once), of shape Parameter.shape."""


def write_checkpoint(
    folder: Path,
    table: Sequence[Parameter],
    dtypes: Mapping[str, torch.dtype],
    arguments: Mapping[str, Any],
    source: Source,
) -> None:
    """Write a checkpoint that Megatron loads as a pretrained one ("release"): weights only, training starts at
    iteration 0.

    Args:
        folder: exists; gets `release/` and the tracker file. The vocabulary is written without padding, since
            Megatron's loader fills padded rows with zeros.
        table: the model's parameters.
        dtypes: Megatron name -> type of the parameter.
        arguments: Megatron arguments of the shape, stored for `--use-checkpoint-args` and for Megatron's checks.
        source: called once for each part, when it is written.
    """
    release = folder / _RELEASE
    release.mkdir()
    # Weights alone: the loader must look for nothing of an optimizer or of random generators.
    common = {
        "args": argparse.Namespace(
            **arguments,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            no_save_optim=True,
            no_save_rng=True,
        ),
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    objects: dict[str, object] = {"common_state/shard_0_1": common}
    for module, layers in _modules_with_extra_state(table):
        for place in range(layers or 1):
            objects[f"{module}._extra_state/shard_{place}_{layers or 1}"] = None
    planner = _WritePlanner(table, dtypes, objects, source)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({}, storage_writer=dcp.FileSystemWriter(release), planner=planner, no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    (release / _FORMAT).write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / TRACKER).write_text(_RELEASE)


def _modules_with_extra_state(table: Sequence[Parameter]) -> list[tuple[str, int | None]]:
    """Modules whose `_extra_state` Megatron's loader asks for, and how many layers have it.

    The loader fails on an object that it asks for and doesn't find. Transformer Engine's layers ask for their FP8
    state; the linear layers of the local specification ask, too, and save None, which is what both read as "nothing to
    restore". Objects that nobody asks for do no harm. Embedding and output layer have none.
    """
    modules = dict.fromkeys((parameter.megatron.rpartition(".")[0], parameter.layers) for parameter in table)
    layers = max(parameter.layers or 0 for parameter in table)
    inside = [(module, count) for module, count in modules if module.startswith("decoder.")]
    return [*inside, ("decoder.layers.self_attention.core_attention", layers)]


class _WritePlanner(dcp.DefaultSavePlanner):
    """Plans one chunk for each layer of each parameter, and gets its tensor when the writer comes to it."""

    def __init__(
        self,
        table: Sequence[Parameter],
        dtypes: Mapping[str, torch.dtype],
        objects: Mapping[str, object],
        source: Source,
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._source = source
        self._objects = objects
        self._parts: dict[MetadataIndex, tuple[Parameter, int | None]] = {}
        self._items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
        for parameter in table:
            properties = TensorProperties(dtype=dtypes[parameter.megatron])
            for layer in parameter.layer_numbers:
                chunk = _chunk(parameter, layer)
                index = MetadataIndex(parameter.megatron, chunk.offsets)
                data = TensorWriteData(chunk, properties, torch.Size(parameter.stored_shape))
                self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
                self._parts[index] = (parameter, layer)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            # Megatron packs an object into a list of those that share the key.
            torch.save([self._objects[write_item.index.fqn]], stream)
            return stream
        parameter, layer = self._parts[write_item.index]
        return self._source(parameter, layer).reshape(_chunk(parameter, layer).sizes)


def _chunk(parameter: Parameter, layer: int | None) -> ChunkStorageMetadata:
    """Place of one layer's tensor in the stored one."""
    front = () if layer is None else (layer,)
    return ChunkStorageMetadata(
        offsets=torch.Size((*front, *(0 for _ in parameter.shape))),
        sizes=torch.Size((*(1 for _ in front), *parameter.shape)),
    )


class MegatronCheckpoint:
    """One iteration of a Megatron checkpoint folder, opened for reading the model's tensors.

    Attributes:
        path: the iteration's folder (`iter_0000100`, `release`).
    """

    def __init__(self, path: Path, metadata: Metadata, reader: dcp.FileSystemReader) -> None:
        self.path = path
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._reader = reader

    @classmethod
    def open(cls, folder: str | Path, iteration: int | None = None) -> MegatronCheckpoint:
        """Open the newest iteration, which is the one that the tracker file names, or the one asked for.

        Raises:
            CheckpointError: no folder, no checkpoint in it, not that iteration, another format, or damaged metadata.
        """
        path = _iteration_folder(Path(folder), iteration)
        _check_format(path)
        reader = dcp.FileSystemReader(path)
        try:
            metadata = reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError, IndexError) as error:
            raise CheckpointError(f"{path / _DCP_METADATA}: can't be read: {error}") from error
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        return cls(path, metadata, reader)

    def check(self, table: Sequence[Parameter]) -> None:
        """Compare names and shapes with the model's.

        Raises:
            CheckpointError: a parameter is missing, has another shape, or isn't part of the model.
        """
        for parameter in table:
            entry = self._tensors.get(parameter.megatron)
            if entry is None:
                raise CheckpointError(f"{self.path}: tensor {parameter.megatron} is missing")
            stored, expected = tuple(entry.size), parameter.stored_shape
            if parameter.padded and len(stored) == len(expected) and stored[0] > expected[0]:
                stored = (expected[0], *stored[1:])
            if stored != expected:
                raise CheckpointError(
                    f"{self.path}: tensor {parameter.megatron} has shape {list(entry.size)}, "
                    f"but by config.json it has {list(expected)}"
                )
        known = {parameter.megatron for parameter in table}
        for name in sorted(self._tensors.keys() - known):
            if not name.startswith(_OPTIMIZER_PREFIXES):
                raise CheckpointError(f"{self.path}: tensor {name} is not part of the model that config.json describes")

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type in which the parameter is stored."""
        return self._tensors[parameter.megatron].properties.dtype

    def read(self, parameter: Parameter, layer: int | None) -> torch.Tensor:
        """One layer's tensor (layer None for a parameter that exists once), `parameter.shape`, without padded rows.

        Raises:
            CheckpointError: a data file is missing or damaged, or the stored parts don't cover the tensor.
        """
        entry = self._tensors[parameter.megatron]
        wanted = _chunk(parameter, layer)
        items = create_read_items_for_chunk_list(parameter.megatron, entry, [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise CheckpointError(
                f"{self.path}: tensor {parameter.megatron}: the stored parts don't cover layer {layer}"
            )
        target = torch.empty(wanted.sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _ReadPlanner(target)).wait()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            where = f"tensor {parameter.megatron}" + ("" if layer is None else f", layer {layer}")
            raise CheckpointError(f"{self.path}: {where} can't be read: {error}") from error
        return target.reshape(parameter.shape)


class _ReadPlanner(dcp.DefaultLoadPlanner):
    """Puts the parts that the reader brings into their places in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = tuple(slice(at, at + n) for at, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self._target[place]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave a view."""


def _iteration_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of the newest or of the given iteration; CheckpointError where there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if iteration is not None:
        path = folder / f"iter_{iteration:07d}"
        if not path.is_dir():
            raise CheckpointError(f"--iteration {iteration}: {path} does not exist")
        return path
    tracker = folder / TRACKER
    if not tracker.is_file():
        if (folder / _FORMAT).is_file():
            raise CheckpointError(f"{folder}: this is one iteration; give the folder above it")
        hint = "; choose one with --iteration" if any(folder.glob("iter_*")) else ""
        raise CheckpointError(f"{folder}: no checkpoint here (no {TRACKER}){hint}")
    newest = tracker.read_text(encoding="utf-8").strip()
    if newest != _RELEASE and not newest.isdecimal():
        raise CheckpointError(f"{tracker}: {newest!r} is neither an iteration nor '{_RELEASE}'")
    path = folder / (_RELEASE if newest == _RELEASE else f"iter_{int(newest):07d}")
    if not path.is_dir():
        raise CheckpointError(f"{tracker} names {newest}, but {path} does not exist")
    return path


def _check_format(path: Path) -> None:
    """Refuse what isn't a `torch_dist` checkpoint."""
    if not (path / _FORMAT).is_file():
        raise CheckpointError(f"{path}: no {_FORMAT}: not a torch_dist checkpoint (save with --ckpt-format torch_dist)")
    try:
        backend = json.loads((path / _FORMAT).read_text(encoding="utf-8"))["sharded_backend"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _FORMAT}: can't be read: {error!r}") from error
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path}: the format is {backend}; only torch_dist is read (save with --ckpt-format torch_dist)"
        )
    if not (path / _DCP_METADATA).is_file():
        raise CheckpointError(f"{path}: no {_DCP_METADATA}: the checkpoint is incomplete")
