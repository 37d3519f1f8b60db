"""The constants of the scene: what is installed, and what is drawn at random.

Conventions, stated once for the whole trainer. Lengths are metres, angles radians unless the name
says ``_deg``. The RIS lies in the plane z = 0, centred on the origin, and looks along +z. Element
``n = side_elements * j + i`` sits at ``((i - c) d, (j - c) d, 0)`` with ``c = (side_elements - 1) / 2``.
A source at azimuth phi, elevation theta and range r is at
``r (sin phi cos theta, sin theta, cos phi cos theta)``. A longer path is a more negative phase:
what is nearer to a source leads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

SymbolModel = Literal["constant", "iid"]
"""``constant``: one symbol a source for all snapshots (coherent); ``iid``: a new one each snapshot."""

_MAY_BE_ZERO = ("most_sources", "element_jitter", "code_bits_drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenePhysics:
    """Everything that is fixed before a scene is drawn. Ranges are those of uniform distributions.

    Attributes:
        symbols: the symbol model; every symbol is CN(0, 1).
        antennas: antennas of the base station, a half-wavelength linear array (M).
        snapshots: received snapshots of a scene, each under its own RIS code (L).
        side_elements: elements along each side of the square RIS; N is its square.
        max_sources: slots for sources; their number is uniform on 1..max_sources.
        most_sources: draws fewer where it is smaller than max_sources; 0 for no such limit.
        code_bits: the phase of every RIS element is one of ``2 ** code_bits`` equal steps.
        wavelength_m: carrier wavelength in metres.
        spacing_m: distance of neighbouring RIS elements in metres.
        azimuth_half_width_deg: sources lie within plus or minus this azimuth.
        elevation_half_width_deg: sources lie within plus or minus this elevation.
        min_range_m: smallest distance of a source from the centre of the RIS.
        max_range_m: largest distance of a source from the centre of the RIS.
        min_snr_db: smallest ratio of clean snapshot power to noise power.
        max_snr_db: largest ratio of clean snapshot power to noise power.
        min_rician_factor: smallest power ratio of line of sight to scattering (linear, per entry).
        max_rician_factor: largest power ratio of line of sight to scattering.
        station_half_width_deg: azimuth and elevation of the RIS seen from the base station, and
            of the base station seen from the RIS: four independent angles within this.
        station_range_m: distance of the base station from the RIS.
        element_jitter: every RIS element of a scene is displaced, along x and along y, by up to this
            share of half a wavelength; in what is received and in the truth alike.
        code_bits_drop: the phases of a scene have up to this many bits fewer than ``code_bits``.

    Raises:
        ValueError: a field is out of its bounds; the message names it.
    """

    symbols: SymbolModel = "constant"
    antennas: int = 16
    snapshots: int = 16
    side_elements: int = 12
    max_sources: int = 5
    most_sources: int = 0
    code_bits: int = 3
    wavelength_m: float = 0.3
    spacing_m: float = 0.15
    azimuth_half_width_deg: float = 60.0
    elevation_half_width_deg: float = 30.0
    min_range_m: float = 1.0
    max_range_m: float = 10.0
    min_snr_db: float = -5.0
    max_snr_db: float = 20.0
    min_rician_factor: float = 0.5
    max_rician_factor: float = 10.0
    station_half_width_deg: float = 60.0
    station_range_m: float = 100.0
    element_jitter: float = 0.0
    code_bits_drop: int = 0

    def __post_init__(self) -> None:
        if self.symbols not in get_args(SymbolModel):
            known = " or ".join(repr(name) for name in get_args(SymbolModel))
            raise ValueError(f"scene physics: symbols is {self.symbols!r}; expected {known}")
        self._require_numbers()
        self._require_half_widths()
        for name in ("range_m", "snr_db", "rician_factor"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not low <= high:
                raise ValueError(
                    f"scene physics: min_{name}={low} lies above max_{name}={high}; swap them"
                )
        if self.most_sources > self.max_sources:
            raise ValueError(
                f"scene physics: most_sources={self.most_sources} with room for "
                f"{self.max_sources}; expected at most as many"
            )
        if self.code_bits > 8:
            raise ValueError(f"scene physics: code_bits is {self.code_bits}; expected 1 to 8")
        if not self.element_jitter < 1 or not self.code_bits_drop < self.code_bits:
            raise ValueError(
                f"scene physics: element_jitter={self.element_jitter} and "
                f"code_bits_drop={self.code_bits_drop} with code_bits={self.code_bits}; expected "
                "less than 1, and fewer bits to drop than there are"
            )

    def _require_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "symbols":
                continue
            if not math.isfinite(value):
                raise ValueError(f"scene physics: {field.name} is {value}; expected a number")
            if field.name in _MAY_BE_ZERO and value >= 0:
                continue
            if not field.name.endswith("_db") and value <= 0:
                raise ValueError(f"scene physics: {field.name} is {value}; expected more than 0")

    def _require_half_widths(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("half_width_deg") and not value <= 90:
                raise ValueError(
                    f"scene physics: {field.name} is {value}; expected at most 90, "
                    "because a source behind the RIS cannot be told from its mirror image"
                )

    @property
    def elements(self) -> int:
        """Number of RIS elements, N."""
        return self.side_elements**2

    @property
    def drawn_sources(self) -> int:
        """Largest number of sources that is drawn."""
        return self.most_sources or self.max_sources

    @property
    def symbol_draws(self) -> int:
        """Number of different symbols a source sends in one scene: 1, or one a snapshot."""
        return 1 if self.symbols == "constant" else self.snapshots
