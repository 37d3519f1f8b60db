"""The one loss of a run: training and evaluation call the same function on the same scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference_trainer.loss import LossTerms, LossWeights, loss_terms, weighted_sum

if TYPE_CHECKING:
    from torch import nn

    from reference_trainer.examples import Examples
    from reference_trainer.model import Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveValue:
    """What the objective says about a batch.

    Attributes:
        loss: weighted sum of the terms, 0-dim float32, a mean over the scenes of the batch.
        terms: the unweighted terms.
        prediction: what the network said.
    """

    loss: Tensor
    terms: LossTerms
    prediction: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Predicts a batch and compares it with the truth.

    Attributes:
        weights: weight of every term.
        sample_blend: share of the sample covariance in the covariance terms.
        autocast: dtype of the network's matrix products under autocast; None computes in float32.
    """

    weights: LossWeights
    sample_blend: float = 0.0
    autocast: torch.dtype | None = None

    def __call__(self, model: nn.Module, examples: Examples) -> ObjectiveValue:
        """Return the loss of ``model`` on ``examples``; the mode of the model is left as it is.

        Sync: on CUDA the eigenvalue routines wait for the device.
        """
        device = examples.scenes.snr_db.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            prediction: Prediction = model(examples.observed)
        terms = loss_terms(prediction, examples, blend=self.sample_blend)
        loss = weighted_sum(terms, self.weights)
        return ObjectiveValue(loss=loss, terms=terms, prediction=prediction)
