"""Which of Megatron's flags a run may set, so that none is ignored or computes something else without a word.

Three rules, in this order: a flag of :data:`UNSUPPORTED` is refused with its reason; of the groups of flags that say
what the model is, only :data:`SUPPORTED_MODEL_FLAGS` may be set, because hf/config.json says the rest; flags of
:data:`FOREIGN_GROUPS` belong to other kinds of training. All other flags (optimizer, schedule, parallelism,
checkpoints, logging) are Megatron's business.
"""

import argparse
import signal
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_amopo.errors import ConfigError

_HEAD = "the fused head takes the output weight, and gives its gradient, in its own way"
_LENGTHS = "packed micro-batches differ in length, and it needs one length"
_SAMPLES = "the number of samples per step must be fixed"
_VALIDATION = "a validation pass is always the whole validation set"
_CONTEXT = "all context-parallel ranks hold equal parts of each micro-batch"
_UNTRIED = "it has not been tried"
_SHAPE = "what the model computes is read from hf/config.json"
_STOPPING = "a run with --save saves and stops by SIGTERM and SIGUSR1 by itself"


@dataclass(frozen=True)
class Unsupported:
    """A flag that must be ``off``, by the ``name`` of its argument."""

    name: str
    off: Any
    flag: str
    why: str


UNSUPPORTED = (
    Unsupported("cp_comm_type", ["a2a"], "--cp-comm-type", "packed attention exchanges heads, which is a2a"),
    Unsupported("hierarchical_context_parallel_sizes", None, "--hierarchical-context-parallel-sizes", _CONTEXT),
    Unsupported("hybrid_context_parallel", False, "--hybrid-context-parallel", _CONTEXT),
    Unsupported("max_seqlen_per_dp_cp_rank", None, "--max-seqlen-per-dp-cp-rank", _CONTEXT),
    Unsupported("expert_model_parallel_size", 1, "--expert-model-parallel-size", "the models here have no experts"),
    Unsupported("num_experts", None, "--num-experts", "the models here have no experts"),
    Unsupported("mtp_num_layers", None, "--mtp-num-layers", "the objective is on the next token alone"),
    Unsupported("fp16", False, "--fp16", "use --bf16"),
    Unsupported("loss_scale", None, "--loss-scale", "bf16 needs none, and gradients would be recorded scaled"),
    Unsupported("fp4", None, "--fp4-format", _UNTRIED),
    Unsupported("te_precision_config_file", None, "--te-precision-config-file", _UNTRIED),
    Unsupported("attention_dropout", 0.0, "--attention-dropout", "packed attention has no dropout"),
    Unsupported("hidden_dropout", 0.0, "--hidden-dropout", "both responses of a pair must see the same model"),
    Unsupported(
        "overlap_param_gather_with_optimizer_step", False, "--overlap-param-gather-with-optimizer-step", _UNTRIED
    ),
    Unsupported("num_distributed_optimizer_instances", 1, "--num-distributed-optimizer-instances", _UNTRIED),
    Unsupported("use_megatron_fsdp", False, "--use-megatron-fsdp", _HEAD),
    Unsupported("use_torch_fsdp2", False, "--use-torch-fsdp2", _HEAD),
    Unsupported("defer_embedding_wgrad_compute", False, "--defer-embedding-wgrad-compute", _HEAD),
    Unsupported("tensor_parallel_num_weight_shards", None, "--tensor-parallel-num-weight-shards", _HEAD),
    Unsupported("tp_comm_overlap", False, "--tp-comm-overlap", _LENGTHS),
    Unsupported("cuda_graph_impl", "none", "--cuda-graph-impl", _LENGTHS),
    Unsupported("enable_cuda_graph", False, "--enable-cuda-graph", _LENGTHS),
    Unsupported("external_cuda_graph", False, "--external-cuda-graph", _LENGTHS),
    Unsupported("optimizer_cuda_graph", False, "--optimizer-cuda-graph", _UNTRIED),
    Unsupported("rampup_batch_size", None, "--rampup-batch-size", _SAMPLES),
    Unsupported("step_batch_size_schedule", None, "--step-batch-size-schedule", _SAMPLES),
    Unsupported("decrease_batch_size_if_needed", False, "--decrease-batch-size-if-needed", _SAMPLES),
    Unsupported("phase_transition_iterations", None, "--phase-transition-iterations", _SAMPLES),
    Unsupported("rerun_mode", "disabled", "--rerun-mode", "a step that runs twice would be recorded twice"),
    Unsupported(
        "exit_signal_handler_for_training",
        False,
        "--exit-signal-handler-for-training",
        f"it saves nothing; {_STOPPING}",
    ),
    Unsupported("exit_signal", signal.SIGTERM, "--exit-signal", _STOPPING),
    Unsupported("non_persistent_ckpt_type", None, "--non-persistent-ckpt-type", _UNTRIED),
    Unsupported("full_validation", False, "--full-validation", _VALIDATION),
    Unsupported("multiple_validation_sets", False, "--multiple-validation-sets", _VALIDATION),
    Unsupported("eval_iters", None, "--eval-iters", _VALIDATION),
    Unsupported("sft", False, "--sft", "the SFT term is --amopo-ftx-gamma"),
    Unsupported("iterations_to_skip", [], "--iterations-to-skip", "Megatron would read batches of another kind"),
    Unsupported("dataloader_type", "external", "--dataloader-type", "micro-batches come from --amopo-data"),
    Unsupported("ckpt_format", "torch_dist", "--ckpt-format", "export and resume read torch_dist"),
    Unsupported("log_throughput", False, "--log-throughput", "its formula doesn't know packed groups; see tokens/s"),
    Unsupported("yaml_cfg", None, "--yaml-cfg", "give flags"),
    Unsupported("spec", None, "--spec", "packed attention needs this project's layers"),
    Unsupported("hybrid_layer_pattern", None, "--hybrid-layer-pattern", _SHAPE),
    Unsupported("hybrid_override_pattern", None, "--hybrid-override-pattern", _SHAPE),
    Unsupported("rope_type", None, "--rope-type", _SHAPE),
    Unsupported("freeze_all_layers", False, "--freeze-all-layers", "nothing would be trained"),
    Unsupported(
        "ddp_average_in_collective", False, "--ddp-average-in-collective", "the mean is over groups, not ranks"
    ),
    Unsupported("use_flash_attn", False, "--use-flash-attn", "see --amopo-attention"),
    Unsupported("tp_comm_overlap_cfg", None, "--tp-comm-overlap-cfg", _UNTRIED),
    Unsupported("reuse_grad_buf_for_mxfp8_param_ag", False, "--reuse-grad-buf-for-mxfp8-param-ag", _UNTRIED),
    Unsupported("fp8_param_gather", False, "--fp8-param-gather", _UNTRIED),
    Unsupported("fake_process_group", False, "--fake-process-group", "nothing would be reduced"),
    Unsupported("use_checkpoint_args", False, "--use-checkpoint-args", "the shape comes from hf/config.json"),
)

