"""Carries small device tensors to the host in batches, a few steps late, without waiting.

The values of a step are packed into one 1-D tensor and queued. When enough of them are queued (or the
oldest is old enough), they are copied to the host together: on an accelerator into pinned memory behind an
event that is only polled, never waited for; on the CPU directly.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

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
    """A queue of ``(token, 1-D tensor)`` rows that are delivered as lists of floats, in order.

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
        self._queued: list[tuple[T, Tensor]] = []
        self._flights: deque[_Flight[T]] = deque()
        self._last_departure_s = time.monotonic()

    def push(self, token: T, values: Tensor) -> None:
        """Queue one row and deliver what has arrived. Sync: none."""
        self._queued.append((token, values))
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
        rows = [row for _, row in self._queued]
        self._queued = []
        self._last_departure_s = time.monotonic()
        # Towards the accelerator: in the other direction every row would be waited for.
        home = next((row.device for row in rows if row.device.type != "cpu"), rows[0].device)
        packed = torch.cat([row.to(home, non_blocking=True) for row in rows])
        host, event = _start_copy(packed)
        self._flights.append(_Flight(tokens, [len(row) for row in rows], host, packed, event))

    def _land(self, flight: _Flight[T]) -> None:
        values, start = flight.host.tolist(), 0
        for token, size in zip(flight.tokens, flight.sizes, strict=True):
            self._deliver(token, values[start : start + size])
            start += size


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
