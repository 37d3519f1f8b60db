"""What rules about data share: which readings belong together, and builders of healthy ones."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradguard.evidence import Evidence
from gradguard.facts import BatchReading, ModuleReading

SOURCES = ("loader", "forward", "observe")
WEIGHT_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "LazyLinear", "LazyConv2d")


def of(run: Evidence, tensor: str = "inputs", split: str = "train") -> tuple[BatchReading, ...]:
    """Return the readings of one tensor from one source: the loader's if there are any."""
    found = [b for b in run.of(BatchReading) if b.tensor == tensor and b.split == split]
    for source in SOURCES:
        own = tuple(b for b in found if b.source == source)
        if own:
            return own
    return ()


def measured(readings: Iterable[BatchReading]) -> list[BatchReading]:
    """Return those with statistics; the first batches of a run are read for their rows, too."""
    return [one for one in readings if one.std is not None]


def samples(run: Evidence) -> list[BatchReading]:
    """Return the readings of the inputs whose rows say which sample they are; see :func:`identifies`."""
    found = [b for b in run.of(BatchReading) if b.tensor == "inputs" and b.rows]
    judged: dict[tuple[tuple[int, ...], str], bool] = {}
    for one in measured(found):
        kind = one.shape[1:], one.dtype
        judged[kind] = judged.get(kind, True) and identifies(one)
    return [one for one in found if judged.get((one.shape[1:], one.dtype))]


def count(reading: BatchReading) -> int:
    """Return the number of rows; 0 for a tensor without any."""
    return reading.shape[0] if reading.shape else 0


def features(reading: BatchReading) -> int:
    """Return the number of values in one row."""
    return math.prod(reading.shape[1:])


def is_floating(reading: BatchReading) -> bool:
    """Whether the tensor holds floating-point numbers."""
    return "float" in reading.dtype


def rms(reading: BatchReading) -> float | None:
    """Return the root mean square of all values; None when not measured."""
    if reading.mean is None or reading.std is None:
        return None
    return math.hypot(reading.mean, reading.std)


def repeated(rows: Sequence[Hashable]) -> float:
    """Return the share of rows that are equal to an earlier one; 0.0 for no rows."""
    return 1 - len(set(rows)) / len(rows) if rows else 0.0


def identifies(reading: BatchReading) -> bool:
    """Whether a row says which sample it is: many values, not only a few different ones.

    Ids, one-hot codes and other features of few values repeat by right.
    """
    if features(reading) < 8:
        return False
    if reading.std is None or not reading.std > 0 or (reading.zero_fraction or 0.0) > 0.9:
        return False
    return not _is_binary(reading) and (reading.distinct is None or reading.distinct >= 16)


def _is_binary(reading: BatchReading) -> bool:
    """Whether all values are 0 or 1: only then is the variance mean * (1 - mean)."""
    mean, std = reading.mean, reading.std
    if mean is None or std is None or reading.minimum != 0.0 or reading.maximum != 1.0:
        return False
    return math.isclose(std**2, mean * (1 - mean), rel_tol=0.05)


Layers = Mapping[int, Sequence[ModuleReading]]


def weight_layers(run: Evidence) -> Layers:
    """Return the readings of linear and convolution layers in training, by step."""
    layers: dict[int, list[ModuleReading]] = {}
    for one in run.of(ModuleReading):
        if one.kind in WEIGHT_LAYERS and one.training:
            layers.setdefault(one.step, []).append(one)
    return layers


def first_layers(layers: Layers, reading: BatchReading) -> Iterator[ModuleReading]:
    """Yield the linear and convolution layers of that step that were given the batch as it is."""
    size = rms(reading)
    if not size or not math.isfinite(size):
        return
    for one in layers.get(reading.step, ()):
        if one.input_rms is not None and size / 2 <= one.input_rms <= size * 2:
            yield one


def inputs(step: int, **changes: Any) -> BatchReading:
    """Return 32 rows of 16 normalised features of the loader, new ones at every step, with changes."""
    healthy: dict[str, Any] = {
        "split": "train",
        "tensor": "inputs",
        "source": "loader",
        "shape": (32, 16),
        "dtype": "float32",
        "rows": tuple(step * 100.0 + i for i in range(32)),
        "minimum": -3.0,
        "maximum": 3.0,
        "mean": 0.0,
        "std": 1.0,
        "nonfinite": 0,
        "zero_fraction": 0.0,
        "constant_features": 0.0,
        "feature_spread": 1.3,
        "feature_scale": 1.3,
        "distinct": 512,
    }
    return BatchReading(step=step, **(healthy | changes))


def targets(step: int, **changes: Any) -> BatchReading:
    """Return 32 labels of 8 classes of the loader, with changes."""
    healthy: dict[str, Any] = {
        "split": "train",
        "tensor": "targets",
        "source": "loader",
        "shape": (32,),
        "dtype": "int64",
        "rows": tuple(float((step * 100 + i) * 7919 % 8) for i in range(32)),
        "minimum": 0.0,
        "maximum": 7.0,
        "mean": 3.5,
        "std": 2.3,
        "nonfinite": 0,
        "zero_fraction": 0.125,
        "top_share": 0.2,
        "top_value": float(step % 8),
        "distinct": 8,
        "sorted_rows": 0.55,
        "ignored_fraction": 0.0,
    }
    return BatchReading(step=step, **(healthy | changes))
