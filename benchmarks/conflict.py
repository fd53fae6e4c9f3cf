"""What the conflict meter's cosines are worth: beside those of the gradients of all the model's weights.

    python -m benchmarks.conflict --model hf-start hf-trained --data prepared --amopo-beta 10 --amopo-gamma 0.5

The meter compares dimensions at the head's input, because that is what the backward pass has at hand; what training
adds up are gradients of weights. For each model, batches of random training records: each dimension's gradient of the
loss with respect to all weights, and with respect to the vector that the meter adds to the head's input, plainly by
autograd in float64, and the cosines between dimensions of both, of single records and of whole batches. Takes small
models: each record costs a backward pass per dimension, and gradients are kept whole. Prints a table and writes a
folder with it and a plot.

Shapes: D dimensions, P pairs of them, H hidden size, W weights.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.support import COLOURS, RESULTS, STYLE, command_of, markdown_table, write_results
from megatron_amopo.data.dataset import PreparedGroups
from megatron_amopo.data.groups import GENERAL, TokenizedGroup
from megatron_amopo.objectives import ObjectiveConfig, Pairs, amopo_loss, record_noise
from megatron_amopo.objectives.statistics import response_statistics
from megatron_amopo.training.objective_arguments import add_objective_arguments, read_objective


@dataclass(frozen=True)
class Cosines:
    """Of the same pairs of dimensions, at the head's input and of all weights; each ``[samples, P]``."""

    head: Tensor
    weights: Tensor

    @property
    def correlation(self) -> float:
        return torch.corrcoef(torch.stack([self.head.flatten(), self.weights.flatten()]))[0, 1].item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare for all models and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", type=Path, nargs="+", required=True, help="Hugging Face folders")
    add("--data", type=Path, required=True, help="folder of tools/prepare_preferences.py")
    add("--batches", type=int, default=8, help="batches of each model (default: %(default)s)")
    add("--records", type=int, default=16, help="records of a batch (default: %(default)s)")
    add("--seed", type=int, default=1, help="of records and noise (default: %(default)s)")
    add("--output", type=Path, default=RESULTS / "conflict", help="folder of the results (default: %(default)s)")
    add_objective_arguments(parser)
    args = parser.parse_args(arguments)

    groups = PreparedGroups.open(args.data)
    objective = read_objective(args, groups.dimensions, [name for name in groups.dimensions if name != GENERAL])
    found: dict[str, dict[str, Cosines]] = {}
    for folder in args.model:
        records, batches = compare(folder, groups, objective, args.batches, args.records, args.seed)
        found[folder.name] = {"record": records, f"batch of {args.records}": batches}
    text = report(found)
    print(text)
    write_results(
        args.output,
        title="Cosines at the head's input and of all weights",
        command=command_of("benchmarks.conflict", arguments),
        text=text,
        data={
            "cosines": {
                model: {of: {"head": c.head.tolist(), "weights": c.weights.tolist()} for of, c in samples.items()}
                for model, samples in found.items()
            }
        },
        figures={"conflict": plot(found)},
    )
    return 0


