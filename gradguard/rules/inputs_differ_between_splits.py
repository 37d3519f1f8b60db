"""Inputs of a split on another scale than those of the training split.

Looks at: mean and standard deviation of the loader's batches, of floating-point tensors and of images in
bytes, against the median of the training batches: a normalisation that one split lacks, 0..255 beside 0..1.
What batches of the training split differ among themselves by is allowed for. Limits: compares the same source
only, so that both loaders must be wrapped; a shift of less than five standard deviations and moderate scales
are left to metrics.

Sources: https://docs.pytorch.org/vision/stable/models.html (the transforms that weights were trained with).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import inputs, is_floating
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1010",
    slug="inputs-differ-between-splits",
    family="data",
    severity=Severity.WARNING,
    summary="This split is prepared differently from the training split.",
    remedy="Use the same normalisation, with the statistics of the training split, for every split.",
    needs=(Sight.INPUTS, Sight.SPLITS),
)

Measured = tuple[float, float]


def check(
    run: Evidence,
    *,
    shift: float = 5.0,
    wider: float = 10.0,
    narrower: float = 3.0,
    batches: int = 3,
) -> Iterator[Finding]:
    """Report every tensor of every split that lies far from, or is scaled unlike, that of training."""
    found: dict[str, dict[str, list[BatchReading]]] = {}
    for batch in run.of(BatchReading):
        if batch.source == "loader" and batch.tensor.startswith("inputs") and _is_measured(batch):
            found.setdefault(batch.tensor, {}).setdefault(batch.split, []).append(batch)
    for tensor, splits in found.items():
        train = splits.pop("train", [])
        if len(train) < batches:
            continue
        means, stds = zip(*map(_measured, train), strict=True)
        mean, std = median(means), median(stds)
        spread = max(abs(math.log(one / std)) for one in stds)
        drift = max(abs(one - mean) for one in means) / std
        for split, read in splits.items():
            same = [_measured(b) for b in read if len(b.shape) == len(train[0].shape)]
            off = [((m - mean) / std, math.log(s / std)) for m, s in same]
            moved = _least([abs(m) for m, _ in off]) > max(shift, 3 * drift)
            wide = _least([s for _, s in off]) > max(math.log(wider), 3 * spread)
            narrow = _least([-s for _, s in off]) > max(math.log(narrower), 3 * spread)
            if moved or wide or narrow:
                yield _report(tensor, split, read, mean, std)


def _report(
    tensor: str, split: str, read: Sequence[BatchReading], mean: float, std: float
) -> Finding:
    own_mean, own_std = _measured(read[0])
    return RULE.finding(
        f"{tensor} of split {split!r} have mean {own_mean:.3g} and standard deviation {own_std:.3g}, those "
        f"of training {mean:.3g} and {std:.3g}",
        place=f"{split} {tensor}",
        first_step=read[0].step,
        last_step=read[-1].step,
        evidence={"mean": own_mean, "std": own_std, "train_mean": mean, "train_std": std},
    )


def _least(values: Sequence[float]) -> float:
    """Return what even the mildest batch shows; nothing for no batches."""
    return min(values, default=-math.inf)


def _is_measured(batch: BatchReading) -> bool:
    mean, std = _measured(batch)
    usual = is_floating(batch) or (batch.dtype == "uint8" and len(batch.shape) > 2)
    return usual and math.prod(batch.shape) >= 64 and math.isfinite(mean) and 0 < std < math.inf


def _measured(batch: BatchReading) -> Measured:
    """Return mean and standard deviation; NaN where not measured."""
    return (
        math.nan if batch.mean is None else batch.mean,
        math.nan if batch.std is None else batch.std,
    )


def fires_on() -> RunLog:
    """The training images are normalised, the validation images are still 0..255."""
    raw = {"minimum": 0.0, "maximum": 255.0, "mean": 120.0, "std": 60.0}
    return healthy(6, *(inputs(i) for i in range(3)), inputs(3, split="validation", **raw))


def silent_on() -> RunLog:
    """A validation split of somewhat brighter images."""
    other = {"mean": 0.8, "std": 0.7}
    return healthy(6, *(inputs(i) for i in range(3)), inputs(3, split="validation", **other))
