"""The objectives written plainly, the published one (arXiv 2506.07165) and others: what every layout is compared with.

Takes a Hugging Face folder and, for each step, the records with their noise; gives losses, first gradients and weights.
Every prompt with every response is a row of its own, padded to the longest and run through transformers' model; logits
of the whole vocabulary, log-softmax, gather. Nothing of this package's loss, packing, head or model is used, nor
anything of Megatron.

Shapes: G records of a step, D dimensions, 2 sides (chosen, rejected); R = G · D · 2 rows of T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amopo.certification.layouts import Problem
from megatron_amopo.certification.optimizers import Optimizer, PlainOptimizer
from megatron_amopo.data.groups import TokenizedGroup

#: The published hyperparameters, in numbers; γ_ftx is what :data:`FTX_GAMMA` says.
SIMPO_BETA, SIMPO_GAMMA = 0.8, 2.0
ORPO_BETA, DPO_BETA, IPO_BETA, MODPO_BETA = 0.1, 0.1, 0.1, 0.1
#: Of MODPO's objectives; the last one is trained.
MODPO_WEIGHTS = (0.25, 0.75)
#: Weight of the SFT term in all certified runs.
FTX_GAMMA = 0.1
_IGNORED = -100


@dataclass(frozen=True)
class StepData:
    """The records of one step, their draws from the standard normal distribution and their scores."""

    groups: Sequence[TokenizedGroup]
    noise: Tensor  # [G, D, 2]
    scores: Tensor | None = None  # [G, D − 1, 2], where the loss or the weights read them


@dataclass(frozen=True)
class Result:
    """What a run came to; tensors by Hugging Face's names."""

    losses: list[float]  # of each step, before its update
    initial: dict[str, Tensor]  # weights before the first step
    gradients: dict[str, Tensor]  # of the first step, before clipping
    weights: dict[str, Tensor]  # after the last step


@dataclass(frozen=True)
class ResponseFigures:
    """What the losses read of each response, ``[G, D, 2]``."""

    sum_logps: Tensor  # nats
    lengths: Tensor  # tokens
    prob_mean: Tensor  # μ of its tokens' probabilities
    prob_std: Tensor  # σ, 0 for a single token

    @property
    def mean_logps(self) -> Tensor:
        """Nats per token."""
        return self.sum_logps / self.lengths


