"""The two sets of a run, the proof that they share no scene, and the order of the batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from reference_trainer.errors import DataError
from reference_trainer.examples import Examples, make_examples
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import Scenes, Split, draw_scenes, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from reference_trainer.config import ScenesConfig


class TrainingScenes(Protocol):
    """What batches are taken from; :class:`Examples` is one."""

    def __len__(self) -> int:
        """Return the scenes of one epoch."""

    def select(self, index: Tensor) -> Examples:
        """Return the scenes with these numbers [n], on the device of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSets:
    """What is trained on, and what is not: two sets that share no scene."""

    memorised: Examples
    held_out: Examples

    @property
    def training(self) -> TrainingScenes:
        """What the batches are taken from."""
        return self.memorised


def draw_data(config: ScenesConfig, *, device: torch.device) -> DataSets:
    """Draw both sets.

    Raises:
        DataError: the sets share a scene.
    """
    physics = ScenePhysics(symbols=config.symbols, min_range_m=config.min_range_m)

    def draw(split: Split, count: int) -> Scenes:
        return draw_scenes(physics, seed=config.seed, split=split, indices=range(count))

    memorised, held_out = draw("train", config.train), draw("validation", config.validation)
    require_disjoint(memorised, held_out)
    return DataSets(
        memorised=make_examples(physics, memorised).to(device),
        held_out=make_examples(physics, held_out).to(device),
    )


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


def batches(count: int, *, batch_scenes: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the scenes of one epoch as index tensors [n]: every scene once, in a random order.

    The order depends on the seed and the epoch alone, not on what was drawn before. Only the last
    batch may be short.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count)
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
