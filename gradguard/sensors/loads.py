"""Notices ``load_state_dict`` on the watched model, and what becomes of the values it brought."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradguard.facts import Fact, LoadReading, WeightsChanged
from gradguard.sensors.hooks import HookSet, QuietHook
from gradguard.sensors.pending import FactQueue, Found

_NAMES = 8
_VALUES = 32


class LoadWatch:
    """A hook on the watched model's ``load_state_dict``.

    Args:
        model: only a weak reference is kept.
        queue: takes readings that need values.
        add: takes readings that are ready.
        step: gives the number of attempts so far.
        protect: the guard's boundary.
    """

    def __init__(
        self,
        model: nn.Module,
        queue: FactQueue,
        *,
        add: Callable[[Fact], None],
        step: Callable[[], int],
        protect: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self._model = weakref.ref(model)
        self._queue, self._add, self._step, self._protect = queue, add, step, protect
        self._loaded: tuple[list[str], Tensor] | None = None
        self._hooks = HookSet()
        if not isinstance(model, torch.jit.ScriptModule):
            hook = QuietHook(self._called)
            handle = model.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
            self._hooks.add(handle, hook)

    def close(self) -> None:
        """Remove the hook."""
        self._hooks.close()
        self._loaded = None

    def _called(self, module: nn.Module, incompatible: Any) -> None:
        self._protect("loads", lambda: self._note(module, incompatible))

    def _note(self, module: nn.Module, incompatible: Any) -> None:
        expected = list(module.state_dict(keep_vars=True))
        missing = set(incompatible.missing_keys)
        # Loaded as a part of a larger model, its keys carry that model's prefix.
        known = sum(any(key == m or m.endswith(f".{key}") for m in missing) for key in expected)
        known = len(missing & set(expected)) or known
        self._add(
            LoadReading(
                step=self._step(),
                target="model",
                expected=len(expected),
                matched=len(expected) - known,
                missing=tuple(incompatible.missing_keys[:_NAMES]),
                unexpected=tuple(incompatible.unexpected_keys[:_NAMES]),
            )
        )
        names = [n for n, _ in module.named_parameters() if n not in missing]
        self._loaded = (names, self._sample(module, names)) if names else None

    def before_step(self) -> None:
        """Compare the parameters with what was loaded, once, at the first step after it. Sync: none."""
        model, loaded = self._model(), self._loaded
        self._loaded = None
        if model is not None and loaded is not None:
            self._compare(model, *loaded)

    @torch.no_grad()
    def _compare(self, model: nn.Module, names: list[str], values: Tensor) -> None:
        held = dict(model.named_parameters())
        if any(name not in held for name in names):
            return
        now = self._sample(model, names)
        if now.shape == values.shape:
            changed = (now != values) & ~(now.isnan() & values.isnan())
            owners = _owners([min(_VALUES, held[n].numel()) for n in names]).to(changed.device)
            per_parameter = torch.zeros(len(names), device=changed.device)
            per_parameter.index_add_(0, owners, changed.float())
            self._queue.put(partial(_change, self._step(), names), {"changed": per_parameter})

    @torch.no_grad()
    def _sample(self, model: nn.Module, names: list[str]) -> Tensor:
        held = dict(model.named_parameters())
        home = held[names[0]].device
        pieces = [held[n].detach().reshape(-1)[:_VALUES] for n in names if not held[n].is_complex()]
        return torch.cat([one.to(home, torch.float32) for one in pieces])


def _owners(sizes: list[int]) -> Tensor:
    return torch.tensor([index for index, size in enumerate(sizes) for _ in range(size)])


def _change(step: int, names: list[str], found: Found) -> WeightsChanged | None:
    changed = [name for name, n in zip(names, found["changed"], strict=True) if n]
    if not changed:
        return None
    return WeightsChanged(
        step=step, parameters=tuple(changed[:_NAMES]), count=len(changed), loaded_before=True
    )
