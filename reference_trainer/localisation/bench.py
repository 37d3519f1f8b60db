"""Runs estimators and counts on one set of scenes in batches, and times them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from reference_trainer.localisation.report import Cost
from reference_trainer.positions import Positions, concatenated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from reference_trainer.localisation.counting import Counter
    from reference_trainer.localisation.estimators import Estimator, Refinement
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

    Told = Callable[[str, int, int], None]
    Work = Callable[[slice | Tensor], Positions]

BATCH_SCENES = 200
"""Scenes between two reports of progress; more would not be faster."""

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
    """

    physics: ScenePhysics
    scenes: Scenes
    told: Told

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

        def located(numbers: Tensor) -> Work:
            def work(rows: slice | Tensor) -> Positions:
                scenes, chosen = self.scenes.select(rows), numbers[rows].to(self.device)
                return estimator.locate(self.physics, scenes, chosen).to("cpu")

            return work

        known = located(self.scenes.num_sources.cpu())
        counted = None if counts is None else located(counts)
        return self._run(estimator.title, number, known, counted, counts)

    def refine(self, refinement: Refinement, start: Run, counts: Tensor | None) -> Run:
        """Refine the positions of a run; its cost is included.

        Args:
            refinement: what to run.
            start: what to begin with.
            counts: the estimated number of sources that ``start`` was given.
        """

        def refined(positions: Positions) -> Work:
            def work(rows: slice | Tensor) -> Positions:
                scenes, begin = self.scenes.select(rows), positions.select(rows).to(self.device)
                return refinement.refine(self.physics, scenes, begin).to("cpu")

            return work

        known = refined(start.known)
        counted = None if start.counted is None else refined(start.counted)
        run = self._run(refinement.title, len(start.known), known, counted, counts)
        cost = Cost(
            wall_s=start.cost.wall_s + run.cost.wall_s,
            processor_s=start.cost.processor_s + run.cost.processor_s,
            scenes=run.cost.scenes,
        )
        return Run(known=run.known, counted=run.counted, cost=cost)

    def batches(self, what: str, count: int) -> Iterator[slice]:
        """Yield slices of the first ``count`` scenes, and tell of each."""
        for start in range(0, count, BATCH_SCENES):
            self.told(what, start, count)
            yield slice(start, min(start + BATCH_SCENES, count))
        self.told(what, count, count)

    @property
    def device(self) -> torch.device:
        """Where the scenes are."""
        return self.scenes.snapshots.device

    def _run(
        self, title: str, number: int, known: Work, counted: Work | None, counts: Tensor | None
    ) -> Run:
        parts, cost = self._timed(title, known, number)
        positions = concatenated(parts)
        if counted is None or counts is None:
            return Run(known=positions, counted=None, cost=cost)
        # Scenes are independent: where the count is right, the positions are those known already.
        other = (counts[:number] != positions.num_sources).nonzero().squeeze(-1)
        again = positions.select(torch.arange(number))
        for rows in self.batches(f"{title}, sources counted", len(other)):
            found = counted(other[rows])
            for name in ("azimuth_rad", "elevation_rad", "range_m", "active"):
                getattr(again, name)[other[rows]] = getattr(found, name)
        return Run(known=positions, counted=again, cost=cost)

    def _timed(
        self, what: str, work: Callable[[slice], _Part], count: int
    ) -> tuple[list[_Part], Cost]:
        """Run ``work`` on batches of the first ``count`` scenes, once untimed on one of them."""
        work(slice(0, 1))  # grids are laid out and remembered, libraries wake up
        parts, wall_s, processor_s = [], 0.0, 0.0
        for rows in self.batches(what, count):
            wall, processor = time.perf_counter(), time.process_time()
            parts.append(work(rows))
            wall_s += time.perf_counter() - wall
            processor_s += time.process_time() - processor
        return parts, Cost(wall_s=wall_s / count, processor_s=processor_s / count, scenes=count)
