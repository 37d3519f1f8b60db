"""Which parameters an output reaches, and what a backward pass left in their ``.grad``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gradguard.norms import tensor_norms
from gradguard.records import PathReading, PathState


@dataclass(frozen=True, slots=True)
class Reachability:
    """Answer of :func:`reachable_parameters`: every trainable parameter is in exactly one tuple.

    Attributes:
        reached: the output depends on these through operations that torch differentiates itself.
        unreached: no path leads to these.
        unknown: an opaque node (reentrant checkpoint, compiled region, custom Function) stands between;
            only a real backward can tell, see :func:`gradient_readings`.
        frozen: parameters with ``requires_grad=False``.
    """

    reached: tuple[str, ...]
    unreached: tuple[str, ...]
    unknown: tuple[str, ...]
    frozen: tuple[str, ...]


def reachable_parameters(
    output: Tensor, model: nn.Module | Iterable[tuple[str, Tensor]]
) -> Reachability:
    """Say which parameters ``output`` reaches, by a walk over its autograd graph.

    Runs no autograd, keeps no graph, works before and after backward, and is cheap enough for every step
    (0.04 ms for 94 tensors).

    Args:
        output: usually the loss; any tensor that should depend on the parameters.
        model: a module, or pairs of name and parameter.

    Raises:
        ValueError: ``output`` does not require grad.

    Sync: none.
    """
    if output.grad_fn is None and not output.requires_grad:
        raise ValueError(
            f"walking back from an output of shape {tuple(output.shape)}: it does not require grad; "
            "was it detached, or computed under torch.no_grad()?"
        )
    named = dict(named_parameters(model))
    sure, behind_opaque, met_opaque = _walk(output)
    reached, unreached, unknown, frozen = [], [], [], []
    for name, parameter in named.items():
        if not parameter.requires_grad:
            frozen.append(name)
        elif id(parameter) in sure:
            reached.append(name)
        elif met_opaque or id(parameter) in behind_opaque:
            unknown.append(name)
        else:
            unreached.append(name)
    return Reachability(tuple(reached), tuple(unreached), tuple(unknown), tuple(frozen))


def _walk(output: Tensor) -> tuple[set[int], set[int], bool]:
    """Return ids of leaves reached openly, ids behind opaque nodes, and whether there were any."""
    if output.grad_fn is None:
        return {id(output)}, set(), False
    opaque: list[Node] = []
    sure = _leaves([output.grad_fn], opaque)
    inputs = [node for hidden in opaque for node, _ in hidden.next_functions if node is not None]
    return sure, _leaves(inputs, None), bool(opaque)


def _leaves(roots: list[Node], opaque: list[Node] | None) -> set[int]:
    """Return ids of the leaves behind ``roots``; stop at opaque nodes and list them if asked to."""
    seen: set[Node] = set()
    leaves: set[int] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if opaque is not None and issubclass(type(node), BackwardCFunction):
            opaque.append(node)
            continue
        variable = getattr(node, "variable", None)  # only AccumulateGrad has one
        if variable is not None:
            leaves.add(id(variable))
        stack.extend(follower for follower, _ in node.next_functions if follower is not None)
    return leaves


def gradient_readings(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> tuple[PathReading, ...]:
    """Say of every trainable parameter what the last backward left: nothing, zeros, NaN/Inf, or a gradient.

    "No gradient" means that the parameter was not in the graph; "exactly zero" that it was, and the path
    is dead (or that ``zero_grad(set_to_none=False)`` cleared it).

    Sync: one copy to the host.
    """
    named = [(name, p) for name, p in named_parameters(model) if p.requires_grad]
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    tensors = list(gradients.values())
    both = torch.stack((tensor_norms(tensors, order=1), tensor_norms(tensors))).tolist()
    found = dict(zip(gradients, zip(*both, strict=True), strict=True))
    return tuple(
        PathReading(
            name=name,
            state=path_state(found[name][0]) if name in found else PathState.NO_GRADIENT,
            gradient_norm=found[name][1] if name in found else None,
        )
        for name, _ in named
    )


def path_state(l1_norm: float) -> PathState:
    """Classify a gradient by its L1 norm, which is 0 only for zeros and seldom overflows."""
    if l1_norm == 0.0:
        return PathState.ZERO
    return PathState.LIVE if math.isfinite(l1_norm) else PathState.NONFINITE


def named_parameters(
    model: nn.Module | Iterable[tuple[str, Tensor]],
) -> Iterable[tuple[str, Tensor]]:
    """Return pairs of name and parameter of a module, or the pairs as they came."""
    return model.named_parameters() if isinstance(model, nn.Module) else model
