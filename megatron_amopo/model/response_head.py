"""The model's output layer where it gives response log-probabilities instead of logits.

Megatron's data parallelism hangs on the calls of modules: with ``--overlap-param-gather`` a hook that runs before a
layer's forward waits until that layer's weights have been gathered from the ranks that updated them. So the fused head
runs inside the call of the layer whose weight it reads; read from outside, the weight might still be the last step's.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.model.logprobs import response_logps


class ResponseHead(ColumnParallelLinear):
    """Megatron's output layer, which given a batch answers with log-probabilities of its response tokens."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        batch: GroupBatch | None = None,
        vocab_size: int | None = None,
        on_row_gradients: Callable[[Tensor], None] | None = None,
        **options: Any,
    ) -> Any:
        """Log-probabilities ``[N]`` of the batch's response tokens; without a batch, logits as Megatron's layer.

        Args:
            input_: hidden states ``[S, 1, H]``, under sequence parallelism this rank's part of S.
            weight: the embedding's, if tied and on this pipeline stage; None takes the layer's own.
            runtime_gather_output: of Megatron's layer.
            batch: says which rows predict which response tokens.
            vocab_size: rows of the vocabulary without padding.
            on_row_gradients: is given, in the backward pass, the complete gradient ``[N, H]`` of the rows of hidden
                states that predict the response tokens, in their order, on every tensor-parallel rank.
            options: of :func:`response_logps`.
        """
        if batch is None:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            # response_logps gives every rank the complete gradient, so the way back only splits it.
            input_ = gather_from_sequence_parallel_region(
                input_, tensor_parallel_output_grad=False, group=self.tp_group
            )
        rows = input_.squeeze(1).index_select(0, batch.rows)
        if on_row_gradients is not None:
            rows.register_hook(on_row_gradients)
        return response_logps(
            rows,
            self.weight if weight is None else weight,
            batch.targets,
            tp_group=self.tp_group,
            vocab_size=vocab_size,
            **options,
        )
