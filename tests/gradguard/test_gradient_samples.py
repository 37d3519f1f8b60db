"""The gradients that a few hooks sample are read as they are, at each of the three places."""

from __future__ import annotations

import math

import pytest
import torch

from gradguard.gradient_samples import NO_GRADIENT, GradientSamples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def numbers(readings):
    """Return the readings as Python numbers."""
    return {name: [float(norm) for norm in norms] for name, norms in readings.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (16, 16), (3, 2, 5, 1)])
def test_small_gradients_are_read_whole(dtype, shape):
    """Before, after and at the step the norms are those of plain Python arithmetic, whatever the dtype."""
    parameter = torch.ones(shape, dtype=dtype, requires_grad=True)
    samples = GradientSamples([parameter])
    factor = torch.arange(1.0, parameter.numel() + 1).reshape(shape).to(dtype) / 8
    for _ in range(2):
        (parameter * factor).sum().abs().backward()
    found = numbers(samples.readings([parameter.grad], None))
    exact = math.hypot(*(abs(x) for x in parameter.grad.reshape(-1).tolist()))
    assert found["step"] == found["backward"] == [pytest.approx(exact, rel=1e-6)]
    assert found["carried"][0] == NO_GRADIENT
    assert found["carried"][1] == pytest.approx(found["every"][0] - exact, rel=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last"])
def test_large_gradients_are_read_at_the_same_places_every_time(layout):
    """A doubled gradient has twice the norm, and a fused step's is divided by the scale."""
    parameter = torch.zeros(8, 16, 10, 10)
    if layout == "transposed":
        parameter = parameter.transpose(0, 1)
    if layout == "channels last":
        parameter = parameter.contiguous(memory_format=torch.channels_last)
    parameter.requires_grad_()
    samples = GradientSamples([parameter])
    factor = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        (parameter * factor).sum().backward()
    found = numbers(samples.readings([parameter.grad], torch.tensor(4.0)))
    assert found["backward"][0] == pytest.approx(2 * found["carried"][1], rel=1e-6)
    assert found["step"][0] == pytest.approx(found["backward"][0] / 4, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_micro_step_is_remembered_when_later_ones_are_good(bad):
    """A gradient that was not finite after one backward shows until the window ends, and not after."""
    parameter = torch.ones(3, requires_grad=True)
    samples = GradientSamples([parameter])
    for factor in (1.0, bad, 1.0):
        parameter.grad = None
        (parameter * factor).sum().backward()
    found = numbers(samples.readings([parameter.grad], None))
    assert math.isfinite(found["backward"][0])
    assert not math.isfinite(found["every"][0])
    samples.reset()
    assert samples.readings([parameter.grad], None) == {}
    parameter.sum().backward()
    assert math.isfinite(numbers(samples.readings([parameter.grad], None))["every"][0])


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_backward_is_not_kept():
    """With create_graph=True the norms do not hold the graph of the gradients."""
    parameter = torch.ones(3, requires_grad=True)
    samples = GradientSamples([parameter])
    parameter.square().sum().backward(create_graph=True)
    readings = samples.readings([parameter.grad], None)
    assert not any(norm.requires_grad for norms in readings.values() for norm in norms)
    parameter.grad = None
