"""What a search tells whoever watches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optuna.trial import FrozenTrial

    from reference_trainer.results import EpochResult


class SearchView(Protocol):
    """Listens to a search; every call returns before the search goes on."""

    def trial_started(self, number: int, assignments: Sequence[str]) -> None:
        """A trial begins with these ``key=value`` settings."""

    def epoch_ended(self, number: int, result: EpochResult) -> None:
        """An epoch of trial ``number`` is over."""

    def trial_ended(self, trial: FrozenTrial, ended: int) -> None:
        """A trial has its verdict; ``ended`` trials of the study have one now."""


class SilentSearchView:
    """Takes no notice."""

    def trial_started(self, number: int, assignments: Sequence[str]) -> None:
        """Do nothing."""

    def epoch_ended(self, number: int, result: EpochResult) -> None:
        """Do nothing."""

    def trial_ended(self, trial: FrozenTrial, ended: int) -> None:
        """Do nothing."""
