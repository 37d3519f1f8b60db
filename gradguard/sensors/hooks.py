"""Forward hooks that a copy, a pickle or a compiler of the model does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Sink = Callable[..., None]


class QuietHook:
    """A module hook that hands its arguments on and always returns None.

    A deep copy or a pickle of the model carries a hook that does nothing; under a compiler or a tracer it
    returns at once. It holds no module.
    """

    __slots__ = ("_sink",)

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink

    def __call__(self, *args: Any) -> None:
        """Hand on what the module gives. Sync: none."""
        if torch.compiler.is_compiling() or self._sink is None:
            return
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._sink(*args)

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return type(self)()

    def __copy__(self) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def silence(self) -> None:
        """Do nothing from now on."""
        self._sink = None


class HookSet:
    """Handles of hooks that are removed together."""

    def __init__(self) -> None:
        self._held: list[tuple[RemovableHandle, QuietHook]] = []

    def add(self, handle: RemovableHandle, hook: QuietHook) -> None:
        """Take over one hook."""
        self._held.append((handle, hook))

    def close(self) -> None:
        """Remove every hook."""
        for handle, hook in self._held:
            hook.silence()
            handle.remove()
        self._held.clear()


def tensors_in(value: Any, *, most: int = 4, depth: int = 3) -> list[Tensor]:
    """Return the first tensors in nested tuples, lists, mappings and objects with a mapping's values."""
    found: list[Tensor] = []
    _collect(value, found, most, depth)
    return found


def _collect(value: Any, found: list[Tensor], most: int, depth: int) -> None:
    if len(found) >= most:
        return
    if isinstance(value, Tensor):
        found.append(value)
    elif depth and isinstance(value, dict):
        for one in value.values():
            _collect(one, found, most, depth - 1)
    elif depth and isinstance(value, (tuple, list)):
        for one in value[: most * 2]:
            _collect(one, found, most, depth - 1)
    elif depth and hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            _collect(getattr(value, name, None), found, most, depth - 1)
