"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` beside its place and rename it: whoever opens ``path`` finds the old content or the new one.

    Its folder must be there: a mistyped one isn't made. Two processes must not write the same file at once.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
