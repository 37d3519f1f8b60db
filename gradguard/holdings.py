"""Which parameters an optimizer holds, where their values lie, and whether that has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_PROBES = 8


class Holdings:
    """The parameters of an optimizer in the order of its groups, as they were when this was made.

    Attributes:
        parameters: the tensors; emptied by :meth:`let_go`.
        names: their names.
        group_sizes: number of parameters per group.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], *, label: str) -> None:
        groups = optimizer.param_groups
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.names = [
            names.get(id(p), f"{label}.parameter {i}") for i, p in enumerate(self.parameters)
        ]
        self.group_sizes = [len(group["params"]) for group in groups]
        self._identities = [id(p) for p in self.parameters]
        self._outline = _outline(groups)
        self._places = _places(self.parameters)

    def are_current(self, optimizer: Optimizer, *, thorough: bool) -> bool:
        """Whether the optimizer still holds these parameters, and their values lie where they lay.

        A quick look compares the outline of the groups and asks a few parameters: what moves a model
        moves every tensor. A thorough one asks all.
        """
        groups = optimizer.param_groups
        if thorough:
            held = [id(p) for group in groups for p in group["params"]]
            return held == self._identities and _places(self.parameters) == self._places
        stride = max(1, len(self.parameters) // _PROBES)
        some = self.parameters[::stride]
        return _outline(groups) == self._outline and _places(some) == self._places[::stride]

    def let_go(self) -> None:
        """Forget the tensors."""
        self.parameters.clear()


def _outline(groups: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Return length, first and last parameter of each group."""
    held = [group["params"] for group in groups]
    return [(len(params), id(params[0]), id(params[-1])) for params in held if params]


def _places(parameters: list[Tensor]) -> list[int]:
    """Return where the values lie; wrappers without storage are known by identity."""
    try:
        return [p.data_ptr() for p in parameters]
    except RuntimeError:
        return [id(p) for p in parameters]
