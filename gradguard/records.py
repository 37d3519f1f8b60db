"""What one optimizer step looked like, as plain values.

This module imports no torch: a saved run can be read and judged on any machine. Everything here is a
frozen value; "not measured" is ``None`` and never ``0.0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

SCHEMA_VERSION = 1
"""Version of the layout of :class:`StepRecord` on disk; it grows when a field changes its meaning."""


class StepOutcome(StrEnum):
    """What became of one call that a user would call "a step"; see :data:`OUTCOME_TABLE`."""

    APPLIED = "APPLIED"
    SKIPPED_BY_SCALER = "SKIPPED_BY_SCALER"
    VETOED = "VETOED"
    NO_GRADIENT = "NO_GRADIENT"
    NO_MOTION = "NO_MOTION"
    CORRUPTED = "CORRUPTED"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvidence:
    """The readings that decide the outcome of one attempted optimizer step.

    Attributes:
        found_inf: GradScaler's flag for this optimizer; None without an active scaler. It counts
            devices, so any value above 0 means that a non-finite gradient was seen.
        vetoed: whether a gate said no.
        had_gradient: whether any parameter had a gradient when the step was attempted.
        wrote_nonfinite: whether the step left NaN or Inf in a parameter; None when not measured.
        moved_fraction: share of (sampled) values that changed; None when not measured.
    """

    found_inf: float | None
    vetoed: bool
    had_gradient: bool
    wrote_nonfinite: bool | None
    moved_fraction: float | None


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """One row of :data:`OUTCOME_TABLE`."""

    outcome: StepOutcome
    meaning: str
    holds: Callable[[StepEvidence], bool]


def _scaler_saw_nonfinite(evidence: StepEvidence) -> bool:
    flag = evidence.found_inf
    return flag is not None and (math.isnan(flag) or flag > 0)


OUTCOME_TABLE: tuple[OutcomeRow, ...] = (
    OutcomeRow(
        StepOutcome.SKIPPED_BY_SCALER,
        "GradScaler saw a non-finite gradient",
        _scaler_saw_nonfinite,
    ),
    OutcomeRow(StepOutcome.VETOED, "our gate said no", lambda e: e.vetoed),
    OutcomeRow(
        StepOutcome.NO_GRADIENT,
        "the step ran and no parameter had a gradient",
        lambda e: not e.had_gradient,
    ),
    OutcomeRow(
        StepOutcome.CORRUPTED,
        "the step ran and wrote NaN or Inf into a parameter",
        lambda e: e.wrote_nonfinite is True,
    ),
    OutcomeRow(
        StepOutcome.NO_MOTION,
        "the step ran on gradients and nothing moved",
        lambda e: e.moved_fraction == 0.0,
    ),
    OutcomeRow(StepOutcome.APPLIED, "the update was made", lambda _: True),
)
"""The heart of the library: the first row that holds is the outcome. Order matters."""


def judge(evidence: StepEvidence) -> StepOutcome:
    """Return the outcome of the first row of :data:`OUTCOME_TABLE` that holds."""
    return next(row.outcome for row in OUTCOME_TABLE if row.holds(evidence))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerState:
    """The state of one optimizer on one GradScaler at one moment.

    Attributes:
        enabled: False for ``GradScaler(enabled=False)``; every other field is None then.
        stage: ``"ready"``, ``"unscaled"`` or ``"stepped"``: how far this optimizer is in the iteration.
        loss_scale: the current loss scale; None before the first ``scaler.scale()``.
        found_inf: None until the gradients were checked in this iteration.
        growth_tracker: good steps since the last change of the scale.
    """

    enabled: bool
    stage: str | None = None
    loss_scale: float | None = None
    found_inf: float | None = None
    growth_tracker: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GateDecision:
    """One verdict of a step gate, with its reason.

    Attributes:
        allowed: whether the step may be taken.
        policy: name of the policy that vetoed; None for an allowed step.
        reason: one sentence with the reading and the limit; None for an allowed step.
        gradient_norm: unscaled global gradient norm that was judged, over all groups.
        loss: loss that was judged; None when the gate was not told one.
    """

    allowed: bool
    policy: str | None = None
    reason: str | None = None
    gradient_norm: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far one optimizer step moved a parameter, a group or everything watched.

    Attributes:
        name: parameter or group name; ``"all"`` for the whole.
        update_norm: L2 norm of weights after minus before.
        weight_norm: L2 norm of the weights before the step.
        moved_fraction: share of the values whose bits changed (rounding of half precision shows here).
        sampled: number of values looked at.
        total: number of values there are; equal to ``sampled`` for an exact reading.
        relative_error: bound on one standard error of ``update_norm`` from sampling, relative; 0.0 when
            exact.
    """

    name: str
    update_norm: float
    weight_norm: float
    moved_fraction: float
    sampled: int
    total: int
    relative_error: float

    @property
    def exact(self) -> bool:
        """Whether every value was looked at."""
        return self.sampled == self.total

    @property
    def update_to_weight(self) -> float | None:
        """Norm of the update over norm of the weight; None for an all-zero weight."""
        return None if self.weight_norm == 0.0 else self.update_norm / self.weight_norm


class PathState(StrEnum):
    """What a backward pass left in ``.grad`` of one parameter."""

    NO_GRADIENT = "no gradient"
    ZERO = "exactly zero"
    NONFINITE = "non-finite"
    LIVE = "live"


