"""Refusals: everything that this project doesn't compute correctly, or that can't fit together, said before a GPU
minute is spent.

Each check takes plain values and raises :class:`ConfigError` or :class:`DataError` naming the flag, the file or the
record.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megatron_amopo import device
from megatron_amopo.checkpoint.families import SequenceLimit, parameter_table
from megatron_amopo.checkpoint.hf_files import CONFIG
from megatron_amopo.checkpoint.iterations import current_iteration, holds_checkpoint, leftovers
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.planning import Schedule
from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.model.attention import select_backend
from megatron_amopo.training.resuming import check_loadable
from megatron_amopo.training.survival_arguments import read_retention, superfluous

#: The least that a number may be.
LEAST = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "micro_batch_size": 1,
    "amopo_max_tokens_per_micro_batch": 1,
    "global_batch_size": 1,
    "eval_micro_batch_size": 1,
    "eval_global_batch_size": 1,
    "log_interval": 1,
    "seed": 1,
    "amopo_seed": 0,
    "amopo_epochs": 1,
    "amopo_conflict_interval": 1,
    "amopo_fp8_check_interval": 1,
    "amopo_head_buffer_mib": 1,
    "amopo_keep_checkpoints": 1,
}

#: How files of weights end.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def check_before(args: argparse.Namespace) -> None:
    """What can be told from the flags alone, before any file is read."""
    if args.amopo_data is None:
        raise ConfigError("--amopo-data is missing: give the folder that tools/prepare_preferences.py wrote")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")
    _check_micro_batches(args)
    lengths = [f for f in ("amopo_epochs", "train_iters", "train_samples") if getattr(args, f) is not None]
    if len(lengths) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in lengths)
        raise ConfigError(f"{flags} both say how long to train; give one")
    if not lengths and not args.skip_train:
        raise ConfigError("nothing says how long to train: give --amopo-epochs or --train-iters (or --skip-train)")
    if args.lr is None and not args.skip_train:
        raise ConfigError("--lr is missing: the peak learning rate (published: 3e-7 with SimPO)")

    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    if args.world_size % (tp * pp * cp):
        raise ConfigError(
            f"{args.world_size} rank(s) were started, which is not a multiple of --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} × --context-parallel-size {cp} = {tp * pp * cp}"
        )
    dp = args.world_size // (tp * pp * cp)
    for prefix in ("", "eval_"):
        flag = f"--{prefix.replace('_', '-')}"
        global_batch = getattr(args, f"{prefix}global_batch_size")
        # With a budget of tokens any size that divides a rank's share can be chosen.
        micro_batch = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size or 1
        if global_batch is not None and global_batch % (micro_batch * dp):
            raise ConfigError(
                f"{flag}global-batch-size {global_batch} is not a multiple of {flag}micro-batch-size {micro_batch} "
                f"× {dp} data-parallel rank(s)"
            )


def schedule_of(args: argparse.Namespace) -> Schedule:
    """What Megatron's pipeline schedule can make a step of, in training as in evaluation."""
    pp, virtual = args.pipeline_model_parallel_size, args.num_virtual_stages_per_pipeline_rank
    if args.pipeline_model_parallel_layout is not None:
        virtual = _stages_by_hand(args.pipeline_model_parallel_layout) // pp
    elif virtual is None and args.num_layers_per_virtual_pipeline_stage is not None:
        ends = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        virtual = (args.num_layers + ends) // pp // args.num_layers_per_virtual_pipeline_stage
    if virtual is None or virtual < 2:  # 0: too few stages, which Megatron refuses
        return Schedule()
    return Schedule(args.microbatch_group_size_per_vp_stage or pp, pp)


def _stages_by_hand(layout: str) -> int:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        return PipelineParallelLayerLayout.get_num_stages_from_str(layout)
    except AssertionError as error:
        raise ConfigError(f"--pipeline-model-parallel-layout {layout}: {error}") from error


def check_schedule(args: argparse.Namespace, dp: int, *, has_validation: bool) -> None:
    """Whether the numbers of micro-batches of training and evaluation can be scheduled, once all sizes are known."""
    schedule = schedule_of(args)
    if schedule == Schedule():
        return
    if schedule.together < schedule.stages:
        raise ConfigError(
            f"--microbatch-group-size-per-virtual-pipeline-stage {schedule.together} is less than "
            f"--pipeline-model-parallel-size {schedule.stages}"
        )
    sizes = {} if args.skip_train else {"--global-batch-size": (args.global_batch_size, args.micro_batch_size)}
    if has_validation:
        evaluated = args.eval_global_batch_size or args.global_batch_size
        sizes["--eval-global-batch-size"] = evaluated, args.eval_micro_batch_size or args.micro_batch_size
    for flag, (records, micro_batch) in sizes.items():
        num_micro_batches = records // (micro_batch * dp)
        if not schedule.takes(num_micro_batches):
            raise ConfigError(
                f"{flag} {records} makes {num_micro_batches} micro-batch(es) of {micro_batch} on {dp} data-parallel "
                f"rank(s); interleaved pipeline stages take them in groups of {schedule.together}, the last of "
                f"{schedule.stages} or more"
            )


