"""The zoo in the suite: one seed of every loop; `python -m tests.faults` runs three."""

from __future__ import annotations

import pytest

from tests.faults import FAULTS, HEALTHY
from tests.faults.cases import Fault, Healthy
from tests.faults.judging import judge_fault, judge_healthy

by_name = {"ids": lambda one: one.name}


@pytest.mark.parametrize("fault", FAULTS, **by_name)
def test_fault_is_named_and_its_twin_is_not(fault: Fault) -> None:
    """The planted fault is a root cause with the right code and place, and the repaired twin is silent."""
    verdict = judge_fault(fault, seed=0)
    assert verdict.cause_named, str(verdict.diagnosis)
    assert verdict.place_named is not False, str(verdict.diagnosis)
    assert verdict.twin.healthy, str(verdict.twin)


@pytest.mark.parametrize("case", HEALTHY, **by_name)
def test_healthy_run_raises_no_alarm(case: Healthy) -> None:
    """A healthy run that tempts a rule gives neither an error nor a warning."""
    diagnosis = judge_healthy(case, seed=0).diagnosis
    assert diagnosis.healthy, str(diagnosis)
