"""Our flags beside Megatron's: read once, checked before anything is built, turned into one frozen object.

Takes the command line, the prepared data's manifest and the ``hf/`` folder beside the checkpoint; gives Megatron's
validated argument namespace and a :class:`RunConfig`. The model's shape comes from ``config.json``: flags that
contradict it are refused, as is everything that this project has not been shown to compute correctly.
"""

import argparse
import hashlib
import json
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron.training.arguments import parse_args, validate_args

from megatron_amopo import device
from megatron_amopo.checkpoint.families import longest_sequence, megatron_arguments, rope_scaling
from megatron_amopo.checkpoint.hf import read_config
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.groups import GENERAL, SHARINGS, Sharing
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.planning import GlobalBatches
from megatron_amopo.data.reference import ReferenceLogps
from megatron_amopo.errors import ConfigError
from megatron_amopo.model.attention import AUTO, BACKENDS
from megatron_amopo.model.builder import ModelShape
from megatron_amopo.model.logprobs import DEFAULT_BUFFER_BYTES
from megatron_amopo.model.rotary import Llama3Scaling
from megatron_amopo.objectives import ObjectiveConfig
from megatron_amopo.training.checks import (
    check_attention,
    check_before,
    check_checkpoint,
    check_data,
    check_outputs,
    check_room,
    check_schedule,
    check_shape,
    check_tokenizer,
    schedule_of,
)
from megatron_amopo.training.fp8 import check_fp8, precision_of
from megatron_amopo.training.hugging_face import HfStart, add_hugging_face_arguments, check_export, find_hf_start
from megatron_amopo.training.machine import check_machine
from megatron_amopo.training.objective_arguments import add_objective_arguments, read_objective
from megatron_amopo.training.observer_arguments import ObserverConfig, add_observer_arguments, read_observers
from megatron_amopo.training.reference_cache import add_reference_arguments, check_reference_flags
from megatron_amopo.training.supported_flags import Flag, check_flags, read_flags
from megatron_amopo.training.survival_arguments import (
    SurvivalConfig,
    add_survival_arguments,
    choose_async_writer,
    prepare_async_save,
    read_survival,
)

#: Where this project departs from Megatron's own defaults, by the names of its argument namespace.
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "calculate_per_token_loss": True,  # the "tokens" are groups: DESIGN §3.5
    "dataloader_type": "external",
    "cp_comm_type": ["a2a"],  # what packed attention does, whatever Megatron's own attention would
    "rerun_mode": "disabled",  # its replay buffer would keep every micro-batch of a step
    "dist_ckpt_optim_fully_reshardable": True,  # resume under another layout
    "auto_detect_ckpt_format": True,
    "eval_iters": None,  # a validation pass is the whole validation set
    "eval_interval": None,
    "save_interval": None,
    "log_interval": 10,
    "tokenizer_type": "NullTokenizer",
    "no_load_rng": False,
}

#: What config.json says that no log-probability depends on.
_NOT_COMPUTED_WITH = ("init_method_std", "max_position_embeddings")

#: An interval, in steps, that no run reaches.
NEVER = 10**9


@dataclass(frozen=True)
class RunConfig:
    """What our part of a run is told; everything else stays in Megatron's arguments."""

    data: Path
    dimensions: tuple[str, ...]
    objective: ObjectiveConfig
    noise_seed: int
    num_epochs: int | None  # None: as many as --train-iters take
    global_batch_size: int
    num_samples: int | None  # records in all epochs
    sharing: Sharing
    max_tokens: int | None  # of a micro-batch; None where --micro-batch-size was given
    eval_at_start: bool
    dump_logps: Path | None
    observers: ObserverConfig
    survival: SurvivalConfig
    attention: str
    head_buffer_mib: int
    vocab_size: int  # without padding
    shape: ModelShape
    hf_start: HfStart | None  # None: from a Megatron checkpoint
    hf_folder: Path  # config and tokenizer, beside the checkpoint
    export_hf: Path | None
    data_sha256: str
    model_config_sha256: str  # of what config.json says of the model, beside its weights
    precision: str  # that the model computes in: float32, bfloat16 or FP8 by its recipe (fp8.py)
    reference_cache: Path | None
    reference: ReferenceLogps | None = (
        None  # that a resumed run began with; a new run finds its own when it has weights
    )


