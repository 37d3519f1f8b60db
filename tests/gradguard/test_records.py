import dataclasses
import itertools
import math
import pickle

import pytest

from gradguard.records import OUTCOME_TABLE, Drift, StepEvidence, StepOutcome, StepRecord, judge

FLAGS = (None, 0.0, 1.0, 2.0, math.inf, math.nan)
EVIDENCE = [
    StepEvidence(
        found_inf=found_inf,
        vetoed=vetoed,
        had_gradient=had_gradient,
        wrote_nonfinite=wrote_nonfinite,
        moved_fraction=moved_fraction,
    )
    for found_inf, vetoed, had_gradient, wrote_nonfinite, moved_fraction in itertools.product(
        FLAGS, (False, True), (False, True), (None, False, True), (None, 0.0, 1e-9, 1.0)
    )
]


def outcome_in_words(evidence: StepEvidence) -> StepOutcome:
    """Say the manual's table once more, as questions asked one after the other."""
    if evidence.found_inf is not None and not evidence.found_inf <= 0:
        return StepOutcome.SKIPPED_BY_SCALER
    if evidence.vetoed:
        return StepOutcome.VETOED
    if not evidence.had_gradient:
        return StepOutcome.NO_GRADIENT
    if evidence.wrote_nonfinite:
        return StepOutcome.CORRUPTED
    if evidence.moved_fraction is not None and evidence.moved_fraction == 0:
        return StepOutcome.NO_MOTION
    return StepOutcome.APPLIED


def test_every_combination_of_readings_has_the_outcome_of_the_manual():
    """The table agrees with a second wording of it on all 288 combinations of readings."""
    assert [judge(evidence) for evidence in EVIDENCE] == [outcome_in_words(e) for e in EVIDENCE]


def test_every_outcome_has_one_row_and_can_happen():
    """The table names each outcome once, and some readings lead to each."""
    assert sorted(row.outcome for row in OUTCOME_TABLE) == sorted(StepOutcome)
    assert {judge(evidence) for evidence in EVIDENCE} == set(StepOutcome)


def test_an_unmeasured_motion_is_not_no_motion():
    """With drift switched off a step with gradients counts as applied, not as motionless."""
    evidence = StepEvidence(
        found_inf=None, vetoed=False, had_gradient=True, wrote_nonfinite=None, moved_fraction=None
    )
    assert judge(evidence) is StepOutcome.APPLIED


def test_a_record_knows_nothing_it_was_not_told():
    """Every reading that was not given is None or empty, never a number."""
    record = StepRecord(step=0, optimizer="main", outcome=StepOutcome.APPLIED)
    told = {"step", "optimizer", "outcome"}
    rest = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}.items()
    assert all(value in (None, {}, ()) for name, value in rest if name not in told)


def test_a_record_is_a_frozen_value():
    """No field can be set, two records never share loss terms, and a record survives pickling."""
    record = StepRecord(step=0, optimizer="main", outcome=StepOutcome.APPLIED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.step = 1
    assert (
        StepRecord(step=0, optimizer="main", outcome=StepOutcome.APPLIED).terms is not record.terms
    )
    assert pickle.loads(pickle.dumps(record)) == record
    assert dataclasses.asdict(record)["terms"] == {}


@pytest.mark.parametrize(
    ("update", "weight", "ratio"), [(1.0, 4.0, 0.25), (0.0, 4.0, 0.0), (1.0, 0.0, None)]
)
def test_update_to_weight_ratio_of_a_zero_weight_is_not_measured(update, weight, ratio):
    """The ratio is update over weight, and None where the weight is all zero."""
    drift = Drift(
        name="all",
        update_norm=update,
        weight_norm=weight,
        moved_fraction=1.0,
        sampled=2,
        total=2,
        relative_error=0.0,
    )
    assert drift.update_to_weight == ratio
    assert drift.exact
