"""When a rule finds a gradient missing, zero or not finite, the guard listens to one step for the line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.facts import ProbeReading


class Cut(nn.Module):
    """A network whose first layer is cut off."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(hidden.detach())  # the cut


class Rounded(Cut):
    """A network whose first layer gets a zero gradient."""

    def forward(self, x):
        hidden = self.first(x)
        return self.last(torch.round(hidden))  # the death


def trained(model, steps=30, **options):
    """Train and return the guard and the final weights."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gg.watch(model, optimizer, strict=True, **options) as guard:
        for _ in range(steps):
            loss = (model(torch.randn(16, 4)) - 1).square().mean()
            guard.observe(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return guard


def line_of(marker):
    """Return the line of this file with a comment."""
    with open(__file__) as text:
        lines = [i for i, line in enumerate(text, start=1) if f"# {marker}\n" in line]
    return f"test_arming.py:{lines[0]}"


@pytest.mark.parametrize(
    ("network", "code", "marker"), [(Cut, "GG501", "the cut"), (Rounded, "GG502", "the death")]
)
def test_the_diagnosis_names_the_line(network, code, marker):
    """The finding about the first layer ends with file and line of what cut or killed its gradient."""
    diagnosis = trained(network()).diagnosis()
    (cause,) = [c.finding for c in diagnosis.causes if c.finding.code == code]
    assert line_of(marker) in cause.message


def test_a_healthy_run_is_never_listened_to():
    """Without a finding that asks for it no step is run under a probe."""
    guard = trained(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    assert guard.log.facts_of(ProbeReading) == ()


def test_listening_changes_no_bit():
    """A run that was listened to ends in the same weights as one that was not."""
    ends = []
    for explain in (True, False):
        torch.manual_seed(1)
        model = Cut()
        guard = trained(model, explain=explain)
        assert bool(guard.log.facts_of(ProbeReading)) is explain
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_run_that_ends_while_it_is_listened_to_leaves_no_mode_behind():
    """However the block ends, torch functions are called without a mode afterwards."""
    model = Cut()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(KeyError), gg.watch(model, optimizer, lag=1) as guard:
        for _ in range(3):
            model(torch.randn(16, 4)).sum().backward()
            optimizer.step()
        guard.flush()
        for _ in range(2):
            model(torch.randn(16, 4)).sum().backward()
            optimizer.step()
            raise KeyError
    assert torch._C._len_torch_function_stack() == 0
