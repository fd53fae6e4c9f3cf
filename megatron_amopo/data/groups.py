"""The two small values that every other data module passes around, a tokenised group and the identity of a tokenizer,
and how many tokens a group takes when it is packed.

They live apart from `tokenize.py` so that training can read prepared data without importing a tokenizer library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

#: The name of dimension index 0, whose prompt names all other dimensions.
GENERAL = "general"

#: What is packed once: nothing; a prompt for its two responses; also the start that all prompts of a record share. The
#: results are the same, the work isn't.
Sharing = Literal["none", "responses", "tree"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)


@dataclass(frozen=True)
class TokenizedGroup:
    """One record under its D prompts: D pairs of sequences `prompts[d] + chosen[d]` and `prompts[d] + rejected[d]`.

    All arrays are one-dimensional int32. Index 0 is the general prompt. Prompts and responses are never empty; a
    response ends in the end-of-turn token unless it was cut to the length limit.
    """

    record_id: int
    prompts: tuple[np.ndarray, ...]
    chosen: tuple[np.ndarray, ...]
    rejected: tuple[np.ndarray, ...]

    @cached_property
    def shared(self) -> int:
        """How many tokens all prompts begin with, see `shared_start`."""
        return shared_start(self.prompts)

    def lengths(self) -> np.ndarray:
        """Token counts, int32 [D, 3]: prompt, chosen, rejected."""
        parts = zip(self.prompts, self.chosen, self.rejected, strict=True)
        return np.array([[len(p), len(c), len(r)] for p, c, r in parts], dtype=np.int32)


def shared_start(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens all prompts begin with, less one where that would leave a prompt without a token of its own.

    Equal ids are what makes it exact: a word that the tokenizer joins with what follows it is another token, and ends
    the start.
    """
    shortest = min(map(len, prompts))
    equal = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], axis=0)
    return min(shortest - 1, int(np.argmin(np.append(equal, False))))


def packed_tokens(lengths: np.ndarray, shared: np.ndarray, sharing: Sharing) -> np.ndarray:
    """Tokens that groups take when packed, int64 [N], from `lengths` [N, D, 3] and `shared` [N]."""
    lengths = lengths.astype(np.int64)
    tokens = lengths.sum(axis=(1, 2))
    if sharing == "none":
        return tokens + lengths[:, :, 0].sum(axis=1)
    return tokens - (lengths.shape[1] - 1) * shared if sharing == "tree" else tokens


@dataclass(frozen=True)
class TokenizerFingerprint:
    """What two tokenizers must share for token ids and chat turns to mean the same to a model.

    `vocab_size` is the highest token id + 1, which may be less than the rows of a model's embedding. `name` is for
    messages only.
    """

    vocab_sha256: str
    template_sha256: str
    vocab_size: int
    end_of_turn_id: int
    pad_id: int | None
    name: str
