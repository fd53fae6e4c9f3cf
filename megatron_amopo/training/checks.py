"""Refusals: everything that this project doesn't compute correctly, or that can't fit together, said before a GPU
minute is spent.

Each check takes plain values and raises :class:`ConfigError` or :class:`DataError` naming the flag, the file or the
record.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.errors import ConfigError, DataError

_HEAD = "the fused head reads the output weight outside the layer that gathers it"
_LENGTHS = "packed micro-batches differ in length, and it needs one length"
_SAMPLES = "the number of samples per step must be fixed"
_VALIDATION = "a validation pass is always the whole validation set"


@dataclass(frozen=True)
class Unsupported:
    """A Megatron flag that must be ``off``, by the ``name`` of its argument."""

    name: str
    off: Any
    flag: str
    why: str


UNSUPPORTED = (
    Unsupported("context_parallel_size", 1, "--context-parallel-size", "packed groups aren't split over ranks yet"),
    Unsupported("expert_model_parallel_size", 1, "--expert-model-parallel-size", "the models here have no experts"),
    Unsupported("num_experts", None, "--num-experts", "the models here have no experts"),
    Unsupported("mtp_num_layers", None, "--mtp-num-layers", "the objective is on the next token alone"),
    Unsupported("fp16", False, "--fp16", "use --bf16"),
    Unsupported("fp8", None, "--fp8-format", "it needs aligned token counts, which packing doesn't give yet"),
    Unsupported("fp4", None, "--fp4-format", "it needs aligned token counts, which packing doesn't give yet"),
    Unsupported("attention_dropout", 0.0, "--attention-dropout", "packed attention has no dropout"),
    Unsupported("hidden_dropout", 0.0, "--hidden-dropout", "both responses of a pair must see the same model"),
    Unsupported("overlap_param_gather", False, "--overlap-param-gather", _HEAD),
    Unsupported("use_megatron_fsdp", False, "--use-megatron-fsdp", _HEAD),
    Unsupported("use_torch_fsdp2", False, "--use-torch-fsdp2", _HEAD),
    Unsupported("tp_comm_overlap", False, "--tp-comm-overlap", _LENGTHS),
    Unsupported("cuda_graph_impl", "none", "--cuda-graph-impl", _LENGTHS),
    Unsupported("rampup_batch_size", None, "--rampup-batch-size", _SAMPLES),
    Unsupported("step_batch_size_schedule", None, "--step-batch-size-schedule", _SAMPLES),
    Unsupported("decrease_batch_size_if_needed", False, "--decrease-batch-size-if-needed", _SAMPLES),
    Unsupported("full_validation", False, "--full-validation", _VALIDATION),
    Unsupported("multiple_validation_sets", False, "--multiple-validation-sets", _VALIDATION),
    Unsupported("eval_iters", None, "--eval-iters", _VALIDATION),
    Unsupported("perform_rl_step", False, "--perform-rl-step", "this is preference optimisation"),
    Unsupported("sft", False, "--sft", "the SFT term is --amopo-ftx-gamma"),
    Unsupported("iterations_to_skip", [], "--iterations-to-skip", "Megatron would read batches of another kind"),
    Unsupported("yaml_cfg", None, "--yaml-cfg", "give flags"),
    Unsupported("use_checkpoint_args", False, "--use-checkpoint-args", "the shape comes from hf/config.json"),
)


def check_before(args: argparse.Namespace) -> None:
    """What can be told from the flags alone, before any file is read."""
    for unsupported in UNSUPPORTED:
        if getattr(args, unsupported.name, unsupported.off) != unsupported.off:
            raise ConfigError(f"{unsupported.flag} is not supported: {unsupported.why}")
    if args.micro_batch_size is None:
        raise ConfigError("--micro-batch-size is missing: groups (records) per micro-batch, on average")
    lengths = [f for f in ("amopo_epochs", "train_iters", "train_samples") if getattr(args, f) is not None]
    if len(lengths) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in lengths)
        raise ConfigError(f"{flags} both say how long to train; give one")
    if not lengths and not args.skip_train:
        raise ConfigError("nothing says how long to train: give --amopo-epochs or --train-iters (or --skip-train)")
    if args.lr is None and not args.skip_train:
        raise ConfigError("--lr is missing: the peak learning rate (published: 3e-7 with SimPO)")
    if args.amopo_epochs is not None and args.amopo_epochs < 1:
        raise ConfigError(f"--amopo-epochs is {args.amopo_epochs}; expected at least 1")
    if args.amopo_head_chunk_rows < 1:
        raise ConfigError(f"--amopo-head-chunk-rows is {args.amopo_head_chunk_rows}; expected at least 1")
    if args.amopo_ftx_gamma < 0:
        raise ConfigError(f"--amopo-ftx-gamma is {args.amopo_ftx_gamma}; expected 0 or more")
    if args.amopo_beta is not None and args.amopo_beta <= 0:
        raise ConfigError(f"--amopo-beta is {args.amopo_beta}; expected more than 0")

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * pp):
        raise ConfigError(
            f"{args.world_size} rank(s) were started, which is not a multiple of --tensor-model-parallel-size {tp} × "
            f"--pipeline-model-parallel-size {pp} = {tp * pp}"
        )
    dp = args.world_size // (tp * pp)
    for prefix in ("", "eval_"):
        global_batch = getattr(args, f"{prefix}global_batch_size")
        micro_batch = getattr(args, f"{prefix}micro_batch_size") or args.micro_batch_size
        if global_batch is not None and global_batch % (micro_batch * dp):
            flag = prefix.replace("_", "-")
            raise ConfigError(
                f"--{flag}global-batch-size {global_batch} is not a multiple of --{flag}micro-batch-size {micro_batch} "
                f"× {dp} data-parallel rank(s)"
            )


def check_checkpoint(args: argparse.Namespace) -> Path:
    """The folder whose checkpoint the run continues or starts from: ``--load`` if it holds one, else
    ``--pretrained-checkpoint``.
    """
    sources = [
        (flag, Path(value))
        for flag, value in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint))
        if value
    ]
    if not sources:
        raise ConfigError(
            "nothing to start from: give --pretrained-checkpoint DIR (made by tools/convert_checkpoint.py "
            "hf-to-megatron) or --load DIR"
        )
    for flag, folder in sources:
        if (folder / "latest_checkpointed_iteration.txt").is_file():
            if not (folder / "hf" / "config.json").is_file():
                raise ConfigError(
                    f"{flag} {folder} holds no hf/config.json, so the model's shape is unknown: copy the hf folder of "
                    "the checkpoint that it came from, or make it with tools/convert_checkpoint.py hf-to-megatron"
                )
            return folder
    raise ConfigError(
        ", ".join(f"{flag} {folder} holds no checkpoint" for flag, folder in sources)
        + " (no latest_checkpointed_iteration.txt)"
    )


def check_shape(args: argparse.Namespace) -> None:
    """Whether the layout divides the model."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for what, count in (("attention heads", args.num_attention_heads), ("key-value heads", args.num_query_groups)):
        if count % tp:
            raise ConfigError(f"--tensor-model-parallel-size {tp} doesn't divide the model's {count} {what}")
    if args.num_layers < pp:
        raise ConfigError(f"--pipeline-model-parallel-size {pp} is more than the model's {args.num_layers} layers")


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


def check_data(groups: PreparedGroups, max_position_embeddings: int) -> None:
    """Whether there are records, and whether the model takes sequences as long as theirs."""
    if len(groups) == 0:
        raise DataError(f"{groups.folder / groups.split} has no records")
    longest = (groups.lengths[..., 0] + groups.lengths[..., 1:].max(-1)).max(-1)
    index = int(longest.argmax())
    if longest[index] > max_position_embeddings:
        raise DataError(
            f"{groups.folder / groups.split}: record {groups.record_ids[index]} ({groups.source(index)}) has a "
            f"sequence of {longest[index]} tokens; the model takes {max_position_embeddings}. Prepare the data with "
            f"--cutoff-len {max_position_embeddings}"
        )
