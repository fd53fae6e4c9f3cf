"""Hugging Face model folders: what lies in them, read without instantiating a model.

Reads what `transformers` saves: config.json, the weights in one file or in shards with an index, and the files beside
them (tokenizer, chat template, generation settings). `HfFolder` opens a folder, checks that its files are whole and
says where each tensor lies; `hf_writer.py` writes such a folder. Nothing here knows Megatron.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amopo.checkpoint.hf_files import CONFIG, INDEX, MORE_TEMPLATES, SIDE_FILES, WEIGHTS
from megatron_amopo.checkpoint.output_folder import check_folder, write_text
from megatron_amopo.checkpoint.tensor_files import StoredTensor, safetensors_tensors, saved_tensors
from megatron_amopo.errors import CheckpointError


@dataclass(frozen=True)
class _Format:
    """How weights may lie in a folder."""

    weights: str
    index: str
    suffix: str
    tensors: Callable[[Path], dict[str, StoredTensor]]


_SAFETENSORS = _Format(WEIGHTS, INDEX, ".safetensors", safetensors_tensors)
_PICKLED = _Format("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", saved_tensors)


@dataclass(frozen=True)
class HfFolder:
    """A Hugging Face model folder, opened for reading.

    Attributes:
        path: the folder.
        config: the fields of config.json.
        tensors: name -> where the tensor lies.
        index: what the index says beside the files of the tensors; None where there is no index.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, Any] | None

    @classmethod
    def open(cls, folder: str | Path, *, allow_pickle: bool = False) -> HfFolder:
        """Open a folder and read the headers of all its weights.

        Args:
            allow_pickle: where there are no safetensors, read `pytorch_model.bin` or its shards. torch's weights-only
                loader reads their pickles, which runs no code.

        Raises:
            CheckpointError: no folder, no config.json, no weights, an index that disagrees with its files, or a damaged
                file.
        """
        path = Path(folder)
        config = read_config(path)
        formats = (_SAFETENSORS, _PICKLED) if allow_pickle else (_SAFETENSORS,)
        for kind in formats:
            # transformers, too, takes the single file where both are there.
            if (path / kind.weights).is_file():
                return cls(path, config, kind.tensors(path / kind.weights), None)
            if (path / kind.index).is_file():
                tensors, metadata = _indexed_tensors(path, kind)
                return cls(path, config, tensors, metadata)
        raise CheckpointError(_no_weights(path))


def _indexed_tensors(path: Path, kind: _Format) -> tuple[dict[str, StoredTensor], Mapping[str, Any]]:
    """Every tensor of the shards that an index names, and what the index says beside that."""
    index_path = path / kind.index
    index = read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    for name, file_name in weight_map.items():
        if Path(str(file_name)).name != file_name or not file_name.endswith(kind.suffix):
            raise CheckpointError(f"{index_path}: tensor {name}: {file_name!r} is not the name of a {kind.suffix} file")
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        if not (path / file_name).is_file():
            raise CheckpointError(f"{path / file_name}: listed in {kind.index}, but missing")
        for name, stored in kind.tensors(path / file_name).items():
            if weight_map.get(name) != file_name:
                raise CheckpointError(
                    f"{index_path}: tensor {name}: the index says {weight_map.get(name)}, but it is in {file_name}"
                )
            tensors[name] = stored
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{index_path}: tensor {name}: the index says {file_name}, but it isn't there")
    metadata = index.get("metadata")
    return tensors, metadata if isinstance(metadata, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `folder`/config.json; CheckpointError where it can't be had or its dtype is no name."""
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder (give a downloaded model, not its name on the hub)")
    check_folder(folder)
    if not (folder / CONFIG).is_file():
        hint = "; it looks like a Megatron checkpoint: are the two arguments swapped?"
        swapped = (folder / "hf" / CONFIG).is_file()
        raise CheckpointError(f"{folder}: no {CONFIG}: not a Hugging Face model folder{hint if swapped else ''}")
    config = read_json(folder / CONFIG)
    try:
        config_dtype(config)  # an import doesn't need it, the export does
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; CheckpointError where it holds no object."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, too deep
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return fields


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """The type of the weights as config.json says it ('bfloat16'), in transformers 4's or 5's spelling.

    Raises:
        CheckpointError: it is no name.
    """
    field = "dtype" if config.get("dtype") else "torch_dtype"
    dtype = config.get(field) or None
    if not (dtype is None or isinstance(dtype, str)):
        raise CheckpointError(f"config.json: {field} {dtype!r} is not the name of a type")
    return dtype


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and the like, unchanged. config.json isn't among them: it is
    what makes a folder loadable, and comes last."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            _copy(source / name, target / name)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(
            source / MORE_TEMPLATES,
            target / MORE_TEMPLATES,
            copy_function=lambda one, other: _copy(Path(one), Path(other)),
        )


def _copy(source: Path, target: Path) -> None:
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source}: can't be read: {error.strerror}") from error
    target.write_bytes(content)


def copy_config(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy config.json; with `dtype` it says that type of the weights, in the spelling that stands there.

    Where neither spelling stands there, the older is written, which both transformers 4 and 5 read.
    """
    text = (source / CONFIG).read_text(encoding="utf-8")
    if dtype is not None:
        config = json.loads(text)
        for field in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
            config[field] = dtype
        text = json.dumps(config, indent=2) + "\n"
    write_text(target / CONFIG, text)


def _no_weights(path: Path) -> str:
    """Say what there is instead of safetensors."""
    for name in (_PICKLED.weights, _PICKLED.index):
        if (path / name).is_file():
            return (
                f"{path / name}: pickled weights are read only by tools/convert_checkpoint.py, with --allow-pickle; or "
                "load the folder with transformers and save it again (save_pretrained writes safetensors)"
            )
    for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf"):
        for other in sorted(path.glob(pattern)):
            return (
                f"{other}: only safetensors are read; load the folder with transformers and save it again "
                "(save_pretrained writes safetensors)"
            )
    return f"{path}: neither {WEIGHTS} nor {INDEX}"
