"""Findings: one problem in one run, as a plain value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem in one run.

    Attributes:
        code: stable code of the kind of problem, for example ``"GG001"``.
        severity: how bad it is.
        message: one sentence: what was seen, where, what to do.
        first_step: first optimizer step it was seen at; None when it belongs to no step.
        last_step: last optimizer step it was seen at.
        detail: longer evidence, such as a traceback.
    """

    code: str
    severity: Severity
    message: str
    first_step: int | None = None
    last_step: int | None = None
    detail: str | None = None


GUARD_FAULT = "GG001"
"""A part of the guard itself raised; it switched itself off and the user's run went on."""

RECORDING_FAULT = "GG002"
"""The run directory could not be written any further; records are kept in memory only."""

SCALER_BYPASSED = "GG003"
"""An optimizer was stepped in an iteration in which the watched scaler knows nothing of it."""
