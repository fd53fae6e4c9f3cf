"""What folders of a family hold beside the model, or instead of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.verify import verify
from megatron_amopo.errors import CheckpointError
from tests.support.checkpoints import LAYERS, MakeFolder, edit_config, load_tensors

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 40,
}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_frequencies_in_old_files_are_left_out_with_a_note(
    make_folder: MakeFolder, tmp_path: Path, family: str
) -> None:
    original = make_folder(family=family)
    tensors = load_tensors(original)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(8) for layer in range(LAYERS)}
    save_file({**tensors, **buffers}, original / "model.safetensors", metadata={"format": "pt"})
    (note,) = hf_to_megatron(original, tmp_path / "megatron").notes
    assert "inv_freq" in note
    assert "follow from config.json" in note
    assert not any(row.differing for row in verify(original, tmp_path / "megatron"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert load_tensors(tmp_path / "back").keys() == tensors.keys()


def test_a_tensor_of_another_family_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Llama's config.json over Qwen3's weights: the norms would silently stay behind."""
    original = make_folder(family="qwen3")
    of_qwen = dict.fromkeys(("layer_types", "max_window_layers", "use_sliding_window"))
    edit_config(original, architectures=["LlamaForCausalLM"], model_type="llama", **of_qwen)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_norm\.weight is not part of the model"):
        hf_to_megatron(original, tmp_path / "megatron")


def test_verify_sees_another_scaling(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Of which Megatron's arguments hold the factor alone."""
    original = make_folder(family="llama", rope_scaling=LLAMA3)
    hf_to_megatron(original, tmp_path / "megatron")
    other = {**LLAMA3, "original_max_position_embeddings": 41}
    edit_config(original, rope_theta=10_000.0, rope_scaling=other, rope_parameters=None)
    with pytest.raises(CheckpointError, match="not the same model: rope_scaling is Llama3Scaling"):
        verify(original, tmp_path / "megatron")
