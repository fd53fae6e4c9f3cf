"""What training saved, under any layout and with any optimizer format, comes out as a Hugging Face folder."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amopo.certification.observed_run import train
from megatron_amopo.certification.tiny import VOCAB_SIZE
from megatron_amopo.checkpoint.convert import megatron_to_hf
from megatron_amopo.checkpoint.verify import verify
from tests.support.checkpoints import all_files, load_tensors, use_small_parts
from tests.support.jobs_export import train_saving_by_rank

TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
DISTRIBUTED = "--use-distributed-optimizer"
LAYERS, GROUPS = 4, 2


@dataclass(frozen=True)
class Case:
    ranks: int
    layout: tuple[str, ...]
    tied: bool = True
    by_rank: bool = False
    optimizer_keys: str | None = None
    """In the names of the optimizer's tensors; None where none are saved."""


CASES = {
    "tp2-pp2-untied": Case(4, (*TP2, *PP2), tied=False, optimizer_keys="optimizer.state.exp_avg"),
    "pp2-vpp2-weights-alone": Case(2, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1", "--no-save-optim")),
    "tp2-dp2-fully-reshardable": Case(4, (*TP2, DISTRIBUTED), optimizer_keys="optimizer.state.exp_avg"),
    "tp2-dp2-dp-reshardable": Case(
        4, (*TP2, DISTRIBUTED), by_rank=True, optimizer_keys="optimizer.distributed.dp_group_idx_0"
    ),
    "dp2-saved-by-one-rank": Case(
        2, (DISTRIBUTED, "--no-ckpt-fully-parallel-save"), optimizer_keys="optimizer.state.exp_avg"
    ),
}


def flags(place, save: Path, *extra: str, tied: bool = True) -> list[str]:
    return [
        "--amopo-data", str(place.data), "--pretrained-checkpoint", str(place.mcore if tied else place.mcore_untied),
        "--save", str(save), "--train-iters", "2", "--micro-batch-size", "2", "--global-batch-size", "8",
        "--lr", "1e-3", "--lr-decay-style", "constant", "--log-interval", "1", *extra,
    ]  # fmt: skip


def as_megatron_has_them(hf: dict[str, torch.Tensor], *, tied: bool) -> dict[str, torch.Tensor]:
    """Megatron's parameters, stacked over layers, put together step by step from Hugging Face tensors."""

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([hf[f"model.layers.{layer}.{name}"] for layer in range(LAYERS)])

    def qkv(kind: str) -> torch.Tensor:
        q, k, v = (stacked(f"self_attn.{letter}_proj.{kind}").chunk(GROUPS, dim=1) for letter in "qkv")
        return torch.cat([part for group in zip(q, k, v, strict=True) for part in group], dim=1)

    parameters = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stacked("input_layernorm.weight"),
        "decoder.layers.self_attention.linear_qkv.weight": qkv("weight"),
        "decoder.layers.self_attention.linear_qkv.bias": qkv("bias"),
        "decoder.layers.self_attention.linear_proj.weight": stacked("self_attn.o_proj.weight"),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm.weight"),
        "decoder.layers.mlp.linear_fc1.weight": torch.cat(
            [stacked("mlp.gate_proj.weight"), stacked("mlp.up_proj.weight")], dim=1
        ),
        "decoder.layers.mlp.linear_fc2.weight": stacked("mlp.down_proj.weight"),
    }
    return parameters if tied else {**parameters, "output_layer.weight": hf["lm_head.weight"]}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_parts(monkeypatch)


def stored_names(iteration: Path) -> set[str]:
    with (iteration / ".metadata").open("rb") as file:
        return set(pickle.load(file).state_dict_metadata)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_layout_and_optimizer_format(ranks, workplace, tmp_path, case):
    """The exported weights are bit by bit those that the ranks held after the last step."""
    save, export = tmp_path / "run", tmp_path / "export"
    job = train_saving_by_rank if case.by_rank else train
    run = ranks.run(job, case.ranks, flags(workplace, save, *case.layout, tied=case.tied))[0]
    optimizer = {name for name in stored_names(save / "iter_0000002") if name.startswith(("optimizer", "chained"))}
    assert any(case.optimizer_keys in name for name in optimizer) if case.optimizer_keys else not optimizer
    megatron_to_hf(save, export)
    exported = as_megatron_has_them(load_tensors(export), tied=case.tied)
    assert exported.keys() == run.weights.keys()
    for name, trained in run.weights.items():
        rows = VOCAB_SIZE if "embedding" in name or "output" in name else None
        assert torch.equal(exported[name], trained[:rows]), name
    assert not torch.equal(run.weights["decoder.final_layernorm.weight"], run.initial["decoder.final_layernorm.weight"])
    assert not any(row.differing for row in verify(export, save))


def test_the_folder_is_what_save_pretrained_writes(ranks, workplace, tmp_path):
    """After training in bfloat16 from a float32 folder: names, order, index, config and bytes, in one file or three."""
    save = tmp_path / "run"
    ranks.run(train, 2, flags(workplace, save, *TP2, "--bf16", tied=False), want_tensors=False)
    for name, dtype, size in (("original", "original", 10**9), ("stored", "stored", 120_000)):
        export, again = tmp_path / name, tmp_path / f"{name}-again"
        done = megatron_to_hf(save, export, dtype=dtype, max_shard_size=size)
        assert done.dtypes == ("float32" if dtype == "original" else "bfloat16",)
        loaded = AutoModelForCausalLM.from_pretrained(export)
        assert str(loaded.dtype) == f"torch.{done.dtypes[0]}"
        # Loaded weights are views of larger storages, by whose size transformers would deal them to files.
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=loaded.dtype)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(again, max_shard_size=size)
        ours, theirs = all_files(export), all_files(again)
        configs = [json.loads(files.pop("config.json")) for files in (ours, theirs)]
        assert configs[0] == configs[1]
        assert ours == theirs
        assert len(list(export.glob("*.safetensors"))) == (1 if size == 10**9 else 3)
