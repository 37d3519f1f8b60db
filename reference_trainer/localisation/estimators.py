"""The estimators that are compared: each turns scenes and a number of sources into positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reference_trainer.likelihood import SEARCH_GRID
from reference_trainer.localisation.hybrid import (
    blended_covariance,
    fitted_around,
    proposing_factors,
    sampled_factors,
    seen_by,
    starting_factors,
)
from reference_trainer.localisation.most_likely import most_likely_from, most_likely_of_all
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

    Answer = Callable[[slice | Tensor, Tensor], Positions]
    Factor = Callable[[ScenePhysics, Scenes], Tensor]
    Factors = Callable[[ScenePhysics, Scenes], tuple[Tensor, ...]]

PUBLISHED_GRID = GridShape(azimuths=49, elevations=25, ranges=14)
"""The grid of the search that the published figures of maximum likelihood come from."""


class Look(Protocol):
    """Looks at scenes once, and then says where their sources stand for any number of them."""

    def __call__(self, physics: ScenePhysics, scenes: Scenes, /) -> Answer:
        """Return what gives the positions in some of ``scenes`` (their index) for numbers of sources.

        The numbers are int64, one for each of these scenes, from 1.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One estimator.

    Attributes:
        key: its name in reports.
        title: its name for readers.
        slow: whether it only runs on a subset of the scenes.
        counted_by: what tells it the number of sources where that is not known; None where it is
            only run with the true number.
        look: the estimator, from the raw scenes on; all that the number of sources does not change is
            done in the look.
    """

    key: str
    title: str
    slow: bool = False
    counted_by: CounterKey | None
    look: Look

    def locate(self, physics: ScenePhysics, scenes: Scenes, num_sources: Tensor) -> Positions:
        """Return where the ``num_sources`` of each scene stand, int64 ``[B]``, from 1."""
        return self.look(physics, scenes)(slice(None), num_sources)


def estimators(model: CovarianceNetwork, *, share: float) -> tuple[Estimator, ...]:
    """Return every estimator: from scratch, from the network, from sample covariances, from the truth.

    Each key occurs once.

    Args:
        model: in evaluation mode, on the device of the scenes.
        share: of the fitted covariance in the blend, in [0, 1).
    """
    return (*_from_snapshots(), *_from_network(model, share), *_from_covariances())


def _peaks_of(factor: Factor) -> Look:
    """MUSIC on one covariance."""

    def look(physics: ScenePhysics, scenes: Scenes) -> Answer:
        whole = factor(physics, scenes)
        return lambda rows, count: music(physics, whole[rows], count)

    return look


def _peaks_around(factors: Factors) -> Look:
    """MUSIC on the covariance fitted around the peaks of others: the hybrid."""

    def look(physics: ScenePhysics, scenes: Scenes) -> Answer:
        whole = factors(physics, scenes)

        def answer(rows: slice | Tensor, count: Tensor) -> Positions:
            proposing = [factor[rows] for factor in whole]
            local = fitted_around(physics, scenes.select(rows), proposing, count)
            return music(physics, local, count)

        return answer

    return look


def _likely_near(factors: Factors) -> Look:
    """The likelihood, from where MUSIC on each of some covariances finds the sources."""

    def look(physics: ScenePhysics, scenes: Scenes) -> Answer:
        whole = factors(physics, scenes)

        def answer(rows: slice | Tensor, count: Tensor) -> Positions:
            starts = [music(physics, factor[rows], count) for factor in whole]
            return most_likely_from(physics, scenes.select(rows), *starts)

        return answer

    return look


def _likely_from_scratch(grid: GridShape) -> Look:
    def look(physics: ScenePhysics, scenes: Scenes) -> Answer:
        return lambda rows, count: most_likely_of_all(
            physics, scenes.select(rows), count, grid=grid
        )

    return look


def _from_snapshots() -> tuple[Estimator, ...]:
    return (
        Estimator(
            key="ml_scratch",
            title="ML from scratch",
            slow=True,
            counted_by="bic",
            look=_likely_from_scratch(PUBLISHED_GRID),
        ),
        Estimator(
            key="ml_scratch_coarse",
            title="ML from scratch, coarse grid",
            slow=True,
            counted_by=None,
            look=_likely_from_scratch(SEARCH_GRID),
        ),
    )


def _from_network(model: CovarianceNetwork, share: float) -> tuple[Estimator, ...]:
    return (
        Estimator(
            key="network_alone_music",
            title="network alone + MUSIC",
            counted_by="head",
            look=_peaks_of(lambda _, scenes: seen_by(model, scenes).factor),
        ),
        Estimator(
            key="ml_network",
            title="network-started ML",
            counted_by="head",
            look=_likely_near(lambda _, scenes: starting_factors(model, scenes)),
        ),
        Estimator(
            key="network_music",
            title="network + MUSIC (hybrid)",
            counted_by="head",
            look=_peaks_around(lambda physics, scenes: proposing_factors(model, physics, scenes)),
        ),
        Estimator(
            key="blend_music",
            title="MUSIC, blend",
            counted_by=None,
            look=_peaks_of(
                lambda physics, scenes: blended_covariance(model, physics, scenes, share=share)
            ),
        ),
    )


def _from_covariances() -> tuple[Estimator, ...]:
    return (
        Estimator(
            key="fitted_music",
            title="MUSIC, fitted covariance",
            counted_by="mdl",
            look=_peaks_of(fitted_factor),
        ),
        Estimator(
            key="field_music",
            title="MUSIC, field estimate",
            counted_by="mdl",
            look=_peaks_of(lambda _, scenes: scenes.estimate),
        ),
        Estimator(
            key="ml_field",
            title="the same ML without the network",
            counted_by=None,
            look=_likely_near(lambda _, scenes: (scenes.estimate,)),
        ),
        Estimator(
            key="refitted_music",
            title="hybrid without the network",
            counted_by=None,
            look=_peaks_around(sampled_factors),
        ),
        Estimator(
            key="true_music",
            title="MUSIC, true covariance",
            counted_by=None,
            look=_peaks_of(lambda _, scenes: scenes.true_factor),
        ),
    )
