"""How good the weights are on a set of scenes, in evaluation mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from reference_trainer.examples import Examples
    from reference_trainer.objective import Objective, ObjectiveValue

_COUNT = "source count accuracy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Means over the scenes of a set.

    Attributes:
        loss: the training objective, without dropout.
        terms: its unweighted terms by name.
        source_count_accuracy: share of the scenes whose number of sources is right.
    """

    loss: float
    terms: Mapping[str, float]
    source_count_accuracy: float

    @property
    def covariance_nmse(self) -> float:
        """Normalised squared error of the predicted covariance."""
        return self.terms["prediction"]


def evaluate(
    model: nn.Module, examples: Examples, objective: Objective, *, batch_scenes: int
) -> Evaluation:
    """Return the mean of the objective over ``examples``; puts the model back into its mode.

    Sync: one copy to the host, at the end.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            means = _means(model, examples, objective, batch_scenes)
    finally:
        model.train(was_training)
    values = dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
    loss, accuracy = values.pop("loss"), values.pop(_COUNT)
    return Evaluation(loss=loss, terms=values, source_count_accuracy=accuracy)


def _means(
    model: nn.Module, examples: Examples, objective: Objective, batch_scenes: int
) -> dict[str, Tensor]:
    """Weigh each batch by its scenes: a short last batch must not count for more than it holds."""
    means: dict[str, Tensor] = {}
    for start in range(0, len(examples), batch_scenes):
        batch = examples.select(slice(start, start + batch_scenes))
        share = len(batch) / len(examples)
        for name, value in _readings(objective(model, batch), batch).items():
            means[name] = means.get(name, value.new_zeros(())) + share * value
    return means


def _readings(value: ObjectiveValue, examples: Examples) -> dict[str, Tensor]:
    right = value.prediction.k_logits.argmax(dim=-1) + 1 == examples.scenes.num_sources
    readings = {"loss": value.loss, _COUNT: right.float().mean(), **value.terms.as_dict()}
    return {name: reading.double() for name, reading in readings.items()}