@dataclass(frozen=True, slots=True, kw_only=True)
class PathReading:
    """Whether a gradient arrived at one parameter; norm is None where there is no gradient."""

    name: str
    state: PathState
    gradient_norm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterReading:
    """One parameter on a detailed step: its gradient and its movement.

    Attributes:
        name: of the parameter.
        path: what the backward left.
        gradient_norm: L2 norm of its gradient, unscaled; None without one.
        drift: its movement; None when not measured.
    """

    name: str
    path: PathState
    gradient_norm: float | None
    drift: Drift | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReading:
    """What happened between the previous attempt of an optimizer and this one.

    "Sampled gradient" stands for a few values of up to three parameters (first, middle, last of the
    optimizer that take part), read after every backward pass and again at the step.

    Attributes:
        forwards: forward passes of the model that recorded a graph.
        forwards_reached: of these, those whose output a backward pass reached.
        forwards_in_eval: of ``forwards``, those with the model in eval mode.
        forwards_without_grad: forward passes that recorded no graph.
        without_grad_in_train: of those, the ones with the model in train mode.
        samples: rows given to ``forwards``.
        samples_reached: rows whose output a backward pass reached.
        stale_backwards: times a backward pass reached the output of a forward pass of an earlier window.
        autocast: dtype of autocast in the last training forward, such as ``"float16"``; None without.
        scaler_updates: calls of ``scaler.update()``, this attempt's own included.
        scaler_strays: entries of the scaler's table that belong to no optimizer, before the update.
        fresh_micro_steps: micro-steps that began with an empty or all-zero sampled gradient.
        carried_norm: norm of the sampled gradient before the first micro-step; 0.0 for an empty one.
        backward_norm: norm of the sampled gradient after the last micro-step, loss scale divided out.
        step_norm: norm of the same values at the step, loss scale divided out.
        backward_nonfinite: whether the sampled gradient was not finite after a micro-step.
        loss_weight: derivative of what was differentiated with respect to the observed loss, loss scale divided
            out, mean over micro-steps; 0.0 when the backward passes did not reach it.
        reported_weight: likewise for the reported loss.
        term_weights: likewise for every term.
        without_gradient: trainable parameters of this optimizer that had no gradient at the step.
        never_gradient: those that had none in any attempt so far.
        uncalled: of those, the ones whose module was never called in a forward so far; None when not known.
        state_entries: parameters that the optimizer held state for when the step began.
        state_left: the same when the previous attempt ended; None before the first one.
        scheduler_steps: ``last_epoch`` of every scheduler of this optimizer when the step began.
    """

    forwards: int | None = None
    forwards_reached: int | None = None
    forwards_in_eval: int | None = None
    forwards_without_grad: int | None = None
    without_grad_in_train: int | None = None
    samples: int | None = None
    samples_reached: int | None = None
    stale_backwards: int | None = None
    autocast: str | None = None
    scaler_updates: int | None = None
    scaler_strays: int | None = None
    fresh_micro_steps: int | None = None
    carried_norm: float | None = None
    backward_norm: float | None = None
    step_norm: float | None = None
    backward_nonfinite: bool | None = None
    loss_weight: float | None = None
    reported_weight: float | None = None
    term_weights: Mapping[str, float] = field(default_factory=dict)
    without_gradient: int | None = None
    never_gradient: tuple[str, ...] | None = None
    uncalled: tuple[str, ...] | None = None
    state_entries: int | None = None
    state_left: int | None = None
    scheduler_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """Everything known about one attempted optimizer step.

    Attributes:
        step: number of the attempt for this optimizer, from 0.
        optimizer: the name the optimizer was watched under.
        outcome: what became of it; exactly one per attempt.
        reason: why a gate vetoed it; None otherwise.
        micro_steps: backward passes that reached this optimizer's parameters since its last step.
        batches: batches drawn from a loader wrapped by ``guard.batches`` since the last step.
        loss: mean of the optimised loss over the window, as given to ``guard.observe``.
        reported_loss: mean of the loss the trainer reports, as given to ``guard.observe``.
        terms: mean of every named loss term, as given to ``guard.observe``.
        loss_scale_before: loss scale of this step; None without an active scaler.
        loss_scale_after: loss scale after ``scaler.update()``.
        found_inf: GradScaler's flag for this optimizer.
        gradient_norm: unscaled global gradient norm the step was taken with (after clipping).
        gradient_norm_before_clipping: as given to ``guard.observe``.
        nonfinite_tensors: number of gradient tensors whose norm is not finite.
        first_nonfinite: name of the first such parameter.
        nan_count: NaN entries in all gradients; counted on the steps where something is wrong.
        inf_count: likewise for Inf.
        drift: movement of all parameters; None when the step did not run or drift is off.
        groups: movement per parameter group, in the optimizer's order.
        parameters: one reading per parameter on detailed steps, else None.
        learning_rates: learning rate per parameter group at the time of the step.
        averaged_lag: norm of averaged minus live weights over norm of live weights, before the step.
        window: what happened since the previous attempt; None when no sensor was on.
        wall_s: seconds since the previous attempt of this optimizer ended; None for the first.
        guard_s: seconds of host time the guard spent on this step.
        ended_unix_s: when the step ended, in seconds since 1970.
    """

    step: int
    optimizer: str
    outcome: StepOutcome
    reason: str | None = None
    micro_steps: int | None = None
    batches: int | None = None
    loss: float | None = None
    reported_loss: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    loss_scale_before: float | None = None
    loss_scale_after: float | None = None
    found_inf: float | None = None
    gradient_norm: float | None = None
    gradient_norm_before_clipping: float | None = None
    nonfinite_tensors: int | None = None
    first_nonfinite: str | None = None
    nan_count: int | None = None
    inf_count: int | None = None
    drift: Drift | None = None
    groups: tuple[Drift, ...] = ()
    parameters: tuple[ParameterReading, ...] | None = None
    learning_rates: tuple[float, ...] = ()
    averaged_lag: float | None = None
    window: WindowReading | None = None
    wall_s: float | None = None
    guard_s: float | None = None
    ended_unix_s: float | None = None
