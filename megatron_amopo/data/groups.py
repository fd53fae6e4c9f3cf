"""The two small values that every other data module passes around: a tokenised group and the identity of a tokenizer.

They live apart from `tokenize.py` so that training can read prepared data without importing a tokenizer library.
"""

from dataclasses import dataclass

import numpy as np

#: The name of dimension index 0, whose prompt names all other dimensions.
GENERAL = "general"


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

    def lengths(self) -> np.ndarray:
        """Token counts, int32 [D, 3]: prompt, chosen, rejected."""
        parts = zip(self.prompts, self.chosen, self.rejected, strict=True)
        return np.array([[len(p), len(c), len(r)] for p, c, r in parts], dtype=np.int32)


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
