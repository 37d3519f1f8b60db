"""What the reference trainer costs: scenes generated per second, and where a training step goes.

    python -m tests.benchmarks.trainer [--json FILE] [--steps N]

The RIS model as the overfit preset trains it, batch 64, without the guard, one torch thread. Times are
medians. The loss is timed forward only and, on a prediction cut from the network, with its own
backward: ``backward_s`` holds both backwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reference_trainer.data import draw_data
from reference_trainer.loss import loss_terms, weighted_sum
from reference_trainer.physics import ScenePhysics
from reference_trainer.scenes import draw_scenes
from reference_trainer.settings import preset
from reference_trainer.setup import Parts, assemble
from tests.benchmarks.ris import torch_clipping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reference_trainer.examples import Examples

WARM_UP_STEPS = 2


class Stopwatch:
    """Collects seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block under ``name``."""
        started_s = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - started_s)

    def medians(self) -> dict[str, float]:
        """Return the median of every name."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


def scenes_per_s(*, estimate: bool, count: int = 512, rounds: int = 5) -> float:
    """Return scenes drawn per second, the best of some rounds over different scenes."""
    seconds = []
    for number in range(rounds):
        indices = range(number * count, (number + 1) * count)
        started_s = time.perf_counter()
        draw_scenes(ScenePhysics(), seed=0, split="train", indices=indices, estimate=estimate)
        seconds.append(time.perf_counter() - started_s)
    return count / min(seconds)


def timed_step(parts: Parts, examples: Examples, watch: Stopwatch) -> None:
    """Do what ``training_step`` does, in four timed stages."""
    with watch("step_s"):
        with watch("forward_s"):
            prediction = parts.model(examples.observed)
        with watch("loss_s"):
            loss = weighted_sum(loss_terms(prediction, examples), parts.objective.weights)
        with watch("backward_s"):
            loss.backward()
        with watch("optimizer_s"):
            torch_clipping(list(parts.model.parameters()), parts.clip_norm)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            parts.schedule.step()
            parts.averaged.update()


def timed_loss(parts: Parts, examples: Examples, watch: Stopwatch) -> None:
    """Time the loss forward and backward on a prediction that leads nowhere."""
    with torch.no_grad():
        prediction = parts.model(examples.observed)
    leaves = type(prediction)(
        *(getattr(prediction, name).requires_grad_() for name in prediction.__slots__)
    )
    with watch("loss_with_backward_s"):
        weighted_sum(loss_terms(leaves, examples), parts.objective.weights).backward()


def step_times(steps: int) -> dict[str, float]:
    """Return the median seconds of a training step and of its stages."""
    config, device = preset("overfit"), torch.device("cpu")
    parts = assemble(config, device)
    data = draw_data(config.scenes, device=device)
    batches = torch.arange(len(data.memorised)).split(config.optimization.batch_scenes)
    watch = Stopwatch()
    for number in range(WARM_UP_STEPS + steps):
        if number == WARM_UP_STEPS:
            watch = Stopwatch()
        batch = data.memorised.select(batches[number % len(batches)])
        timed_step(parts, batch, watch)
        timed_loss(parts, batch, watch)
    return watch.medians()


def main() -> None:
    """Measure and print; write the figures as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--steps", type=int, default=15, help="training steps (default 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "scenes_per_s": scenes_per_s(estimate=False),
        "scenes_with_estimate_per_s": scenes_per_s(estimate=True),
        **step_times(options.steps),
    }
    figures["loss_share"] = figures["loss_with_backward_s"] / figures["step_s"]
    limits = {"scenes_per_s": "at least 2000", "loss_share": "at most 0.10"}
    for name, value in figures.items():
        limit = f"   ({limits[name]})" if name in limits else ""
        print(f"{name:28s} {value:10.4f}{limit}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
