"""Finds tensors and modules that a module keeps where torch does not see them.

A layer in a plain list is called like any other, but ``parameters()``, ``to()``, ``train()`` and
``state_dict()`` pass it by.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch import Tensor, nn

_BUILT_IN = frozenset(vars(nn.Module()))
"""Where torch itself keeps what is registered."""

_LOOKED_INTO = (nn.Module, Tensor, list, tuple, dict)
_DEPTH = 3
_ENTRIES = 1_000
"""How many entries of a container are looked at: a data set kept on a module is no list of layers."""

_MODE_KINDS = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
"""Modules that behave otherwise in eval mode, which nobody switches for a hidden one."""


def hidden_places(model: nn.Module) -> tuple[str, ...]:
    """Return the places of hidden tensors and modules, such as ``"layers[0] (Linear in a list)"``.

    Looked at are the attributes of every module, and lists, tuples and dicts in them up to three deep.
    A tensor counts when it is a leaf that requires grad, a module when it holds such a parameter, or
    holds none at all and depends on the mode (dropout, batch normalisation without weights): a frozen
    teacher or an activation in a list does no harm. What is registered elsewhere in the model, or
    contains the model, does not count. Each is named once, where it is met first.

    Sync: none.
    """
    registered: set[int] = {id(module) for module in model.modules()}
    registered.update(id(parameter) for parameter in model.parameters())
    registered.update(id(buffer) for buffer in model.buffers())
    places: list[str] = []
    met: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in list(vars(module).items()):
            if name in _BUILT_IN:
                continue
            for place, one, where in _candidates(value, f"{prefix}{name}", "plain attribute", 0):
                if id(one) not in met and _is_hidden(one, registered, model):
                    met.add(id(one))
                    places.append(f"{place} ({_kind(one)} in a {where})")
    return tuple(places)


def _candidates(
    value: object, place: str, where: str, depth: int
) -> Iterator[tuple[str, Tensor | nn.Module, str]]:
    """Yield modules and tensors in ``value`` with their places and the kind of container."""
    # isinstance would ask a proxy for the class of what it stands for, which may be gone.
    if not issubclass(type(value), _LOOKED_INTO):
        return
    if isinstance(value, nn.Module | Tensor):
        yield place, value, where
    elif depth < _DEPTH:
        container = next(c.__name__ for c in (list, tuple, dict) if isinstance(value, c))
        for key, entry in _entries(value):
            yield from _candidates(entry, f"{place}[{key}]", container, depth + 1)


def _entries(value: object) -> list[tuple[str, object]]:
    if isinstance(value, dict):
        pairs = islice(dict.items(value), _ENTRIES)
        return [(_key(key), entry) for key, entry in pairs]
    if isinstance(value, list | tuple):
        return [(str(index), entry) for index, entry in enumerate(islice(value, _ENTRIES))]
    return []


def _key(key: object) -> str:
    return repr(key) if isinstance(key, str | int) else type(key).__name__


def _is_hidden(one: Tensor | nn.Module, registered: set[int], model: nn.Module) -> bool:
    if id(one) in registered:
        return False
    if isinstance(one, Tensor):
        return one.requires_grad and one.is_leaf
    parts = list(one.modules())
    if any(part is model for part in parts):
        return False
    parameters = list(one.parameters())
    if not parameters:
        return any(isinstance(part, _MODE_KINDS) for part in parts if id(part) not in registered)
    return any(p.requires_grad and id(p) not in registered for p in parameters)


def _kind(one: Tensor | nn.Module) -> str:
    return type(one).__name__ if isinstance(one, nn.Module | nn.Parameter) else "tensor"
