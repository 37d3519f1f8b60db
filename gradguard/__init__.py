"""Hooks for any PyTorch trainer that tell the truth about every optimizer step."""

from gradguard.checkup import Check, CheckFailedError, OverfitReport, PreflightReport
from gradguard.diagnosis import Cause, Diagnosis
from gradguard.drift import DriftMeter, DriftReport, averaged_lag
from gradguard.engine import UnknownRuleError, diagnose
from gradguard.explain import (
    CutReason,
    DeadGradient,
    NonfiniteOrigin,
    PathCut,
    explain_paths,
    locate_dead,
    locate_nonfinite,
)
from gradguard.facts import Plan
from gradguard.findings import Finding, Rule, Severity
from gradguard.gate import StepGate
from gradguard.guard import Guard
from gradguard.norms import global_norm, nonfinite_counts, tensor_norms
from gradguard.overfit import overfit_check
from gradguard.paths import Reachability, gradient_readings, reachable_parameters
from gradguard.policies import AnySignal, Finite, LossSpike, NormSpike, Policy
from gradguard.preflight import preflight
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
    WindowReading,
)
from gradguard.rundir import Run, RunDirectory, RunDirectoryError, read_run
from gradguard.runlog import RunLog, RunLogError
from gradguard.sanitize import (
    SanitizedGradient,
    SanitizeReport,
    persistent_nan,
    sanitize_gradients_,
)
from gradguard.scaler import scaler_stage, scaler_state
from gradguard.verdicts import GateCeilingError, GateCounts
from gradguard.views.terminal import LiveView, outcome_line, summary_table
from gradguard.watching import watch

__all__ = [
    "OUTCOME_TABLE",
    "AnySignal",
    "Cause",
    "Check",
    "CheckFailedError",
    "CutReason",
    "DeadGradient",
    "Diagnosis",
    "Drift",
    "DriftMeter",
    "DriftReport",
    "Finding",
    "Finite",
    "GateCeilingError",
    "GateCounts",
    "GateDecision",
    "Guard",
    "LiveView",
    "LossSpike",
    "NonfiniteOrigin",
    "NormSpike",
    "OverfitReport",
    "ParameterReading",
    "PathCut",
    "PathReading",
    "PathState",
    "Plan",
    "Policy",
    "PreflightReport",
    "Reachability",
    "Rule",
    "Run",
    "RunDirectory",
    "RunDirectoryError",
    "RunLog",
    "RunLogError",
    "SanitizeReport",
    "SanitizedGradient",
    "ScalerState",
    "Severity",
    "StepGate",
    "StepOutcome",
    "StepRecord",
    "UnknownRuleError",
    "WindowReading",
    "averaged_lag",
    "diagnose",
    "explain_paths",
    "global_norm",
    "gradient_readings",
    "locate_dead",
    "locate_nonfinite",
    "nonfinite_counts",
    "outcome_line",
    "overfit_check",
    "persistent_nan",
    "preflight",
    "reachable_parameters",
    "read_run",
    "sanitize_gradients_",
    "scaler_stage",
    "scaler_state",
    "summary_table",
    "tensor_norms",
    "watch",
]
