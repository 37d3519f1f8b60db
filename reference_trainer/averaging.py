"""An exponential moving average of the weights whose decay warms up with the steps taken."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def warmed_up_decay(taken: int, decay: float) -> float:
    """Return the decay of the update after the ``taken``-th step: min(decay, (1 + t) / (10 + t)).

    A constant 0.999 would leave an average of 240 steps 79 % initial weights.
    """
    return min(decay, (1 + taken) / (10 + taken))


def averaging_share(taken: int, *, decay: float, mean_from: int | None) -> float:
    """Return the share of the live weights in the average after the ``taken``-th step.

    Args:
        taken: steps taken, from 1.
        decay: ceiling of the decay of the exponential average.
        mean_from: steps after which the average is the plain mean of the live weights since then
            (stochastic weight averaging); None for never.
    """
    if mean_from is not None and taken > mean_from:
        return 1.0 / (taken - mean_from)
    return 1.0 - warmed_up_decay(taken, decay)


class AveragedWeights(Generic[Module]):
    """A copy of a model that follows it slowly; what is validated and saved.

    The copy is a module of its own: nothing is swapped in or out of the live model, so an exception
    during validation cannot leave the wrong weights behind. For the same reason stochastic weight
    averaging is a change of the average's rule and no second copy that must find its way back.

    Args:
        model: the live one.
        decay: ceiling of the decay.
        mean_from: steps after which the average is the plain mean since then; None for never.

    Memory: one copy of the parameters and buffers.
    """

    def __init__(self, model: Module, *, decay: float, mean_from: int | None = None) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"averaging decay {decay} is outside [0, 1); 0 keeps the live weights")
        self.module = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
        self.decay, self.mean_from = decay, mean_from
        self.taken = 0
        self._live = model

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live weights; call it once after each taken step.

        Sync: none.
        """
        self.taken += 1
        share = averaging_share(self.taken, decay=self.decay, mean_from=self.mean_from)
        for average, current in zip(self.module.parameters(), self._live.parameters(), strict=True):
            average.lerp_(current, share)
        for copied, live in zip(self.module.buffers(), self._live.buffers(), strict=True):
            copied.copy_(live)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, not copied, and how many steps they hold."""
        return {"weights": self.module.state_dict(), "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; every tensor must match by name and shape."""
        self.module.load_state_dict(dict(state["weights"]), strict=True)
        self.taken = state["taken"]