def compare(
    folder: Path, groups: PreparedGroups, objective: ObjectiveConfig, batches: int, records: int, seed: int
) -> tuple[Cosines, Cosines]:
    """Cosines of every record and of every batch's sums."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rng = np.random.default_rng(seed)
    of_records: list[tuple[Tensor, Tensor]] = []
    of_batches: list[tuple[Tensor, Tensor]] = []
    with tqdm(total=batches * records, desc=folder.name, unit="record", mininterval=10) as bar:
        for _ in range(batches):
            head_sum, weights_sum = torch.zeros(()), torch.zeros(())
            for index in rng.choice(len(groups), records, replace=False):
                head_DH, weights_DW = record_gradients(model, groups[int(index)], objective, seed)
                of_records.append((_cosines(head_DH), _cosines(weights_DW)))
                head_sum, weights_sum = head_sum + head_DH, weights_sum + weights_DW
                bar.update()
            of_batches.append((_cosines(head_sum), _cosines(weights_sum)))
    return tuple(  # type: ignore[return-value]
        Cosines(*(torch.stack(values) for values in zip(*samples, strict=True))) for samples in (of_records, of_batches)
    )


def record_gradients(model: Any, group: TokenizedGroup, objective: ObjectiveConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Each dimension's part of a record's loss differentiated: ``[D, H]`` with respect to a vector that is added to the
    head's input, ``[D, W]`` with respect to all weights.
    """
    parameters = list(model.parameters())
    offset = torch.zeros(model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    logps = []
    for prompt, *responses in zip(group.prompts, group.chosen, group.rejected, strict=True):
        for response in responses:
            ids = torch.tensor([*prompt.tolist(), *response.tolist()])
            hidden = model.model(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1] + offset
            predicted = model.lm_head(hidden).log_softmax(-1)
            logps.append(predicted.gather(1, ids[len(prompt) :, None])[:, 0])
    lengths = torch.tensor([len(own) for own in logps]).view(1, -1, 2)
    stats = response_statistics(torch.cat(logps), lengths)
    noise = record_noise(seed, torch.tensor([group.record_id]), lengths.shape[1], 0)
    pairs = Pairs(stats.sum_logps, lengths, stats.prob_mean, stats.prob_std, noise.double())
    result = amopo_loss(pairs, objective)
    sft = -pairs.mean_logps[0, :, 0] * objective.ftx_gamma / lengths.shape[1]
    gradients = [
        torch.autograd.grad(loss, [offset, *parameters], retain_graph=True)
        for loss in result.weights[0] * result.pair_losses[0] + sft
    ]
    head_DH = torch.stack([own[0] for own in gradients])
    return head_DH, torch.stack([torch.cat([x.flatten() for x in own[1:]]) for own in gradients])


def _cosines(vectors: Tensor) -> Tensor:
    """Between all pairs of rows, ``[P]``."""
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    return (unit[first] * unit[second]).sum(-1)


def report(found: Mapping[str, Mapping[str, Cosines]]) -> str:
    """The table and what it means."""

    def spread(values: Tensor) -> str:
        return f"{values.mean():.3f} ({values.min():.2f} – {values.max():.2f})"

    table = markdown_table(
        ["model, of", "cosines", "at the head's input", "of all weights", "correlation"],
        [
            [f"{model}, {of}", c.head.numel(), spread(c.head), spread(c.weights), f"{c.correlation:.2f}"]
            for model, samples in found.items()
            for of, c in samples.items()
        ],
    )
    return f"""Mean (smallest – largest) over pairs of dimensions and random training records. At the head's input is
what `--amopo-conflict-interval` records as `record_cosine` and `batch_cosine` (docs/looking-inside.md); of all weights
is what that stands for: cosines between the dimensions' gradients of every weight of the model, of the same loss.

{table}"""


def plot(found: Mapping[str, Mapping[str, Cosines]]) -> Figure:
    """Both cosines of every pair of dimensions, a panel per model."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), squeeze=False, sharex=True)
        for axes, (model, samples) in zip(panels[0], found.items(), strict=True):
            lowest = min(c.weights.min().item() for c in samples.values())
            lowest = min([lowest, *(c.head.min().item() for c in samples.values())])
            axes.plot([lowest, 1], [lowest, 1], color="#bbbbbb", linewidth=1)
            for (of, c), colour, size in zip(samples.items(), COLOURS[1:], (6, 22), strict=False):
                axes.scatter(c.head.flatten(), c.weights.flatten(), s=size, color=colour, label=of)
            axes.set_title(model)
            axes.set_xlabel("cosine at the head's input")
        panels[0][0].set_ylabel("cosine of all weights' gradients")
        panels[0][0].legend(frameon=False)
        figure.tight_layout()
    return figure


if __name__ == "__main__":
    sys.exit(main())
