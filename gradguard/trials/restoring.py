"""Puts back everything that a trial step changes, the loss scaler and the schedulers included."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from gradguard.explain.undisturbed import undisturbed
from gradguard.scaler import innermost_optimizer, optimizer_chain


@contextmanager
def restored(
    model: nn.Module,
    optimizers: Mapping[str, object],
    scaler: GradScaler | None = None,
    schedulers: Sequence[LRScheduler] = (),
) -> Iterator[None]:
    """Run the block and put back model, optimizers, scaler, schedulers and random state, bit for bit.

    What else the block changes (data loaders, loggers, files) stays changed.

    Memory: see :func:`~gradguard.explain.undisturbed.undisturbed`.
    Sync: waits for the device.
    """
    with ExitStack() as kept:
        kept.enter_context(
            undisturbed(model, [innermost_optimizer(one) for one in optimizers.values()])
        )
        for scheduler in schedulers:
            kept.callback(_refill, vars(scheduler), _copied(vars(scheduler)))
        if scaler is not None:
            kept.callback(_put_back, vars(scaler), _copied(vars(scaler)), _values(vars(scaler)))
        yield


def schedulers_of(optimizers: Mapping[str, object]) -> list[LRScheduler]:
    """Return the schedulers of these optimizers that Python's collector knows, nested ones too.

    Costs one walk over the objects of the process: ask once.
    """
    ours = {id(part) for one in optimizers.values() for part in optimizer_chain(one)}
    # By type: isinstance would ask proxies for the class of what they stand for, which may be gone.
    alive = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler)]
    return [
        one
        for one in alive
        if any(id(part) in ours for part in optimizer_chain(vars(one).get("optimizer")))
    ]


def _copied(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes; mappings and lists are copies, down to their tensors."""
    return {
        key: _copy_of(value) if isinstance(value, dict | list) else value
        for key, value in attributes.items()
    }


def _copy_of(value: Any) -> Any:
    if isinstance(value, dict):
        copied = copy.copy(value)  # a defaultdict keeps its factory
        copied.update({key: _copy_of(item) for key, item in value.items()})
        return copied
    if isinstance(value, list):
        return [_copy_of(item) for item in value]
    return value.clone() if isinstance(value, Tensor) else value


def _values(attributes: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in attributes.items() if isinstance(value, Tensor)}


def _put_back(
    attributes: dict[str, Any], old: dict[str, Any], values: Mapping[str, Tensor]
) -> None:
    """Restore attributes, and the contents of the tensors among them: a scale is updated in place."""
    _refill(attributes, old)
    with torch.no_grad():
        for key, value in values.items():
            attributes[key].copy_(value)


def _refill(attributes: dict[str, Any], old: dict[str, Any]) -> None:
    attributes.clear()
    attributes.update(old)
