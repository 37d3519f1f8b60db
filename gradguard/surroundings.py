"""Keeps an eye on the model and its optimizers, without keeping them alive."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from gradguard.facts import Plan, Setup
from gradguard.inventory import read_setup
from gradguard.schedulers import FoundScheduler, find_schedulers

_SCAN_AT = 2
"""At which reading schedulers are looked for in any case: the first is often before they are made."""

_MOST = 8
"""How many changes are read: a model that changes all the time says so with these."""


class Surroundings:
    """Reads a :class:`Setup` whenever model, optimizers or schedulers have changed.

    Args:
        model: the model; only a weak reference is kept.
        optimizers: the innermost optimizers by name; likewise.
        scaler: whether an enabled loss scaler is watched.
        plan: what the user declared.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        *,
        scaler: bool,
        plan: Plan | None,
    ) -> None:
        self._model = weakref.ref(model)
        self._optimizers = {name: weakref.ref(one) for name, one in optimizers.items()}
        self._scaler, self._plan = scaler, plan
        self._outline: list[tuple[int, bool]] | None = None
        self._schedulers: list[FoundScheduler] = []
        self._scheduled = 0
        self._left = _MOST
        self._reads = 0

    def read(self, step: int) -> Setup | None:
        """Return what there is if it is new or has changed, else None.

        Values of parameters are read the first time only. Sync: the first time, one copy to the host.
        """
        model = self._model()
        optimizers = {
            name: one for name, ref in self._optimizers.items() if (one := ref()) is not None
        }
        if model is None or not optimizers or self._left == 0:
            return None
        outline = _outline(model, optimizers)
        scheduled = _scheduled(optimizers)
        self._reads += 1
        known = outline == self._outline and scheduled == self._scheduled
        if known and self._reads != _SCAN_AT:
            return None
        first = self._outline is None
        if not first:  # also finds a scheduler that is bound to another optimizer than ours
            self._schedulers = find_schedulers(optimizers)
        self._outline, self._scheduled = outline, scheduled
        self._left -= 1
        setup = read_setup(
            model, optimizers, step=step, scaler=self._scaler, plan=self._plan, values=first
        )
        own = {id(parameter) for parameter in model.parameters()}
        return replace(setup, schedulers=tuple(one.facts(own) for one in self._schedulers))

    def schedulers_of(self, optimizer: str) -> list[FoundScheduler]:
        """Return the schedulers that were found for an optimizer."""
        return [one for one in self._schedulers if one.optimizer == optimizer]


def _outline(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> list[tuple[int, bool]]:
    """Return identity and trainability of every parameter, of the model and then of the optimizers."""
    held = [p for one in optimizers.values() for group in one.param_groups for p in group["params"]]
    return [(id(p), p.requires_grad) for p in (*model.parameters(), *held)]


def _scheduled(optimizers: Mapping[str, Optimizer]) -> int:
    """Return how many parameter groups bear the mark of a scheduler."""
    return sum("initial_lr" in group for one in optimizers.values() for group in one.param_groups)
