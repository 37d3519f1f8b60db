"""How gradients change with depth: shared by the rules on vanishing and exploding ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from gradguard.evidence import Evidence
from gradguard.records import ParameterReading, PathState, StepRecord

SAME = 1.5
"""A neighbour's gradient may be this many times on the wrong side and still follow the trend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope:
    """Root mean square of the gradient of the first and the last weight matrix on one detailed step."""

    step: int
    first_name: str
    last_name: str
    first: float
    last: float
    matrices: int

    @property
    def ratio(self) -> float:
        """First over last: small for vanishing, large for exploding gradients."""
        return self.first / self.last


def slopes(run: Evidence, *, matrices: int) -> Iterator[Slope]:
    """Yield the slope of every detailed step whose gradients rise or fall steadily with depth.

    The order of parameters stands for depth. Tables (Embedding) are left out: most of their rows have no
    gradient in any one batch. So are weights that were all zero at attach, and their gradients' neighbours
    decide: where the rest does not follow the trend, nothing is yielded.
    """
    sizes = {
        name: math.prod(one.shape)
        for name, one in run.parameters.items()
        if len(one.shape) >= 2
        and one.trainable
        and "Embedding" not in one.module_kind
        and one.zero_fraction != 1.0
    }
    if len(sizes) < matrices:
        return
    for record in run.detailed:
        slope = _slope(record, sizes, matrices)
        if slope is not None:
            yield slope


def _slope(record: StepRecord, sizes: dict[str, int], matrices: int) -> Slope | None:
    live = [
        (one.name, level / math.sqrt(sizes[one.name]))
        for one in record.parameters or ()
        if one.name in sizes and (level := _level(one)) is not None
    ]
    if len(live) < matrices:
        return None
    levels = [level for _, level in live]
    if not _steady(levels):
        return None
    return Slope(
        step=record.step,
        first_name=live[0][0],
        last_name=live[-1][0],
        first=levels[0],
        last=levels[-1],
        matrices=len(live),
    )


def _level(one: ParameterReading) -> float | None:
    norm = one.gradient_norm
    usable = one.path is PathState.LIVE and norm is not None and math.isfinite(norm) and norm > 0
    return norm if usable else None


def _steady(levels: list[float]) -> bool:
    """Whether nearly all neighbours rise, or nearly all fall: one in four may go the other way."""
    rising = levels[-1] >= levels[0]
    against = sum(
        (here > SAME * there) if rising else (there > SAME * here)
        for here, there in pairwise(levels)
    )
    return 4 * against <= len(levels) - 1
