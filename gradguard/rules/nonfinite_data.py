"""NaN or Inf that comes in with the batch.

Looks at: the count of NaN and Inf in inputs and targets, and whether loss, gradient or update of the same
step were finite all the same: a model that handles missing values (or masks missing labels) is only noted.
Additive attention masks of 0 and -Inf are left out. Limits: batches between detailed steps are not read.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.isfinite.html.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepOutcome, StepRecord
from gradguard.rules._batches import inputs, targets
from gradguard.rules._runs import healthy, run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG603",
    slug="nonfinite-data",
    family="numerics",
    severity=Severity.ERROR,
    summary="NaN or Inf comes in with the data.",
    remedy="Look for missing values, log of 0 or division by a zero standard deviation in what prepares "
    "this tensor; drop or fill such samples.",
    needs=(Sight.INPUTS,),
    explains=("GG101", "GG601", "GG602", "GG604", "GG605", "GG606"),
)


def check(run: Evidence) -> Iterator[Finding]:
    """Report, by split and tensor, the first batch with NaN or Inf."""
    bad: dict[tuple[str, str], list[BatchReading]] = {}
    for batch in run.of(BatchReading):
        if batch.nonfinite and not _is_mask(batch):
            bad.setdefault((batch.split, batch.tensor), []).append(batch)
    if not bad:
        return
    harmed = {record.step for record in run.steps if _is_harmed(record)}
    for (split, tensor), batches in bad.items():
        first = batches[0]
        severity = _severity(run, batches, harmed, trained=("train", tensor) in bad)
        calm = "; the training was finite all the same" if severity is Severity.INFO else ""
        yield RULE.finding(
            f"{tensor} of split {split!r} hold {first.nonfinite} NaN or Inf at step {first.step} "
            f"({len(batches)} batches in all){calm}",
            place=tensor,
            first_step=first.step,
            last_step=batches[-1].step,
            evidence={"nonfinite": first.nonfinite or 0, "batches": len(batches)},
            severity=severity,
        )


def _severity(
    run: Evidence, batches: list[BatchReading], harmed: set[int], *, trained: bool
) -> Severity:
    """Return INFO where the model can handle such values: they were there and the step was finite."""
    if batches[0].split != "train":
        inputs_only = batches[0].tensor.startswith("inputs") and not trained
        return Severity.WARNING if inputs_only else Severity.INFO
    if not run.steps:
        return Severity.ERROR
    if len(run.by_optimizer) > 1:
        return Severity.ERROR if harmed else Severity.INFO
    every = all({b.step, b.step + 1} & harmed for b in batches)
    return Severity.ERROR if every else Severity.INFO


def _is_harmed(record: StepRecord) -> bool:
    """Whether the step shows NaN or Inf anywhere."""
    if record.nonfinite_tensors or record.outcome is StepOutcome.CORRUPTED:
        return True
    if record.outcome is StepOutcome.SKIPPED_BY_SCALER:
        return True
    if record.window is not None and record.window.backward_nonfinite:
        return True
    return record.loss is not None and not math.isfinite(record.loss)


def _is_mask(batch: BatchReading) -> bool:
    """Whether the tensor can be an additive mask: a further input, its finite values 0."""
    if batch.tensor in {"inputs", "targets"}:
        return False
    return batch.maximum == 0.0 and (batch.minimum in (0.0, -math.inf))


def fires_on() -> RunLog:
    """A NaN in the inputs of step 2; the loss is NaN from then on."""
    records = [step(i, loss=math.nan if i >= 2 else 1.0) for i in range(5)]
    return run(records, setup(), inputs(0), inputs(1), inputs(2, nonfinite=3))


def silent_on() -> RunLog:
    """Finite data, and an additive mask of 0 and -Inf as second input."""
    mask = inputs(
        0, tensor="inputs[1]", nonfinite=40, minimum=-math.inf, maximum=0.0, mean=-math.inf
    )
    return healthy(4, inputs(0), mask, inputs(1), targets(1), inputs(2))
