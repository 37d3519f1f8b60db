"""Where it happened: the operation, module and source line that cut a path, made a NaN, killed a gradient."""

from __future__ import annotations

from gradguard.explain.armed import ArmedProbes as ArmedProbes
from gradguard.explain.explainers import explain_paths as explain_paths
from gradguard.explain.explainers import locate_dead as locate_dead
from gradguard.explain.explainers import locate_nonfinite as locate_nonfinite
from gradguard.explain.results import CutReason as CutReason
from gradguard.explain.results import DeadGradient as DeadGradient
from gradguard.explain.results import NonfiniteOrigin as NonfiniteOrigin
from gradguard.explain.results import PathCut as PathCut
from gradguard.explain.results import as_facts as as_facts
from gradguard.explain.undisturbed import undisturbed as undisturbed
