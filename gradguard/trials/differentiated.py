"""Turns a complete training step into a loss function: what it would differentiate, and nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradguard.trials.onestep import StepFunction


class NothingDifferentiatedError(RuntimeError):
    """The step called no ``Tensor.backward`` that could be held back."""


def differentiated(step_fn: StepFunction) -> Callable[[], Tensor]:
    """Return a function that runs the step without its backward passes and returns what they start from.

    That is the sum of all losses of the step, so that accumulation over micro-steps, and a step that returns
    another loss than it differentiates, come out right. A step that fails for want of gradients (a scaler, a
    log of gradient norms) ends there: the losses so far are the answer. Without gradients the optimizer's step
    is a no-op; what else the step does (statistics, schedulers, random numbers) it does, so call it where all
    is put back.

    Args:
        step_fn: runs one complete training step, with ``loss.backward()``.

    Raises:
        NothingDifferentiatedError: by the function that is returned, for a step that differentiates in
            another way (``torch.autograd.backward`` or ``grad``), or from a gradient it gives itself.
    """

    def loss() -> Tensor:
        with _HeldBack() as held:
            _run(step_fn, held)
        if not held.losses:
            raise NothingDifferentiatedError(
                "the step called no loss.backward(); return the loss from step_fn and leave the rest of the "
                "step to gradguard"
            )
        return torch.stack([one.reshape(()) for one in held.losses]).sum()

    return loss


def _run(step_fn: StepFunction, held: _HeldBack) -> None:
    """Run the step; once a loss is held, what follows may fail for want of gradients, and matters no more."""
    try:
        step_fn()
    except NothingDifferentiatedError:
        raise
    except Exception:  # the user's code, without gradients
        if not held.losses:
            raise


class _HeldBack(TorchFunctionMode):
    """Keeps every tensor whose ``backward`` is called, and does not run it.

    Attributes:
        losses: these tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is not Tensor.backward:
            return func(*args, **(kwargs or {}))
        root: Tensor = args[0]
        given = args[1] if len(args) > 1 else (kwargs or {}).get("gradient")
        if root.numel() != 1 or given is not None:
            raise NothingDifferentiatedError(
                "the step differentiates from a gradient that it gives itself, not from one number"
            )
        self.losses.append(root)
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
