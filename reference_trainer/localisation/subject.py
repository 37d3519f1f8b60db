"""What is judged and on what: a saved network, and scenes that it was not trained on."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reference_trainer.bound import cramer_rao_bound, sent_symbols
from reference_trainer.checkpoint import load_checkpoint
from reference_trainer.data import scene_physics, training_physics
from reference_trainer.errors import CheckpointError, DataError
from reference_trainer.localisation.report import Disjointness, Origin
from reference_trainer.recording import BEST_NAME, CHECKPOINT_NAME
from reference_trainer.restore import restored_network
from reference_trainer.scenes import draw_scenes, fingerprint
from reference_trainer.settings import from_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from reference_trainer.config import Config
    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes, Split

_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A network to be judged.

    Attributes:
        network: in evaluation mode, with its temperature.
        config: of its run.
        physics: what scenes to judge it on are drawn from.
        origin: which network it is.
    """

    network: CovarianceNetwork
    config: Config
    physics: ScenePhysics
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeldOut:
    """Scenes to judge a network on.

    Attributes:
        scenes: with their field estimates.
        bound: Cramer-Rao bound of every source, float64 ``[B, K, 3]``: azimuth (rad), elevation
            (rad), range (m).
        disjoint: why none of them was trained on.
    """

    scenes: Scenes
    bound: Tensor
    disjoint: Disjointness


def checkpoint_in(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: in a run directory the best one, or the last.

    Raises:
        CheckpointError: a directory without a checkpoint.
    """
    if not path.is_dir():
        return path
    for name in (BEST_NAME, CHECKPOINT_NAME):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path} holds no {CHECKPOINT_NAME}; name the directory of a run that wrote one, or a "
        "checkpoint"
    )


def load_subject(path: Path, *, device: torch.device) -> Subject:
    """Load the network in a checkpoint or run directory.

    Raises:
        CheckpointError: there is none, or it is torn, foreign or of another version.
        ConfigError: its configuration does not fit this version.
    """
    path = checkpoint_in(path)
    checkpoint = load_checkpoint(path)
    config = from_mapping(checkpoint.config)
    loss = checkpoint.validation_loss
    return Subject(
        network=restored_network(checkpoint).to(device),
        config=config,
        physics=scene_physics(config.scenes),
        origin=Origin(
            config=dict(checkpoint.config),
            checkpoint=path.name,
            weights=_weights_hash(checkpoint.weights),
            epoch=checkpoint.epoch,
            steps_taken=checkpoint.steps_taken,
            validation_loss=loss if math.isfinite(loss) else None,
        ),
    )


def _weights_hash(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        content = weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def draw_held_out(
    subject: Subject,
    *,
    seed: int,
    split: Split,
    count: int,
    told: Callable[[int, int], None] = lambda _, __: None,
) -> HeldOut:
    """Draw scenes for ``subject`` and prove that it was not trained on one of them.

    Args:
        subject: what they are for.
        seed: of the scenes.
        split: of the scenes.
        count: number of scenes.
        told: hears how many training scenes of how many have been compared.

    Raises:
        DataError: a scene was trained on.
    """
    numbers = range(count)
    scenes = draw_scenes(subject.physics, seed=seed, split=split, indices=numbers)
    disjoint = _disjointness(subject, scenes, seed, split, told)
    symbols = sent_symbols(subject.physics, scenes, seed=seed, split=split, indices=numbers)
    bound = cramer_rao_bound(subject.physics, scenes, symbols)
    parts = (bound.azimuth_rad, bound.elevation_rad, bound.range_m)
    return HeldOut(scenes=scenes, bound=torch.stack(parts, dim=-1), disjoint=disjoint)


def _disjointness(
    subject: Subject,
    scenes: Scenes,
    seed: int,
    split: Split,
    told: Callable[[int, int], None],
) -> Disjointness:
    trained, tested = subject.config.scenes, set(fingerprint(scenes))
    watched = len(tested & _watched(subject))
    if trained.source == "fly":
        if split == "train":
            raise DataError(
                "judging a network that trained on ever fresh scenes on split 'train': they may be "
                "the same; use 'validation' or 'test'"
            )
        reason = (
            f"training drew fresh scenes from the streams of split 'train', seed {trained.seed}; these "
            f"are of split '{split}', seed {seed}, whose random streams are others"
        )
        return Disjointness(method="streams", compared=0, reason=reason, watched=watched)
    for done, chunk in _training_fingerprints(subject):
        shared = tested & chunk
        if shared:
            raise DataError(
                f"at least {len(shared)} of the {len(scenes)} scenes to judge on were trained on; use "
                "another split or seed"
            )
        told(done, trained.train)
    reason = f"the sources of all {trained.train} training scenes stand elsewhere (fingerprints compared)"
    return Disjointness(
        method="fingerprints", compared=trained.train, reason=reason, watched=watched
    )


def _training_fingerprints(subject: Subject) -> Iterator[tuple[int, set[str]]]:
    """Yield the fingerprints of the training scenes chunk by chunk, and how many there were so far.

    Scenes on the disk are the same function of seed and number, and were compared when opened.
    """
    config, physics = subject.config.scenes, training_physics(subject.config.scenes)
    for start in range(0, config.train, _CHUNK):
        numbers = range(start, min(start + _CHUNK, config.train))
        scenes = draw_scenes(
            physics, seed=config.seed, split="train", indices=numbers, estimate=False
        )
        yield numbers.stop, set(fingerprint(scenes))


def _watched(subject: Subject) -> set[str]:
    """Fingerprints of the scenes on which the run was judged while it went on."""
    config = subject.config.scenes
    held_out = draw_scenes(
        subject.physics,
        seed=config.seed,
        split="validation",
        indices=range(config.validation),
        estimate=False,
    )
    return set(fingerprint(held_out))
