"""The estimators that are compared: each turns scenes and a number of sources into positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reference_trainer.likelihood import SEARCH_GRID, maximum_likelihood, refine
from reference_trainer.local_fit import locally_fitted_factor
from reference_trainer.localisation.hybrid import (
    blended_covariance,
    hybrid_positions,
    network_positions,
    sampled_positions,
)
from reference_trainer.music import music
from reference_trainer.residual_search import GridShape
from reference_trainer.sample_covariance import fitted_factor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from reference_trainer.localisation.counting import CounterKey
    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.scenes import Scenes

PUBLISHED_GRID = GridShape(azimuths=49, elevations=25, ranges=14)
"""The grid of the search that the published figures of maximum likelihood come from."""


class Locate(Protocol):
    """Says where the sources of B scenes stand, given how many there are."""

    def __call__(self, physics: ScenePhysics, scenes: Scenes, num_sources: Tensor, /) -> Positions:
        """Return the positions of ``num_sources``, int64 ``[B]``, from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One estimator.

    Attributes:
        key: its name in reports.
        title: its name for readers.
        slow: whether it only runs on a subset of the scenes.
        counted_by: what tells it the number of sources where that is not known; None where it is
            only run with the true number.
        locate: the estimator, from the raw scenes on.
    """

    key: str
    title: str
    slow: bool = False
    counted_by: CounterKey | None
    locate: Locate


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """An estimator that goes on from the positions of another.

    Attributes:
        key: its name in reports.
        title: its name for readers.
        start: key of the estimator it goes on from, which must be run before.
        counted_by: as for that one.
        refine: returns better positions of the same number of sources.
    """

    key: str
    title: str
    start: str
    counted_by: CounterKey | None
    refine: Callable[[ScenePhysics, Scenes, Positions], Positions]


def estimators(model: CovarianceNetwork, *, share: float) -> tuple[Estimator | Refinement, ...]:
    """Return every estimator: from scratch, from the network, from sample covariances, from the truth.

    Each key occurs once, and what a refinement starts from stands before it.

    Args:
        model: in evaluation mode, on the device of the scenes.
        share: of the fitted covariance in the blend, in [0, 1).
    """
    return (*_from_snapshots(), *_from_network(model, share), *_from_covariances())


def _from_snapshots() -> tuple[Estimator, ...]:
    return (
        Estimator(
            key="ml_scratch",
            title="ML from scratch",
            slow=True,
            counted_by="bic",
            locate=lambda physics, scenes, count: (
                maximum_likelihood(physics, scenes, count, grid=SEARCH_GRID).positions
            ),
        ),
        Estimator(
            key="ml_scratch_published_grid",
            title="ML, published grid",
            slow=True,
            counted_by=None,
            locate=lambda physics, scenes, count: (
                maximum_likelihood(physics, scenes, count, grid=PUBLISHED_GRID).positions
            ),
        ),
    )


def _from_network(model: CovarianceNetwork, share: float) -> tuple[Estimator | Refinement, ...]:
    return (
        Estimator(
            key="network_alone_music",
            title="network alone + MUSIC",
            counted_by="head",
            locate=lambda physics, scenes, count: network_positions(model, physics, scenes, count),
        ),
        Refinement(
            key="ml_network",
            title="network-started ML",
            start="network_alone_music",
            counted_by="head",
            refine=lambda physics, scenes, start: refine(physics, scenes, start).positions,
        ),
        Estimator(
            key="network_music",
            title="network + MUSIC (hybrid)",
            counted_by="head",
            locate=lambda physics, scenes, count: hybrid_positions(model, physics, scenes, count),
        ),
        Estimator(
            key="blend_music",
            title="MUSIC, blend",
            counted_by=None,
            locate=lambda physics, scenes, count: music(
                physics, blended_covariance(model, physics, scenes, share=share), count
            ),
        ),
    )


def _without_network(physics: ScenePhysics, scenes: Scenes, num_sources: Tensor) -> Positions:
    """The hybrid without the network's proposals: what is left of it says what the network adds."""
    sampled = sampled_positions(physics, scenes, num_sources)
    return music(physics, locally_fitted_factor(physics, scenes, sampled), num_sources)


def _from_covariances() -> tuple[Estimator, ...]:
    return (
        Estimator(
            key="fitted_music",
            title="MUSIC, fitted covariance",
            counted_by="mdl",
            locate=lambda physics, scenes, count: music(
                physics, fitted_factor(physics, scenes), count
            ),
        ),
        Estimator(
            key="field_music",
            title="MUSIC, field estimate",
            counted_by="mdl",
            locate=lambda physics, scenes, count: music(physics, scenes.estimate, count),
        ),
        Estimator(
            key="refitted_music",
            title="hybrid without the network",
            counted_by=None,
            locate=_without_network,
        ),
        Estimator(
            key="true_music",
            title="MUSIC, true covariance",
            counted_by=None,
            locate=lambda physics, scenes, count: music(physics, scenes.true_factor, count),
        ),
    )
