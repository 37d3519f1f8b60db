"""What changes from epoch to epoch besides the learning rate, and when training stops early.

Every schedule is a pure function of the progress of a run: 0 in its first epoch, 1 in its last. It
depends on the epoch alone, so that a resumed run needs no memory of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from reference_trainer.covariance import BlendSchedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reference_trainer.config import Config, SchedulesConfig
    from reference_trainer.loss import LossWeights
    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.results import EpochResult
    from reference_trainer.setup import Parts

STRUCTURE_TERMS = ("eigengap", "alignment", "contrast", "cross_gram")
"""The loss terms that shape a covariance rather than fit it."""

FINAL_PART = 0.8
"""Progress from which the structure terms have their final weight."""


def progress(epoch: int, epochs: int) -> float:
    """Return how far a run of ``epochs`` is in epoch number ``epoch``: from 0 to 1."""
    return min(1.0, max(0, epoch - 1) / max(1, epochs - 1))


def dropout_at(done: float, *, initial: float, final_share: float) -> float:
    """Return the probability of dropout, falling linearly from ``initial`` to a share of it."""
    return initial * (1.0 + (final_share - 1.0) * done)


def temperature_at(done: float, *, start: float, end: float, fraction: float) -> float:
    """Return the softmax temperature of the grid head: half a cosine from ``start`` to ``end``.

    Args:
        done: progress of the run, 0 to 1.
        start: temperature at first.
        end: temperature from ``fraction`` on.
        fraction: progress at which the temperature has arrived.
    """
    if done >= fraction:
        return end
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * done / fraction))


def structure_factor(done: float, *, start: float, rise: float, final: float) -> float:
    """Return the factor on the weights of the structure terms.

    Args:
        done: progress of the run, 0 to 1.
        start: factor at first; from there it rises linearly to 1.
        rise: progress at which it has arrived.
        final: factor in the last fifth of the run.
    """
    if done >= FINAL_PART:
        return final
    return 1.0 if done >= rise else start + (1.0 - start) * done / rise


def weights_at(done: float, weights: LossWeights, config: SchedulesConfig) -> LossWeights:
    """Return the loss weights of training at this progress; ``weights`` themselves if all is 1."""
    factor = structure_factor(
        done,
        start=config.structure_start,
        rise=config.structure_rise,
        final=config.structure_final,
    )
    return replace(weights, **{name: factor * getattr(weights, name) for name in STRUCTURE_TERMS})


def blend_at(epoch: int, config: Config) -> float:
    """Return the share of the sample covariance in the loss of epoch number ``epoch``, from 1."""
    schedules, share = config.schedules, config.optimization.sample_blend
    if not schedules.blend_rise and not schedules.blend_jitter:
        return share
    schedule = BlendSchedule(
        epochs=config.optimization.epochs,
        share=share,
        jitter=schedules.blend_jitter,
        rise_fraction=schedules.blend_rise,
        seed=config.network.seed,
    )
    return schedule.at(max(0, epoch - 1))


def at_epoch(parts: Parts, config: Config, epoch: int) -> Parts:
    """Return the parts as epoch number ``epoch`` trains with them.

    Dropout and temperature are set in the live network and in the averaged one. The loss of training
    gets its weights and its blend in the copy returned; evaluations keep the final ones, and with them
    one scale.
    """
    done = progress(epoch, config.optimization.epochs)
    for network in (parts.model, parts.averaged.module):
        set_epoch(network, config, epoch)
    objective = replace(
        parts.objective,
        weights=weights_at(done, config.loss, config.schedules),
        sample_blend=blend_at(epoch, config),
    )
    return replace(parts, objective=objective)


def set_epoch(network: CovarianceNetwork, config: Config, epoch: int) -> None:
    """Set dropout and grid temperature of a network to those of epoch number ``epoch``."""
    done, schedules = progress(epoch, config.optimization.epochs), config.schedules
    set_dropout(
        network,
        dropout_at(done, initial=config.network.dropout, final_share=schedules.dropout_final_share),
    )
    network.grid.temperature = temperature_at(
        done,
        start=schedules.temperature_start,
        end=schedules.temperature_end,
        fraction=schedules.temperature_fraction,
    )


def set_dropout(network: nn.Module, probability: float) -> None:
    """Set the probability of every dropout; attention keeps its own, outside of any layer."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = probability


def stops_early(epochs: Sequence[EpochResult], *, patience: int) -> bool:
    """Return whether the held-out set has not become better for ``patience`` epochs.

    Better is a smaller covariance NMSE of the prediction alone, in which no loss weight and no blend
    takes part: a weight that is searched or ramped cannot stop a run.

    Args:
        epochs: those that are over, in order; the ones that were not evaluated do not count.
        patience: epochs without a better one; 0 never stops.
    """
    evaluated = [one for one in epochs if one.held_out is not None]
    best = best_epoch(evaluated)
    if not patience or best is None:
        return False
    return evaluated[-1].epoch - best.epoch >= patience


def best_epoch(epochs: Sequence[EpochResult]) -> EpochResult | None:
    """Return the first epoch with the smallest held-out covariance NMSE; NaN is never smallest."""
    seen = [
        (one.held_out.covariance_nmse, number)
        for number, one in enumerate(epochs)
        if one.held_out is not None and not math.isnan(one.held_out.covariance_nmse)
    ]
    return epochs[min(seen)[1]] if seen else None
