"""What an armed probe found out about the place of a problem, in words."""

from __future__ import annotations

from collections.abc import Collection

from gradguard.evidence import Evidence
from gradguard.facts import ProbeReading


def probe_of(
    run: Evidence, kind: str, parameters: Collection[str] | None = None
) -> ProbeReading | None:
    """Return the first probe of a kind, about one of the parameters if any are given; None for none."""
    for one in run.of(ProbeReading):
        if one.kind == kind and (parameters is None or one.parameter in parameters):
            return one
    return None


def birth_of(run: Evidence) -> ProbeReading | None:
    """Return the first probe that saw NaN or Inf being born; not one where it came in with a parameter.

    A broken step leaves NaN in the parameters, and what a later step meets is its consequence.
    """
    found = (one for one in run.of(ProbeReading) if one.kind == "nonfinite")
    return next((one for one in found if one.parameter is None), None)


def where(probe: ProbeReading | None) -> str:
    """Return line, operation and reason as the end of a sentence; empty for no probe."""
    if probe is None:
        return ""
    what = ": ".join(one for one in dict.fromkeys((probe.op, probe.reason)) if one)
    place = probe.line or probe.module
    if place and what:
        return f"; it happens at {place} ({what})"
    return f"; it happens in {place or what}" if place or what else ""
