"""Takes a few real training steps, looks at them from all sides, and puts everything back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from gradguard.diagnosis import Diagnosis
from gradguard.engine import diagnose
from gradguard.explain import CutReason, PathCut, as_facts, explain_paths, locate_nonfinite
from gradguard.facts import Plan
from gradguard.guard import Guard
from gradguard.norms import nonfinite_counts
from gradguard.paths import Reachability, reachable_parameters
from gradguard.records import PathState, StepOutcome, StepRecord
from gradguard.trials.finite_difference import GradientAgreement, compare_gradient
from gradguard.trials.modes import noting_eval
from gradguard.trials.onestep import StepFunction, UserStep, one_number, plain, sentence_of
from gradguard.trials.restoring import restored
from gradguard.watching import watch

_MOST_STEPS = 3
"""A zero-initialised layer keeps those before it still until it has moved itself."""

_MOST_ATTEMPTS = 40
"""A loss scale of 2^40 can be halved so often before it is 1."""

_LEFT_OUT = ("zero-gradient-path",)
"""Rules that take a few steps on one batch for more than they are; "motion" asks this more carefully."""

_Result = TypeVar("_Result")
Held = Mapping[str, object]


@dataclass(slots=True, kw_only=True)
class Trial:
    """What was seen; every field left None was not looked at.

    Attributes:
        error: what went wrong while the steps were taken, as a sentence.
        completes: whether ``step_fn`` takes the optimizer step itself.
        losses: loss of every attempt, where there was one.
        records: of every attempt.
        reach: what the loss reaches, by its graph.
        cuts: why it does not reach the others; ``cut_error`` when that could not be found out.
        in_eval: kinds of the layers that ran in eval mode, by name.
        nonfinite_before: parameters that hold NaN or Inf before any step.
        nonfinite_after: parameters and buffers that hold some only after the steps.
        origin: where the first NaN or Inf is born, as a sentence.
        agreement: of the gradient with finite differences; ``gradient_error`` when that failed.
        truth: loss at the truth; ``truth_error`` when that failed.
        diagnosis: what the rules say.
    """

    error: str | None = None
    completes: bool | None = None
    losses: list[float] = field(default_factory=list)
    records: tuple[StepRecord, ...] = ()
    reach: Reachability | None = None
    cuts: tuple[PathCut, ...] = ()
    cut_error: str | None = None
    in_eval: Mapping[str, str] = field(default_factory=dict)
    nonfinite_before: tuple[str, ...] = ()
    nonfinite_after: tuple[str, ...] = ()
    origin: str | None = None
    agreement: GradientAgreement | None = None
    gradient_error: str | None = None
    truth: float | None = None
    truth_error: str | None = None
    diagnosis: Diagnosis | None = None

    @property
    def taken(self) -> tuple[StepRecord, ...]:
        """The attempts that the loss scaler did not skip."""
        return tuple(r for r in self.records if r.outcome is not StepOutcome.SKIPPED_BY_SCALER)

    def states(self, name: str) -> set[PathState]:
        """Return what the backward passes left for a parameter, over the attempts that were taken."""
        return {one.path for r in self.taken for one in r.parameters or () if one.name == name}

    def gradient_of(self, name: str | None) -> float:
        """Return the largest gradient norm of a parameter, or of all together for None; 0 for none."""
        norms = [
            one.gradient_norm
            for r in self.taken
            for one in r.parameters or ()
            if name is not None and one.name == name
        ]
        if name is None:
            norms = [r.gradient_norm for r in self.taken]
        return max((norm for norm in norms if norm is not None), default=0.0)

    def moved(self, name: str) -> bool:
        """Whether any attempt moved a parameter."""
        return any(
            one.drift is not None and one.drift.moved_fraction > 0.0
            for r in self.taken
            for one in r.parameters or ()
            if one.name == name
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is tried out: the user's model, optimizers, scaler, step and plan."""

    model: nn.Module
    optimizers: Held
    step_fn: StepFunction
    scaler: GradScaler | None
    plan: Plan | None
    schedulers: Sequence[LRScheduler] = ()

    def restored(self) -> AbstractContextManager[None]:
        """Open a block after which everything is as before."""
        return restored(self.model, self.optimizers, self.scaler, self.schedulers)


def run_trial(
    subject: Subject,
    held: Sequence[str],
    *,
    truth: Callable[[], object] | None,
    gradient: bool,
) -> Trial:
    """Take the steps and look; everything is as before when this returns or raises.

    Args:
        subject: what is tried out.
        held: names of the trainable parameters that an optimizer holds.
        truth: computes the loss at the truth.
        gradient: whether to compare the gradient with finite differences.

    Sync: waits for the device.
    """
    trial = Trial(nonfinite_before=_nonfinite(subject.model.named_parameters()))
    with subject.restored():
        guard = _take_steps(trial, subject, held)
        _explain(trial, subject, guard)
        if trial.records:
            trial.diagnosis = diagnose(guard.log, ignore=_LEFT_OUT)
        if gradient:
            _compare(trial, subject)
        if truth is not None:
            trial.truth, trial.truth_error = _tried(lambda: _loss_at(truth), subject)
    return trial


