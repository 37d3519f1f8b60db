"""What a view keeps of the records it has seen: the newest one and counts, never the whole run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from gradguard.records import StepOutcome, StepRecord

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """One optimizer so far.

    Attributes:
        latest: its newest record.
        counts: number of attempts per outcome.
        wall_s: seconds from the end of the first step to the end of the newest; None before that.
        guard_s: seconds the guard took in that time; None when it did not say.
    """

    latest: StepRecord
    counts: Mapping[StepOutcome, int]
    wall_s: float | None
    guard_s: float | None

    @property
    def attempts(self) -> int:
        """How many steps were attempted."""
        return sum(self.counts.values())

    @property
    def guard_share(self) -> float | None:
        """The guard's share of the time; None while it is not known."""
        return self.guard_s / self.wall_s if self.guard_s is not None and self.wall_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewState:
    """What the panel shows: one tally per optimizer, and how many steps are expected in all."""

    tallies: Mapping[str, Tally] = field(default_factory=lambda: MappingProxyType({}))
    total_steps: int | None = None

    def after(self, record: StepRecord) -> ViewState:
        """Return the state with one more record."""
        tally = _count(self.tallies.get(record.optimizer), record)
        return replace(self, tallies={**self.tallies, record.optimizer: tally})

    @property
    def attempts(self) -> int:
        """How many steps were attempted, by all optimizers."""
        return sum(tally.attempts for tally in self.tallies.values())

    @property
    def remaining_s(self) -> float | None:
        """Seconds until ``total_steps`` at the pace so far; None while there is none."""
        longest_s = max((tally.wall_s or 0.0 for tally in self.tallies.values()), default=0.0)
        if self.total_steps is None or longest_s == 0.0:
            return None
        return longest_s / self.attempts * max(0, self.total_steps - self.attempts)


def _count(tally: Tally | None, record: StepRecord) -> Tally:
    counts = dict.fromkeys(StepOutcome, 0) if tally is None else dict(tally.counts)
    counts[record.outcome] += 1
    wall_s, guard_s = (None, None) if tally is None else (tally.wall_s, tally.guard_s)
    if record.wall_s is not None:  # the first step has no beginning, so its cost has no share
        wall_s, guard_s = _plus(wall_s, record.wall_s), _plus(guard_s, record.guard_s)
    return Tally(latest=record, counts=counts, wall_s=wall_s, guard_s=guard_s)


def _plus(total: float | None, more: float | None) -> float | None:
    return total if more is None else more + (total or 0.0)
