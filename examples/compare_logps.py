"""Check an exported model: do transformers and Megatron give the same response log-probabilities?

Training writes what Megatron's model says of the validation records (``--amopo-dump-logps``): tensor- or
pipeline-parallel, prompts shared, sequences packed. This loads the exported folder in transformers and computes the
same numbers the plainest way: one sequence per row, no sharing, log-softmax over the whole vocabulary.

Takes the model folder, the prepared data and the written file; prints the largest difference and exits with 1 where it
is above the tolerance.

    python examples/compare_logps.py --model runs/demo/aligned --data runs/demo/prepared --logps runs/demo/logps.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_amopo.data.dataset import PreparedGroups

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Response:
    """One response under one prompt, and the sum of its token log-probabilities that Megatron gave, in nats."""

    where: str  # for messages: record, dimension, side
    prompt: np.ndarray
    response: np.ndarray
    megatron: float


def read_responses(groups: PreparedGroups, logps: Path) -> Iterator[Response]:
    """The responses of a file written by ``--amopo-dump-logps``, with their tokens from the prepared data.

    Raises:
        ValueError: a line names a record or length that the data doesn't have.
    """
    index_of = {int(record): index for index, record in enumerate(groups.record_ids)}
    with logps.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            row = json.loads(line)
            if row["record_id"] not in index_of or row["dimension"] not in groups.dimensions:
                raise ValueError(f"{logps}:{number}: {groups.folder} has no such record and dimension")
            group = groups[index_of[row["record_id"]]]
            dimension = groups.dimensions.index(row["dimension"])
            for side, tokens in zip(SIDES, (group.chosen[dimension], group.rejected[dimension]), strict=True):
                if len(tokens) != row[f"{side}_length"]:
                    raise ValueError(f"{logps}:{number}: {side} has {len(tokens)} tokens in {groups.folder}")
                where = f"record {row['record_id']}, {row['dimension']}, {side}"
                yield Response(where, group.prompts[dimension], tokens, row[side])


def sum_logps(model: torch.nn.Module, responses: Sequence[Response]) -> torch.Tensor:
    """Σ log p of each response's tokens in nats, [B]. Rows are padded on the right: causal attention never sees it."""
    lengths = [len(one.prompt) + len(one.response) for one in responses]
    ids = torch.zeros(len(responses), max(lengths), dtype=torch.long)
    for row, (one, length) in enumerate(zip(responses, lengths, strict=True)):
        ids[row, :length] = torch.from_numpy(np.concatenate([one.prompt, one.response]).astype(np.int64))
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    token_logps = logps.gather(2, ids[:, 1:, None])[..., 0]
    return torch.stack(
        [
            token_logps[row, len(one.prompt) - 1 : length - 1].double().sum()
            for row, (one, length) in enumerate(zip(responses, lengths, strict=True))
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: compare, print, give the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data with a validation part")
    parser.add_argument("--logps", type=Path, required=True, metavar="FILE", help="written by --amopo-dump-logps")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest difference allowed, nats per token (default: %(default)s)",
    )
    parser.add_argument("--records", type=int, metavar="N", help="compare the first N records (default: all)")
    parser.add_argument("--batch", type=int, default=64, help="sequences per forward pass (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    groups = PreparedGroups.open(options.data, "validation")
    responses = list(read_responses(groups, options.logps))
    if options.records is not None:
        responses = responses[: options.records * len(groups.dimensions) * len(SIDES)]
    if not responses:
        parser.error(f"--logps {options.logps}: no lines")
    model = AutoModelForCausalLM.from_pretrained(str(options.model)).float().eval()
    worst, worst_at, count = 0.0, "", 0
    for batch in batched(responses, options.batch):
        for one, ours in zip(batch, sum_logps(model, batch).tolist(), strict=True):
            difference = abs(ours - one.megatron) / len(one.response)
            count += 1
            if math.isnan(difference) or difference > worst:  # nothing is worse than a NaN: once there, it stays
                worst, worst_at = difference, one.where
        if count % (8 * options.batch) < options.batch:
            print(f"step {count}/{len(responses)}", flush=True)
    equal = worst <= options.tolerance
    print(
        f"{'equal' if equal else 'DIFFERENT'}: {count:,} responses, largest difference {worst:.1e} nats per token "
        f"({worst_at}), tolerance {options.tolerance:.0e}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
