"""The model: packed attention, fused response log-probabilities and the Megatron model made of them.

``builder`` imports Megatron and is therefore not imported here.
"""

from megatron_amopo.model.logprobs import response_logps

__all__ = ["response_logps"]
