"""Averaged weights: the decay warms up, and the average is a copy of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reference_trainer.averaging import AveragedWeights, warmed_up_decay


@given(st.floats(0.0, 0.9999), st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30))
def test_it_is_the_recursion_written_out(decay: float, values: list[float]) -> None:
    """The average equals a_t = d_t a_{t-1} + (1 - d_t) w_t in float64, to single precision."""
    model = nn.Linear(1, 1, bias=False)
    averaged = AveragedWeights(model, decay=decay)
    expected = model.weight.item()
    for taken, value in enumerate(values, start=1):
        nn.init.constant_(model.weight, value)
        averaged.update()
        share = warmed_up_decay(taken, decay)
        expected = share * expected + (1.0 - share) * value
    assert averaged.taken == len(values)
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_the_initial_weights_are_forgotten_in_a_short_run() -> None:
    """After 240 steps less than a millionth of the initial weights is left; 0.999 leaves 79 %."""
    left = 1.0
    for taken in range(1, 241):
        left *= warmed_up_decay(taken, 0.999)
    assert left < 1e-6


def test_decay_zero_follows_the_live_weights() -> None:
    """With decay 0 the average is the live weights, bit for bit."""
    model = nn.Linear(3, 2)
    averaged = AveragedWeights(model, decay=0.0)
    nn.init.normal_(model.weight)
    averaged.update()
    assert torch.equal(averaged.module.weight, model.weight)


def test_the_live_model_is_left_alone() -> None:
    """Averaging reads the live model: its weights, mode and gradients stay; buffers are copied."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    averaged = AveragedWeights(model, decay=0.9)
    model(torch.randn(4, 3)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    averaged.update()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not averaged.module.training
    assert not any(parameter.requires_grad for parameter in averaged.module.parameters())
    assert torch.equal(averaged.module[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    """A decay of 1 would never move; it is refused with the range."""
    with pytest.raises(ValueError, match=r"outside \[0, 1\)"):
        AveragedWeights(nn.Linear(1, 1), decay=decay)
