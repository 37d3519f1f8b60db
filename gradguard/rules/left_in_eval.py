"""Training that goes on in eval mode.

Looks at: the mode of the watched model in every forward pass that recorded a graph. Reported are several
optimizer steps in a row all of whose forwards ran in eval mode, while the model has layers to which the mode
matters (dropout, running statistics) and none of these was seen in train mode since. Silent for models
without such layers, for normalisations that are frozen or put into eval mode by themselves, and for single
forwards in eval mode (attacks, saliency) beside those in train mode. Limits: a whole model that is fine-tuned
in eval mode on purpose looks the same: ignore the rule then.

Sources: https://docs.pytorch.org/docs/stable/notes/autograd.html (evaluation mode); models that a library
returns in eval mode, and validation functions that call model.eval() and return.
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._facts import layer, module
from gradguard.rules._modes import layers_with_mode
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG801",
    slug="left-in-eval",
    family="mode",
    severity=Severity.WARNING,
    summary="Training runs in eval mode: dropout is off, and running statistics stay as they are.",
    remedy="Call model.train() at the start of every epoch and after every validation.",
    needs=(Sight.FORWARDS, Sight.SETUP),
    explains=("GG804",),
)


def check(run: Evidence, *, steps: int = 3) -> Iterator[Finding]:
    """Report rows of optimizer steps whose training forwards all ran in eval mode."""
    for name, records in run.by_optimizer.items():
        for row in _rows(records):
            if len(row) < steps:
                continue
            layers = _layers(run, row)
            if not layers:
                continue
            yield RULE.finding(
                f"every training forward of {len(row)} steps of {name!r} since step {row[0].step} ran in eval "
                f"mode, and the model has {len(layers)} layers to which that matters ({layers[0]} ...)",
                place=layers[0],
                first_step=row[0].step,
                last_step=row[-1].step,
                evidence={"steps": len(row), "layers": len(layers)},
            )


def _rows(records: tuple[StepRecord, ...]) -> Iterator[list[StepRecord]]:
    row: list[StepRecord] = []
    for record in records:
        forwards = record.window.forwards if record.window else None
        if not forwards:
            continue  # nothing was trained on in between: the mode is not known
        if record.window and record.window.forwards_in_eval == forwards:
            row.append(record)
        elif row:
            yield row
            row = []
    if row:
        yield row


def _layers(run: Evidence, row: list[StepRecord]) -> list[str]:
    """Return the layers to which the mode matters and that were not put into train mode by themselves."""
    first, last = row[0].step, row[-1].step
    readings = (one for one in run.of(ModuleReading) if first <= one.step <= last)
    awake = {one.module for one in readings if one.training}
    return [one.name for one in layers_with_mode(run) if one.name not in awake]


def fires_on() -> RunLog:
    """A validation after step 2 leaves the model in eval mode."""
    layers = (layer("drop", "Dropout", p=0.1),)
    records = [step(i, window={"forwards_in_eval": int(i > 2)}) for i in range(8)]
    return run(records, setup(modules=layers))


def silent_on() -> RunLog:
    """Normalisation in eval mode on purpose in a model in train mode; attacks are made in eval mode."""
    frozen = {"track_running_stats": 1.0, "affine": 1.0, "momentum": 0.1}
    layers = (layer("first", "BatchNorm2d", training=False, **frozen),)
    attack = {"forwards": 2, "forwards_reached": 2, "forwards_in_eval": 1}
    readings = [module(i, "first", "BatchNorm2d", training=False) for i in range(3)]
    return run([step(i, window=attack) for i in range(8)], setup(modules=layers), *readings)
