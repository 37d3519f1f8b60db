"""Facts whose numbers are still on the device, carried to the host a few steps late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradguard.deferred import DeferredRows
from gradguard.facts import Fact
from gradguard.sampling import wide_dtype

Found = Mapping[str, Sequence[float]]
Maker = Callable[[Found], Fact | None]

_MAX_AGE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Pending:
    """What is on its way: who makes the fact of it, and where each value lies."""

    make: Maker
    layout: tuple[tuple[str, int], ...]


class FactQueue:
    """Collects facts whose values are tensors; hands them on once the values are on the host.

    Args:
        add: takes the finished facts.
        lag: how many facts are collected before a copy is started.

    Sync: :meth:`put` and :meth:`poll` never wait for the device; :meth:`flush` does.
    """

    def __init__(self, add: Callable[[Fact], None], *, lag: int) -> None:
        self._add = add
        self._rows: DeferredRows[_Pending] = DeferredRows(
            self._deliver, lag=lag, max_age_s=_MAX_AGE_S
        )

    def put_own(self, make: Maker, values: Mapping[str, Tensor]) -> None:
        """Queue a fact of values that nobody else can write to: they need not be copied. Sync: none."""
        layout = tuple((name, value.numel()) for name, value in values.items())
        self._rows.push(_Pending(make, layout), tuple(values.values()))

    def put(self, make: Maker, values: Mapping[str, Tensor]) -> None:
        """Queue a fact: ``make`` is called with the values as lists of numbers, by name. Sync: none."""
        flat = {name: value.detach().reshape(-1) for name, value in values.items()}
        layout = tuple((name, len(value)) for name, value in flat.items())
        if not flat:  # in the queue all the same: facts keep their order
            self._rows.push(_Pending(make, ()), ())
            return
        home = next(iter(flat.values())).device
        pieces = [value.to(home, non_blocking=True) for value in flat.values()]
        self._rows.push(_Pending(make, layout), (torch.cat(pieces).to(wide_dtype(home)),))

    def poll(self) -> None:
        """Hand on what has arrived. Sync: none."""
        self._rows.poll()

    def flush(self) -> None:
        """Hand on everything. Sync: waits for the device."""
        self._rows.flush()

    def _deliver(self, pending: _Pending, values: list[float]) -> None:
        found: dict[str, Sequence[float]] = {}
        start = 0
        for name, size in pending.layout:
            found[name] = values[start : start + size]
            start += size
        self._finish(pending.make, found)

    def _finish(self, make: Maker, found: Found) -> None:
        fact = make(found)
        if fact is not None:
            self._add(fact)


def number(found: Found, name: str) -> float | None:
    """Return a single value; None when it was not measured."""
    values = found.get(name)
    return None if values is None else values[0]


def count(found: Found, name: str) -> int | None:
    """Return a single count; None when it was not measured."""
    values = found.get(name)
    return None if values is None else int(values[0])
