"""Which layers ran in eval mode although they behave differently while training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from gradguard.compiled import is_compiled


@contextmanager
def noting_eval(model: nn.Module) -> Iterator[dict[str, str]]:
    """Note by name the kind of every layer with a mode of its own that runs in eval while a graph is recorded.

    Layers whose weights, or whose neighbours' weights, are all frozen are left out: they are in eval on
    purpose. So is a layer that also ran in train mode.

    Sync: none.
    """
    noted: dict[str, str] = {}
    trained: set[str] = set()
    watched = {name: module for name, module in model.named_modules() if _has_mode(module)}
    hooks = []
    if is_compiled(model):  # a hook would have it compiled anew
        for name, module in watched.items():
            _note(noted, trained, name, module)
    else:
        for name, module in watched.items():
            hooks.append(module.register_forward_pre_hook(partial(_seen, noted, trained, name)))
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
        for name in list(noted):
            if name in trained or _is_frozen(model, name):
                del noted[name]


def _seen(
    noted: dict[str, str], trained: set[str], name: str, module: nn.Module, _: object
) -> None:
    if torch.is_grad_enabled():
        _note(noted, trained, name, module)


def _note(noted: dict[str, str], trained: set[str], name: str, module: nn.Module) -> None:
    if module.training:
        trained.add(name)
    else:
        noted[name] = type(module).__name__


def _has_mode(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return module.track_running_stats
    if isinstance(module, _DropoutNd):
        return module.p > 0.0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return float(module.dropout) > 0.0
    return isinstance(module, nn.RReLU)


def _is_frozen(model: nn.Module, name: str) -> bool:
    """Whether the layer's own weights, or without any those of the module around it, are all frozen."""
    weights = list(model.get_submodule(name).parameters())
    if not weights:
        weights = list(model.get_submodule(name.rpartition(".")[0]).parameters())
    return bool(weights) and not any(p.requires_grad for p in weights)
