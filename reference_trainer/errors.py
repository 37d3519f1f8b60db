"""Errors whose message is meant for the person who started the run: one sentence each."""

from __future__ import annotations


class TrainerError(Exception):
    """Base of the errors that the command line shows as one sentence, without a traceback."""


class ConfigError(TrainerError, ValueError):
    """A configuration key or value that does not exist or does not fit."""


class DataError(TrainerError, ValueError):
    """A data set that must not be trained on, such as one that shares scenes with its own test."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, or a file that is no readable checkpoint."""


class RecordingError(TrainerError):
    """A run that can no longer write to its directory."""
