"""Puts the pieces around a training loop and emits one record per attempted optimizer step."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from gradguard.deferred import DeferredRows
from gradguard.draft import Draft
from gradguard.findings import (
    GUARD_FAULT,
    RECORDING_FAULT,
    SCALER_BYPASSED,
    Finding,
    Severity,
)
from gradguard.records import StepRecord
from gradguard.rundir import RunDirectory, RunDirectoryError
from gradguard.runlog import RunLog
from gradguard.scaler import UpdateWatch, check_scaler, innermost_optimizer
from gradguard.stepwatch import Gate, OptimizerWatch, WatchSettings
from gradguard.window import Number, checked

Batch = TypeVar("Batch")
Listener = Callable[[StepRecord], None]

_MAX_AGE_S = 1.0


class Guard:
    """Everything that is attached to one training loop; made by :func:`watch`.

    Attributes:
        log: the records that have arrived so far, and the findings.
    """

    def __init__(self, *, lag: int, strict: bool) -> None:
        self.log = RunLog()
        self._strict = strict
        self._watches: dict[str, OptimizerWatch] = {}
        self._listeners: list[Listener] = []
        self._broken: set[str] = set()
        self._reported: set[str] = set()
        self._update_watch: UpdateWatch | None = None
        self._recorder: RunDirectory | None = None
        self._depth, self._spent_s = 0, 0.0
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
            for watch in watches:
                for key, value in values.items():
                    watch.observe(key, value)

        with torch.no_grad():
            self._protect("observe", work)

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of ``loader`` and count them for the record of the step they lead to."""
        for batch in loader:
            for watch in self._watches.values():
                watch.count_batch()
            yield batch

    def before_update(self) -> None:
        """Read the scaler right before ``scaler.update()``; only for ``watch(..., wrap_update=False)``.

        Sync: none.
        """
        self._protect("scaler", self._before_update)

    def after_update(self) -> None:
        """Read the scaler right after ``scaler.update()``; only for ``watch(..., wrap_update=False)``.

        Sync: none.
        """
        self._protect("scaler", self._after_update)

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

    def flush(self) -> None:
        """Finish the step under way and bring every record to :attr:`log`. Sync: waits for the device."""
        for watch in self._watches.values():
            self._protect("step", watch.finish)
        self._protect("records", self._rows.flush)

    def detach(self) -> None:
        """Flush, remove every hook and close the run directory. Safe to call twice."""
        self.flush()
        for watch in self._watches.values():
            watch.close()
        if self._update_watch is not None:
            self._update_watch.remove()
            self._update_watch = None
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    # --- wiring, used by watch() ---------------------------------------------------------------

    def add_watch(self, watch: OptimizerWatch) -> None:
        """Take over one optimizer."""
        self._watches[watch.name] = watch

    def follow_updates(self, scaler: GradScaler) -> None:
        """Read ``scaler`` around each of its updates."""
        self._update_watch = UpdateWatch(scaler, before=self.before_update, after=self.after_update)

    def record_to(self, directory: RunDirectory) -> None:
        """Write every record and finding to ``directory`` too."""
        self._recorder = directory

    def emit(self, watch: OptimizerWatch, draft: Draft) -> None:
        """Queue a finished draft."""
        draft.guard_s, self._spent_s = self._spent_s, 0.0
        self._protect("records", lambda: self._rows.push((watch, draft), draft.pack(watch.device)))

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

    def _before_update(self) -> None:
        for watch in self._watches.values():
            if watch.stepped_without_scaler():
                self._report_bypass(watch)
            watch.before_update()

    def _after_update(self) -> None:
        for watch in self._watches.values():
            watch.after_update()

    def _deliver(self, token: tuple[OptimizerWatch, Draft], values: list[float]) -> None:
        watch, draft = token
        record = draft.record(values, watch.has_nonfinite)
        if record.nonfinite_tensors:
            watch.alert()
        self.log.append(record)
        self._write(record)
        for index, listener in enumerate(self._listeners):
            self._protect(f"listener {index}", partial(listener, record))

    def _write(self, entry: StepRecord | Finding) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.write(entry)
        except RunDirectoryError as error:
            self._recorder = None
            self._add(Finding(code=RECORDING_FAULT, severity=Severity.ERROR, message=str(error)))

    def _add(self, finding: Finding) -> None:
        self.log.add_finding(finding)
        self._write(finding)

    def _report_bypass(self, watch: OptimizerWatch) -> None:
        if watch.name in self._reported:
            return
        self._reported.add(watch.name)
        self._add(
            Finding(
                code=SCALER_BYPASSED,
                severity=Severity.ERROR,
                message=f"optimizer {watch.name!r} was stepped, but the watched GradScaler has not "
                "seen it in this iteration: call scaler.step(optimizer) instead of optimizer.step(), "
                "and pass watch() the scaler that this optimizer is stepped with",
            )
        )

    def _protect(self, part: str, work: Callable[[], None]) -> None:
        """The one boundary where a fault of the guard is kept from the user's run."""
        if part in self._broken:
            return
        started_s = time.perf_counter()
        self._depth += 1
        try:
            with torch.no_grad():
                work()
        except Exception as error:  # the boundary: becomes a finding, or is raised
            if self._strict:
                raise
            self._broken.add(part)
            self._report_fault(part, error)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._spent_s += time.perf_counter() - started_s

    def _report_fault(self, part: str, error: Exception) -> None:
        self._add(
            Finding(
                code=GUARD_FAULT,
                severity=Severity.WARNING,
                message=f"the guard's part {part!r} raised {type(error).__name__} and switched itself "
                "off; the training run is not affected, its later readings are not measured",
                detail="".join(traceback.format_exception(error)),
            )
        )


