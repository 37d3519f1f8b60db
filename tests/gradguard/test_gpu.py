"""The promises of the core on a CUDA device: no synchronisation, true outcomes, no bit changed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.records import StepOutcome
from gradguard.testing import TrainingRun, assert_neutral
from tests.gradguard.loops import (
    OPTIMIZERS,
    POISONS,
    any_changed,
    batches,
    make_optimizer,
    poison_gradients,
    small_net,
    weights_of,
)

pytestmark = pytest.mark.gpu

CUDA = "cuda"
CHANGED = {StepOutcome.APPLIED, StepOutcome.CORRUPTED}


def amp_step(net, optimizer, scaler, batch, *, clip=None):
    """Take one fp16 step whose every part is free of synchronisation."""
    with torch.autocast(CUDA, dtype=torch.float16):
        loss = nn.functional.mse_loss(net(batch.x.to(CUDA, non_blocking=True)), batch.y)
    scaler.scale(loss).backward()
    if clip is not None:
        scaler.unscale_(optimizer)
        clip(net.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss


def on_device(count):
    """Return batches that are on the device already, so that moving them cannot synchronise."""
    data = batches(count)
    for batch in data:
        batch.x, batch.y = batch.x.to(CUDA), batch.y.to(CUDA)
    return data


@pytest.mark.parametrize("clipped", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("gated", [False, True], ids=["watched", "gated"])
def test_the_guard_never_synchronises(gated, clipped):
    """Forty guarded fp16 steps with sync_debug_mode "error" around everything the loop does."""
    net = small_net().to(CUDA)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler(CUDA, init_scale=2.0**10)
    data = on_device(40)
    amp_step(net, optimizer, scaler, data[0])  # lazy initialisation may synchronise
    gate = gg.StepGate(optimizer) if gated else None
    guard = gg.watch(net, optimizer, scaler=scaler, gate=gate, detail_every=10, strict=True)
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data:
            clip = guard.clip_grad_norm_ if clipped else None
            loss = amp_step(net, optimizer, scaler, batch, clip=clip)
            guard.observe(loss=loss, terms={"mse": loss})
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    guard.detach()
    assert len(guard.log) == 40
    assert guard.findings == ()
    assert {r.outcome for r in guard.log} == {StepOutcome.APPLIED}


@pytest.mark.parametrize(
    ("optimizer_name", "unscale", "poison", "accumulation"),
    list(itertools.product(OPTIMIZERS, (False, True), POISONS, (1, 4))),
)
def test_reported_outcome_equals_the_truth(optimizer_name, unscale, poison, accumulation):
    """On the GPU too the report says "changed" exactly when something changed."""
    net = small_net().to(CUDA)
    optimizer = make_optimizer(optimizer_name, net.parameters())
    scaler = torch.amp.GradScaler(CUDA, init_scale=2.0**10)
    data, truth = iter(on_device(5 * accumulation)), []
    with gg.watch(net, optimizer, scaler=scaler, strict=True) as guard:
        for step in range(5):
            for _ in range(accumulation):
                batch = next(data)
                with torch.autocast(CUDA, dtype=torch.float16):
                    loss = nn.functional.mse_loss(net(batch.x).float(), batch.y)
                scaler.scale(loss / accumulation).backward()
            if step in (0, 3):
                poison_gradients(net.parameters(), POISONS[poison])
            if unscale:
                scaler.unscale_(optimizer)
            before = weights_of(net.parameters())
            scaler.step(optimizer)
            truth.append(any_changed(before, net.parameters()))
            scaler.update()
            optimizer.zero_grad()
    assert [r.outcome in CHANGED for r in guard.log] == truth
    assert guard.findings == ()


@pytest.mark.parametrize("optimizer_name", ["adamw-fused", "adamw-foreach", "sgd-default"])
def test_watching_changes_no_bit(optimizer_name):
    """Weights, optimizer, scaler and random state on the device equal those of a bare run."""

    def make_run():
        net = small_net(dropout=0.3).to(CUDA)
        optimizer = make_optimizer(optimizer_name, net.parameters())
        scaler = torch.amp.GradScaler(CUDA, init_scale=2.0**20)
        data = iter(on_device(25))
        return TrainingRun(
            model=net,
            optimizers=optimizer,
            scaler=scaler,
            step=lambda _: amp_step(net, optimizer, scaler, next(data)),
        )

    assert_neutral(
        make_run, lambda run: gg.watch(run.model, run.optimizers, scaler=run.scaler, strict=True)
    )
