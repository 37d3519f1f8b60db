"""``epochs.jsonl`` of a run directory: one line for every finished epoch, and no epoch twice."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reference_trainer.errors import RecordingError
from reference_trainer.evaluation import Evaluation
from reference_trainer.results import EpochResult

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from reference_trainer.config import Config
    from reference_trainer.training_state import TrainingState

EPOCHS_NAME = "epochs.jsonl"


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


def append_epoch(directory: Path, result: EpochResult) -> None:
    """Append the line of one epoch.

    Raises:
        RecordingError: the line could not be written; those before it are safe.
    """
    path = directory / EPOCHS_NAME
    try:
        with path.open("a", encoding="ascii") as file:
            file.write(_line(result))
    except OSError as error:
        raise RecordingError(
            f"could not record epoch {result.epoch} in {path} ({error.strerror or error}); the "
            "epochs before it are safe. Free some space or choose another --run-dir"
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
