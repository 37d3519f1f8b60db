"""Reads a ``GradScaler``. The only file of this library that touches its private state.

``found_inf`` and the scale are cloned *before* ``update()``: update adds the flags of several
optimizers in place and then drops the state. An unfused skip fires no optimizer hook at all, so the one
event that happens for every attempted step is ``scaler.update()``. It is the only method this library
wraps: once per class that defines it, with a weak registry, without any effect on scalers that are not
watched, and put back when the last watch ends.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradguard.records import ScalerState


@dataclass(frozen=True, slots=True)
class ScalerReading:
    """State of one optimizer on a scaler, still on the device.

    Attributes:
        stage: ``"disabled"``, ``"ready"``, ``"unscaled"`` or ``"stepped"``.
        found_inf: 0-dim clone of the flag, above 0 when a non-finite gradient was seen; None when the
            gradients were not checked in this iteration.
        loss_scale: 0-dim clone of the scale; None before the first ``scaler.scale()``.
    """

    stage: str
    found_inf: Tensor | None = None
    loss_scale: Tensor | None = None


def optimizer_chain(optimizer: object) -> Iterator[object]:
    """Yield ``optimizer`` and the optimizers it wraps, outermost first.

    Trainer wrappers keep the real one under ``optimizer`` or ``_optimizer``; the scaler's state is kept
    under the id of the object that was handed to ``scaler.step``.
    """
    seen: set[int] = set()
    inner: object | None = optimizer
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        inner = getattr(inner, "optimizer", None) or getattr(inner, "_optimizer", None)


def innermost_optimizer(optimizer: object) -> Optimizer:
    """Return the ``torch.optim.Optimizer`` that a trainer's wrapper holds, or the optimizer itself.

    Raises:
        TypeError: there is no ``torch.optim.Optimizer`` inside.
    """
    *_, inner = optimizer_chain(optimizer)
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"watching an optimizer: expected a torch.optim.Optimizer or a wrapper that holds one as "
            f".optimizer, got {type(optimizer).__name__}; pass the optimizer that is stepped"
        )
    return inner


def check_scaler(scaler: object) -> GradScaler:
    """Return ``scaler`` if it is a GradScaler.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(scaler, GradScaler):
        raise TypeError(
            f"reading a loss scaler: expected a torch.amp.GradScaler, got {type(scaler).__name__}; "
            "pass the scaler whose scale(), step() and update() the loop calls"
        )
    return scaler


def optimizer_keys(optimizer: object) -> tuple[int, ...]:
    """Return the keys under which a scaler may keep the state of ``optimizer``."""
    return tuple(id(candidate) for candidate in optimizer_chain(optimizer))


def read_scaler(scaler: GradScaler, keys: tuple[int, ...]) -> ScalerReading:
    """Return the state of the optimizer with these keys as device tensors that stay valid.

    The lookup is by ``id`` with ``get``: asking the scaler's ``defaultdict`` by object always misses and
    leaves a stray entry behind that breaks pickling. Sync: none.
    """
    if not scaler.is_enabled():
        return ScalerReading("disabled")
    state = _state_of(scaler, keys)
    scale = _clone(scaler._scale)
    if state is None:
        return ScalerReading("ready", None, scale)
    flags = [_clone(flag) for flag in state["found_inf_per_device"].values()]
    return ScalerReading(state["stage"].name.lower(), _combined(flags), scale)


def loss_scale(scaler: GradScaler) -> Tensor | None:
    """Return a clone of the current loss scale, or None (disabled, or not used yet). Sync: none."""
    return _clone(scaler._scale) if scaler.is_enabled() else None


def stray_entries(scaler: GradScaler) -> int:
    """Return how many entries of the scaler's table have a key that is no ``id``: somebody asked by object.

    Sync: none.
    """
    if not scaler.is_enabled():
        return 0
    return sum(not isinstance(key, int) for key in scaler._per_optimizer_states)


def scaler_stage(scaler: GradScaler, optimizer: object) -> str:
    """Return ``"disabled"``, ``"ready"``, ``"unscaled"`` or ``"stepped"``. Sync: none."""
    return stage_of(check_scaler(scaler), optimizer_keys(optimizer))


def stage_of(scaler: GradScaler, keys: tuple[int, ...]) -> str:
    """Return :func:`scaler_stage` of the optimizer with these keys. Sync: none."""
    if not scaler.is_enabled():
        return "disabled"
    state = _state_of(scaler, keys)
    return "ready" if state is None else state["stage"].name.lower()


