"""What the study compares: arms, sizes, claimed arrows, and the rules by which they are made comparable.

To study another method, add a row to :data:`ARMS`; to check another claim, one to :data:`ARROWS`.

**Equal compute.** Every arm takes the same number of optimizer steps on the same number of pairs, a record under one
prompt being a pair: with D prompts a step reads 48/D records. The records are the same for all, so an arm with one
prompt sees each of them four times as often as one with four; only MODPO does without those that tie on its trained
objective. Prompts are of nearly the same length.

**Settings.** A setting is a learning rate and the hyperparameters of the pair loss. Each arm gets the one, of the
same grid, with the highest mean score on requests of their own under a seed of its own; the larger size chooses the
learning rate again and takes over the hyperparameters. Arms that only take AMoPO apart, and of which nothing is
claimed, take AMoPO's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from benchmarks.efficacy.task import DIMENSIONS
from examples.make_tiny_model import Shape
from megatron_amopo.data.groups import GENERAL
from megatron_amopo.objectives.choice import flag_of

STEPS = 80
PAIRS_PER_STEP = 48  # divisible by every number of prompts
RECORDS = STEPS * PAIRS_PER_STEP // (len(DIMENSIONS) + 1)  # AMoPO reads each once
LESSONS = 3000
TUNING_REQUESTS, TEST_REQUESTS = 200, 400
ASKED_REQUESTS = 40  # of the test requests, asked for each score on each dimension

TUNING_SEED = 1000
SEEDS = tuple(range(6))  # a multiple of the number of dimensions: which of them are left out takes turns

LEARNING_RATES = (1.5e-4, 5e-4, 1.5e-3, 5e-3)
#: Values of each pair loss's hyperparameters: AMoPO's published ones, or the method's, and a larger β. SimPO's second
#: are of its authors' later Llama-3 run: a margin of 0.3 nats per token is asked for, where AMoPO's ask for 2.5.
HYPERPARAMETERS: Mapping[str, tuple[Mapping[str, float], ...]] = {
    "simpo": ({"beta": 0.8, "gamma": 2.0}, {"beta": 10.0, "gamma": 3.0}),
    "orpo": ({"beta": 0.1}, {"beta": 1.0}),
    "dpo": ({"beta": 0.1}, {"beta": 0.5}),
    "ipo": ({"beta": 0.1}, {"beta": 1.0}),
    "modpo": ({"beta": 0.1}, {"beta": 0.5}),
    "sft": ({},),
}


@dataclass(frozen=True)
class Size:
    """A model size and how long it is fitted to the lessons, in steps of eight pairs."""

    name: str
    shape: Shape
    fit_steps: int


SIZES = (
    Size("small", Shape(layers=2, hidden=64, intermediate=128), fit_steps=2500),
    Size("large", Shape(layers=4, hidden=128, intermediate=256), fit_steps=2000),
)


@dataclass(frozen=True)
class Setting:
    """A point of the grid."""

    learning_rate: float
    hyperparameters: Mapping[str, float]

    @property
    def name(self) -> str:
        """Unique within an arm's grid, fit for a file name."""
        return "-".join([f"lr{self.learning_rate:g}", *(f"{key}{x:g}" for key, x in self.hyperparameters.items())])


#: What a seed's records are prepared as. ``plain`` repeats the general prompt for every dimension, ``no-score`` leaves
#: the score out of the dimensions' prompts, ``ordered`` chooses by MODPO's trained objective alone.
DATA = ("full", "plain", "no-score", "ordered")


