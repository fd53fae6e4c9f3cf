"""The conversions: Hugging Face folder to Megatron checkpoint, the way back, and the comparison of both.

    hf_to_megatron(HF_DIR, MEGATRON_DIR)    MEGATRON_DIR gets `release/`, the tracker file, and `hf/` with config.json,
    tokenizer, … megatron_to_hf(MEGATRON_DIR, HF_DIR)    takes all but the weights from MEGATRON_DIR/hf
    verify(HF_DIR, MEGATRON_DIR)            tensor by tensor, bit by bit

Everything is checked before anything is written; what is written appears under its name only when it is complete.
Tensors pass through one at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_amopo.checkpoint import hf
from megatron_amopo.checkpoint.families import megatron_arguments, parameter_table, tied_copies
from megatron_amopo.checkpoint.megatron import TRACKER, MegatronCheckpoint, write_checkpoint
from megatron_amopo.checkpoint.parameters import Parameter, hf_shapes
from megatron_amopo.errors import CheckpointError

HF_SUBFOLDER = "hf"
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a conversion writes beside the weights: tokenizer, headers, metadata.
_ROOM_BESIDE_WEIGHTS = 64 * 2**20


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    output: Path
    tensors: int
    """Hugging Face tensors."""
    parameters: int
    """Numbers in them."""
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]
    """What a person should know, as sentences."""


@dataclass(frozen=True)
class Comparison:
    """One Megatron parameter, over all its layers, against the Hugging Face tensors that it is made of."""

    megatron: str
    hf_dtype: str
    megatron_dtype: str
    tensors: int
    differing: tuple[str, ...]
    """Names of the Hugging Face tensors that aren't equal bit by bit, in the folder's type."""
    largest_difference: float


def hf_to_megatron(
    hf_dir: str | Path, megatron_dir: str | Path, *, force: bool = False, progress: bool = False
) -> Conversion:
    """Write the weights of a Hugging Face folder as a Megatron `torch_dist` checkpoint.

    Args:
        hf_dir: folder with config.json and safetensors.
        megatron_dir: must not exist, or be empty; with `force`, a Megatron checkpoint folder there is replaced.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: the model isn't supported, tensors are missing, unexpected or of another shape than config.json
            says, a file is damaged, the output exists, or the disk is too small.
    """
    source = hf.HfFolder.open(hf_dir)
    table = _table(source.path, source.config)
    notes = _check_tensors(source, table)
    dtypes = {parameter.megatron: _common_dtype(source, parameter) for parameter in table}
    target = Path(megatron_dir)
    size = sum(torch.Size(p.stored_shape).numel() * dtypes[p.megatron].itemsize for p in table)
    bar = _bar(table, progress)

    def joined(parameter: Parameter, layer: int | None) -> torch.Tensor:
        bar.update()
        return parameter.join([source.read(name) for name in parameter.hf_names(layer)])

    with bar, _new_folder(target, force, size, sources=[source.path], replaces=TRACKER) as folder:
        (folder / HF_SUBFOLDER).mkdir()
        hf.copy_side_files(source.path, folder / HF_SUBFOLDER, index=source.indexed)
        write_checkpoint(folder, table, dtypes, megatron_arguments(source.config), joined)
    return _conversion(target, table, dtypes.values(), notes)


def megatron_to_hf(
    megatron_dir: str | Path,
    hf_dir: str | Path,
    *,
    iteration: int | None = None,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder.

    Args:
        megatron_dir: folder with the tracker file and `hf/`.
        hf_dir: must not exist, or be empty; with `force`, a Hugging Face model folder there is replaced.
        iteration: which one; the newest by default.
        dtype: one of DTYPES; by default each tensor keeps the type in which it is stored. config.json says the type
            that results.
        max_shard_size: bytes, or a size such as '5GB'; by default the files are those of the folder that was converted.
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: no checkpoint, not `torch_dist`, no `hf/`, parameters missing, unexpected or of another shape
            than config.json says, a file is damaged, the output exists, or the disk is too small.
    """
    root = Path(megatron_dir)
    checkpoint, config = _open_megatron(root, iteration)
    table = _table(root / HF_SUBFOLDER, config)
    checkpoint.check(table)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"--dtype {dtype}: not one of {', '.join(DTYPES)}")
    dtypes = {p.megatron: checkpoint.dtype(p) if dtype is None else DTYPES[dtype] for p in table}
    tensors = _tensor_infos(table, dtypes)
    if max_shard_size is None:
        plan = hf.planned_files(root / HF_SUBFOLDER, tensors)
    else:
        plan = hf.plan_files(tensors, max_shard_size)
    target = Path(hf_dir)
    size = sum(info.nbytes for info in tensors.values())
    notes: list[str] = []
    with (
        _bar(table, progress) as bar,
        _new_folder(target, force, size, sources=[root], replaces=hf.CONFIG) as folder,
    ):
        hf.copy_side_files(root / HF_SUBFOLDER, folder, index=False)
        notes += _settle_config_dtype(folder, config, dtypes)
        with hf.HfWriter(folder, tensors, plan) as writer:
            for parameter in table:
                for layer in parameter.layer_numbers:
                    tensor = checkpoint.read(parameter, layer).to(dtypes[parameter.megatron])
                    for name, piece in zip(parameter.hf_names(layer), parameter.split(tensor), strict=True):
                        writer.write(name, piece)
                    bar.update()
    return _conversion(target, table, dtypes.values(), notes)


