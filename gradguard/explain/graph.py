"""Walks over autograd graphs, and names of their nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


def nodes_behind(roots: Iterable[Node | None]) -> Iterator[Node]:
    """Yield every node behind ``roots``, these included, once; leaves (AccumulateGrad) are nodes too."""
    seen: set[Node] = set()
    stack = [node for node in roots if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(follower for follower, _ in node.next_functions if follower is not None)


def leaf_of(node: Node) -> Tensor | None:
    """Return the tensor whose gradient a node accumulates; None for every other node."""
    if type(node).__name__ != "AccumulateGrad":
        return None
    variable: Tensor = node.variable  # type: ignore[attr-defined]
    return variable


def leaves_behind(roots: Iterable[Node | None]) -> set[int]:
    """Return the ids of the leaf tensors behind ``roots``."""
    leaves = (leaf_of(node) for node in nodes_behind(roots))
    return {id(leaf) for leaf in leaves if leaf is not None}


def is_opaque(node: Node) -> bool:
    """Whether a node hides a graph of its own: a custom Function, a reentrant checkpoint."""
    return issubclass(type(node), BackwardCFunction)


def operation_name(node: Node) -> str:
    """Return ``"log_softmax"`` for LogSoftmaxBackward0; a custom Function keeps its class name."""
    bare = re.sub(r"Backward\d*$", "", node.name())
    if is_opaque(node):
        return bare
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower()
