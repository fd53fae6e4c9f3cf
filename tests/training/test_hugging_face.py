"""The flags that name Hugging Face folders: what is refused before a run, and what a failed export says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_amopo.checkpoint.import_cache import TRACKER, entry_name
from megatron_amopo.errors import CheckpointError, ConfigError
from megatron_amopo.training.hugging_face import check_export, export_last_step, find_hf_start


def arguments(**given: Any) -> argparse.Namespace:
    """Megatron's argument namespace, as far as it matters here."""
    names = ["amopo_hf_model", "amopo_hf_cache", "amopo_export_hf", "pretrained_checkpoint", "load", "save"]
    return argparse.Namespace(**{**dict.fromkeys(names), "skip_train": False, "train_iters": 4, **given})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def checkpoint(folder: Path, iteration: str) -> Path:
    folder.mkdir(parents=True)
    (folder / TRACKER).write_text(iteration)
    return folder


def test_where_a_start_leads(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMOPO_HF_CACHE", str(tmp_path / "by variable"))
    name = entry_name(source)
    assert find_hf_start(arguments()) is None
    for given, cache in (({}, "by variable"), ({"amopo_hf_cache": tmp_path / "by flag"}, "by flag")):
        start = find_hf_start(arguments(amopo_hf_model=source, **given))
        assert start is not None
        assert (start.source, start.entry) == (source, tmp_path / cache / name)


def test_a_run_to_go_on_with_comes_first(source: Path, tmp_path: Path) -> None:
    """An empty --load folder is one that the run is going to fill."""
    (tmp_path / "empty").mkdir()
    assert find_hf_start(arguments(amopo_hf_model=source, load=str(tmp_path / "empty"))) is not None
    run = checkpoint(tmp_path / "run", "3")
    assert find_hf_start(arguments(amopo_hf_model=source, load=str(run))) is None
    assert find_hf_start(arguments(amopo_hf_model=tmp_path / "deleted", load=str(run))) is None


def test_what_is_no_start(source: Path, tmp_path: Path) -> None:
    megatron = checkpoint(tmp_path / "megatron", "release")
    (tmp_path / "empty").mkdir()
    for given, message in [
        ({"amopo_hf_cache": tmp_path}, "--amopo-hf-cache says where --amopo-hf-model is imported to"),
        ({"amopo_hf_model": source, "pretrained_checkpoint": "x"}, "--amopo-hf-model and --pretrained-checkpoint both"),
        ({"amopo_hf_model": Path("Qwen/Qwen2.5-7B")}, "--amopo-hf-model Qwen/Qwen2.5-7B: no such folder"),
        ({"amopo_hf_model": megatron}, "is a Megatron checkpoint: give it as --pretrained-checkpoint"),
        ({"amopo_hf_model": tmp_path / "empty"}, r"not a Hugging Face folder \(no config.json\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            find_hf_start(arguments(**given))


def test_what_can_not_be_exported(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    save, target = str(tmp_path / "run"), tmp_path / "aligned"
    check_export(arguments())
    check_export(arguments(amopo_export_hf=target, save=save))
    for given, message in [
        ({"amopo_export_hf": target}, "--amopo-export-hf needs --save"),
        ({"amopo_export_hf": target, "save": save, "skip_train": True}, "--amopo-export-hf with --skip-train"),
        ({"amopo_export_hf": tmp_path / "there", "save": save}, "there exists already"),
        ({"amopo_export_hf": tmp_path / "run" / "hf", "save": save}, "neither may hold the other"),
        ({"amopo_export_hf": tmp_path / "all", "save": str(tmp_path / "all" / "run")}, "neither may hold the other"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_export(arguments(**given))


def test_a_start_after_the_end(tmp_path: Path) -> None:
    """May find an export, which is compared in the end; any other start must not."""
    save, target = checkpoint(tmp_path / "run", "4"), tmp_path / "aligned"
    target.mkdir()
    ended = {"amopo_export_hf": target, "save": str(save), "load": str(save), "finetune": False, "ckpt_step": None}
    check_export(arguments(**ended))
    check_export(arguments(**{**ended, "train_iters": None, "train_samples": 33, "global_batch_size": 8}))
    other = str(checkpoint(tmp_path / "other", "4"))
    for change in (
        {"train_iters": 5},
        {"train_iters": 0},
        {"ckpt_step": 2},
        {"load": None},
        {"load": str(tmp_path / "none")},
        {"load": other},
        {"load": other, "finetune": True},
    ):
        with pytest.raises(ConfigError, match="aligned exists already"):
            check_export(arguments(**{**ended, **change}))


def test_a_folder_that_is_no_export_of_the_step(tmp_path: Path) -> None:
    save, target = checkpoint(tmp_path / "run", "4"), tmp_path / "aligned"
    target.mkdir()
    with pytest.raises(CheckpointError, match=f"--amopo-export-hf {target} exists: .*step 4 is not exported; remove"):
        export_last_step(target, save, 4)
    assert list(target.iterdir()) == []


def test_nothing_is_exported_before_the_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    for folder, saved in ((tmp_path / "none", "none"), (checkpoint(tmp_path / "run", "3"), "3")):
        export_last_step(tmp_path / "aligned", folder, 4)
        assert f"the last step is 4, the last saved {saved}" in capsys.readouterr().out
    assert not (tmp_path / "aligned").exists()


def test_a_failed_export_names_the_command(tmp_path: Path) -> None:
    """The tracker names a step whose folder somebody removed."""
    run, target = checkpoint(tmp_path / "run", "4"), tmp_path / "aligned"
    with pytest.raises(
        CheckpointError, match=f"--amopo-export-hf {target}: .*convert_checkpoint.py megatron-to-hf {run}"
    ):
        export_last_step(target, run, 4)
    assert not target.exists()
