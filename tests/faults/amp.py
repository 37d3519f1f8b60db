"""Faults of mixed precision: the loss scale, and what is done to gradients before the scaler sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression, squared_error


def _scaled(
    model: nn.Module, *, scale: float = 2.0**12, lr: float = 1e-2
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return optimizer, torch.amp.GradScaler("cpu", init_scale=scale)


def _half(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.float16):
        output = model(x)
    assert isinstance(output, Tensor)
    return output.float()


@fault("amp", "GG102")
def clip_before_unscale(broken: bool) -> RunLog:
    """Gradients are clipped while they still bear the loss scale."""
    model = network()
    optimizer, scaler = _scaled(model)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(12):
            loss = squared_error(_half(model, x), y)
            scaler.scale(loss).backward()
            if not broken:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG003")
def optimizer_stepped_past_the_scaler(broken: bool) -> RunLog:
    """The loss is scaled, and the optimizer is stepped without the scaler."""
    model = network()
    optimizer, scaler = _scaled(model, scale=256.0, lr=1e-3)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(12):
            loss = squared_error(_half(model, x), y)
            scaler.scale(loss).backward()
            if broken:
                optimizer.step()
                scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {
                    torch.device("cpu"): torch.zeros(())
                }
            else:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG106")
def overflow_made_finite(broken: bool) -> RunLog:
    """Inf becomes 1 and NaN becomes 0 before the scaler looks: the published fault."""
    model = network()
    optimizer, scaler = _scaled(model, scale=2.0**30, lr=1e-2)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(30):
            loss = squared_error(_half(model, 4 * x), 8 * y)
            scaler.scale(loss).backward()
            if broken:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad = torch.nan_to_num(
                            parameter.grad, nan=0.0, posinf=1.0, neginf=-1.0
                        )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG106")
def nan_only_clean_up(broken: bool) -> RunLog:
    """Only NaN becomes 0 before the scaler looks: the published fix, which hides overflows as well."""
    model = nn.Sequential(
        nn.Linear(8, 32),
        nn.LayerNorm(32),
        nn.GELU(),
        nn.Linear(32, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 1),
    )
    optimizer, scaler = _scaled(model, scale=2.0**26)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(30):
            loss = squared_error(_half(model, x), y)
            scaler.scale(loss).backward()
            if broken:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        inf = float("inf")
                        parameter.grad = torch.nan_to_num(
                            parameter.grad, nan=0.0, posinf=inf, neginf=-inf
                        )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG602", "GG101", "GG601", since=3)
def loss_is_nan_for_ever(broken: bool) -> RunLog:
    """From step 3 on the loss is NaN, and the scaler skips every step."""
    model = network()
    optimizer, scaler = _scaled(model)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for index, (x, y) in enumerate(regression(14)):
            output = _half(model, x)
            spread = output.var() - (output.var() + 1.0 if broken and index >= 3 else 0.0)
            loss = squared_error(output, y) + 1e-3 * spread.sqrt()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG105")
def update_in_every_micro_step(broken: bool) -> RunLog:
    """The scale is updated within the accumulation window."""
    model = network()
    optimizer, scaler = _scaled(model)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for index, (x, y) in enumerate(regression(32)):
            loss = squared_error(_half(model, x), y) / 4
            scaler.scale(loss).backward()
            last = index % 4 == 3
            if last:
                scaler.step(optimizer)
            elif broken:
                scaler.unscale_(optimizer)
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad *= scaler.get_scale()
            if last or broken:
                scaler.update()
            if last:
                optimizer.zero_grad()
            guard.observe(loss=4 * loss.detach())
    return guard.log


@fault("amp", "GG107")
def fused_sgd_skips_its_first_step(broken: bool) -> RunLog:
    """Fused SGD with momentum keeps uninitialised momentum when the scaler skips its first step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=broken)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(30):
            loss = squared_error(_half(model, 4 * x), 8 * y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            guard.observe(loss=loss)
    return guard.log


@fault("amp", "GG104")
def backward_without_the_scale(broken: bool) -> RunLog:
    """A second loss is differentiated without the loss scale, and then unscaled with the rest."""
    model = network()
    optimizer, scaler = _scaled(model)
    scaler.scale(torch.zeros(()))
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for x, y in regression(12):
            loss = squared_error(_half(model, x), y)
            guard.observe(loss=loss)
            (loss if broken else scaler.scale(loss)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return guard.log
