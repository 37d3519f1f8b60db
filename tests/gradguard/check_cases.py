"""Small models, right and wrong ones, that the tests of the checks before training share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer


class HalvedSquare(torch.autograd.Function):
    """A square whose backward forgot its factor of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x


class Net(nn.Module):
    """Two layers with a fault of choice between them."""

    def __init__(self, fault: str = "none") -> None:
        super().__init__()
        self.first, self.last, self.fault = nn.Linear(6, 8), nn.Linear(8, 2), fault

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.fault == "detach":
            h = h.detach()
        if self.fault == "no_grad":
            with torch.no_grad():
                h = self.first(x).tanh()
        if self.fault == "nan":
            h = torch.sqrt(h - 10.0)
        if self.fault == "square":
            h = HalvedSquare.apply(h)
        return self.last(h)


class Tied(nn.Module):
    """An autoencoder whose second layer is the first one's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.again(self.encode(x).tanh()))


class ZeroStart(nn.Module):
    """A low-rank adapter: its second factor begins at zero, so the first gets no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(6, 3, bias=False), nn.Linear(3, 2, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x).tanh())


def mlp() -> nn.Module:
    """Return two layers with a ReLU."""
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def normalised() -> nn.Module:
    """Return two layers with a BatchNorm: the bias before it has no effect."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 2))


def with_dropout() -> nn.Module:
    """Return two layers with a dropout."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batch norm": normalised,
    "dropout": with_dropout,
    "tied weights": Tied,
    "zero start": ZeroStart,
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


@dataclass
class Job:
    """A model, its optimizer and one fixed batch."""

    model: nn.Module
    optimizer: Optimizer
    x: Tensor
    y: Tensor
    scaler: GradScaler | None = None

    def loss(self) -> Tensor:
        """Return the loss with its graph, under autocast where there is a scaler."""
        with torch.autocast("cpu", torch.float16, enabled=self.scaler is not None):
            return F.mse_loss(self.model(self.x), self.y)

    def complete(self) -> Tensor:
        """Run one complete step."""
        self.optimizer.zero_grad()
        loss = self.loss()
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss


def job(
    model: nn.Module | str = "mlp",
    optimizer: Optimizer | str = "SGD",
    *,
    scaler: GradScaler | None = None,
    rows: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Job:
    """Build a job; the same one every time."""
    torch.manual_seed(0)
    built = (MODELS[model]() if isinstance(model, str) else model).to(dtype)
    stepper = OPTIMIZERS[optimizer](built) if isinstance(optimizer, str) else optimizer
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator, dtype=dtype)
    y = torch.randn(rows, 2, generator=generator, dtype=dtype)
    return Job(built, stepper, x, y, scaler)


def warmed(job: Job, steps: int = 2) -> Job:
    """Train a little, so that there are gradients, running statistics and optimizer state."""
    for _ in range(steps):
        job.complete()
    job.loss().backward()
    return job
