"""How many threads torch should use: measured, because the number of cores does not tell.

On small virtual machines two threads can be three times slower than one: each operation waits for
the slower core, and a core that is shared with another guest is slow at random.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """The number of threads that was chosen, and the best time of each candidate.

    Attributes:
        threads: the chosen number, already set.
        seconds: shortest time of the work by number of threads; empty when nothing was measured.
    """

    threads: int
    seconds: Mapping[int, float]


def choose_threads(
    work: Callable[[], object], *, candidates: Iterable[int], rounds: int = 1
) -> ThreadChoice:
    """Time ``work`` under each number of threads, in turns, and set the one with the shortest time.

    Each candidate runs once more at first, untimed: threads start and caches fill.
    """
    numbers = sorted(set(candidates))
    if len(numbers) == 1:
        torch.set_num_threads(numbers[0])
        return ThreadChoice(numbers[0], {})
    for number in numbers:
        _seconds(work, number)
    seconds = {n: min(_seconds(work, n) for _ in range(rounds)) for n in numbers}
    best = min(numbers, key=seconds.__getitem__)
    torch.set_num_threads(best)
    return ThreadChoice(best, seconds)


def _seconds(work: Callable[[], object], threads: int) -> float:
    torch.set_num_threads(threads)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
