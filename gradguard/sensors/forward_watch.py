"""Counts forward passes of the watched model, and which of them a backward pass reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.sensors.hooks import HookSet, QuietHook, tensors_in


@dataclass(slots=True)
class ForwardCounts:
    """Forward passes so far; see :class:`gradguard.records.WindowReading` for the fields."""

    forwards: int = 0
    forwards_reached: int = 0
    forwards_in_eval: int = 0
    forwards_without_grad: int = 0
    without_grad_in_train: int = 0
    samples: int = 0
    samples_reached: int = 0
    stale_backwards: int = 0


OUTPUT = "gradguard: output of the watched model"
"""Where the shape of the model's output stands in the metadata of its graph node.

The node lives as long as the graph, whoever keeps the output; it carries the mark without being kept.
"""

_FIELDS = tuple(one.name for one in fields(ForwardCounts))


@dataclass(slots=True)
class _Pass:
    """One forward pass that recorded a graph: when it was made, its rows, whether it was reached."""

    window: int
    rows: int
    reached: bool = False


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """What a forward pass was given and gave back."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    training: bool
    grad: bool


class ForwardWatch:
    """Hooks on the watched model's own forward.

    Args:
        model: only a weak reference is kept.
        window: gives the number of attempts so far; a graph of an earlier window is stale.
        protect: the guard's boundary.
        on_call: told of every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: Callable[[], int],
        protect: Callable[[str, Callable[[], None]], None],
        on_call: Callable[[ForwardCall], None],
    ) -> None:
        self.counts = ForwardCounts()
        self.autocast: str | None = None
        self._window, self._protect, self._on_call = window, protect, on_call
        self._hooks = HookSet()
        if isinstance(model, torch.jit.ScriptModule):
            return  # its hooks are compiled code
        hook = QuietHook(self._called)
        handle = model.register_forward_hook(hook, with_kwargs=True)
        self._hooks.add(handle, hook)

    def reader(self, *, alone: bool) -> Callable[[], Mapping[str, Any]]:
        """Return a function that gives the counts since it was last called, by field.

        Empty as long as no forward pass was seen: the loop may call the parts of the model itself.

        Args:
            alone: whether there is only one optimizer; else a graph of an earlier window may belong to
                the other one, and ``stale_backwards`` is not measured.
        """
        last = ForwardCounts()

        def read() -> Mapping[str, Any]:
            now = self.counts
            if now.forwards + now.forwards_without_grad == 0:
                return {}
            found = {}
            for name in _FIELDS:
                value = getattr(now, name)
                found[name] = value - getattr(last, name)
                setattr(last, name, value)
            if not alone:
                del found["stale_backwards"]
            return {**found, "autocast": self.autocast}

        return read

    def close(self) -> None:
        """Remove the hook."""
        self._hooks.close()

    def _called(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._protect("forward", lambda: self._count(module, args, kwargs, output))

    def _count(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(output)
        live = [one for one in outputs if one.requires_grad and one.grad_fn is not None]
        counts = self.counts
        if live:
            rows = next((len(one) for one in inputs if one.dim()), 0)
            counts.forwards += 1
            counts.samples += rows
            counts.forwards_in_eval += not module.training
            self.autocast = _autocast(live[0].device.type)
            self._follow(live, _Pass(self._window(), rows))
        else:
            counts.forwards_without_grad += 1
            counts.without_grad_in_train += module.training and not torch.is_grad_enabled()
        self._on_call(ForwardCall(inputs, outputs, module.training, bool(live)))

    def _follow(self, outputs: list[Tensor], one: _Pass) -> None:
        hook = _Reached(self.counts, one, self._window)
        for output in outputs:
            output.register_hook(hook)  # type: ignore[no-untyped-call]
            if output.grad_fn is not None:
                output.grad_fn.metadata[OUTPUT] = tuple(output.shape)  # type: ignore[index]


class _Reached:
    """Tensor hook on an output: counts the backward passes that reach it."""

    __slots__ = ("_counts", "_pass", "_window")

    def __init__(self, counts: ForwardCounts, one: _Pass, window: Callable[[], int]) -> None:
        self._counts, self._pass, self._window = counts, one, window

    def __call__(self, _: Tensor) -> None:
        if self._pass.window != self._window():
            self._counts.stale_backwards += 1
        if not self._pass.reached:
            self._pass.reached = True
            self._counts.forwards_reached += 1
            self._counts.samples_reached += self._pass.rows


def _autocast(device_type: str) -> str | None:
    """Return the dtype of autocast on a kind of device, without "torch."; None when it is off."""
    if not torch.is_autocast_enabled(device_type):
        return None
    return str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