def _check_micro_batches(args: argparse.Namespace) -> None:
    """Whether one thing, and one only, says how large a micro-batch is."""
    if args.amopo_max_tokens_per_micro_batch is None:
        if args.micro_batch_size is None:
            raise ConfigError(
                "--micro-batch-size is missing: groups (records) per micro-batch, on average (or give "
                "--amopo-max-tokens-per-micro-batch)"
            )
        return
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} and --amopo-max-tokens-per-micro-batch both say how large a micro-batch "
                "is; give one"
            )
    if args.global_batch_size is None:
        raise ConfigError("--global-batch-size is missing: --amopo-max-tokens-per-micro-batch splits it")


def check_checkpoint(args: argparse.Namespace) -> Path:
    """The folder whose checkpoint the run continues or starts from: ``--load`` if it holds one, else
    ``--pretrained-checkpoint``. What it holds can be loaded.
    """
    sources = [
        (flag, Path(value))
        for flag, value in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint))
        if value
    ]
    if not sources:
        raise ConfigError(
            "nothing to start from: give --amopo-hf-model DIR (a Hugging Face folder), --pretrained-checkpoint DIR "
            "(made by tools/convert_checkpoint.py hf-to-megatron) or --load DIR"
        )
    for flag, folder in sources:
        if holds_checkpoint(folder):
            check_loadable(args, flag, folder)
            if not (folder / "hf" / "config.json").is_file():
                raise ConfigError(
                    f"{flag} {folder} holds no hf/config.json, so the model's shape is unknown: copy the hf folder of "
                    "the checkpoint that it came from, or make it with tools/convert_checkpoint.py hf-to-megatron"
                )
            return folder
    for flag, folder in sources:
        if (folder / "config.json").is_file():
            raise ConfigError(
                f"{flag} {folder} holds no checkpoint of Megatron's: it is a Hugging Face folder. Give it as "
                "--amopo-hf-model instead"
            )
    raise ConfigError(
        ", ".join(f"{flag} {folder} holds no checkpoint" for flag, folder in sources)
        + " (no latest_checkpointed_iteration.txt)"
    )


def check_room(args: argparse.Namespace, hf_config: Mapping[str, Any]) -> None:
    """Whether the ``--save`` folder, which is there, has room for a checkpoint, when what the start of training removes
    there (``Saving.begin``) is gone.
    """
    if args.save is None or args.skip_train:
        return
    needed, free = checkpoint_bytes(args, hf_config), shutil.disk_usage(args.save).free
    if free < needed:
        free += sum(map(_bytes_in, _removed_at_start(args, Path(args.save))))
    if free < needed:
        raise ConfigError(
            f"--save {args.save}: a checkpoint takes about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free"
        )


def _removed_at_start(args: argparse.Namespace, save: Path) -> list[Path]:
    resumed = args.load is not None and Path(args.load).is_dir() and save.samefile(args.load) and not args.ckpt_step
    current = current_iteration(save) if resumed else None
    return [*leftovers(save), *(superfluous(save, read_retention(args), current) if current is not None else ())]


