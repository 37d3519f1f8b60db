"""Layers or tensors that a module uses without having registered them.

Looks at: lists, tuples, dicts and attributes of every module for trainable tensors and modules that the model
does not know. They are in no ``parameters()``, in no state dict, and move to no device. Limits: three levels
deep; what hides in closures or other objects is not seen.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import healthy, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG303",
    slug="unregistered-parameters",
    family="optimizer",
    severity=Severity.WARNING,
    summary="Trainable layers or tensors are not registered on their module.",
    remedy="Use nn.ModuleList, nn.ModuleDict or nn.ParameterList instead of list and dict, nn.Parameter "
    "instead of a tensor; or detach what must not train.",
    needs=(Sight.SETUP,),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report the hidden places of the first setup together."""
    hidden = run.setup.unregistered if run.setup else ()
    if hidden and run.setup:
        yield RULE.finding(
            f"{len(hidden)} trainable module(s) or tensor(s) are not registered: {', '.join(hidden[:4])}",
            place=hidden[0].partition(" ")[0],
            first_step=run.setup.step,
            evidence={"unregistered": len(hidden)},
        )


def fires_on() -> RunLog:
    """Three layers in a Python list."""
    hidden = tuple(f"layers[{i}] (Linear)" for i in range(3))
    return run([step(i) for i in range(4)], setup(unregistered=hidden))


def silent_on() -> RunLog:
    """Everything is registered."""
    return healthy()
