"""What a trained network contributes: a covariance, a count, starts, and the hybrid of covariances.

Two covariances are made of the network's and of those sampled from the snapshots. The *blend* is their
weighted sum, as published. The *hybrid* is fitted to the snapshots again, on a fine dictionary around the
places where each of them has a peak: the network proposes and the snapshots decide, so that a wrong
proposal costs little, where a blend spoils the subspace of the better covariance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.covariance import hybrid_factor
from reference_trainer.examples import network_input
from reference_trainer.factors import joint_factor
from reference_trainer.local_fit import locally_fitted_factor
from reference_trainer.music import music
from reference_trainer.sample_covariance import fitted_factor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

SAMPLE_SHARE = 0.30
"""Share of the fitted covariance in the blend: where the schedule of the published model ends."""

START_SHARE = 0.5
"""Share of the field estimate in the blend that starts the likelihood."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What a network says about B scenes.

    Attributes:
        factor: of the predicted covariance, complex64 ``[B, N, 10]``, of trace N.
        num_sources: the most likely number of sources, int64 ``[B]``, from 1.
    """

    factor: Tensor
    num_sources: Tensor


@torch.no_grad()
def seen_by(model: CovarianceNetwork, scenes: Scenes, *, batch_scenes: int = 64) -> Seen:
    """Return what the network says about ``scenes``, in the mode that it is in.

    Args:
        model: on the device of the scenes; in evaluation mode, or dropout is at work.
        scenes: drawn with their field estimates.
        batch_scenes: scenes of one forward pass.

    Sync: none on CUDA for constant symbols.
    """
    factors, counts = [], []
    for start in range(0, len(scenes), batch_scenes):
        batch = scenes.select(slice(start, start + batch_scenes))
        prediction = model(network_input(batch))
        factors.append(joint_factor(prediction.angle_factor, prediction.range_factor))
        counts.append(prediction.k_logits.argmax(dim=-1) + 1)
    return Seen(factor=torch.cat(factors), num_sources=torch.cat(counts))


def blended_covariance(
    model: CovarianceNetwork, physics: ScenePhysics, scenes: Scenes, *, share: float = SAMPLE_SHARE
) -> Tensor:
    """Return the factor of the blend of both covariances, complex64 ``[B, N, 26]``.

    Args:
        model: as for :func:`seen_by`.
        physics: what the scenes were drawn from.
        scenes: drawn with their field estimates.
        share: of the fitted covariance, in [0, 1).

    Raises:
        ValueError: ``share`` is not in [0, 1).

    Sync: as :func:`reference_trainer.sample_covariance.fitted_factor`.
    """
    predicted = seen_by(model, scenes).factor
    return hybrid_factor(predicted, fitted_factor(physics, scenes), share=share)


def starting_factors(model: CovarianceNetwork, scenes: Scenes) -> tuple[Tensor, ...]:
    """Return the covariances whose MUSIC peaks start the likelihood: the blend, and the field's own.

    The blend is that of the network's covariance with the field estimate, half and half. The two err in
    different places, and the likelihood tells which start was better.

    Args:
        model: as for :func:`seen_by`.
        scenes: drawn with their field estimates.

    Returns:
        factors, complex64 ``[B, N, .]``.

    Sync: as :func:`seen_by`.
    """
    predicted = seen_by(model, scenes).factor
    return hybrid_factor(predicted, scenes.estimate, share=START_SHARE), scenes.estimate


def sampled_factors(physics: ScenePhysics, scenes: Scenes) -> tuple[Tensor, ...]:
    """Return both sample covariances, fitted and of the estimated field, as factors ``[B, N, .]``.

    Sync: as :func:`reference_trainer.sample_covariance.fitted_factor`.
    """
    return fitted_factor(physics, scenes), scenes.estimate


def proposing_factors(
    model: CovarianceNetwork, physics: ScenePhysics, scenes: Scenes
) -> tuple[Tensor, ...]:
    """Return the covariances that the hybrid is fitted around: the network's and both sampled ones.

    Args and Sync: as for :func:`blended_covariance`.
    """
    return seen_by(model, scenes).factor, *sampled_factors(physics, scenes)


def fitted_around(
    physics: ScenePhysics, scenes: Scenes, factors: Sequence[Tensor], num_sources: Tensor
) -> Tensor:
    """Return the factor of the covariance fitted around the MUSIC peaks of others, ``[B, N, 16]``.

    Args:
        physics: what the scenes were drawn from.
        scenes: what was received is read, and what the receiver knows.
        factors: of the covariances that propose, ``[B, N, .]`` each.
        num_sources: peaks of each, int64 ``[B]``, from 0 to ``physics.max_sources``.

    Raises:
        ValueError: a number of sources is out of range.

    Sync: waits for the device often.
    """
    proposals = [music(physics, factor, num_sources) for factor in factors]
    return locally_fitted_factor(physics, scenes, proposals)
