"""A gate that is saved and loaded goes on as if nothing had happened."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from gradguard.gate import StepGate
from gradguard.policies import AnySignal, Finite, LossSpike, NormSpike
from gradguard.verdicts import GateCeilingError

POLICIES = (Finite(), AnySignal(), NormSpike(warmup=3), LossSpike(warmup=3))
# (gradient, loss) of each step: a warm-up, spikes in both, NaN and steps that are fine again.
STEPS = [
    *((1.0 + 0.1 * (i % 3), 1.0 + 0.1 * (i % 2)) for i in range(6)),
    (50.0, 1.0),
    (1.1, 60.0),
    (math.nan, 1.0),
    (1.2, 1.1),
    (40.0, 1.0),
    (1.0, 1.0),
]


def stepped(gate, weight, optimizer, steps):
    """Take the steps under the gate; return the policy that vetoed each of them."""
    for gradient, loss in steps:
        weight.grad = torch.full((2,), gradient)
        gate.observe(loss=loss)
        optimizer.step()
    gate.flush()
    return [decision.policy for decision in gate.decisions]


def gated(fused, **options):
    """Return a new parameter, its optimizer after one step, and a gate on it."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    weight.grad = torch.ones(2)
    optimizer.step()
    return weight, optimizer, StepGate(optimizer, POLICIES, max_consecutive=99, **options)


def through_a_file(state):
    """Return the state after torch has written and read it without unpickling."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("at", range(len(STEPS) + 1))
def test_a_loaded_gate_goes_on_alike(at, fused):
    """Saved after any step, even the first, and loaded into a new gate: the same verdicts, reasons,
    estimates and counts as without the break, on both back ends.
    """
    weight, optimizer, whole = gated(fused)
    stepped(whole, weight, optimizer, STEPS)
    weight, optimizer, first = gated(fused)
    before = stepped(first, weight, optimizer, STEPS[:at])
    weight, optimizer, second = gated(fused)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.state_dict() == first.state_dict()
    after = stepped(second, weight, optimizer, STEPS[at:])
    assert before + after == [decision.policy for decision in whole.decisions]
    reasons = [decision.reason for decision in whole.decisions]
    assert [decision.reason for decision in second.decisions] == reasons[at:]
    assert second.counts == whole.counts
    assert second.state_dict() == whole.state_dict()
    assert second.decision(len(STEPS) - 1) == whole.last_decision or at == len(STEPS)


def test_ceilings_look_back_over_the_break():
    """Vetoes in a row before the break count towards the ceiling after it."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight])
    first, bad = StepGate(optimizer, max_consecutive=3), (math.nan, 1.0)
    stepped(first, weight, optimizer, [bad] * 3)
    first.detach()
    second = StepGate(optimizer, max_consecutive=3)
    second.load_state_dict(first.state_dict())
    with pytest.raises(GateCeilingError, match=r"4 in a row"):
        stepped(second, weight, optimizer, [bad])


def test_the_state_of_other_policies_is_refused():
    """Estimates of one policy are no estimates of another: one sentence names both lists."""
    _, optimizer, gate = gated(fused=False)
    other = StepGate(optimizer)
    with pytest.raises(ValueError, match=r"'LossSpike'\], this one has \['Finite', 'AnySignal'\]"):
        other.load_state_dict(gate.state_dict())
