"""Forward hooks on the parts of a model, there only on detailed steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from gradguard.compiled import has_compiled_wrapper, is_compiled
from gradguard.facts import ModuleReading
from gradguard.sensors.hooks import HookSet, QuietHook, tensors_in
from gradguard.sensors.module_stats import (
    ModuleSums,
    add_sums,
    forward_statistics,
    masked_statistics,
    root_statistics,
    usable,
)
from gradguard.sensors.pending import FactQueue, Found

_MEASURED_EARLY, _MEASURED = 48, 24
"""How many modules are measured in one window, at first and later; larger models take turns."""

_EARLY = 3
"""How many windows listen to every module; later ones do so only if some are in question."""

_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_NEVER_CALLED = (
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
    nn.modules.linear.NonDynamicallyQuantizableLinear,  # attention reads its weights
)


@dataclass(slots=True)
class _Seen:
    """One module in this window."""

    kind: str
    measured: bool
    calls: int = 0
    training: bool = True
    grad: bool = True
    sums: ModuleSums = field(default_factory=ModuleSums)


class ModuleWatch:
    """Measures modules between :meth:`start` and :meth:`stop`.

    Attributes:
        called: names of the modules that were ever called while it listened.
    """

    def __init__(
        self,
        model: nn.Module,
        queue: FactQueue,
        *,
        protect: Callable[[str, Callable[[], None]], None],
    ) -> None:
        self.called: set[str] = set()
        self._model = weakref.ref(model)
        self._queue, self._protect = queue, protect
        self._hooks = HookSet()
        self._seen: dict[str, _Seen] = {}
        self._turn = 0
        self._asked = False
        self._closed_to_us = has_compiled_wrapper(model)
        self._step: int | None = None

    @property
    def listening(self) -> bool:
        """Whether the hooks are there."""
        return self._step is not None

    def start(self, step: int) -> None:
        """Put a hook on every module, unless the model is compiled. Sync: none."""
        model = self._model()
        if model is None or self.listening or self._closed_to_us:
            return
        self._closed_to_us = is_compiled(model) or (self._turn > 0 and not self.called)
        if self._closed_to_us:
            return
        self._step = step
        early = self._turn < _EARLY
        modules = list(model.named_modules())  # of a model with hundreds, that takes a millisecond
        fit = [name for name, module in modules if _is_measured(name, module)]
        turns = max(1, -(-len(fit) // (_MEASURED_EARLY if early else _MEASURED)))
        measured = {"", *fit[self._turn % turns :: turns]}
        self._turn += 1
        for name, module in modules:
            if early or self._asked or name in measured:
                self._listen(name, module, measured=name in measured)

    def _listen(self, name: str, module: nn.Module, *, measured: bool) -> None:
        self._seen[name] = _Seen(type(module).__name__, measured)
        hook = QuietHook(partial(self._called, name))
        handle = module.register_forward_hook(hook, with_kwargs=True)
        self._hooks.add(handle, hook)

    def stop(self) -> None:
        """Remove the hooks and queue one reading for every module that was measured. Sync: none."""
        self._hooks.close()
        step, self._step = self._step, None
        seen, self._seen = self._seen, {}
        if step is None:
            return
        self.called.update(name for name, one in seen.items() if one.calls)
        add_sums([one.sums for one in seen.values()])
        for name, one in seen.items():
            if one.sums.values:
                self._queue.put_own(partial(_reading, step, name, one), one.sums.values)

    def uncalled(self, names: Sequence[str]) -> tuple[str, ...] | None:
        """Return those of the parameters whose module was never called; None when that is not known."""
        model = self._model()
        self._asked = True
        if model is None or "" not in self.called:
            return None
        modules = dict(model.named_modules())
        owners = {name: _caller(name, modules) for name in names}
        return tuple(n for n, owner in owners.items() if owner and owner not in self.called)

    def close(self) -> None:
        """Remove the hooks and forget everything."""
        self._hooks.close()
        self._seen, self._step = {}, None

    def _called(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one = self._seen.get(name)
        if one is None:
            return
        one.calls += 1
        # A recurrent model calls a cell hundreds of times: ever fewer of them are measured.
        if one.measured and one.calls & (one.calls - 1) == 0:
            self._protect("modules", lambda: _measure(one, name, module, args, kwargs, output))


@torch.no_grad()
def _measure(one: _Seen, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    first = next((t for t in tensors_in(output) if usable(t)), None)
    if first is None:
        return
    inputs = tensors_in((args, kwargs))
    one.training, one.grad = module.training, first.requires_grad
    one.sums = forward_statistics(module, inputs, first)
    if name == "":
        one.sums.values |= root_statistics(inputs, first)
    if isinstance(module, _ATTENTION):
        mask = kwargs.get("key_padding_mask", kwargs.get("src_key_padding_mask"))
        if mask is not None and inputs:
            first_batch = bool(getattr(module, "batch_first", True))
            one.sums.values |= masked_statistics(inputs[0], mask, batch_first=first_batch)


def _reading(step: int, name: str, one: _Seen, found: Found) -> ModuleReading:
    numbers: dict[str, Any] = one.sums.numbers(found)
    return ModuleReading(
        step=step,
        module=name,
        kind=one.kind,
        calls=one.calls,
        training=one.training,
        grad=one.grad,
        **numbers,
    )


def _caller(parameter: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the path of the module whose call uses a parameter; "" for the model or when not known."""
    path = parameter.rpartition(".")[0]
    while isinstance(modules.get(path), _NEVER_CALLED):
        path = path.rpartition(".")[0]
    return path if path in modules else ""


def _is_measured(name: str, module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return bool(name) and (leaf or isinstance(module, _ATTENTION))
