#!/usr/bin/env python3
"""Layout, memory and step time of a run before a GPU is asked for: a thin command line over `megatron_amopo.planning`.

tools/plan_training.py Qwen2.5-32B-Instruct --data prepared --gpu h100 --gpus 16 --global-batch-size 64
tools/plan_training.py Qwen2.5-32B-Instruct --dimensions 3 --prompt-tokens 400 --response-tokens 300 --gpus 16
tools/plan_training.py Qwen2.5-32B-Instruct --data prepared --scaling --plot growth.png

All figures are estimates. Exit status: 0, 1 if no layout can be run, 2 for errors in what was asked.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_amopo.data.groups import SHARINGS
from megatron_amopo.errors import ConfigError
from megatron_amopo.planning.hardware import GPUS, gpu
from megatron_amopo.planning.layout import PRECISIONS, RECOMPUTES, Options
from megatron_amopo.planning.work import Records, stated_records
from tools.command_line import exit_status

if TYPE_CHECKING:
    from megatron_amopo.planning.planner import Question

_LOG_WIDTH = 120
_GPUS = 8
_STATED = ("dimensions", "prompt_tokens", "response_tokens", "shared_tokens", "longest_response_tokens")


def build_parser() -> argparse.ArgumentParser:
    """The flags; those that training has, too, mean the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder, or its config.json")
    data = parser.add_argument_group("data, prepared or in numbers")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder of tools/prepare_preferences.py")
    data.add_argument("--dimensions", type=int, metavar="D", help="dimensions, the general one included")
    data.add_argument("--prompt-tokens", type=int, metavar="N", help="tokens of a prompt with its dimension's text")
    data.add_argument("--response-tokens", type=int, metavar="N", help="mean tokens of a response")
    data.add_argument("--shared-tokens", type=int, metavar="N", help="start that all prompts share (default: 0)")
    data.add_argument("--longest-response-tokens", type=int, metavar="N", help="(default: as the mean)")
    data.add_argument("--share-prefixes", choices=SHARINGS, default="tree", help="(default: %(default)s)")
    machine = parser.add_argument_group("GPUs")
    machine.add_argument("--gpu", default="h100", metavar="|".join(GPUS), help="(default: %(default)s)")
    machine.add_argument("--gpus", type=int, metavar="N", help=f"all of the run (default: {_GPUS})")
    machine.add_argument("--headroom", type=float, default=0.05, help="memory to leave free (default: %(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--global-batch-size", type=int, default=64, metavar="N", help="records (default: %(default)s)")
    run.add_argument("--micro-batch-size", type=int, default=1, metavar="N", help="records (default: %(default)s)")
    run.add_argument("--precision", choices=PRECISIONS, default="bf16", help="(default: %(default)s)")
    run.add_argument("--attention", choices=("varlen", "fa3"), default="varlen", help="(default: %(default)s)")
    run.add_argument("--no-distributed-optimizer", action="store_true", help="every rank has all of it")
    run.add_argument("--precision-aware-optimizer", action="store_true", help="its moments in bf16")
    run.add_argument("--optimizer-cpu-offload", action="store_true", help="the optimizer on the host")
    run.add_argument("--grad-reduce-in-bf16", action="store_true", help="gradients in bf16")
    layout = parser.add_argument_group("parts of the layout that are decided already")
    layout.add_argument("--tensor-model-parallel-size", "--tp", type=int, metavar="N")
    layout.add_argument("--pipeline-model-parallel-size", "--pp", type=int, metavar="N")
    layout.add_argument("--context-parallel-size", "--cp", type=int, metavar="N")
    layout.add_argument("--model-chunks", type=int, metavar="N", help="virtual pipeline stages of a rank")
    layout.add_argument("--recompute", choices=RECOMPUTES)
    layout.add_argument("--no-sequence-parallel", action="store_true")
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=5, metavar="N", help="layouts to show (default: %(default)s)")
    output.add_argument("--scaling", action="store_true", help="how it grows from 16 to 1,024 GPUs")
    output.add_argument("--plot", type=Path, metavar="FILE", help="with --scaling: a PNG of it")
    output.add_argument("--json", type=Path, metavar="FILE", help="write all of it, in numbers")
    output.add_argument("--save", default="run", metavar="DIR", help="of the launch command (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 1 if no layout can be run, 2 for errors meant for people."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.plot is not None and not options.scaling:
        parser.error("--plot is of --scaling")
    if options.scaling and options.gpus is not None:
        parser.error("--scaling is over numbers of GPUs of its own; leave out --gpus")
    options.gpus = _GPUS if options.gpus is None else options.gpus
    return exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_amopo.planning.command import Places
    from megatron_amopo.planning.planner import plan
    from megatron_amopo.planning.report import growth_json, plan_json, print_growth, print_plan

    question = _question(options)
    places = Places(model=str(options.model), data=str(options.data or "DATA"), save=options.save)
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    found: dict[str, Any]
    if options.scaling:
        from megatron_amopo.planning.scaling import grow, plot

        growth = grow(question)
        print_growth(console, growth)
        if options.plot is not None:
            name = options.model.parent.name if options.model.suffix == ".json" else options.model.name
            figure = plot(growth, f"{name}, {question.gpu.name}, {question.options.precision}: estimates")
            partial = options.plot.with_name(f".{options.plot.name}.partial")
            figure.savefig(partial, format="png", dpi=150)
            partial.replace(options.plot)
        found, runs = growth_json(growth), any(row.best for row in growth.fixed + growth.growing)
    else:
        result = plan(question)
        print_plan(console, question, result, places, most=options.top)
        found, runs = plan_json(question, result, places, most=options.top), bool(result.fitting)
    if options.json is not None:
        from megatron_amopo.report.files import write_text

        write_text(options.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return 0 if runs else 1


def _question(options: argparse.Namespace) -> "Question":
    from megatron_amopo.checkpoint.families import longest_sequence, megatron_arguments
    from megatron_amopo.checkpoint.hf import read_config, read_json
    from megatron_amopo.planning.planner import Fixed, Question
    from megatron_amopo.planning.sizes import ModelSizes

    for flag in ("gpus", "global_batch_size", "micro_batch_size", "top"):
        if getattr(options, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; expected 1 or more")
    for flag in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "model_chunks"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}; expected 1 or more")
    if not 0 <= options.headroom < 1:
        raise ConfigError(f"--headroom is {options.headroom}; expected a share from 0 to less than 1")
    config = read_json(options.model) if options.model.is_file() else read_config(options.model)
    records, longest = _records(options)
    return Question(
        sizes=ModelSizes.of(megatron_arguments(config)),
        limit=longest_sequence(config),
        records=records,
        longest_sequence=longest,
        gpu=gpu(options.gpu),
        gpus=options.gpus,
        options=Options(
            global_batch=options.global_batch_size,
            micro_batch=options.micro_batch_size,
            precision=options.precision,
            distributed_optimizer=not options.no_distributed_optimizer,
            precision_aware_optimizer=options.precision_aware_optimizer,
            optimizer_cpu_offload=options.optimizer_cpu_offload,
            bf16_gradients=options.grad_reduce_in_bf16,
            attention=options.attention,
            sharing=options.share_prefixes,
        ),
        fixed=Fixed(
            tp=options.tensor_model_parallel_size,
            pp=options.pipeline_model_parallel_size,
            cp=options.context_parallel_size,
            chunks=options.model_chunks,
            recompute=options.recompute,
            sequence_parallel=not options.no_sequence_parallel,
        ),
        headroom=options.headroom,
    )


def _records(options: argparse.Namespace) -> tuple[Records, int]:
    """The records, and the tokens of their longest sequence."""
    stated = {name: getattr(options, name) for name in _STATED if getattr(options, name) is not None}
    if options.data is not None:
        if stated:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in stated)
            raise ConfigError(f"--data and {flags} both say what the data is; give one")
        return _prepared(options)
    missing = [name for name in ("dimensions", "prompt_tokens", "response_tokens") if name not in stated]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{flags} missing: give --data, or the data in numbers")
    longest = options.prompt_tokens + (options.longest_response_tokens or options.response_tokens)
    return stated_records(**stated, sharing=options.share_prefixes), longest


def _prepared(options: argparse.Namespace) -> tuple[Records, int]:
    from megatron_amopo.data.dataset import PreparedGroups

    groups = PreparedGroups.open(options.data)
    if not len(groups):
        raise ConfigError(f"--data {options.data} has no training records")
    longest = int((groups.lengths[..., 0] + groups.lengths[..., 1:].max(-1)).max())
    tokens = groups.packed_tokens(options.share_prefixes)
    description = (
        f"{options.data}: {len(groups):,} records of {len(groups.dimensions)} dimensions, {tokens.mean():,.0f} packed "
        f"tokens on average, {tokens.max():,} at most"
    )
    return Records.of(groups.lengths, groups.shared, options.share_prefixes, description), longest


if __name__ == "__main__":
    sys.exit(main())
