"""Which estimate belongs to which source: the best one-to-one matching, scene by scene.

Every true source is matched with one estimate so that the sum of their distances is smallest. A true
source without a partner is *missed*, an estimate without one is *false*; neither is dropped. A
matched pair may be far apart: then it is a large error, and no miss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from reference_trainer.positions import Positions

    Reals = NDArray[np.float64]
    Integers = NDArray[np.int64]

RANGE_WEIGHT_M = 0.3
"""What a difference in inverse range counts beside an angle when sources are matched, in metres.

The two then turn the phases over the published aperture (1.65 m) about equally.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceErrors:
    """Estimate minus truth, one row for each of S true sources of B scenes.

    Attributes:
        scene: int64 ``[S]``, number of the scene the source belongs to.
        matched: bool ``[S]``; where False the errors are NaN: the source was missed.
        azimuth_rad: float64 ``[S]``.
        elevation_rad: float64 ``[S]``.
        range_m: float64 ``[S]``.
        bound: float64 ``[S, 3]``, smallest standard deviation of azimuth (rad), elevation (rad) and
            range (m) that an unbiased estimator can have; NaN where unknown.
        true_count: int64 ``[B]``, sources of each scene.
        estimated_count: int64 ``[B]``, estimates of each scene.
    """

    scene: Integers
    matched: NDArray[np.bool_]
    azimuth_rad: Reals
    elevation_rad: Reals
    range_m: Reals
    bound: Reals
    true_count: Integers
    estimated_count: Integers

    def of_scenes(self, chosen: NDArray[np.bool_]) -> SourceErrors:
        """Return the errors in some of the scenes, bool ``[B]``, which are numbered anew."""
        rows = chosen[self.scene]
        per_source = ("matched", "azimuth_rad", "elevation_rad", "range_m", "bound")
        return SourceErrors(
            scene=(np.cumsum(chosen) - 1)[self.scene[rows]],
            true_count=self.true_count[chosen],
            estimated_count=self.estimated_count[chosen],
            **{name: getattr(self, name)[rows] for name in per_source},
        )


def source_errors(
    estimated: Positions, true: Positions, *, bound: Tensor | None = None
) -> SourceErrors:
    """Return the errors of estimates matched with the truth scene by scene.

    The distance of a pair is the angle between their directions in rad plus
    :data:`RANGE_WEIGHT_M` times the difference of their inverse ranges.

    Args:
        estimated: estimates of B scenes, in any number of slots.
        true: the truth of the same scenes, ``[B, K]``.
        bound: ``[B, K, 3]``, standard deviations of azimuth (rad), elevation (rad) and range (m) in
            the slots of ``true``; what it holds in inactive slots is ignored.

    Raises:
        ValueError: different numbers of scenes, a bound of another shape, or an active estimate
            that is not finite or not at a range above 0.

    Sync: one copy of each tensor to the host.
    """
    if len(estimated) != len(true):
        raise ValueError(
            f"matching sources: got estimates of {len(estimated)} scenes and the truth of "
            f"{len(true)}; expected the same scenes"
        )
    if bound is not None and bound.shape != (*true.active.shape, 3):
        raise ValueError(
            f"matching sources: got a bound of shape {tuple(bound.shape)}; expected "
            f"{(*true.active.shape, 3)}: azimuth, elevation and range of every true slot"
        )
    guesses, truths = _per_scene(estimated), _per_scene(true)
    _require_places(guesses)
    errors = [_errors(guess, truth) for guess, truth in zip(guesses, truths, strict=True)]
    rows = np.concatenate([np.empty((0, 3)), *errors])
    counts = np.array([len(truth) for truth in truths], np.int64)
    known = np.full_like(rows, np.nan)
    if bound is not None:
        known = bound[true.active].detach().double().cpu().numpy()
    return SourceErrors(
        scene=np.repeat(np.arange(len(counts)), counts),
        matched=~np.isnan(rows[:, 0]),
        azimuth_rad=rows[:, 0],
        elevation_rad=rows[:, 1],
        range_m=rows[:, 2],
        bound=known,
        true_count=counts,
        estimated_count=np.array([len(guess) for guess in guesses], np.int64),
    )


def _per_scene(positions: Positions) -> list[Reals]:
    """Azimuth, elevation and range ``[sources, 3]`` of the active slots of every scene."""
    names = ("azimuth_rad", "elevation_rad", "range_m")
    stacked = torch.stack([getattr(positions, name).detach() for name in names], dim=-1)
    places, active = stacked.double().cpu().numpy(), positions.active.cpu().numpy()
    return [place[mask] for place, mask in zip(places, active, strict=True)]


def _require_places(scenes: list[Reals]) -> None:
    wrong = sum(
        bool((~np.isfinite(places)).any() or (places[:, 2] <= 0).any()) for places in scenes
    )
    if wrong:
        raise ValueError(
            f"matching sources: {wrong} scenes have an estimate that is not finite or whose range "
            "is not above 0; expected numbers in every active slot"
        )


def _errors(estimated: Reals, true: Reals) -> Reals:
    """Estimate minus truth ``[true sources, 3]``, rows of missed sources NaN."""
    errors = np.full(true.shape, np.nan)
    rows, columns = linear_sum_assignment(_distances(true, estimated))
    errors[rows] = estimated[columns] - true[rows]
    return errors


def _distances(true: Reals, estimated: Reals) -> Reals:
    one, other = _directions(true), _directions(estimated)
    chord = np.linalg.norm(one[:, None] - other[None], axis=-1)
    angle = 2 * np.arcsin(np.minimum(chord / 2, 1.0))
    depth: Reals = np.abs(1 / true[:, None, 2] - 1 / estimated[None, :, 2])
    distance: Reals = angle + RANGE_WEIGHT_M * depth
    return distance


def _directions(places: Reals) -> Reals:
    azimuth, elevation = places[:, 0], places[:, 1]
    level = np.cos(elevation)
    return np.stack((np.sin(azimuth) * level, np.sin(elevation), np.cos(azimuth) * level), axis=-1)
