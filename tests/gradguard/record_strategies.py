"""Hypothesis strategies for arbitrary records, and equality that tells every float apart."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping

from hypothesis import strategies as st

from gradguard.findings import Finding, Severity
from gradguard.records import Drift, ParameterReading, PathState, StepOutcome, StepRecord

floats = st.floats() | st.sampled_from(
    (-0.0, 5e-324, 2.2250738585072011e-308, 1.7976931348623157e308)
)
names = st.text(max_size=12)
counts = st.integers(min_value=0, max_value=2**63)
drifts = st.builds(
    Drift,
    name=names,
    update_norm=floats,
    weight_norm=floats,
    moved_fraction=floats,
    sampled=counts,
    total=counts,
    relative_error=floats,
)
readings = st.builds(
    ParameterReading,
    name=names,
    path=st.sampled_from(PathState),
    gradient_norm=st.none() | floats,
    drift=st.none() | drifts,
)
outcomes = st.sampled_from(StepOutcome)
records = st.builds(
    StepRecord,
    step=counts,
    optimizer=names,
    outcome=outcomes,
    reason=st.none() | names,
    micro_steps=st.none() | counts,
    batches=st.none() | counts,
    terms=st.dictionaries(names, floats, max_size=3),
    nonfinite_tensors=st.none() | counts,
    first_nonfinite=st.none() | names,
    nan_count=st.none() | counts,
    inf_count=st.none() | counts,
    drift=st.none() | drifts,
    groups=st.lists(drifts, max_size=2).map(tuple),
    parameters=st.none() | st.lists(readings, max_size=2).map(tuple),
    learning_rates=st.lists(floats, max_size=3).map(tuple),
    **{
        name: st.none() | floats
        for name in (
            "loss",
            "reported_loss",
            "loss_scale_before",
            "loss_scale_after",
            "found_inf",
            "gradient_norm",
            "gradient_norm_before_clipping",
            "averaged_lag",
            "wall_s",
            "guard_s",
            "ended_unix_s",
        )
    },
)
findings = st.builds(
    Finding,
    code=names,
    severity=st.sampled_from(Severity),
    message=names,
    first_step=st.none() | counts,
    last_step=st.none() | counts,
    detail=st.none() | names,
)


def bits(value: object) -> object:
    """Turn a value into nested tuples that are equal only for the same types and the same bits.

    Every NaN counts as the same: which NaN it is means nothing in a record.
    """
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else struct.pack(">d", value)
    if isinstance(value, Mapping):
        return tuple((key, bits(item)) for key, item in value.items())
    if isinstance(value, tuple):
        return tuple(bits(item) for item in value)
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return (type(value), *(bits(getattr(value, field.name)) for field in fields))
    return type(value), value
