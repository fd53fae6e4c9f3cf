"""The length limit: how many tokens of a prompt and of its two responses are kept.

The proportional rule is that of the released code (LLaMA-Factory's): the shorter part is kept whole where it fits
half of the limit, else both shrink in proportion. The limit goes by the longer response, and both responses of a pair
keep the same prompt. One thing differs on purpose: the released code cuts a prompt's end, and the assistant's header
with it; here the cut is made in front of the tokens that close the user's turn and open the assistant's, so that a
response always follows its header; and where the dimension's text stands behind the question, in front of that, so
that it is the question which is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_amopo.data.problems import RecordProblem


@dataclass(frozen=True)
class CutPairs:
    """D pairs within the limit, and how many of the D prompts and of the 2 D responses were cut."""

    prompts: tuple[np.ndarray, ...]
    chosen: tuple[np.ndarray, ...]
    rejected: tuple[np.ndarray, ...]
    prompts_cut: int
    responses_cut: int


def cut_lengths(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """Tokens to keep of a prompt of `source` and of the longer response of `target` tokens; their sum is at most
    `cutoff`.
    """
    if target * 2 < cutoff:
        kept_target = target
    elif source * 2 < cutoff:
        kept_target = min(target, cutoff - source)
    else:
        kept_target = min(target, cutoff * target // (source + target))
    return min(source, cutoff - kept_target), kept_target


def cut_pairs(
    prompts: Sequence[np.ndarray],
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    cutoff: int | None,
    rule: str,
    header: np.ndarray,
    ends: Sequence[int] | None = None,
) -> CutPairs:
    """Fit D pairs into `cutoff` tokens each (None: no limit) by `rule`, 'proportional' or 'drop'.

    `header` are the ids that every prompt ends with; `ends` says for each prompt how many tokens at its end a cut
    keeps, the header and what else belongs there (None: the header alone). Raises RecordProblem: over_cutoff under
    'drop'; too_long where a response would keep nothing, or a prompt nothing but its end; identical_when_cut.
    """
    longest = max(len(chosen), len(rejected))
    kept_prompts, kept_chosen, kept_rejected = [], [], []
    for prompt, end in zip(prompts, ends or [len(header)] * len(prompts), strict=True):
        keep_source, keep_target = len(prompt), longest
        if cutoff is not None and len(prompt) + longest > cutoff:
            if rule == "drop":
                raise RecordProblem("over_cutoff", f"{len(prompt)} + {longest} tokens")
            keep_source, keep_target = cut_lengths(len(prompt), longest, cutoff)
            if keep_target < 1 or (keep_source < len(prompt) and keep_source <= end):
                raise RecordProblem("too_long", f"{len(prompt)} + {longest} tokens")
        kept_prompts.append(_cut_prompt(prompt, keep_source, header, end))
        kept_chosen.append(chosen[:keep_target])
        kept_rejected.append(rejected[:keep_target])
        if np.array_equal(kept_chosen[-1], kept_rejected[-1]):
            raise RecordProblem("identical_when_cut", f"the first {keep_target} tokens agree")
    return CutPairs(
        prompts=tuple(kept_prompts),
        chosen=tuple(kept_chosen),
        rejected=tuple(kept_rejected),
        prompts_cut=sum(len(kept) < len(prompt) for kept, prompt in zip(kept_prompts, prompts, strict=True)),
        responses_cut=sum(len(k) < len(chosen) for k in kept_chosen)
        + sum(len(k) < len(rejected) for k in kept_rejected),
    )


def _cut_prompt(prompt: np.ndarray, keep: int, header: np.ndarray, end: int) -> np.ndarray:
    if keep >= len(prompt):
        return prompt
    if not np.array_equal(prompt[len(prompt) - len(header) :], header):
        raise RecordProblem(
            "too_long", "the prompt's end, which a cut must keep, was encoded in another way than usual"
        )
    return np.concatenate([prompt[: keep - end], prompt[len(prompt) - end :]])
