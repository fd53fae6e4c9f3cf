"""Hugging Face folders: what we write equals what the libraries write, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_amopo.checkpoint import hf
from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.hf_writer import FilePlan, HfWriter, plan_files
from megatron_amopo.checkpoint.record import read_record, write_record
from megatron_amopo.checkpoint.tensor_files import TensorInfo
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import MakeFolder, all_files, load_tensors


def info(tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(tensor.dtype, tuple(tensor.shape))


def test_a_file_written_in_any_order_equals_the_librarys(tmp_path: Path) -> None:
    tensors = {
        "model.b": torch.randn(3, 5),
        "model.a": torch.randn(7).to(torch.bfloat16),
        "model.ä": torch.randn(2, 2).to(torch.float16),
        "lm_head": torch.randn(4, 4).to(torch.bfloat16),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    plan = FilePlan(dict.fromkeys(tensors, "ours.safetensors"))
    with HfWriter(tmp_path, {name: info(tensor) for name, tensor in tensors.items()}, plan) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name][1:], first_row=1)
            writer.write(name, tensors[name][:1])
        assert [path.name for path in tmp_path.glob("ours*")] == ["ours.safetensors.partial"]
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize("max_shard_size", ["40KB", "100KB", "5GB"])
def test_shards_are_those_of_save_pretrained(make_folder: MakeFolder, tmp_path: Path, max_shard_size: str) -> None:
    from megatron_amopo.checkpoint.families import parameter_table
    from megatron_amopo.checkpoint.parameters import hf_shapes

    original = make_folder(max_shard_size=max_shard_size)
    tensors = load_tensors(original)
    shapes = hf_shapes(parameter_table(hf.read_config(original)))
    infos = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
    copy = tmp_path / "copy"
    copy.mkdir()
    with HfWriter(copy, infos, plan_files(infos, max_shard_size)) as writer:
        for name in infos:
            writer.write(name, tensors[name])
    weights = {name: content for name, content in all_files(original).items() if name.startswith("model")}
    assert all_files(copy) == weights


def test_a_published_index_keeps_its_facts(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Qwen2.5's index states total_size alone."""
    folder = make_folder(max_shard_size="100KB")
    index = json.loads((folder / hf.INDEX).read_text())
    del index["metadata"]["total_parameters"]
    (folder / hf.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    opened = hf.HfFolder.open(folder)
    write_record(tmp_path, opened, opened.tensors.keys())
    record = read_record(tmp_path)
    assert record is not None
    assert record.plan == FilePlan(index["weight_map"], ("total_size",))


def test_a_folder_reads_back(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="100KB", dtype=torch.bfloat16)
    opened = hf.HfFolder.open(folder)
    expected = load_tensors(folder)
    assert {name: stored.info for name, stored in opened.tensors.items()} == {
        name: info(tensor) for name, tensor in expected.items()
    }
    assert all(torch.equal(opened.tensors[name].read(), tensor) for name, tensor in expected.items())


def pickled(folder: Path, *, shards: int) -> dict[str, torch.Tensor]:
    """Replace a folder's safetensors by `pytorch_model.bin`, or by shards with an index; gives the tensors."""
    tensors = load_tensors(folder)
    for path in (*folder.glob("*.safetensors"), *folder.glob(hf.INDEX)):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return tensors
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file_name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        weight_map.update(dict.fromkeys(names[number::shards], file_name))
        torch.save({name: tensors[name] for name in names[number::shards]}, folder / file_name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_on_demand(make_folder: MakeFolder, small_parts: None, tmp_path: Path, shards: int) -> None:
    folder = make_folder(dtype=torch.bfloat16)
    tensors = pickled(folder, shards=shards)
    with pytest.raises(
        CheckpointError,
        match=r"\.bin\S*: pickled weights are read only by tools/\S+, with --allow-pickle",
    ):
        hf.HfFolder.open(folder)
    hf_to_megatron(folder, tmp_path / "megatron", allow_pickle=True)
    assert not any(row.differing for row in verify(folder, tmp_path / "megatron", allow_pickle=True))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert [path.name for path in (tmp_path / "back").glob("model*")] == ["model.safetensors"]


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


def test_other_formats(make_folder: MakeFolder) -> None:
    folder = make_folder()
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match=r"model\.gguf: only safetensors are read"):
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


def test_a_shard_in_the_place_of_another(make_folder: MakeFolder) -> None:
    folder = make_folder(max_shard_size="100KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=rf"the index says {first.name}, but it is in {second.name}"):
        hf.HfFolder.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": "model-00001-of-00003.safetensors"}, "tensor model.norm.weight: the index says"),
        ({"model.extra.weight": "model-00001-of-00003.safetensors"}, "tensor model.extra.weight: the index says"),
        ({"model.norm.weight": "../model.safetensors"}, "not the name of a .safetensors file"),
        ({"model.norm.weight": 3}, "not the name of a .safetensors file"),
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
    for size in ("huge", "0GB", "-5GB", "infGB", "nanGB", 0):
        with pytest.raises(CheckpointError, match=f"--max-shard-size {size}: "):
            plan_files({"a": TensorInfo(torch.float32, (2,))}, size)
