"""The grid head's expected directions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference_trainer.grid import GRID_POINTS, AngleGrid

cells = st.integers(0, GRID_POINTS - 1)


@given(cells, cells)
def test_a_certain_grid_gives_the_angles_of_its_cell(azimuth_cell, elevation_cell):
    """Cell (i, j) is azimuth -60 + 2 i deg and elevation -30 + j deg."""
    logits = torch.zeros(1, 1, GRID_POINTS, GRID_POINTS)
    logits[0, 0, azimuth_cell, elevation_cell] = 30.0
    azimuth_rad, elevation_rad = AngleGrid(temperature=0.15)(logits.flatten(1))
    assert math.degrees(azimuth_rad.item()) == pytest.approx(-60 + 2 * azimuth_cell, abs=1e-3)
    assert math.degrees(elevation_rad.item()) == pytest.approx(-30 + elevation_cell, abs=1e-3)


def test_an_undecided_grid_points_straight_ahead():
    """Equal logits give the centre of the field of view, for every source."""
    grid = AngleGrid(temperature=0.15)
    for angle_rad in grid(torch.full((2, 5 * grid.cells), 7.0)):
        torch.testing.assert_close(angle_rad, torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_a_lower_temperature_makes_the_grid_more_certain():
    """Dividing the temperature by two is multiplying the logits by two."""
    logits = torch.randn(2, 5 * GRID_POINTS**2, generator=torch.Generator().manual_seed(0))
    sharp, doubled = AngleGrid(temperature=0.1)(logits), AngleGrid(temperature=0.2)(2 * logits)
    torch.testing.assert_close(sharp, doubled)


def test_large_half_precision_logits_do_not_overflow():
    """The softmax is taken in single precision, so logits near the largest half are fine."""
    logits = torch.full((1, 5 * GRID_POINTS**2), 6e4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        angles = AngleGrid(temperature=0.01)(logits)
    assert all(angle.isfinite().all() and angle.dtype == torch.float32 for angle in angles)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_of_nothing_is_refused(temperature):
    """A softmax needs a positive temperature."""
    with pytest.raises(ValueError, match="temperature"):
        AngleGrid(temperature=temperature)
