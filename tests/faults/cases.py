"""What a fault of the zoo is, and the small pieces its loops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradguard.runlog import RunLog

FaultyLoop = Callable[[bool], RunLog]
"""Trains and returns the log; told whether the fault is planted (or repaired)."""

HealthyLoop = Callable[[], RunLog]


@dataclass(frozen=True)
class Fault:
    """A training loop with a planted fault, and its repaired twin.

    Attributes:
        name: of the loop. family: of the cause.
        codes: codes that name the right cause; one of them must be a root cause of the diagnosis.
        place: what the place of that finding must contain; None for a fault without a place.
        since: first optimizer step that is wrong.
        loop: the training.
    """

    name: str
    family: str
    codes: tuple[str, ...]
    place: str | None
    since: int
    loop: FaultyLoop


@dataclass(frozen=True)
class Healthy:
    """A training loop without a fault that tempts a rule."""

    name: str
    loop: HealthyLoop


FAULTS: list[Fault] = []
HEALTHY: list[Healthy] = []


def fault(
    family: str, *codes: str, place: str | None = None, since: int = 0
) -> Callable[[FaultyLoop], FaultyLoop]:
    """Add a loop to the zoo."""

    def add(loop: FaultyLoop) -> FaultyLoop:
        FAULTS.append(Fault(loop.__name__, family, codes, place, since, loop))
        return loop

    return add


def healthy(loop: HealthyLoop) -> HealthyLoop:
    """Add a healthy loop to the zoo."""
    HEALTHY.append(Healthy(loop.__name__, loop))
    return loop


def network(width: int = 16, inputs: int = 8, outputs: int = 1) -> nn.Sequential:
    """Return a small perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def regression(steps: int, *, inputs: int = 8, rows: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a smooth regression task."""
    direction = torch.randn(inputs, 1)
    for _ in range(steps):
        x = torch.randn(rows, inputs)
        yield x, torch.tanh(x @ direction) + 0.05 * torch.randn(rows, 1)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error."""
    return nn.functional.mse_loss(output, target)
