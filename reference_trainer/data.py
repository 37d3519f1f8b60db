"""The sets of a run, the proof that they share no scene, and the order of the batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from reference_trainer.errors import DataError
from reference_trainer.examples import Examples, make_examples
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import Scenes, draw_scenes, fingerprint
from reference_trainer.stored_scenes import open_scenes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from reference_trainer.config import ScenesConfig


EASY_SNR_DB = 15.0
"""Lowest signal-to-noise ratio with which a curriculum begins."""


class TrainingScenes(Protocol):
    """What batches are taken from; :class:`Examples` is one."""

    def __len__(self) -> int:
        """Return the scenes of one epoch."""

    def select(self, index: Tensor) -> Examples:
        """Return the scenes with these numbers [n], on the device of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshScenes:
    """Training scenes that are drawn when they are asked for, under numbers that never come again.

    Attributes:
        physics: what they are drawn from.
        seed: of the data set.
        count: scenes of one epoch.
        device: of the run.
        curriculum_epochs: epochs until scenes are as hard as ``physics`` has them.
    """

    physics: ScenePhysics
    seed: int
    count: int
    device: torch.device
    curriculum_epochs: int = 0

    def __len__(self) -> int:
        return self.count

    def select(self, index: Tensor) -> Examples:
        """Draw the training scenes with these numbers [n], all of one epoch."""
        numbers = index.tolist()
        physics = eased(self.physics, numbers[0] // self.count, self.curriculum_epochs)
        scenes = draw_scenes(physics, seed=self.seed, split="train", indices=numbers)
        return make_examples(physics, scenes).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScenes:
    """Training scenes on the disk, of which a batch is read when it is asked for.

    Attributes:
        physics: what they were drawn from.
        scenes: all of them; their tensors are files mapped into memory.
        device: of the run.
    """

    physics: ScenePhysics
    scenes: Scenes
    device: torch.device

    def __len__(self) -> int:
        return len(self.scenes)

    def select(self, index: Tensor) -> Examples:
        """Read the scenes with these numbers [n]."""
        return make_examples(self.physics, self.scenes.select(index)).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSets:
    """What is trained on, and what is not: sets that share no scene.

    Attributes:
        training: what the batches are taken from.
        memorised: training scenes to evaluate on: all of them where they are in memory, else the
            first ones, as many as are held out, as hard as a curriculum has them at its end.
        held_out: scenes that are never trained on.
    """

    training: TrainingScenes
    memorised: Examples
    held_out: Examples


def scene_physics(config: ScenesConfig) -> ScenePhysics:
    """Return what held-out scenes are drawn from."""
    return ScenePhysics(symbols=config.symbols, min_range_m=config.min_range_m)


def training_physics(config: ScenesConfig) -> ScenePhysics:
    """Return what training scenes are drawn from: the same, and what makes them more varied."""
    return replace(
        scene_physics(config),
        element_jitter=config.element_jitter,
        code_bits_drop=config.code_bits_drop,
    )


def eased(physics: ScenePhysics, epochs_done: int, curriculum_epochs: int) -> ScenePhysics:
    """Return ``physics`` with the fewer sources and the less noise of a curriculum.

    The largest number of sources rises from 1, and the lowest signal-to-noise ratio falls from 15 dB,
    to those of ``physics`` after ``curriculum_epochs``.
    """
    left = max(0.0, 1.0 - epochs_done / curriculum_epochs) if curriculum_epochs else 0.0
    if not left:
        return physics
    fewer = math.floor(left * (physics.drawn_sources - 1))
    higher_db = left * max(0.0, EASY_SNR_DB - physics.min_snr_db)
    return replace(
        physics,
        most_sources=physics.drawn_sources - fewer,
        min_snr_db=physics.min_snr_db + higher_db,
    )


def draw_data(config: ScenesConfig, *, device: torch.device) -> DataSets:
    """Draw or open the sets of a run.

    Raises:
        DataError: the sets share a scene, or the scenes on the disk are not those of the run.
    """
    physics, nominal = training_physics(config), scene_physics(config)
    held_out = draw_scenes(
        nominal, seed=config.seed, split="validation", indices=range(config.validation)
    )
    training: TrainingScenes | None = None
    if config.source == "disk":
        stored = open_scenes(
            Path(config.directory), physics, seed=config.seed, split="train", count=config.train
        )
        require_disjoint(stored, held_out)
        training = StoredScenes(physics=physics, scenes=stored, device=device)
        memorised = stored.select(slice(0, config.validation))
    else:
        fresh = config.source == "fly"
        count = min(config.train, config.validation) if fresh else config.train
        memorised = draw_scenes(physics, seed=config.seed, split="train", indices=range(count))
        require_disjoint(memorised, held_out)
        if fresh:
            training = FreshScenes(
                physics=physics,
                seed=config.seed,
                count=config.train,
                device=device,
                curriculum_epochs=config.curriculum_epochs,
            )
    seen = make_examples(physics, memorised).to(device)
    return DataSets(
        training=training or seen,
        memorised=seen,
        held_out=make_examples(nominal, held_out).to(device),
    )


def first_number(scenes: TrainingScenes, epoch: int) -> int:
    """Return the number of the first scene of an epoch, from 1: 0, unless every epoch has its own."""
    return (epoch - 1) * len(scenes) if isinstance(scenes, FreshScenes) else 0


def require_disjoint(memorised: Scenes, held_out: Scenes) -> None:
    """Compare fingerprints of every scene of both sets.

    Raises:
        DataError: a scene is in both; what is called held out would be remembered.
    """
    shared = set(fingerprint(memorised)) & set(fingerprint(held_out))
    if shared:
        raise DataError(
            f"{len(shared)} of the {len(held_out)} held-out scenes are training scenes as well; "
            "draw the two sets from different splits"
        )


def batches(
    count: int, *, batch_scenes: int, seed: int, epoch: int, first: int = 0
) -> Iterator[Tensor]:
    """Yield the scenes of one epoch as index tensors [n]: every scene once, in a random order.

    The order depends on the seed and the epoch alone, not on what was drawn before. Only the last
    batch may be short.

    Args:
        count: scenes of the epoch.
        batch_scenes: scenes of a batch.
        seed: seed of the run.
        epoch: number of the epoch.
        first: number of the first scene of the epoch.
    """
    order = first + np.random.default_rng((seed, epoch)).permutation(count)
    yield from torch.split(torch.from_numpy(order), batch_scenes)


def windows(drawn: Iterable[Tensor], accumulation: int) -> Iterator[list[Tensor]]:
    """Group batches into the windows of one optimizer step each; only the last may be short."""
    window: list[Tensor] = []
    for batch in drawn:
        window.append(batch)
        if len(window) == accumulation:
            yield window
            window = []
    if window:
        yield window
