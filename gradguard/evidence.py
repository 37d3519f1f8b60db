"""A run as rules read it: records by optimizer, facts by kind, and what there is to look at."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TypeVar

from gradguard.facts import (
    BatchReading,
    CopyReading,
    Fact,
    LoadReading,
    LossReading,
    MetricReading,
    ModuleReading,
    ParameterFacts,
    Plan,
    ReplicaReading,
    RunEnd,
    Setup,
)
from gradguard.findings import Sight
from gradguard.records import StepRecord
from gradguard.runlog import RunLog

F = TypeVar("F", bound=Fact)


class Evidence:
    """What rules read of one run; made anew for every judgement, and cheap to ask twice.

    Args:
        log: the run.

    Attributes:
        steps: every record in order.
        by_optimizer: the records of every optimizer in order.
    """

    def __init__(self, log: RunLog) -> None:
        self.steps: tuple[StepRecord, ...] = tuple(log)
        grouped: dict[str, list[StepRecord]] = {}
        for record in self.steps:
            grouped.setdefault(record.optimizer, []).append(record)
        self.by_optimizer: Mapping[str, tuple[StepRecord, ...]] = {
            name: tuple(records) for name, records in grouped.items()
        }
        self._facts: dict[type, list[Fact]] = {}
        for fact in log.facts:
            self._facts.setdefault(type(fact), []).append(fact)

    def of(self, kind: type[F]) -> tuple[F, ...]:
        """Return the facts of one kind in order."""
        return tuple(fact for fact in self._facts.get(kind, ()) if isinstance(fact, kind))

    @cached_property
    def setup(self) -> Setup | None:
        """The model and its optimizers when watching began; None for a run without it."""
        return next(iter(self.of(Setup)), None)

    @cached_property
    def parameters(self) -> Mapping[str, ParameterFacts]:
        """The parameters of :attr:`setup` by name; empty without it."""
        return {one.name: one for one in self.setup.parameters} if self.setup else {}

    @cached_property
    def plan(self) -> Plan:
        """What the user declared; an empty plan without a declaration."""
        return (self.setup.plan if self.setup else None) or Plan()

    @cached_property
    def end(self) -> RunEnd | None:
        """How the run ended; None while it is going on, or when it was killed."""
        return next(iter(self.of(RunEnd)), None)

    @cached_property
    def detailed(self) -> tuple[StepRecord, ...]:
        """The records with a reading per parameter."""
        return tuple(record for record in self.steps if record.parameters is not None)

    def learning_rate(self, record: StepRecord, group: int | None) -> float | None:
        """Return the learning rate of one group at a step; None when not known."""
        rates = record.learning_rates
        return rates[group] if group is not None and group < len(rates) else None

    @cached_property
    def sights(self) -> frozenset[Sight]:
        """The kinds of evidence that this run has."""
        return frozenset(sight for sight, present in self._present().items() if present)

    def _present(self) -> dict[Sight, bool]:
        """Say of every kind of evidence whether there is some."""
        last = self.steps[-64:]
        windows = [record.window for record in last if record.window is not None]
        batches = self.of(BatchReading)
        return {
            Sight.STEPS: bool(self.steps),
            Sight.SCALER: any(r.loss_scale_before is not None for r in last),
            Sight.LOSS: any(r.loss is not None for r in last),
            Sight.LOSS_WEIGHT: any(w.loss_weight is not None for w in windows),
            Sight.LOSS_GRAPH: bool(self.of(LossReading)),
            Sight.REPORTED_LOSS: any(r.reported_loss is not None for r in last),
            Sight.TERMS: any(r.terms for r in last),
            Sight.SETUP: self.setup is not None,
            Sight.SCHEDULER: any(one.schedulers for one in self.of(Setup)),
            Sight.FORWARDS: any(w.forwards is not None for w in windows),
            Sight.MODULES: bool(self.of(ModuleReading)),
            Sight.INPUTS: any(b.tensor.startswith("inputs") for b in batches),
            Sight.TARGETS: any(b.tensor.startswith("targets") for b in batches),
            Sight.SPLITS: len({b.split for b in batches}) > 1,
            Sight.COPIES: bool(self.of(CopyReading)),
            Sight.LOADS: bool(self.of(LoadReading)),
            Sight.REPLICAS: len({one.rank for one in self.of(ReplicaReading)}) > 1,
            Sight.METRICS: bool(self.of(MetricReading)),
            Sight.PLAN: self.setup is not None and self.setup.plan is not None,
            Sight.END: self.end is not None,
        }