def scaler_state(scaler: GradScaler, optimizer: Optimizer) -> ScalerState:
    """Return the state of ``optimizer`` on ``scaler`` as plain values.

    The flag can be read from the end of ``unscale_()`` or ``step()`` until ``update()``. An optimizer that
    this scaler has not seen in this iteration is at stage ``"ready"``.

    Raises:
        TypeError: ``scaler`` is no GradScaler or ``optimizer`` holds no optimizer.

    Sync: one copy to the host.
    """
    check_scaler(scaler)
    innermost_optimizer(optimizer)
    reading = read_scaler(scaler, optimizer_keys(optimizer))
    if reading.stage == "disabled":
        return ScalerState(enabled=False)
    growth = scaler._growth_tracker
    return ScalerState(
        enabled=True,
        stage=reading.stage,
        loss_scale=None if reading.loss_scale is None else float(reading.loss_scale),
        found_inf=None if reading.found_inf is None else float(reading.found_inf),
        growth_tracker=None if growth is None else int(growth),
    )


def _state_of(scaler: GradScaler, keys: tuple[int, ...]) -> dict[str, Any] | None:
    states = scaler._per_optimizer_states
    for key in keys:
        state: dict[str, Any] | None = states.get(key)
        if state is not None:
            return state
    return None


def _clone(value: Tensor | None) -> Tensor | None:
    """Return a 0-dim copy; a sharded scaler's flag has shape ``(1,)``."""
    return None if value is None else value.detach().reshape(()).clone()


def _combined(flags: list[Tensor | None]) -> Tensor | None:
    known = [flag for flag in flags if flag is not None]
    if len(known) < 2:
        return known[0] if known else None
    home = known[0].device
    return torch.stack([flag.to(home, non_blocking=True) for flag in known]).amax()


# --- watching update() -------------------------------------------------------------------------


@dataclass(slots=True, weakref_slot=True)
class _Watched:
    """The watches of one scaler; ``inside`` guards against ``super().update()`` calling again."""

    watches: list[UpdateWatch] = field(default_factory=list)
    inside: bool = False


_WATCHED: weakref.WeakKeyDictionary[GradScaler, _Watched] = weakref.WeakKeyDictionary()
_ORIGINALS: dict[type, Callable[..., None]] = {}


class UpdateWatch:
    """Calls ``before`` and ``after`` around every ``scaler.update()`` until :meth:`remove`.

    Keeps neither the scaler alive nor any copy of it watched: deep copies and pickles are plain scalers.
    """

    def __init__(
        self, scaler: GradScaler, *, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        self.before, self.after = before, after
        self._scaler = weakref.ref(scaler)
        _wrap_update(type(scaler))
        _WATCHED.setdefault(scaler, _Watched()).watches.append(self)

    def remove(self) -> None:
        """Stop watching; put ``update`` back when nobody watches any more. Safe to call twice."""
        scaler = self._scaler()
        watched = None if scaler is None else _WATCHED.get(scaler)
        if scaler is not None and watched is not None and self in watched.watches:
            watched.watches.remove(self)
            if not watched.watches:
                del _WATCHED[scaler]
        if not _WATCHED:
            _unwrap_update()


def _wrap_update(cls: type) -> None:
    for definer in cls.__mro__:
        # Every class of the chain: a subclass may or may not call super().update().
        defines = "update" in vars(definer) and issubclass(definer, GradScaler)
        if defines and definer not in _ORIGINALS:
            _ORIGINALS[definer] = vars(definer)["update"]
            definer.update = _watched_update(_ORIGINALS[definer])  # type: ignore[attr-defined]


def _unwrap_update() -> None:
    for definer, original in list(_ORIGINALS.items()):
        if getattr(vars(definer)["update"], "__wrapped__", None) is original:
            definer.update = original  # type: ignore[attr-defined]
            del _ORIGINALS[definer]
        # else: somebody wrapped over us; ours stays underneath and does nothing.


def _watched_update(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def update(self: GradScaler, *args: Any, **kwargs: Any) -> None:
        watched = _WATCHED.get(self)
        if watched is None or watched.inside:
            return original(self, *args, **kwargs)
        watched.inside = True
        try:
            for watch in tuple(watched.watches):
                watch.before()
            original(self, *args, **kwargs)
            for watch in tuple(watched.watches):
                watch.after()
        finally:
            watched.inside = False

    return update
