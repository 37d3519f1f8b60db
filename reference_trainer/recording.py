"""What a run leaves in its directory besides the guard's records: evaluations and checkpoints."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

from reference_trainer.checkpoint import Checkpoint, save_checkpoint
from reference_trainer.errors import RecordingError
from reference_trainer.settings import as_mapping

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from reference_trainer.config import Config
    from reference_trainer.evaluation import Evaluation
    from reference_trainer.results import EpochResult

EPOCHS_NAME = "epochs.jsonl"
CHECKPOINT_NAME = "checkpoint.pt"


def record_epoch(directory: Path, config: Config, model: nn.Module, result: EpochResult) -> None:
    """Append one epoch to ``epochs.jsonl``; where a checkpoint is due, save ``model`` after it.

    Args:
        directory: the run directory.
        config: the configuration of the run.
        model: the weights that ``result`` evaluates.
        result: the epoch.

    Raises:
        RecordingError: the line could not be written; those before it are safe.
        CheckpointError: the checkpoint could not be written; the one before it is safe.
    """
    _append_line(directory / EPOCHS_NAME, result)
    due = result.epoch % config.runtime.checkpoint_every == 0 or result.epoch == result.epochs
    if due and result.epoch and result.held_out is not None:
        checkpoint = Checkpoint(
            config=as_mapping(config),
            weights=model.state_dict(),
            epoch=result.epoch,
            steps_taken=result.steps_taken,
            validation_loss=result.held_out.loss,
        )
        save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)


def _append_line(path: Path, result: EpochResult) -> None:
    content = {
        "epoch": result.epoch,
        "steps_taken": result.steps_taken,
        "training_loss": _plain(result.training_loss),
        "memorised": _readings(result.memorised),
        "held_out": _readings(result.held_out),
    }
    try:
        with path.open("a", encoding="ascii") as file:
            file.write(json.dumps(content, allow_nan=False) + "\n")
    except OSError as error:
        raise RecordingError(
            f"could not record epoch {result.epoch} in {path} ({error.strerror or error}); the "
            "epochs before it are safe. Free some space or choose another --run-dir"
        ) from error


def _readings(evaluation: Evaluation | None) -> dict[str, float | str | None] | None:
    if evaluation is None:
        return None
    accuracy = evaluation.source_count_accuracy
    values = {"loss": evaluation.loss, "source_count_accuracy": accuracy, **evaluation.terms}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: float | None) -> float | str | None:
    """Strict JSON knows no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else str(value)
