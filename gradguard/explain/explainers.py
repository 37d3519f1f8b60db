"""The three explanations that run a forward pass once: where a path is cut, NaN is born, a gradient dies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from gradguard.explain.backward import BackwardLedger
from gradguard.explain.births import BirthLedger
from gradguard.explain.cuts import CutLedger
from gradguard.explain.graph import is_opaque, leaf_of, nodes_behind
from gradguard.explain.places import Modules
from gradguard.explain.results import DeadGradient, NonfiniteOrigin, PathCut
from gradguard.explain.tracing import Tracer
from gradguard.explain.undisturbed import undisturbed
from gradguard.paths import reachable_parameters

Forward = Callable[[], Tensor]


def explain_paths(forward: Forward, model: nn.Module) -> tuple[PathCut, ...]:
    """Say of every parameter that the loss does not reach which line of code cut the path, and how.

    Runs ``forward`` once, and a backward pass where the graph hides a part of itself (a custom Function, a
    reentrant checkpoint). Model, random state and gradients are as before afterwards; compiled parts run
    uncompiled. A parameter with a live path beside a cut one is not reported.

    Args:
        forward: runs the forward pass and returns the loss, such as ``lambda: criterion(model(x), y)``.
        model: whose parameters are explained. Give the module inside a DistributedDataParallel wrapper.

    Returns:
        One entry per parameter without a gradient, frozen ones included, in the order of the parameters.

    Raises:
        TypeError: ``forward`` returned neither a tensor nor a number.

    Sync: reads values on the host.
    """
    named = list(model.named_parameters())
    modules = Modules(model)
    cuts = CutLedger(modules, named)
    with undisturbed(model):
        loss = _run(forward, Tracer(modules, [cuts]))
        behind = cuts.cuts_of(loss) if isinstance(loss, Tensor) else frozenset()
        unreached, frozen = _without_path(loss, model)
    found = {one.parameter: one for one in cuts.explain(unreached, behind)}
    found |= {name: cuts.frozen(name) for name in frozen}
    return tuple(found[name] for name, _ in named if name in found)


def locate_nonfinite(
    forward: Forward, model: nn.Module, *, backward: bool = True
) -> NonfiniteOrigin | None:
    """Name the operation that made the first NaN or Inf out of finite numbers.

    The forward pass is followed back from a loss that is not finite. When the loss is finite, the backward
    pass is run and the first derivative that is not finite although all it was given is; it is the
    operation itself that is named, such as ``sqrt`` at 0, where torch's anomaly mode names a later one and
    does not report Inf at all. An Inf written down on purpose (a mask) is no fault; a NaN made of it is.

    Args:
        forward: runs the forward pass and returns the loss.
        model: it is as before afterwards, see :func:`~gradguard.explain.undisturbed.undisturbed`.
        backward: whether to look at the backward pass too.

    Returns:
        The origin; None when everything that matters to the loss and its gradients is finite.

    Raises:
        TypeError: ``forward`` did not return a tensor.

    Sync: reads values on the host.
    """
    named = list(model.named_parameters())
    births = BirthLedger(named)
    with undisturbed(model):
        loss = _tensor(_run(forward, Tracer(Modules(model), [births])))
        origin = births.origin(births.look(loss))
        if origin is not None or not backward or not loss.requires_grad:
            return origin
        ledger = BackwardLedger(births, named)
        _gradients(loss, named, ledger)
        return ledger.nonfinite()


def locate_dead(forward: Forward, model: nn.Module) -> tuple[DeadGradient, ...]:
    """Name the operations that were given a gradient and passed on exact zeros.

    Only operations behind which a parameter's gradient is zero are named: a unit that is off beside others
    that are on is no fault.

    Args:
        forward: runs the forward pass and returns the loss.
        model: it is as before afterwards, see :func:`~gradguard.explain.undisturbed.undisturbed`.

    Returns:
        One entry per operation and line, in the order of the backward pass; empty when none is dead.

    Raises:
        TypeError: ``forward`` did not return a tensor.
        ValueError: the loss does not require grad: see :func:`explain_paths`.

    Sync: reads values on the host.
    """
    named = list(model.named_parameters())
    births = BirthLedger(named, values=False)
    with undisturbed(model):
        loss = _tensor(_run(forward, Tracer(Modules(model), [births])))
        if not loss.requires_grad:
            raise ValueError(
                "looking for dead gradients: the loss does not require grad, no gradient is made at all; "
                "explain_paths names the line that cuts it off"
            )
        ledger = BackwardLedger(births, named)
        gradients = _gradients(loss, named, ledger)
        zero = {name for name, one in gradients.items() if one is not None and _is_zero(one)}
        return ledger.dead(zero)


def _run(forward: Forward, tracer: Tracer) -> object:
    """Run ``forward`` under the tracer, uncompiled and with gradients on."""
    with torch.enable_grad(), _uncompiled(), tracer:
        loss: object = forward()
    if tracer.fault is not None:
        raise tracer.fault
    if not isinstance(loss, (Tensor, int, float)):
        raise TypeError(
            f"explaining a forward pass: it must return the loss, got {type(loss).__name__}"
        )
    return loss


def _uncompiled() -> AbstractContextManager[object]:
    """Have compiled code run as written; costs nothing where nothing was compiled."""
    if "torch._dynamo" in sys.modules:
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _tensor(loss: object) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"explaining a forward pass: it must return the loss as a tensor, got {type(loss).__name__}"
        )
    return loss


def _without_path(loss: object, model: nn.Module) -> tuple[Sequence[str], Sequence[str]]:
    """Return the names of trainable parameters that get no gradient, and of frozen ones."""
    named = list(model.named_parameters())
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        trainable = [name for name, p in named if p.requires_grad]
        return trainable, [name for name, p in named if not p.requires_grad]
    reach = reachable_parameters(loss, model)
    unreached = set(reach.unreached)
    if reach.unknown:
        gradients = _gradients(loss, named, None)
        unreached |= {name for name in reach.unknown if gradients[name] is None}
    return [name for name, _ in named if name in unreached], reach.frozen


def _gradients(
    loss: Tensor, named: Sequence[tuple[str, Tensor]], ledger: BackwardLedger | None
) -> dict[str, Tensor | None]:
    """Differentiate the loss (its sum) and return the gradients by name."""
    with torch.enable_grad():
        total = loss.sum()
    trainable = {name: p for name, p in named if p.requires_grad}
    with ledger.listening([total]) if ledger is not None else nullcontext():
        gradients = _differentiate(total, trainable)
    if ledger is not None and ledger.fault is not None:
        raise ledger.fault
    return gradients


def _differentiate(total: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Leave ``.grad`` alone unless the graph hides a part, which only a full backward runs through."""
    nodes = list(nodes_behind([total.grad_fn]))
    if not any(is_opaque(node) for node in nodes):
        found = torch.autograd.grad(total, tuple(parameters.values()), allow_unused=True)
        return dict(zip(parameters, found, strict=True))
    leaves = [leaf for leaf in map(leaf_of, nodes) if leaf is not None]
    touched = {id(one): one for one in (*leaves, *parameters.values())}.values()
    kept = [(one, one.grad) for one in touched]
    try:
        for one in touched:
            one.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in parameters.items()}
    finally:
        for one, gradient in kept:
            one.grad = gradient


def _is_zero(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return values.numel() > 0 and not bool((values != 0).any())