def add_amopo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--amopo-…`` flags to Megatron's parser and set :data:`DEFAULTS`."""
    group = parser.add_argument_group("AMoPO", "multi-objective preference optimisation (arXiv 2506.07165)")
    add = group.add_argument
    add("--amopo-data", type=Path, metavar="DIR", help="prepared data of tools/prepare_preferences.py (required)")
    add("--amopo-dimensions", metavar="A,B,…", help="dimensions to train on, e.g. general,correctness (default: all)")
    add_objective_arguments(group)
    add_reference_arguments(group)
    add_observer_arguments(group)
    add_survival_arguments(group)
    add(
        "--amopo-epochs", type=int, help="passes over the training records; instead of --train-iters or --train-samples"
    )
    add("--amopo-seed", type=int, help="of record order and weight noise (default: --seed)")
    add(
        "--amopo-max-tokens-per-micro-batch",
        type=int,
        metavar="N",
        help="as many records in a micro-batch as keep to N tokens (before padding) in every step, instead of "
        "--micro-batch-size",
    )
    add(
        "--amopo-share-prefixes",
        choices=list(SHARINGS),
        default="tree",
        help="what is computed once: nothing, a prompt for its two responses, or also the start that all prompts of a "
        "record share (default: %(default)s)",
    )
    add("--amopo-eval-at-start", action="store_true", help="evaluate before the first step, too")
    add(
        "--amopo-dump-logps",
        type=Path,
        metavar="FILE",
        help="after an evaluation, write each validation record's log-probabilities (JSON lines)",
    )
    add(
        "--amopo-attention",
        choices=[AUTO, *BACKENDS],
        default=AUTO,
        help="what computes attention: one scaled_dot_product_attention per branch, torch's varlen_attn or "
        "FlashAttention-3; auto takes the last of these that runs here (default: %(default)s)",
    )
    add(
        "--amopo-head-buffer-mib",
        type=int,
        default=DEFAULT_BUFFER_BYTES // 2**20,
        help="working memory for logits, which are made a block at a time (default: %(default)s MiB)",
    )
    add_hugging_face_arguments(group)
    parser.set_defaults(**DEFAULTS, **device.default_arguments())
    return parser


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """A line in the place of argparse's usage: Megatron's is hundreds of lines long, and every rank would print it."""
    known = list(parser._option_string_actions)
    unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    if message.startswith("unrecognized arguments"):
        meant = dict.fromkeys(close for word in unknown for close in get_close_matches(word, known, n=1))
        message += f"; did you mean {', '.join(meant)}?" if meant else ""
    raise ConfigError(f"{message} (--help lists the flags)")