def watch(
    model: nn.Module,
    optimizer: object,
    *,
    scaler: GradScaler | None = None,
    gate: Gate | Mapping[str, Gate] | None = None,
    averaged: nn.Module | Mapping[str, Tensor] | None = None,
    run: str | Path | RunDirectory | None = None,
    drift: str = "sampled",
    detail_every: int = 50,
    lag: int = 8,
    wrap_update: bool = True,
    strict: bool = False,
) -> Guard:
    """Watch every optimizer step of a training loop; leave the block or call ``detach()`` to stop.

    ::

        with gg.watch(model, optimizer, scaler=scaler) as guard:
            ...  # the training loop, unchanged

    Args:
        model: gives the parameters their names; it is not kept.
        optimizer: the optimizer, or a mapping from name to optimizer.
        scaler: the ``GradScaler`` whose ``step`` and ``update`` the loop calls.
        gate: the ``StepGate`` of the optimizer, or a mapping from optimizer name to gate.
        averaged: averaged copy of the model (EMA, SWA) whose lag is read on detailed steps: a module
            or a mapping from parameter name to tensor.
        run: a new directory to record to, or an open ``RunDirectory``; the guard closes it.
        drift: ``"sampled"``, ``"exact"`` (one transient copy of the weights) or ``"off"``.
        detail_every: steps between steps that are measured per parameter.
        lag: how many steps late records may arrive; a killed process loses at most these.
        wrap_update: False to leave ``GradScaler.update`` alone and call ``before_update`` and
            ``after_update`` around it yourself.
        strict: raise faults of the guard instead of recording them (for tests).

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: nothing to train, an optimizer that holds none of the model's parameters, or a
            number out of range.

    Sync: none per step. Memory: about 130,000 sampled values.
    """
    optimizers = _named_optimizers(optimizer)
    _check_numbers(drift=drift, detail_every=detail_every, lag=lag)
    names = _parameter_names(model, optimizers)
    gates = gate if isinstance(gate, Mapping) else dict.fromkeys(optimizers, gate)
    if scaler is not None:
        check_scaler(scaler)
    guard = Guard(lag=lag, strict=strict)
    if run is not None:
        directory = run if isinstance(run, RunDirectory) else RunDirectory.create(run)
        guard.record_to(directory)
    for name, one in optimizers.items():
        guard.add_watch(
            OptimizerWatch(
                name,
                one,
                parameter_names=names,
                settings=WatchSettings(detail_every=detail_every, drift=drift),
                scaler=scaler,
                gate=gates.get(name),
                averaged=_averaged_by_name(averaged),
                protect=guard.protect,
                emit=guard.emit,
            )
        )
    if scaler is not None and scaler.is_enabled() and wrap_update:
        guard.follow_updates(scaler)
    return guard


def _named_optimizers(optimizer: object) -> dict[str, object]:
    named = dict(optimizer) if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
    if not named:
        raise ValueError("watch() got an empty mapping of optimizers; pass at least one")
    for one in named.values():
        innermost_optimizer(one)
    return named


def _check_numbers(*, drift: str, detail_every: int, lag: int) -> None:
    if drift not in ("sampled", "exact", "off"):
        raise ValueError(f"watch(drift={drift!r}): expected 'sampled', 'exact' or 'off'")
    for name, value in (("detail_every", detail_every), ("lag", lag)):
        if value < 1:
            raise ValueError(f"watch({name}={value}): expected a number of steps, at least 1")


def _parameter_names(model: nn.Module, optimizers: Mapping[str, object]) -> dict[int, str]:
    """Return names by id, after checking that model and optimizers have something to do together."""
    names = {id(p): name for name, p in model.named_parameters()}
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"watch(): the model {type(model).__name__} has no trainable parameter "
            f"({len(names)} parameters, none with requires_grad=True); there is nothing to watch"
        )
    for name, one in optimizers.items():
        held = [p for g in innermost_optimizer(one).param_groups for p in g["params"]]
        if not any(id(p) in names for p in held):
            raise ValueError(
                f"watch(): optimizer {name!r} holds {len(held)} parameters and none of them belongs "
                f"to the model {type(model).__name__}; was the model copied, converted or replaced "
                "after the optimizer was made? Make the optimizer from model.parameters() again"
            )
    return names


def _averaged_by_name(averaged: nn.Module | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if averaged is None:
        return {}
    if isinstance(averaged, Mapping):
        return dict(averaged)
    # torch's AveragedModel keeps the copy under "module."
    return {n.removeprefix("module."): p.detach() for n, p in averaged.named_parameters()}
