"""The seventeen faults of the published pipeline, and the rules that should name them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Description:
    """What a fault is.

    Attributes:
        what: in a sentence.
        codes: rules that name it; one of them has to be a root cause.
    """

    what: str
    codes: tuple[str, ...]


class Fault(Enum):
    """One switch each; the value says what it breaks."""

    ONE_STEP_PER_EPOCH = Description("backward and step stand outside of the loop", ("GG709",))
    PRINTED_LOSS_DIVIDED = Description("the printed loss is divided by the batches", ("GG1501",))
    NAN_ZEROED = Description("a term makes NaN gradients, and they are zeroed", ("GG605", "GG106"))
    INF_MAPPED_TO_ONE = Description("Inf becomes 1 before unscaling", ("GG106",))
    DETECTOR_WITH_WRONG_KEY = Description("the detector asks under the wrong key", ("GG108",))
    GATE_TOO_STRICT = Description("the gate lets hardly any step pass", ("GG710",))
    AVERAGE_READ_AS_DRIFT = Description("the drift is that of the averaged copy", ("GG1502",))
    GRID_HEAD_NOT_IN_LOSS = Description("the grid head never enters the loss", ("GG501",))
    MODULES_NEVER_CALLED = Description("the spectral layers are never called", ("GG506",))
    TERMS_CONSTANT_ZERO = Description("two terms swallow an error and return 0", ("GG906",))
    LOSS_AT_TRUTH = Description("the loss of the truth is not 0", ("GG912",))
    VALIDATION_COPIED = Description("validation scenes are training scenes", ("GG1007",))
    SAMPLE_WITHOUT_SIGNAL = Description("the sample covariance holds no signal", ("GG1011",))
    PLAN_TOO_LONG = Description("the schedule is made for eight times the steps", ("GG404",))
    HEAD_IN_WRONG_GROUP = Description("a head trains at the backbone's rate", ("GG313",))
    VALIDATION_DIFFERS = Description("validation computes another function", ("GG1503",))
    SWA_LOADS_NOTHING = Description("the averaged weights match no key", ("GG1401",))

    @property
    def slug(self) -> str:
        """Its name on the command line."""
        return self.name.lower().replace("_", "-")


ALL = frozenset(Fault)
HALF_PRECISION = frozenset((Fault.INF_MAPPED_TO_ONE, Fault.DETECTOR_WITH_WRONG_KEY))
"""Faults that need a loss scaler to do their harm."""


def by_slug(slug: str) -> Fault:
    """Return the fault with this name.

    Raises:
        ValueError: there is none.
    """
    for fault in Fault:
        if fault.slug == slug:
            return fault
    known = ", ".join(fault.slug for fault in Fault)
    raise ValueError(f"no fault is called {slug!r}; there are: {known}")
