"""A guard that watches a gated optimizer: vetoes are reported with their reason, whoever came first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.records import StepOutcome
from tests.gradguard.loops import any_changed, batches, make_optimizer, small_net, weights_of

APPLIED, VETOED, SKIPPED = (
    StepOutcome.APPLIED,
    StepOutcome.VETOED,
    StepOutcome.SKIPPED_BY_SCALER,
)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "amp"])
@pytest.mark.parametrize("optimizer_name", ["sgd-default", "adamw-foreach", "adamw-fused"])
def test_vetoes_are_reported_as_what_they_are(optimizer_name, amp, gate_first):
    """Steps on a zero loss are vetoed for lack of signal: outcome, reason and truth agree."""
    net = small_net()
    optimizer = make_optimizer(optimizer_name, net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=amp)
    policies = (gg.Finite(), gg.AnySignal())
    if gate_first:
        gate = gg.StepGate(optimizer, policies)
        guard = gg.watch(net, optimizer, scaler=scaler, gate=gate, strict=True)
    else:  # the guard's hooks are registered before those of the gate it is given
        late = LateGate()
        guard = gg.watch(net, optimizer, scaler=scaler, gate=late, strict=True)
        gate = late.gate = gg.StepGate(optimizer, policies)
    truth = []
    for index, batch in enumerate(batches(6)):
        factor = 0.0 if index in (2, 4) else 1.0
        scaler.scale(factor * nn.functional.mse_loss(net(batch.x), batch.y)).backward()
        before = weights_of(net.parameters())
        scaler.step(optimizer)
        scaler.update()
        taken = guard.step_was_taken()
        truth.append(any_changed(before, net.parameters()))
        assert taken == truth[-1]
        optimizer.zero_grad()
    guard.detach()
    gate.detach()
    expected = [VETOED if index in (2, 4) else APPLIED for index in range(6)]
    assert [r.outcome for r in guard.log] == expected
    assert truth == [outcome is APPLIED for outcome in expected]
    for record in guard.log:
        assert (record.reason is not None) == (record.outcome is VETOED)
        assert record.gradient_norm is not None
        assert (record.gradient_norm == 0.0) == (record.outcome is VETOED)


class LateGate:
    """Stands in until the real gate is made, so that the guard's hooks run first."""

    gate: gg.StepGate

    def __getattr__(self, name):
        return getattr(self.gate, name)


def test_a_scaler_skip_outranks_a_veto():
    """A fused step that both the scaler and the gate reject is the scaler's skip."""
    net = small_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    gate = gg.StepGate(optimizer)
    with gate, gg.watch(net, optimizer, scaler=scaler, gate=gate, strict=True) as guard:
        for poisoned in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(net(torch.ones(2, 6)), torch.ones(2, 2))).backward()
            if poisoned:
                next(net.parameters()).grad.view(-1)[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert [r.outcome for r in guard.log] == [APPLIED, SKIPPED, APPLIED]
