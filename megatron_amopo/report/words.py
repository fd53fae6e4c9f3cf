"""How figures are written in a report: numbers, changes, and the words for what a run computed."""

import math
from collections.abc import Mapping
from typing import Any

_LOSSES = {"simpo": "SimPO", "orpo": "ORPO", "dpo": "DPO", "ipo": "IPO", "sft": "SFT", "modpo": "MODPO"}
_Z = 1.959964  # of 95 %: the standard normal distribution's 0.975 quantile
_SYMBOLS = {"--amopo-beta": "β", "--amopo-gamma": "γ", "--amopo-label-smoothing": "ε"}


def number(value: float | None, form: str = ".4g") -> str:
    """A figure; a dash for one that isn't there."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    return format(value, form).replace("-", "−") if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def change(before: float | None, after: float | None, form: str) -> str:
    """'0.08 → 0.35', or the one figure that there is."""
    if before is None or after is None:
        return number(after if before is None else before, form)
    return f"{number(before, form)} → {number(after, form)}"


def percent(share: float | None, digits: int = 1) -> str:
    return number(None if share is None else 100 * share, f".{digits}f")


def wilson_interval(share: float | None, records: int | None) -> tuple[float, float] | None:
    """The 95 % interval of a share of ``records`` independent records: Wilson's score interval (Journal of the American
    Statistical Association 22 (1927), pages 209-212), which has a width at 0 and 1, too, and stays between them. None
    where the share or the number isn't known.
    """
    if share is None or not records or not 0 <= share <= 1:
        return None
    shrink = 1 + _Z**2 / records
    centre = (share + _Z**2 / (2 * records)) / shrink
    half = _Z * math.sqrt(share * (1 - share) / records + (_Z / (2 * records)) ** 2) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def objective_in_words(flags: Mapping[str, Any], dimensions: int) -> str:
    """What a run minimised, from the flags that it recorded."""
    pairwise = str(flags.get("--amopo-pairwise", "not recorded"))
    settings = [f"{symbol} {flags[flag]:g}" for flag, symbol in _SYMBOLS.items() if _is_number(flags.get(flag))]
    words = _LOSSES.get(pairwise, pairwise) + (f" ({', '.join(settings)})" if settings else "")
    if dimensions > 1 and "--amopo-weighting" in flags:
        weighting = flags["--amopo-weighting"]
        words = f"{'AMoPO over ' if weighting == 'gaussian' else ''}{words}, weights over dimensions: {weighting}"
    if flags.get("--amopo-ftx-gamma"):
        words += f", SFT term × {flags['--amopo-ftx-gamma']:g}"
    if flags.get("--amopo-margin-floor"):
        words += ", margin floors"
    return words


def as_text(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={as_text(one)}" for name, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(as_text(one) for one in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
