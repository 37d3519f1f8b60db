"""The page of every rule as plain values: the manual and the terminal show the same one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gradguard.engine import RuleModule, UnknownRuleError, diagnose, find_rule, thresholds_of
from gradguard.findings import (
    GUARD_FAULT,
    RECORDING_FAULT,
    RULE_FAULT,
    SCALER_BYPASSED,
    Finding,
    Rule,
    Severity,
)
from gradguard.rules import CATALOGUE

_HEADINGS = ("Looks at", "Limits", "Sources")
_SECTION = re.compile(rf"\b(?=(?:{'|'.join(_HEADINGS)}): )")

OWN_FAMILY = "guard"
"""Family of the findings that no rule file makes: they are about the guard and not about the training."""

OWN_RULES: tuple[Rule, ...] = (
    Rule(
        code=GUARD_FAULT,
        slug="guard-fault",
        family=OWN_FAMILY,
        severity=Severity.WARNING,
        summary="A part of the guard itself raised; it switched itself off and the user's run went on.",
        remedy="Report the traceback in the finding's detail; strict=True raises at the place instead.",
        needs=(),
    ),
    Rule(
        code=RECORDING_FAULT,
        slug="recording-fault",
        family=OWN_FAMILY,
        severity=Severity.ERROR,
        summary="The run directory could not be written any further; records are kept in memory only.",
        remedy="Make room, or choose a place that can be written, and start a new run directory.",
        needs=(),
    ),
    Rule(
        code=SCALER_BYPASSED,
        slug="scaler-bypassed",
        family=OWN_FAMILY,
        severity=Severity.ERROR,
        summary="An optimizer was stepped in an iteration in which the watched scaler knows nothing of it.",
        remedy="Call scaler.step(optimizer) instead of optimizer.step(), or pass watch() the scaler that "
        "this optimizer is stepped with.",
        needs=(),
    ),
    Rule(
        code=RULE_FAULT,
        slug="rule-fault",
        family=OWN_FAMILY,
        severity=Severity.WARNING,
        summary="A rule raised while it judged the run; what it looks for has not been looked at.",
        remedy="Report the traceback in the finding's detail; --ignore leaves the rule out meanwhile.",
        needs=(),
    ),
)
"""What may be found without a rule file, in the order of the codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything that is told about one rule.

    Attributes:
        rule: code, name, family, severity, summary, remedy, needs and what it explains.
        story: the docstring of the rule's file below its first line; empty for :data:`OWN_RULES`.
        thresholds: the thresholds with their defaults, by name.
        example: what the run of the example is; empty without one.
        finding: what is found in the example; None without one.
    """

    rule: Rule
    story: str = ""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    example: str = ""
    finding: Finding | None = None

    @property
    def explains(self) -> tuple[str, ...]:
        """The codes of the problems that follow from this one, at once or later."""
        return (*self.rule.explains, *self.rule.explains_later)

    @property
    def sections(self) -> tuple[tuple[str, str], ...]:
        """The story as headings and texts without line breaks; the heading may be empty."""
        found: list[tuple[str, str]] = []
        for paragraph in self.story.split("\n\n"):
            for piece in _SECTION.split(" ".join(paragraph.split())):
                heading, colon, text = piece.partition(": ")
                known = bool(colon) and heading in _HEADINGS
                found.append((heading, text.strip()) if known else ("", piece.strip()))
        return tuple((heading, text) for heading, text in found if text)


def every_rule() -> tuple[Rule, ...]:
    """Return all rules in the order of their codes, those without a file first."""
    modules: tuple[RuleModule, ...] = CATALOGUE
    return (*OWN_RULES, *(module.RULE for module in modules))


def find_page(name: str) -> Page:
    """Return the page of the rule with this code or slug.

    Raises:
        UnknownRuleError: there is none; the message lists near ones.
    """
    for rule in OWN_RULES:
        if name.upper() == rule.code or name == rule.slug:
            return Page(rule=rule)
    if name.upper().startswith("GG00"):
        known = ", ".join(rule.code for rule in OWN_RULES)
        raise UnknownRuleError(f"no rule has the code or slug {name!r}; known: {known}")
    return page_of(find_rule(name))


def page_of(module: RuleModule) -> Page:
    """Return the page of one rule of the catalogue, with its example judged."""
    _, _, story = (getattr(module, "__doc__", None) or "").strip().partition("\n\n")
    found = diagnose(module.fires_on()).findings
    return Page(
        rule=module.RULE,
        story=story,
        thresholds=thresholds_of(module),
        example=(module.fires_on.__doc__ or "").strip(),
        finding=next((one for one in found if one.code == module.RULE.code), None),
    )
