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

import json
import math
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import gradguard as gg
from reference_trainer.checkpoint import Checkpoint, save_checkpoint
from reference_trainer.errors import RecordingError
from reference_trainer.evaluation import Evaluation
from reference_trainer.results import EpochResult
from reference_trainer.settings import as_mapping
from reference_trainer.training_state import Position, TrainingState, capture, save_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from reference_trainer.config import Config
    from reference_trainer.processes import Processes
    from reference_trainer.setup import Parts

EPOCHS_NAME = "epochs.jsonl"
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
    _append_line(directory / EPOCHS_NAME, result)
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


def earlier_epochs(
    directory: Path, state: TrainingState | None, config: Config
) -> tuple[EpochResult, ...]:
    """Return the recorded epochs that are finished in ``state``, without their findings.

    A last line that was cut short is passed over.

    Raises:
        RecordingError: the lines cannot be read.
    """
    if state is None:
        return ()
    position = state.position
    found = (_result(line, config) for line in _read_lines(directory / EPOCHS_NAME))
    return tuple(
        replace(result, last=position.finished and result.epoch == position.epoch)
        for result in found
        if result.epoch <= position.epoch
    )


def rewrite_epochs(directory: Path, epochs: tuple[EpochResult, ...]) -> None:
    """Leave in ``epochs.jsonl`` just these epochs: later ones are about to be repeated.

    Raises:
        RecordingError: the file could not be written; it is as it was.
    """
    path = directory / EPOCHS_NAME
    draft = path.with_name(f".{path.name}.partial")
    try:
        draft.write_text("".join(_line(result) for result in epochs), encoding="ascii")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RecordingError(
            f"could not rewrite {path} ({error.strerror or error}); it is unchanged. Free some "
            "space and resume again"
        ) from error


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise RecordingError(f"could not read the epochs of the run from {path}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RecordingError(f"line {number} of {path} is no JSON: {error}") from None


def _append_line(path: Path, result: EpochResult) -> None:
    try:
        with path.open("a", encoding="ascii") as file:
            file.write(_line(result))
    except OSError as error:
        raise RecordingError(
            f"could not record epoch {result.epoch} in {path} ({error.strerror or error}); the "
            "epochs before it are safe. Free some space or choose another --run-dir"
        ) from error


def _line(result: EpochResult) -> str:
    content = {
        "epoch": result.epoch,
        "steps_taken": result.steps_taken,
        "training_loss": _plain(result.training_loss),
        "memorised": _readings(result.memorised),
        "held_out": _readings(result.held_out),
    }
    return json.dumps(content, allow_nan=False) + "\n"


def _result(line: dict[str, Any], config: Config) -> EpochResult:
    return EpochResult(
        epoch=line["epoch"],
        epochs=config.optimization.epochs,
        steps_taken=line["steps_taken"],
        training_loss=None if line["training_loss"] is None else float(line["training_loss"]),
        memorised=_evaluation(line["memorised"]),
        held_out=_evaluation(line["held_out"]),
    )


def _readings(evaluation: Evaluation | None) -> dict[str, float | str | None] | None:
    if evaluation is None:
        return None
    accuracy = evaluation.source_count_accuracy
    values = {"loss": evaluation.loss, "source_count_accuracy": accuracy, **evaluation.terms}
    return {name: _plain(value) for name, value in values.items()}


def _evaluation(readings: dict[str, Any] | None) -> Evaluation | None:
    if readings is None:
        return None
    terms = {name: float(value) for name, value in readings.items()}
    loss, accuracy = terms.pop("loss"), terms.pop("source_count_accuracy")
    return Evaluation(loss=loss, terms=terms, source_count_accuracy=accuracy)


def _plain(value: float | None) -> float | str | None:
    """Strict JSON knows no NaN and no infinity."""
    return value if value is None or math.isfinite(value) else str(value)
