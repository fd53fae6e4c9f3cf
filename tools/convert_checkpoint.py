#!/usr/bin/env python3
"""Convert between Hugging Face model folders and Megatron checkpoints, and compare the two.

    convert_checkpoint.py hf-to-megatron HF_DIR MEGATRON_DIR
    convert_checkpoint.py megatron-to-hf MEGATRON_DIR HF_DIR
    convert_checkpoint.py verify HF_DIR MEGATRON_DIR [--logits]

Exit codes: 0 done (verify: all equal), 1 verify found differences, 2 an error that the message explains,
130 interrupted: the output is as before, or complete.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_amopo.checkpoint.convert import DTYPES, ORIGINAL, Conversion, hf_to_megatron, megatron_to_hf
from megatron_amopo.checkpoint.logits import TOLERANCE, LogitsComparison, compare_logits
from megatron_amopo.checkpoint.streaming import DEFAULT_WORKERS
from megatron_amopo.checkpoint.verify import Comparison, verify
from megatron_amopo.errors import ConfigError
from tools.command_line import exit_status

_NAMES_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    return exit_status(lambda: options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    to_megatron = commands.add_parser(
        "hf-to-megatron", help="write a Hugging Face folder's weights as a Megatron checkpoint"
    )
    to_megatron.set_defaults(run=_to_megatron)
    to_megatron.add_argument("hf_dir", metavar="HF_DIR", help="folder with config.json and safetensors")
    to_megatron.add_argument(
        "megatron_dir", metavar="MEGATRON_DIR", help="new folder; give it to training as --pretrained-checkpoint"
    )
    to_megatron.add_argument("--force", action="store_true", help="replace a Megatron checkpoint folder that exists")
    _add_pickle(to_megatron)
    _add_workers(to_megatron)

    to_hf = commands.add_parser("megatron-to-hf", help="write a Megatron checkpoint's weights as a Hugging Face folder")
    to_hf.set_defaults(run=_to_hf)
    to_hf.add_argument("megatron_dir", metavar="MEGATRON_DIR", help="folder that training saved to")
    to_hf.add_argument("hf_dir", metavar="HF_DIR", help="new folder")
    _add_iteration(to_hf)
    to_hf.add_argument(
        "--dtype",
        choices=DTYPES,
        default=ORIGINAL,
        help="type of the weights: as in the folder that was converted, as training stored them, or one for all "
        "(default: %(default)s)",
    )
    to_hf.add_argument("--max-shard-size", help="such as 5GB (default: files as in the folder that was converted)")
    to_hf.add_argument("--force", action="store_true", help="replace a Hugging Face model folder that exists")
    _add_workers(to_hf)

    compare = commands.add_parser("verify", help="compare every tensor, bit by bit")
    compare.set_defaults(run=_verify)
    compare.add_argument("hf_dir", metavar="HF_DIR")
    compare.add_argument("megatron_dir", metavar="MEGATRON_DIR")
    _add_iteration(compare)
    _add_pickle(compare)
    _add_workers(compare)
    compare.add_argument(
        "--logits",
        action="store_true",
        help="compare what both compute, too: transformers and Megatron read one text, in float32, which takes some 6 "
        "bytes of memory per parameter",
    )
    compare.add_argument("--text", type=Path, metavar="FILE", help="what they read (default: a short text of our own)")
    compare.add_argument(
        "--logits-tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest difference of logits allowed, over the largest logit (default: %(default)g)",
    )
    return parser


def _add_iteration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iteration", type=int, help="which iteration (default: the newest)")


def _add_pickle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors; no code in it is run",
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=DEFAULT_WORKERS,
        help="threads; each needs up to half a gigabyte (default: %(default)s)",
    )


def _to_megatron(options: argparse.Namespace) -> int:
    _say(
        hf_to_megatron(
            options.hf_dir,
            options.megatron_dir,
            allow_pickle=options.allow_pickle,
            workers=options.workers,
            force=options.force,
            progress=True,
        )
    )
    return 0


def _to_hf(options: argparse.Namespace) -> int:
    _say(
        megatron_to_hf(
            options.megatron_dir,
            options.hf_dir,
            iteration=options.iteration,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            workers=options.workers,
            force=options.force,
            progress=True,
        )
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    text = _read_text(options)
    differ = _compare(
        verify(
            options.hf_dir,
            options.megatron_dir,
            iteration=options.iteration,
            allow_pickle=options.allow_pickle,
            workers=options.workers,
            progress=True,
        )
    )
    if not options.logits:
        return differ
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both compute on the CPU, whatever the machine has
    with warnings.catch_warnings(action="ignore"):  # of what Megatron would like to have installed
        found = compare_logits(options.hf_dir, options.megatron_dir, iteration=options.iteration, text=text)
    return max(differ, _show_logits(found, options.logits_tolerance))


def _read_text(options: argparse.Namespace) -> str | None:
    if options.text is None:
        return None
    if not options.logits:
        raise ConfigError("--text is what --logits reads; give that, too")
    try:
        return options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {options.text}: can't be read: {error}") from error


def _say(conversion: Conversion) -> None:
    for note in conversion.notes:
        print(f"note: {note}")
    for warning in conversion.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    kinds = ", ".join(conversion.dtypes)
    print(
        f"{conversion.output}: {conversion.tensors} tensors, {conversion.parameters:,} parameters, {kinds}, "
        f"{tqdm.format_sizeof(conversion.nbytes, 'B')} in {conversion.seconds:.1f} s"
    )


def _compare(comparisons: Sequence[Comparison]) -> int:
    """Print the comparison, a line for each Megatron parameter, and give the exit code."""
    width = max(len(row.megatron) for row in comparisons)
    print(f"{'Megatron parameter':{width}}  {'HF tensors':>10}  {'differ':>6}  {'largest':>9}  type")
    for row in comparisons:
        kind = row.hf_dtype
        if row.megatron_dtype != row.hf_dtype:
            kind = f"{row.megatron_dtype} in Megatron, compared as {row.hf_dtype}"
        print(
            f"{row.megatron:{width}}  {row.tensors:10}  {len(row.differing):6}  {row.largest_difference:9.2g}  {kind}"
        )
    differing = [name for row in comparisons for name in row.differing]
    for name in differing[:_NAMES_SHOWN]:
        print(f"differs: {name}")
    if len(differing) > _NAMES_SHOWN:
        print(f"differs: {len(differing) - _NAMES_SHOWN} more")
    total = sum(row.tensors for row in comparisons)
    print(f"{total - len(differing)} of {total} tensors equal bit by bit")
    return 1 if differing else 0


def _show_logits(found: LogitsComparison, tolerance: float) -> int:
    """Print what the forward passes gave, and give the exit code."""
    verdict = "equal" if found.within(tolerance) else "DIFFERENT"
    print(f"logits of {found.text}: {found.tokens} tokens × {found.vocab_size:,} rows, float32")
    print(f"  largest logit                       {found.largest_logit:9.3g}")
    print(f"  largest difference                  {found.largest_difference:9.2g}")
    print(f"  the same, of log-probabilities      {found.largest_logp_difference:9.2g} nats")
    print(f"  same most likely token              {found.same_top} of {found.tokens}")
    print(
        f"{verdict}: the largest difference is {found.relative_difference:.1e} of the largest logit, tolerance "
        f"{tolerance:.0e}"
    )
    return 0 if found.within(tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