def parse_arguments() -> tuple[argparse.Namespace, RunConfig]:
    """Megatron's validated arguments and our configuration.

    Raises:
        AmopoError: naming the flag, file or combination that can't be run.
    """
    flags: list[Flag] = []

    def extra_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_amopo_arguments(parser)
        flags.extend(read_flags(parser))
        parser.error = partial(_refuse, parser)  # type: ignore[method-assign]
        if any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv[1:]):
            # Megatron would put the file's fields in the place of all flags, ours among them.
            raise ConfigError("--yaml-cfg is not supported: give flags")
        return parser

    args = parse_args(extra_arguments)
    check_before(args)
    hf_start = find_hf_start(args)
    if hf_start is None:
        checkpoint = check_checkpoint(args)
        hf_folder = checkpoint / "hf"
    else:  # all else is checked before the weights are imported
        checkpoint = hf_folder = hf_start.source
        args.pretrained_checkpoint = str(hf_start.entry)
    hf_config = read_config(hf_folder)
    shape = megatron_arguments(hf_config)
    check_flags(args, flags, shape)
    _set_shape(args, shape, {flag.name: flag.default for flag in flags}, hf_folder)
    check_shape(args)
    check_fp8(args)
    check_machine(args)
    check_attention(args)
    check_outputs(args, checkpoint)
    check_room(args, hf_config)
    groups = PreparedGroups.open(args.amopo_data, "train", _dimension_names(args))
    scored = [name for name in groups.manifest.dimensions if name != GENERAL]
    objective = read_objective(args, groups.dimensions, scored, groups.manifest.rewards)
    check_reference_flags(args, objective)
    validation = open_validation(args.amopo_data, groups.dimensions)
    if args.amopo_dump_logps is not None and validation is None:
        raise ConfigError("--amopo-dump-logps is written at evaluation, and the data has no validation part")
    check_tokenizer(groups.manifest, args.amopo_data, hf_folder, args.vocab_size)
    limit = longest_sequence(hf_config)
    check_data(groups, limit)
    if validation is not None:
        check_data(validation, limit)

    data_parallel_size = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    )
    num_samples = _set_lengths(args, groups, data_parallel_size)
    observers = read_observers(args, groups.dimensions, scored, has_validation=validation is not None)
    if args.amopo_max_tokens_per_micro_batch is not None:
        _set_micro_batch_sizes(args, groups, validation, num_samples, data_parallel_size)
    check_schedule(args, data_parallel_size, has_validation=validation is not None)
    check_export(args)
    prepare_async_save(args)
    try:
        validate_args(args)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        # Some of its assertions say nothing; then the line that failed has to do.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"Megatron refuses these flags: {reason}") from error
    choose_async_writer(args)
    # After validation, which resets the first; the second is what the first asks of a configuration check.
    args.variable_seq_lengths = True
    args.moe_token_dispatcher_type = "alltoall"
    config = RunConfig(
        data=args.amopo_data,
        dimensions=groups.dimensions,
        objective=objective,
        noise_seed=_seed(args),
        num_epochs=args.amopo_epochs,
        global_batch_size=args.global_batch_size,
        num_samples=num_samples,
        sharing=args.amopo_share_prefixes,
        max_tokens=args.amopo_max_tokens_per_micro_batch,
        eval_at_start=args.amopo_eval_at_start,
        dump_logps=args.amopo_dump_logps,
        observers=observers,
        survival=read_survival(args),
        attention=args.amopo_attention,
        head_buffer_mib=args.amopo_head_buffer_mib,
        vocab_size=args.vocab_size,
        shape=ModelShape.of(shape, rope_scaling(hf_config), padded_vocab_size=args.padded_vocab_size),
        hf_start=hf_start,
        hf_folder=hf_folder if hf_start is None else hf_start.entry / "hf",
        export_hf=args.amopo_export_hf,
        data_sha256=groups.manifest.data_sha256,
        model_config_sha256=_sha256_of_config(shape, rope_scaling(hf_config)),
        precision=precision_of(args),
        reference_cache=args.amopo_reference_cache,
    )
    return args, config


def _sha256_of_config(shape: Mapping[str, Any], scaling: Llama3Scaling | None) -> str:
    computed = {name: value for name, value in shape.items() if name not in _NOT_COMPUTED_WITH}
    values = (computed, scaling)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=asdict).encode()).hexdigest()


def _seed(args: argparse.Namespace) -> int:
    return args.seed if args.amopo_seed is None else args.amopo_seed


def _dimension_names(args: argparse.Namespace) -> list[str] | None:
    if args.amopo_dimensions is None:
        return None
    return [name.strip() for name in args.amopo_dimensions.split(",") if name.strip()]