def _take_steps(trial: Trial, subject: Subject, held: Sequence[str]) -> Guard:
    """Take steps under watch, until everything that should has moved, and go back."""
    model = subject.model
    with subject.restored():
        before = _nonfinite((*model.named_parameters(), *model.named_buffers()))
        watched = watch(
            model,
            subject.optimizers,
            scaler=subject.scaler,
            drift="exact",
            detail_every=1,
            plan=subject.plan,
        )
        with watched as guard, noting_eval(model) as trial.in_eval:
            step = UserStep(
                subject.step_fn, model, subject.optimizers, scaler=subject.scaler, guard=guard
            )
            try:
                _step_until_moved(trial, step, guard, subject, held)
            except Exception as error:  # noqa: BLE001 (the user's code: becomes a failed check)
                trial.error = sentence_of(error)
            _look_at_graph(trial, step, subject)
            trial.completes = step.completes
        after = _nonfinite((*model.named_parameters(), *model.named_buffers()))
        trial.nonfinite_after = tuple(name for name in after if name not in before)
        trial.records = tuple(guard.log)
    return guard


def _step_until_moved(
    trial: Trial, step: UserStep, guard: Guard, subject: Subject, held: Sequence[str]
) -> None:
    for _ in range(_MOST_ATTEMPTS):
        try:
            step.run()
        finally:
            if step.loss is not None:
                trial.losses.append(plain(step.loss))
        guard.flush()
        trial.records = tuple(guard.log)
        rounds = len(trial.taken) / len(subject.optimizers)
        still = [name for name in held if not trial.moved(name)]
        ended = bool(trial.losses) and not math.isfinite(trial.losses[-1])
        if ended or rounds >= _MOST_STEPS or (rounds >= 1 and not still):
            return


def _look_at_graph(trial: Trial, step: UserStep, subject: Subject) -> None:
    if isinstance(step.loss, Tensor) and step.loss.requires_grad:
        trial.reach = reachable_parameters(step.loss, subject.model)


def _explain(trial: Trial, subject: Subject, guard: Guard) -> None:
    """Say where paths are cut and NaN is born, and let the rules know; the model is as before."""
    if trial.completes:
        return  # the callable would step while it is looked at
    if _misses_some(trial, subject):
        cuts, trial.cut_error = _tried(
            lambda: explain_paths(_loss_of(subject), subject.model), subject
        )
        trial.cuts = tuple(one for one in cuts or () if one.reason is not CutReason.FROZEN)
        for fact in as_facts(0, trial.cuts):
            guard.add_fact(fact)
    if _meets_nonfinite(trial):
        found, _ = _tried(lambda: locate_nonfinite(_loss_of(subject), subject.model), subject)
        if found is not None:
            trial.origin = str(found)
            for fact in as_facts(0, (found,)):
                guard.add_fact(fact)


def _misses_some(trial: Trial, subject: Subject) -> bool:
    """Whether the graph or the backward passes leave out a trainable parameter, as far as is known."""
    if trial.reach is None or trial.reach.unreached:
        return True
    names = [name for name, p in subject.model.named_parameters() if p.requires_grad]
    return any(trial.states(name) == {PathState.NO_GRADIENT} for name in names)


def _meets_nonfinite(trial: Trial) -> bool:
    """Whether a loss or a gradient is not finite, at every loss scale if there is one."""
    if not all(map(math.isfinite, trial.losses)):
        return True
    tried = trial.taken or trial.records
    return any(record.nonfinite_tensors or not trial.taken for record in tried)


def _compare(trial: Trial, subject: Subject) -> None:
    """Compare the gradient with finite differences, where that means something."""
    if trial.error is not None or trial.completes is not False:
        return
    autocast = next((r.window.autocast for r in trial.records if r.window is not None), None)
    if autocast is not None:
        trial.agreement = GradientAgreement(reason=f"the forward pass runs in {autocast}")
        return
    trial.agreement, trial.gradient_error = _tried(
        lambda: compare_gradient(_loss_of(subject), subject.model, subject.restored), subject
    )


def _tried(work: Callable[[], _Result], subject: Subject) -> tuple[_Result | None, str | None]:
    """Run the user's code once more and go back; return its result or its error as a sentence."""
    with subject.restored():
        try:
            return work(), None
        except Exception as error:  # noqa: BLE001 (the user's code: becomes part of the answer)
            return None, sentence_of(error)


def _loss_of(subject: Subject) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        returned = subject.step_fn()
        if not isinstance(returned, Tensor):
            raise TypeError(f"step_fn returned a {type(returned).__name__}, no tensor, this time")
        return returned

    return loss


def _loss_at(truth: Callable[[], object]) -> float:
    returned = truth()
    value = one_number(returned)
    if value is None:
        raise TypeError(f"truth returned a {type(returned).__name__}, expected one number")
    return plain(value)


def _nonfinite(named: object) -> tuple[str, ...]:
    """Return the names of the floating tensors with NaN or Inf."""
    pairs: list[tuple[str, Tensor]] = [
        (name, t)
        for name, t in dict(named).items()  # type: ignore[call-overload]
        if (t.is_floating_point() or t.is_complex()) and not t.is_meta
    ]
    if not pairs:
        return ()
    with torch.no_grad():
        counts = nonfinite_counts([t for _, t in pairs]).sum(0).tolist()
    return tuple(name for (name, _), count in zip(pairs, counts, strict=True) if count)
