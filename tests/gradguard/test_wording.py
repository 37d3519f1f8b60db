import math

import pytest

from gradguard.records import StepOutcome
from gradguard.views import wording


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.number(None), "-"),
        (wording.number(0.0), "0"),
        (wording.number(math.nan), "nan"),
        (wording.number(1.23456e-7), "1.235e-07"),
        (wording.loss_scale(None), "-"),
        (wording.loss_scale(65536.0), "2^16"),
        (wording.loss_scale(65537.0), "6.554e+04"),
        (wording.loss_scale(1.0), "1"),
        (wording.loss_scale(0.0), "0"),
        (wording.loss_scale(math.inf), "inf"),
        (wording.loss_scale(math.nan), "nan"),
        (wording.percent(0.01234), "1.23 %"),
        (wording.percent(None), "-"),
        (wording.duration(None), "-"),
        (wording.duration(0.01234), "0.0123 s"),
        (wording.duration(59.96), "1 min 00 s"),
        (wording.duration(187.2), "3 min 07 s"),
        (wording.duration(3 * 3600 + 61), "3 h 01 min"),
        (wording.spread([]), "-"),
        (wording.spread([3.0, 1.0, 2.0]), "1 / 2 / 3"),
        (wording.spread([1.0, math.nan]), "1 / 1 / 1 and 1 non-finite"),
        (wording.spread([math.inf]), "1 non-finite"),
        (wording.fall(None, 1.0), "-"),
        (wording.fall(2.0, 0.5), "2 -> 0.5 (fell 75.0 %)"),
        (wording.fall(2.0, 3.0), "2 -> 3 (rose 50.0 %)"),
        (wording.fall(2.0, math.nan), "2 -> nan"),
        (wording.fall(-1.0, -2.0), "-1 -> -2"),
        (wording.outcome(StepOutcome.SKIPPED_BY_SCALER), "skipped by scaler"),
        (wording.one_line("a\n b\x1b[2Jc\ud800"), "a b?[2Jc?"),
    ],
)
def test_numbers_are_worded_briefly(text, expected):
    """Numbers, scales, shares, times and names read as the manual shows them."""
    assert text == expected
