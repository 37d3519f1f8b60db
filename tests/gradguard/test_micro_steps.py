"""Backward passes are counted whichever few of the parameters they reach."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradguard as gg


@pytest.mark.parametrize("passes", [1, 3, 70])
@pytest.mark.parametrize("size", [1, 2, 8, 40])
def test_every_backward_pass_is_counted(size, passes):
    """Few parameters or many, few micro-steps or more than are sampled."""
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(size)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer) as guard:
        for _ in range(2):
            for _ in range(passes):
                model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record.micro_steps for record in guard.log] == [passes, passes]


@pytest.mark.parametrize("reached", range(8))
def test_a_backward_pass_through_one_of_eight_parameters_is_counted(reached):
    """Each of up to eight parameters is listened to, and a derivative taken by hand is no backward pass."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(8)]
    model = nn.ParameterList(parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with gg.watch(model, optimizer) as guard:
        torch.autograd.grad(parameters[reached].sum(), parameters[reached])
        for _ in range(2):
            parameters[reached].square().sum().backward()
        optimizer.step()
    assert guard.log[0].micro_steps == 2
