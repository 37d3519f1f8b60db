"""The operation that turned a gradient into zeros is named, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradguard.explain import as_facts, locate_dead
from tests.gradguard.explain.places import found, marked


class Two(nn.Module):
    """A layer behind the function under test and one beside it."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.behind = nn.Linear(3, 3)
        self.beside = nn.Linear(3, 3)
        self.function = function

    def forward(self, x):
        return (self.function(self.behind(x)) * 0.5 + self.beside(x)).square().sum()


def _relu(y):
    return (y - 100).relu()  # here: relu


def _clamp(y):
    return (y + 100).clamp(max=1)  # here: clamp


def _rounded(y):
    return y.round()  # here: round


def _times_zero(y):
    return y * 0  # here: mul


def _sign(y):
    return torch.sign(y)  # here: sign


def _saturated(y):
    return (y * 1e6).sigmoid()  # here: sigmoid


X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (_relu, "relu"),
        (_clamp, "clamp"),
        (_rounded, "round"),
        (_times_zero, "mul"),
        (_sign, "sign"),
        (_saturated, "sigmoid"),
    ],
)
def test_the_operation_and_the_parameters_behind_it_are_named(function, op):
    """The parameters are those whose gradient a real backward leaves at zero."""
    model = Two(function)
    (dead,) = locate_dead(lambda: model(X), model)
    assert (dead.op, found(dead)) == (op, marked(op))
    model(X).backward()
    zero = tuple(name for name, p in model.named_parameters() if not p.grad.any())
    assert dead.parameters == zero == ("behind.weight", "behind.bias")
    assert op in str(dead)


@pytest.mark.parametrize("function", [lambda y: y, torch.relu, lambda y: y.round() + y])
def test_live_gradients_are_not_reported(function):
    """Units that are off beside others, and a dead path beside a live one, are no fault."""
    model = Two(function)
    assert locate_dead(lambda: model(X), model) == ()


def test_a_factor_that_begins_at_zero_kills_the_other_one_only():
    """As in a low-rank adapter: the gradient of A dies in the product with B = 0, B has its own."""
    model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 3, bias=False)})
    nn.init.zeros_(model["b"].weight)

    def forward():
        return (model["b"](model["a"](X)) - 1).square().sum()  # here: adapter

    (dead,) = locate_dead(forward, model)
    assert dead.parameters == ("a.weight",)
    assert found(dead) == marked("adapter")


def test_every_parameter_becomes_one_reading():
    """Rules look probes up by parameter."""
    model = Two(_rounded)
    facts = as_facts(2, locate_dead(lambda: model(X), model))
    assert [(f.kind, f.parameter, f.op) for f in facts] == [
        ("dead", "behind.weight", "round"),
        ("dead", "behind.bias", "round"),
    ]


def test_a_loss_without_a_graph_is_refused():
    """The sentence says which explanation to ask instead."""
    with pytest.raises(ValueError, match="explain_paths names the line"):
        locate_dead(lambda: torch.ones(()), nn.Linear(1, 1))
