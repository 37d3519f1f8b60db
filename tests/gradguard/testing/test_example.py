"""The example about sanitizers says what it promises."""

from __future__ import annotations

import pytest

from examples import check_my_sanitizer


def test_the_example_prints_small_counterexamples(capsys: pytest.CaptureFixture[str]) -> None:
    """It convicts the published bug and the published fix, and clears the library's own."""
    check_my_sanitizer.main()
    lines = capsys.readouterr().out.splitlines()
    counterexamples = [line.strip() for line in lines if "the scaler alone skips" in line]
    assert [line.partition(":")[0] for line in counterexamples] == [
        "loss scale 65536, gradient [inf]",
        "loss scale 65536, gradient [nan]",
    ]
    assert "moves the weight by 1.5e-05 and keeps the loss scale" in counterexamples[0]
    assert lines[-1] == "  never hides an overflow: holds"
