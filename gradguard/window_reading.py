"""Makes the reading of one window from host values and from what came back from the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradguard.records import WindowReading

Values = Mapping[str, Sequence[float]]


def window_reading(
    activity: Mapping[str, Any], found: Values, hooked: Mapping[str, int]
) -> WindowReading:
    """Return the reading of one window.

    Args:
        activity: host values by field.
        found: device values by name: ``samples:...`` are norms of the sampled gradient,
            ``weight:...`` derivatives with respect to observed values, ``scale_before`` the loss scale.
        hooked: how many observed values could have been reached, by key.
    """
    scale = found.get("scale_before", (1.0,))[0]
    weights = {
        key.removeprefix("weight:"): values[0] / scale if scale else math.nan
        for key, values in found.items()
        if key.startswith("weight:")
    }
    if "loss" in weights:  # a backward pass was seen: what it did not reach has the weight 0
        weights = dict.fromkeys(hooked, 0.0) | weights
    return WindowReading(
        **activity,
        **_samples(found, scale),
        loss_weight=weights.get("loss"),
        reported_weight=weights.get("reported_loss"),
        term_weights={
            key.removeprefix("term:"): weight
            for key, weight in weights.items()
            if key.startswith("term:")
        },
    )


def _samples(found: Values, scale: float) -> dict[str, Any]:
    """Return the fields that the sampled gradient gives; ``scale`` is that of its backward passes."""
    carried = found.get("samples:carried")
    if carried is None:
        return {}
    return {
        "fresh_micro_steps": sum(norm <= 0.0 for norm in carried),
        "carried_norm": max(carried[0], 0.0),
        "backward_norm": _divided(_together(found["samples:backward"]), scale),
        "step_norm": _together(found["samples:step"]) if "samples:step" in found else None,
        "backward_nonfinite": not all(map(math.isfinite, found["samples:every"])),
    }


def _together(norms: Sequence[float]) -> float:
    """Return the norm of all values; NaN where one is NaN, which hypot forgets beside an infinity."""
    return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)


def _divided(value: float, scale: float) -> float:
    return value / scale if scale else math.nan
