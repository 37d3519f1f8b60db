"""Runs the training step that a user hands over as a callable: a complete one, or one up to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradguard.guard import Guard
from gradguard.scaler import innermost_optimizer

StepFunction = Callable[[], object]
"""Runs one complete training step, or returns the loss with its graph."""


class StepIncompleteError(RuntimeError):
    """The user's callable neither took an optimizer step nor returned a loss to take one with."""


class _Steps(Protocol):
    def step(self) -> object: ...

    def zero_grad(self) -> object: ...


class UserStep:
    """Takes one training step per call of :meth:`run`; clears every gradient first, as a run begins.

    Attributes:
        completes: whether the user's callable takes the optimizer step itself; None before the first call.
        loss: what the last call returned, if it is one real number; None while a call is under way.
    """

    def __init__(
        self,
        step_fn: StepFunction,
        model: nn.Module,
        optimizers: Mapping[str, object],
        *,
        scaler: GradScaler | None,
        guard: Guard,
    ) -> None:
        self._step_fn, self._model, self._guard = step_fn, model, guard
        self._optimizers = [cast(_Steps, one) for one in optimizers.values()]
        self._scaler = scaler
        self.completes: bool | None = None
        self.loss: Tensor | float | None = None
        for parameter in _all_parameters(model, optimizers):
            parameter.grad = None

    def run(self) -> None:
        """Take one step and tell the guard the loss.

        Raises:
            StepIncompleteError: no optimizer step was taken, and there is no loss to take one with.

        Sync: the first time, waits for the device.
        """
        self.loss = None
        returned = self._step_fn()
        self.loss = one_number(returned)
        if self.loss is not None:
            # Belongs to the step that was just taken, or to the one that is about to be.
            self._guard.observe(loss=self.loss)
        if self.completes is None:
            self._guard.flush()
            self.completes = len(self._guard.log) > 0
            if not self.completes and self._has_gradients():
                raise StepIncompleteError(self._complaint(returned))
        if not self.completes:
            self._take(returned)

    def _take(self, returned: object) -> None:
        """Do the rest of the step with the loss that was returned."""
        if self.loss is None or not isinstance(self.loss, Tensor):
            raise StepIncompleteError(self._complaint(returned))
        if not self.loss.requires_grad:
            raise StepIncompleteError(
                "the loss that step_fn returned does not require grad; was it detached, or computed "
                "under torch.no_grad()?"
            )
        self._model.zero_grad()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        scaler = self._scaler
        if scaler is None:
            self.loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in self._optimizers:
                optimizer.step()
            return
        scaler.scale(self.loss).backward()  # type: ignore[no-untyped-call]
        for optimizer in self._optimizers:
            scaler.step(cast(Optimizer, optimizer))
        scaler.update()

    def _complaint(self, returned: object) -> str:
        what = f"a {type(returned).__name__}" if returned is not None else "nothing"
        if isinstance(returned, Tensor):
            what = f"a {returned.dtype} tensor of shape {tuple(returned.shape)}"
        backward = self._has_gradients()
        seen = "ran a backward pass but never stepped" if backward else "did not step"
        return (
            f"step_fn {seen} the optimizer that was given, and returned {what}; let it call "
            "step() on that very optimizer (with scaler=, if a GradScaler does), or return the loss"
        )

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._model.parameters())


def one_number(value: object) -> Tensor | float | None:
    """Return ``value`` if it is one real number or a tensor of one, else None."""
    if isinstance(value, Tensor):
        return value if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def plain(value: Tensor | float) -> float:
    """Return the number itself. Sync: waits for the device."""
    return float(value.detach()) if isinstance(value, Tensor) else value


def _all_parameters(model: nn.Module, optimizers: Mapping[str, object]) -> list[Tensor]:
    groups = [g for one in optimizers.values() for g in innermost_optimizer(one).param_groups]
    return [*model.parameters(), *(p for group in groups for p in group["params"])]


def sentence_of(error: BaseException) -> str:
    """Return kind and first line of an error, for use inside a sentence."""
    text = " ".join(str(error).split("\n", 1)[0].split())
    if isinstance(error, StepIncompleteError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
