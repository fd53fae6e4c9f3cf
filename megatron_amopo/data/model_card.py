"""How a model card of ours is told from one of others: reports write it, conversions may replace it."""

from pathlib import Path

CARD = "README.md"
CARD_MARK = "<!-- written by tools/report.py of megatron-amopo -->"


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that `tools/report.py` wrote. Raises OSError."""
    return path.name == CARD and path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")
