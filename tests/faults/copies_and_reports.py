"""Faults of copies of a model, of checkpoints, of optimizers made anew and of reported numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg
from gradguard.runlog import RunLog
from tests.faults.cases import fault, network, regression

After = Callable[[gg.Guard, int], None]


def nothing(_guard: gg.Guard, _step: int) -> None:
    """Do nothing after a step."""


def fit(
    model: nn.Module,
    *,
    steps: int = 10,
    before: Callable[[gg.Guard], None] = lambda _: None,
    after: After = nothing,
    averaged: nn.Module | None = None,
    detail_every: int = 50,
) -> RunLog:
    """Train, with something done before the first and after every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer, averaged=averaged, detail_every=detail_every) as guard:
        before(guard)
        for number, (x, y) in enumerate(regression(steps)):
            loss = functional.mse_loss(model(x), y)
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            after(guard, number)
    return guard.log


def follow(average: nn.Module, model: nn.Module, decay: float = 0.9) -> None:
    """Move an average towards a model."""
    with torch.no_grad():
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, 1 - decay)


@fault("averaging", "GG1201", place="averaged", since=100)
def average_is_never_updated(broken: bool) -> RunLog:
    """The update of the average stands behind a condition that is never true."""
    model = network()
    average = copy.deepcopy(model)
    after: After = nothing if broken else (lambda _g, _s: follow(average, model))
    return fit(model, steps=110, after=after, averaged=average, detail_every=25)


@fault("averaging", "GG1202", place="averaged", since=20)
def running_statistics_left_behind(broken: bool) -> RunLog:
    """Parameters are averaged, running means and variances are not."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    nn.init.constant_(model[0].bias, 5.0)
    average = copy.deepcopy(model)

    def after(_guard: gg.Guard, _step: int) -> None:
        follow(average, model, decay=0.5)
        if not broken:
            for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
                ours.copy_(theirs)

    return fit(model, steps=24, after=after, averaged=average, detail_every=5)


@fault("averaging", "GG1203", place="best", since=3)
def best_weights_are_the_live_ones(broken: bool) -> RunLog:
    """The best checkpoint is kept as ``model.state_dict()``, which shares memory."""
    model = network()
    kept: list[dict[str, Tensor]] = []

    def after(guard: gg.Guard, step: int) -> None:
        if step == 2:
            state = model.state_dict()
            kept.append(state if broken else {k: v.clone() for k, v in state.items()})
            guard.follow_copy("best", kept[0], role="snapshot")

    return fit(model, after=after)


@fault("averaging", "GG1204", place="teacher")
def teacher_is_trained_too(broken: bool) -> RunLog:
    """The teacher's parameters are in the optimizer."""
    student, teacher = network(), network()
    teacher.requires_grad_(broken)
    both = nn.ModuleDict({"student": student})
    parameters = [*student.parameters(), *(teacher.parameters() if broken else [])]
    if broken:
        both["teacher"] = teacher
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    with gg.watch(both, optimizer) as guard:
        live = nn.ModuleDict({"student": teacher})
        guard.follow_copy("teacher", live, role="frozen")
        for x, _ in regression(8):
            loss = functional.mse_loss(student(x), teacher(x))
            guard.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return guard.log


@fault("averaging", "GG1205", place="averaged")
def average_of_another_model(broken: bool) -> RunLog:
    """The average is made before the model got its new head."""
    model = network()
    average = copy.deepcopy(nn.ModuleList(model) if broken else model)
    wrapped = nn.ModuleDict({"net": model})
    right = nn.ModuleDict({"net": average})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(wrapped, optimizer, averaged=average if broken else right) as guard:
        for x, y in regression(8):
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            follow(average, model)
    return guard.log


@fault("checkpoint", "GG1401", place="0.weight")
def keys_carry_a_prefix(broken: bool) -> RunLog:
    """A checkpoint of a wrapped model is loaded with strict=False."""
    model = network()
    state = copy.deepcopy(network().state_dict())
    if broken:
        state = {f"module.{name}": value for name, value in state.items()}
    return fit(model, before=lambda _: model.load_state_dict(state, strict=False) and None)


@fault("checkpoint", "GG1402", place="0.weight")
def initialised_after_loading(broken: bool) -> RunLog:
    """An initialisation runs after the weights were loaded."""
    model = network()
    state = copy.deepcopy(network().state_dict())

    def before(_guard: gg.Guard) -> None:
        if not broken:
            nn.init.xavier_uniform_(model[0].weight)
        model.load_state_dict(state)
        if broken:
            nn.init.xavier_uniform_(model[0].weight)

    return fit(model, before=before)


def first_run(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Train for a while and return copies of the states of model, optimizer and scheduler."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 28)
    for x, y in regression(20):
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))


@fault("checkpoint", "GG1404")
def resumed_without_optimizer_state(broken: bool) -> RunLog:
    """Model and scheduler are restored, the optimizer begins anew."""
    model = network()
    saved = first_run(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 28)
    with gg.watch(model, optimizer) as guard:
        model.load_state_dict(saved[0])
        if not broken:
            optimizer.load_state_dict(saved[1])
        schedule.load_state_dict(saved[2])
        for x, y in regression(8):
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return guard.log


@fault("optimizer", "GG311", "GG703", place="", since=3)
def optimizer_made_anew(broken: bool) -> RunLog:
    """Every epoch makes a new optimizer, while the first one is watched."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gg.watch(model, optimizer) as guard:
        current = optimizer
        for number, (x, y) in enumerate(regression(12)):
            if broken and number % 3 == 0 and number:
                current = torch.optim.AdamW(model.parameters(), lr=1e-2)
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            current.step()
            current.zero_grad()
    return guard.log


@fault("reporting", "GG1502", place="drift")
def drift_of_the_average(broken: bool) -> RunLog:
    """The motion that is reported is that of the averaged copy."""
    model = network()
    average = copy.deepcopy(model)
    begin = [p.detach().clone() for p in model.parameters()]

    def after(guard: gg.Guard, _step: int) -> None:
        follow(average, model, decay=0.99)
        source = average if broken else model
        pairs = zip(source.parameters(), begin, strict=True)
        moved = sum((p.detach() - b).norm().item() for p, b in pairs)
        guard.report("drift", moved, weights="averaged" if broken else "live")

    return fit(model, after=after, averaged=average)


@fault("reporting", "GG1502", place="accuracy", since=4)
def accuracy_is_cached(broken: bool) -> RunLog:
    """A metric object is never reset: the first value is reported for ever."""
    values = iter(torch.linspace(0.613, 0.817, 20).tolist())
    first = next(values)

    def after(guard: gg.Guard, _step: int) -> None:
        value = first if broken else next(values)
        guard.report("accuracy", value, split="validation", weights="live")

    return fit(network(), after=after)


@fault("reporting", "GG1503", place="validation loss")
def validation_has_its_own_loss(broken: bool) -> RunLog:
    """The validation loss forgets a weight that training uses."""
    model = network()
    x, y = next(regression(1))

    def before(guard: gg.Guard) -> None:
        with torch.no_grad():
            trained = 0.1 * functional.mse_loss(model(x), y)
            held = (1.0 if broken else 0.1) * functional.mse_loss(model(x), y)
        guard.probe("functions differ", (held - trained) / trained, op="validation loss")

    return fit(model, before=before)
