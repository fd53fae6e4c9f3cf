"""What a step has to compute, counted from records: tokens, query-key pairs, gathered keys, rows through the head.

Takes prepared data, or lengths given as numbers; gives :class:`StepWork` for a number of data-parallel ranks. Records
are dealt as training deals them (``data/balance.py``), so the unevenness of ranks is that of a run, and the longest
micro-batch that of the worst step which a shuffle can make: of the longest records.

Shapes: N records, D dimensions.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from megatron_amopo.data.balance import plan_step
from megatron_amopo.data.groups import Sharing, packed_tokens
from megatron_amopo.errors import ConfigError

#: Steps that means are taken from; an epoch's, where it has fewer.
_MOST_STEPS = 20


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, or the mean of several (then its counts needn't be whole)."""

    tokens: float  # T, before padding
    pairs: float  # Σ over queries of the keys that they see
    keys: float  # Σ over branches of the keys that are gathered for them
    rows: float  # response tokens, which go through the head

    @property
    def keys_per_query(self) -> float:
        """Keys of a causal sequence with as many pairs per query: what the speed of attention depends on."""
        return 2 * self.pairs / self.tokens


@dataclass(frozen=True)
class StepWork:
    """A step of one data-parallel rank."""

    micro_batches: int
    mean: MicroBatch
    longest: MicroBatch
    imbalance: float  # tokens of the fullest rank over the mean of all, mean over steps


@dataclass(frozen=True, eq=False)  # equal when the same: work is remembered by it
class Records:
    """Counts per record, int64 [N] each."""

    tokens: np.ndarray
    pairs: np.ndarray
    keys: np.ndarray
    rows: np.ndarray
    description: str
    stated: bool = False  # they stand for more records, so that any number in a step may be as long as the longest

    @classmethod
    def of(cls, lengths: np.ndarray, shared: np.ndarray, sharing: Sharing, description: str) -> "Records":
        """Of ``lengths`` [N, D, 3] (prompt, chosen, rejected) and ``shared`` [N], the start of all prompts."""
        lengths = lengths.astype(np.int64)
        prompt, chosen, rejected = (lengths[:, :, i] for i in range(3))
        # Prefix and own tokens of each dimension's two branches, as `data/batching.py` lays them out.
        first_prefix = np.zeros_like(prompt)
        if sharing == "tree":
            first_prefix[:, 1:] = np.asarray(shared, dtype=np.int64)[:, None]
        second_prefix = np.zeros_like(prompt) if sharing == "none" else prompt
        first = prompt + chosen - first_prefix
        second = prompt + rejected - second_prefix
        pairs = first * first_prefix + first * (first + 1) // 2 + second * second_prefix + second * (second + 1) // 2
        return cls(
            tokens=packed_tokens(lengths, shared, sharing),
            pairs=pairs.sum(1),
            keys=(first_prefix + first + second_prefix + second).sum(1),
            rows=(chosen + rejected).sum(1),
            description=description,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def step(self, *, global_batch: int, micro_batch: int, dp: int) -> StepWork:
        """The work of a data-parallel rank when so many records make a global batch."""
        return _step(self, global_batch, micro_batch, dp)


@functools.lru_cache(maxsize=256)
def _step(records: Records, global_batch: int, micro_batch: int, dp: int) -> StepWork:
    counts = np.stack([records.tokens, records.pairs, records.keys, records.rows])
    num_micro_batches = global_batch // (micro_batch * dp)
    rng = np.random.default_rng(1)
    # Over the end of an epoch a step may hold a record once more than an epoch's share of it.
    times = global_batch if records.stated else 1 + -(-global_batch // len(records))
    worst = np.repeat(np.argsort(-records.tokens, kind="stable")[:global_batch], times)[:global_batch]
    samples = np.concatenate([rng.permutation(len(records)) for _ in range(1 + global_batch // len(records))])
    steps = max(1, min(_MOST_STEPS, len(samples) // global_batch))
    longest, total, imbalances = np.zeros(4), np.zeros(4), []
    for chosen in [worst, *samples[: steps * global_batch].reshape(steps, global_batch)]:
        plan = plan_step(records.tokens[chosen], num_micro_batches=num_micro_batches, dp_size=dp)
        rank, place = np.unravel_index(int(plan.tokens.argmax()), plan.tokens.shape)
        candidate = counts[:, chosen[list(plan.ranks[int(rank)][int(place)].items)]].sum(1)
        longest = max(longest, candidate, key=lambda values: values[0])
        if chosen is not worst:
            imbalances.append(plan.imbalance)
            total += counts[:, chosen].sum(1)
    mean = total / (steps * num_micro_batches * dp)
    return StepWork(
        micro_batches=num_micro_batches,
        mean=MicroBatch(*map(float, mean)),
        longest=MicroBatch(*map(float, longest)),
        imbalance=float(np.mean(imbalances)),
    )


def stated_records(
    *,
    dimensions: int,
    prompt_tokens: int,
    response_tokens: int,
    shared_tokens: int = 0,
    longest_response_tokens: int | None = None,
    sharing: Sharing = "tree",
) -> Records:
    """Records of which only means are known: all alike, and one in a hundred with the longest responses.

    Raises:
        ConfigError: numbers that no data can have.
    """
    longest = longest_response_tokens or response_tokens
    for flag, value in (
        ("--dimensions", dimensions),
        ("--prompt-tokens", prompt_tokens),
        ("--response-tokens", response_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{flag} is {value}; expected 1 or more")
    if not 0 <= shared_tokens < prompt_tokens:
        raise ConfigError(f"--shared-tokens is {shared_tokens}; expected 0 to {prompt_tokens - 1}, less than a prompt")
    if longest < response_tokens:
        raise ConfigError(f"--longest-response-tokens {longest} is less than --response-tokens {response_tokens}")
    lengths = np.empty((100, dimensions, 3), dtype=np.int64)
    lengths[:, :, 0], lengths[:, :, 1:] = prompt_tokens, response_tokens
    lengths[0, :, 1:] = longest
    description = (
        f"as stated: {dimensions} dimensions, prompts of {prompt_tokens:,} tokens ({shared_tokens:,} of them shared), "
        f"responses of {response_tokens:,} tokens, in one record of a hundred {longest:,}"
    )
    return replace(Records.of(lengths, np.full(100, shared_tokens), sharing, description), stated=True)


def sequences(*, length: int, micro_batch: int, micro_batches: int) -> StepWork:
    """Plain training on full causal sequences, all of whose tokens go through the head."""
    tokens = micro_batch * length
    batch = MicroBatch(tokens, micro_batch * length * (length + 1) / 2, tokens, tokens)
    return StepWork(micro_batches, batch, batch, 1.0)
