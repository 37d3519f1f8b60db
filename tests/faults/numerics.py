"""Faults that make, or hide, NaN and Inf."""

from __future__ import annotations

import torch

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error


@fault("numerics", "GG602", since=4)
def nan_in_the_data(broken: bool) -> RunLog:
    """From batch 4 on an input is NaN."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(12)):
            if broken and index >= 4:
                x[0, 0] = float("nan")
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("numerics", "GG601", place="0")
def square_root_at_zero(broken: bool) -> RunLog:
    """The loss is finite, and the derivative of its square root at 0 is not."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            output = model(x)
            distance = (output - output.detach()).square().sum() + (0.0 if broken else 1.0)
            loss = squared_error(output, y) + 1e-3 * distance.sqrt()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("numerics", "GG605")
def nan_gradients_zeroed(broken: bool) -> RunLog:
    """NaN gradients become 0 before the step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            output = model(x)
            distance = (output - output.detach()).square().sum() + (0.0 if broken else 1.0)
            loss = squared_error(output, y) + 1e-3 * distance.sqrt()
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0)
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log
