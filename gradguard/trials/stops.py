"""Holds still what a loss stops the gradient of, so that its finite differences are those of its gradient.

A target under ``torch.no_grad()``, a stop-gradient or a straight-through estimate written with ``detach()``
has a gradient that is not the derivative of the loss, on purpose. It is the derivative of the loss with the
stopped values held still, and that can be measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

_STOPS = frozenset((Tensor.detach, torch.detach, Tensor.data.__get__))  # type: ignore[attr-defined]
_DEEPEST = 400


def stops_held(loss_fn: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return the same loss, in which later calls use the stopped values of the first one.

    Stopped are results of ``detach()`` and ``.data``, and everything that is computed while gradients are off
    outside of a custom Function (what is computed inside of one is what its backward must answer for).

    Args:
        loss_fn: makes the same calls in the same order every time; a value whose shape has changed is used as
            it is.
    """
    first: list[Tensor] = []

    def loss() -> Tensor:
        with _Holding(first, replay=bool(first)):
            return loss_fn()

    return loss


class _Holding(TorchFunctionMode):
    """Records stopped values, or puts the recorded ones in the place of new ones."""

    def __init__(self, first: list[Tensor], *, replay: bool) -> None:
        super().__init__()
        self._first, self._replay, self._index = first, replay, 0
        self._forwards = {code for cls in _functions(Function) for code in _codes(cls)}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        if any(result is one for one in args) or "out" in (kwargs or {}):
            return result  # written in place: it is somebody's own
        if not self._is_stopped(func, args):
            return result
        return self._held(result)

    def _is_stopped(self, func: Callable[..., object], args: tuple[Any, ...]) -> bool:
        if torch.is_grad_enabled():
            return func in _STOPS and isinstance(args[0], Tensor) and args[0].requires_grad
        return not self._inside_function()

    def _held(self, result: Tensor) -> Tensor:
        index, self._index = self._index, self._index + 1
        if not self._replay:
            self._first.append(result.detach().clone())
            return result
        if index >= len(self._first) or self._first[index].shape != result.shape:
            return result
        return self._first[index].clone()

    def _inside_function(self) -> bool:
        """Whether the forward of a custom Function is being run."""
        frame = inspect.currentframe()
        for _ in range(_DEEPEST):
            if frame is None:
                return False
            if frame.f_code in self._forwards:
                return True
            frame = frame.f_back
        return False


def _functions(cls: type) -> Iterator[type]:
    subclasses: list[type] = cls.__subclasses__()
    for one in subclasses:
        yield one
        yield from _functions(one)


def _codes(cls: type) -> Iterator[CodeType]:
    """Yield the code of a Function's own forward, under its decorators too."""
    forward: Any = vars(cls).get("forward")
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        code = getattr(forward, "__code__", None)
        if isinstance(code, CodeType):
            yield code
        forward = getattr(forward, "__wrapped__", None)
