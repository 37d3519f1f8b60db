"""Reads the autograd graph of a loss: which operations lead from the model's output to it."""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from gradguard.facts import GraphNode, LossReading
from gradguard.paths import reachable_parameters
from gradguard.sensors.forward_watch import OUTPUT

_NODES = 64
_WALK = 20_000
_UNREACHED = 16

# fmt: off
_LINEAR = frozenset((
    "Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "MkldnnConvolution",
    "CudnnConvolution", "Addmv", "Mv"
))
_STRAIGHT = frozenset((
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "T", "Transpose", "Permute", "Squeeze",
    "Unsqueeze", "Expand", "Slice", "Select", "Cat", "Stack", "Add", "Sub", "Neg", "ToCopy",
    "Clone", "Copy", "CopySlices", "Alias", "AsStrided", "Split", "SplitWithSizes", "Unbind",
    "Sum", "Mean", "Mul", "Div", "AccumulateGrad", "Index", "IndexSelect", "Flip", "Roll",
    "Pad", "ConstantPadNd", "Embedding", "AvgPool2D", "NativeDropout", "FusedDropout",
    "Detach"
))
# fmt: on
"""Operations that bend nothing (Mul and Div may: a product of two activations counts as straight here)."""


def read_loss(loss: Tensor, *, name: str, step: int, model: nn.Module) -> LossReading:
    """Return the graph of ``loss`` down to the model's output.

    Args:
        loss: as it was given to ``guard.observe``, before or after its backward.
        name: of the reading.
        step: number of the attempt.
        model: whose parameters may be reached.

    Sync: none.
    """
    if loss.grad_fn is None:
        return LossReading(step=step, name=name, requires_grad=loss.requires_grad)
    nodes, shape = _head(loss.grad_fn)
    linear, bent = _body(loss.grad_fn)
    found = reachable_parameters(loss, model)
    return LossReading(
        step=step,
        name=name,
        requires_grad=True,
        nodes=nodes,
        output_shape=shape,
        linear_layers=linear,
        nonlinearities=bent,
        reached=len(found.reached),
        unreached=found.unreached[:_UNREACHED],
        opaque=bool(found.unknown),
    )


def _head(root: Node) -> tuple[tuple[GraphNode, ...], tuple[int, ...] | None]:
    """Return the nodes from the loss to the model's output, breadth first, and the output's shape."""
    found: list[GraphNode] = []
    met: tuple[int, ...] | None = None
    seen = {root}
    queue = deque([(root, 0)])
    while queue and len(found) < _NODES:
        node, depth = queue.popleft()
        shape = node.metadata.get(OUTPUT)  # type: ignore[attr-defined]
        if shape is not None:
            met = met or shape
            if shape == met and depth > 0:
                found.append(_described(node, depth))
            continue
        found.append(_described(node, depth))
        for follower, _ in node.next_functions:
            if follower is not None and follower not in seen:
                seen.add(follower)
                queue.append((follower, depth + 1))
    return tuple(found), met


def _body(root: Node) -> tuple[int, int]:
    """Return how many weight products and how many bending operations there are in the whole graph."""
    linear = bent = 0
    seen = {root}
    stack = [root]
    while stack and len(seen) < _WALK:
        node = stack.pop()
        name = plain_name(node)
        linear += name in _LINEAR
        bent += name not in _LINEAR and name not in _STRAIGHT
        for follower, _ in node.next_functions:
            if follower is not None and follower not in seen:
                seen.add(follower)
                stack.append(follower)
    return linear, bent


def plain_name(node: Node) -> str:
    """Return the operation's name without "Backward" and its number."""
    return _plain(node.name())


@lru_cache(maxsize=1024)
def _plain(name: str) -> str:
    """Do so once for each of the few names that a graph repeats thousands of times."""
    return re.sub(r"Backward\w*$", "", name.rpartition("::")[2])


def _described(node: Node, depth: int) -> GraphNode:
    return GraphNode(
        name=plain_name(node),
        depth=depth,
        shape=_shape(node),
        dim=_saved(node, "_saved_dim"),
        reduction=_saved(node, "_saved_reduction"),
        ignore_index=_saved(node, "_saved_ignore_index"),
        follows=tuple(plain_name(n) for n, _ in node.next_functions if n is not None),
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    """Return the shape of the operation's output, where torch tells."""
    metadata: Any = getattr(node, "_input_metadata", None)
    return tuple(int(size) for size in metadata[0].shape) if metadata else None


def _saved(node: Node, name: str) -> int | None:
    """Return a saved number; torch writes a negative dimension as an unsigned one of 64 bits."""
    value: Any = getattr(node, name, None)
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value - 2**64 if value >= 2**63 else value