#: Titles of the groups of Megatron's parser whose flags say what the model computes.
MODEL_GROUPS = frozenset({"transformer configuration", "network size"})

#: What of those a run may set: how the same model is computed.
SUPPORTED_MODEL_FLAGS = frozenset(
    """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    bf16 calculate_per_token_loss config_logger_dir context_parallel_size
    distribute_saved_activations first_last_layers_bf16 fp8 fp8_amax_compute_algo fp8_amax_history_len fp8_margin
    fp8_recipe fp8_wgrad make_vocab_size_divisible_by
    microbatch_group_size_per_vp_stage num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    overlap_p2p_comm_warmup_flush perform_initialization
    pipeline_model_parallel_size recompute_granularity recompute_method recompute_modules recompute_num_layers
    sequence_parallel tensor_model_parallel_size transformer_impl use_cpu_initialization
    """.split()  # noqa: SIM905
)

FOREIGN_GROUPS = frozenset(
    {
        "biencoder", "data and dataloader", "experimental_attention_variant", "heterogeneous architecture",
        "Logits Distillation", "mla", "moe", "rl", "sft", "tokenizer", "vision",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """One of the parser's flags."""

    name: str
    flag: str
    default: Any
    group: str


def read_flags(parser: argparse.ArgumentParser) -> tuple[Flag, ...]:
    """All flags of a parser, with the defaults that hold when this is called."""
    defaults = vars(parser.parse_args([]))  # of several flags for one name, argparse decides which default holds
    return tuple(
        Flag(action.dest, action.option_strings[0], defaults[action.dest], str(group.title))
        for group in parser._action_groups
        for action in group._group_actions
        if action.dest in defaults
    )


def check_flags(args: argparse.Namespace, flags: Collection[Flag], shape: Collection[str]) -> None:
    """Refuse what isn't supported.

    Args:
        args: parsed, not yet validated.
        flags: of :func:`read_flags`.
        shape: names that hf/config.json sets; whether a given value contradicts it is checked where they are set.

    Raises:
        ConfigError: naming the flag.
    """
    for unsupported in UNSUPPORTED:
        if getattr(args, unsupported.name) != unsupported.off:
            raise ConfigError(f"{unsupported.flag} is not supported: {unsupported.why}")
    for flag in flags:
        if getattr(args, flag.name, flag.default) == flag.default or flag.name in shape:
            continue
        if flag.group in MODEL_GROUPS and flag.name not in SUPPORTED_MODEL_FLAGS:
            raise ConfigError(f"{flag.flag} is not supported: {_SHAPE}")
        if flag.group in FOREIGN_GROUPS:
            raise ConfigError(f"{flag.flag} is not supported: it belongs to another kind of training")
