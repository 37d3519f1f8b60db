"""Does my gradient sanitizer hide overflows from the loss scaler? Ask the ready-made properties.

``published_sanitizer`` stood in a published training script, ``published_fix`` replaced it there. Both
fail: the first turns Inf into 1, the second turns NaN into 0 where NaN *is* the overflow. In a test
file, three lines do what ``main`` does here:

    from gradguard.testing import never_hides_an_overflow
    from my_project import my_sanitizer
    test_my_sanitizer = never_hides_an_overflow(my_sanitizer)

Run: python -m examples.check_my_sanitizer
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

import torch
from torch import nn

import gradguard as gg
from gradguard.testing import (
    changes_only_nan,
    is_idempotent,
    never_hides_an_overflow,
    property_settings,
)

REPEATABLE = property_settings(derandomize=True, database=None)


def published_sanitizer(parameters: list[nn.Parameter]) -> None:
    """Replace NaN by 0 and infinities by 1 and -1."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=1.0, neginf=-1.0)


def published_fix(parameters: list[nn.Parameter]) -> None:
    """Replace NaN by 0 and keep infinities."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=inf, neginf=-inf)


def verdict(property_test: Callable[[], None]) -> str:
    """Run one property; return "holds" or its smallest counterexample."""
    try:
        property_test()
    except AssertionError as counterexample:
        return f"FAILS\n    {counterexample}"
    return "holds"


def main() -> None:
    """Judge three sanitizers and print a small counterexample for every property that fails."""
    for mine in (published_sanitizer, published_fix):
        print(f"{mine.__name__}: {mine.__doc__}")
        hides = never_hides_an_overflow(mine, settings=REPEATABLE)
        print("  never hides an overflow:", verdict(hides))
        print("  changes only NaN:", verdict(changes_only_nan(mine, settings=REPEATABLE)))
        print("  is idempotent:", verdict(is_idempotent(mine, settings=REPEATABLE)))

    ours = partial(gg.sanitize_gradients_, policy="zero_nan", max_fraction=1.0)
    print("gradguard.sanitize_gradients_: Knows the scaler, and waits until it has decided.")
    hides = never_hides_an_overflow(ours, with_scaler=True, settings=REPEATABLE)
    print("  never hides an overflow:", verdict(hides))


if __name__ == "__main__":
    main()
