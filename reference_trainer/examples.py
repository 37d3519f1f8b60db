"""Scenes made ready to learn from: what the network is shown, and what its answer is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference_trainer.estimate import beam_map
from reference_trainer.geometry import stencil_vectors

if TYPE_CHECKING:
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes


@dataclass(frozen=True, slots=True, eq=False)
class NetworkInput:
    """A batch of observations, float32; the last axis of the first three is (re, im).

    Attributes:
        snapshots: [B, 16, 16, 2] received samples (snapshot, antenna), of unit mean power a scene.
        beam_map: [B, 16, 16, 2] the field estimated on the RIS, seen in 16 x 16 beams.
        codes: [B, 16, 144, 2] reflection codes (snapshot, element).
        snr_db: [B] signal-to-noise ratio of the snapshots.
    """

    snapshots: Tensor
    beam_map: Tensor
    codes: Tensor
    snr_db: Tensor

    def to(self, device: torch.device | str) -> NetworkInput:
        """Return the observations on another device. Sync: as ``Tensor.to``."""
        parts = self.snapshots, self.beam_map, self.codes, self.snr_db
        return NetworkInput(*(part.to(device) for part in parts))

    def select(self, index: Tensor | slice) -> NetworkInput:
        """Return some of the observations: a slice shares memory, an index tensor [n] copies."""
        parts = self.snapshots, self.beam_map, self.codes, self.snr_db
        return NetworkInput(*(part[index] for part in parts))


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """A batch of B scenes with everything that is the same in every epoch computed once.

    Memory: 144 kB a scene for the stencil, 31 kB for the rest.

    Attributes:
        observed: what the network is shown.
        scenes: the truth.
        stencil: [B, 5, 25, 144] complex64 steering vectors around every source, see
            :func:`reference_trainer.geometry.stencil_vectors`.
    """

    observed: NetworkInput
    scenes: Scenes
    stencil: Tensor

    def __len__(self) -> int:
        return len(self.scenes)

    def to(self, device: torch.device | str) -> Examples:
        """Return the examples on another device. Sync: as ``Tensor.to``."""
        return Examples(self.observed.to(device), self.scenes.to(device), self.stencil.to(device))

    def select(self, index: Tensor | slice) -> Examples:
        """Return some of the examples: a slice shares memory, an index tensor [n] copies.

        The index may be on another device.
        """
        if isinstance(index, Tensor):
            index = index.to(self.stencil.device)
        return Examples(self.observed.select(index), self.scenes.select(index), self.stencil[index])


def make_examples(physics: ScenePhysics, scenes: Scenes) -> Examples:
    """Prepare ``scenes``, drawn from ``physics`` with their field estimates. Sync: none on the CPU.

    Raises:
        ValueError: the scenes were drawn without their estimates.
    """
    stencil = stencil_vectors(
        physics, scenes.azimuth_rad, scenes.elevation_rad, scenes.range_m, active=scenes.active
    )
    return Examples(network_input(scenes), scenes, stencil)


def network_input(scenes: Scenes) -> NetworkInput:
    """Build what the network is shown of ``scenes``.

    The level of the snapshots says nothing about a covariance of given trace, and differs with the
    noise; of unit power, all scenes look alike to single and half precision.

    Raises:
        ValueError: the scenes were drawn without their estimates.
    """
    snapshots = torch.view_as_real(scenes.snapshots)
    power = 2.0 * snapshots.square().mean(dim=(1, 2, 3), keepdim=True)
    return NetworkInput(
        snapshots=snapshots * power.clamp_min(1e-30).rsqrt(),
        beam_map=beam_map(scenes.estimate),
        codes=torch.view_as_real(scenes.codes),
        snr_db=scenes.snr_db,
    )