def _bytes_in(folder: Path) -> int:
    """What deleting a folder frees; 0 for what another process has just deleted."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_blocks * 512
    return total


def checkpoint_bytes(args: argparse.Namespace, hf_config: Mapping[str, Any]) -> int:
    """What a checkpoint of the model takes on the disk, about: weights and, unless it isn't saved, the optimizer's
    state in float32 (the weights where they are computed in bfloat16, and Adam's two moments).
    """
    numbers = sum(math.prod(parameter.stored_shape) for parameter in parameter_table(hf_config))
    of_weights = 2 if args.bf16 else 4
    moments = 8 if args.optimizer == "adam" else 0
    of_optimizer = 0 if args.no_save_optim else moments + (4 if args.bf16 else 0)
    return numbers * (of_weights + of_optimizer)


def check_shape(args: argparse.Namespace) -> None:
    """Whether the layout divides the model."""
    tp, pp, cp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    for what, count in (("attention heads", args.num_attention_heads), ("key-value heads", args.num_query_groups)):
        if count % tp:
            raise ConfigError(f"--tensor-model-parallel-size {tp} doesn't divide the model's {count} {what}")
    if args.num_attention_heads // tp % cp:
        of_rank = f" per tensor-parallel rank ({args.num_attention_heads} / {tp})" if tp > 1 else ""
        raise ConfigError(
            f"--context-parallel-size {cp} doesn't divide the model's {args.num_attention_heads // tp} attention heads"
            f"{of_rank}, which context-parallel ranks share"
        )
    if args.num_layers < pp:
        raise ConfigError(f"--pipeline-model-parallel-size {pp} is more than the model's {args.num_layers} layers")


def check_attention(args: argparse.Namespace) -> None:
    """Whether the attention that was asked for runs on this machine in this precision."""
    select_backend(args.amopo_attention, device.current_device(), torch.bfloat16 if args.bf16 else torch.float32)


def check_tokenizer(manifest: Manifest, data: Path, hf_folder: Path, vocab_size: int) -> None:
    """Whether the data was tokenised for this model."""
    if manifest.tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{data} was prepared with tokenizer '{manifest.tokenizer.name}', which has token ids up to "
            f"{manifest.tokenizer.vocab_size - 1}; the model in {hf_folder} has {vocab_size} rows. Prepare the data "
            "with the model's tokenizer (--tokenizer)"
        )
    from megatron_amopo.data.tokenize import folder_vocabulary

    # Ids and texts must agree; the chat template may differ, as a base model's data is prepared with an instruct
    # template.
    if folder_vocabulary(hf_folder) not in (None, manifest.tokenizer.vocab_sha256):
        raise DataError(
            f"{data} was prepared with another tokenizer ('{manifest.tokenizer.name}') than the one in {hf_folder}: "
            "token ids would mean other words. Prepare the data with the model's tokenizer (--tokenizer)"
        )


def check_data(groups: PreparedGroups, limit: SequenceLimit) -> None:
    """Whether there are records, and whether the model takes sequences as long as theirs."""
    if len(groups) == 0:
        raise DataError(f"{groups.folder / groups.split} has no records")
    longest = (groups.lengths[..., 0] + groups.lengths[..., 1:].max(-1)).max(-1)
    index = int(longest.argmax())
    if longest[index] > limit.tokens:
        raise DataError(
            f"{groups.folder / groups.split}: record {groups.record_ids[index]} ({groups.source(index)}) has a "
            f"sequence of {longest[index]} tokens; the model takes {limit}. Prepare the data with "
            f"--cutoff-len {limit.tokens}"
        )


def check_outputs(args: argparse.Namespace, checkpoint: Path) -> None:
    """Whether the run can write where it is told to, and whether that is its own place.

    ``checkpoint`` is what :func:`check_checkpoint` gave. A folder that holds another run is refused: its config,
    tokenizer and metrics would be mixed with this one's.
    """
    if args.save is not None and not args.skip_train:
        save = Path(args.save)
        if holds_checkpoint(save) and (args.finetune or not checkpoint.samefile(save)):
            raise ConfigError(
                f"--save {save} holds a run already: go on with it by --load {save} (without --finetune), or name "
                "another folder"
            )
        if not holds_checkpoint(save) and (found := file_of_a_model(save)) is not None:
            raise ConfigError(
                f"--save {save} is a model's folder ({found.name}): a run's files would be mixed with its own. Name "
                "another folder"
            )
        hf, source = save / "hf", checkpoint / "hf"
        resumed = source.is_dir() and hf.is_dir() and hf.samefile(source)  # stays as it is
        if not resumed and not is_replaceable(hf):
            raise ConfigError(
                f"--save {save}: {hf} holds a model's weights, or is none of a run's; a run keeps its model's config "
                "and tokenizer there. Name another folder"
            )
    folders = [("--save", args.save), ("--tensorboard-dir", args.tensorboard_dir)]
    folders.append(("--amopo-dump-logps", args.amopo_dump_logps and args.amopo_dump_logps.parent))
    folders.append(("--amopo-export-hf", args.amopo_export_hf and args.amopo_export_hf.parent))
    for flag, folder in folders:
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{flag} {folder}: can't be made ({error.strerror})") from error
        try:
            with tempfile.TemporaryFile(dir=folder):  # permissions alone don't tell of a file system that is read-only
                pass
        except OSError as error:
            raise ConfigError(f"{flag} {folder}: can't be written to ({error.strerror})") from error


def file_of_a_model(folder: Path) -> Path | None:
    """A file by which ``folder`` itself is a Hugging Face model's: weights, or a config.json that names a model. Others
    may have a config.json of their own there.
    """
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        for path in sorted(folder.glob(pattern)):
            return path
    config = folder / CONFIG
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(fields, dict) and {"model_type", "architectures"} & fields.keys() else None


def is_replaceable(hf: Path) -> bool:
    """Whether a run's config and tokenizer may go to ``hf``: it is absent, or a folder without weights."""
    if hf.is_symlink():
        return False
    return not hf.exists() or (hf.is_dir() and not any(path.suffix in _WEIGHTS for path in hf.rglob("*")))
