"""Two ways to turn one ``optimizer.step()`` into a bit-exact no-op, with public means only.

Hiding the gradients works for every optimizer that skips parameters without one, and needs the verdict on
the host. Raising the flag ``optimizer.found_inf``, the one GradScaler uses, works for fused optimizers and
leaves the verdict on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

_TAKES_FLAG = (Adam, AdamW, SGD, Adagrad)
_STEP_CODE = Optimizer.profile_hook_step(lambda *_: None).__code__


class HiddenGradients:
    """Takes ``.grad`` away from parameters and gives the same tensors back, views and buckets included."""

    def __init__(self) -> None:
        self._hidden: tuple[tuple[Tensor, Tensor], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._hidden)

    def hide(self, parameters: Sequence[Tensor]) -> None:
        """Set ``.grad`` of every parameter to None and remember what it was. Sync: none."""
        self._hidden = tuple((p, p.grad) for p in parameters if p.grad is not None)
        for parameter, _ in self._hidden:
            parameter.grad = None

    def restore(self) -> None:
        """Give every gradient back, unless a new backward pass has written any in the meantime.

        New gradients mean that the step raised before its post-hooks and the loop went on: the
        hidden ones belong to the past then. Sync: none.
        """
        if all(parameter.grad is None for parameter, _ in self._hidden):
            for parameter, gradient in self._hidden:
                parameter.grad = gradient
        self._hidden = ()

    def by_id(self) -> MappingProxyType[int, Tensor]:
        """Return the hidden gradients by ``id(parameter)``; empty when nothing is hidden."""
        return MappingProxyType({id(p): gradient for p, gradient in self._hidden})


class FoundInfFlag:
    """Raises ``optimizer.found_inf`` for one fused step, on top of what a GradScaler has put there."""

    def __init__(self) -> None:
        self._ours: Tensor | None = None

    def put_up(self, optimizer: Optimizer, flag: Tensor) -> None:
        """Merge ``flag`` (0-dim, 0 or 1) with the scaler's by maximum. Sync: none."""
        theirs = getattr(optimizer, "found_inf", None)
        if isinstance(theirs, Tensor):
            theirs = theirs.reshape(()).clamp(max=1)  # it counts devices; step counters subtract it
            flag = torch.maximum(theirs, flag.to(theirs.device, theirs.dtype, non_blocking=True))
        optimizer.found_inf = flag  # type: ignore[attr-defined]
        if theirs is None:  # otherwise the scaler, or another gate, takes it down again
            self._ours = flag

    def take_down(self, optimizer: Optimizer) -> None:
        """Remove the attribute if this object created it; also after a step that raised. Sync: none."""
        if self._ours is not None and hasattr(optimizer, "found_inf"):
            del optimizer.found_inf
        self._ours = None


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether every group runs the fused kernel, which reads ``found_inf`` by itself."""
    return isinstance(optimizer, _TAKES_FLAG) and all(
        group.get("fused") is True for group in optimizer.param_groups
    )


def would_create_state(optimizer: Optimizer) -> bool:
    """Return whether a step on the gradients there are makes new optimizer state.

    A fused step makes it even when the flag says skip. Fused SGD then keeps a momentum buffer of
    uninitialised memory and uses it on the next step, so a first step is vetoed by hiding instead.
    """
    return any(
        parameter.grad is not None and not optimizer.state.get(parameter)
        for group in optimizer.param_groups
        if group.get("momentum") != 0  # plain SGD keeps none
        for parameter in group["params"]
    )


def is_outermost_step(optimizer: Optimizer) -> bool:
    """Return whether the running hook belongs to the step the user called.

    When a subclass calls ``super().step()`` both methods run the hooks. A counter of pre-hooks and
    post-hooks would do, but an exception inside a step leaves it wrong for ever; the call stack cannot be.
    """
    return sum(frame_of is optimizer for frame_of in _running_steps()) <= 1


def _running_steps() -> Iterator[object]:
    """Yield the optimizer of every hooked ``step()`` on this thread's call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _STEP_CODE:
            yield frame.f_locals.get("self")
        frame = frame.f_back
