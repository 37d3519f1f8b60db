"""Numbers, times and names as short text. What was not measured is "-" and never 0."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gradguard.records import StepOutcome

NOT_MEASURED = "-"


def number(value: float | None) -> str:
    """Return four significant digits, such as ``0.1234`` or ``1.2e-05``."""
    return NOT_MEASURED if value is None else f"{value:.4g}"


def loss_scale(value: float | None) -> str:
    """Return a power of two as one, such as ``2^16``; any other number with four digits."""
    if value is None or not math.isfinite(value) or value < 2.0:
        return number(value)
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else number(value)


def percent(share: float | None) -> str:
    """Return a share of one in per cent, such as ``0.42 %``."""
    return NOT_MEASURED if share is None else f"{100 * share:.3g} %"


def duration(seconds: float | None) -> str:
    """Return a time in at most two units, such as ``3 min 07 s``."""
    if seconds is None:
        return NOT_MEASURED
    if not math.isfinite(seconds) or seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def outcome(value: StepOutcome) -> str:
    """Return an outcome in small letters, such as ``skipped by scaler``."""
    return value.value.lower().replace("_", " ")


def one_line(text: str) -> str:
    """Return text of the user's, such as a parameter's name, without line breaks and controls."""
    joined = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in joined)


def spread(values: Iterable[float]) -> str:
    """Return smallest, middle and largest finite value, and how many others there are."""
    known = list(values)
    finite = [value for value in known if math.isfinite(value)]
    if not known:
        return NOT_MEASURED
    others = f"{len(known) - len(finite)} non-finite"
    if not finite:
        return others
    three = (min(finite), statistics.median(finite), max(finite))
    shown = " / ".join(number(value) for value in three)
    return shown if len(finite) == len(known) else f"{shown} and {others}"


def fall(first: float | None, last: float | None) -> str:
    """Return from where to where a loss went and by how much of the first value it fell."""
    if first is None or last is None:
        return NOT_MEASURED
    path = f"{number(first)} -> {number(last)}"
    if not (math.isfinite(first) and math.isfinite(last)) or first <= 0.0:
        return path
    verb = "rose" if last > first else "fell"
    return f"{path} ({verb} {100 * abs(1 - last / first):.1f} %)"
