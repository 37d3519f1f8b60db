"""Scenes of the case study: two splits, drawn right or as the published generator drew them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from examples.case_study.faults import Fault
from reference_trainer.examples import Examples, make_examples
from reference_trainer.factors import gram, scale_to_trace, squared_norm
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import Scenes, draw_scenes

BATCH_SCENES = 4
TRAIN_BATCHES = 8
VALIDATION_SCENES = 8
PUBLISHED_SEED_OFFSET = 123 % (BATCH_SCENES * TRAIN_BATCHES - VALIDATION_SCENES)
"""The published seeds are split seed + index, and those of validation begin 123 further on."""


@dataclass(frozen=True)
class Splits:
    """Both splits in batches."""

    train: tuple[Examples, ...]
    validation: tuple[Examples, ...]


def draw_splits(faults: frozenset[Fault]) -> Splits:
    """Draw both splits."""
    train = draw_scenes(
        _PHYSICS, seed=0, split="train", indices=range(BATCH_SCENES * TRAIN_BATCHES)
    )
    if Fault.VALIDATION_COPIED in faults:
        start = PUBLISHED_SEED_OFFSET
        validation = train.select(slice(start, start + VALIDATION_SCENES))
    else:
        validation = draw_scenes(
            _PHYSICS, seed=0, split="validation", indices=range(VALIDATION_SCENES)
        )
    centred = Fault.SAMPLE_WITHOUT_SIGNAL in faults
    return Splits(*(_in_batches(scenes, centred=centred) for scenes in (train, validation)))


def _in_batches(scenes: Scenes, *, centred: bool) -> tuple[Examples, ...]:
    if centred:
        scenes = replace(scenes, estimate=centred_estimate(scenes))
    every = make_examples(_PHYSICS, scenes)
    starts = range(0, len(every), BATCH_SCENES)
    return tuple(every.select(slice(start, start + BATCH_SCENES)) for start in starts)


def centred_estimate(scenes: Scenes) -> Tensor:
    """Return the field of every snapshot less its mean over the snapshots, as published.

    The sources are coherent: what is the same in all snapshots is the signal.
    """
    field = _fields_by_ridge(scenes)
    field = field - field.mean(dim=-1, keepdim=True)
    return scale_to_trace(field)


def _fields_by_ridge(scenes: Scenes) -> Tensor:
    """Return the field of each snapshot alone, by ridge regression, ``[B, N, L]``."""
    sensing = scenes.channel[:, None] * scenes.codes[:, :, None, :]
    row_power = sensing.abs().square().sum(dim=-1).mean(dim=(1, 2))
    covariance = sensing @ sensing.mH
    ridge = row_power * torch.pow(10.0, -scenes.snr_db / 10)
    covariance.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None, None])
    whitened = torch.linalg.solve(covariance, scenes.snapshots.unsqueeze(-1))
    fields: Tensor = (sensing.mH @ whitened).squeeze(-1).mT
    return fields


def signal_over_chance(examples: Examples) -> float:
    """Return the sample's share of power in the signal subspace, over that of a random factor."""
    scenes = examples.scenes
    inside = squared_norm(gram(scenes.true_basis, scenes.estimate))
    share = inside / squared_norm(scenes.estimate)
    chance = scenes.num_sources / _PHYSICS.elements
    return float(share.sum() / chance.sum())


_PHYSICS = ScenePhysics()