def verify(
    hf_dir: str | Path, megatron_dir: str | Path, *, iteration: int | None = None, progress: bool = False
) -> tuple[Comparison, ...]:
    """Compare every tensor of a Hugging Face folder with what a Megatron checkpoint holds, bit by bit.

    Where the types differ, Megatron's numbers are first converted to the folder's type.

    Raises:
        CheckpointError: either side can't be read, or they aren't the same model.
    """
    source = hf.HfFolder.open(hf_dir)
    checkpoint, config = _open_megatron(Path(megatron_dir), iteration)
    _check_same_shape(source.config, config)
    table = _table(source.path, source.config)
    _check_tensors(source, table)
    checkpoint.check(table)
    comparisons = []
    with _bar(table, progress) as bar:
        for parameter in table:
            differing: list[str] = []
            largest = 0.0
            for layer in parameter.layer_numbers:
                pieces = parameter.split(checkpoint.read(parameter, layer))
                for name, piece in zip(parameter.hf_names(layer), pieces, strict=True):
                    expected = source.read(name)
                    actual = piece.to(expected.dtype)
                    if not torch.equal(_bits(actual), _bits(expected)):
                        differing.append(name)
                        largest = max(largest, (actual.double() - expected.double()).abs().max().item())
                bar.update()
            comparisons.append(
                Comparison(
                    parameter.megatron,
                    _dtype_name(_common_dtype(source, parameter)),
                    _dtype_name(checkpoint.dtype(parameter)),
                    len(parameter.pieces) * len(parameter.layer_numbers),
                    tuple(differing),
                    largest,
                )
            )
    return tuple(comparisons)


def _open_megatron(root: Path, iteration: int | None) -> tuple[MegatronCheckpoint, dict[str, Any]]:
    """A Megatron checkpoint and the config.json that lies beside it."""
    checkpoint = MegatronCheckpoint.open(root, iteration)
    if not (root / HF_SUBFOLDER / hf.CONFIG).is_file():
        raise CheckpointError(
            f"{root}: no {HF_SUBFOLDER}/{hf.CONFIG}; "
            f"copy the {HF_SUBFOLDER} folder of the checkpoint that training started from"
        )
    return checkpoint, hf.read_config(root / HF_SUBFOLDER)


