"""The zoo: small real training loops with a planted fault, their repaired twins, healthy ones."""

from tests.faults import (
    amp,
    gradient_handling,
    gradient_path,
    numerics,
    optimizer,
    tempting,
)
from tests.faults.cases import FAULTS, HEALTHY

__all__ = [
    "FAULTS",
    "HEALTHY",
    "amp",
    "gradient_handling",
    "gradient_path",
    "numerics",
    "optimizer",
    "tempting",
]
