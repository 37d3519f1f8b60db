"""Input values that a range or type error has scrambled.

Looks at: three traces, which are batches of 0..1 beside batches of 0..255 in one split; images that were
divided by 255 twice (no value above 1/255, and that one reached); fractions that were cut off by a cast to
integers between the loader and the model. Limits: values that wrapped around, swapped axes and swapped
channels leave no trace in what is read; look at a batch with your own eyes.

Sources: https://docs.pytorch.org/vision/stable/transforms.html (supported input types and conventions).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import features, inputs, is_floating, measured, of
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1005",
    slug="inputs-corrupted",
    family="data",
    severity=Severity.WARNING,
    summary="Values of the inputs are in the wrong range or were cut off.",
    remedy="Follow one sample from the file to the model and compare its type and range at every stage.",
    needs=(Sight.INPUTS,),
)


def check(run: Evidence, *, batches: int = 3) -> Iterator[Finding]:
    """Report the training inputs if they show one of the traces."""
    read = measured(of(run))
    images = [b for b in read if is_floating(b) and features(b) >= 64 and _is_positive(b)]
    if len(images) >= batches:
        yield from _mixed(images)
        if len(images) == len(read):
            yield from _twice(images)
    cut = list(_cut(run))
    if len(cut) >= batches:
        yield _finding(
            f"the inputs lost their fractions in a cast to {cut[0].dtype} between loader and model: "
            f"{cut[0].zero_fraction:.0%} of the values are 0 now",
            cut,
        )


def _mixed(images: list[BatchReading]) -> Iterator[Finding]:
    small = [b for b in images if 0.5 <= (b.maximum or 0.0) <= 1.0]
    large = [b for b in images if 128.0 <= (b.maximum or 0.0) <= 255.0]
    if small and large and len(small) + len(large) == len(images):
        yield _finding(
            f"{len(small)} batches lie within 0..1 and {len(large)} within 0..255",
            sorted([small[0], large[0], images[-1]], key=lambda b: b.step),
        )


def _twice(images: list[BatchReading]) -> Iterator[Finding]:
    """Report values that end exactly at 1/255."""
    tops = [(b.maximum or 0.0) * 255 for b in images]
    if all(top <= 1.001 for top in tops) and sum(top >= 0.99 for top in tops) >= 0.8 * len(tops):
        yield _finding("the inputs end at 1/255: they were divided by 255 twice", images)


def _cut(run: Evidence) -> Iterator[BatchReading]:
    """Yield what the model was given where it is the loader's values with their fractions cut off."""
    found = [b for b in run.of(BatchReading) if b.tensor == "inputs" and b.split == "train"]
    whole = {(b.step, b.shape): b for b in found if b.source == "loader" and is_floating(b)}
    for given in found:
        before = whole.get((given.step, given.shape))
        if before is None or given.source != "forward" or is_floating(given):
            continue
        ends = (
            _truncated(before.minimum) == given.minimum,
            _truncated(before.maximum) == given.maximum,
        )
        zeros = (given.zero_fraction or 0.0) > max(0.65, (before.zero_fraction or 0.0) + 0.3)
        if all(ends) and zeros and given.minimum is not None:
            yield given


def _truncated(value: float | None) -> float | None:
    return None if value is None or not abs(value) < 2**53 else float(int(value))


def _is_positive(batch: BatchReading) -> bool:
    return batch.minimum is not None and batch.minimum >= 0.0


def _finding(message: str, batches: list[BatchReading]) -> Finding:
    first = batches[0]
    numbers = {"minimum": first.minimum or 0.0, "maximum": first.maximum or 0.0}
    return RULE.finding(
        message,
        place=first.tensor,
        first_step=first.step,
        last_step=batches[-1].step,
        evidence=numbers | {"batches": len(batches)},
    )


def _image(number: int, top: float) -> BatchReading:
    values = {"minimum": 0.0, "maximum": top, "mean": top / 2, "std": top / 4}
    return inputs(number, shape=(32, 3, 8, 8), **values)


def fires_on() -> RunLog:
    """Images were divided by 255 by the reader and again by the transform."""
    return healthy(6, *(_image(i, 1 / 255) for i in range(3)))


def silent_on() -> RunLog:
    """Images of 0..1 of which a dark batch does not reach 1."""
    return healthy(6, *(_image(i, 1.0 if i else 0.4) for i in range(4)))
