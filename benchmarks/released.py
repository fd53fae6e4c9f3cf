"""The released trainer's step, written plainly: what ours is compared with.

Each record becomes 2·D rows, chosen and rejected under each of its D prompts, padded at their ends to the longest row
of the micro-batch. A transformers model computes the logits of every token of every row; they are made float32, one
softmax of them gives log-probabilities, a second one the probabilities that the weights are drawn from. Both cover
prompts and padding, which a mask leaves out afterwards. The loss is the published one (softmax over a record's
dimensions, sum over them, mean over records), so that both steps compute the same number; the released code's own
reduction costs the same.

Where the released code may be slower than this, it has the benefit of the doubt: the second softmax is taken without
gradient, and nothing is logged.

Shapes: B = 2·D·G rows, L tokens of the longest, V vocabulary rows; G records, D dimensions, 2 sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amopo.data.groups import TokenizedGroup

IGNORED = -100
BETA, GAMMA = 0.8, 2.0  # of SimPO, as published


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch of the released trainer."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] int64: 1 for tokens, 0 for padding
    labels: Tensor  # [B, L] int64: response tokens, −100 elsewhere
    noise: Tensor  # [G, D, 2] standard normal

    @classmethod
    def of(cls, groups: Sequence[TokenizedGroup], noise: Tensor, device: torch.device) -> "PaddedRows":
        """Rows in the order record, dimension, side."""
        rows = [
            (torch.from_numpy(prompt), torch.from_numpy(response))
            for group in groups
            for prompt, *pair in zip(group.prompts, group.chosen, group.rejected, strict=True)
            for response in pair
        ]
        length = max(len(prompt) + len(response) for prompt, response in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
        for number, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            input_ids[number, :end] = torch.cat([prompt, response])
            attention_mask[number, :end] = 1
            labels[number, len(prompt) : end] = response
        return cls(*(tensor.to(device) for tensor in (input_ids, attention_mask, labels, noise)))


class ReleasedStep:
    """Forward pass and loss."""

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def __call__(self, rows: PaddedRows) -> Tensor:
        """The mean of the records' losses; differentiable."""
        output = self._model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        logits = output.logits.float()[:, :-1]  # [B, L − 1, V]
        labels = rows.labels[:, 1:]
        mask = labels != IGNORED
        targets = labels.where(mask, 0)[..., None]
        lengths = mask.sum(-1)

        token_logps = logits.log_softmax(-1).gather(-1, targets)[..., 0]
        mean_logps = (token_logps * mask).sum(-1) / lengths
        with torch.no_grad():
            token_probs = logits.softmax(-1).gather(-1, targets)[..., 0]
            mean = (token_probs * mask).sum(-1) / lengths
            squares = ((token_probs - mean[:, None]).square() * mask).sum(-1)
            std = (squares / (lengths - 1).clamp(min=1)).sqrt()
            metric = mean.view_as(rows.noise) + std.view_as(rows.noise) * rows.noise
            weights = torch.softmax(metric.sum(-1), dim=-1)

        chosen, rejected = mean_logps.view_as(rows.noise).unbind(-1)  # [G, D] each
        pair_losses = -F.logsigmoid(BETA * (chosen - rejected) - GAMMA)
        return (weights * pair_losses).sum(-1).mean()
