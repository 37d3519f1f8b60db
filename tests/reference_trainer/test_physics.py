"""What the constants of a scene promise."""

from __future__ import annotations

from typing import Any

import pytest

from reference_trainer.physics import ScenePhysics


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"symbols": "random"}, "symbols is 'random'; expected 'constant' or 'iid'"),
        ({"wavelength_m": 0.0}, "wavelength_m is 0.0; expected more than 0"),
        ({"wavelength_m": float("nan")}, "wavelength_m is nan; expected a number"),
        ({"max_sources": 0}, "max_sources is 0; expected more than 0"),
        ({"min_range_m": 11.0}, "min_range_m=11.0 lies above max_range_m=10.0"),
        ({"min_snr_db": float("nan")}, "min_snr_db is nan; expected a number"),
        ({"max_snr_db": float("inf")}, "max_snr_db is inf; expected a number"),
        ({"min_snr_db": 21.0}, "min_snr_db=21.0 lies above max_snr_db=20.0"),
        ({"max_rician_factor": 0.1}, "min_rician_factor=0.5 lies above max_rician_factor=0.1"),
        ({"azimuth_half_width_deg": 120.0}, "azimuth_half_width_deg is 120.0; expected at most 90"),
        ({"code_bits": 9}, "code_bits is 9; expected 1 to 8"),
    ],
)
def test_a_field_out_of_bounds_is_named(change: dict[str, Any], sentence: str) -> None:
    """A constant that makes no physical sense is refused with its name, its value and the bound."""
    with pytest.raises(ValueError, match=sentence):
        ScenePhysics(**change)


def test_the_constants_are_those_of_the_published_setup() -> None:
    """By default 144 elements half a wavelength apart serve 16 antennas over 16 snapshots."""
    physics = ScenePhysics()
    assert (physics.elements, physics.antennas, physics.snapshots) == (144, 16, 16)
    assert physics.spacing_m == physics.wavelength_m / 2
    assert physics.symbol_draws == 1
    assert ScenePhysics(symbols="iid").symbol_draws == 16
