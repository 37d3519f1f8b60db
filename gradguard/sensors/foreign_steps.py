"""Notices optimizers that are not watched and step parameters of the watched model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradguard.facts import Fact, ForeignStep

_REPORTED_AT = (1, 2, 3, 8, 64)
"""At which number of such steps one is reported."""


class ForeignSteps:
    """One hook for the steps of every optimizer of this process.

    Args:
        model: the watched one; only a weak reference is kept.
        watched: the watched optimizers by name; likewise.
        attempts: gives the number of attempts of the optimizer with this name.
        add: takes the readings.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, Optimizer],
        *,
        attempts: Callable[[str], int],
        add: Callable[[Fact], None],
        protect: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._model = weakref.ref(model)
        self._watched = {name: weakref.ref(one) for name, one in watched.items()}
        self._attempts, self._add, self._protect = attempts, add, protect
        self._counts: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._seen_at: dict[str, int] = {}
        self._inside = 0
        self._handle = register_optimizer_step_post_hook(self._stepped)

    def close(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def _stepped(self, optimizer: Optimizer, *_: Any) -> None:
        if not any(ref() is optimizer for ref in self._watched.values()):
            self._protect("foreign", lambda: self._note(optimizer))

    def _note(self, optimizer: Optimizer) -> None:
        count = self._counts[optimizer] = self._counts.get(optimizer, 0) + 1
        model = self._model()
        if count not in _REPORTED_AT or model is None:
            return
        own = {id(p) for p in model.parameters()}
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        shared = len(own.intersection(held))
        if shared:
            self._add(
                ForeignStep(
                    step=sum(self._attempts(name) for name in self._watched),
                    kind=type(optimizer).__name__,
                    shared=shared,
                    same_kind=self._replaces(optimizer),
                    count=count,
                )
            )

    def _replaces(self, optimizer: Optimizer) -> bool:
        """Whether a watched optimizer of its class has not stepped since this one was last reported."""
        still = False
        for name, ref in self._watched.items():
            alive, attempts = ref(), self._attempts(name)
            stopped = self._seen_at.get(name, -1) == attempts
            self._seen_at[name] = attempts
            still |= stopped and (alive is None or type(alive) is type(optimizer))
        return still
