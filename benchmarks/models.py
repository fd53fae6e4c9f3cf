"""The models that the step benchmarks compute with: the same random weights in transformers and in Megatron.

Real models don't fit a benchmark on two cores, and a model with fewer of everything would have another balance: a
smaller hidden size makes logits more expensive beside matrix products, fewer layers make the head heavier. So the model
is an even *slice* of a real one: 1/n of its layers, with their true shape, and 1/n of its vocabulary. Whatever is
counted of a step, matrix products of layers and of the head, attention, logits' and activations' bytes, is then 1/n of
the real model's.
"""

import argparse
import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo import device
from megatron_amopo.errors import ConfigError
from megatron_amopo.objectives import PUBLISHED, ObjectiveConfig

# Sizes of Qwen2.5-0.5B as its config.json states them.
QWEN2_5_0_5B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
}
_SIZES = tuple(QWEN2_5_0_5B)
_ROPE_BASE = 1_000_000.0


@dataclass(frozen=True)
class ModelSlice:
    """1/``parts`` of the layers and of the vocabulary of a Qwen2 model."""

    config: dict[str, Any]  # fields of the slice's config.json
    parts: int

    @classmethod
    def of(cls, config_file: Path | None, parts: int) -> "ModelSlice":
        """Of the model that a config.json describes; None is Qwen2.5-0.5B.

        Raises:
            ConfigError: not a Qwen2 model, or ``parts`` doesn't divide its layers.
        """
        whole = QWEN2_5_0_5B if config_file is None else json.loads(config_file.read_text(encoding="utf-8"))
        if whole.get("model_type") != "qwen2":
            raise ConfigError(f"--config {config_file}: model_type is {whole.get('model_type')}; expected qwen2")
        return cls.part(whole, parts)

    @classmethod
    def part(cls, whole: Mapping[str, Any], parts: int) -> "ModelSlice":
        """Of the model that has the sizes ``whole``, by config.json's names.

        Raises:
            ConfigError: ``parts`` doesn't divide its layers.
        """
        layers = whole["num_hidden_layers"]
        if parts < 1 or layers % parts:
            raise ConfigError(f"--parts {parts} does not divide the model's {layers} layers")
        config = {name: whole[name] for name in _SIZES}
        config |= {"num_hidden_layers": layers // parts, "vocab_size": round(whole["vocab_size"] / parts)}
        return cls(config, parts)

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of all layers."""
        c = self.config
        inner = c["hidden_size"] // c["num_attention_heads"]
        attention = 2 * c["hidden_size"] * inner * (c["num_attention_heads"] + c["num_key_value_heads"])
        return c["num_hidden_layers"] * (attention + 3 * c["hidden_size"] * c["intermediate_size"])

    @property
    def head_parameters(self) -> int:
        """Weights of the output layer."""
        return self.config["vocab_size"] * self.config["hidden_size"]

    def __str__(self) -> str:
        c = self.config
        return (
            f"1/{self.parts} of a model of hidden size {c['hidden_size']}: {c['num_hidden_layers']} layer(s) of "
            f"intermediate size {c['intermediate_size']} with {c['num_attention_heads']} heads and "
            f"{c['num_key_value_heads']} key-value heads, {self.layer_parameters / 1e6:.1f} M weights, and "
            f"{c['vocab_size']:,} vocabulary rows, {self.head_parameters / 1e6:.1f} M weights"
        )


@dataclass(frozen=True)
class Models:
    """The same weights twice."""

    transformers: torch.nn.Module
    megatron: torch.nn.Module
    vocab_size: int
    cp_group: dist.ProcessGroup
    transformer_impl: str  # whose layers Megatron's model has: "local" or "transformer_engine"
    build_megatron: Callable[..., torch.nn.Module]  # another, on the device; takes fields of its TransformerConfig

    def frozen_copy(self) -> torch.nn.Module:
        """Another model with Megatron's weights, as a reference model would be kept."""
        copy = self.build_megatron()
        copy.load_state_dict(self.megatron.state_dict())
        return copy.eval().requires_grad_(False)


@contextlib.contextmanager
def both_models(model_slice: ModelSlice, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Iterator[Models]:
    """Both models in this process, on its device, ready to train; process groups of one rank end with the context.

    Megatron's has the layers that training takes: Transformer Engine's on CUDA where it is installed, but for float32,
    whose matrix products it rounds to TF32.
    """
    device.prepare()  # before Megatron is imported
    from megatron.core import dist_checkpointing, mpu, parallel_state, tensor_parallel
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_amopo.checkpoint.convert import hf_to_megatron
    from megatron_amopo.checkpoint.families import megatron_arguments, rope_scaling
    from megatron_amopo.checkpoint.hf import read_config
    from megatron_amopo.model.builder import ModelShape, build_model, transformer_config

    here = device.current_device()
    torch.manual_seed(seed)
    reference = Qwen2ForCausalLM(Qwen2Config(**model_slice.config, rope_theta=_ROPE_BASE, attn_implementation="sdpa"))
    dist.init_process_group("nccl" if device.has_cuda() else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with device.pretended_cuda():
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            hf, megatron = Path(folder, "hf"), Path(folder, "megatron")
            reference.save_pretrained(hf)
            hf_to_megatron(hf, megatron)
            hf_config = read_config(hf)
            shape = megatron_arguments(hf_config)
            vocab_size = shape["vocab_size"]
            padded = -(-vocab_size // 128) * 128
            options: dict[str, Any] = {
                "params_dtype": dtype,
                "bf16": dtype == torch.bfloat16,
                "transformer_impl": _layers(dtype),
            }
            model_shape = ModelShape.of(shape, rope_scaling(hf_config), padded_vocab_size=padded)

            def build(**changes: Any) -> Any:
                model = build_model(transformer_config(shape, **{**options, **changes}), model_shape)
                return model.to(here, dtype).train()

            model = build()
            state = {name: value for name, value in model.sharded_state_dict().items() if "_extra_state" not in name}
            model.load_state_dict(dist_checkpointing.load(state, str(megatron / "release")), strict=False)
        yield Models(
            transformers=reference.to(here, dtype).train(),
            megatron=model,
            vocab_size=vocab_size,
            cp_group=mpu.get_context_parallel_group(),
            transformer_impl=options["transformer_impl"],
            build_megatron=build,
        )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _layers(dtype: torch.dtype) -> str:
    is_installed = importlib.util.find_spec("transformer_engine") is not None
    return "transformer_engine" if device.has_cuda() and is_installed and dtype != torch.float32 else "local"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the model and of the measurement."""
    add = parser.add_argument
    add("--config", type=Path, help="config.json of a Qwen2 model (default: Qwen2.5-0.5B's sizes)")
    add("--parts", type=int, default=24, help="the model is 1/PARTS of that (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights (default: %(default)s)")
    add("--repetitions", type=int, default=7, help="timings of each (default: %(default)s)")


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    """The dtype that the flags of :func:`add_model_arguments` name."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]


class OurStep:
    """Forward pass and loss as training computes them (``training/step.py``)."""

    def __init__(
        self,
        models: Models,
        dimensions: tuple[str, ...],
        objective: ObjectiveConfig = PUBLISHED,
        model: torch.nn.Module | None = None,
    ):
        from megatron_amopo.training.arguments import RunConfig

        self._models, self._model = models, model or models.megatron
        # What the loss reads of a run's configuration.
        self._config = cast(RunConfig, SimpleNamespace(dimensions=dimensions, objective=objective))

    def __call__(self, batch: Any) -> Tensor:
        """The sum of the records' losses of a :class:`GroupBatch`; differentiable."""
        from megatron_amopo.model.builder import forward_logps
        from megatron_amopo.model.context_parallel import split_batch
        from megatron_amopo.training.step import loss_and_metrics

        part = split_batch(batch, rank=0, size=1).to(device.current_device())
        logps = forward_logps(self._model, part.batch, vocab_size=self._models.vocab_size)
        return loss_and_metrics(part, self._models.cp_group, self._config, (), logps)[0]
