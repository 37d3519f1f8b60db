"""Observers on or off: the same bits after 25 steps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.testing import TrainingRun, assert_neutral
from tests.gradguard.loops import OPTIMIZERS, batches, make_optimizer, small_net

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def training_run(*, optimizer_name, precision, accumulation, dropout):
    """Build a run that reports everything it can to the guard it is given."""
    net = nn.Sequential(small_net(dropout=dropout), nn.BatchNorm1d(2))
    optimizer = make_optimizer(optimizer_name, net.parameters())
    # torch leaves fused momentum uninitialised when the first step is skipped, and no run repeats then.
    scale = 2.0**4 if optimizer_name == "momentum-fused" else 2.0**20
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=precision == "fp16")
    data = iter(batches(25 * accumulation, size=8))
    dtype = PRECISIONS[precision]

    def step(guard):
        for _ in range(accumulation):
            batch = next(data)
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                loss = nn.functional.mse_loss(net(batch.x).float(), batch.y) / accumulation
            scaler.scale(loss).backward()
            if guard is not None:
                guard.observe(loss=loss, terms={"mse": loss})
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if guard is not None:
            guard.observe(gradient_norm=norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return TrainingRun(model=net, optimizers=optimizer, step=step, scaler=scaler)


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_watching_changes_no_bit(optimizer_name, precision, accumulation, dropout):
    """Parameters, buffers, optimizer and scaler state and random state are identical to a bare run."""
    assert_neutral(
        lambda: training_run(
            optimizer_name=optimizer_name,
            precision=precision,
            accumulation=accumulation,
            dropout=dropout,
        ),
        lambda run: gg.watch(
            run.model, run.optimizers, scaler=run.scaler, detail_every=5, lag=3, strict=True
        ),
    )


def test_exact_drift_and_an_averaged_copy_change_no_bit_either():
    """The dearest settings are as neutral as the default ones."""

    def observe(run):
        averaged = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        return gg.watch(
            run.model,
            run.optimizers,
            scaler=run.scaler,
            averaged=averaged,
            drift="exact",
            detail_every=1,
            strict=True,
        )

    assert_neutral(
        lambda: training_run(
            optimizer_name="adamw-default", precision="fp16", accumulation=2, dropout=0.2
        ),
        observe,
    )
