"""Rotary angles against transformers', at positions that restart and reach far."""

import pytest
import torch

from megatron_amopo.certification.tiny import tiny_config
from megatron_amopo.model.rotary import Llama3Scaling, PackedRotaryEmbedding

POSITIONS = torch.tensor([[0, 1, 2, 1, 2, 3, 5_001, 32_767]])


def assert_same_angles(actual, cosine, sine):
    assert actual.shape == (8, 1, 1, 16)
    torch.testing.assert_close(actual[:, 0, 0].cos(), cosine[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(actual[:, 0, 0].sin(), sine[0], rtol=0, atol=2e-6)


def test_plain():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = tiny_config(rope_theta=1_000_000.0, max_position_embeddings=32_768)
    base = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    angles = PackedRotaryEmbedding(config.hidden_size // config.num_attention_heads, base)(POSITIONS)
    assert_same_angles(angles, *Qwen2RotaryEmbedding(config)(torch.zeros(1), POSITIONS))


@pytest.mark.parametrize("original", [8_192, 40])
def test_llama3_scaling(original):
    """Original contexts of 8,192 tokens as published, and of 40, where some frequencies are kept, blended, divided."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = Llama3Scaling(8.0, 1.0, 4.0, original)
    fields = {**vars(scaling), "rope_type": "llama3"}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=131_072, rope_theta=500_000.0,
        rope_scaling=fields,
    )  # fmt: skip
    angles = PackedRotaryEmbedding(16, 500_000.0, scaling)(POSITIONS)
    assert_same_angles(angles, *LlamaRotaryEmbedding(config)(torch.zeros(1), POSITIONS))
    assert not torch.equal(angles, PackedRotaryEmbedding(16, 500_000.0)(POSITIONS))
