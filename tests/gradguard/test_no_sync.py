"""The default guard reads nothing on the host during a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.testing import assert_no_host_reads, count_host_reads
from tests.gradguard.loops import OPTIMIZERS, batches, make_optimizer, small_net


def training_step(*, optimizer_name, amp, guarded, steps=20):
    """Return a function that takes ``steps`` training steps, and the guard or None."""
    net = small_net()
    table = nn.Embedding(5000, 4)  # has guided samples
    model = nn.ModuleDict({"net": net, "table": table})
    optimizer = make_optimizer(optimizer_name, model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, enabled=amp)
    guard = gg.watch(model, optimizer, scaler=scaler, detail_every=5, lag=4) if guarded else None
    data = batches(steps)
    rows = torch.tensor([3, 4999])

    def run():
        for batch in data:
            loss = nn.functional.mse_loss(net(batch.x), batch.y) + table(rows).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if guard is not None:
                guard.observe(loss=loss, reported_loss=loss, terms={"mse": loss})

    return run, guard


@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_the_default_guard_adds_no_host_read(optimizer_name, amp):
    """Over twenty steps the guarded loop reads exactly as often as the bare one."""
    bare, _ = training_step(optimizer_name=optimizer_name, amp=amp, guarded=False)
    guarded, guard = training_step(optimizer_name=optimizer_name, amp=amp, guarded=True)
    assert_no_host_reads(guarded, allowed=count_host_reads(bare))
    guard.detach()
    assert guard.findings == ()
    assert len(guard.log) == 20


def test_the_lint_would_notice():
    """The same check fails for a guard that reads one value per step."""
    bare, _ = training_step(optimizer_name="adamw-fused", amp=False, guarded=False)
    guarded, guard = training_step(optimizer_name="adamw-fused", amp=False, guarded=True)
    guard._watches["optimizer"].observe = lambda _, value, __: float(value)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        assert_no_host_reads(guarded, allowed=count_host_reads(bare))
    guard.detach()
