"""What is wrong with a run: root causes first, their consequences folded under them, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradguard.findings import Finding, Severity


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One root cause and what follows from it."""

    finding: Finding
    consequences: tuple[Finding, ...] = ()

    @property
    def follows(self) -> tuple[str, ...]:
        """The consequences, a line for every rule: one fault can leave its mark on a hundred layers."""
        by_code: dict[str, list[Finding]] = {}
        for one in self.consequences:
            by_code.setdefault(one.code, []).append(one)
        return tuple(_folded(code, found) for code, found in by_code.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The judgement on one run.

    Attributes:
        causes: root causes, the worst and then the earliest first.
        notes: findings of severity INFO that no cause explains: no alarm.
        steps: how many optimizer steps were judged.
        looked_at: codes of the rules that were judged.
        not_looked_at: codes of the rules that could not be judged, with what they lack.
    """

    causes: tuple[Cause, ...] = ()
    notes: tuple[Finding, ...] = ()
    steps: int = 0
    looked_at: tuple[str, ...] = ()
    not_looked_at: Mapping[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing of severity WARNING or ERROR was found."""
        return not self.causes

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding once: causes, each followed by its consequences, then notes."""
        return tuple(
            finding for cause in self.causes for finding in (cause.finding, *cause.consequences)
        ) + tuple(self.notes)

    @property
    def worst(self) -> Severity | None:
        """The worst severity among the causes; None for a healthy run."""
        severities = [cause.finding.severity for cause in self.causes]
        return min(severities, key=lambda one: one.rank, default=None)

    def __str__(self) -> str:
        lines: list[str] = []
        for cause in self.causes:
            lines += _cause_lines(cause)
        if not self.causes:
            lines.append(f"nothing wrong found in {_count(self.steps, 'optimizer step')}")
        lines += [f"note {one.code}: {one.message}" for one in self.notes]
        lines.append(f"looked at: {_count(len(self.looked_at), 'rule')}")
        lines += _unseen_lines(self.not_looked_at)
        return "\n".join(lines)


def _cause_lines(cause: Cause) -> list[str]:
    found = cause.finding
    lines = [f"{found.severity} {found.code}: {found.message}"]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.evidence.items())
    if numbers:
        lines.append(f"    evidence: {numbers}")
    if found.remedy:
        lines.append(f"    fix: {found.remedy}")
    lines += [f"    follows: {line}" for line in cause.follows]
    return lines


def _folded(code: str, found: list[Finding]) -> str:
    more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
    return f"{code} {found[0].message}{more}"


def _unseen_lines(unseen: Mapping[str, str]) -> list[str]:
    """Return one line for every kind of evidence that was lacking."""
    lacking: dict[str, int] = {}
    for what in unseen.values():
        lacking[what] = lacking.get(what, 0) + 1
    return [f"not looked at: {_count(n, 'rule')} without {what}" for what, n in lacking.items()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
