"""Shows every torch call of a block of user code to bookkeepers, which never see their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import backward as autograd_backward
from torch.overrides import TorchFunctionMode

from gradguard.explain.places import Modules, Spot, current_spot

_TENSOR_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_SILENT = frozenset({"backward", "grad", "register_hook", "retain_grad", "_set_grad_enabled"})
_IN_PLACE = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__"}
    | {"__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)
_REVERSED = {f"r{one}": one for one in ("add", "sub", "mul", "div", "pow", "matmul")} | {
    "rtruediv": "div",
    "truediv": "div",
}
_ITEMS = 4096
"""How many entries of one list argument are looked through for tensors."""


class Call:
    """One torch call: its name, the tensors it was given, and where in the user's code it stands."""

    __slots__ = ("inputs", "live", "op", "outputs", "scalars", "spot", "target")

    def __init__(self, op: str, arguments: Sequence[object], spot: Spot | None) -> None:
        found = list(_leaves(arguments))
        self.op = op
        self.spot = spot
        self.inputs = [one for one in found if isinstance(one, Tensor)]
        self.live = [t for t in self.inputs if t.requires_grad]
        self.scalars = [one for one in found if isinstance(one, float)]
        self.target = self.inputs[0] if self.inputs and _is_in_place(op) else None
        self.outputs: list[Tensor] = []

    def finish(self, result: object, out: object) -> None:
        """Note the tensors that hold the result: returned, given as ``out=`` or changed in place."""
        self.outputs = [one for one in _leaves((result, out)) if isinstance(one, Tensor)]
        if self.target is not None and all(one is not self.target for one in self.outputs):
            self.outputs.append(self.target)

    @property
    def has_infinite_constant(self) -> bool:
        """Whether an infinite or NaN number was written into the call."""
        return any(not math.isfinite(one) for one in self.scalars)


class Bookkeeper(Protocol):
    """Looks at every call before and after it ran."""

    def before(self, call: Call) -> None:
        """Look at the arguments, which an in-place operation is about to change."""

    def after(self, call: Call) -> None:
        """Look at the outputs."""


BackwardWatch = Callable[[Sequence[Tensor]], AbstractContextManager[object]]


class Tracer(TorchFunctionMode):
    """A function mode that runs every call as it is and tells bookkeepers about it.

    An exception of a bookkeeper is kept in :attr:`fault` and switches the tracer off; the user's call
    runs in any case. Calls that a Python function of torch makes inside itself are not seen.

    Args:
        modules: names of the model's modules.
        bookkeepers: told in this order.
        around_backward: entered around every backward call of the traced code; None for nothing.
    """

    def __init__(
        self,
        modules: Modules,
        bookkeepers: Sequence[Bookkeeper],
        around_backward: BackwardWatch | None = None,
    ) -> None:
        super().__init__()
        self.fault: Exception | None = None
        self.active = True
        self._modules = modules
        self._bookkeepers = tuple(bookkeepers)
        self._around_backward = around_backward

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the call, and the bookkeeping before and after it."""
        given: Mapping[str, Any] = {} if kwargs is None else kwargs
        # A compiled region is traced with this method in it: only the plain call may become part of it.
        if torch.compiler.is_compiling() or not self.active:
            return func(*args, **given)
        if func is Tensor.backward or func is autograd_backward:
            return self._backward(func, args, given)
        call = self._begin(func, args, given)
        result = func(*args, **given)
        if call is not None:
            self._end(call, result, given.get("out"))
        return result

    def stop(self) -> None:
        """Forget the bookkeepers: from now on calls only pass through."""
        self.active = False
        self._bookkeepers = ()
        self._around_backward = None

    def _begin(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Call | None:
        try:
            op = _operation(func)
            if op is None:
                return None
            call = Call(op, (*args, *kwargs.values()), current_spot(self._modules))
            for one in self._bookkeepers:
                one.before(call)
        except Exception as error:  # noqa: BLE001 (the boundary to the user's code: only the probe ends)
            self._fail(error)
            return None
        return call

    def _end(self, call: Call, result: object, out: object) -> None:
        try:
            call.finish(result, out)
            for one in self._bookkeepers:
                one.after(call)
        except Exception as error:  # noqa: BLE001 (the boundary to the user's code: only the probe ends)
            self._fail(error)

    def _backward(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        with ExitStack() as watch:
            if self._around_backward is not None:
                try:
                    roots = [t for t in _leaves((args, *kwargs.values())) if isinstance(t, Tensor)]
                    watch.enter_context(self._around_backward(roots))
                except Exception as error:  # noqa: BLE001 (the boundary to the user's code)
                    self._fail(error)
            return func(*args, **kwargs)

    def _fail(self, error: Exception) -> None:
        self.fault = error.with_traceback(None)  # the frames would keep the user's tensors
        self.stop()


def _operation(func: Callable[..., Any]) -> str | None:
    """Return the name of a call worth looking at; ``".data"`` for that property, None for the others."""
    name: str = getattr(func, "__name__", "")
    if name in {"__get__", "__set__"}:
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if owner not in _TENSOR_PROPERTIES:
            return "requires_grad_" if (owner, name) == ("requires_grad", "__set__") else None
        prefix = "." if owner == "data" else ""
        return f"{prefix}{owner}" if name == "__get__" else f"{prefix}{owner} ="
    return None if name in _SILENT else name


def plain_name(op: str) -> str:
    """Return how a user would call an operation: ``"sub"`` for ``__rsub__``, ``"data"`` for ``".data"``."""
    bare = op.strip("_. =") or op
    return _REVERSED.get(bare, bare)


def _is_in_place(op: str) -> bool:
    if op.startswith("__"):
        return op in _IN_PLACE
    return op.endswith("_") or op == ".data ="


def _leaves(value: object) -> Iterator[object]:
    """Yield everything that is no tuple, list or dict in nested ones of these."""
    if isinstance(value, (tuple, list)):
        for item in value[:_ITEMS]:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def grad_mode_off() -> str | None:
    """Return ``"no_grad"`` or ``"inference_mode"`` where one of them is on; None where graphs are made."""
    if torch.is_inference_mode_enabled():
        return "inference_mode"
    return None if torch.is_grad_enabled() else "no_grad"
