"""``overfit_check``: can this model memorise one small batch? The first question, as a call."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import nn
from torch.amp import GradScaler

from gradguard.checkup import OverfitReport
from gradguard.diagnosis import Diagnosis
from gradguard.preflight import checked_subject
from gradguard.trials.onestep import StepFunction, UserStep, plain, sentence_of
from gradguard.trials.restoring import restored, schedulers_of
from gradguard.watching import watch

_MOST_POINTS = 64
_FLAT = 0.01
"""Up to which share of the first loss a fall counts as none."""


def overfit_check(
    model: nn.Module,
    optimizer: object,
    step_fn: StepFunction,
    *,
    scaler: GradScaler | None = None,
    steps: int = 300,
    fall: float = 0.9,
    floor: float = 0.0,
    restore: bool = True,
) -> OverfitReport:
    """Train on one batch until the loss has fallen by a share of its way to the floor, or say why it has not.

    ::

        report = gg.overfit_check(model, optimizer, lambda: criterion(model(x), y))
        assert report.ok, report

    A model, loss and loop that cannot memorise a few samples cannot learn from many. Switch dropout,
    augmentation and weight decay off for a clear answer.

    Args:
        model: what is trained.
        optimizer: the optimizer, or a mapping from name to optimizer.
        step_fn: without arguments; runs one complete training step on the same batch every time and returns
            the loss, or returns the loss with its graph, and the rest of the step is done here.
        scaler: the ``GradScaler`` of the step.
        steps: how many steps to take at most.
        fall: share of the way from the first loss to ``floor`` that it has to go.
        floor: smallest loss that is possible, such as the entropy of smoothed labels.
        restore: put model, optimizer, schedulers, scaler and random state back, bit for bit; False to keep
            what was learnt.

    Returns:
        The losses, a verdict in a sentence, and on failure what the rules say of the run. A ``step_fn``
        that raises is a failure.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a number out of range, nothing to train, or a lazy module that was never run.

    Memory: with ``restore`` one copy of weights and optimizer state. Sync: waits for the device every step.
    """
    optimizers = checked_subject("overfit_check", model, optimizer, step_fn, scaler)
    _check_numbers(steps=steps, fall=fall, floor=floor)
    run = _Run(steps=steps, fall=fall, floor=floor)
    with ExitStack() as around:
        if restore:
            found = schedulers_of(optimizers)
            around.enter_context(restored(model, optimizers, scaler, found))
        guard = around.enter_context(watch(model, optimizers, scaler=scaler))
        step = UserStep(step_fn, model, optimizers, scaler=scaler, guard=guard)
        try:
            while not run.over:
                step.run()
                run.take(None if step.loss is None else plain(step.loss))
        except Exception as error:  # noqa: BLE001 (the user's code: becomes the verdict)
            run.error = sentence_of(error)
    return run.report(guard.diagnosis() if len(guard.log) else None)


@dataclass(slots=True, kw_only=True)
class _Run:
    """The losses so far, and what they say."""

    steps: int
    fall: float
    floor: float
    losses: list[float] = field(default_factory=list)
    taken: int = 0
    error: str | None = None

    def take(self, loss: float | None) -> None:
        """Take in the loss of one more step."""
        self.taken += 1
        if loss is not None:
            self.losses.append(loss)

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for."""
        if self.taken and (not self.losses or not math.isfinite(self.losses[-1])):
            return True
        return self.taken >= self.steps or self.passed or self._hopeless

    @property
    def passed(self) -> bool:
        """Whether the last loss is low enough."""
        if self.error is not None or not self.losses or self._hopeless:
            return False
        return self.losses[-1] <= self.target

    @property
    def target(self) -> float:
        """Loss that has to be reached."""
        return self.floor + (1.0 - self.fall) * (self.losses[0] - self.floor)

    @property
    def _hopeless(self) -> bool:
        return bool(self.losses) and self.losses[0] <= self.floor

    def report(self, diagnosis: Diagnosis | None) -> OverfitReport:
        """Return the whole."""
        losses = self.losses
        known = [loss for loss in losses if math.isfinite(loss)]
        return OverfitReport(
            passed=self.passed,
            verdict=self._verdict(),
            first=losses[0] if losses else None,
            last=losses[-1] if losses else None,
            best=min(known, default=None),
            target=self.target if losses else None,
            floor=self.floor,
            steps=self.taken,
            curve=tuple((i, losses[i]) for i in _sampled(len(losses))),
            diagnosis=None if self.passed else diagnosis,
        )

    def _verdict(self) -> str:
        if self.error is not None:
            return f"step_fn failed at step {self.taken}: {self.error}"
        if not self.losses:
            return "step_fn returned no loss; let it return the loss as one number"
        first, last, best = self.losses[0], self.losses[-1], min(self.losses)
        if not math.isfinite(last):
            return (
                f"the loss is {last} at step {len(self.losses) - 1} (it was {first:.4g} at first)"
            )
        if first <= self.floor:
            return (
                f"the first loss, {first:.4g}, is at or below the floor, {self.floor:g}, so there is nothing "
                "to learn: look for an empty mask or target, or pass the true smallest loss as floor="
            )
        way = f"the loss went from {first:.4g} to {last:.4g} in {self.taken} steps"
        if self.passed:
            return f"the batch was memorised: {way}"
        if best >= first - _FLAT * (first - self.floor):
            what = "rose" if last > first + _FLAT * (first - self.floor) else "does not fall"
            return f"nothing is learnt: {way}, it {what}"
        return f"not memorised: {way}, {self.target:.4g} had to be reached; {self._course()}"

    def _course(self) -> str:
        """Say whether more steps would help."""
        tail = self.losses[-max(len(self.losses) // 4, 2) :]
        if tail[0] - tail[-1] > _FLAT * (self.losses[0] - self.floor):
            return "it is still falling: give it more steps or a larger learning rate"
        return (
            "it no longer falls: look for a cut path, noise such as dropout, or too small a model"
        )


def _sampled(count: int) -> list[int]:
    """Return at most so many places of ``count``, evenly, first and last among them."""
    if count <= _MOST_POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)]


def _check_numbers(*, steps: int, fall: float, floor: float) -> None:
    if steps < 2:
        raise ValueError(f"overfit_check(steps={steps}): expected at least 2 steps")
    if not 0.0 < fall < 1.0:
        raise ValueError(
            f"overfit_check(fall={fall}): expected a share between 0 and 1, such as 0.9"
        )
    if not math.isfinite(floor):
        raise ValueError(f"overfit_check(floor={floor}): expected the smallest possible loss")
