"""Hugging Face model folders: safetensors in and out, one tensor at a time.

Reads and writes what `transformers` saves: config.json, model.safetensors or its shards with an index, and the files
beside them (tokenizer, chat template, generation settings). Nothing here knows Megatron, and no model is instantiated.

`HfFolder` opens a folder, checks that its files are whole and gives its tensors on request. `HfWriter` lays the files
out from names and shapes and then takes the tensors in any order, so neither side holds more than a tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from megatron_amopo.errors import CheckpointError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"

# What travels with the weights: enough to load, tokenize and generate as the original did. Custom code doesn't.
_SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# safetensors lays tensors out by falling alignment of their type, then by name.
_LAYOUT_ORDER = tuple(_DTYPES)


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class HfFolder:
    """A Hugging Face model folder, opened for reading.

    Attributes:
        path: the folder.
        config: the fields of config.json.
        tensors: name -> TensorInfo, from the headers of the safetensors files.
        files: name -> name of the file that holds the tensor.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], files: dict[str, str], tensors: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.config = config
        self.files = files
        self.tensors = tensors
        self._open_files: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> HfFolder:
        """Open a folder and read the headers of all its weights.

        Raises:
            CheckpointError: no folder, no config.json, no safetensors, an index that disagrees with its files, or a
                damaged file.
        """
        path = Path(folder)
        config = read_config(path)
        # transformers, too, takes the single file where both are there.
        if (path / WEIGHTS).is_file():
            weight_map, file_names = None, [WEIGHTS]
        elif (path / INDEX).is_file():
            weight_map = _read_json(path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{path / INDEX}: weight_map is missing or empty")
            file_names = sorted(set(FilePlan(weight_map).files.values()))
        else:
            raise CheckpointError(_no_weights(path))
        files: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for file_name in file_names:
            for name, info in _read_header(path / file_name).items():
                files[name] = file_name
                tensors[name] = info
        if weight_map is not None and weight_map != files:
            name = min(name for name in {*weight_map, *files} if weight_map.get(name) != files.get(name))
            raise CheckpointError(
                f"{path / INDEX}: tensor {name}: the index says {weight_map.get(name)}, the files {files.get(name)}"
            )
        return cls(path, config, files, tensors)

    @property
    def indexed(self) -> bool:
        """Whether an index tells where the tensors are."""
        return set(self.files.values()) != {WEIGHTS}

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, as a view of the mapped file."""
        file_name = self.files[name]
        if file_name not in self._open_files:
            self._open_files[file_name] = safe_open(self.path / file_name, framework="pt")
        return self._open_files[file_name].get_tensor(name)


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `folder`/config.json; CheckpointError where it can't be had."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG}: not a Hugging Face model folder")
    return _read_json(folder / CONFIG)


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The type of the weights as config.json says it ('bfloat16'), in transformers 4's or 5's spelling."""
    return config.get("dtype") or config.get("torch_dtype")


def copy_side_files(source: Path, target: Path, *, index: bool) -> None:
    """Copy config.json, tokenizer, chat template and the like, unchanged; `index`: also the index of the shards."""
    for name in (*_SIDE_FILES, *((INDEX,) if index else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def set_config_dtype(folder: Path, dtype: str) -> None:
    """Write the type of the weights into `folder`/config.json, in the spelling that stands there (both transformers
    read the older)."""
    config = _read_json(folder / CONFIG)
    for field in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[field] = dtype
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class FilePlan:
    """Which file each tensor goes to, and which facts the index states beside that."""

    files: Mapping[str, str]
    index_facts: tuple[str, ...] = ("total_parameters", "total_size")

    def __post_init__(self) -> None:
        for name, file_name in self.files.items():
            if Path(str(file_name)).name != file_name or not file_name.endswith(".safetensors"):
                raise CheckpointError(f"{INDEX}: tensor {name}: {file_name!r} is not the name of a safetensors file")


def plan_files(tensors: Mapping[str, TensorInfo], max_shard_size: int | str) -> FilePlan:
    """The files that `save_pretrained(max_shard_size=…)` makes of the same tensors in the same order.

    Raises:
        CheckpointError: `max_shard_size` is no size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda info: info.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise CheckpointError(f"--max-shard-size {max_shard_size}: {error}") from error
    return FilePlan(split.tensor_to_filename)


def planned_files(folder: Path, names: Collection[str]) -> FilePlan:
    """The files that the index in `folder` states; one file where there is no index."""
    if not (folder / INDEX).is_file():
        return FilePlan(dict.fromkeys(names, WEIGHTS))
    index = _read_json(folder / INDEX)
    weight_map = index.get("weight_map") or {}
    for name in names:
        if name not in weight_map:
            raise CheckpointError(f"{folder / INDEX}: no tensor {name}; remove the file or give --max-shard-size")
    facts = tuple(fact for fact in FilePlan.index_facts if fact in (index.get("metadata") or {}))
    return FilePlan({name: weight_map[name] for name in names}, facts)


class HfWriter:
    """Safetensors files of a fixed layout, filled in any order; a context manager, which also writes the index.

    Args:
        folder: where to write; exists.
        tensors: every tensor of the model.
        plan: the file of every tensor.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], plan: FilePlan) -> None:
        self._folder = folder
        self._tensors = tensors
        self._plan = plan
        self._streams: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}
        self._missing = set(tensors)

    def __enter__(self) -> HfWriter:
        for file_name in sorted(set(self._plan.files.values())):
            stream = (self._folder / file_name).open("wb")
            self._streams[file_name] = stream
            inside = {name: info for name, info in self._tensors.items() if self._plan.files[name] == file_name}
            header, offsets, size = _header(inside)
            stream.write(header)
            stream.truncate(len(header) + size)
            self._offsets.update({name: len(header) + offset for name, offset in offsets.items()})
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, whose type and shape are those announced."""
        info = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), name
        stream = self._streams[self._plan.files[name]]
        stream.seek(self._offsets[name])
        stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            if kind is None:
                stream.flush()
                os.fsync(stream.fileno())
            stream.close()
        if kind is None:
            assert not self._missing, f"not written: {min(self._missing)}"
            if set(self._streams) != {WEIGHTS}:
                self._write_index()

    def _write_index(self) -> None:
        facts = {
            "total_parameters": sum(torch.Size(info.shape).numel() for info in self._tensors.values()),
            "total_size": sum(info.nbytes for info in self._tensors.values()),
        }
        metadata = {fact: facts[fact] for fact in self._plan.index_facts}
        index = {"metadata": metadata, "weight_map": dict(self._plan.files)}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header, where each tensor begins after it, and how long all are.

    The format: the length of the JSON as a little-endian 64-bit number, the JSON, the data. Spaces pad the JSON to 8
    bytes.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (_LAYOUT_ORDER.index(_DTYPE_CODES[tensors[name].dtype]), name)):
        info = tensors[name]
        offsets[name] = end
        end += info.nbytes
        fields[name] = {"dtype": _DTYPE_CODES[info.dtype], "shape": info.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets, end


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; CheckpointError where the file is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: listed in {INDEX}, but missing")
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                code = entry.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(f"{path}: tensor {name} is {code}: only {', '.join(_DTYPES)} are supported")
                tensors[name] = TensorInfo(_DTYPES[code], tuple(entry.get_shape()))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors


def _no_weights(path: Path) -> str:
    """Say what there is instead of safetensors."""
    for pattern in ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.gguf"):
        for other in sorted(path.glob(pattern)):
            return (
                f"{other}: only safetensors are read; load the folder with transformers and save it again "
                "(save_pretrained writes safetensors)"
            )
    return f"{path}: neither {WEIGHTS} nor {INDEX}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields
