"""Runs the catalogue of rules over a run and puts what they find in order: causes first."""

from __future__ import annotations

import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gradguard.diagnosis import Cause, Diagnosis
from gradguard.evidence import Evidence
from gradguard.facts import ProbeReading
from gradguard.findings import RULE_FAULT, Finding, Rule, Severity
from gradguard.rules import CATALOGUE
from gradguard.runlog import RunLog

_FAMILY_DIGITS = 2


class RuleModule(Protocol):
    """What a file of the catalogue offers; ``check`` takes thresholds as keywords."""

    RULE: Rule
    check: Callable[..., Iterator[Finding]]
    fires_on: Callable[[], RunLog]
    silent_on: Callable[[], RunLog]


class UnknownRuleError(ValueError):
    """A code, slug or threshold that no rule has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rules are judged, and with which thresholds.

    Attributes:
        select: codes, slugs or families; empty for all.
        ignore: codes, slugs or families that are left out.
        thresholds: values by ``"CODE.name"``, such as ``{"GG101.limit": 12}``.
    """

    select: Sequence[str] = ()
    ignore: Sequence[str] = ()
    thresholds: Mapping[str, float] | None = None


def thresholds_of(module: RuleModule) -> dict[str, float]:
    """Return the thresholds of a rule and their defaults."""
    parameters = inspect.signature(module.check).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def find_rule(name: str) -> RuleModule:
    """Return the rule with this code or slug.

    Raises:
        UnknownRuleError: there is none; the message lists near ones.
    """
    modules: tuple[RuleModule, ...] = CATALOGUE
    for module in modules:
        if name.upper() == module.RULE.code or name == module.RULE.slug:
            return module
    near = [m.RULE.code for m in CATALOGUE if m.RULE.code.startswith(name.upper()[:3])]
    known = ", ".join(near or [m.RULE.code for m in CATALOGUE])
    raise UnknownRuleError(f"no rule has the code or slug {name!r}; known: {known}")


def diagnose(
    log: RunLog,
    *,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    thresholds: Mapping[str, float] | None = None,
) -> Diagnosis:
    """Judge a run by the catalogue: what is wrong, why, since when, and what to change.

    Args:
        log: the run; may still be going on.
        select: codes, slugs or families (``"GG10"``, ``"data"``) of the rules to judge; all when empty.
        ignore: codes, slugs or families of rules to leave out.
        thresholds: values by ``"CODE.name"``, such as ``{"GG101.limit": 12}``.

    Raises:
        UnknownRuleError: a code, slug or threshold that no rule has.

    Sync: none; rules read plain values.
    """
    chosen = _chosen(select, ignore)
    settings = _settings(thresholds or {})
    evidence = Evidence(log)
    found: list[Finding] = list(log.findings)
    looked_at: list[str] = []
    unseen: dict[str, str] = {}
    for module in chosen:
        lacking = [s for s in module.RULE.needs if s not in evidence.sights]
        if lacking:
            unseen[module.RULE.code] = lacking[0].value
            continue
        looked_at.append(module.RULE.code)
        found += _judged(module, evidence, settings.get(module.RULE.code, {}))
    causes, notes = fold(found, {module.RULE.code: module.RULE for module in CATALOGUE})
    return Diagnosis(
        causes=causes,
        notes=notes,
        steps=len(log),
        looked_at=tuple(looked_at),
        not_looked_at=unseen,
    )


def asks_for_probes(log: RunLog) -> bool:
    """Whether a rule found something of which it would like to know the source line.

    Sync: none; rules read plain values.
    """
    if log.facts_of(ProbeReading):
        return False
    evidence = Evidence(log)
    asking: list[RuleModule] = [module for module in CATALOGUE if module.RULE.asks]
    fit = [m for m in asking if all(sight in evidence.sights for sight in m.RULE.needs)]
    return any(_judged(module, evidence, {}) for module in fit)


def fold(
    findings: Iterable[Finding], rules: Mapping[str, Rule]
) -> tuple[tuple[Cause, ...], tuple[Finding, ...]]:
    """Return root causes with their consequences, and the notes that belong to none.

    A finding follows from another one whose rule declares that it explains it, directly or through
    others, and which did not begin later.
    """
    ordered = sorted(findings, key=_urgency)
    # A note that a cause explains is folded; a note never explains an alarm.
    causes_of = {id(one): [c for c in ordered if _explains(c, one, rules)] for one in ordered}
    roots = [one for one in ordered if not causes_of[id(one)]]
    children: dict[int, list[Finding]] = {id(root): [] for root in roots}
    for one in ordered:
        root = _root_of(one, causes_of)
        if root is not one:
            children[id(root)].append(one)
    alarms = [r for r in roots if r.severity is not Severity.INFO]
    causes = tuple(Cause(finding=r, consequences=tuple(children[id(r)])) for r in alarms)
    return causes, tuple(r for r in roots if r.severity is Severity.INFO)


def _root_of(finding: Finding, causes_of: Mapping[int, list[Finding]]) -> Finding:
    """Follow the first cause upwards: ``explains`` has no cycle (a test holds this), and time has none."""
    while causes_of[id(finding)]:
        finding = causes_of[id(finding)][0]
    return finding


def _explains(cause: Finding, other: Finding, rules: Mapping[str, Rule]) -> bool:
    rule = rules.get(cause.code)
    if rule is None or cause is other:
        return False
    if cause.severity is Severity.INFO and other.severity is not Severity.INFO:
        return False
    started, followed = cause.first_step, other.first_step
    if started is None or followed is None:
        return other.code in rule.explains
    now = other.code in rule.explains and started <= followed
    return now or (other.code in rule.explains_later and started < followed)


def _urgency(finding: Finding) -> tuple[int, int, str, str]:
    first = -1 if finding.first_step is None else finding.first_step
    return finding.severity.rank, first, finding.code, finding.place or ""


def _judged(module: RuleModule, evidence: Evidence, settings: Mapping[str, float]) -> list[Finding]:
    """Return what one rule finds; a rule that raises is a finding, not silence."""
    try:
        return list(module.check(evidence, **settings))
    except Exception as error:  # noqa: BLE001 (the boundary: becomes a finding)
        fault = Finding(
            code=RULE_FAULT,
            severity=Severity.WARNING,
            message=f"rule {module.RULE.code} ({module.RULE.slug}) raised {type(error).__name__} while it "
            "judged the run; what it looks for has not been looked at",
            detail="".join(traceback.format_exception(error)),
        )
        return [fault]


def _chosen(select: Sequence[str], ignore: Sequence[str]) -> list[RuleModule]:
    for name in (*select, *ignore):
        if not any(_named(module.RULE, name) for module in CATALOGUE):
            raise UnknownRuleError(
                f"no rule has the code, slug or family {name!r}; "
                "`python -m gradguard rules` lists them"
            )
    return [
        module
        for module in CATALOGUE
        if (not select or any(_named(module.RULE, name) for name in select))
        and not any(_named(module.RULE, name) for name in ignore)
    ]


def _named(rule: Rule, name: str) -> bool:
    """Whether a slug, a code or the digits of a family (``"GG1"``, ``"GG10"``) mean this rule."""
    digits = name.upper().removeprefix("GG")
    if digits.isdigit() and len(digits) <= _FAMILY_DIGITS:
        return int(rule.code.removeprefix("GG")) // 100 == int(digits)
    return name in (rule.slug, rule.family) or rule.code == name.upper()


def _settings(thresholds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    chosen: dict[str, dict[str, float]] = {}
    for key, value in thresholds.items():
        code, _, name = key.partition(".")
        module = find_rule(code)
        known = thresholds_of(module)
        if name not in known:
            raise UnknownRuleError(
                f"rule {module.RULE.code} has no threshold {name!r}; it has: {', '.join(known) or 'none'}"
            )
        chosen.setdefault(module.RULE.code, {})[name] = _like(known[name], value, key)
    return chosen


def _like(default: float, value: float, key: str) -> float:
    """Return the value as the default's type.

    Raises:
        UnknownRuleError: it is not finite, or a fraction where a whole number is expected.
    """
    if not math.isfinite(value) or (isinstance(default, int) and value != int(value)):
        kind = "whole number" if isinstance(default, int) else "finite number"
        raise UnknownRuleError(
            f"threshold {key}={value}: expected a {kind}; the default is {default}"
        )
    return type(default)(value)
