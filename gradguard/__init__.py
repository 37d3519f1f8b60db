"""Hooks for any PyTorch trainer that tell the truth about every optimizer step."""

from gradguard.drift import DriftMeter, DriftReport, averaged_lag
from gradguard.findings import Finding, Severity
from gradguard.guard import Guard, watch
from gradguard.norms import global_norm, nonfinite_counts, tensor_norms
from gradguard.paths import Reachability, gradient_readings, reachable_parameters
from gradguard.records import (
    OUTCOME_TABLE,
    Drift,
    GateDecision,
    ParameterReading,
    PathReading,
    PathState,
    ScalerState,
    StepOutcome,
    StepRecord,
)
from gradguard.rundir import Run, RunDirectory, RunDirectoryError, read_run
from gradguard.runlog import RunLog, RunLogError
from gradguard.scaler import scaler_stage, scaler_state

__all__ = [
    "OUTCOME_TABLE",
    "Drift",
    "DriftMeter",
    "DriftReport",
    "Finding",
    "GateDecision",
    "Guard",
    "ParameterReading",
    "PathReading",
    "PathState",
    "Reachability",
    "Run",
    "RunDirectory",
    "RunDirectoryError",
    "RunLog",
    "RunLogError",
    "ScalerState",
    "Severity",
    "StepOutcome",
    "StepRecord",
    "averaged_lag",
    "global_norm",
    "gradient_readings",
    "nonfinite_counts",
    "reachable_parameters",
    "read_run",
    "scaler_stage",
    "scaler_state",
    "tensor_norms",
    "watch",
]
