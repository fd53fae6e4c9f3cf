"""Safetensors folders: what we write equals what the libraries write, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_amopo.checkpoint import hf
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import MakeFolder, all_files, load_tensors


def info(tensor: torch.Tensor) -> hf.TensorInfo:
    return hf.TensorInfo(tensor.dtype, tuple(tensor.shape))


def test_a_file_written_in_any_order_equals_the_librarys(tmp_path: Path) -> None:
    tensors = {
        "model.b": torch.randn(3, 5),
        "model.a": torch.randn(7).to(torch.bfloat16),
        "model.ä": torch.randn(2, 2).to(torch.float16),
        "lm_head": torch.randn(4, 4).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    plan = hf.FilePlan(dict.fromkeys(tensors, "ours.safetensors"))
    with hf.HfWriter(tmp_path, {name: info(tensor) for name, tensor in tensors.items()}, plan) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("max_shard_size", ["40KB", "100KB", "5GB"])
def test_shards_are_those_of_save_pretrained(make_folder: MakeFolder, tmp_path: Path, max_shard_size: str) -> None:
    from megatron_amopo.checkpoint.families import parameter_table
    from megatron_amopo.checkpoint.parameters import hf_shapes

    original = make_folder(max_shard_size=max_shard_size)
    tensors = load_tensors(original)
    shapes = hf_shapes(parameter_table(hf.read_config(original)))
    infos = {name: hf.TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
    copy = tmp_path / "copy"
    copy.mkdir()
    with hf.HfWriter(copy, infos, hf.plan_files(infos, max_shard_size)) as writer:
        for name in infos:
            writer.write(name, tensors[name])
    weights = {name: content for name, content in all_files(original).items() if name.startswith("model")}
    assert all_files(copy) == weights


def test_a_published_index_keeps_its_facts(tmp_path: Path) -> None:
    """Qwen2.5's index states total_size alone."""
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / hf.INDEX).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": files}))
    plan = hf.planned_files(tmp_path, ["a", "b"])
    assert plan == hf.FilePlan(files, ("total_size",))


def test_a_folder_reads_back(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="100KB", dtype=torch.bfloat16)
    opened = hf.HfFolder.open(folder)
    assert opened.indexed
    expected = load_tensors(folder)
    assert opened.tensors == {name: info(tensor) for name, tensor in expected.items()}
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in expected.items())


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        hf.HfFolder.open(tmp_path / "nowhere")


def test_missing_config(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        hf.HfFolder.open(folder)


def test_damaged_config(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        hf.HfFolder.open(folder)


def test_bin_checkpoint(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: only safetensors are read"):
        hf.HfFolder.open(folder)


def test_no_weights(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        hf.HfFolder.open(folder)


@pytest.mark.parametrize("keep", [4, 400, -8])
def test_truncated_safetensors(make_folder: MakeFolder, keep: int) -> None:
    path = make_folder() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.HfFolder.open(path.parent)


def test_missing_shard(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="100KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*: listed in"):
        hf.HfFolder.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": "model-00001-of-00003.safetensors"}, "tensor model.norm.weight: the index says"),
        ({"model.extra.weight": "model-00001-of-00003.safetensors"}, "tensor model.extra.weight: the index says"),
        ({"model.norm.weight": "../model.safetensors"}, "not the name of a safetensors file"),
        ({"model.norm.weight": 3}, "not the name of a safetensors file"),
    ],
)
def test_index_that_disagrees(make_folder: MakeFolder, change: dict[str, object], message: str) -> None:
    folder = make_folder(max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    index = json.loads((folder / hf.INDEX).read_text())
    index["weight_map"].update(change)
    (folder / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        hf.HfFolder.open(folder)


def test_other_types_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder()
    tensors = load_tensors(folder)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is I8"):
        hf.HfFolder.open(folder)


def test_shard_size_that_is_none(make_folder: MakeFolder) -> None:
    with pytest.raises(CheckpointError, match="--max-shard-size huge"):
        hf.plan_files({"a": hf.TensorInfo(torch.float32, (2,))}, "huge")
