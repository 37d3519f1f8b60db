"""The case study: each published fault is named when it is alone, and none is invented without any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.case_study.__main__ import is_named
from examples.case_study.faults import ALL, Fault, by_slug
from examples.case_study.pipeline import run

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "case-study.md"
EPOCHS = 1


@pytest.fixture(autouse=True)
def one_thread():
    """Small batches: a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.slug)
def test_a_fault_alone_is_a_root_cause(fault: Fault) -> None:
    """The rule that names the fault is among the root causes, and no rule of another fault is."""
    diagnosis = run(frozenset((fault,)), epochs=EPOCHS)
    assert is_named(fault, diagnosis), str(diagnosis)
    assert not [
        other.slug for other in Fault if other is not fault and _only(other, fault, diagnosis)
    ]


def _only(other: Fault, fault: Fault, diagnosis) -> bool:
    return is_named(other, diagnosis) and not set(other.value.codes) & set(fault.value.codes)


def test_the_pipeline_without_faults_raises_no_alarm() -> None:
    """The loop that the switches break is healthy when none of them is on."""
    diagnosis = run(frozenset(), epochs=EPOCHS)
    assert diagnosis.healthy, str(diagnosis)


def test_all_faults_at_once_give_root_causes_and_fold_the_rest() -> None:
    """The hidden overflow, and the zero gradients it leaves, are consequences of the blind detector."""
    diagnosis = run(ALL, epochs=9)
    causes = {cause.finding.code: cause for cause in diagnosis.causes}
    folded = {finding.code for finding in causes["GG108"].consequences}
    assert {"GG106", "GG502"} <= folded
    assert not folded & set(causes)
    assert sum(is_named(fault, diagnosis) for fault in Fault) >= 12, str(diagnosis)


def test_an_unknown_fault_is_refused_by_name() -> None:
    """A typing error gets the known names."""
    with pytest.raises(ValueError, match="no fault is called 'nan'; there are: one-step-per-epoch"):
        by_slug("nan")


def test_the_page_tells_of_every_fault() -> None:
    """The story in the manual leaves no fault out."""
    text = PAGE.read_text(encoding="utf-8")
    assert not [fault.slug for fault in Fault if fault.slug not in text]
