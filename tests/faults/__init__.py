"""The zoo: small real training loops with a planted fault, their repaired twins, healthy ones."""

from tests.faults import (
    amp,
    copies_and_reports,
    data,
    distributed,
    gradient_handling,
    gradient_path,
    mode_and_loss,
    numerics,
    optimizer,
    rare,
    tempting,
    tempting_copies,
    tempting_forwards,
)
from tests.faults.cases import FAULTS, HEALTHY

__all__ = [
    "FAULTS",
    "HEALTHY",
    "amp",
    "copies_and_reports",
    "data",
    "distributed",
    "gradient_handling",
    "gradient_path",
    "mode_and_loss",
    "numerics",
    "optimizer",
    "rare",
    "tempting",
    "tempting_copies",
    "tempting_forwards",
]
