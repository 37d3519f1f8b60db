"""Keeps what a step gate decided, and raises when it says no too often."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradguard.decision_table import Verdict
from gradguard.policies import Policy
from gradguard.records import GateDecision

_KEPT_DECISIONS = 1000


class GateCeilingError(RuntimeError):
    """A gate vetoed more steps than its ceilings allow: the run needs a look, not more skipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateCounts:
    """How often a gate said what.

    Attributes:
        attempts: steps the gate was asked about.
        allowed: of these, judged and taken.
        vetoed: judged and not taken.
        no_gradient: left alone because no parameter had a gradient.
        left_to_scaler: left alone because the loss scaler skips them by itself.
        unread: not read from the device yet.
        by_policy: vetoes per policy.
        abstained: steps a policy could not judge because the gate was not told the loss.
    """

    attempts: int
    allowed: int
    vetoed: int
    no_gradient: int
    left_to_scaler: int
    unread: int
    by_policy: Mapping[str, int]
    abstained: Mapping[str, int]


class VerdictBook:
    """The verdicts of one gate in order, counted, with its ceilings."""

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        max_consecutive: int,
        max_veto_rate: float,
        rate_window: int,
    ) -> None:
        if max_consecutive < 1 or rate_window < 1 or not 0 < max_veto_rate <= 1:
            raise ValueError(
                f"StepGate got max_consecutive={max_consecutive!r}, max_veto_rate={max_veto_rate!r}, "
                f"rate_window={rate_window!r}; expected at least 1, above 0 and at most 1, at least 1"
            )
        self._loss_policies = tuple(policy.name for policy in policies if policy.judges_loss)
        self._max_consecutive, self._max_veto_rate = max_consecutive, max_veto_rate
        self._window: deque[bool] = deque(maxlen=rate_window)
        self._kept: deque[GateDecision] = deque(maxlen=_KEPT_DECISIONS)
        self._tally: Counter[str] = Counter()
        self._by_policy: Counter[str] = Counter()
        self._abstained: Counter[str] = Counter()
        self._consecutive, self._entered = 0, 0
        self._ceiling: str | None = None

    def enter(self, verdict: Verdict, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Count one verdict; ``parameters`` are those that had a gradient, to name a bad one."""
        decision = _naming_the_parameter(verdict, optimizer, parameters)
        self._kept.append(decision)
        self._entered += 1
        self._tally[_kind_of(verdict)] += 1
        if not verdict.judged:
            return
        if not verdict.readings.has_loss:
            self._abstained.update(self._loss_policies)
        self._window.append(not decision.allowed)
        self._consecutive = 0 if decision.allowed else self._consecutive + 1
        if not decision.allowed:
            self._by_policy[str(decision.policy)] += 1
            self._check_ceilings(decision)

    def _check_ceilings(self, decision: GateDecision) -> None:
        vetoes, window = sum(self._window), self._window.maxlen or 1
        seen = None
        if self._consecutive > self._max_consecutive:
            seen = f"{self._consecutive} in a row (max_consecutive={self._max_consecutive})"
        elif vetoes > self._max_veto_rate * window:
            seen = f"{vetoes} of the last {len(self._window)} "
            seen += f"(max_veto_rate={self._max_veto_rate:g} of rate_window={window})"
        if seen is not None:
            self._ceiling = (
                f"StepGate vetoed too many optimizer steps: {seen}; the last one by {decision.policy}: "
                f"{decision.reason}. Look for the cause there, or raise the ceiling if it is meant"
            )

    def raise_if_ceiling_passed(self) -> None:
        """Raise GateCeilingError, once for every veto beyond a ceiling."""
        ceiling, self._ceiling = self._ceiling, None
        if ceiling is not None:
            raise GateCeilingError(ceiling)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and what the ceilings look at, as plain values; not the decisions."""
        return {
            "window": list(self._window),
            "consecutive": self._consecutive,
            "entered": self._entered,
            "tally": dict(self._tally),
            "by_policy": dict(self._by_policy),
            "abstained": dict(self._abstained),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; decisions from before are not kept."""
        self._window.clear()
        self._window.extend(state["window"])
        self._consecutive, self._entered = state["consecutive"], state["entered"]
        self._tally = Counter(state["tally"])
        self._by_policy = Counter(state["by_policy"])
        self._abstained = Counter(state["abstained"])
        self._kept.clear()
        self._ceiling = None

    @property
    def last(self) -> GateDecision | None:
        """The newest decision."""
        return self._kept[-1] if self._kept else None

    @property
    def decisions(self) -> tuple[GateDecision, ...]:
        """The newest decisions, oldest first."""
        return tuple(self._kept)

    def decision(self, attempt: int) -> GateDecision | None:
        """Return the decision about attempt number ``attempt``; None if not entered or dropped."""
        index = attempt - (self._entered - len(self._kept))
        return self._kept[index] if 0 <= index < len(self._kept) else None

    def counts(self, attempts: int) -> GateCounts:
        """Return the counts as a value that does not change any more."""
        return GateCounts(
            attempts=attempts,
            allowed=self._tally["allowed"],
            vetoed=self._tally["vetoed"],
            no_gradient=self._tally["no_gradient"],
            left_to_scaler=self._tally["left_to_scaler"],
            unread=attempts - self._entered,
            by_policy=MappingProxyType(dict(self._by_policy)),
            abstained=MappingProxyType(dict(self._abstained)),
        )


def _kind_of(verdict: Verdict) -> str:
    if not verdict.readings.had_gradient:
        return "no_gradient"
    if not verdict.judged:
        return "left_to_scaler"
    return "allowed" if verdict.decision.allowed else "vetoed"


def _naming_the_parameter(
    verdict: Verdict, optimizer: Optimizer, parameters: Sequence[Tensor]
) -> GateDecision:
    decision, position = verdict.decision, int(verdict.readings.first_nonfinite)
    known = verdict.readings.nonfinite_tensors > 0 and position < len(parameters)
    if decision.allowed or not known:
        return decision
    where = _name_of(parameters[position], optimizer)
    return replace(decision, reason=f"{decision.reason}, first in {where}")


def _name_of(parameter: Tensor, optimizer: Optimizer) -> str:
    shape = tuple(parameter.shape)
    for number, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter and "param_names" in group:
                return f"{group['param_names'][index]!r} of shape {shape}"
            if candidate is parameter:
                return f"parameter {index} of group {number}, of shape {shape}"
    return f"a parameter of shape {shape}"  # its group was edited since
