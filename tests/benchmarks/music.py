"""What MUSIC and the fitted sample covariance cost a scene, beside loops over single places.

    python -m tests.benchmarks.music [--json FILE] [--scenes N] [--loop-scenes N]

One torch thread, one process, the two ways interleaved, in processor time (a loaded machine is no slower
in it). The loop is MUSIC as textbooks write it, on the same grid: an eigendecomposition of the dense
covariance, steering vector and null spectrum at one place after the other, suppressed neighbours, line
searches. ``ready`` is a loop that finds its steering vectors made, as the batched search does. All run
on the exact covariance, so all must find the truth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from reference_trainer.matching import source_errors
from reference_trainer.metrics import summarise
from reference_trainer.music import OVERSAMPLING, music
from reference_trainer.physics import ScenePhysics
from reference_trainer.positions import Positions, true_positions
from reference_trainer.sample_covariance import fitted_factor
from reference_trainer.scenes import Scenes, draw_scenes
from reference_trainer.search_grid import search_grid
from tests.reference_trainer.localisation_oracles import (
    Array,
    Place,
    music_point_by_point,
    steering,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def timed(work: Callable[[], object]) -> float:
    """Return the processor seconds of one call."""
    started_s = time.process_time()
    work()
    return time.process_time() - started_s


def grid_places(physics: ScenePhysics) -> tuple[list[Place], list[Array]]:
    """Return the places of the batched search, one by one, and their steering vectors."""
    grid = search_grid(physics, oversampling=OVERSAMPLING, device=torch.device("cpu"))
    places = [
        (azimuth, elevation, 1 / inverse) for azimuth, elevation, inverse in grid.places.tolist()
    ]
    return places, [steering(physics, *place) for place in places]


def as_positions(found: list[list[Place]], slots: int) -> Positions:
    """Return the places of every scene as positions."""
    values = torch.ones(len(found), slots, 3, dtype=torch.float64)
    active = torch.zeros(len(found), slots, dtype=torch.bool)
    for scene, places in enumerate(found):
        values[scene, : len(places)] = torch.tensor(places, dtype=torch.float64)
        active[scene, : len(places)] = True
    azimuth, elevation, range_m = values.unbind(-1)
    return Positions(azimuth_rad=azimuth, elevation_rad=elevation, range_m=range_m, active=active)


def compare(scenes: Scenes, physics: ScenePhysics, *, loop_scenes: int) -> dict[str, float]:
    """Return the seconds a scene of both ways, and how far from the truth each ends."""
    places, vectors = grid_places(physics)
    truth = true_positions(scenes)
    music(physics, scenes.true_factor, scenes.num_sources)
    batched_s, loop_s, found = [], [], []
    for scene in range(loop_scenes):
        factor = scenes.true_factor[scene].numpy().astype(np.complex128)
        covariance, count = factor @ factor.conj().T, int(scenes.num_sources[scene])
        started_s = time.process_time()
        found.append(music_point_by_point(physics, covariance, count, places, vectors))
        loop_s.append(time.process_time() - started_s)
        batched_s.append(timed(lambda: music(physics, scenes.true_factor, scenes.num_sources)))
    steering_s = timed(lambda: [steering(physics, *place) for place in places])
    located = music(physics, scenes.true_factor, scenes.num_sources)
    batched = summarise(source_errors(located, truth))
    few = truth.select(slice(0, loop_scenes))
    looped = summarise(source_errors(as_positions(found, physics.max_sources), few))
    per_scene_s, ready_s = float(np.median(batched_s)) / len(scenes), float(np.mean(loop_s))
    per_loop_s = ready_s + steering_s
    return {
        "grid_places": len(places),
        "batched_ms_per_scene": 1e3 * per_scene_s,
        "loop_ms_per_scene": 1e3 * per_loop_s,
        "ready_loop_ms_per_scene": 1e3 * ready_s,
        "times_faster": per_loop_s / per_scene_s,
        "times_faster_than_ready": ready_s / per_scene_s,
        "batched_within_1_deg": batched.within_1_deg or 0.0,
        "loop_within_1_deg": looped.within_1_deg or 0.0,
        "batched_azimuth_rmse_deg": batched.azimuth_deg.rmse or 0.0,
        "loop_azimuth_rmse_deg": looped.azimuth_deg.rmse or 0.0,
    }


def fit_times(count: int) -> dict[str, float]:
    """Return the milliseconds a scene that the fitted covariance takes, by symbol model."""
    figures = {}
    for symbols in ("constant", "iid"):
        physics = ScenePhysics(symbols=symbols)
        scenes = draw_scenes(
            physics, seed=0, split="validation", indices=range(count), estimate=False
        )
        fitted_factor(physics, scenes.select(slice(0, 4)))
        seconds = min(timed(lambda p=physics, s=scenes: fitted_factor(p, s)) for _ in range(2))
        figures[f"fit_{symbols}_ms_per_scene"] = 1e3 * seconds / count
    return figures


def main() -> None:
    """Measure and print; write the figures as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--scenes", type=int, default=256, help="batched scenes (default 256)")
    parser.add_argument("--loop-scenes", type=int, default=8, help="looped scenes (default 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    physics = ScenePhysics()
    scenes = draw_scenes(
        physics, seed=0, split="validation", indices=range(options.scenes), estimate=False
    )
    figures = compare(scenes, physics, loop_scenes=min(options.loop_scenes, options.scenes))
    figures |= fit_times(64)
    limits = {"times_faster": "at least 50"}
    for name, value in figures.items():
        limit = f"   ({limits[name]})" if name in limits else ""
        print(f"{name:28s} {value:12.4f}{limit}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
