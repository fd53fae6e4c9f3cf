"""What a run is going to read, said before it starts.

Takes the validated arguments, our configuration and the data; gives the lines that the first rank prints.
"""

from argparse import Namespace

import numpy as np

from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.planning import Balance, GlobalBatches
from megatron_amopo.training.arguments import RunConfig

#: Steps that the figures of balance are taken from: an epoch of most data, a second or two of work.
_MOST_STEPS = 500


def describe_run(args: Namespace, config: RunConfig, groups: PreparedGroups, dp_size: int) -> str:
    """Records, steps and epochs; how even the ranks are; records beyond the budget of tokens. One line each."""
    lines = [_length(args, config, len(groups))]
    if not args.skip_train:
        lines.append(_balance(args, config, groups, dp_size))
        if config.max_tokens is not None:
            lines += _oversized(config, groups)
    return "\n".join(f"> {line}" for line in lines)


def _length(args: Namespace, config: RunConfig, num_records: int) -> str:
    batch = args.global_batch_size
    text = f"{num_records:,} training records, {len(config.dimensions)} dimensions ({', '.join(config.dimensions)}); "
    if config.num_samples is None:
        epochs = args.train_iters * batch / num_records if args.train_iters else 0
        return text + f"{args.train_iters} steps of {batch} records, {epochs:.2f} epochs"
    last = config.num_samples - (args.train_iters - 1) * batch
    return (
        text
        + f"{config.num_epochs} epochs = {config.num_samples:,} samples, {args.train_iters} steps of {batch} records"
        + (f"; the last step has {last}" if last != batch else "")
    )


def _balance(args: Namespace, config: RunConfig, groups: PreparedGroups, dp_size: int) -> str:
    tokens = groups.packed_tokens(config.sharing)
    order = SampleOrder(len(groups), config.noise_seed)
    batches = GlobalBatches(tokens, order, len(groups), args.global_batch_size, dp_size)
    balance = Balance.of(batches.plans(args.micro_batch_size, most=_MOST_STEPS))
    num_micro_batches = args.global_batch_size // (args.micro_batch_size * dp_size)
    over = "an epoch" if balance.steps == len(batches) else f"the first {balance.steps} steps"
    budget = "" if config.max_tokens is None else f" (--amopo-max-tokens-per-micro-batch {config.max_tokens:,})"
    return (
        f"{num_micro_batches} micro-batch(es) per rank and step, of {args.micro_batch_size} record(s) on average, the "
        f"longest of {balance.longest:,} tokens{budget}; over {over} the fullest of {dp_size} data-parallel rank(s) "
        f"has {balance.mean:.3f} times the mean tokens, {balance.worst:.3f} in the worst step"
    )


def _oversized(config: RunConfig, groups: PreparedGroups) -> list[str]:
    tokens = groups.packed_tokens(config.sharing)
    over = np.flatnonzero(tokens > config.max_tokens)
    if not len(over):
        return []
    longest = int(over[np.argmax(tokens[over])])
    named = ", ".join(str(groups.record_ids[index]) for index in over[:10]) + (", …" if len(over) > 10 else "")
    return [
        f"{len(over):,} record(s) exceed --amopo-max-tokens-per-micro-batch {config.max_tokens:,} alone and get "
        f"micro-batches of their own: {named}; the longest is record {groups.record_ids[longest]} "
        f"({groups.source(longest)}) with {tokens[longest]:,} tokens"
    ]
