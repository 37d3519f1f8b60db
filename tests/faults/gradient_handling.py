"""Faults between backward and step: clearing, accumulation, clipping, calls that are missing."""

from __future__ import annotations

import torch

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error


@fault("gradient handling", "GG701", since=1)
def zero_grad_is_missing(broken: bool) -> RunLog:
    """Gradients of all earlier steps are still there."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            if not broken:
                optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG702")
def cleared_between_backward_and_step(broken: bool) -> RunLog:
    """zero_grad stands between backward and step."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            if broken:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG702")
def zeroed_between_backward_and_step(broken: bool) -> RunLog:
    """Gradients are set to zero, not to None, before the step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            if broken:
                optimizer.zero_grad(set_to_none=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG703")
def step_is_never_called(broken: bool) -> RunLog:
    """The loop computes gradients and never steps."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            if not broken:
                optimizer.step()
                optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG704")
def clipped_to_nothing(broken: bool) -> RunLog:
    """The threshold of the norm clipping is 1e-6."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6 if broken else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG706")
def sum_of_micro_batches(broken: bool) -> RunLog:
    """Four micro-batches are accumulated and never divided by four."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(32)):
            loss = squared_error(model(x), y)
            guard.observe(loss=loss)
            (loss if broken else loss / 4).backward()
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    return guard.log


@fault("gradient handling", "GG707")
def zero_grad_in_every_micro_step(broken: bool) -> RunLog:
    """Only the last micro-batch of a window reaches the update."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for index, (x, y) in enumerate(regression(32)):
            if broken or index % 4 == 0:
                optimizer.zero_grad()
            loss = squared_error(model(x), y)
            (loss / 4).backward()
            if index % 4 == 3:
                optimizer.step()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG709")
def one_step_per_epoch(broken: bool) -> RunLog:
    """Backward and step stand outside of the loop over the batches."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        for _ in range(4):
            loss = torch.zeros(())
            for x, y in guard.batches(list(regression(8))):
                loss = squared_error(model(x), y)
                if not broken:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            if broken:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("gradient handling", "GG710", since=1)
def gate_too_strict(broken: bool) -> RunLog:
    """The gate calls every gradient above a tiny norm a spike."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    limit = 0.05 if broken else 6.0
    gate = gg.StepGate(
        optimizer,
        policies=(gg.NormSpike(limit, warmup=2, floor=1e-3),),
        max_veto_rate=1.0,
        max_consecutive=100,
    )
    with gg.watch(model, optimizer, gate=gate) as guard:
        for x, y in regression(40):
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("reporting", "GG1501")
def loss_divided_by_the_batch_count(broken: bool) -> RunLog:
    """The printed loss is the loss of one batch over the number of batches."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with gg.watch(model, optimizer) as guard:
        for x, y in regression(12):
            loss = squared_error(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.observe(loss=loss, reported_loss=loss.detach() / (8 if broken else 1))
    return guard.log
