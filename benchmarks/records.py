"""The records that benchmarks compute on: real data through the project's own pipeline, as they are or with shorter
responses, and a choice among them that stands for all.

Takes a file of preference pairs and a tokenizer folder; gives :class:`PreparedGroups`. Nothing is kept: what is
prepared lies in a folder that the caller owns.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.formats import parse_json
from megatron_amopo.data.groups import TokenizedGroup
from megatron_amopo.data.prepare import PrepareOptions, prepare
from megatron_amopo.data.prompts import DEFAULT_STYLE
from megatron_amopo.data.sources import read_items
from megatron_amopo.errors import ConfigError

_TEXT_FIELDS = ("content", "response", "value")
_DRAWS = 5000


@dataclass(frozen=True)
class Source:
    """A file of preference pairs (``docs/preparing-data.md``) and how it is prepared.

    ``filler`` is the score, on the file's scale, of dimensions that the file doesn't score: where only lengths matter,
    it makes more dimensions of few.
    """

    path: Path
    tokenizer: Path
    dimensions: tuple[str, ...]
    source_scale: tuple[float, float]
    cutoff_len: int = 1024
    prompts: str = DEFAULT_STYLE
    filler: float | None = None

    def prepare(self, folder: Path, *, most_response_tokens: int | None = None) -> PreparedGroups:
        """Prepare into ``folder``, which must not exist; responses longer than ``most_response_tokens``, end of turn
        included, are cut before.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        derived = folder.with_name(f"{folder.name}.jsonl")
        self._derive(derived, most_response_tokens)
        options = PrepareOptions(
            inputs=(derived,),
            output=folder,
            tokenizer=self.tokenizer,
            dimensions=self.dimensions,
            source_scale=self.source_scale,
            cutoff_len=self.cutoff_len,
            prompts=self.prompts,
        )
        prepare(options)
        return PreparedGroups.open(folder)

    def _derive(self, target: Path, most_response_tokens: int | None) -> None:
        tokenizer = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        with target.open("w", encoding="utf-8") as lines:
            for item in read_items(self.path, self.path.name):
                record = dict(parse_json(item.raw))
                for side in ("chosen", "rejected"):
                    if side not in record:
                        raise ConfigError(f"--data {item.source}: no '{side}'; benchmarks take chosen/rejected pairs")
                    if most_response_tokens is not None:
                        record[side] = _shortened(record[side], tokenizer, most_response_tokens - 1)
                    if self.filler is not None:
                        record |= self._missing_scores(record[side], side)
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _missing_scores(self, response: Any, side: str) -> dict[str, float | None]:
        """Columns with the scores that a response lacks."""
        given = {**response, **response.get("scores", {})} if isinstance(response, Mapping) else {}
        return {f"{side}_{name}": self.filler for name in self.dimensions if name not in given}


def add_source_arguments(parser: argparse.ArgumentParser, *, several_files: bool = False) -> None:
    """The flags that :func:`source_of` reads."""
    add = parser.add_argument
    if several_files:
        add("--data", type=Path, nargs="+", required=True, help="files of preference pairs")
    else:
        add("--data", type=Path, required=True, help="file of preference pairs")
    add("--tokenizer", type=Path, required=True, help="Hugging Face tokenizer folder")
    add("--dimensions", default="helpfulness,correctness,instruction_following", help="scores (default: %(default)s)")
    add("--source-scale", default="0-4", metavar="LOW-HIGH", help="scale of the file's scores (default: %(default)s)")
    add("--cutoff-len", type=int, default=1024, help="most tokens of prompt + response (default: %(default)s)")


def source_of(arguments: argparse.Namespace, path: Path) -> Source:
    """A file, prepared as the flags of :func:`add_source_arguments` say."""
    low, _, high = arguments.source_scale.partition("-")
    return Source(
        path=path,
        tokenizer=arguments.tokenizer,
        dimensions=tuple(arguments.dimensions.split(",")),
        source_scale=(float(low), float(high)),
        cutoff_len=arguments.cutoff_len,
    )


@dataclass(frozen=True)
class LengthStatistics:
    """Means per record of what decides the work of a step; tokens."""

    padded: float  # of rows padded to the longest of their record
    padded_together: float  # of rows padded to the longest of their micro-batch
    packed: float  # with each prompt packed once for its two responses
    response: float  # rows of the head that are needed

    @classmethod
    def of(cls, lengths: np.ndarray) -> "LengthStatistics":
        """Of records ``[n, D, 3]`` (prompt, chosen, rejected) that make one micro-batch."""
        longest, packed, response = _per_record(lengths)
        rows = 2 * lengths.shape[1]
        return cls(
            float(rows * longest.mean()), float(rows * longest.max()), float(packed.mean()), float(response.mean())
        )


def choose_records(groups: PreparedGroups, count: int, *, seed: int = 0) -> tuple[list[int], LengthStatistics]:
    """``count`` records that stand for the data set, and the statistics that they should have: those of the whole data
    set, with the mean over all draws for what padding together takes.

    Of 5,000 seeded draws it is the one whose worst relative deviation is smallest.
    """
    longest, packed, response = _per_record(groups.lengths)
    rows = 2 * groups.lengths.shape[1]
    rng = np.random.default_rng(seed)
    draws = np.stack([rng.choice(len(groups), min(count, len(groups)), replace=False) for _ in range(_DRAWS)])
    together = rows * longest[draws].max(axis=1)
    of_draws = np.stack(
        [rows * longest[draws].mean(axis=1), together, packed[draws].mean(axis=1), response[draws].mean(axis=1)]
    )
    expected = np.array([rows * longest.mean(), together.mean(), packed.mean(), response.mean()])
    deviation = np.abs(of_draws / expected[:, None] - 1).max(axis=0)
    return sorted(draws[deviation.argmin()].tolist()), LengthStatistics(*expected.tolist())


def within_vocabulary(group: TokenizedGroup, vocab_size: int) -> TokenizedGroup:
    """The group with token ids modulo ``vocab_size``: what a model with a part of the vocabulary can read, at the same
    cost.
    """

    def folded(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple(part % vocab_size for part in parts)

    return replace(group, prompts=folded(group.prompts), chosen=folded(group.chosen), rejected=folded(group.rejected))


def _per_record(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Longest sequence, packed tokens and response tokens of each record."""
    lengths = lengths.astype(np.int64)
    longest = (lengths[:, :, 0] + lengths[:, :, 1:].max(axis=2)).max(axis=1)
    return longest, lengths.sum(axis=(1, 2)), lengths[:, :, 1:].sum(axis=(1, 2))


def _shortened(response: Any, tokenizer: Any, most_tokens: int) -> Any:
    """A response, as its format writes it, cut behind its token number ``most_tokens``."""
    if isinstance(response, Mapping):
        name = next(name for name in _TEXT_FIELDS if name in response)
        return {**response, name: _shortened(response[name], tokenizer, most_tokens)}
    if isinstance(response, list):
        return [*response[:-1], _shortened(response[-1], tokenizer, most_tokens)]
    offsets = tokenizer.encode(response, add_special_tokens=False).offsets
    return response if len(offsets) <= most_tokens else response[: offsets[most_tokens - 1][1]]
