"""Targets that the loss leaves out.

Looks at: the share of integer targets equal to -100, which torch's losses ignore, and the ignore_index of a
cross entropy beside the labels. Reported are batches all of whose targets are ignored (their mean is NaN), a
run in which next to none is learned from, and an ignore_index that is one of the classes of a plain
classification. Masked language models, prompts that are not learned and padding leave many targets out
rightly. Limits: other ways to mask (weights of 0, a product with a mask) are not seen.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html (ignore_index).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan, prod

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, LossReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import count, features, is_floating, measured, of
from gradguard.rules._facts import batch, loss_graph, node
from gradguard.rules._graphs import CLASSES
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG909",
    slug="targets-masked",
    family="loss",
    severity=Severity.ERROR,
    summary="Targets that should be learned are left out of the loss.",
    remedy="Look at how labels become -100 (or at ignore_index): something marks all of them as padding or "
    "prompt.",
    needs=(Sight.TARGETS,),
    explains=("GG502", "GG601", "GG602", "GG604", "GG605", "GG1002"),
)


def check(
    run: Evidence, *, most: float = 0.99, batches: int = 3, share: float = 0.02
) -> Iterator[Finding]:
    """Report batches without any target, runs with next to none, and a class that is ignored."""
    read = [b for b in measured(of(run, "targets")) if b.ignored_fraction is not None]
    empty = [b for b in read if b.ignored_fraction == 1.0]
    rare = [b for b in read if _is_rare(b, most)]
    lost = {record.step for record in run.steps if record.loss is not None and isnan(record.loss)}
    broken = [b for b in empty if b.step in lost]
    if broken or (len(read) >= batches and 2 * len(empty) >= len(read)):
        hit = broken or empty
        yield _finding(
            hit, f"all targets of {len(empty)} of {len(read)} batches are ignored (-100)"
        )
    elif len(read) >= batches and len(rare) == len(read):
        yield _finding(
            rare, f"in all {len(read)} batches at least {most:.0%} of the targets are ignored"
        )
    yield from _class_ignored(run, read, share)


def _is_rare(one: BatchReading, most: float) -> bool:
    """Whether next to none is kept, and not even one in every second row: one answer per text is enough."""
    ignored = one.ignored_fraction or 0.0
    return ignored >= most and (1 - ignored) * prod(one.shape) < 0.5 * count(one)


def _finding(hit: list[BatchReading], message: str) -> Finding:
    return RULE.finding(
        message,
        place=hit[0].tensor,
        first_step=hit[0].step,
        last_step=hit[-1].step,
        evidence={"ignored": hit[0].ignored_fraction or 0.0, "batches": len(hit)},
    )


def _class_ignored(run: Evidence, read: list[BatchReading], share: float) -> Iterator[Finding]:
    """Report an ignore_index that is the label of rows of a plain classification."""
    skipped = {one.step: index for one in run.of(LossReading) for index in _ignored(one)}
    rows = {one.step: one for one in of(run)}
    hit = []
    for one in read:
        index, given = skipped.get(one.step), rows.get(one.step)
        if index is None or given is None or not is_floating(given):
            continue
        plain = features(one) == 1 and count(one) == count(given)
        if plain and _share(one, index) >= share:
            hit.append(one)
    if len(hit) >= 2:
        index = skipped[hit[0].step]
        yield RULE.finding(
            f"the loss ignores class {index} (ignore_index), the label of {_share(hit[0], index):.0%} of the "
            "rows",
            place=hit[0].tensor,
            first_step=hit[0].step,
            last_step=hit[-1].step,
            evidence={"ignore_index": index, "share": _share(hit[0], index)},
            severity=Severity.WARNING,
        )


def _ignored(reading: LossReading) -> Iterator[int]:
    for one in reading.nodes:
        if one.name in CLASSES and one.ignore_index is not None and one.ignore_index >= 0:
            yield one.ignore_index


def _share(one: BatchReading, index: int) -> float:
    """Return a known share of targets with this label; 0.0 when none is known."""
    if index == 0 and one.zero_fraction is not None:
        return one.zero_fraction
    return (one.top_share or 0.0) if one.top_value == index else 0.0


def fires_on() -> RunLog:
    """Every label is replaced by -100, and the mean over nothing is NaN."""
    gone = {"ignored_fraction": 1.0, "top_value": -100.0, "top_share": 1.0, "distinct": 1}
    values = {"minimum": -100.0, "maximum": -100.0, "mean": -100.0, "std": 0.0}
    facts = [batch(i, "targets", rows=(-100.0,) * 32, **gone, **values) for i in range(3)]
    return healthy(6, *facts, loss=float("nan"))


def silent_on() -> RunLog:
    """A masked language model: 85 % of the tokens are not to be guessed, and padding is ignored."""
    masked = [
        batch(i, "targets", shape=(32, 64), ignored_fraction=0.85, top_share=0.85, top_value=-100.0)
        for i in range(3)
    ]
    entropy = [
        loss_graph(
            i,
            node("NllLoss", 0, "LogSoftmax", shape=(), reduction=1, ignore_index=0),
            node("LogSoftmax", 1, "View", shape=(2048, 8), dim=1),
        )
        for i in range(3)
    ]
    return healthy(6, *masked, *entropy, *(batch(i, shape=(32, 64)) for i in range(3)))
