"""Registers hooks and always removes them: around an optimizer's step, and on a few parameters.

Only optimizer-level and parameter-level hooks are used: module hooks break in-place operations and
compilation. Every hook object is free of references to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_SENTINELS = 5
"""To how many parameters a counter listens; three more are listened to for samples of their gradients."""


def around_step(
    optimizer: Optimizer, *, before: Callable[[bool], None], after: Callable[[], None]
) -> ExitStack:
    """Call ``before`` and ``after`` around every ``optimizer.step()`` until the result is closed.

    ``before`` is told whether the step was given a closure, which computes the gradients inside it.
    A fused optimizer is called even for a step the scaler skips: ``after`` means "returned". A step that
    raises never reaches ``after``; an optimizer whose ``step`` calls ``super().step()`` reaches both twice.
    """

    def pre_hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # args[0] is the optimizer itself.
        before((len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None)

    def post_hook(*_: Any) -> None:
        after()

    handles = ExitStack()
    handles.callback(optimizer.register_step_pre_hook(pre_hook).remove)
    handles.callback(optimizer.register_step_post_hook(post_hook).remove)
    return handles


class BackwardCounter:
    """Counts backward passes by listening to a few of the parameters.

    A hook on every parameter would cost more than all other readings together. Every backward pass fires
    each listener at most once, so the busiest one has the count, as long as one of them takes part.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._handles = ExitStack()
        self._fired: list[int] = []
        self.listen(parameters)

    @property
    def count(self) -> int:
        """Backward passes seen since :meth:`reset`."""
        return max(self._fired, default=0)

    def reset(self) -> None:
        """Start counting from zero."""
        self._fired[:] = [0] * len(self._fired)

    def listen(self, parameters: Sequence[Tensor]) -> None:
        """Listen to a spread of ``parameters`` instead of the present ones; frozen ones are left out."""
        self._handles.close()
        trainable = [p for p in parameters if p.requires_grad and p.is_leaf]
        stride = max(1, -(-len(trainable) // _SENTINELS))
        chosen = trainable[::-1][::stride]  # the last parameters are nearest to the loss
        self._fired = [0] * len(chosen)
        for index, parameter in enumerate(chosen):
            hook = _Tally(self._fired, index)
            handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles.callback(handle.remove)

    def close(self) -> None:
        """Remove every hook."""
        self._handles.close()


class _Tally:
    """A hook that knows a list of numbers and nothing else: closures here would never be freed."""

    __slots__ = ("_fired", "_index")

    def __init__(self, fired: list[int], index: int) -> None:
        self._fired, self._index = fired, index

    def __call__(self, _: Tensor) -> None:
        self._fired[self._index] += 1
