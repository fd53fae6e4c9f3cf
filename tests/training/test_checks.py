"""Room for a checkpoint, and what a pipeline's schedule takes, told before a run starts."""

import shutil
from argparse import Namespace
from collections import namedtuple

import pytest

from megatron_amopo.certification.tiny import tiny_config
from megatron_amopo.data.planning import Schedule
from megatron_amopo.errors import CheckpointError, ConfigError
from megatron_amopo.training.checks import check_outputs, check_room, checkpoint_bytes, schedule_of
from megatron_amopo.training.run_record import _copy_hf_folder

CONFIG = tiny_config(architectures=["Qwen2ForCausalLM"]).to_dict()
USAGE = namedtuple("usage", "total used free")


def arguments(**changes):
    return Namespace(
        **{
            "save": "run",
            "load": None,
            "ckpt_step": None,
            "skip_train": False,
            "bf16": True,
            "optimizer": "adam",
            "no_save_optim": None,
        }
        | {"amopo_keep_checkpoints": None, "save_retain_interval": None}
        | changes
    )


def test_bytes_per_parameter():
    """Weights in the type that they are computed in; float32 weights beside bfloat16 ones; two moments."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for changes, each in (
        ({}, 14),
        ({"bf16": False}, 12),
        ({"optimizer": "sgd"}, 6),
        ({"no_save_optim": True}, 2),
        ({"bf16": False, "no_save_optim": True}, 4),
    ):
        assert checkpoint_bytes(arguments(**changes), CONFIG) == numbers * each


def test_too_little_room(monkeypatch):
    needed = checkpoint_bytes(arguments(), CONFIG)
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(2 * needed, 0, free))
    check_room(arguments(), CONFIG)
    free = needed - 1
    for without in ({"save": None}, {"skip_train": True}):
        check_room(arguments(**without), CONFIG)
    with pytest.raises(ConfigError, match=r"--save run: a checkpoint takes about .* GiB; .* GiB are free"):
        check_room(arguments(), CONFIG)


def outputs(save):
    return Namespace(
        save=str(save),
        skip_train=False,
        finetune=False,
        tensorboard_dir=None,
        amopo_dump_logps=None,
        amopo_export_hf=None,
    )


def test_a_models_own_folder_is_not_taken_for_a_runs(tmp_path):
    """`--amopo-hf-model models/hf --save models` once replaced the model by its own config."""
    hf = tmp_path / "models" / "hf"
    hf.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    check_outputs(outputs(hf.parent), tmp_path)  # of a run that never saved
    weights = hf / "model.safetensors"
    weights.write_bytes(b"weights")
    with pytest.raises(ConfigError, match=r"--save .*models: .*hf holds a model's weights"):
        check_outputs(outputs(hf.parent), hf)
    check_outputs(outputs(hf.parent), hf.parent)  # resumed from there: nothing is replaced

    own = tmp_path / "model"
    own.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (own / name).write_text('{"model_type": "llama"}')
        with pytest.raises(ConfigError, match=rf"--save .*model is a model's folder \({name}\)"):
            check_outputs(outputs(own), tmp_path)
        (own / name).unlink()
    for name in ("notes.txt", "config.json", "scores.pt"):  # a launcher's own
        (own / name).write_text('{"experiment": 7}')
    check_outputs(outputs(own), tmp_path)

    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(CheckpointError, match="is left alone: name another --save"):
        _copy_hf_folder(source, hf)
    assert weights.read_bytes() == b"weights"

    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "hf").symlink_to(source)
    with pytest.raises(ConfigError, match="--save"):
        check_outputs(outputs(linked), hf)


@pytest.mark.parametrize(
    ("layout", "pp", "schedule"),
    [
        ("Et|t|t|tL", 2, Schedule(2, 2)),
        ("Et|(t|)*2,tL", 2, Schedule(2, 2)),
        ("Et|t*2,tL", 2, Schedule()),
        ("Et|tttL", 4, Schedule()),  # too few, which Megatron refuses
    ],
)
def test_stages_by_hand_are_interleaved_where_a_rank_has_several(layout, pp, schedule):
    """Limits of tokens, evaluations and the FP8 check read this, too."""
    args = Namespace(
        pipeline_model_parallel_size=pp,
        pipeline_model_parallel_layout=layout,
        num_virtual_stages_per_pipeline_rank=None,
        num_layers_per_virtual_pipeline_stage=None,
        microbatch_group_size_per_vp_stage=None,
    )
    assert schedule_of(args) == schedule
