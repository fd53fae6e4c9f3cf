"""The prompts that a model was aligned under, as a file in its Hugging Face folder, so that it can be used as trained.

Takes the manifest of the prepared data and the dimensions that were trained; gives `amopo_prompts.json`. Training
writes it beside the checkpoint, an export carries it on and lets the chat template offer the same prompts
(`template_extension.py`), and the sampler reads it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_amopo.data.groups import GENERAL
from megatron_amopo.data.manifest import Manifest
from megatron_amopo.data.prompts import Message, PromptStyle, format_score
from megatron_amopo.errors import ConfigError, DataError
from megatron_amopo.files import write_whole

PROMPTS_FILE = "amopo_prompts.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelPrompts:
    """`dimensions` are those that the general prompt names, in order, without 'general'; `trained` are the ones under
    whose prompts the model was trained, 'general' among them as a rule.
    """

    style: PromptStyle
    dimensions: tuple[str, ...]
    trained: tuple[str, ...]

    @classmethod
    def of_run(cls, manifest: Manifest, trained: Sequence[str]) -> "ModelPrompts | None":
        """Of a run's data and the dimensions it trains; None where the data was made without prompts (random tokens of
        tests and benchmarks). Raises ConfigError.
        """
        if not manifest.prompts:
            return None
        style = PromptStyle.from_content(manifest.prompts, where="prompts of the prepared data")
        return cls(style, tuple(name for name in manifest.dimensions if name != GENERAL), tuple(trained))

    @classmethod
    def load(cls, folder: Path) -> "ModelPrompts | None":
        """Of a model folder; None where it has no such file. Raises DataError naming the file."""
        path = folder / PROMPTS_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format {content['format_version']}, this version reads {_FORMAT_VERSION}")
            style = PromptStyle.from_content(content["prompts"])
            return cls(style, tuple(map(str, content["dimensions"])), tuple(map(str, content["trained"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} can't be used: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the file, beside and renamed."""
        content = {
            "format_version": _FORMAT_VERSION,
            "dimensions": list(self.dimensions),
            "trained": list(self.trained),
            "prompts": dict(self.style.content),
        }
        write_whole(folder / PROMPTS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @property
    def offered(self) -> tuple[str, ...]:
        """Dimensions that can be wanted: the trained ones, in the order of the prompts."""
        return tuple(name for name in self.dimensions if name in self.trained)

    def check(self, want: Mapping[str, float]) -> None:
        """Refuse what the model wasn't trained for: ConfigError naming the dimension or the score."""
        low, high = self.style.scale
        for name, score in want.items():
            if name not in self.offered:
                raise ConfigError(f"no dimension {name!r} among those trained: {', '.join(self.offered) or 'none'}")
            if not low <= score <= high:
                scale = f"{format_score(low)} to {format_score(high)}"
                raise ConfigError(f"score {score:g} of {name} is off the prompts' scale, {scale}")
        if not want and GENERAL not in self.trained:
            raise ConfigError("the model wasn't trained under the general prompt")

    def conversation(self, messages: Sequence[Message], want: Mapping[str, float]) -> list[Message]:
        """`messages`, which end with a user turn, under the prompt for the scores `want`; none: the general prompt.
        What several wanted dimensions become is said at `PromptStyle.wanted_text`. Raises ConfigError.
        """
        self.check(want)
        return self.style.place(self.style.wanted_text(self.dimensions, want), messages)
