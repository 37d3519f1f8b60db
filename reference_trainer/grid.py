"""From logits on a grid of directions to one expected direction per source."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GRID_POINTS = 61
"""Points per angle."""

AZIMUTH_HALF_WIDTH_RAD = math.radians(60.0)
ELEVATION_HALF_WIDTH_RAD = math.radians(30.0)
LOWEST_TEMPERATURE = 0.01


class AngleGrid(nn.Module):
    """Softmax over 61 x 61 directions within +-60 deg azimuth and +-30 deg elevation; no parameters.

    Args:
        temperature: divides the logits; a lower one makes sharper distributions.

    Raises:
        ValueError: the temperature is below 0.01.
    """

    azimuth_rad: Tensor
    elevation_rad: Tensor
    cells = GRID_POINTS * GRID_POINTS

    def __init__(self, *, temperature: float) -> None:
        super().__init__()
        if not temperature >= LOWEST_TEMPERATURE:
            raise ValueError(
                f"building the angle grid: the softmax temperature is {temperature}, expected at "
                f"least {LOWEST_TEMPERATURE}"
            )
        self.temperature = temperature
        for name, half_width_rad in (
            ("azimuth_rad", AZIMUTH_HALF_WIDTH_RAD),
            ("elevation_rad", ELEVATION_HALF_WIDTH_RAD),
        ):
            points = torch.linspace(-half_width_rad, half_width_rad, GRID_POINTS)
            self.register_buffer(name, points, persistent=False)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected azimuth and elevation [B, sources] under the softmax of the logits.

        Args:
            logits: [B, sources * 61 * 61], azimuth before elevation; any float dtype, taken to
                float32.
        """
        scaled = logits.float().reshape(len(logits), -1, self.cells) / self.temperature
        share = scaled.softmax(dim=-1).reshape(len(logits), -1, GRID_POINTS, GRID_POINTS)
        with torch.autocast(logits.device.type, enabled=False):
            return share.sum(dim=-1) @ self.azimuth_rad, share.sum(dim=-2) @ self.elevation_rad
