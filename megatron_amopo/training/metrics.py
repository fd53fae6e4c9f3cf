"""What is measured of a micro-batch: name → (sum, count), per dimension, divided in one place after all ranks are
summed.

Takes the figures that the loss was made of; gives tensors that Megatron sums over micro-batches and data-parallel
ranks. Names are ``kind/dimension``; :data:`UNITS` says what each kind is measured in.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amopo.data.batching import GroupBatch
from megatron_amopo.files import write_whole
from megatron_amopo.objectives import AmopoLoss, Pairs
from megatron_amopo.objectives.statistics import ResponseStatistics

Metrics = dict[str, Tensor]  # each [2]: sum, count

#: Kinds of metrics per dimension and their units, in the order in which they are logged.
UNITS = {
    "loss": "nats",  # of IPO: (nats per token)²
    "margin": "nats per token",
    "accuracy": "fraction of records",
    "weight": "fraction",
    "prob_mean": "probability",
    "prob_std": "probability",
    "logps_chosen": "nats per token",
    "logps_rejected": "nats per token",
}


def group_metrics(
    batch: GroupBatch, dimensions: tuple[str, ...], stats: ResponseStatistics, result: AmopoLoss
) -> Metrics:
    """Sums over the micro-batch's counted groups, with their number.

    ``margin`` is c̄ − r̄, the difference of length-averaged log-probabilities; ``accuracy`` the share of records where
    it is positive; ``prob_mean`` and ``prob_std`` are averaged over both responses of a pair.
    """
    with torch.no_grad():
        mean_logps_GD2 = stats.sum_logps / batch.lengths
        margin_GD = mean_logps_GD2[..., 0] - mean_logps_GD2[..., 1]
        kinds = {
            "loss": result.pair_losses,
            "margin": margin_GD,
            "accuracy": (margin_GD > 0).float(),
            "weight": result.weights,
            "prob_mean": stats.prob_mean.mean(-1),
            "prob_std": stats.prob_std.mean(-1),
            "logps_chosen": mean_logps_GD2[..., 0],
            "logps_rejected": mean_logps_GD2[..., 1],
        }
        assert list(kinds) == list(UNITS)
        values_KGD = torch.stack([values.float() for values in kinds.values()])
        sums_KD = torch.where(batch.counted[:, None], values_KGD, 0.0).sum(1)
        count = batch.counted.sum().float()
        tokens = torch.where(batch.counted.any(), float(batch.num_tokens), 0.0)
        response_tokens = torch.where(batch.counted.any(), batch.lengths.sum().float(), 0.0)
        total = torch.where(batch.counted, result.loss.detach().float(), 0.0).sum()

        metrics = {
            "loss": total,
            "tokens_per_record": tokens,
            "response_tokens_per_record": response_tokens,
            "imbalance": count * batch.imbalance,
        }
        for kind, sums_D in zip(kinds, sums_KD, strict=True):
            metrics.update({f"{kind}/{name}": value for name, value in zip(dimensions, sums_D, strict=True)})
        return {name: torch.stack([value, count]) for name, value in metrics.items()}


@dataclass
class EvaluatedResponses:
    """Each validation record's response log-probabilities of the latest evaluation, gathered into a file of JSON
    lines.
    """

    dimensions: tuple[str, ...]
    _rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, batch: GroupBatch, pairs: Pairs, _result: AmopoLoss) -> None:
        """Add a micro-batch's counted groups."""
        kept = batch.counted
        self._rows.append((batch.record_ids[kept].cpu(), pairs.sum_logps[kept].cpu(), batch.lengths[kept].cpu()))

    def write(self, path: Path, group: dist.ProcessGroup, *, is_writer: bool) -> None:
        """Gather over the data-parallel ``group`` and write ``path``, sorted by record; forget the rows. A collective
        call.
        """
        gathered: list[list] = [[] for _ in range(group.size())]
        dist.all_gather_object(gathered, self._rows, group=group)
        self._rows = []
        if not is_writer:
            return
        lines = []
        for ids, sums, lengths in (row for rows in gathered for row in rows):
            for g, record in enumerate(ids.tolist()):
                for d, name in enumerate(self.dimensions):
                    chosen, rejected = sums[g, d].tolist()
                    chosen_length, rejected_length = lengths[g, d].tolist()
                    lines.append(
                        {
                            "record_id": record,
                            "dimension": name,
                            "chosen": chosen,
                            "rejected": rejected,
                            "chosen_length": chosen_length,
                            "rejected_length": rejected_length,
                        }
                    )
        lines.sort(key=lambda line: (line["record_id"], self.dimensions.index(line["dimension"])))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
