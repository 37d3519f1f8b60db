"""Flags of tensors (holds NaN, holds Inf, holds anything but zero) that wait on the device until asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradguard.norms import dense_values


class Flags(NamedTuple):
    """What a tensor held; all False for an empty one."""

    nan: bool
    inf: bool
    nonzero: bool

    @property
    def bad(self) -> bool:
        """Whether there was a NaN or an Inf."""
        return self.nan or self.inf

    @property
    def value(self) -> str:
        """``"nan"`` or ``"inf"``."""
        return "nan" if self.nan else "inf"


class FlagRoll:
    """Takes the flags of tensors one after the other and reads all of them at once.

    Memory: two numbers a tensor, and nothing of the tensor itself.
    """

    def __init__(self) -> None:
        self._pending: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._pending)

    def take(self, tensor: Tensor) -> int:
        """Note the flags of a tensor and return their number. Sync: none for dense tensors."""
        with torch.no_grad():
            self._pending.append(_ends(tensor))
        return len(self._pending) - 1

    def read(self) -> list[Flags]:
        """Return all flags so far by number. Sync: one copy to the host per device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for number, ends in enumerate(self._pending):
            alike.setdefault((ends.device, ends.dtype), []).append(number)
        result: dict[int, Flags] = {}
        for numbers in alike.values():
            rows: list[Sequence[float]] = torch.stack([self._pending[i] for i in numbers]).tolist()
            result |= {i: _flags(*row) for i, row in zip(numbers, rows, strict=True)}
        return [result[i] for i in range(len(self._pending))]


def _ends(tensor: Tensor) -> Tensor:
    """Return smallest and largest value, in one pass; both are NaN if any value is."""
    if tensor.device.type == "meta":
        return torch.zeros(2)
    values = dense_values(tensor)
    if values.numel() == 0:
        return torch.zeros(2, dtype=values.dtype, device=values.device)
    return torch.stack(torch.aminmax(values))


def _flags(low: float, high: float) -> Flags:
    """Read the flags off the extremes; beside a NaN an Inf is not looked for."""
    return Flags(
        nan=math.isnan(low),
        inf=math.isinf(low) or math.isinf(high),
        nonzero=low != 0 or high != 0,
    )
