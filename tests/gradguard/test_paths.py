"""What an output reaches, and what a backward left, over every way a path can be cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradguard as gg
from gradguard.records import PathState


class Forked(nn.Module):
    """One linear layer per way of losing a gradient; ``forward`` sums what is left."""

    def __init__(self):
        super().__init__()
        for name in ("live", "detached", "no_grad", "data", "item", "unused", "frozen", "dead"):
            setattr(self, name, nn.Linear(2, 1, bias=False))
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x):
        """Return a scalar that depends on ``live`` and, with zero slope, on ``dead``."""
        with torch.no_grad():
            cut = self.no_grad(x)
        total = self.live(x) + self.detached(x).detach() + cut + self.data(x).data
        total = total + self.item(x).sum().item() + self.frozen(x)
        return (total + 0 * self.dead(x)).sum()


def test_reachability_names_exactly_the_connected_parameters():
    """Cut, unused and frozen parameters are told from reached ones, before and after the backward."""
    model = Forked()
    loss = model(torch.ones(3, 2))
    expected = gg.Reachability(
        reached=("live.weight", "dead.weight"),
        unreached=(
            "detached.weight",
            "no_grad.weight",
            "data.weight",
            "item.weight",
            "unused.weight",
        ),
        unknown=(),
        frozen=("frozen.weight",),
    )
    assert gg.reachable_parameters(loss, model) == expected
    loss.backward()
    assert gg.reachable_parameters(loss, model) == expected


def test_readings_after_backward_agree_with_the_gradients():
    """No gradient, exactly zero, non-finite and live are told apart per parameter."""
    model = Forked()
    model(torch.ones(3, 2)).backward()
    model.live.weight.grad[0, 0] = (
        1e-30  # its square underflows: the norm is 0, the gradient is not
    )
    model.live.weight.grad[0, 1] = 0.0
    states = {r.name: r.state for r in gg.gradient_readings(model)}
    assert states["live.weight"] is PathState.LIVE
    assert states["dead.weight"] is PathState.ZERO
    assert states["detached.weight"] is PathState.NO_GRADIENT
    assert "frozen.weight" not in states
    model.live.weight.grad[0, 0] = math.nan
    assert gg.gradient_readings(model)[0].state is PathState.NONFINITE


@pytest.mark.parametrize("reentrant", [False, True])
def test_opaque_nodes_answer_unknown_never_no(reentrant):
    """A reentrant checkpoint hides its parameters: unknown; the transparent kind is walked through."""
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 1)
    model = nn.ModuleDict({"inner": inner, "outer": outer})
    x = torch.ones(1, 2, requires_grad=True)
    loss = outer(checkpoint(inner, x, use_reentrant=reentrant)).sum()
    reach = gg.reachable_parameters(loss, model)
    inner_names = ("inner.weight", "inner.bias")
    assert reach.unreached == ()
    assert (reach.unknown if reentrant else reach.reached)[:2] == inner_names
    loss.backward()
    assert all(r.state is PathState.LIVE for r in gg.gradient_readings(model))


def test_behind_a_custom_function_only_a_backward_can_tell():
    """A custom Function may drop a gradient: what lies only behind it is unknown."""

    class DropsWeight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    model = nn.ParameterDict({"dropped": torch.ones(1), "kept": torch.ones(1)})
    loss = (DropsWeight.apply(model["kept"] * 2, model["dropped"]) + model["kept"]).sum()
    reach = gg.reachable_parameters(loss, model)
    assert reach.reached == ("kept",)
    assert reach.unknown == ("dropped",)


def test_an_output_without_a_graph_is_refused():
    """A detached loss gets a sentence instead of "nothing is reached"."""
    with pytest.raises(ValueError, match="does not require grad"):
        gg.reachable_parameters(torch.ones(()), Forked())


def test_the_walk_agrees_with_autograd():
    """Reached parameters are exactly those autograd.grad finds a gradient for."""
    model = Forked()
    loss = model(torch.ones(3, 2))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, named.values(), allow_unused=True, retain_graph=True)
    oracle = [name for name, grad in zip(named, grads, strict=True) if grad is not None]
    assert list(gg.reachable_parameters(loss, model).reached) == oracle
