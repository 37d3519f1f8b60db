"""Every optimizer of ``torch.optim`` that a gate can stop, with a small model and good and bad batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

OPTIONS: dict[str, dict[str, Any]] = {
    "ASGD": {},
    "Adadelta": {"weight_decay": 0.1},
    "Adafactor": {"weight_decay": 0.1},
    "Adagrad": {"weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "Adamax": {"weight_decay": 0.1},
    "Muon": {},
    "NAdam": {"weight_decay": 0.1},
    "RAdam": {"weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1, "momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9},
    "SparseAdam": {},
}
"""One entry for each optimizer, with options that would move the weights even without a gradient."""

REFUSED = ("LBFGS",)


def torch_optimizers() -> set[str]:
    """Return the names of all optimizer classes that this version of torch exports."""
    named = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
    classes = {name: c for name, c in named.items() if inspect.isclass(c)}
    return {name for name, c in classes.items() if issubclass(c, Optimizer) and c is not Optimizer}


@dataclass(frozen=True)
class Case:
    """One optimizer with one set of options."""

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        extra = [key for key in ("foreach", "fused") if self.options.get(key)]
        return "-".join([self.name, *extra])

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        if self.name == "SparseAdam":
            return nn.Embedding(5, 3, sparse=True)
        bias = self.name != "Muon"  # takes matrices only
        return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))

    def optimizer(self, model: nn.Module) -> Optimizer:
        return getattr(torch.optim, self.name)(model.parameters(), lr=0.01, **self.options)


def _variants() -> Iterator[Case]:
    for name in sorted(torch_optimizers() & OPTIONS.keys()):
        yield Case(name, OPTIONS[name])
        accepted = inspect.signature(getattr(torch.optim, name)).parameters
        for switch in ("foreach", "fused"):
            if switch in accepted:
                yield Case(name, {**OPTIONS[name], switch: True})


CASES = tuple(_variants())
PLAIN = Case("AdamW", OPTIONS["AdamW"])
FUSED = tuple(case for case in CASES if case.options.get("fused"))


def batch(model: nn.Module, index: int) -> Tensor:
    """Return good batch number ``index``."""
    generator = torch.Generator().manual_seed(1000 + index)
    if isinstance(model, nn.Embedding):
        return torch.randint(0, 5, (6,), generator=generator)
    return torch.randn(6, 4, generator=generator)


def loss_of(model: nn.Module, index: int, *, factor: float = 1.0) -> Tensor:
    """Return the loss on batch ``index``; ``factor`` poisons it: NaN, Inf or 0."""
    return model(batch(model, index)).square().mean() * factor


def poisoned_gradients(optimizer: Optimizer, poison: float) -> None:
    """Put ``poison`` into one entry of the first gradient there is."""
    gradient = next(p.grad for g in optimizer.param_groups for p in g["params"])
    (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = poison


def bits(value: Any) -> Any:
    """Return nested containers with every tensor as its bytes: equal means equal bit for bit."""
    if isinstance(value, Tensor):
        flat = value.detach().to_dense().contiguous().view(-1)
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        return (value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes())
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [bits(entry) for entry in value]
    return value


def snapshot(model: nn.Module, optimizer: Optimizer) -> Any:
    """Return parameters, buffers and optimizer state, bit for bit."""
    return bits((model.state_dict(), optimizer.state_dict()))


def backward(model: nn.Module, optimizer: Optimizer, index: int, factor: float = 1.0) -> Tensor:
    """Run one backward pass and return the loss; a factor of NaN, Inf or 0 poisons the gradients."""
    optimizer.zero_grad()
    loss = loss_of(model, index)
    loss.backward()
    if factor == 0.0:
        for parameter in model.parameters():
            parameter.grad = parameter.grad * 0.0
    elif factor != 1.0:
        poisoned_gradients(optimizer, factor)
    return loss.detach()
