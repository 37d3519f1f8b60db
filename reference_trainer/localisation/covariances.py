"""The covariances of a scene: of the truth, of the fit, of the network, and of both together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference_trainer.covariance import RankReport, rank_report
from reference_trainer.localisation.hybrid import (
    blended_covariance,
    fitted_around,
    proposing_factors,
    seen_by,
)
from reference_trainer.localisation.report import CovarianceReport, RankMeans
from reference_trainer.sample_covariance import fitted_factor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

    Factor = Callable[[ScenePhysics, Scenes], Tensor]

TITLES = {
    "true": "true",
    "sample": "fitted to the snapshots",
    "network": "network",
    "blend": "blend",
    "hybrid": "hybrid",
}


def factors(model: CovarianceNetwork, *, share: float) -> dict[str, Factor]:
    """Return what gives the factor of each covariance, by the keys of :data:`TITLES`.

    Args:
        model: in evaluation mode, on the device of the scenes.
        share: of the fitted covariance in the blend.
    """
    return {
        "true": lambda _, scenes: scenes.true_factor,
        "sample": fitted_factor,
        "network": lambda _, scenes: seen_by(model, scenes).factor,
        "blend": lambda physics, scenes: blended_covariance(model, physics, scenes, share=share),
        "hybrid": lambda physics, scenes: fitted_around(
            physics, scenes, proposing_factors(model, physics, scenes), scenes.num_sources
        ),
    }


def ranks(factor: Tensor, scenes: Scenes) -> RankReport:
    """Return what the rank of each covariance is worth, on the CPU. Sync: as ``eigh``."""
    report = rank_report(factor, num_sources=scenes.num_sources, true_basis=scenes.true_basis)
    return RankReport(**{name: value.cpu() for name, value in _named(report).items()})


def covariance_report(key: str, parts: list[RankReport], num_sources: Tensor) -> CovarianceReport:
    """Return the means over the scenes of several batches.

    Args:
        key: of :data:`TITLES`.
        parts: of the batches, in order.
        num_sources: true number of sources of all scenes, ``[B]``.
    """
    columns = [_named(part) for part in parts]
    whole = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    present = sorted(set(num_sources.tolist()))
    return CovarianceReport(
        key=key,
        title=TITLES[key],
        overall=_means(whole, torch.ones_like(num_sources, dtype=torch.bool)),
        by_count={count: _means(whole, num_sources == count) for count in present},
    )


def _named(report: RankReport) -> dict[str, Tensor]:
    names = ("count", "entropy_rank", "participation_ratio", "energy_in_top", "overlap", "chance")
    return {name: getattr(report, name) for name in names}


def _means(columns: dict[str, Tensor], chosen: Tensor) -> RankMeans:
    means = {name: float(column[chosen].double().mean()) for name, column in columns.items()}
    return RankMeans(scenes=int(chosen.sum()), **means)
