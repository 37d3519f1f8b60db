"""Watches one optimizer: turns every attempted step into one draft, whatever path it takes.

Three ways lead to a finished draft. Without an active scaler: the step's post-hook. With one: the
``update()`` that follows the step. A step that the scaler skipped without calling the optimizer: the same
``update()``, where the scaler's state says that a step was attempted.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradguard.attach import BackwardCounter, around_step
from gradguard.clipping import SharedNorms
from gradguard.draft import Draft
from gradguard.drift import DriftMeter, averaged_distance
from gradguard.gate import StepGate
from gradguard.gradient_reader import GradientCensus, GradientReader
from gradguard.holdings import Holdings
from gradguard.norms import nonfinite_counts
from gradguard.records import StepOutcome, StepRecord
from gradguard.scaler import (
    innermost_optimizer,
    loss_scale,
    optimizer_keys,
    read_scaler,
    stage_of,
    stray_entries,
)
from gradguard.schedulers import FoundScheduler
from gradguard.window import Number, Window

_EARLY_STEPS = 3
"""The first steps are all measured in detail: most faults are there from the beginning."""


class StepSensors(Protocol):
    """What else is read around a step; see :class:`gradguard.sensors.sensors.Sensors`."""

    def before_step(self) -> None:
        """A step is about to be taken."""

    def after_step(self, detailed: bool) -> None:
        """An attempt is over."""

    def forward_reader(self) -> Callable[[], Mapping[str, Any]]:
        """Return a function that gives the counts of forward passes since it was last called."""

    def uncalled(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Return those of the parameters whose module was never called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """What is measured, and how often.

    Attributes:
        detail_every: optimizer steps between steps measured per parameter.
        drift: ``"sampled"``, ``"exact"`` or ``"off"``.
    """

    detail_every: int
    drift: str


class OptimizerWatch:
    """Hooks around one optimizer; hands finished drafts to ``emit``.

    ``protect(part, work)`` runs ``work`` so that a fault in it switches ``part`` off instead of reaching
    the training loop.
    """

    def __init__(
        self,
        name: str,
        optimizer: object,
        *,
        parameter_names: Mapping[int, str],
        settings: WatchSettings,
        scaler: GradScaler | None,
        gate: StepGate | None,
        averaged: Mapping[str, Tensor],
        protect: Callable[[str, Callable[[], None]], None],
        emit: Callable[[OptimizerWatch, Draft], None],
    ) -> None:
        self.name = name
        inner = innermost_optimizer(optimizer)
        self._optimizer_ref = weakref.ref(inner)
        self._keys = optimizer_keys(optimizer)
        self._parameter_names = parameter_names
        self._settings, self._gate = settings, gate
        self._scaler_ref = None if scaler is None else weakref.ref(scaler)
        self._averaged, self._protect, self._emit = averaged, protect, emit
        self._steps = 0
        self._window = Window()
        self._inside: Draft | None = None  # between the step's hooks
        self._pending: Draft | None = None  # stepped, waiting for scaler.update()
        self._open: Draft | None = None  # finished; late observations may still belong to it
        self._judged = 0
        self._closure = False  # whether the step under way computes its own gradients
        self._ended_s: float | None = None
        self._meter: DriftMeter | None = None
        self._held = self._hold()
        self._reader = GradientReader(self._held.parameters)
        self._backwards = BackwardCounter(self._unsampled())
        self._census = GradientCensus()
        self._state_left: int | None = None
        self._updates = 0
        self._schedulers: list[FoundScheduler] = []
        self._sensors: StepSensors | None = None
        self._forwards: Callable[[], Mapping[str, Any]] = dict
        self._handles = around_step(
            inner,
            before=lambda closure: protect("step", partial(self._begin, closure=closure)),
            after=lambda: protect("step", self._returned),
        )
        self._finalizer = weakref.finalize(inner, self._forget)

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._optimizer_ref()
        if optimizer is None:
            raise RuntimeError(f"the watched optimizer {self.name!r} has been deleted")
        return optimizer

    @property
    def _scaler(self) -> GradScaler | None:
        return None if self._scaler_ref is None else self._scaler_ref()

    def _forget(self) -> None:
        """Let go of the parameters, once the optimizer is gone or watching has ended."""
        self._held.let_go()
        self._averaged = {}
        self._meter = None

    # --- what is watched -----------------------------------------------------------------------

    def _hold(self) -> Holdings:
        """Look at what the optimizer holds now, and make a meter for it."""
        held = Holdings(self._optimizer, self._parameter_names, label=self.name)
        if self._settings.drift != "off":
            self._meter = DriftMeter(
                list(zip(held.names, held.parameters, strict=True)),
                exact=self._settings.drift == "exact",
                group_sizes=held.group_sizes,
            )
        return held

    def _refresh(self) -> None:
        """Notice added groups and parameters that were given new storage."""
        if not self._held.are_current(self._optimizer, thorough=self._is_detailed()):
            self._held = self._hold()
            self._reader.listen(self._held.parameters)
            self._backwards.listen(self._unsampled())

    def _unsampled(self) -> list[Tensor]:
        """Return the parameters that the samples of gradients do not listen to."""
        sampled = set(self._reader.sampled)
        return [p for i, p in enumerate(self._held.parameters) if i not in sampled]

    def _is_detailed(self) -> bool:
        return self._steps < _EARLY_STEPS or self._steps % self._settings.detail_every == 0

    # --- the step ------------------------------------------------------------------------------

    def _begin(self, *, closure: bool) -> None:
        self._finish_pending()
        self._refresh()
        if self._sensors is not None:
            self._sensors.before_step()
        draft, gradients = self._new_draft()
        self._closure = closure
        if not closure:
            self._protect("gradients", lambda: self._measure_gradients(draft, gradients))
        if draft.detailed and self._averaged:
            self._protect("averaged", lambda: self._measure_averaged(draft))
        meter = self._meter
        if meter is not None:
            self._protect("drift", lambda: meter.mark(gradients))
        self._inside = draft

    def _returned(self) -> None:
        draft, self._inside = self._inside, None
        if draft is None:
            return  # the outer half of a step that called super().step()
        draft.ran = True
        if self._closure:
            self._read_gradients_after(draft)
        meter = self._meter
        if meter is not None:
            draft.drift_layout = meter.layout
            self._protect("drift", lambda: draft.put("drift", meter.sums(detailed=draft.detailed)))
        if self._gate is not None:
            self._ask_gate(self._gate, draft)
        if self._scaler is not None and self._scaler.is_enabled():
            self._pending = draft
        else:
            self._finish(draft)

    def _read_gradients_after(self, draft: Draft) -> None:
        """Read the gradients that a closure computed inside the step (those of its last call)."""
        gradients = self._gradients()
        draft.with_gradient = [i for i, g in enumerate(gradients) if g is not None]
        self._protect("gradients", lambda: self._measure_gradients(draft, gradients))

    def _new_draft(self) -> tuple[Draft, list[Tensor | None]]:
        groups = self._optimizer.param_groups
        gradients = self._gradients()
        draft = Draft(
            step=self._steps,
            optimizer=self.name,
            names=self._held.names,
            detailed=self._is_detailed(),
            learning_rates=[group["lr"] for group in groups if "lr" in group],
            window=self._window,
            with_gradient=[i for i, g in enumerate(gradients) if g is not None],
            activity={
                "state_entries": len(self._optimizer.state),
                "state_left": self._state_left,
                "scheduler_steps": tuple(one.last_epoch or 0 for one in self._schedulers),
            },
        )
        return draft, gradients

    def _gradients(self) -> list[Tensor | None]:
        gradients = [p.grad for p in self._held.parameters]
        hidden = self._gate.hidden_gradients() if self._gate is not None else {}
        if hidden:
            pairs = zip(self._held.parameters, gradients, strict=True)
            return [hidden.get(id(p)) if g is None else g for p, g in pairs]
        return gradients

    def _measure_gradients(self, draft: Draft, gradients: list[Tensor | None]) -> None:
        scale = getattr(self._optimizer, "grad_scale", None)  # fused: the step itself unscales
        self._reader.read(draft, gradients, scale, sampled=not self._closure)

    def _measure_averaged(self, draft: Draft) -> None:
        pairs = [
            (p, self._averaged[name])
            for name, p in zip(self._held.names, self._held.parameters, strict=True)
            if name in self._averaged
        ]
        draft.put("averaged", averaged_distance([p for p, _ in pairs], [a for _, a in pairs]))

    def _ask_gate(self, gate: StepGate, draft: Draft) -> None:
        if gate.attempts > self._judged:
            draft.decision_of = partial(gate.decision, gate.attempts - 1)
            draft.put("veto", gate.veto_flag)
        self._judged = gate.attempts

    # --- the scaler ----------------------------------------------------------------------------

    def before_update(self) -> None:
        """Read the scaler's verdict; a skipped step without a call of the optimizer is found here."""
        if self._scaler is None:
            return
        self._updates += 1
        reading = read_scaler(self._scaler, self._keys)
        if self._pending is None and reading.stage == "stepped":
            self._pending = self._skipped_without_call()
        if self._pending is not None:
            self._pending.put("found_inf", reading.found_inf)
            self._pending.put("scale_before", reading.loss_scale)
            self._pending.activity["scaler_strays"] = stray_entries(self._scaler)

    def after_update(self) -> None:
        """Finish the step that this update belongs to."""
        if self._pending is not None and self._scaler is not None:
            self._pending.put("scale_after", loss_scale(self._scaler))
        self._finish_pending()

    def _skipped_without_call(self) -> Draft:
        self._refresh()
        if self._sensors is not None:
            self._sensors.before_step()
        draft, gradients = self._new_draft()
        self._reader.alert(steps=1)  # the host knows that something is wrong: count exactly
        self._protect("gradients", lambda: self._measure_gradients(draft, gradients))
        return draft

    def stepped_without_scaler(self) -> bool:
        """Whether the optimizer stepped in this iteration and the scaler knows nothing of it."""
        if self._pending is None or self._scaler is None:
            return False
        return stage_of(self._scaler, self._keys) == "ready"

    # --- finishing -----------------------------------------------------------------------------

    def _finish_pending(self) -> None:
        if self._pending is not None:
            draft, self._pending = self._pending, None
            self._finish(draft)

    def _finish(self, draft: Draft) -> None:
        now_s = time.perf_counter()
        draft.wall_s = None if self._ended_s is None else now_s - self._ended_s
        self._ended_s, draft.ended_unix_s = now_s, time.time()
        self._count_backwards(draft)
        self._count_without_gradient(draft)
        draft.activity["scaler_updates"] = self._updates if self._scaler is not None else None
        draft.activity.update(self._forwards())
        self._updates = 0
        self._reader.reset()
        self._state_left = len(self._optimizer.state)
        self.commit()
        self._open, self._window = draft, Window()
        self._steps += 1
        if self._sensors is not None:
            self._sensors.after_step(draft.detailed)

    def _count_backwards(self, draft: Draft) -> None:
        draft.micro_steps = self.micro_steps
        if draft.micro_steps == 0 and draft.with_gradient:
            # Gradients came, but not through the parameters listened to: listen to those they came to.
            draft.micro_steps = None
            self._backwards.listen([self._held.parameters[i] for i in draft.with_gradient])
        self._backwards.reset()

    def _count_without_gradient(self, draft: Draft) -> None:
        """Note which parameters had no gradient, now and in every attempt so far."""
        missing, never = self._census.take(draft, self._held.parameters)
        draft.activity["without_gradient"], draft.activity["never_gradient"] = missing, never
        if never and self._sensors is not None:
            draft.activity["uncalled"] = self._sensors.uncalled(never)

    def commit(self) -> None:
        """Send the last finished draft on its way; no observation can join it any more."""
        if self._open is not None:
            draft, self._open = self._open, None
            self._emit(self, draft)

    # --- from the user -------------------------------------------------------------------------

    def observe(self, key: str, value: Number, copied: Number) -> None:
        """Add an observation to the step it belongs to: the last one, unless that has its share.

        Args:
            key: of the observation.
            value: as the user gave it.
            copied: what :func:`gradguard.window.copies_of` made of it.
        """
        last = self._pending or self._open
        late = last is not None and self.micro_steps == 0
        if late and last is not None and last.window.seen(key) < max(1, last.micro_steps or 1):
            last.window.add(key, copied)
        else:
            self._window.add(key, copied)
            self._window.follow(key, value)

    def share(self, norms: SharedNorms) -> None:
        """Take the norms of gradients from here where they are known."""
        self._reader.share(norms)

    def takes_part(self, parameters: Collection[int]) -> bool:
        """Whether any of the parameters with these ids is the optimizer's."""
        return any(id(one) in parameters for one in self._held.parameters)

    def will_unscale(self) -> bool:
        """Whether the gradients still bear a loss scale that is to be divided out. Sync: none."""
        scaler = self._scaler
        return scaler is not None and stage_of(scaler, self._keys) not in ("disabled", "unscaled")

    def use_sensors(self, sensors: StepSensors) -> None:
        """Tell these sensors of every step from now on."""
        self._sensors = sensors
        self._forwards = sensors.forward_reader()

    def follow_schedulers(self, schedulers: Sequence[FoundScheduler]) -> None:
        """Read these schedulers of this optimizer from now on."""
        self._schedulers = list(schedulers)

    @property
    def attempts(self) -> int:
        """Attempted steps so far."""
        return self._steps

    @property
    def micro_steps(self) -> int:
        """Backward passes since the last attempt."""
        return max(self._backwards.count, self._reader.backwards)

    def count_batch(self) -> None:
        """Count one batch drawn from a loader."""
        self._window.batches = (self._window.batches or 0) + 1

    def learn(self, record: StepRecord, *, shared_error: float | None) -> None:
        """Use what a detailed step has shown for the steps to come. Sync: none.

        Args:
            record: of the step.
            shared_error: how far the norms of a clipping were from ours; None where not both were read.
        """
        if shared_error is not None:
            self._reader.confirm(shared_error)
        if self._meter is None or record.parameters is None:
            return
        if record.outcome is StepOutcome.APPLIED:
            self._meter.learn(one.drift for one in record.parameters if one.drift is not None)

    def alert(self) -> None:
        """Count non-finite entries exactly for some steps."""
        self._reader.alert()

    def has_nonfinite(self) -> bool:
        """Whether any parameter holds NaN or Inf now. Sync: one read."""
        return bool(nonfinite_counts(self._held.parameters).any())

    def step_was_taken(self) -> bool:
        """Whether the last attempt updated the parameters. Sync: one read with a scaler or device gate."""
        reading = None if self._scaler is None else read_scaler(self._scaler, self._keys)
        if reading is not None and reading.stage == "stepped" and self._pending is None:
            return False  # the scaler skipped it without calling the optimizer
        draft = self._pending or self._open
        if draft is None or not draft.ran or not draft.with_gradient:
            return False
        decision = draft.decision_of()
        if decision is not None and not decision.allowed:
            return False
        flags = [flag for key in ("found_inf", "veto") for flag in draft.tensors.get(key, ())]
        if draft is self._pending and reading is not None and reading.found_inf is not None:
            flags.append(reading.found_inf)
        return not any(bool((flag != 0).any()) for flag in flags)

    def finish(self) -> None:
        """Finish and send whatever is under way."""
        self._finish_pending()
        self.commit()

    def close(self) -> None:
        """Remove every hook and let go of everything that is watched."""
        self._handles.close()
        self._backwards.close()
        self._reader.close()
        self._finalizer.detach()
        self._forget()
