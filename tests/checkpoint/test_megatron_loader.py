"""Megatron's own loader reads what we write, and we read what Megatron saves, under TP and PP of 1 and 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_amopo.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.verify import verify
from tests.support import loader_ranks
from tests.support.checkpoints import LAYERS, VOCABULARY, all_files, load_tensors, save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders NAME/hf, NAME/megatron and, from four ranks that loaded, compared and saved, NAME/saved-tp…-pp…

    All are loaded into float32 models, also those that are bfloat16.
    """
    work = tmp_path_factory.mktemp("loader")
    for name, kind in loader_ranks.MODELS.items():
        save_tiny_model(
            work / name / "hf",
            family=kind.family,
            tied=kind.tied,
            dtype=kind.dtype,
            max_shard_size="100KB" if kind.tied else "1GB",
            **({} if kind.family == "qwen2" else {"head_dim": kind.head}),
        )
        # As a large model's: several chunks of every matrix, several data files.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("megatron_amopo.checkpoint.convert.PART_NUMBERS", 700)
            patch.setattr("megatron_amopo.checkpoint.megatron_writer._FILE_BYTES", 200_000)
            hf_to_megatron(work / name / "hf", work / name / "megatron")
    torch.multiprocessing.start_processes(
        loader_ranks.run, (work, VOCABULARY, LAYERS), nprocs=loader_ranks.RANKS, start_method="forkserver"
    )
    return work


@pytest.mark.parametrize(("name", "tp", "pp"), loader_ranks.SAVED)
def test_what_megatron_saved_is_exported_exactly(saved: Path, tmp_path: Path, name: str, tp: int, pp: int) -> None:
    """Padded rows (here: sevens) and the optimizer's tensors stay behind. When this runs, every rank loaded exactly."""
    original = saved / name / "hf"
    megatron = saved / name / f"saved-tp{tp}-pp{pp}"
    shutil.copytree(saved / name / "megatron" / "hf", megatron / "hf")
    (megatron / "latest_checkpointed_iteration.txt").write_text("5")
    assert not any(row.differing for row in verify(original, megatron))
    megatron_to_hf(megatron, tmp_path / "back")
    assert all_files(tmp_path / "back") == all_files(original)


def test_float32_weights_of_a_bfloat16_model_stay_exact(saved: Path, tmp_path: Path) -> None:
    """--dtype stored exports what training stored."""
    megatron = saved / "qwen2-untied-bfloat16" / "saved-tp2-pp2"
    shutil.copytree(saved / "qwen2-untied-bfloat16" / "megatron" / "hf", megatron / "hf", dirs_exist_ok=True)
    (megatron / "latest_checkpointed_iteration.txt").write_text("5")
    assert megatron_to_hf(megatron, tmp_path / "back", dtype="stored").dtypes == ("float32",)
    expected, actual = load_tensors(saved / "qwen2-untied-bfloat16" / "hf"), load_tensors(tmp_path / "back")
    assert all(torch.equal(actual[name], expected[name].float()) for name in expected)
