#!/usr/bin/env python3
"""Convert between Hugging Face model folders and Megatron checkpoints, and compare the two.

    convert_checkpoint.py hf-to-megatron HF_DIR MEGATRON_DIR
    convert_checkpoint.py megatron-to-hf MEGATRON_DIR HF_DIR
    convert_checkpoint.py verify HF_DIR MEGATRON_DIR

Exit codes: 0 done (verify: all equal), 1 verify found differences, 2 an error that the message explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_amopo.checkpoint.convert import DTYPES, Comparison, Conversion, hf_to_megatron, megatron_to_hf, verify
from megatron_amopo.errors import AmopoError

_NAMES_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "hf-to-megatron":
            _say(hf_to_megatron(options.hf_dir, options.megatron_dir, force=options.force, progress=True))
            return 0
        if options.command == "megatron-to-hf":
            _say(
                megatron_to_hf(
                    options.megatron_dir,
                    options.hf_dir,
                    iteration=options.iteration,
                    dtype=options.dtype,
                    max_shard_size=options.max_shard_size,
                    force=options.force,
                    progress=True,
                )
            )
            return 0
        return _compare(verify(options.hf_dir, options.megatron_dir, iteration=options.iteration, progress=True))
    except AmopoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    to_megatron = commands.add_parser(
        "hf-to-megatron", help="write a Hugging Face folder's weights as a Megatron checkpoint"
    )
    to_megatron.add_argument("hf_dir", metavar="HF_DIR", help="folder with config.json and safetensors")
    to_megatron.add_argument("megatron_dir", metavar="MEGATRON_DIR", help="new folder; give it to training as --load")
    to_megatron.add_argument("--force", action="store_true", help="replace a Megatron checkpoint folder that exists")

    to_hf = commands.add_parser("megatron-to-hf", help="write a Megatron checkpoint's weights as a Hugging Face folder")
    to_hf.add_argument("megatron_dir", metavar="MEGATRON_DIR", help="folder that training saved to")
    to_hf.add_argument("hf_dir", metavar="HF_DIR", help="new folder")
    to_hf.add_argument("--iteration", type=int, help="which iteration (default: the newest)")
    to_hf.add_argument("--dtype", choices=list(DTYPES), help="type of the weights (default: as they are stored)")
    to_hf.add_argument("--max-shard-size", help="such as 5GB (default: files as in the folder that was converted)")
    to_hf.add_argument("--force", action="store_true", help="replace a Hugging Face model folder that exists")

    compare = commands.add_parser("verify", help="compare every tensor, bit by bit")
    compare.add_argument("hf_dir", metavar="HF_DIR")
    compare.add_argument("megatron_dir", metavar="MEGATRON_DIR")
    compare.add_argument("--iteration", type=int, help="which iteration (default: the newest)")
    return parser


def _say(conversion: Conversion) -> None:
    for note in conversion.notes:
        print(f"note: {note}")
    kinds = ", ".join(conversion.dtypes)
    print(f"{conversion.output}: {conversion.tensors} tensors, {conversion.parameters:,} parameters, {kinds}")


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


if __name__ == "__main__":
    sys.exit(main())
