"""Reads copies of a model (EMA, SWA, best checkpoint, teacher, target network) beside the live weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gradguard.facts import CopyReading
from gradguard.sensors.pending import FactQueue, Found, number

Role = Literal["averaged", "snapshot", "frozen"]
ROLES: tuple[Role, ...] = ("averaged", "snapshot", "frozen")

_VALUES = 256
_PREFIXES = ("module.", "_orig_mod.", "ema_model.", "shadow.")


@dataclass(slots=True)
class _Copy:
    """One copy that is followed, by weak references, and its values when it was first and last read."""

    name: str
    role: Role
    tensors: Callable[[], Mapping[str, Tensor]]
    first: Tensor | None = None
    live_first: Tensor | None = None
    last: Tensor | None = None
    live_buffers: Tensor | None = None


class CopyWatch:
    """Queues one reading per copy whenever it is told to.

    Args:
        model: the live one; only a weak reference is kept.
        queue: takes the readings.
    """

    def __init__(self, model: nn.Module, queue: FactQueue) -> None:
        self._model = weakref.ref(model)
        self._queue = queue
        self._copies: dict[str, _Copy] = {}

    def follow(self, name: str, copy: nn.Module | Mapping[str, Tensor], role: Role) -> None:
        """Follow one more copy; one of the same name is replaced."""
        self._copies[name] = _Copy(name, role, _weakly(copy))

    @torch.no_grad()
    def read(self, step: int) -> None:
        """Queue one reading per copy. Sync: none."""
        model = self._model()
        if model is None or not self._copies:
            return
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        buffers = dict(model.named_buffers())
        for one in self._copies.values():
            self._read_one(one, parameters, buffers, step)

    def _read_one(
        self, one: _Copy, parameters: dict[str, Tensor], buffers: dict[str, Tensor], step: int
    ) -> None:
        theirs = one.tensors()
        pairs = [(p, theirs[n]) for n, p in parameters.items() if _fits(p, theirs.get(n))]
        values: dict[str, Tensor] = {}
        if pairs:
            values = _distances(one, _taken([p for p, _ in pairs]), _taken([c for _, c in pairs]))
        kept = [(b, theirs[n]) for n, b in buffers.items() if _fits(b, theirs.get(n))]
        kept = [(b, c) for b, c in kept if b.is_floating_point()]
        if kept:
            values |= _buffer_distances(one, [b for b, _ in kept], [c for _, c in kept])
        state = {**parameters, **buffers}
        host = {
            "step": step,
            "name": one.name,
            "role": one.role,
            "matched": sum(n in theirs for n in parameters) / max(1, len(parameters)),
            "shared_tensors": sum(_shares(state[n], c) for n, c in theirs.items() if n in state),
        }
        self._queue.put(partial(_reading, host), values)

    def close(self) -> None:
        """Forget every copy."""
        self._copies.clear()


def _weakly(copy: nn.Module | Mapping[str, Tensor]) -> Callable[[], Mapping[str, Tensor]]:
    """Return a function that gives the tensors of a copy by their name in the live model.

    Only weak references are kept: to the module, or to every tensor of a mapping.
    """
    if isinstance(copy, nn.Module):
        module = weakref.ref(copy)

        def of_module() -> Mapping[str, Tensor]:
            alive = module()
            if alive is None:
                return {}
            named = (*alive.named_parameters(), *alive.named_buffers())
            return {_bare(name): tensor for name, tensor in named}

        return of_module
    entries: Mapping[str, object] = copy  # a state dict may hold other things
    held = {_bare(n): weakref.ref(t) for n, t in entries.items() if isinstance(t, Tensor)}

    def of_mapping() -> Mapping[str, Tensor]:
        return {name: tensor for name, ref in held.items() if (tensor := ref()) is not None}

    return of_mapping


def _bare(name: str) -> str:
    """Return a name without the prefixes that wrappers add."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _fits(live: Tensor, other: Tensor | None) -> bool:
    return (
        other is not None
        and other.shape == live.shape
        and live.numel() > 0
        and not hasattr(live, "to_local")
        and not live.is_meta
    )


def _shares(live: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    if live.device != other.device or live.is_meta or hasattr(live, "to_local"):
        return False
    return (
        live.numel() > 0 and live.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )


def _taken(tensors: list[Tensor]) -> Tensor:
    """Return the first 256 values of every tensor in one, 1-D. Sync: none."""
    home = tensors[0].device
    pieces = [t.detach().reshape(-1)[:_VALUES].to(home, torch.float32) for t in tensors]
    return torch.cat(pieces)


def _distances(one: _Copy, live: Tensor, theirs: Tensor) -> dict[str, Tensor]:
    if one.first is None or one.first.shape != theirs.shape:
        one.first, one.live_first, one.last = theirs, live, None
    assert one.live_first is not None
    tiny = torch.finfo(live.dtype).tiny
    values = {
        "lag": (theirs.to(live.device) - live).norm() / live.norm().clamp_min(tiny),
        "live_moved": (live - one.live_first).norm() / one.live_first.norm().clamp_min(tiny),
        "copy_moved": (theirs - one.first).norm() / one.first.norm().clamp_min(tiny),
        "nonfinite": (~theirs.isfinite()).any(),
    }
    if one.last is not None:
        values["changed"] = (theirs != one.last).any()
    one.last = theirs
    return values


def _buffer_distances(one: _Copy, live: list[Tensor], theirs: list[Tensor]) -> dict[str, Tensor]:
    """Return the largest relative distance over the buffers, and how far the live ones have moved."""
    now = [b.detach().float().reshape(-1) for b in live]
    tiny = torch.finfo(torch.float32).tiny
    apart = [
        (b - c.detach().to(b.device, torch.float32).reshape(-1)).norm() / b.norm().clamp_min(tiny)
        for b, c in zip(now, theirs, strict=True)
    ]
    together = torch.cat([b.to(now[0].device) for b in now])
    if one.live_buffers is None or one.live_buffers.shape != together.shape:
        one.live_buffers = together
    moved = (together - one.live_buffers).norm() / one.live_buffers.norm().clamp_min(tiny)
    return {
        "buffers_differ": torch.stack([a.to(apart[0].device) for a in apart]).max(),
        "live_buffers_moved": moved,
    }


def _reading(host: dict[str, object], found: Found) -> CopyReading:
    changed = number(found, "changed")
    broken = number(found, "nonfinite")
    return CopyReading(
        **host,  # type: ignore[arg-type]
        lag=number(found, "lag"),
        live_moved=number(found, "live_moved"),
        copy_moved=number(found, "copy_moved"),
        changed=None if changed is None else changed != 0,
        buffers_differ=number(found, "buffers_differ"),
        live_buffers_moved=number(found, "live_buffers_moved"),
        nonfinite=None if broken is None else broken != 0,
    )
