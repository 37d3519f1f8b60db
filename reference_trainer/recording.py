"""What a run leaves in its directory: the guard's records, evaluations, checkpoints and its state.

    run.json, steps.jsonl   the guard's records of the first process, until the run ended or was killed
    rank1/ ...              those of the other processes
    resumed-1/ ...          those of every later part of the run, as a directory of the same kind
    epochs.jsonl            one line for every finished epoch, of all parts
    checkpoint.pt           the averaged weights that were validated last
    best.pt                 with early stopping, those of the best epoch so far
    state.pt                what the run goes on from

A part that was killed may have recorded steps after the state that the next part went on from. These
were repeated, bit for bit, and stand in both; ``resumed_from`` in a part's ``run.json`` says where it
began. Of ``epochs.jsonl`` the lines after the state are dropped when a run is resumed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import gradguard as gg
from reference_trainer.checkpoint import Checkpoint, save_checkpoint
from reference_trainer.epoch_lines import append_epoch
from reference_trainer.settings import as_mapping
from reference_trainer.training_state import Position, capture, save_state

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from reference_trainer.config import Config
    from reference_trainer.processes import Processes
    from reference_trainer.results import EpochResult
    from reference_trainer.setup import Parts

CHECKPOINT_NAME = "checkpoint.pt"
BEST_NAME = "best.pt"
STATE_NAME = "state.pt"


def new_records(
    directory: Path,
    config: Config,
    processes: Processes,
    *,
    resumed_from: Position | None = None,
) -> gg.RunDirectory:
    """Make the place for the guard's records of this process and this part of the run.

    Args:
        directory: the run directory, new or empty for a new run.
        config: the configuration of the run.
        processes: those of the run; all must call this.
        resumed_from: where this part goes on from; None for a new run.

    Raises:
        gradguard.RunDirectoryError: the directory is in use or cannot be written.
    """
    description = as_mapping(config)
    if resumed_from is not None:
        description["resumed_from"] = asdict(resumed_from)
        parts = sum(1 for _ in directory.glob("resumed-*"))
        directory /= processes.agree(f"resumed-{parts + 1}")
    if processes.leads:
        recorder = gg.RunDirectory.create(directory, config=description)
    processes.agree(None)  # the others wait: the first one wants an empty directory
    if not processes.leads:
        place = directory / f"rank{processes.rank}"
        recorder = gg.RunDirectory.create(place, config=description)
    return recorder


class StateKeeper:
    """Saves the training state every so many attempted steps, and with every checkpoint.

    All processes of a run must make the same calls; the first one writes.

    Args:
        directory: the run directory; None saves nothing.
        parts: what the state is read from.
        gate: likewise.
        config: the configuration of the run.
    """

    def __init__(
        self, directory: Path | None, parts: Parts, gate: gg.StepGate | None, config: Config
    ) -> None:
        self._path = None if directory is None else directory / STATE_NAME
        self._parts, self._gate, self._config = parts, gate, config
        self._unsaved = 0

    def step_ended(self) -> bool:
        """Count one attempted step; return whether the state should be saved now."""
        self._unsaved += 1
        return self._path is not None and self._unsaved >= self._config.runtime.state_every

    def save(self, position: Position) -> None:
        """Save the state at ``position``. Sync: waits for the device.

        Raises:
            CheckpointError: the file could not be written; the state before it is safe.
        """
        if self._path is None:
            return
        self._unsaved = 0
        state = capture(self._parts, self._gate, self._config, position)
        if self._parts.processes.leads:
            save_state(self._path, state)


def record_epoch(
    directory: Path, config: Config, model: nn.Module, result: EpochResult, *, best: bool = False
) -> None:
    """Append one epoch to ``epochs.jsonl``; where a checkpoint is due, save ``model`` after it.

    Args:
        directory: the run directory.
        config: the configuration of the run.
        model: the weights that ``result`` evaluates.
        result: the epoch.
        best: whether these weights are to be kept as the best so far.

    Raises:
        RecordingError: the line could not be written; those before it are safe.
        CheckpointError: the checkpoint could not be written; the one before it is safe.
    """
    append_epoch(directory, result)
    if result.held_out is None:
        return
    checkpoint = Checkpoint(
        config=as_mapping(config),
        weights=model.state_dict(),
        epoch=result.epoch,
        steps_taken=result.steps_taken,
        validation_loss=result.held_out.loss,
    )
    if best:
        save_checkpoint(directory / BEST_NAME, checkpoint)
    if is_checkpoint_due(config, result):
        save_checkpoint(directory / CHECKPOINT_NAME, checkpoint)


def is_checkpoint_due(config: Config, result: EpochResult) -> bool:
    """Whether a checkpoint is saved after this epoch."""
    every = config.runtime.checkpoint_every
    return result.epoch > 0 and (result.epoch % every == 0 or result.last)
