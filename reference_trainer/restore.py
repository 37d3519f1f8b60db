"""Brings a saved network back and judges it again, and finds what a killed run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradguard as gg
from reference_trainer.annealing import set_epoch
from reference_trainer.checkpoint import Checkpoint, load_checkpoint, load_weights
from reference_trainer.data import draw_data
from reference_trainer.evaluation import evaluate
from reference_trainer.recording import STATE_NAME
from reference_trainer.results import EpochResult
from reference_trainer.settings import from_mapping
from reference_trainer.setup import assemble, new_network, pick_device
from reference_trainer.training_state import Position, TrainingState, load_state

if TYPE_CHECKING:
    from pathlib import Path

    from reference_trainer.config import Config
    from reference_trainer.model import CovarianceNetwork


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRun:
    """What is left of a run.

    Attributes:
        config: the whole configuration of the run.
        state: what it goes on from; None when it was killed before the first state was saved, and
            begins again.
    """

    config: Config
    state: TrainingState | None

    @property
    def position(self) -> Position:
        """How far the run has come."""
        return Position() if self.state is None else self.state.position


def find_run(directory: Path) -> SavedRun:
    """Return what the run in ``directory`` can go on from.

    Raises:
        gradguard.RunDirectoryError: there is no run.
        CheckpointError: its state is torn, foreign or of another version.
        ConfigError: its configuration does not fit this version.
    """
    path = directory / STATE_NAME
    if path.exists():
        state = load_state(path)
        return SavedRun(config=from_mapping(state.config), state=state)
    return SavedRun(config=from_mapping(gg.read_run(directory).meta.config), state=None)


def restored_network(checkpoint: Checkpoint) -> CovarianceNetwork:
    """Return the network of a checkpoint, in evaluation mode on the CPU, with its temperature.

    Raises:
        CheckpointError: the checkpoint holds another network.
        ConfigError: its configuration does not fit this version.
    """
    config = from_mapping(checkpoint.config)
    network = new_network(config)
    load_weights(network, checkpoint)
    set_epoch(network, config, checkpoint.epoch)
    return network.eval()


def evaluate_checkpoint(path: Path) -> EpochResult:
    """Evaluate a checkpoint on the scenes of its own run, drawn anew; its training loss is None.

    Raises:
        CheckpointError: the file is missing, torn, foreign or holds another network.
        ConfigError: its configuration does not fit this version or this machine.
    """
    checkpoint = load_checkpoint(path)
    config = from_mapping(checkpoint.config)
    device = pick_device(config.runtime.device)
    parts = assemble(config, device)
    load_weights(parts.model, checkpoint)
    set_epoch(parts.model, config, checkpoint.epoch)
    data = draw_data(config.scenes, device=device)
    memorised, held_out = (
        evaluate(
            parts.model, examples, parts.objective, batch_scenes=config.optimization.batch_scenes
        )
        for examples in (data.memorised, data.held_out)
    )
    return EpochResult(
        epoch=checkpoint.epoch,
        epochs=config.optimization.epochs,
        steps_taken=checkpoint.steps_taken,
        training_loss=None,
        memorised=memorised,
        held_out=held_out,
    )