def plain_run(
    hf: Path, steps: Sequence[StepData], optimizer: Optimizer, problem: Problem, *, dtype: torch.dtype = torch.float64
) -> Result:
    """Train the model of ``hf``, one update for each entry of ``steps``.

    The model computes in ``dtype``; the weights that the optimizer updates are float64 for float64 and float32
    otherwise. (transformers' norms compute in float32 whatever the model's type.) The reference model of DPO, IPO
    and MODPO is the model before its first update.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=dtype)
    parameters = dict(model.named_parameters())
    master = torch.float64 if dtype == torch.float64 else torch.float32
    weights = {name: parameter.detach().to(master, copy=True) for name, parameter in parameters.items()}
    initial = {name: weight.clone() for name, weight in weights.items()}
    update = PlainOptimizer(optimizer, weights)
    with torch.no_grad():
        references = [response_figures(model, step).sum_logps for step in steps]
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step, reference in zip(steps, references, strict=True):
        loss = plain_loss(model, step, problem, reference).mean()
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        gradients = {name: gradient.to(master) for name, gradient in gradients.items()}
        losses.append(loss.item())
        first = first or gradients
        update.step(gradients)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
    return Result(losses, initial, first, {name: parameter.detach().clone() for name, parameter in parameters.items()})


def plain_loss(model: torch.nn.Module, step: StepData, problem: Problem, reference: Tensor | None = None) -> Tensor:
    """Loss of each record, ``[G]``: Σ_d w_d · L_d + γ_ftx · L_SFT.

    Args:
        model: of transformers.
        step: the records and their noise.
        problem: names the loss of a pair and the weighting.
        reference: Σ log π_ref ``[G, D, 2]``; DPO, IPO and MODPO need it.
    """
    figures = response_figures(model, step)
    with torch.no_grad():
        weights_GD = _weights(problem.weighting, figures, step)
    pair_losses_GD = _pair_losses(problem.pairwise, figures, step.scores, reference)
    sft_G = -figures.mean_logps[..., 0].mean(1)
    return (weights_GD * pair_losses_GD).sum(1) + FTX_GAMMA * sft_G


def response_figures(model: torch.nn.Module, step: StepData) -> ResponseFigures:
    """One forward pass over padded rows, and what it says of each response; differentiable."""
    ids, labels = padded_rows(step.groups)
    attention_mask = (torch.arange(ids.shape[1]) < row_lengths(step.groups)[:, None]).long()
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1]
    logps_all = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    targets = labels[:, 1:]
    is_response = targets != _IGNORED
    logps_RT = logps_all.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    responses = [row[mask] for row, mask in zip(logps_RT, is_response, strict=True)]
    probs = [logps.detach().exp() for logps in responses]

    def per_response(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).view(len(step.groups), -1, 2)

    return ResponseFigures(
        sum_logps=per_response([logps.sum() for logps in responses]),
        lengths=per_response(list(is_response.sum(1))),
        prob_mean=per_response([p.mean() for p in probs]),
        prob_std=per_response([p.std() if len(p) > 1 else p.new_zeros(()) for p in probs]),
    )


def _weights(weighting: str, figures: ResponseFigures, step: StepData) -> Tensor:
    if weighting == "uniform":
        return torch.full_like(figures.prob_mean[..., 0], 1 / figures.prob_mean.shape[1])
    if weighting == "from-scores":
        assert step.scores is not None
        chosen = step.scores[..., 0].to(figures.prob_mean.dtype)
        return torch.softmax(torch.cat([chosen.mean(1, keepdim=True), chosen], dim=1), dim=1)
    assert weighting in ("gaussian", "mean")
    metric = figures.prob_mean
    if weighting == "gaussian":
        metric = metric + figures.prob_std * step.noise.to(metric.dtype)  # a draw from N(μ, σ²)
    return torch.softmax(metric[..., 0] + metric[..., 1], dim=1)


def _pair_losses(pairwise: str, figures: ResponseFigures, scores: Tensor | None, reference: Tensor | None) -> Tensor:
    chosen, rejected = figures.mean_logps[..., 0], figures.mean_logps[..., 1]
    if pairwise == "simpo":
        return -F.logsigmoid(SIMPO_BETA * (chosen - rejected) - SIMPO_GAMMA)
    if pairwise == "orpo":
        return -chosen - ORPO_BETA * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    if pairwise == "sft":
        return -chosen
    assert reference is not None
    log_ratios = figures.sum_logps - reference
    if pairwise == "dpo":
        return -F.logsigmoid(DPO_BETA * (log_ratios[..., 0] - log_ratios[..., 1]))
    if pairwise == "modpo":
        assert scores is not None
        other, trained = MODPO_WEIGHTS
        margin = (scores[:, :1, 0] - scores[:, :1, 1]).to(log_ratios.dtype)  # of the other objective
        return -F.logsigmoid((MODPO_BETA * (log_ratios[..., 0] - log_ratios[..., 1]) - other * margin) / trained)
    assert pairwise == "ipo"
    mean_log_ratios = log_ratios / figures.lengths
    return (mean_log_ratios[..., 0] - mean_log_ratios[..., 1] - 1 / (2 * IPO_BETA)).square()


def _log_odds(logp: Tensor) -> Tensor:
    return logp - torch.log(1 - logp.exp())


def _rows(groups: Sequence[TokenizedGroup]) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each of the R rows: record by record, dimension by dimension, chosen before rejected."""
    return [
        (prompt.tolist(), response.tolist())
        for group in groups
        for prompt, *pair in zip(group.prompts, group.chosen, group.rejected, strict=True)
        for response in pair
    ]


def padded_rows(groups: Sequence[TokenizedGroup]) -> tuple[Tensor, Tensor]:
    """Token ids ``[R, T]``, zeros behind each row's end, and labels ``[R, T]``: the id where it is of a response, else
    −100.
    """
    rows = _rows(groups)
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, _IGNORED)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return ids, labels


def row_lengths(groups: Sequence[TokenizedGroup]) -> Tensor:
    """Tokens ``[R]`` of each row without padding."""
    return torch.tensor([len(prompt) + len(response) for prompt, response in _rows(groups)])
