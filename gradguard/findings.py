"""Findings and the rules that make them, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return tuple(Severity).index(self)


class Sight(StrEnum):
    """A kind of evidence that a rule needs; the value says how a run comes to have it."""

    STEPS = "optimizer steps"
    SCALER = "a loss scaler (pass scaler= to watch)"
    LOSS = "the optimised loss (call guard.observe(loss=...))"
    LOSS_WEIGHT = (
        "the loss before its backward (call guard.observe(loss=...) before loss.backward())"
    )
    LOSS_GRAPH = "the loss with its autograd graph (call guard.observe(loss=...) with the tensor)"
    REPORTED_LOSS = "the printed loss (call guard.observe(reported_loss=...))"
    TERMS = "the loss terms (call guard.observe(terms=...))"
    SETUP = "the model and its optimizers"
    SCHEDULER = "a learning-rate scheduler"
    FORWARDS = "forward passes of the watched model"
    MODULES = "module readings of the first and every detailed step"
    INPUTS = "inputs of the watched model or of guard.batches(loader)"
    TARGETS = "targets (iterate over guard.batches(loader) or call guard.observe(targets=...))"
    SPLITS = "batches of more than one split (guard.batches(loader, split=...))"
    COPIES = "copies of the model (pass averaged= to watch, or call guard.follow_copy)"
    LOADS = "calls of load_state_dict on the watched model"
    REPLICAS = "runs of several replicas (judge their logs together)"
    METRICS = "reported numbers (call guard.report(name, value))"
    PLAN = "a declared plan (pass plan=gg.Plan(...) to watch)"
    END = "the end of the run (leave the watch block or call detach())"


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
        place: name of the parameter, module, group, term, copy or source line; None where there is none.
        evidence: the numbers the finding stands on, by name.
        cause: the likely cause, in a sentence.
        remedy: what to change.
    """

    code: str
    severity: Severity
    message: str
    first_step: int | None = None
    last_step: int | None = None
    detail: str | None = None
    place: str | None = None
    evidence: Mapping[str, float] = field(default_factory=dict)
    cause: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A kind of problem; codes never change their meaning and are never used again.

    Attributes:
        code: ``"GG"`` and a number; the hundreds are the family.
        slug: name of the trouble, and of the file that holds the rule.
        family: one of :data:`FAMILIES`.
        severity: of its findings, unless one of them says otherwise.
        summary: what is wrong, in a sentence.
        remedy: what to change, in a sentence or two.
        needs: evidence without which the rule cannot be judged.
        explains: codes of problems that follow from this one, in the same step or later; has no cycle.
        explains_later: codes of problems that follow from this one in later steps only.
        asks: whether its findings ask the guard to listen to one step: the rule names the source line then.
    """

    code: str
    slug: str
    family: str
    severity: Severity
    summary: str
    remedy: str
    needs: tuple[Sight, ...] = (Sight.STEPS,)
    explains: tuple[str, ...] = ()
    explains_later: tuple[str, ...] = ()
    asks: bool = False

    def finding(
        self,
        message: str,
        *,
        place: str | None = None,
        first_step: int | None = None,
        last_step: int | None = None,
        evidence: Mapping[str, float] | None = None,
        cause: str | None = None,
        remedy: str | None = None,
        severity: Severity | None = None,
        detail: str | None = None,
    ) -> Finding:
        """Return a finding of this rule; severity and remedy default to the rule's own."""
        return Finding(
            code=self.code,
            severity=severity or self.severity,
            message=message,
            first_step=first_step,
            last_step=first_step if last_step is None else last_step,
            detail=detail,
            place=place,
            evidence=dict(evidence or {}),
            cause=cause or self.summary,
            remedy=remedy or self.remedy,
        )


FAMILIES: tuple[str, ...] = (
    "amp",
    "precision",
    "optimizer",
    "schedule",
    "gradient path",
    "numerics",
    "gradient handling",
    "mode",
    "loss",
    "data",
    "init",
    "averaging",
    "distributed",
    "checkpoint",
    "reporting",
)
"""Families in the order of their codes: amp is GG1xx, reporting is GG15xx."""


GUARD_FAULT = "GG001"
"""A part of the guard itself raised; it switched itself off and the user's run went on."""

RECORDING_FAULT = "GG002"
"""The run directory could not be written any further; records are kept in memory only."""

SCALER_BYPASSED = "GG003"
"""An optimizer was stepped in an iteration in which the watched scaler knows nothing of it."""

RULE_FAULT = "GG004"
"""A rule raised while it judged the run; what it looks for has not been looked at."""
