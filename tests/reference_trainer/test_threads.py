"""The number of threads is measured."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import torch

from reference_trainer.threads import choose_threads

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fast", [1, 2])
def test_the_faster_number_is_taken(fast: int) -> None:
    """Where one thread is quicker one is taken, where two are, two; the choice is set."""

    def work() -> None:
        time.sleep(0.002 if torch.get_num_threads() == fast else 0.05)

    choice = choose_threads(work, candidates=[1, 2])
    assert choice.threads == fast == torch.get_num_threads()
    assert set(choice.seconds) == {1, 2}


def test_a_single_candidate_is_not_measured() -> None:
    """A number that was asked for is set without running anything."""
    runs: list[int] = []
    choice = choose_threads(lambda: runs.append(1), candidates=[2, 2])
    assert (choice.threads, choice.seconds, runs) == (2, {}, [])
    assert torch.get_num_threads() == 2
