"""Answers by transformers: batches padded on the left, each row sampled from a generator of its own.

Of the folder's generation settings only the tokens that end an answer are used: how to sample is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_amopo.sampling.engines import Generated, Request, room
from megatron_amopo.sampling.whole_model import load_whole


class TransformersEngine:
    """A model folder loaded on the GPU, where there is one, in the type of its weights."""

    name = "transformers"

    def __init__(self, folder: Path, end_of_turn_id: int, batch_size: int) -> None:
        """Raises ConfigError where transformers can't load the folder, or it lacks weights."""
        from transformers import AutoModelForCausalLM

        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_whole(AutoModelForCausalLM, folder, str(folder)).to(self.device)
        self.end_ids = sorted({end_of_turn_id, *_as_list(self.model.generation_config.eos_token_id)})
        self.context = getattr(self.model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer each request. Raises DataError where a prompt leaves no room for an answer."""
        from transformers import GenerationConfig, LogitsProcessorList

        longest = max(len(request.prompt) for request in requests)
        # Each prompt's own, whatever else is in the batch: what a row generates beyond it, waiting for the others, is
        # cut off.
        limits = [room(request, self.context) for request in requests]
        pad = self.end_ids[0]  # masked, so any will do
        ids = torch.full((len(requests), longest), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.from_numpy(request.prompt).long()
            mask[row, longest - len(request.prompt) :] = 1
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=max(limits), eos_token_id=self.end_ids, pad_token_id=pad, use_cache=True
        )
        # transformers fills what a config leaves at its default from the model's own.
        self.model.generation_config = settings
        output = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([SeededSampling(requests, self.device)]),
        )
        rows = output[:, longest:].tolist()
        return [self._cut(row, limit) for row, limit in zip(rows, limits, strict=True)]

    def _cut(self, ids: list[int], limit: int) -> Generated:
        end = next((place for place, token in enumerate(ids[:limit]) if token in self.end_ids), None)
        return Generated(tuple(ids[:limit] if end is None else ids[:end]), end is not None)


class SeededSampling:
    """Turns the largest score into a sample: temperature and top-p, then Gumbel noise from each row's own generator
    (the argmax of logits plus Gumbel noise is distributed as their softmax). Rows of temperature 0 stay as they are.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._requests = requests
        self._generators = [torch.Generator(device).manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` are logits [rows, vocabulary]; gives what the argmax is to be taken of."""
        scores = scores.float().clone()
        for row, (request, generator) in enumerate(zip(self._requests, self._generators, strict=True)):
            if request.temperature > 0:
                logits = _top_p(scores[row] / request.temperature, request.top_p)
                waiting = torch.empty_like(logits).exponential_(generator=generator)
                scores[row] = logits - waiting.log()
        return scores


def _top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """The logits of the fewest most likely tokens whose probabilities reach `top_p`; −∞ for the others."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(descending=True)
    probs = ordered.softmax(dim=-1)
    left_out = probs.cumsum(dim=-1) - probs >= top_p
    return logits.masked_fill(left_out.scatter(-1, places, left_out), float("-inf"))


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
