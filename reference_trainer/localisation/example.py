"""One scene to look at: its spectrum, its eigenvalues, its sources and where they are said to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.localisation.covariances import TITLES, factors
from reference_trainer.localisation.estimators import estimators
from reference_trainer.localisation.report import HIGH_SNR_DB
from reference_trainer.music import pseudo_spectrum
from reference_trainer.positions import Positions, true_positions
from reference_trainer.scenes import draw_scenes
from reference_trainer.subspace import principal_directions

if TYPE_CHECKING:
    from torch import Tensor

    from reference_trainer.localisation.plan import Plan
    from reference_trainer.localisation.subject import Subject
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

WANTED_SOURCES = 3
SHOWN = ("ml_network", "network_music")
EIGENVALUES = 16
_AZIMUTHS, _ELEVATIONS, _RANGES = 121, 61, 8
_SEARCHED = 200  # scenes among which one that shows something is looked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """What there is to see of one scene, on the CPU.

    Attributes:
        index: number of the scene.
        snr_db: its signal-to-noise ratio.
        true: its sources, one scene.
        estimates: where they are said to be, by the title of the estimator.
        azimuth_deg: of the spectrum, ``[A]``.
        elevation_deg: of the spectrum, ``[E]``.
        spectrum_db: MUSIC pseudo-spectrum of the hybrid, largest over the ranges, ``[E, A]``.
        eigenvalues: the largest as shares of the trace, ``[16]``, by the title of the covariance.
    """

    index: int
    snr_db: float
    true: Positions
    estimates: dict[str, Positions]
    azimuth_deg: Tensor
    elevation_deg: Tensor
    spectrum_db: Tensor
    eigenvalues: dict[str, Tensor]


@torch.no_grad()
def example_of(subject: Subject, plan: Plan) -> Example:
    """Return the first scene of a plan with 3 sources and at least 10 dB, or else the very first.

    Args:
        subject: the network, on the device of the plan.
        plan: what it was judged on.
    """
    physics, model = subject.physics, subject.network
    numbers = range(min(plan.scenes, _SEARCHED))
    scenes = draw_scenes(physics, seed=plan.seed, split=plan.split, indices=numbers)
    fits = (scenes.num_sources == WANTED_SOURCES) & (scenes.snr_db >= HIGH_SNR_DB)
    index = int(fits.int().argmax())
    scene = scenes.select(slice(index, index + 1)).to(plan.device)
    estimates = {
        one.title: one.locate(physics, scene, scene.num_sources).to("cpu")
        for one in estimators(model, share=plan.share)
        if one.key in SHOWN
    }
    made = {key: make(physics, scene) for key, make in factors(model, share=plan.share).items()}
    azimuth_deg, elevation_deg, spectrum_db = _spectrum(physics, made["hybrid"], scene)
    return Example(
        index=index,
        snr_db=float(scene.snr_db),
        true=true_positions(scene).to("cpu"),
        estimates=estimates,
        azimuth_deg=azimuth_deg,
        elevation_deg=elevation_deg,
        spectrum_db=spectrum_db,
        eigenvalues={TITLES[key]: _eigenvalues(factor) for key, factor in made.items()},
    )


def _spectrum(
    physics: ScenePhysics, factor: Tensor, scene: Scenes
) -> tuple[Tensor, Tensor, Tensor]:
    """Azimuths ``[A]`` and elevations ``[E]`` in degrees, and the spectrum in dB ``[E, A]``."""
    widest = (physics.azimuth_half_width_deg, physics.elevation_half_width_deg)
    azimuth_deg = torch.linspace(-widest[0], widest[0], _AZIMUTHS)
    elevation_deg = torch.linspace(-widest[1], widest[1], _ELEVATIONS)
    inverse_range = torch.linspace(1 / physics.max_range_m, 1 / physics.min_range_m, _RANGES)
    axes = (elevation_deg * (math.pi / 180), azimuth_deg * (math.pi / 180), inverse_range)
    elevation, azimuth, inverse = (
        one.reshape(-1).to(factor.device) for one in torch.meshgrid(*axes, indexing="ij")
    )
    spectrum = pseudo_spectrum(
        physics,
        factor,
        scene.num_sources,
        azimuth_rad=azimuth,
        elevation_rad=elevation,
        range_m=1 / inverse,
    )
    highest = spectrum.reshape(_ELEVATIONS, _AZIMUTHS, _RANGES).amax(dim=-1)
    return azimuth_deg, elevation_deg, 10 * highest.log10().cpu()


def _eigenvalues(factor: Tensor) -> Tensor:
    power = principal_directions(factor)[0][0].clamp_min(0.0).cpu()
    padded = torch.nn.functional.pad(power, (0, max(0, EIGENVALUES - len(power))))
    return (padded / power.sum())[:EIGENVALUES]
