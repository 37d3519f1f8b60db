"""The steering function against an independent computation, its limits and its symmetries."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.geometry import (
    STENCIL_CENTRE,
    STENCIL_OFFSETS_RAD,
    element_positions_m,
    steering_vectors,
    stencil_vectors,
)
from reference_trainer.physics import ScenePhysics

PHYSICS = ScenePhysics()
azimuths = st.floats(-math.pi / 2, math.pi / 2)
elevations = st.floats(-math.pi / 2, math.pi / 2)
ranges = st.floats(0.5, 100.0)


def slow_steering(azimuth: float, elevation: float, radius: float) -> list[complex]:
    """The definition, one element at a time: distances by Pythagoras, no shared code."""
    source = (
        radius * math.sin(azimuth) * math.cos(elevation),
        radius * math.sin(elevation),
        radius * math.cos(azimuth) * math.cos(elevation),
    )
    response = []
    for row in range(12):
        for column in range(12):
            element = ((column - 5.5) * 0.15, (row - 5.5) * 0.15, 0.0)
            path = math.dist(source, element)
            response.append(cmath.exp(-2j * math.pi * (path - radius) / 0.3) / 12)
    return response


def steering(azimuth: float, elevation: float, radius: float, dtype: torch.dtype) -> torch.Tensor:
    """The function under test at one position."""
    position = (torch.tensor(value, dtype=dtype) for value in (azimuth, elevation, radius))
    return steering_vectors(PHYSICS, *position)


@given(azimuth=azimuths, elevation=elevations, radius=ranges)
def test_steering_agrees_with_the_definition(
    azimuth: float, elevation: float, radius: float
) -> None:
    """The stable formula equals the textbook one to rounding, in double and in single precision."""
    expected = torch.tensor(slow_steering(azimuth, elevation, radius), dtype=torch.complex128)
    double = steering(azimuth, elevation, radius, torch.float64)
    single = steering(azimuth, elevation, radius, torch.float32)
    torch.testing.assert_close(double, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(single.to(torch.complex128), expected, rtol=0, atol=2e-6)


@given(azimuth=azimuths, elevation=elevations, radius=ranges)
def test_steering_has_unit_norm(azimuth: float, elevation: float, radius: float) -> None:
    """Every steering vector has norm 1 and entries of equal modulus."""
    response = steering(azimuth, elevation, radius, torch.float64)
    torch.testing.assert_close(response.abs(), torch.full((144,), 1 / 12, dtype=torch.float64))


@given(azimuth=azimuths, elevation=elevations, radius=ranges)
def test_mirroring_the_source_mirrors_the_response(
    azimuth: float, elevation: float, radius: float
) -> None:
    """The array is centred: a source mirrored in a plane of symmetry mirrors the elements."""
    seen = steering(azimuth, elevation, radius, torch.float64).reshape(12, 12)
    left = steering(-azimuth, elevation, radius, torch.float64).reshape(12, 12)
    below = steering(azimuth, -elevation, radius, torch.float64).reshape(12, 12)
    torch.testing.assert_close(left, seen.flip(1), rtol=0, atol=1e-12)
    torch.testing.assert_close(below, seen.flip(0), rtol=0, atol=1e-12)


@given(azimuth=azimuths, elevation=elevations)
def test_a_far_source_sends_a_plane_wave(azimuth: float, elevation: float) -> None:
    """At 10,000 km the phase is linear in the position, and the nearer elements lead."""
    x_m, y_m = element_positions_m(PHYSICS, like=torch.zeros(0, dtype=torch.float64))
    towards = math.sin(azimuth) * math.cos(elevation)
    phase = 2 * math.pi / 0.3 * (x_m * towards + y_m * math.sin(elevation))
    plane = torch.polar(torch.full_like(phase, 1 / 12), phase)
    far = steering(azimuth, elevation, 1e7, torch.float64)
    torch.testing.assert_close(far, plane, rtol=0, atol=1e-6)


def test_a_near_source_bends_the_wave() -> None:
    """In front of the array the corners lag behind by the Fresnel phase k (x^2 + y^2) / (2 r)."""
    x_m, y_m = element_positions_m(PHYSICS, like=torch.zeros(0, dtype=torch.float64))
    lag = -2 * math.pi / 0.3 * (x_m**2 + y_m**2) / (2 * 50.0)
    near = steering(0.0, 0.0, 50.0, torch.float64)
    torch.testing.assert_close(near.angle(), lag, rtol=1e-3, atol=0)


def test_elements_are_numbered_row_by_row() -> None:
    """Element 12 j + i is i spacings along x and j spacings along y, around the origin."""
    x_m, y_m = element_positions_m(PHYSICS)
    assert x_m[12 * 3 + 7].item() == pytest.approx((7 - 5.5) * 0.15)
    assert y_m[12 * 3 + 7].item() == pytest.approx((3 - 5.5) * 0.15)
    assert x_m.sum().abs().item() < 1e-5
    assert y_m.sum().abs().item() < 1e-5


def test_positions_broadcast() -> None:
    """Azimuth, elevation and range of different shapes combine as torch broadcasts them."""
    azimuth, elevation = torch.rand(4, 1), torch.rand(3)
    combined = steering_vectors(PHYSICS, azimuth, elevation, torch.tensor(2.0))
    assert combined.shape == (4, 3, 144)
    alone = steering_vectors(PHYSICS, azimuth[2, 0], elevation[1], torch.tensor(2.0))
    assert torch.equal(combined[2, 1], alone)


def test_steering_is_differentiable() -> None:
    """Analytic gradients along azimuth, elevation and range agree with finite differences."""
    small = ScenePhysics(side_elements=2)
    position = (torch.tensor([value], dtype=torch.float64) for value in (0.3, -0.2, 1.5))
    leaves = tuple(value.requires_grad_() for value in position)
    assert torch.autograd.gradcheck(lambda *at: steering_vectors(small, *at), leaves)


def test_the_stencil_surrounds_its_source() -> None:
    """The centre is the source; the others are shifted, azimuth slow and elevation fast."""
    azimuth, elevation, radius = torch.rand(3, 2, 5) + 0.5
    active = torch.ones(2, 5, dtype=torch.bool)
    stencil = stencil_vectors(PHYSICS, azimuth, elevation, radius, active=active)
    assert stencil.shape == (2, 5, 25, 144)
    centre = steering_vectors(PHYSICS, azimuth, elevation, radius)
    assert torch.equal(stencil[..., STENCIL_CENTRE, :], centre)
    shifted = steering_vectors(
        PHYSICS, azimuth + STENCIL_OFFSETS_RAD[4], elevation + STENCIL_OFFSETS_RAD[1], radius
    )
    assert torch.equal(stencil[..., 5 * 4 + 1, :], shifted)


def test_the_stencil_of_an_empty_slot_is_finite() -> None:
    """A padded slot, at range 0, gives no NaN even where an element sits in the origin."""
    zero = torch.zeros(1, 5)
    odd = ScenePhysics(side_elements=3)
    stencil = stencil_vectors(odd, zero, zero, zero, active=torch.zeros(1, 5, dtype=torch.bool))
    assert stencil.isfinite().all()