def _table(folder: Path, config: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The table of parameters; its errors say in which folder the config.json lies."""
    try:
        return parameter_table(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error


def _check_same_shape(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Both configs must describe the same model."""
    ours, theirs = megatron_arguments(left), megatron_arguments(right)
    for name in ours:
        if ours[name] != theirs[name]:
            raise CheckpointError(
                f"not the same model: {name} is {ours[name]} in the folder, {theirs[name]} in the checkpoint"
            )


def _check_tensors(source: hf.HfFolder, table: Sequence[Parameter]) -> list[str]:
    """Every tensor of the model must be there, in the shape that config.json gives it, and no other; notes for
    people."""
    shapes = hf_shapes(table)
    for name, shape in shapes.items():
        info = source.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{source.path}: tensor {name} is missing")
        if info.shape != shape:
            raise CheckpointError(
                f"{source.path / source.files[name]}: tensor {name} has shape {list(info.shape)}, "
                f"but by config.json it has {list(shape)}"
            )
    notes = []
    copies = tied_copies(source.config)
    for name in sorted(source.tensors.keys() - shapes.keys()):
        if name not in copies:
            raise CheckpointError(
                f"{source.path / source.files[name]}: tensor {name} is not part of the model that config.json describes"
            )
        if not torch.equal(_bits(source.read(name)), _bits(source.read(copies[name]))):
            raise CheckpointError(
                f"{source.path / source.files[name]}: tensor {name} differs from {copies[name]}, "
                "but config.json says tie_word_embeddings"
            )
        notes.append(f"{name} equals {copies[name]}, as tie_word_embeddings says, and is stored once")
    return notes


def _common_dtype(source: hf.HfFolder, parameter: Parameter) -> torch.dtype:
    """The type of all Hugging Face tensors of one Megatron parameter, which has only one."""
    names = [name for layer in parameter.layer_numbers for name in parameter.hf_names(layer)]
    for name in names:
        if source.tensors[name].dtype != source.tensors[names[0]].dtype:
            kinds = [f"{n} is {_dtype_name(source.tensors[n].dtype)}" for n in (names[0], name)]
            raise CheckpointError(f"{source.path}: {' and '.join(kinds)}, but Megatron stores them as one tensor")
    return source.tensors[names[0]].dtype


def _tensor_infos(table: Sequence[Parameter], dtypes: Mapping[str, torch.dtype]) -> dict[str, hf.TensorInfo]:
    """Name -> type and shape of every Hugging Face tensor, in the order of transformers' state dictionary."""
    types = {name: dtypes[p.megatron] for p in table for layer in p.layer_numbers for name in p.hf_names(layer)}
    return {name: hf.TensorInfo(types[name], shape) for name, shape in hf_shapes(table).items()}


def _settle_config_dtype(folder: Path, config: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Make config.json say the type that the weights have, where it says another: transformers loads in that type."""
    names = {_dtype_name(dtype) for dtype in dtypes.values()}
    said = hf.config_dtype(config)
    if len(names) != 1 or names == {said or "float32"}:
        return []
    (name,) = names
    hf.set_config_dtype(folder, name)
    return [f"config.json says {name} now, as the weights are ({said or 'nothing'} before)"]


@contextlib.contextmanager
def _new_folder(target: Path, force: bool, size: int, *, sources: Sequence[Path], replaces: str) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends well, and vanishes otherwise.

    Args:
        size: bytes of the weights to be written.
        sources: folders that are read; the target must not be, contain or lie in one.
        replaces: with `force`, an existing target is replaced only where it holds this file, so that a mistyped path is
            safe.
    """
    for source in sources:
        inner, outer = target.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise CheckpointError(f"{target}: the output can't be, hold or lie in the input {source}")
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not force:
        raise CheckpointError(f"{target} exists already; --force replaces it")
    if occupied and not (target / replaces).is_file():
        raise CheckpointError(
            f"{target} has no {replaces}: --force replaces only what an earlier conversion could have written"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target.parent}: can't be made: {error}") from error
    needed, free = size + _ROOM_BESIDE_WEIGHTS, shutil.disk_usage(target.parent).free
    if free < needed:
        raise CheckpointError(f"{target.parent}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    replaced = target.parent / f".{target.name}.replaced-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
    except OSError as error:
        raise CheckpointError(f"{target}: can't be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _conversion(
    target: Path, table: Sequence[Parameter], dtypes: Iterable[torch.dtype], notes: Sequence[str]
) -> Conversion:
    shapes = hf_shapes(table)
    return Conversion(
        output=target,
        tensors=len(shapes),
        parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        dtypes=tuple(sorted({_dtype_name(dtype) for dtype in dtypes})),
        notes=tuple(notes),
    )


def _bar(table: Sequence[Parameter], progress: bool) -> tqdm:
    """A progress bar over the layers' tensors; disable=None shows it on terminals only."""
    total = sum(len(parameter.layer_numbers) for parameter in table)
    return tqdm(total=total, unit="tensor", disable=None if progress else True)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: equal exactly where the numbers are, NaN and the sign of zero included."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
