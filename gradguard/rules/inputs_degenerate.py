"""Inputs that are the same in every row.

Looks at: the share of features that do not vary over the batch, for all tensors of the inputs together, and
the spread over the rows of what the model was given. One constant tensor beside others (a mask, position ids,
the node features of a graph) is healthy; constant rows in all of them are not. Limits: a batch of one row is
judged only if all its values are equal; the same batch again and again is not looked for here.

Sources: https://karpathy.github.io/2019/04/25/recipe/ (become one with the data; input-independent baseline).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import count, inputs, measured, of
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1003",
    slug="inputs-degenerate",
    family="data",
    severity=Severity.ERROR,
    summary="The inputs are constant, or next to constant: there is nothing to learn from.",
    remedy="Look at a batch: an integer division, a wrong index or a broken reader makes all rows alike.",
    needs=(Sight.INPUTS,),
    explains=("GG306", "GG502"),
)


def check(run: Evidence, *, batches: int = 3, spread: float = 1e-6) -> Iterator[Finding]:
    """Report a training split all of whose inputs are constant in every batch read."""
    names = {b.tensor for b in run.of(BatchReading) if b.split == "train"}
    found = [measured(of(run, name)) for name in sorted(names) if name.startswith("inputs")]
    if not found or min(len(one) for one in found) < batches:
        return
    constant = all(_is_constant(b) for one in found for b in one)
    narrow = _narrowest(run)
    nearly = len(found) == 1 and narrow is not None and narrow <= spread
    if constant or nearly:
        read = found[0]
        yield RULE.finding(
            f"the inputs of all {len(read)} batches read are the same in every row"
            if constant
            else f"the rows of the inputs differ by {narrow:.1g} of their size only",
            place=read[0].tensor,
            first_step=read[0].step,
            last_step=read[-1].step,
            evidence={
                "batches": len(read),
                "constant_features": read[0].constant_features or 0.0,
                "spread": read[0].std or 0.0,
            },
        )


def _is_constant(batch: BatchReading) -> bool:
    if batch.constant_features is not None:
        return batch.constant_features == 1.0 and count(batch) >= 4
    return batch.std == 0.0 and prod(batch.shape) >= 16


def _narrowest(run: Evidence) -> float | None:
    """Return the largest spread over the rows relative to their size that the model was ever given."""
    spreads = [
        one.input_row_std / one.input_rms
        for one in run.of(ModuleReading)
        if one.module == "" and one.training and one.input_rms and one.input_row_std is not None
    ]
    return max(spreads) if len(spreads) >= 3 else None


def fires_on() -> RunLog:
    """An integer division made every pixel 0."""
    flat = {
        "rows": (0.0,) * 32,
        "minimum": 0.0,
        "maximum": 0.0,
        "std": 0.0,
        "zero_fraction": 1.0,
        "constant_features": 1.0,
        "feature_spread": None,
        "distinct": 1,
    }
    return healthy(6, *(inputs(i, **flat) for i in range(3)))


def silent_on() -> RunLog:
    """Rows that differ, and a mask of ones as second input."""
    ones = {"tensor": "inputs[1]", "std": 0.0, "mean": 1.0, "minimum": 1.0, "maximum": 1.0}
    facts = [f for i in range(3) for f in (inputs(i), inputs(i, constant_features=1.0, **ones))]
    return healthy(6, *facts)
