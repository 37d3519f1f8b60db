"""All sensors beside the optimizer's step, switched on and off together."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradguard.arming import Arming
from gradguard.facts import Fact, MetricReading, ProbeReading
from gradguard.records import StepRecord
from gradguard.runlog import RunLog
from gradguard.sensors.batch_watch import BatchWatch
from gradguard.sensors.copies import CopyWatch, Role
from gradguard.sensors.foreign_steps import ForeignSteps
from gradguard.sensors.forward_watch import ForwardCall, ForwardWatch
from gradguard.sensors.loads import LoadWatch
from gradguard.sensors.loss_graph import read_loss
from gradguard.sensors.module_watch import ModuleWatch
from gradguard.sensors.pending import FactQueue, Found, number
from gradguard.sensors.replicas import ReplicaWatch

Protect = Callable[[str, Callable[[], None]], None]
_EARLY_STEPS = 3
PROBES = ("loss at truth", "functions differ", "eval differs", "wrong backward", "at chance")
"""Kinds of comparisons that users make and tell."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where the run is.

    Attributes:
        attempts: gives the number of attempts of all optimizers.
        attempts_of: gives those of one optimizer.
        rounds: gives those of the optimizer that has most of them: it says which steps are detailed.
        detail_every: steps between two detailed ones.
    """

    attempts: Callable[[], int]
    attempts_of: Callable[[str], int]
    rounds: Callable[[], int]
    detail_every: int

    def is_detailed(self) -> bool:
        """Whether the step under way is measured in detail."""
        done = self.rounds()
        return done < _EARLY_STEPS or done % self.detail_every == 0


class Sensors:
    """Looks at forward passes, modules, batches, losses, copies, loads, foreign steps and replicas.

    Args:
        model: the watched model; only weak references are kept.
        optimizers: the innermost optimizers by name; likewise.
        clock: where the run is.
        add: takes finished facts.
        protect: the guard's boundary.
        lag: how many facts are collected before they are copied to the host.
        arming: listens to one step when a rule asks for it; None for never.

    Sync: none, except :meth:`flush`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        *,
        clock: Clock,
        add: Callable[[Fact], None],
        protect: Protect,
        lag: int,
        arming: Arming | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._clock, self._add, self._protect = clock, add, protect
        self._arming = arming
        self._alone = len(optimizers) == 1
        self._queue = FactQueue(add, lag=lag)
        self._copies = CopyWatch(model, self._queue)
        self._modules = ModuleWatch(model, self._queue, protect=protect)
        self._replicas = ReplicaWatch(model, self._queue)
        self._batches = BatchWatch(self._queue, step=clock.attempts, detailed=clock.is_detailed)
        self._forwards = ForwardWatch(
            model, window=clock.attempts, protect=protect, on_call=self._called
        )
        self._loads = LoadWatch(model, self._queue, add=add, step=clock.attempts, protect=protect)
        self._foreign = ForeignSteps(
            model, optimizers, attempts=clock.attempts_of, add=add, protect=protect
        )
        self._round = -1
        self._losses: set[tuple[int, str]] = set()

    # --- the loop ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Put the hooks of a detailed step in place, before its first forward. Sync: none."""
        arming = self._arming
        if arming is not None:
            self._protect("probes", lambda: arming.begin(self._clock.attempts()))
        if self._clock.is_detailed():
            self._protect("modules", lambda: self._modules.start(self._clock.attempts()))
            self._protect("replicas", self._replicas.start)

    def before_step(self) -> None:
        """Read what is about to be used by a step. Sync: none, unless this step was listened to."""
        if self._arming is not None:
            self._protect("probes", self._arming.end)
        self._protect("loads", self._loads.before_step)
        self._protect("replicas", self._replicas.at_step)

    def after_step(self, detailed: bool) -> None:
        """End a step: readings are queued, and the next window begins. Sync: none."""
        if self._clock.rounds() == self._round:
            return  # another optimizer's turn in the same round
        self._round = self._clock.rounds()
        last = self._clock.attempts() - 1
        self._protect("modules", self._modules.stop)
        self._protect("replicas", lambda: self._replicas.stop(last))
        if detailed:
            self._protect("copies", lambda: self._copies.read(last))
        self._batches.forget()
        self._losses.clear()
        self._queue.poll()
        self.begin()

    def forward_reader(self) -> Callable[[], Mapping[str, Any]]:
        """Return a function that gives the counts of forward passes since it was last called."""
        return self._forwards.reader(alone=self._alone)

    def uncalled(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Return those of the parameters whose module was never called; None when that is not known."""
        return self._modules.uncalled(names)

    def _called(self, call: ForwardCall) -> None:
        if call.grad:
            self._protect("batches", lambda: self._batches.given(call.inputs))
            self._protect("replicas", lambda: self._replicas.given(call.inputs))

    def delivered(self, record: StepRecord, log: RunLog) -> None:
        """Ask the rules whether a coming step should be listened to."""
        arming = self._arming
        if arming is not None:
            self._protect("probes", lambda: arming.consider(record, log))

    # --- what the user tells -------------------------------------------------------------------

    def loaded(self, batch: Any, split: str) -> None:
        """Read a batch of a loader."""
        self._protect("batches", lambda: self._batches.loaded(batch, split))

    def compared(self, targets: Any) -> None:
        """Read the targets of the last forward."""
        self._protect("batches", lambda: self._batches.compared(targets))

    def observed(self, values: Mapping[str, object]) -> None:
        """Read the graph of every observed loss, once per detailed step; those of its terms at first only."""
        if not self._clock.is_detailed():
            return
        step, early = self._clock.attempts(), self._clock.rounds() < _EARLY_STEPS
        for name, value in values.items():
            # The terms hang on the same graph as the loss: a walk for each of them is for the beginning.
            wanted = name != "gradient_norm" and (early or not name.startswith("term:"))
            if isinstance(value, Tensor) and wanted:
                self._protect("losses", partial(self._read_loss, name, value, step))

    def _read_loss(self, name: str, value: Tensor, step: int) -> None:
        model = self._model()
        if model is None or (step, name) in self._losses:
            return
        self._losses.add((step, name))
        self._add(read_loss(value, name=name, step=step, model=model))

    def report(
        self, name: str, value: Tensor | float, split: str | None, weights: str | None
    ) -> None:
        """Note a number that the user reports."""
        host = {"step": self._clock.attempts(), "name": name, "split": split, "weights": weights}

        def make(found: Found) -> MetricReading:
            known = number(found, "value") if found else float(value)
            return MetricReading(**host, value=known)  # type: ignore[arg-type]

        self._queue.put(make, {"value": value} if isinstance(value, Tensor) else {})

    def probe(
        self, kind: str, value: Tensor | float, parameter: str | None, op: str | None
    ) -> None:
        """Note what a comparison of the user's found."""
        step = self._clock.attempts()

        def make(found: Found) -> ProbeReading:
            known = number(found, "value") if found else float(value)
            return ProbeReading(step=step, kind=kind, value=known, parameter=parameter, op=op)

        self._queue.put(make, {"value": value} if isinstance(value, Tensor) else {})

    def follow_copy(self, name: str, copy: nn.Module | Mapping[str, Tensor], role: Role) -> None:
        """Follow a copy of the model, and read it now."""
        self._copies.follow(name, copy, role)
        self._protect("copies", lambda: self._copies.read(self._clock.attempts()))

    # --- the end -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Hand on everything. Sync: waits for the device."""
        self._protect("facts", self._queue.flush)

    def close(self) -> None:
        """Remove every hook and hand on what was measured. Sync: waits for the device."""
        if self._arming is not None:
            self._protect("probes", self._arming.end)
        self._protect("modules", self._modules.stop)
        self._protect("copies", lambda: self._copies.read(self._clock.attempts()))
        self.flush()
        for one in (
            self._modules,
            self._replicas,
            self._forwards,
            self._loads,
            self._foreign,
            self._copies,
        ):
            one.close()
        self._batches.forget()
