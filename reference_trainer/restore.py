"""Brings a saved network back and judges it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reference_trainer.checkpoint import load_checkpoint, load_weights
from reference_trainer.data import draw_data
from reference_trainer.evaluation import evaluate
from reference_trainer.results import EpochResult
from reference_trainer.settings import from_mapping
from reference_trainer.setup import assemble, pick_device

if TYPE_CHECKING:
    from pathlib import Path


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
