"""What can go wrong in a search, apart from what can go wrong in a run."""

from __future__ import annotations

from reference_trainer.errors import TrainerError


class SearchError(TrainerError):
    """A search that cannot be started or continued; the message is one sentence."""


class BrokenTrialError(Exception):
    """A trial whose run is broken: its numbers mean nothing, the message says why."""


class AllTrialsStartedError(Exception):
    """Nothing is left to start: every trial that was asked for has been taken by a process."""
