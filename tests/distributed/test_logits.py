"""transformers and Megatron read the same text: equal where the weights are, different where they aren't."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_amopo.certification.tiny import VOCAB_SIZE, make_hf_model
from megatron_amopo.checkpoint.convert import hf_to_megatron
from megatron_amopo.checkpoint.logits import RANDOM_TOKENS, compare_logits
from tests.support.families import FAMILIES, LONGEST
from tools.convert_checkpoint import main


@pytest.mark.parametrize("name", FAMILIES)
def test_equal(ranks, tmp_path, name):
    """Each family; Mistral reads no more than its window."""
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    make_hf_model(hf, **FAMILIES[name])
    hf_to_megatron(hf, mcore)
    (found,) = ranks.run(compare_logits, 1, hf, mcore)
    assert (found.tokens, found.vocab_size) == (LONGEST if name == "mistral" else RANDOM_TOKENS, VOCAB_SIZE)
    assert found.text == f"random tokens ({hf} has no tokenizer)"
    assert found.same_top == found.tokens
    assert found.relative_difference <= 1e-6
    assert found.largest_logp_difference <= 1e-5


def test_another_weight(ranks, workplace, tmp_path):
    """One number of one norm, a hundredth larger."""
    changed = tmp_path / "changed"
    shutil.copytree(workplace.hf, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.2.input_layernorm.weight"][5] *= 1.01
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    (found,) = ranks.run(compare_logits, 1, changed, workplace.mcore)
    assert not found.within()
    assert not torch.tensor(found.largest_difference).isnan()


def test_the_command(ranks, workplace, tmp_path):
    """Equal weights and equal logits end with 0, logits above the tolerance with 1, what can't be read with 2."""
    (tmp_path / "text").write_text("1 + 1 = 2")
    command = ["verify", str(workplace.hf), str(workplace.mcore)]
    for extra, code in (
        ([], 0),
        (["--logits"], 0),
        (["--logits", "--logits-tolerance", "-1"], 1),
        (["--logits", "--text", str(tmp_path / "text")], 2),  # the folder has no tokenizer
        (["--logits", "--text", str(tmp_path / "none")], 2),
        (["--text", str(tmp_path / "text")], 2),
    ):
        assert ranks.run(main, 1, [*command, *extra]) == [code], extra
