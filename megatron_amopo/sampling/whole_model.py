"""Models of a folder: with all their weights (transformers fills those that are missing with random numbers), and
whether they are still the ones of an earlier run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_amopo.errors import ConfigError

_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model")


def load_whole(auto_class: Any, folder: Path, named: str) -> Any:
    """The folder's model in the type of its weights, for computing only.

    Args:
        auto_class: of transformers.
        folder: of the model; nothing is fetched.
        named: how messages name the folder.

    Raises:
        ConfigError: transformers can't load it, or it lacks weights.
    """
    try:
        model, loaded = auto_class.from_pretrained(
            str(folder), dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{named}: transformers can't load it ({first_line(error)})") from error
    if invented := [*loaded["missing_keys"], *loaded["mismatched_keys"]]:
        raise ConfigError(f"{named}: it has no weights for {invented[0]}")
    return model.eval()


def first_line(error: Exception) -> str:
    """Of what transformers says, which is often a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def files_state(folder: Path) -> list[tuple[str, int, int]]:
    """What changes when other weights, or another tokenizer or template, lie in the folder: name, size and time of each
    file.
    """
    states = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix in _MODEL_FILES]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]
