"""Batches of scenes and predictions for the tests of the network and of the loss."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import cache

import torch
from torch import Tensor

from reference_trainer.examples import Examples, make_examples
from reference_trainer.model import MAX_SOURCES, Prediction
from reference_trainer.physics import ScenePhysics, SymbolModel
from reference_trainer.scenes import draw_scenes
from reference_trainer.terms import LABEL_SMOOTHING


@cache
def examples(count: int = 8, *, seed: int = 0, symbols: SymbolModel = "constant") -> Examples:
    """Draw a few scenes; the same call gives the same object, so tests must not write to it."""
    physics = ScenePhysics(symbols=symbols)
    scenes = draw_scenes(physics, seed=seed, split="train", indices=range(count))
    return make_examples(physics, scenes)


def true_prediction(batch: Examples) -> Prediction:
    """Return what a perfect network would say."""
    scenes = batch.scenes
    true_class = torch.nn.functional.one_hot(scenes.num_sources - 1, MAX_SOURCES)
    target = (1.0 - LABEL_SMOOTHING) * true_class + LABEL_SMOOTHING / MAX_SOURCES
    return Prediction(
        angle_factor=scenes.true_factor,
        range_factor=scenes.true_factor,
        aux_azimuth_rad=scenes.azimuth_rad,
        aux_elevation_rad=scenes.elevation_rad,
        aux_range_m=scenes.range_m,
        grid_azimuth_rad=scenes.azimuth_rad,
        grid_elevation_rad=scenes.elevation_rad,
        k_logits=target.log() + math.pi,  # a shift of all logits means nothing
    )


def random_prediction(batch: Examples, *, seed: int = 0) -> Prediction:
    """Return a prediction that knows nothing, every tensor a leaf that requires its gradient."""
    generator = torch.Generator().manual_seed(seed)

    def noise_like(true: Tensor) -> Tensor:
        noise = torch.randn(true.shape, generator=generator, dtype=true.dtype)
        return noise if true.is_complex() else noise.abs() + 0.1

    truth = true_prediction(batch)
    drawn = {field.name: noise_like(getattr(truth, field.name)) for field in fields(truth)}
    return replace(truth, **{name: value.requires_grad_() for name, value in drawn.items()})


def complex_noise(*shape: int, seed: int = 0) -> Tensor:
    """Return complex128 noise of unit power."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.complex128)
