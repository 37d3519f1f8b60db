"""The published training loop around our model, read from top to bottom, under the guard."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import gradguard as gg
from examples.case_study.data import TRAIN_BATCHES, Splits, draw_splits, signal_over_chance
from examples.case_study.faults import HALF_PRECISION, Fault
from examples.case_study.handling import handle_gradients
from examples.case_study.wiring import HEADS, Loss, Value, network, optimizer_of, truth
from reference_trainer.averaging import AveragedWeights
from reference_trainer.examples import Examples

EPOCHS = 3
_STRICT = gg.AnySignal(threshold=1.5)
"""Wants a gradient norm that clipping to 1 does not leave."""


@dataclass
class Pipeline:
    """Everything that one step of the case study touches."""

    faults: frozenset[Fault]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    schedule: torch.optim.lr_scheduler.LRScheduler
    averaged: AveragedWeights[Any]
    loss: Loss
    guard: gg.Guard


def run(faults: frozenset[Fault], *, epochs: int = EPOCHS) -> gg.Diagnosis:
    """Train with these faults switched on and return what the guard makes of it."""
    splits = draw_splits(faults)
    with ExitStack() as stack:
        pipeline = assembled(faults, epochs, stack)
        compare(pipeline, splits.train[0])
        begin = parameters_of(pipeline.model)
        for _ in range(epochs):
            train_epoch(pipeline, splits)
            source = pipeline.model
            if Fault.AVERAGE_READ_AS_DRIFT in faults:
                source = pipeline.averaged.module
            name = "live" if source is pipeline.model else "averaged"
            drift = (parameters_of(source) - begin).norm()
            pipeline.guard.report("drift", drift, weights=name)
            validate(pipeline, splits)
        swap_in(pipeline)
    return pipeline.guard.diagnosis()


def assembled(faults: frozenset[Fault], epochs: int, stack: ExitStack) -> Pipeline:
    """Put the loop together and watch it until ``stack`` is closed."""
    intended = epochs * TRAIN_BATCHES
    half = bool(faults & HALF_PRECISION)
    model = network(faults)
    optimizer = optimizer_of(model, faults)
    scaler = GradScaler("cpu", enabled=half, init_scale=2.0**24, backoff_factor=0.25)
    scheduled = intended * (8 if Fault.PLAN_TOO_LONG in faults else 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, scheduled)
    averaged = AveragedWeights(model, decay=0.999)
    gate = None
    if Fault.GATE_TOO_STRICT in faults:
        gate = gg.StepGate(optimizer, policies=(_STRICT,), max_consecutive=10**6, max_veto_rate=1.0)
        stack.callback(gate.detach)
    guard = gg.watch(
        model,
        optimizer,
        scaler=scaler,
        gate=gate,
        averaged=averaged.module,
        detail_every=TRAIN_BATCHES,
        plan=gg.Plan(steps=intended, groups={"head": HEADS}),
    )
    stack.enter_context(guard)
    loss = Loss(faults, half=half)
    return Pipeline(faults, model, optimizer, scaler, schedule, averaged, loss, guard)


def train_epoch(pipeline: Pipeline, splits: Splits) -> None:
    """Go through the training batches once."""
    pipeline.model.train()
    value = None
    for batch in pipeline.guard.batches(splits.train):
        value = pipeline.loss(pipeline.model, batch)
        if Fault.ONE_STEP_PER_EPOCH not in pipeline.faults:
            step(pipeline, value)
    if Fault.ONE_STEP_PER_EPOCH in pipeline.faults and value is not None:
        step(pipeline, value)


def step(pipeline: Pipeline, value: Value) -> None:
    """Differentiate, handle the gradients, step, and tell the guard what was optimised and printed."""
    printed = value.loss.detach()
    if Fault.PRINTED_LOSS_DIVIDED in pipeline.faults:
        printed = printed / TRAIN_BATCHES
    pipeline.guard.observe(loss=value.loss, reported_loss=printed, terms=value.terms.as_dict())
    pipeline.scaler.scale(value.loss).backward()  # type: ignore[no-untyped-call]
    handle_gradients(
        pipeline.model.parameters(), pipeline.optimizer, pipeline.scaler, pipeline.faults
    )
    pipeline.scaler.step(pipeline.optimizer)
    pipeline.scaler.update()
    pipeline.optimizer.zero_grad()
    if pipeline.guard.step_was_taken():
        pipeline.schedule.step()
        pipeline.averaged.update()


@torch.no_grad()
def validate(pipeline: Pipeline, splits: Splits) -> None:
    """Report the validation loss of the averaged weights."""
    model = pipeline.averaged.module
    values = [
        pipeline.loss.validation(model, batch).loss
        for batch in pipeline.guard.batches(splits.validation, split="validation")
    ]
    mean = torch.stack(values).mean()
    pipeline.guard.report("loss", mean, split="validation", weights="averaged")


@torch.no_grad()
def compare(pipeline: Pipeline, batch: Examples) -> None:
    """Make the comparisons that hooks cannot make, and tell the guard."""
    pipeline.model.eval()
    trained = pipeline.loss.of(pipeline.model(batch.observed), batch).loss
    validated = pipeline.loss.validation(pipeline.model, batch).loss
    pipeline.model.train()
    guard = pipeline.guard
    guard.probe("functions differ", (validated - trained) / trained, op="validation loss")
    guard.probe("loss at truth", pipeline.loss.of(truth(batch), batch, blend=0.0).loss)
    guard.probe("at chance", signal_over_chance(batch), op="sample covariance")


def swap_in(pipeline: Pipeline) -> None:
    """Load the averaged weights into the model for the end of the run."""
    state: Mapping[str, Any] = copy.deepcopy(pipeline.averaged.module.state_dict())
    if Fault.SWA_LOADS_NOTHING in pipeline.faults:
        state = {f"module.{name}": value for name, value in state.items()}
    pipeline.model.load_state_dict(state, strict=False)


def parameters_of(model: nn.Module) -> torch.Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
