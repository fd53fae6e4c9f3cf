"""The conversions: Hugging Face folder to Megatron checkpoint, and the way back.

    hf_to_megatron(HF_DIR, MEGATRON_DIR)    MEGATRON_DIR gets `release/`, the tracker file, and `hf/` with config.json,
                                            tokenizer, … and the record of the weights' types and files
    megatron_to_hf(MEGATRON_DIR, HF_DIR)    takes all but the weights from MEGATRON_DIR/hf

Everything is checked before anything is written; what is written appears under its name only when it is complete.
Weights pass through in parts, so that the size of the model doesn't matter. `verify.py` compares the two sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_amopo.checkpoint import hf
from megatron_amopo.checkpoint.checks import (
    HF_SUBFOLDER,
    check_tensors,
    common_dtype,
    open_megatron,
    read_table,
)
from megatron_amopo.checkpoint.families import megatron_arguments
from megatron_amopo.checkpoint.hf_files import CONFIG, is_of_export
from megatron_amopo.checkpoint.hf_template import offer_prompts
from megatron_amopo.checkpoint.hf_writer import DEFAULT_SHARD_SIZE, HfWriter, plan_files
from megatron_amopo.checkpoint.megatron import RELEASE, TRACKER, MegatronCheckpoint
from megatron_amopo.checkpoint.megatron_writer import write_checkpoint
from megatron_amopo.checkpoint.memory import converted
from megatron_amopo.checkpoint.output_folder import new_folder
from megatron_amopo.checkpoint.parameters import Parameter, Part, hf_shapes
from megatron_amopo.checkpoint.record import WeightsRecord, read_record, write_record
from megatron_amopo.checkpoint.streaming import DEFAULT_WORKERS, PART_NUMBERS, NonFiniteNumbers, Progress, in_threads
from megatron_amopo.checkpoint.tensor_files import DTYPES_BY_NAME, TensorInfo, dtype_name
from megatron_amopo.errors import CheckpointError

ORIGINAL, STORED = "original", "stored"
#: What an export's weights may be.
DTYPES = (ORIGINAL, STORED, *DTYPES_BY_NAME)


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    output: Path
    tensors: int
    """Hugging Face tensors."""
    parameters: int
    """Numbers in them."""
    dtypes: tuple[str, ...]
    """Of what was written."""
    nbytes: int
    """Of the weights written."""
    seconds: float
    notes: tuple[str, ...]
    """What a person may want to know, as sentences."""
    warnings: tuple[str, ...]
    """What a person should look into."""


def hf_to_megatron(
    hf_dir: str | Path,
    megatron_dir: str | Path,
    *,
    allow_pickle: bool = False,
    workers: int = DEFAULT_WORKERS,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write the weights of a Hugging Face folder as a Megatron `torch_dist` checkpoint.

    Args:
        hf_dir: folder with config.json and safetensors.
        megatron_dir: must not exist, or be empty; with `force`, a Megatron checkpoint folder there is replaced.
        allow_pickle: where there are no safetensors, read `pytorch_model.bin` or its shards, as weights only.
        workers: parts in the works at a time.
        progress: show how far it is.

    Raises:
        CheckpointError: the model isn't supported, tensors are missing, unexpected or of another shape than config.json
            says, a file is damaged, the output exists or is being written, or the disk is too small.
    """
    source = hf.HfFolder.open(hf_dir, allow_pickle=allow_pickle)
    table = read_table(source.path, source.config)
    notes = check_tensors(source, table)
    dtypes = {parameter.megatron: common_dtype(source, parameter) for parameter in table}
    infos = {name: source.tensors[name].info for name in hf_shapes(table)}
    size = sum(info.nbytes for info in infos.values())
    finite = NonFiniteNumbers()

    def joined(part: Part) -> torch.Tensor:
        pieces = [source.tensors[rows.name].read(rows.first, rows.count) for rows in part.pieces]
        for rows, piece in zip(part.pieces, pieces, strict=True):
            finite.look(rows.name, piece)
        bar.update(sum(piece.nbytes for piece in pieces))
        return part.join(pieces)

    target = Path(megatron_dir)
    with (
        Progress("import", size, shown=progress) as bar,
        new_folder(
            target,
            force=force,
            size=size,
            sources=[source.path],
            replaces=TRACKER,
            may_hold=lambda path: path.name in (RELEASE, HF_SUBFOLDER, TRACKER),
        ) as folder,
    ):
        beside = folder / HF_SUBFOLDER
        beside.mkdir()
        hf.copy_side_files(source.path, beside)
        write_record(beside, source, infos)
        hf.copy_config(source.path, beside)
        write_checkpoint(folder, _parts(table), dtypes, megatron_arguments(source.config), joined, workers=workers)
    return _conversion(target, infos, bar.seconds, notes, finite)


