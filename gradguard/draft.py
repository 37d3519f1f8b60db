"""One optimizer step while it is being measured: host values now, device values a few steps later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gradguard.drift import DriftLayout, DriftReport
from gradguard.paths import path_state
from gradguard.records import (
    GateDecision,
    ParameterReading,
    PathState,
    StepEvidence,
    StepRecord,
    judge,
)
from gradguard.window import Window
from gradguard.window_reading import window_reading

Values = Mapping[str, Sequence[float]]


@dataclass(slots=True)
class Draft:
    """Collects one attempt; :meth:`pack` sends the device part away, :meth:`record` makes the record.

    Attributes:
        names: names of the optimizer's parameters, in its order.
        with_gradient: positions in ``names`` of the parameters that had a gradient.
        ran: whether the optimizer's ``step`` was entered and returned.
        decision_of: asks the gate for its verdict on this step; None while it is on the device.
        activity: host values of the :class:`WindowReading`, by field.
        tensors: device values by field, of any shape; they must not change any more.
        shared_error: how far the norms of a clipping were from ours, where both were read.
    """

    step: int
    optimizer: str
    names: Sequence[str]
    detailed: bool
    learning_rates: list[float | Tensor]
    window: Window
    with_gradient: list[int] = field(default_factory=list)
    ran: bool = False
    decision_of: Callable[[], GateDecision | None] = lambda: None
    drift_layout: DriftLayout | None = None
    micro_steps: int | None = None
    wall_s: float | None = None
    guard_s: float = 0.0
    ended_unix_s: float | None = None
    tensors: dict[str, Sequence[Tensor]] = field(default_factory=dict)
    layout: list[tuple[str, int]] = field(default_factory=list)
    activity: dict[str, Any] = field(default_factory=dict)
    shared_error: float | None = None

    def put(self, field_name: str, value: Tensor | None) -> None:
        """Add device values under a field name; None is "not measured"."""
        if value is not None:
            self.tensors[field_name] = (value,)

    def pack(self) -> list[Tensor]:
        """Return all device values in one list and remember where each lies. Sync: none."""
        for key, mean in self.window.means.items():
            value = mean.value()
            if isinstance(value, Tensor):
                self.put(f"mean:{key}", value)
        for key, mean in self.window.weights.items():
            value = mean.value()
            if isinstance(value, Tensor):
                self.put(f"weight:{key}", value)
        for index, rate in enumerate(self.learning_rates):
            if isinstance(rate, Tensor):
                self.put(f"rate:{index}", rate.detach().clone())  # a scheduler writes over it
        fields = self.tensors.items()
        self.layout = [(name, sum(map(Tensor.numel, values))) for name, values in fields]
        pieces = [piece for values in self.tensors.values() for piece in values]
        self.tensors = {}
        return pieces

    def unpack(self, values: Sequence[float]) -> Values:
        """Return the values of :meth:`pack`, back on the host, by field name."""
        found: dict[str, Sequence[float]] = {}
        start = 0
        for name, size in self.layout:
            found[name] = values[start : start + size]
            start += size
        return found

    def record(self, values: Sequence[float], has_nonfinite: Callable[[], bool]) -> StepRecord:
        """Return the record of this attempt.

        Args:
            values: what :meth:`pack` packed.
            has_nonfinite: looks for NaN and Inf in the parameters; called only when a step ran on a
                gradient that was not finite and the sampled movement does not settle the question.
        """
        found = self.unpack(values)
        self.shared_error = _one(found, "shared_error")
        norms = found.get("norms", ())
        total = math.hypot(*norms) if norms else None
        broken = self._broken(norms, total)
        report = self._drift(found)
        decision = self._verdict(found)
        nan_count, inf_count = self._counts(found, all_finite=bool(norms) and not broken)
        evidence = self._evidence(found, report, decision, has_nonfinite if broken else None)
        return StepRecord(
            step=self.step,
            optimizer=self.optimizer,
            outcome=judge(evidence),
            reason=None if decision is None else decision.reason,
            micro_steps=self.micro_steps,
            batches=self.window.batches,
            loss=self._mean("loss", found),
            reported_loss=self._mean("reported_loss", found),
            terms=self._terms(found),
            loss_scale_before=_one(found, "scale_before"),
            loss_scale_after=_one(found, "scale_after"),
            found_inf=evidence.found_inf,
            gradient_norm=total,
            gradient_norm_before_clipping=self._mean("gradient_norm", found),
            nonfinite_tensors=len(broken) if norms else None,
            first_nonfinite=self.names[broken[0]] if broken else None,
            nan_count=nan_count,
            inf_count=inf_count,
            drift=None if report is None else report.overall,
            groups=() if report is None else report.groups,
            parameters=self._parameters(found, norms, report),
            learning_rates=tuple(
                _one(found, f"rate:{i}") or 0.0 if isinstance(rate, Tensor) else rate
                for i, rate in enumerate(self.learning_rates)
            ),
            averaged_lag=_lag(found.get("averaged")),
            window=window_reading(self.activity, found, self.window.hooked),
            wall_s=self.wall_s,
            guard_s=self.guard_s,
            ended_unix_s=self.ended_unix_s,
        )

    def _broken(self, norms: Sequence[float], total: float | None) -> list[int]:
        """Return the positions of the gradients whose norm is not finite."""
        if total is None or _finite(total):
            return []
        return [i for i, norm in zip(self.with_gradient, norms, strict=True) if not _finite(norm)]

    def _drift(self, found: Values) -> DriftReport | None:
        sums = found.get("drift")
        if sums is None or self.drift_layout is None:
            return None
        return self.drift_layout.report(sums, detailed=self.detailed)

    def _verdict(self, found: Values) -> GateDecision | None:
        decision = self.decision_of()
        if decision is None and _one(found, "veto"):
            return GateDecision(
                allowed=False, reason="vetoed on the device; the gate has the reason"
            )
        return decision

    def _counts(self, found: Values, *, all_finite: bool) -> tuple[int | None, int | None]:
        counts = found.get("counts")
        if counts is not None:
            half = len(counts) // 2
            return int(sum(counts[:half])), int(sum(counts[half:]))
        return (0, 0) if all_finite else (None, None)

    def _evidence(
        self,
        found: Values,
        report: DriftReport | None,
        decision: GateDecision | None,
        has_nonfinite: Callable[[], bool] | None,
    ) -> StepEvidence:
        found_inf = _one(found, "found_inf")
        vetoed = decision is not None and not decision.allowed
        wrote_nonfinite: bool | None = None
        if self.ran and not vetoed and not found_inf:
            sample_is_broken = report is not None and not _finite(report.overall.update_norm)
            wrote_nonfinite = sample_is_broken or (has_nonfinite is not None and has_nonfinite())
        return StepEvidence(
            found_inf=found_inf,
            vetoed=vetoed,
            had_gradient=bool(self.with_gradient),
            wrote_nonfinite=wrote_nonfinite,
            moved_fraction=None if report is None else report.overall.moved_fraction,
        )

    def _mean(self, key: str, found: Values) -> float | None:
        if key not in self.window.means:
            return None
        value = self.window.means[key].value()
        return _one(found, f"mean:{key}") if isinstance(value, Tensor) else value

    def _terms(self, found: Values) -> dict[str, float]:
        names = [key for key in self.window.means if key.startswith("term:")]
        pairs = ((key.removeprefix("term:"), self._mean(key, found)) for key in names)
        return {name: value for name, value in pairs if value is not None}

    def _parameters(
        self, found: Values, norms: Sequence[float], report: DriftReport | None
    ) -> tuple[ParameterReading, ...] | None:
        sums = found.get("paths")
        if not self.detailed or sums is None:
            return None
        norm_of = dict(zip(self.with_gradient, norms, strict=True))
        sum_of = dict(zip(self.with_gradient, sums, strict=True))
        drifts = report.parameters if report is not None else ()
        return tuple(
            ParameterReading(
                name=name,
                path=path_state(sum_of[i]) if i in sum_of else PathState.NO_GRADIENT,
                gradient_norm=norm_of.get(i),
                drift=drifts[i] if drifts else None,
            )
            for i, name in enumerate(self.names)
        )


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _one(found: Values, field_name: str) -> float | None:
    values = found.get(field_name)
    return None if values is None else values[0]


def _lag(values: Sequence[float] | None) -> float | None:
    if values is None or values[1] == 0:
        return None
    return math.sqrt(values[0] / values[1])
