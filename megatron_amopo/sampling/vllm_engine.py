"""Answers by vLLM, where it is installed: it batches by itself, so it gets many requests at a time.

It gets token ids, which every engine gets from the same tokenizer code. Written to vLLM's documented `LLM.generate`;
the project's tests run it against a stand-in.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_amopo.errors import ConfigError
from megatron_amopo.sampling.engines import Generated, Request, room

_REQUESTS_AT_A_TIME = 1024


def vllm_installed() -> bool:
    """Whether vLLM can be imported; doesn't import it."""
    return importlib.util.find_spec("vllm") is not None


class VllmEngine:
    """A model folder in vLLM, over `tensor_parallel_size` GPUs."""

    name = "vllm"
    batch_size = _REQUESTS_AT_A_TIME

    def __init__(self, folder: Path, end_of_turn_id: int, tensor_parallel_size: int) -> None:
        """Raises ConfigError where vLLM isn't installed."""
        if not vllm_installed():
            raise ConfigError("--engine vllm: vLLM isn't installed here (pip install vllm), or take transformers")
        self._vllm: Any = importlib.import_module("vllm")
        self._end_of_turn_id = end_of_turn_id
        # 'vllm' leaves the folder's own sampling settings aside; its end tokens are used all the same.
        self._model = self._vllm.LLM(
            model=str(folder), tensor_parallel_size=tensor_parallel_size, generation_config="vllm"
        )
        self.context: int = self._model.llm_engine.model_config.max_model_len

    def generate(self, requests: Sequence[Request]) -> list[Generated]:
        """Answer each request. Raises DataError where a prompt leaves no room for an answer."""
        settings = [
            self._vllm.SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=room(request, self.context),
                seed=request.seed,
                stop_token_ids=[self._end_of_turn_id],
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt.tolist()} for request in requests]
        outputs = [output.outputs[0] for output in self._model.generate(prompts, settings, use_tqdm=False)]
        return [Generated(self._answer(output.token_ids), output.finish_reason == "stop") for output in outputs]

    def _answer(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Without the end of the turn, which vLLM gives along; an end of another kind is a control token, which
        decoding leaves out."""
        return tuple(ids[:-1] if ids and ids[-1] == self._end_of_turn_id else ids)
