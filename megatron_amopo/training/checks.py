"""Refusals: everything that this project doesn't compute correctly, or that can't fit together, said before a GPU minute is spent.

Each check takes plain values and raises :class:`ConfigError` or :class:`DataError` naming the flag, the file or the record.
"""

import argparse
from pathlib import Path

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.errors import ConfigError, DataError

#: Flags that are off in a supported run: (argument name, value when off, flag, why).
_UNSUPPORTED = [
    ("context_parallel_size", 1, "--context-parallel-size", "packed groups aren't split over ranks yet"),
    ("expert_model_parallel_size", 1, "--expert-model-parallel-size", "mixture-of-experts models aren't supported"),
    ("num_experts", None, "--num-experts", "mixture-of-experts models aren't supported"),
    ("mtp_num_layers", None, "--mtp-num-layers", "multi-token prediction isn't supported"),
    ("fp16", False, "--fp16", "use --bf16"),
    ("fp8", None, "--fp8-format", "FP8 needs token counts that are aligned, which packing doesn't do yet"),
    ("fp4", None, "--fp4-format", "FP4 needs token counts that are aligned, which packing doesn't do yet"),
    ("attention_dropout", 0.0, "--attention-dropout", "packed attention has no dropout"),
    ("hidden_dropout", 0.0, "--hidden-dropout", "both responses of a pair must see the same model"),
    ("overlap_param_gather", False, "--overlap-param-gather", "the fused head reads the output weight outside the layer that gathers it"),
    ("use_megatron_fsdp", False, "--use-megatron-fsdp", "the fused head reads the output weight outside the layer that gathers it"),
    ("use_torch_fsdp2", False, "--use-torch-fsdp2", "the fused head reads the output weight outside the layer that gathers it"),
    ("tp_comm_overlap", False, "--tp-comm-overlap", "its buffers have one fixed length, and packed micro-batches differ"),
    ("cuda_graph_impl", "none", "--cuda-graph-impl", "graphs have one fixed length, and packed micro-batches differ"),
    ("full_validation", False, "--full-validation", "a validation pass is always the whole validation set"),
    ("multiple_validation_sets", False, "--multiple-validation-sets", "there is one validation set"),
    ("perform_rl_step", False, "--perform-rl-step", "this is preference optimisation"),
    ("sft", False, "--sft", "the SFT term is --amopo-ftx-gamma"),
    ("iterations_to_skip", [], "--iterations-to-skip", "Megatron's skipping reads batches of another kind"),
    ("rampup_batch_size", None, "--rampup-batch-size", "the number of samples per step must be fixed"),
    ("step_batch_size_schedule", None, "--step-batch-size-schedule", "the number of samples per step must be fixed"),
    ("decrease_batch_size_if_needed", False, "--decrease-batch-size-if-needed", "the number of samples per step must be fixed"),
    ("yaml_cfg", None, "--yaml-cfg", "give flags"),
    ("use_checkpoint_args", False, "--use-checkpoint-args", "the model's shape is read from the checkpoint's hf/config.json"),
    ("eval_iters", None, "--eval-iters", "a validation pass is always the whole validation set"),
]  # fmt: skip


def check_before(args: argparse.Namespace) -> None:
    """What can be told from the flags alone, before any file is read."""
    for name, off, flag, why in _UNSUPPORTED:
        value = getattr(args, name, off)
        if value != off and not (name == "cuda_graph_impl" and value in (None, "none")):
            raise ConfigError(f"{flag} is not supported: {why}")
    if args.micro_batch_size is None:
        raise ConfigError("--micro-batch-size is missing: groups (records) per micro-batch, on average")
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
                f"--{flag}global-batch-size {global_batch} is not a multiple of --{flag}micro-batch-size {micro_batch} × {dp} data-parallel rank(s)"
            )


def check_checkpoint(args: argparse.Namespace) -> Path:
    """The folder whose checkpoint the run continues or starts from: ``--load`` if it holds one, else ``--pretrained-checkpoint``."""
    sources = [(flag, Path(value)) for flag, value in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)) if value]
    if not sources:
        raise ConfigError(
            "nothing to start from: give --pretrained-checkpoint DIR (made by tools/convert_checkpoint.py hf-to-megatron) or --load DIR"
        )
    for flag, folder in sources:
        if (folder / "latest_checkpointed_iteration.txt").is_file():
            if not (folder / "hf" / "config.json").is_file():
                raise ConfigError(
                    f"{flag} {folder} holds no hf/config.json, so the model's shape is unknown: copy the hf folder of the checkpoint that "
                    "it was trained from, or make the checkpoint with tools/convert_checkpoint.py hf-to-megatron"
                )
            return folder
    raise ConfigError(" and ".join(f"{flag} {folder}" for flag, folder in sources) + " hold" + ("s" if len(sources) == 1 else "") + " no checkpoint (no latest_checkpointed_iteration.txt)")


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
            f"{data} was prepared with tokenizer '{manifest.tokenizer.name}', which has token ids up to {manifest.tokenizer.vocab_size - 1}; "
            f"the model in {hf_folder} has {vocab_size} rows. Prepare the data with the model's tokenizer (--tokenizer)"
        )
    from megatron_amopo.data.tokenize import folder_vocabulary

    # Ids and texts must agree; the chat template may differ, as a base model's data is prepared with an instruct template.
    if folder_vocabulary(hf_folder) not in (None, manifest.tokenizer.vocab_sha256):
        raise DataError(
            f"{data} was prepared with another tokenizer ('{manifest.tokenizer.name}') than the one in {hf_folder}: token ids would mean "
            "other words. Prepare the data with the model's tokenizer (--tokenizer)"
        )


def check_data(groups: PreparedGroups, max_position_embeddings: int) -> None:
    """Whether the model takes sequences this long, and whether there are any."""
    if len(groups) == 0:
        raise DataError(f"{groups.folder} has no training records")
    longest = (groups.lengths[..., 0] + groups.lengths[..., 1:].max(-1)).max(-1)
    index = int(longest.argmax())
    if longest[index] > max_position_embeddings:
        raise DataError(
            f"{groups.folder}: record {groups.record_ids[index]} ({groups.source(index)}) has a sequence of {longest[index]} tokens; the "
            f"model takes {max_position_embeddings}. Prepare the data with --cutoff-len {max_position_embeddings}"
        )