def megatron_to_hf(
    megatron_dir: str | Path,
    hf_dir: str | Path,
    *,
    iteration: int | None = None,
    dtype: str = ORIGINAL,
    max_shard_size: int | str | None = None,
    workers: int = DEFAULT_WORKERS,
    force: bool = False,
    progress: bool = False,
) -> Conversion:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder. Where training left the prompts that it
    used, the chat template offers them (`hf_template.py`).

    Args:
        megatron_dir: folder with the tracker file and `hf/`.
        hf_dir: must not exist, or be empty; with `force`, a Hugging Face model folder there is replaced.
        iteration: which one; the newest by default.
        dtype: one of DTYPES: the types of the folder that was converted (as stored, where no record of them is left),
            those in which training stored the weights, or one for all. config.json says the type that results.
        max_shard_size: bytes, or a size such as '5GB'; by default the files are those of the folder that was converted
            (DEFAULT_SHARD_SIZE, where no record of them is left).
        workers: parts in the works at a time.
        progress: show how far it is.

    Raises:
        CheckpointError: no checkpoint, not `torch_dist`, no `hf/`, parameters missing, unexpected or of another shape
            than config.json says, a file is damaged, the output exists or is being written, or the disk is too small.
    """
    root = Path(megatron_dir)
    checkpoint, config, table = open_megatron(root, iteration)
    beside = root / HF_SUBFOLDER
    shapes = hf_shapes(table)
    record = read_record(beside)
    if record is not None:
        record.check_names(shapes, beside)
    dtypes = _export_dtypes(dtype, table, checkpoint, record)
    infos = {name: TensorInfo(dtypes[name], shape) for name, shape in shapes.items()}
    if max_shard_size is None and record is not None and record.plan is not None:
        plan = record.plan
    else:
        plan = plan_files(infos, DEFAULT_SHARD_SIZE if max_shard_size is None else max_shard_size)
    size = sum(info.nbytes for info in infos.values())
    config_dtype, notes = _config_dtype(hf.config_dtype(config), infos)
    finite = NonFiniteNumbers()

    def convert(part: Part) -> None:
        tensor = checkpoint.read(part.parameter, part.layer, part.first_row, part.shape[0])
        for rows, piece in zip(part.pieces, part.split(tensor), strict=True):
            weights = converted(piece, infos[rows.name].dtype)
            finite.look(rows.name, weights)
            writer.write(rows.name, weights, rows.first)
            bar.update(weights.nbytes)

    target = Path(hf_dir)
    with (
        Progress("export", size, shown=progress) as bar,
        new_folder(target, force=force, size=size, sources=[root], replaces=CONFIG, may_hold=is_of_export) as folder,
    ):
        hf.copy_side_files(beside, folder)
        notes += offer_prompts(folder)
        with HfWriter(folder, infos, plan) as writer:
            in_threads(convert, _parts(table), workers)
        hf.copy_config(beside, folder, config_dtype)
    return _conversion(target, infos, bar.seconds, notes, finite)


def _parts(table: Sequence[Parameter]) -> list[Part]:
    return [part for parameter in table for part in parameter.parts(PART_NUMBERS)]


def _export_dtypes(
    asked: str, table: Sequence[Parameter], checkpoint: MegatronCheckpoint, record: WeightsRecord | None
) -> Mapping[str, torch.dtype]:
    """Type of every Hugging Face tensor of an export."""
    if asked not in DTYPES:
        raise CheckpointError(f"--dtype {asked}: not one of {', '.join(DTYPES)}")
    if asked == ORIGINAL and record is not None:
        return record.dtypes
    return {
        name: DTYPES_BY_NAME.get(asked, checkpoint.dtype(parameter))
        for parameter in table
        for layer in parameter.layer_numbers
        for name in parameter.hf_names(layer)
    }


def _config_dtype(said: str | None, infos: Mapping[str, TensorInfo]) -> tuple[str | None, list[str]]:
    """What config.json must say of the type, None if it is right already; notes. transformers loads in that type."""
    names = {dtype_name(info.dtype) for info in infos.values()}
    if len(names) != 1 or names == {said or "float32"}:
        return None, []
    (name,) = names
    return name, [f"config.json says {name} now, as the weights are ({said or 'nothing'} before)"]


def _conversion(
    target: Path, infos: Mapping[str, TensorInfo], seconds: float, notes: Sequence[str], finite: NonFiniteNumbers
) -> Conversion:
    return Conversion(
        output=target,
        tensors=len(infos),
        parameters=sum(info.numbers for info in infos.values()),
        dtypes=tuple(sorted({dtype_name(info.dtype) for info in infos.values()})),
        nbytes=sum(info.nbytes for info in infos.values()),
        seconds=seconds,
        notes=tuple(notes),
        warnings=finite.warnings(),
    )
