"""Puts the pieces around a training loop and emits one record per attempted optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from torch import Tensor, nn
from torch.amp import GradScaler

from gradguard.boundary import Boundary
from gradguard.clipping import SharedNorms, clip_grad_norm_
from gradguard.deferred import DeferredRows
from gradguard.diagnosis import Diagnosis
from gradguard.draft import Draft
from gradguard.facts import Fact, RunEnd
from gradguard.findings import Finding
from gradguard.journal import Journal
from gradguard.records import StepRecord
from gradguard.rundir import RunDirectory
from gradguard.runlog import RunLog
from gradguard.sensors.batch_watch import TRAIN
from gradguard.sensors.copies import ROLES, Role
from gradguard.sensors.sensors import PROBES, Clock, Sensors
from gradguard.stepwatch import OptimizerWatch
from gradguard.surroundings import Surroundings
from gradguard.updates import ScalerUpdates
from gradguard.window import Number, checked, copies_of

Batch = TypeVar("Batch")
Listener = Callable[[StepRecord], None]

_MAX_AGE_S = 1.0


class Guard:
    """Everything that is attached to one training loop; made by :func:`gradguard.watch`.

    Attributes:
        log: the records that have arrived so far, and the findings.
    """

    def __init__(
        self, *, lag: int, strict: bool, judge: Callable[[RunLog], Diagnosis] | None = None
    ) -> None:
        self._journal = Journal()
        self._boundary = Boundary(strict=strict, report=self._journal.add_finding)
        self._protect = self._boundary.protect
        self._updates = ScalerUpdates(protect=self._protect, report=self._journal.add_finding)
        self.log = self._journal.log
        self._judge = judge
        self._surroundings: Surroundings | None = None
        self._sensors: Sensors | None = None
        self._batches: int | None = None
        self._ended = False
        self._norms = SharedNorms()
        self._watches: dict[str, OptimizerWatch] = {}
        self._listeners: list[Listener] = []
        self._rows: DeferredRows[tuple[OptimizerWatch, Draft]] = DeferredRows(
            self._deliver, lag=lag, max_age_s=_MAX_AGE_S
        )

    # --- what a user calls ---------------------------------------------------------------------

    def observe(
        self,
        *,
        loss: Number | None = None,
        reported_loss: Number | None = None,
        gradient_norm: Number | None = None,
        terms: Mapping[str, Number] | None = None,
        targets: object = None,
        optimizer: str | None = None,
    ) -> None:
        """Tell the guard what hooks cannot see; each value is averaged over the micro-steps of a step.

        May be called before the backward, or right after the step. A call after the step belongs to that
        step as long as it saw fewer values than it had micro-steps.

        Args:
            loss: the loss that is optimised, without the loss scale.
            reported_loss: the loss that the trainer prints.
            gradient_norm: global gradient norm before clipping, as ``clip_grad_norm_`` returns it.
            terms: named loss terms.
            targets: what the output of the last forward is compared with: a tensor, or tensors in a tuple,
                list or mapping.
            optimizer: name of the optimizer these belong to; default all.

        Raises:
            TypeError, ValueError: a value is not one number, or the optimizer is unknown.

        Sync: none; tensors are copied on their device.
        """
        given = {"loss": loss, "reported_loss": reported_loss, "gradient_norm": gradient_norm}
        values = {key: checked(key, value) for key, value in given.items() if value is not None}
        for name, value in (terms or {}).items():
            values[f"term:{name}"] = checked(f"terms[{name!r}]", value)
        watches = self._chosen(optimizer)

        def work() -> None:
            copies = copies_of(values)
            for watch in watches:
                for key, value in values.items():
                    watch.observe(key, value, copies[key])

        self._protect("observe", work)
        if self._sensors is not None:
            self._sensors.observed(values)
            if targets is not None:
                self._sensors.compared(targets)

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        *,
        leave_nonfinite: bool = False,
    ) -> Tensor:
        """Clip as ``torch.nn.utils.clip_grad_norm_`` does, to the same bits; the guard need not read again.

        The norm before clipping is observed too. Afterwards gradients may be written to in any way but through
        ``.data`` or NumPy: that the guard notices on detailed steps only.

        Args:
            parameters: whose gradients are clipped, in place.
            max_norm: largest total norm.
            norm_type: as for torch's function.
            error_if_nonfinite: likewise.
            foreach: likewise.
            leave_nonfinite: scale nothing where the norm is not finite: torch's clipping would spread a single
                NaN over every gradient and hide where it came from.

        Returns:
            The total norm before clipping, 0-dim.

        Raises:
            RuntimeError: the norm is not finite and ``error_if_nonfinite``.

        Sync: none, unless ``error_if_nonfinite``.
        """
        clipped = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        total, gradients, norms = (
            clip_grad_norm_(  # not protected: its errors are the user's, as with torch
                clipped,
                max_norm,
                norm_type=norm_type,
                error_if_nonfinite=error_if_nonfinite,
                foreach=foreach,
                leave_nonfinite=leave_nonfinite,
            )
        )
        if norm_type == 2:
            self._protect("clipping", lambda: self._clipped(clipped, total, gradients, norms))
        return total

    def batches(self, loader: Iterable[Batch], *, split: str = TRAIN) -> Iterator[Batch]:
        """Yield the batches of ``loader``; those of split ``"train"`` are counted for the step they lead to.

        Some batches are read, to notice rows that a split shares with another one. In a tuple the last part
        is taken for the targets, in a mapping what is called so.

        Args:
            loader: anything that yields batches.
            split: name of the data, such as ``"validation"``.

        Sync: none.
        """
        for batch in loader:
            if split == TRAIN:
                self._batches = (self._batches or 0) + 1
                for watch in self._watches.values():
                    watch.count_batch()
            if self._sensors is not None:
                self._sensors.loaded(batch, split)
            yield batch

    def report(
        self,
        name: str,
        value: Number,
        *,
        split: str | None = None,
        weights: str | None = None,
    ) -> None:
        """Tell the guard a number that you report, such as a validation metric.

        Args:
            name: of the number.
            value: the number; a tensor stays on its device until it is needed.
            split: name of the data it was computed on.
            weights: ``"live"``, or the name of the copy of the model it was computed with.

        Raises:
            TypeError, ValueError: the value is not one number.

        Sync: none.
        """
        number = checked("report", value)
        sensors = self._sensors
        if sensors is not None:
            self._protect("report", lambda: sensors.report(name, number, split, weights))

    def probe(
        self,
        kind: str,
        value: Number,
        *,
        parameter: str | None = None,
        op: str | None = None,
    ) -> None:
        """Tell the guard what a comparison of your own found.

        Args:
            kind: ``"loss at truth"`` (the loss when predictions equal targets), ``"functions differ"``
                (relative difference of the training and the validation function on one batch),
                ``"eval differs"`` (relative difference of train and eval mode beyond dropout),
                ``"wrong backward"`` (relative difference from a finite difference) or ``"at chance"``
                (agreement with the truth of what is meant to carry the signal, over that of a random one).
            value: the number.
            parameter: name of the parameter it is about.
            op: name of the function or operation it is about.

        Raises:
            ValueError: unknown kind, or the value is not one number. TypeError: it is no number.

        Sync: none.
        """
        if kind not in PROBES:
            raise ValueError(f"guard.probe(kind={kind!r}): expected one of {', '.join(PROBES)}")
        number = checked("probe", value)
        sensors = self._sensors
        if sensors is not None:
            self._protect("probe", lambda: sensors.probe(kind, number, parameter, op))

    def follow_copy(
        self, name: str, copy: nn.Module | Mapping[str, Tensor], *, role: Role = "averaged"
    ) -> None:
        """Watch a copy of the model beside the live one; only weak references are kept.

        Args:
            name: what to call it.
            copy: a module, or a mapping from parameter name to tensor.
            role: ``"averaged"`` (EMA, SWA, target network), ``"snapshot"`` (best weights so far) or
                ``"frozen"`` (a teacher that must not change).

        Raises:
            ValueError: unknown role.

        Sync: none.
        """
        if role not in ROLES:
            raise ValueError(f"follow_copy(role={role!r}): expected one of {', '.join(ROLES)}")
        sensors = self._sensors
        if sensors is not None:
            self._protect("copies", lambda: sensors.follow_copy(name, copy, role))

    def before_update(self, optimizer: str | None = None) -> None:
        """Read the scaler right before ``scaler.update()``; only for ``watch(..., wrap_update=False)``.

        Args:
            optimizer: name of the optimizer whose scaler is updated; default all.

        Sync: none.
        """
        self._updates.begin(self._chosen(optimizer))

    def after_update(self, optimizer: str | None = None) -> None:
        """Read the scaler right after ``scaler.update()``; only for ``watch(..., wrap_update=False)``.

        Args:
            optimizer: name of the optimizer whose scaler was updated; default all.

        Sync: none.
        """
        self._updates.end(self._chosen(optimizer))

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener(record)`` for every record once it has arrived; a fault in it is a finding."""
        self._listeners.append(listener)

    def step_was_taken(self, optimizer: str | None = None) -> bool:
        """Say whether the last attempted step of an optimizer updated its parameters.

        Sync: reads one flag when a loss scaler or a device gate decides, else none.
        """
        return all(watch.step_was_taken() for watch in self._chosen(optimizer))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the run or with the guard, so far."""
        return tuple(self.log.findings)

    def diagnosis(self) -> Diagnosis:
        """Judge the run so far by the catalogue of rules: what is wrong, where, since when, what to do.

        Raises:
            RuntimeError: this guard was made by hand, without a judge; use :func:`gradguard.watch`.

        Sync: waits for the device.
        """
        if self._judge is None:
            raise RuntimeError("this guard has no judge; make it with gradguard.watch()")
        self.flush()
        return self._judge(self.log)

    def flush(self) -> None:
        """Finish the step under way and bring every record to :attr:`log`. Sync: waits for the device."""
        for watch in self._watches.values():
            self._protect("step", watch.finish)
        self._protect("records", self._rows.flush)
        if self._sensors is not None:
            self._sensors.flush()

    def detach(self) -> None:
        """Flush, remove every hook and close the run directory. Safe to call twice."""
        self._detach(None)

    def _detach(self, error: type[BaseException] | None) -> None:
        self.flush()
        if not self._ended:
            self._ended = True
            if self._sensors is not None:
                self._sensors.close()
            self._protect("end", lambda: self.add_fact(self._end(error)))
        for watch in self._watches.values():
            watch.close()
        self._updates.close()
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._detach(kind)

    # --- wiring, used by watch() ---------------------------------------------------------------

    def add_watch(self, watch: OptimizerWatch) -> None:
        """Take over one optimizer."""
        self._watches[watch.name] = watch
        watch.share(self._norms)

    def follow_updates(self, scaler: GradScaler, names: Sequence[str]) -> None:
        """Read ``scaler`` around each of its updates, for the optimizers with these names."""
        self._updates.follow(scaler, [self._watches[name] for name in names])

    def look_around(self, surroundings: Surroundings) -> None:
        """Read the model and its optimizers now, and again on detailed steps if they have changed."""
        self._surroundings = surroundings
        self._protect("setup", self._read_surroundings)

    def clock(self, *, detail_every: int) -> Clock:
        """Return what tells sensors where the run is."""
        return Clock(
            attempts=lambda: self._attempts,
            attempts_of=lambda name: self._watches[name].attempts,
            rounds=lambda: max(watch.attempts for watch in self._watches.values()),
            detail_every=detail_every,
        )

    def use_sensors(self, sensors: Sensors) -> None:
        """Read everything beside the optimizers' steps with these sensors."""
        self._sensors = sensors
        for watch in self._watches.values():
            watch.use_sensors(sensors)
        sensors.begin()

    def add_fact(self, fact: Fact) -> None:
        """Add one fact to the log and to the run directory."""
        self._journal.add_fact(fact)

    def record_to(self, directory: RunDirectory) -> None:
        """Write every record and finding to ``directory`` too."""
        self._journal.record_to(directory)

    def emit(self, watch: OptimizerWatch, draft: Draft) -> None:
        """Queue a finished draft."""
        if draft.detailed:
            self._protect("setup", self._read_surroundings)
        draft.guard_s = self._boundary.take_spent_s()
        self._protect("records", lambda: self._rows.push((watch, draft), draft.pack()))

    def protect(self, part: str, work: Callable[[], None]) -> None:
        """Run ``work``; a fault switches ``part`` off and becomes a finding."""
        self._protect(part, work)

    # --- inside --------------------------------------------------------------------------------

    def _chosen(self, optimizer: str | None) -> list[OptimizerWatch]:
        if optimizer is None:
            return list(self._watches.values())
        if optimizer not in self._watches:
            raise ValueError(
                f"no optimizer is watched under the name {optimizer!r}; known: {sorted(self._watches)}"
            )
        return [self._watches[optimizer]]

    def _clipped(
        self,
        parameters: Sequence[Tensor],
        total: Tensor,
        gradients: Sequence[Tensor],
        norms: Tensor | None,
    ) -> None:
        """Observe a clipping, and keep the norms it has read for the steps that they are about."""
        ids = {id(one) for one in parameters}
        concerned = [watch for watch in self._watches.values() if watch.takes_part(ids)]
        copied = copies_of({"gradient_norm": total})["gradient_norm"]
        for watch in concerned:
            watch.observe("gradient_norm", total, copied)
        if norms is not None and not any(watch.will_unscale() for watch in concerned):
            self._norms.keep(gradients, norms)

    def _read_surroundings(self) -> None:
        """Add a setup to the log if there is something new, and follow the schedulers it names."""
        around = self._surroundings
        setup = None if around is None else around.read(self._attempts)
        if around is None or setup is None:
            return
        self.add_fact(setup)
        for name, watch in self._watches.items():
            watch.follow_schedulers(around.schedulers_of(name))

    @property
    def _attempts(self) -> int:
        return sum(watch.attempts for watch in self._watches.values())

    def _end(self, error: type[BaseException] | None) -> RunEnd:
        left = [watch.micro_steps for watch in self._watches.values()]
        return RunEnd(
            step=self._attempts,
            clean=error is None,
            micro_steps=max(left, default=0),
            batches=self._batches,
            error=None if error is None else error.__name__,
        )

    def _deliver(self, token: tuple[OptimizerWatch, Draft], values: list[float]) -> None:
        watch, draft = token
        record = draft.record(values, watch.has_nonfinite)
        if record.nonfinite_tensors:
            watch.alert()
        watch.learn(record, shared_error=draft.shared_error)
        self._journal.append(record)
        if self._sensors is not None:
            self._sensors.delivered(record, self.log)
        for index, listener in enumerate(self._listeners):
            self._protect(f"listener {index}", partial(listener, record))
