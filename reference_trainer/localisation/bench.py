"""Runs estimators and counts on one set of scenes in batches, and times them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from reference_trainer.localisation.report import Cost
from reference_trainer.positions import concatenated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from reference_trainer.localisation.counting import Counter
    from reference_trainer.localisation.estimators import Answer, Estimator
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.positions import Positions
    from reference_trainer.scenes import Scenes

    Told = Callable[[str, int, int], None]

BATCH_SCENES = 125
"""Scenes a worker takes at once, between two reports of progress; more would not be faster."""

_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """What an estimator said, on the CPU, about all scenes or the first ones.

    Attributes:
        known: positions with the true number of sources.
        counted: positions with an estimated number; None where it was not asked for.
        cost: of ``known``, from the raw scenes on.
    """

    known: Positions
    counted: Positions | None
    cost: Cost


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """Scenes on a device, and who hears how far a run on them has come.

    Attributes:
        physics: what the scenes were drawn from.
        scenes: on the device.
        told: hears what is being done, and how many scenes of how many are done.
        workers: batches worked on at the same time; results do not depend on it.
    """

    physics: ScenePhysics
    scenes: Scenes
    told: Told
    workers: int

    def count(self, counter: Counter, number: int) -> tuple[Tensor, Cost]:
        """Return the number of sources in the first scenes, int64 ``[number]`` on the CPU."""

        def counted(rows: slice) -> Tensor:
            return counter.count(self.physics, self.scenes.select(rows)).cpu()

        parts, cost = self._timed(f"counting by {counter.title}", counted, number)
        return torch.cat(parts), cost

    def locate(self, estimator: Estimator, number: int, counts: Tensor | None) -> Run:
        """Run an estimator on the first scenes.

        Args:
            estimator: what to run.
            number: of scenes.
            counts: estimated number of sources of the first scenes, ``number`` or more of them.
        """
        true = self.scenes.num_sources.cpu()

        def looked(rows: slice) -> tuple[Answer, Positions]:
            answer = estimator.look(self.physics, self.scenes.select(rows))
            return answer, answer(slice(None), true[rows].to(self.device)).to("cpu")

        parts, cost = self._timed(estimator.title, looked, number)
        known = concatenated([positions for _, positions in parts])
        if counts is None:
            return Run(known=known, counted=None, cost=cost)

        def counted(rows: slice) -> Positions:
            batch: int = rows.start // BATCH_SCENES
            answer, positions = parts[batch]
            # Scenes are independent: where the count is right, the positions are those known already.
            other = (counts[rows] != true[rows]).nonzero().squeeze(-1)
            if not len(other):
                return positions
            found = answer(other.to(self.device), counts[rows][other].to(self.device))
            return positions.replaced(other, found.to("cpu"))

        again = self._in_batches(f"{estimator.title}, sources counted", counted, number)
        return Run(known=known, counted=concatenated(again), cost=cost)

    def batches(self, what: str, count: int) -> Iterator[slice]:
        """Yield slices of the first ``count`` scenes, and tell of each."""
        for rows in _slices(count):
            self.told(what, rows.start, count)
            yield rows
        self.told(what, count, count)

    @property
    def device(self) -> torch.device:
        """Where the scenes are."""
        return self.scenes.snapshots.device

    def _in_batches(self, what: str, work: Callable[[slice], _Part], count: int) -> list[_Part]:
        """Run ``work`` on batches of the first ``count`` scenes, some at the same time, in order."""
        threads = torch.get_num_threads()

        def alone(rows: slice) -> _Part:
            # Both hold for one thread of Python only: a worker starts with gradients and all cores.
            torch.set_num_threads(threads)
            with torch.no_grad():
                return work(rows)

        pool = ThreadPoolExecutor(self.workers)
        try:
            pending = [pool.submit(alone, rows) for rows in _slices(count)]
            return [pending[number].result() for number, _ in enumerate(self.batches(what, count))]
        finally:
            pool.shutdown(cancel_futures=True)

    def _timed(
        self, what: str, work: Callable[[slice], _Part], count: int
    ) -> tuple[list[_Part], Cost]:
        """Run ``work`` on batches of the first ``count`` scenes, once untimed on one of them."""
        with torch.no_grad():
            work(slice(0, 1))  # grids are laid out and remembered, libraries wake up
        wall, processor = time.perf_counter(), time.process_time()
        parts = self._in_batches(what, work, count)
        cost = Cost(
            wall_s=(time.perf_counter() - wall) / count,
            processor_s=(time.process_time() - processor) / count,
            scenes=count,
        )
        return parts, cost


def _slices(count: int) -> Iterator[slice]:
    for start in range(0, count, BATCH_SCENES):
        yield slice(start, min(start + BATCH_SCENES, count))
