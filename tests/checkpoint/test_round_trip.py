"""Hugging Face → Megatron → Hugging Face gives the same bytes: every family, tie, type and number of shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_amopo.checkpoint.convert import STORED, hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.families import FAMILIES
from megatron_amopo.checkpoint.verify import verify
from tests.support.checkpoints import LAYERS, MakeFolder, all_files, load_tensors

TENSORS_OF_A_LAYER = {"qwen2": 12, "qwen3": 11, "llama": 9, "mistral": 9}


def test_every_family_is_here() -> None:
    assert {family.model_type for family in FAMILIES.values()} == TENSORS_OF_A_LAYER.keys()


@pytest.mark.parametrize("family", TENSORS_OF_A_LAYER)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bytes_are_the_same(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, family: str, tied: bool, dtype: torch.dtype, shards: int
) -> None:
    size = dtype.itemsize * 50_000 if shards == 3 else 10**9
    original = make_folder(family=family, tied=tied, dtype=dtype, max_shard_size=size)
    assert len(list(original.glob("*.safetensors"))) == shards
    done = hf_to_megatron(original, tmp_path / "megatron")
    assert done.tensors == TENSORS_OF_A_LAYER[family] * LAYERS + (2 if tied else 3)
    assert (done.notes, done.warnings) == ((), ())
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(original)
    # The same with the files planned from --max-shard-size instead of the record of the original's.
    megatron_to_hf(tmp_path / "megatron", tmp_path / "planned", dtype=STORED, max_shard_size=size)
    assert all_files(tmp_path / "planned") == all_files(original)
    assert not any(row.differing for row in verify(original, tmp_path / "megatron"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1},
        {"family": "qwen3", "head_dim": 32},
        {"family": "llama", "head_dim": 16, "num_hidden_layers": 1},
        {"vocab_size": 256},
    ],
    ids=["a key head for each query head", "one key head", "qwen3 with wide heads", "one layer", "nothing to pad"],
)
def test_shapes_at_the_edges(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, changes: dict[str, object]
) -> None:
    original = make_folder(**changes)
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(original)


@pytest.mark.parametrize("family", TENSORS_OF_A_LAYER)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_checkpoint_does_not_depend_on_the_shards(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, family: str, tied: bool, dtype: torch.dtype
) -> None:
    """What any layout loads from a folder of one file, it loads from one of three."""
    for shards, size in {1: 10**9, 3: dtype.itemsize * 50_000}.items():
        folder = make_folder(f"hf-{shards}", family=family, tied=tied, dtype=dtype, max_shard_size=size)
        assert len(list(folder.glob("*.safetensors"))) == shards
        hf_to_megatron(folder, tmp_path / str(shards))
    assert all_files(tmp_path / "1" / "release") == all_files(tmp_path / "3" / "release")


def test_the_checkpoint_does_not_depend_on_the_workers(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several data files, one and three at a time: the same bytes, DCP's metadata included; and so for the export."""
    monkeypatch.setattr("megatron_amopo.checkpoint.megatron_writer._FILE_BYTES", 100_000)
    original = make_folder(max_shard_size="100KB")
    for workers in (1, 3):
        hf_to_megatron(original, tmp_path / f"megatron-{workers}", workers=workers)
        megatron_to_hf(tmp_path / "megatron-1", tmp_path / f"back-{workers}", workers=workers)
        assert all_files(tmp_path / f"back-{workers}") == all_files(original)
    files = all_files(tmp_path / "megatron-1")
    assert len([name for name in files if name.endswith(".distcp")]) > 3
    assert all_files(tmp_path / "megatron-3") == files
    assert not any(row.differing for row in verify(original, tmp_path / "megatron-3", workers=3))


@pytest.mark.parametrize("family", TENSORS_OF_A_LAYER)
def test_transformers_computes_the_same_with_the_export(
    make_folder: MakeFolder, small_parts: None, tmp_path: Path, family: str
) -> None:
    from transformers import AutoModelForCausalLM

    original = make_folder(family=family, tied=True, max_shard_size="150KB")
    hf_to_megatron(original, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_size="1GB")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected, actual = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (original, tmp_path / "back")
        )
    assert torch.equal(actual, expected)
    assert load_tensors(tmp_path / "back").keys() == load_tensors(original).keys()
