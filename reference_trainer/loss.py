"""The training loss: ten terms and their weighted sum. At the truth every one of them is zero.

Each term is a mean over scenes, so the loss of a batch is the mean over its micro-batches, and
training and validation are on one scale. The terms themselves are pure functions in ``terms.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference_trainer import terms
from reference_trainer.factors import blended_factor, joint_factor

if TYPE_CHECKING:
    from reference_trainer.examples import Examples
    from reference_trainer.model import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The unweighted value of every term: 0-dim float32 tensors, means over the scenes of a batch.

    Attributes:
        covariance: normalised squared error of the (blended) covariance.
        prediction: the same of the prediction alone, so that it cannot hide behind the sample.
        source_count: divergence of the predicted from the smoothed number of sources.
        eigengap: how far the eigenvalue gap after the last source falls short.
        alignment: share of the power outside the span of the true steering vectors.
        contrast: how differently power is spread around each source.
        cross_gram: difference between the column correlations of the angle and range factors.
        aux_angles: rounded absolute error of the auxiliary angles, radians.
        aux_range: rounded absolute error of the log of the auxiliary distance.
        chamfer: squared distance of the grid head's directions from the sources', rad^2.
    """

    covariance: Tensor
    prediction: Tensor
    source_count: Tensor
    eigengap: Tensor
    alignment: Tensor
    contrast: Tensor
    cross_gram: Tensor
    aux_angles: Tensor
    aux_range: Tensor
    chamfer: Tensor

    def as_dict(self) -> dict[str, Tensor]:
        """Return the terms by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """The factor of each term of :class:`LossTerms` in the loss.

    Raises:
        ValueError: a weight is negative, infinite or NaN.
    """

    covariance: float = 1.0
    prediction: float = 0.05
    source_count: float = 0.10
    eigengap: float = 0.065
    alignment: float = 0.05
    contrast: float = 0.10
    cross_gram: float = 2.5e-3
    aux_angles: float = 1.0
    aux_range: float = 1.0
    chamfer: float = 0.05

    def __post_init__(self) -> None:
        for field in fields(self):
            weight = getattr(self, field.name)
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"setting the loss weights: {field.name} is {weight}, expected a finite number "
                    "of at least 0"
                )


def loss_terms(prediction: Prediction, examples: Examples, *, blend: float = 0.0) -> LossTerms:
    """Compare a prediction with the truth, in single precision under autocast.

    Args:
        prediction: of a batch of examples.
        examples: the same examples, on the same device.
        blend: share of the receiver's own estimate in the covariance, eigengap, alignment and
            contrast terms, in [0, 1).

    Raises:
        ValueError: ``blend`` is out of its range.

    Sync: on CUDA the eigenvalue routine waits for the device.
    """
    scenes = examples.scenes
    with torch.autocast(scenes.snr_db.device.type, enabled=False):
        predicted = joint_factor(prediction.angle_factor, prediction.range_factor)
        blended = blended_factor(predicted, scenes.estimate, blend)
        true, active, count = scenes.true_factor, scenes.active, scenes.num_sources
        directions = scenes.azimuth_rad, scenes.elevation_rad, active
        return LossTerms(
            covariance=terms.covariance_error(blended, true, scenes.snr_db).mean(),
            prediction=terms.covariance_error(predicted, true, scenes.snr_db).mean(),
            source_count=terms.source_count_divergence(prediction.k_logits, count).mean(),
            eigengap=terms.eigengap_hinge(blended, true, count).mean(),
            alignment=terms.misaligned_share(blended, scenes.true_basis).mean(),
            contrast=terms.contrast_divergence(blended, true, examples.stencil, active).mean(),
            cross_gram=terms.cross_gram_error(
                prediction.angle_factor, prediction.range_factor
            ).mean(),
            aux_angles=terms.aux_angle_error(
                prediction.aux_azimuth_rad, prediction.aux_elevation_rad, *directions
            ).mean(),
            aux_range=terms.aux_range_error(prediction.aux_range_m, scenes.range_m, active).mean(),
            chamfer=terms.chamfer_error(
                prediction.grid_azimuth_rad, prediction.grid_elevation_rad, *directions
            ).mean(),
        )


def weighted_sum(values: LossTerms, weights: LossWeights) -> Tensor:
    """Return the loss, a 0-dim tensor. A term of weight 0 takes no part, even if it is NaN.

    Raises:
        ValueError: every weight is 0.
    """
    parts = [
        getattr(weights, name) * value
        for name, value in values.as_dict().items()
        if getattr(weights, name)
    ]
    if not parts:
        raise ValueError("summing the loss: every weight is 0; give at least one term a weight")
    return torch.stack(parts).sum()
