"""A problem made real: a tiny random model in both formats, prepared data, and what each step reads of it.

Takes a :class:`~megatron_amopo.certification.layouts.Problem`; gives folders for the training command and the same
records in memory for the plain reference. Everything comes from fixed seeds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_amopo.certification.layouts import Problem
from megatron_amopo.certification.reference import FTX_GAMMA, MODPO_WEIGHTS, StepData
from megatron_amopo.certification.tiny import draw_scores, make_data, make_hf_model, random_groups
from megatron_amopo.checkpoint.convert import hf_to_megatron
from megatron_amopo.checkpoint.families import parameter_table
from megatron_amopo.checkpoint.hf import read_config
from megatron_amopo.checkpoint.parameters import Parameter
from megatron_amopo.data.batching import SampleOrder
from megatron_amopo.objectives.noise import record_noise

#: Three steps are an epoch, so that longer runs also see the noise of the next one.
RECORDS, BATCH = 24, 8
SEED = 11


@dataclass(frozen=True)
class PreparedProblem:
    """A problem with its files."""

    problem: Problem
    hf: Path
    megatron: Path
    data: Path
    parameters: tuple[Parameter, ...]

    def flags(self, output: Path, steps: int) -> list[str]:
        """Of the training command, without optimizer and layout; metrics go to ``output``."""
        return [
            *("--amopo-data", str(self.data), "--pretrained-checkpoint", str(self.megatron)),
            *("--tensorboard-dir", str(output), "--log-interval", "1", "--train-iters", str(steps)),
            *("--global-batch-size", str(BATCH), "--amopo-seed", str(SEED)),
            *("--amopo-pairwise", self.problem.pairwise, "--amopo-ftx-gamma", str(FTX_GAMMA)),
            *("--amopo-weighting", self.problem.weighting),
            *(_modpo_flags() if self.problem.pairwise == "modpo" else ()),
            # Its own, so that each layout computes the reference, too.
            *(("--amopo-reference-cache", str(output / "reference")) if self.problem.has_reference else ()),
        ]

    def steps(self, count: int) -> list[StepData]:
        """What each of the first ``count`` steps reads: the order of records and the noise are data, like the records;
        they come from the functions that training asks. Records and scores are those that were drawn, not read back.
        """
        groups = random_groups(RECORDS, **_data_options(self.problem))
        scores = torch.from_numpy(draw_scores(np.random.default_rng(SEED), RECORDS, self.problem.dimensions))
        order = SampleOrder(RECORDS, SEED)
        result = []
        for step in range(count):
            indices, epochs = order(range(step * BATCH, (step + 1) * BATCH))
            ids = torch.tensor([groups[i].record_id for i in indices])
            noise = record_noise(SEED, ids, self.problem.dimensions, torch.from_numpy(epochs))
            result.append(StepData([groups[i] for i in indices], noise, scores[indices]))
        return result


def prepare_problem(problem: Problem, folder: Path) -> PreparedProblem:
    """Make the model and the data of a problem in ``folder``."""
    hf, megatron, data = (folder / name for name in ("hf", "megatron", "data"))
    make_hf_model(
        hf,
        family=problem.family,
        tied=problem.tied,
        seed=SEED,
        # What bf16 rounds of the first weights isn't an error of the computation.
        dtype=torch.bfloat16 if problem.bf16_weights else torch.float32,
        num_attention_heads=8,
        num_key_value_heads=problem.key_value_heads,
    )
    hf_to_megatron(hf, megatron)
    options = _data_options(problem)
    make_data(data, train=RECORDS, validation=0, random_scores=problem.has_scores, **options)
    return PreparedProblem(problem, hf, megatron, data, parameter_table(read_config(hf)))


def _modpo_flags() -> tuple[str, ...]:
    """The last objective is learnt from the order of the pairs."""
    weights = {f"quality_{index}": weight for index, weight in enumerate(MODPO_WEIGHTS, start=1)}
    named = ",".join(f"{name}={weight}" for name, weight in weights.items())
    return ("--amopo-modpo-weights", named, "--amopo-modpo-objective", list(weights)[-1])


def _data_options(problem: Problem) -> dict[str, Any]:
    return {"dimensions": problem.dimensions, "seed": SEED, "shared_question": problem.shared_question}
