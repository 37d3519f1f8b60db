"""Carries small device tensors to the host in batches, a few steps late, without waiting.

The tensors of a step are queued as they are. When enough steps are queued (or the oldest is old enough), all
are packed into one tensor and copied to the host together: on an accelerator into pinned memory behind an
event that is only polled, never waited for; on the CPU directly.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gradguard.sampling import wide_dtype

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    """One batch of rows on its way to the host; ``event`` is None where the copy is already done."""

    tokens: list[T]
    sizes: list[int]
    host: Tensor
    packed: Tensor  # kept until the copy has ended
    event: torch.cuda.Event | None


class DeferredRows(Generic[T]):
    """A queue of tokens with tensors, which are delivered as lists of floats, in order.

    Args:
        deliver: called with every token and its values once they are on the host.
        lag: rows that are collected before a copy is started.
        max_age_s: a copy is also started when the last one is older than this.

    Sync: :meth:`push` and :meth:`poll` never wait for the device; :meth:`flush` does.
    """

    def __init__(
        self, deliver: Callable[[T, list[float]], None], *, lag: int, max_age_s: float
    ) -> None:
        self._deliver, self._lag, self._max_age_s = deliver, lag, max_age_s
        self._queued: list[tuple[T, Sequence[Tensor]]] = []
        self._flights: deque[_Flight[T]] = deque()
        self._last_departure_s = time.monotonic()

    def push(self, token: T, pieces: Sequence[Tensor]) -> None:
        """Queue one row and deliver what has arrived. Sync: none.

        Args:
            token: handed back with the values.
            pieces: the values, of any shape and dtype; they must not be written any more.
        """
        self._queued.append((token, pieces))
        self.poll()

    def poll(self) -> None:
        """Start a copy if it is due and deliver the rows that have arrived. Sync: none."""
        age_s = time.monotonic() - self._last_departure_s
        if len(self._queued) >= self._lag or (self._queued and age_s >= self._max_age_s):
            self._depart()
        while self._flights and _arrived(self._flights[0]):
            self._land(self._flights.popleft())

    def flush(self) -> None:
        """Deliver everything. Sync: waits for the device."""
        if self._queued:
            self._depart()
        while self._flights:
            flight = self._flights.popleft()
            if flight.event is not None:
                flight.event.synchronize()
            self._land(flight)

    def _depart(self) -> None:
        tokens = [token for token, _ in self._queued]
        sizes = [sum(map(Tensor.numel, pieces)) for _, pieces in self._queued]
        every = [piece for _, pieces in self._queued for piece in pieces]
        self._queued = []
        self._last_departure_s = time.monotonic()
        packed = _packed(every)
        host, event = _start_copy(packed)
        self._flights.append(_Flight(tokens, sizes, host, packed, event))

    def _land(self, flight: _Flight[T]) -> None:
        values, start = flight.host.tolist(), 0
        for token, size in zip(flight.tokens, flight.sizes, strict=True):
            self._deliver(token, values[start : start + size])
            start += size


def _packed(pieces: Sequence[Tensor]) -> Tensor:
    """Return all values one after the other, in wide precision. Sync: none."""
    if not pieces:
        return torch.zeros(0)
    # Towards the accelerator: in the other direction every piece would be waited for.
    home = next((p.device for p in pieces if p.device.type != "cpu"), pieces[0].device)
    wide = wide_dtype(home)
    parts: list[Tensor] = []
    with torch.no_grad():
        for kind, some in groupby(pieces, lambda piece: (piece.dim(), piece.dtype, piece.device)):
            alike = list(some)
            # Most pieces are single numbers: together they take one kernel.
            flat = [torch.stack(alike)] if kind[0] == 0 else [one.reshape(-1) for one in alike]
            parts += [one.to(home, wide, non_blocking=True) for one in flat]
        return torch.cat(parts)


def _start_copy(packed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    on_cuda = packed.device.type == "cuda"
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=on_cuda)
    # Other accelerators than CUDA have no event here: their copy waits.
    host.copy_(packed, non_blocking=on_cuda or packed.device.type == "cpu")
    if not on_cuda:
        return host, None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return host, event


def _arrived(flight: _Flight[T]) -> bool:
    return flight.event is None or bool(flight.event.query())  # type: ignore[no-untyped-call]