def _set_shape(
    args: argparse.Namespace, shape: dict[str, Any], parser_defaults: dict[str, Any], hf_folder: Path
) -> None:
    """Fill in the model's shape; a flag that was given and says something else is refused."""
    for name, value in shape.items():
        given = getattr(args, name, None)
        if given not in (None, parser_defaults.get(name), value):
            flag = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{flag} {given} contradicts {hf_folder / 'config.json'}, which says {value}; leave the flag out"
            )
        setattr(args, name, value)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = math.ceil(args.vocab_size / multiple) * multiple


def _set_lengths(args: argparse.Namespace, groups: PreparedGroups, data_parallel_size: int) -> int | None:
    """Fill in what follows from the data: sequence length, iterations from epochs, iterations of a validation pass."""
    # Packed micro-batches have their own lengths; Megatron reads this one for its throughput estimate and checks.
    longest = int((groups.lengths[..., 0] + groups.lengths[..., 1:].max(-1)).max())
    # Under context parallelism it must be a multiple of this; rounded down, as it must not pass the model's positions.
    multiple = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    args.seq_length = max(longest // multiple, 1) * multiple
    args.global_batch_size = args.global_batch_size or args.micro_batch_size * data_parallel_size

    num_samples = None
    if args.amopo_epochs is not None:
        num_samples = args.amopo_epochs * len(groups)
        args.train_iters = math.ceil(num_samples / args.global_batch_size)
    elif args.skip_train:
        args.train_iters = args.train_iters or 1  # Megatron multiplies with it even where nothing is trained

    eval_batch = args.eval_global_batch_size or args.global_batch_size
    validation_records = groups.manifest.records.get("validation", 0)
    args.eval_iters = math.ceil(validation_records / eval_batch)
    # Megatron divides by both. Without an interval it still evaluates and saves at the end.
    args.eval_interval = args.eval_interval or NEVER
    args.save_interval = args.save_interval or (NEVER if args.save else None)
    return num_samples


def _set_micro_batch_sizes(
    args: argparse.Namespace,
    groups: PreparedGroups,
    validation: PreparedGroups | None,
    num_samples: int | None,
    dp_size: int,
) -> None:
    """Fill in the micro-batch sizes that keep to --amopo-max-tokens-per-micro-batch in every step.

    Megatron wants one number of micro-batches for all steps, so the step with the longest records decides.
    """

    def within(groups: PreparedGroups, num_samples: int, global_batch_size: int, shuffle: bool) -> int:
        order = SampleOrder(len(groups), _seed(args), shuffle)
        return micro_batch_size_within_budget(args, groups, order, num_samples, global_batch_size, dp_size)

    if num_samples is None:
        num_samples = args.train_samples or args.train_iters * args.global_batch_size
    args.micro_batch_size = 1 if args.skip_train else within(groups, num_samples, args.global_batch_size, True)
    args.eval_micro_batch_size = args.micro_batch_size
    if validation is not None:
        batch = args.eval_global_batch_size or args.global_batch_size
        args.eval_micro_batch_size = within(validation, len(validation), batch, False)


def micro_batch_size_within_budget(
    args: argparse.Namespace,
    groups: PreparedGroups,
    order: SampleOrder,
    num_samples: int,
    global_batch_size: int,
    dp_size: int,
) -> int:
    """The most records per micro-batch with which every step keeps to --amopo-max-tokens-per-micro-batch."""
    tokens = groups.packed_tokens(args.amopo_share_prefixes)
    batches = GlobalBatches(tokens, order, num_samples, global_batch_size, dp_size)
    return batches.micro_batch_size_within(args.amopo_max_tokens_per_micro_batch, schedule_of(args))


def open_validation(data: Path, dimensions: Sequence[str]) -> PreparedGroups | None:
    """The validation records, None where the data was prepared without."""
    if not Manifest.load(data).records.get("validation"):
        return None
    return PreparedGroups.open(data, "validation", dimensions)
