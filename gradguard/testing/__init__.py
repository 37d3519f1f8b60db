"""Check your own sanitizers, gates and observers against real training steps."""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "hypothesis":  # it is there, and something that it needs is not
        raise
    raise ImportError(
        "gradguard.testing needs hypothesis; install it with: pip install gradguard[testing]"
    ) from None

from gradguard.testing.lint import HostRead, HostReads, assert_no_host_reads, count_host_reads
from gradguard.testing.neutrality import (
    TrainingRun,
    assert_neutral,
    fingerprint_parts,
    training_fingerprint,
)
from gradguard.testing.properties import (
    changes_only_nan,
    gate_is_neutral_on_clean_steps,
    gated_steps_are_whole,
    is_idempotent,
    is_neutral_on_clean_steps,
    never_hides_an_overflow,
    property_settings,
)
from gradguard.testing.strategies import (
    ALL_DTYPES,
    ALL_LAYOUTS,
    COMPLEX_DTYPES,
    DENSE_LAYOUTS,
    FLOAT8_DTYPES,
    FLOAT_DTYPES,
    OverflowSequence,
    bits_of,
    gradients,
    overflow_sequences,
    parameter_sets,
    parameter_with,
)
from gradguard.testing.twins import PLACES

__all__ = [
    "ALL_DTYPES",
    "ALL_LAYOUTS",
    "COMPLEX_DTYPES",
    "DENSE_LAYOUTS",
    "FLOAT8_DTYPES",
    "FLOAT_DTYPES",
    "PLACES",
    "HostRead",
    "HostReads",
    "OverflowSequence",
    "TrainingRun",
    "assert_neutral",
    "assert_no_host_reads",
    "bits_of",
    "changes_only_nan",
    "count_host_reads",
    "fingerprint_parts",
    "gate_is_neutral_on_clean_steps",
    "gated_steps_are_whole",
    "gradients",
    "is_idempotent",
    "is_neutral_on_clean_steps",
    "never_hides_an_overflow",
    "overflow_sequences",
    "parameter_sets",
    "parameter_with",
    "property_settings",
    "training_fingerprint",
]