@dataclass(frozen=True)
class Arm:
    """A method as it is trained."""

    name: str
    title: str
    pairwise: str = "simpo"
    weighting: str = "gaussian"
    prompts: int = 1 + len(DIMENSIONS)  # D: the general one and D − 1 dimensions' own
    data: str = "full"
    setting_of: str | None = None  # the arm whose setting it takes; its own by default

    @property
    def records_per_step(self) -> int:
        return PAIRS_PER_STEP // self.prompts

    @property
    def tunes_as(self) -> str:
        """The name of the arm whose setting it takes."""
        return self.setting_of or self.name

    def dimensions(self, seed: int) -> tuple[str, ...]:
        """The trained dimensions; which are left out takes turns with the seed."""
        return (GENERAL, *rotated(seed)[: self.prompts - 1])

    def flags(self, seed: int, setting: Setting) -> list[str]:
        """Of the training command: objective, dimensions, learning rate, batch."""
        flags = {
            "--amopo-dimensions": ",".join(self.dimensions(seed)),
            "--amopo-pairwise": self.pairwise,
            "--amopo-weighting": self.weighting,
            **{flag_of(name): repr(value) for name, value in setting.hyperparameters.items()},
            "--global-batch-size": str(self.records_per_step),
            "--micro-batch-size": str(self.records_per_step),
            "--train-iters": str(STEPS),
            "--lr": repr(setting.learning_rate),
        }
        if self.pairwise == "modpo":
            even = 1 / len(DIMENSIONS)
            flags[flag_of("modpo_weights")] = ",".join(f"{name}={even!r}" for name in DIMENSIONS)
            flags[flag_of("modpo_objective")] = ordered_by(seed)
        return [word for pair in flags.items() for word in pair]


def rotated(seed: int) -> tuple[str, ...]:
    """The scored dimensions, beginning with another one from seed to seed."""
    first = seed % len(DIMENSIONS)
    return DIMENSIONS[first:] + DIMENSIONS[:first]


def ordered_by(seed: int) -> str:
    """The objective that MODPO learns from the order of the pairs."""
    return rotated(seed)[0]


AMOPO, SIMPO, START = "amopo", "simpo", "start"

ARMS = (
    Arm(AMOPO, "AMoPO"),
    Arm(SIMPO, "SimPO (one prompt)", prompts=1),
    Arm("orpo", "ORPO", pairwise="orpo", prompts=1),
    Arm("dpo", "DPO", pairwise="dpo", prompts=1),
    Arm("modpo", "MODPO", pairwise="modpo", prompts=1, data="ordered"),
    Arm("uniform", "AMoPO, equal weights", weighting="uniform"),
    Arm("three", "AMoPO, 3 prompts", prompts=3),
    Arm("two", "AMoPO, 2 prompts", prompts=2),
    Arm("mean", "AMoPO, weights without noise", weighting="mean", setting_of=AMOPO),
    Arm("plain", "AMoPO, general prompt four times", data="plain", setting_of=AMOPO),
    Arm("no-score", "AMoPO, no score in the prompts", data="no-score", setting_of=AMOPO),
    Arm("amopo-orpo", "AMoPO over ORPO", pairwise="orpo"),
    Arm("amopo-dpo", "AMoPO over DPO", pairwise="dpo"),
    Arm("ipo", "IPO", pairwise="ipo", prompts=1),
    Arm("sft", "SFT on chosen", pairwise="sft", prompts=1),
)
BY_NAME: Mapping[str, Arm] = {arm.name: arm for arm in ARMS}
SIZE_BY_NAME: Mapping[str, Size] = {size.name: size for size in SIZES}


@dataclass(frozen=True)
class Arrow:
    """``better`` is claimed to score higher than ``worse``."""

    better: str
    worse: str


#: The published claims: full AMoPO > equal weights > fewer dimensions > one dimension; AMoPO > MODPO, SimPO, ORPO, DPO.
#: With one dimension the general prompt is left, under which AMoPO is SimPO.
ARROWS = (
    Arrow(AMOPO, "uniform"),
    Arrow("uniform", "three"),
    Arrow("three", "two"),
    Arrow("two", SIMPO),
    Arrow(AMOPO, "modpo"),
    Arrow(AMOPO, SIMPO),
    Arrow(AMOPO, "orpo"),
    Arrow(AMOPO, "dpo"),
)


def grid(arm: Arm) -> list[Setting]:
    """The settings that an arm chooses among at the smaller size."""
    return [Setting(rate, values) for values, rate in product(HYPERPARAMETERS[arm.pairwise], LEARNING_RATES)]
