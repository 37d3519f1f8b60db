"""Step or skip, as a table: the rows of all policies of a gate, and what they say about one step.

Rows about NaN and Inf come before every threshold, because a comparison with NaN is False and a
threshold alone would call NaN healthy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.policies import Policy, Row
from gradguard.readings import Readings, stacked
from gradguard.records import GateDecision

LEFT_ALONE: tuple[Row, ...] = (
    Row(lambda r, _: r.had_gradient == 0, lambda *_: "no parameter has a gradient"),
    Row(lambda r, _: r.scaler_skips > 0, lambda *_: "the loss scaler skips this step"),
)
"""The top of every decision table: there is nothing to veto, whatever the policies say."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the table says about one step, still on the device.

    Attributes:
        vetoed: 0-dim bool: the gate objects.
        allowed: 0-dim bool: the step is taken; False too when it is left alone.
        packed: 1-D: readings, rows and states; what :meth:`DecisionTable.verdict` explains.
    """

    vetoed: Tensor
    allowed: Tensor
    packed: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement on the host: the decision, the readings behind it, and whether it was left alone."""

    decision: GateDecision
    readings: Readings[float]

    @property
    def judged(self) -> bool:
        """Whether the policies had a say: there was a gradient and the scaler did not skip."""
        return self.readings.had_gradient > 0 and not self.readings.scaler_skips > 0


class DecisionTable:
    """The rows of all policies in reading order. The first row that holds decides; else allowed.

    ====================================  =========
    row                                   verdict
    ====================================  =========
    no parameter has a gradient           left alone
    the loss scaler skips this step       left alone
    rows about NaN and Inf                veto
    the other rows, in policy order       veto
    none of these                         allowed
    ====================================  =========
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = tuple(policies)
        rows = [(i, row) for i, policy in enumerate(policies) for row in policy.table()]
        self._rows = sorted(rows, key=lambda entry: not entry[1].on_nonfinite)

    def start(
        self, like: Tensor, *, values: Sequence[Sequence[float]] | None = None
    ) -> tuple[Tensor, ...]:
        """Return every policy's first state, with the dtype and device of ``like``. Sync: none.

        Args:
            like: any tensor.
            values: states to go on from; those of a new gate when None.
        """
        begun = [policy.start() for policy in self.policies] if values is None else values
        return tuple(_filled(state, like) for state in begun)

    def judge(self, readings: Readings[Tensor], states: Sequence[Tensor]) -> Judgement:
        """Return what the table says about these readings. Sync: none."""
        nothing = readings.norm.new_zeros(0)
        left_alone = torch.stack([row.holds(readings, nothing) for row in LEFT_ALONE]).any()
        flags = torch.stack([row.holds(readings, states[i]) for i, row in self._rows])
        objected = flags.any()
        packed = torch.cat((stacked(readings), flags.to(readings.norm.dtype), *states))
        return Judgement(objected & ~left_alone, ~objected & ~left_alone, packed)

    def learn(
        self, readings: Readings[Tensor], states: Sequence[Tensor], allowed: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the states after this step; what was not allowed teaches nothing. Sync: none."""
        return tuple(
            torch.where(allowed, policy.learn(readings, state), state) if len(state) else state
            for policy, state in zip(self.policies, states, strict=True)
        )

    def verdict(self, packed: Sequence[float]) -> Verdict:
        """Return the decision behind the values of :attr:`Judgement.packed`."""
        width = len(Readings._fields)
        readings = Readings[float](*packed[:width])
        flags = packed[width : width + len(self._rows)]
        verdict = Verdict(_decision(readings, allowed=True), readings)
        if not verdict.judged or not any(flags):
            return verdict
        index, row = self._rows[next(at for at, flag in enumerate(flags) if flag)]
        reason = row.reason(readings, self._state_of(index, packed[width + len(self._rows) :]))
        policy = self.policies[index].name
        return Verdict(_decision(readings, allowed=False, policy=policy, reason=reason), readings)

    def _state_of(self, index: int, states: Sequence[float]) -> Tensor:
        sizes = [len(policy.start()) for policy in self.policies]
        start = sum(sizes[:index])
        return torch.tensor(states[start : start + sizes[index]], dtype=torch.float64)


def _decision(
    readings: Readings[float],
    *,
    allowed: bool,
    policy: str | None = None,
    reason: str | None = None,
) -> GateDecision:
    return GateDecision(
        allowed=allowed,
        policy=policy,
        reason=reason,
        gradient_norm=readings.norm if readings.had_gradient else None,
        loss=readings.loss if readings.has_loss else None,
    )


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Return ``values`` on the device by filling: copying a list there would wait for it."""
    return torch.cat([like.new_zeros(0), *(like.new_full((1,), value) for value in values)])
