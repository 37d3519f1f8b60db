"""Small real training loops that the tests of the guard share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIMIZERS = {
    f"{kind}-{implementation}": (cls, options | flags)
    for kind, cls, options in (
        ("sgd", torch.optim.SGD, {"lr": 0.05}),
        ("momentum", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        ("adamw", torch.optim.AdamW, {"lr": 0.01}),
        ("adagrad", torch.optim.Adagrad, {"lr": 0.05}),
    )
    for implementation, flags in (
        ("default", {}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    )
}
POISONS = {
    "none": (),
    "nan": (torch.nan,),
    "inf": (torch.inf,),
    "both": (torch.nan, torch.inf),
}


def make_optimizer(name: str, parameters: Iterable[Tensor]) -> Optimizer:
    """Build one of the optimizers by its key in OPTIMIZERS."""
    cls, options = OPTIMIZERS[name]
    return cls(list(parameters), **options)


def small_net(*, seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Return a net with six parameter tensors, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 2)
    )


def weights_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return copies of the parameters."""
    return [p.detach().clone() for p in parameters]


def any_changed(before: list[Tensor], parameters: Iterable[Tensor]) -> bool:
    """Say whether any bit pattern changed, NaN included."""
    return any(
        not torch.equal(old.view(torch.int32), new.detach().view(torch.int32))
        for old, new in zip(before, parameters, strict=True)
    )


def poison_gradients(parameters: Iterable[Tensor], values: tuple[float, ...]) -> None:
    """Put each value into one entry of the first gradient."""
    gradient = next(p.grad for p in parameters if p.grad is not None)
    for index, value in enumerate(values):
        gradient.view(-1)[index] = value


@dataclass
class Batch:
    """A random regression batch."""

    x: Tensor
    y: Tensor


def batches(count: int, *, seed: int = 0, size: int = 4) -> list[Batch]:
    """Return ``count`` random batches from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator))
        for _ in range(count)
    ]
