"""Finds the learning-rate schedulers of a loop, which nobody hands over: they are looked for in memory.

An optimizer does not know its schedulers, so every object that Python's collector tracks is asked for
its type once. Objects that were moved out of the collector's sight (``gc.freeze``) are not found.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from gradguard.facts import SchedulerFacts
from gradguard.scaler import optimizer_chain

_SETTINGS = (
    "T_max",
    "eta_min",
    "step_size",
    "gamma",
    "total_steps",
    "total_iters",
    "T_0",
    "T_mult",
    "factor",
    "patience",
    "last_epoch",
)
_LENGTHS: dict[type[LRScheduler], str] = {
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.OneCycleLR: "total_steps",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.PolynomialLR: "total_iters",
}
"""Under which name a scheduler keeps after how many calls of its ``step`` it has run its course."""


class FoundScheduler:
    """One scheduler, known by a weak reference.

    Attributes:
        kind: class name.
        optimizer: name of the watched optimizer whose rates it changes; None for one that is not
            watched.
    """

    def __init__(self, scheduler: LRScheduler, optimizer: str | None) -> None:
        self.kind, self.optimizer = type(scheduler).__name__, optimizer
        self._planned = _planned_steps(scheduler)
        self._scheduler = weakref.ref(scheduler)

    def __repr__(self) -> str:
        return f"FoundScheduler({self.kind}, optimizer={self.optimizer!r})"

    @property
    def last_epoch(self) -> int | None:
        """How often it has stepped, as it counts itself; None when it is gone. Sync: none."""
        scheduler = self._scheduler()
        value = None if scheduler is None else vars(scheduler).get("last_epoch")
        return int(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def facts(self, model_parameters: Collection[int]) -> SchedulerFacts:
        """Return what a rule needs to know; without settings when the scheduler is gone.

        Args:
            model_parameters: ids of the parameters of the model.

        Sync: none: a setting that is kept as a tensor is left out.
        """
        scheduler = self._scheduler()
        settings: dict[str, float] = {}
        if scheduler is not None:
            settings = _settings(scheduler)
            if self.optimizer is None:
                shares = any(id(p) in model_parameters for p in _held(scheduler))
                settings["shares_parameters"] = float(shares)
        return SchedulerFacts(
            kind=self.kind,
            optimizer=self.optimizer,
            settings=settings,
            planned_steps=self._planned,
        )


def find_schedulers(optimizers: Mapping[str, Optimizer]) -> list[FoundScheduler]:
    """Return every learning-rate scheduler of this process: those of ``optimizers`` first.

    Those inside another scheduler (``SequentialLR``, ``ChainedScheduler``, warm-up wrappers) are part
    of it and not listed. A scheduler that nobody uses any more is listed until Python has freed it.

    Sync: none. Costs one walk over the objects of the process: milliseconds per 100,000 of them.
    """
    names = {id(part): name for name, one in optimizers.items() for part in optimizer_chain(one)}
    # By type: isinstance would ask proxies for the class of what they stand for, which may be gone.
    alive = [o for o in gc.get_objects() if issubclass(type(o), LRScheduler)]
    inner = {id(part) for one in alive for part in _parts(one)}
    found = [FoundScheduler(one, _name_of(one, names)) for one in alive if id(one) not in inner]
    places = {name: place for place, name in enumerate(optimizers)}
    return sorted(
        found, key=lambda one: len(places) if one.optimizer is None else places[one.optimizer]
    )


def _parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield the schedulers that ``scheduler`` drives."""
    for value in vars(scheduler).values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if issubclass(type(part), LRScheduler):
                yield part


def _name_of(scheduler: LRScheduler, names: Mapping[int, str]) -> str | None:
    chain = optimizer_chain(vars(scheduler).get("optimizer"))
    return next((names[id(part)] for part in chain if id(part) in names), None)


def _held(scheduler: LRScheduler) -> Iterator[object]:
    """Yield the parameters whose rate ``scheduler`` changes."""
    for group in _groups(scheduler):
        yield from group["params"]


def _groups(scheduler: LRScheduler) -> list[dict[str, Any]]:
    for part in optimizer_chain(vars(scheduler).get("optimizer")):
        if isinstance(part, Optimizer):
            return part.param_groups
    return []


def _settings(scheduler: LRScheduler) -> dict[str, float]:
    kept = vars(scheduler)
    found: dict[str, object] = {name: kept.get(name) for name in _SETTINGS}
    found["min_lr"] = _smallest(kept.get("min_lrs"))
    found["max_lr"] = _largest(kept.get("max_lrs"))
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        found["max_lr"] = _largest([group.get("max_lr") for group in _groups(scheduler)])
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        found["mode_max"] = kept.get("mode") == "max"
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _smallest(values: object) -> float | None:
    return min(_numbers(values), default=None)


def _largest(values: object) -> float | None:
    return max(_numbers(values), default=None)


def _numbers(values: object) -> list[float]:
    found = values if isinstance(values, list | tuple) else [values]
    return [float(value) for value in found if isinstance(value, int | float)]


def _planned_steps(scheduler: LRScheduler) -> int | None:
    """Return after how many calls of ``step`` the schedule has run its course; None when open."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        milestones = _numbers(vars(scheduler).get("_milestones"))
        *_, last = _parts(scheduler)
        rest = _planned_steps(last)
        return None if rest is None or not milestones else int(milestones[-1]) + rest
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        lengths = [_planned_steps(part) for part in _parts(scheduler)]
        known = [length for length in lengths if length is not None]
        return max(known) if known and len(known) == len(lengths) else None
    for kind, name in _LENGTHS.items():
        value = vars(scheduler).get(name)
        if isinstance(scheduler, kind) and isinstance(value, int | float) and math.isfinite(value):
            return math.ceil(value)
    return None
