"""What a run tells whoever watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from gradguard import StepRecord
    from reference_trainer.config import Config
    from reference_trainer.results import EpochResult, RunStart


class TrainingView(Protocol):
    """Listens to a run; every call returns before the run goes on."""

    def preparing(self, config: Config) -> None:
        """Scenes are about to be drawn and a first pass rehearsed, which takes seconds."""

    def started(self, start: RunStart) -> None:
        """Everything is set up and no step has been taken."""

    def step_ended(self, record: StepRecord) -> None:
        """One optimizer step was attempted; told a few steps late, in order."""

    def epoch_ended(self, result: EpochResult) -> None:
        """An epoch is over; all its steps have been told."""


class SilentView:
    """Takes no notice."""

    def preparing(self, config: Config) -> None:
        """Do nothing."""

    def started(self, start: RunStart) -> None:
        """Do nothing."""

    def step_ended(self, record: StepRecord) -> None:
        """Do nothing."""

    def epoch_ended(self, result: EpochResult) -> None:
        """Do nothing."""
