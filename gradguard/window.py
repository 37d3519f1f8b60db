"""What the user tells the guard about one optimizer step, averaged over its micro-steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gradguard.sampling import wide_dtype

Number = Tensor | float


@dataclass(slots=True)
class Mean:
    """Mean of scalars that may still be on the device. Memory: one value."""

    total: Number = 0.0
    count: int = 0

    def add(self, value: Number) -> None:
        """Add one value; a tensor must not be written any more (see :func:`copies_of`). Sync: none."""
        if isinstance(value, Tensor) and isinstance(self.total, Tensor):
            value = value.to(self.total.device, non_blocking=True)
        self.total = value if self.count == 0 else self.total + value
        self.count += 1

    def value(self) -> Number:
        """Return the mean of what was added. Sync: none."""
        return self.total if self.count == 1 else self.total / self.count


@dataclass(slots=True)
class Window:
    """Observations and counts between two attempts of one optimizer.

    Attributes:
        means: mean of every observed value.
        batches: batches drawn from a loader.
        weights: mean derivative of what was differentiated with respect to every observed value.
        hooked: how many observed values could have such a derivative.
    """

    means: dict[str, Mean] = field(default_factory=dict)
    batches: int | None = None
    weights: dict[str, Mean] = field(default_factory=dict)
    hooked: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, value: Number) -> None:
        """Add one observation under ``key``; a tensor must be a copy."""
        self.means.setdefault(key, Mean()).add(value)

    def follow(self, key: str, value: Number) -> None:
        """Note the derivative that a coming backward pass takes with respect to ``value``. Sync: none.

        A value without a graph has none; one whose backward pass is over is never reached.
        """
        if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is not None:
            self.hooked[key] = self.hooked.get(key, 0) + 1
            value.register_hook(partial(_note, self.weights, key))  # type: ignore[no-untyped-call]

    def seen(self, key: str) -> int:
        """Return how often ``key`` was observed."""
        return self.means[key].count if key in self.means else 0


def _note(weights: dict[str, Mean], key: str, gradient: Tensor) -> None:
    weights.setdefault(key, Mean()).add(copies_of({key: gradient})[key])


def copies_of(values: Mapping[str, Number]) -> dict[str, Number]:
    """Return the values as they are now: tensors as 0-dim copies in wide precision. Sync: none.

    Tensors of one kind are copied together: a loss may have a dozen terms.

    Args:
        values: floats, and tensors of one value each.
    """
    copies = dict(values)
    kinds: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            kinds.setdefault((value.dtype, value.device), {})[key] = value
    with torch.no_grad():
        for (_, device), alike in kinds.items():
            flat = [value.reshape(()) if value.dim() else value for value in alike.values()]
            wide = wide_dtype(device)
            if len(flat) == 1:
                copied: Sequence[Tensor] = (flat[0].to(wide, copy=True),)
            else:
                copied = torch.stack(flat).to(wide).unbind()
            copies.update(zip(alike, copied, strict=True))
    return copies


def checked(key: str, value: object) -> Number:
    """Return ``value`` if it is one number.

    Raises:
        TypeError: it is no number. ValueError: it is a tensor of several values.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"guard.observe({key}=...): expected one real number, got a {value.dtype} tensor of "
                f"shape {tuple(value.shape)}; reduce it first, for example with .mean()"
            )
        return value
    if isinstance(value, (int, float)):
        return float(value)
    raise TypeError(
        f"guard.observe({key}=...): expected a tensor of one value or a float, "
        f"got {type(value).__name__}"
    )
