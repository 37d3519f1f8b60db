"""Backward passes that reach forward passes of ever more earlier steps.

Looks at: how often the backward passes of a step reached the output of a forward pass of an earlier step. A
total of losses that is never reset, or a hidden state that is never detached, reaches one more at every step.
A loss computed once and differentiated at every step has no forward pass of its own. Limits: a constant
number of old forward passes is left alone: a generator whose samples were made before the critic's step, and
truncated backpropagation with overlap, look so.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.Tensor.backward.html (retain_graph).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG708",
    slug="graph-reused",
    family="gradient handling",
    severity=Severity.ERROR,
    summary="Losses of earlier steps are back-propagated again.",
    remedy="Sum losses for printing with loss.detach(), and detach a hidden state between steps; "
    "retain_graph=True is rarely needed.",
    needs=(Sight.STEPS, Sight.FORWARDS),
    explains=("GG307", "GG608", "GG701"),
)


def check(run: Evidence, *, steps: int = 3) -> Iterator[Finding]:
    """Report rows of steps in which the number of old forward passes grows, or there is no new one."""
    single = len(run.by_optimizer) == 1
    for name, records in run.by_optimizer.items():
        growing: list[StepRecord] = []
        without: list[StepRecord] = []
        for record in records:
            stale = _stale(record)
            more = stale > (_stale(growing[-1]) if growing else 0)
            growing = [*growing, record] if more else ([record] if stale == 1 else [])
            without = [*without, record] if single and stale and _has_no_forward(record) else []
            found = growing if len(growing) >= steps else without
            if len(found) >= steps:
                yield _report(name, found)
                break


def _stale(record: StepRecord) -> int:
    return (record.window.stale_backwards or 0) if record.window is not None else 0


def _has_no_forward(record: StepRecord) -> bool:
    return record.window is not None and record.window.forwards == 0


def _report(name: str, found: list[StepRecord]) -> Finding:
    first, last = found[0], found[-1]
    more = ", and more at every step" if _stale(last) > _stale(first) else ", and none of its own"
    return RULE.finding(
        f"the backward passes of {name!r} at step {last.step} reach {_stale(last)} forward passes of "
        f"earlier steps{more}",
        first_step=first.step,
        last_step=last.step,
        evidence={"stale_backwards": _stale(last), "steps": len(found)},
    )


def fires_on() -> RunLog:
    """A total of losses that is differentiated at every step and never reset."""
    return run([step(i, window={"stale_backwards": i}) for i in range(6)], setup())


def silent_on() -> RunLog:
    """The generator's samples were made before the critic's step: one old forward pass each time."""
    return run([step(i, window={"stale_backwards": 1}) for i in range(6)], setup())
