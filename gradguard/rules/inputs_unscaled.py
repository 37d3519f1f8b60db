"""Inputs on a scale that a first layer is not made for, or features on very different ones.

Looks at: values that reach a linear or convolution layer as they are (its input has the size of the batch):
their root mean square, and the ratio of the largest to the smallest feature where a large one is large in
itself. A network that normalises its inputs first is silent, and so is a large overall scale that a
normalisation right behind the layer takes out; ids and sparse features are left out. Limits: images of 0 to
255 are below the limit; the ratio of features is judged for rows of one dimension only.

Sources: Y. LeCun et al., "Efficient BackProp", 1998 (normalising the inputs).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._batches import first_layers, inputs, is_floating, of, rms, weight_layers
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1004",
    slug="inputs-unscaled",
    family="data",
    severity=Severity.WARNING,
    summary="Input features are on scales that the initial weights and one learning rate cannot serve.",
    remedy="Standardise every feature with the mean and standard deviation of the training split.",
    needs=(Sight.INPUTS, Sight.MODULES),
    explains=("GG307", "GG608", "GG1104"),
)


def check(
    run: Evidence,
    *,
    size: float = 200.0,
    ratio: float = 300.0,
    large: float = 30.0,
    batches: int = 2,
) -> Iterator[Finding]:
    """Report the first layer that is given such inputs in (at least) two batches."""
    found: list[tuple[BatchReading, ModuleReading]] = []
    layers = weight_layers(run)
    for batch in of(run):
        big = (rms(batch) or 0.0) > size
        uneven = _is_uneven(batch, ratio, large)
        if not is_floating(batch) or not (big or uneven):
            continue
        for layer in first_layers(layers, batch):
            if uneven or not _is_normalised_behind(run, layer.module):
                found.append((batch, layer))
                break
    if len(found) < batches:
        return
    (first, layer), last = found[0], found[-1][0]
    scale = (
        f", features by a factor of up to {first.feature_scale:.2g}" if first.feature_scale else ""
    )
    yield RULE.finding(
        f"{layer.module or 'the model'} is given inputs with a root mean square of {rms(first):.3g}"
        f"{scale if _is_uneven(first, ratio, large) else ''}",
        place=layer.module or None,
        first_step=first.step,
        last_step=last.step,
        evidence={"rms": rms(first) or 0.0, "feature_scale": first.feature_scale or 0.0},
    )


def _is_uneven(batch: BatchReading, ratio: float, large: float) -> bool:
    """Whether features differ in size by a factor that matters, one of them being large."""
    if len(batch.shape) != 2 or batch.feature_scale is None or (batch.zero_fraction or 0.0) > 0.2:
        return False
    return batch.feature_scale > ratio and max(-(batch.minimum or 0), batch.maximum or 0) > large


def _is_normalised_behind(run: Evidence, layer: str) -> bool:
    """Whether the next module that was built takes the scale out again."""
    modules = run.setup.modules if run.setup else ()
    names = [one.name for one in modules]
    if layer not in names:
        return False
    behind = names.index(layer) + 1
    return behind < len(modules) and "Norm" in modules[behind].kind


def _given(number: int, size: float, **changes: float) -> tuple[BatchReading, ModuleReading]:
    """Return a batch and the reading of the layer that was given it."""
    layer = ModuleReading(step=number, module="first", kind="Linear", input_rms=size)
    values = {"minimum": -3 * size, "maximum": 3 * size, "std": size}
    return inputs(number, **(values | changes)), layer


def fires_on() -> RunLog:
    """A feature in dollars beside one in years."""
    facts = [f for i in range(3) for f in _given(i, 9000.0, feature_scale=2000.0, mean=0.0)]
    return healthy(6, *facts)


def silent_on() -> RunLog:
    """Unscaled values that the model normalises before its first layer."""
    facts = [f for i in range(3) for f in _given(i, 9000.0, feature_scale=2000.0)]
    layers = [ModuleReading(step=i, module="first", kind="Linear", input_rms=1.0) for i in range(3)]
    return healthy(6, *(f for f in facts if isinstance(f, BatchReading)), *layers)
