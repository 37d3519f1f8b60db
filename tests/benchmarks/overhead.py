"""What the default guard costs: step-time ratios with guard / without, memory, host reads.

    python -m tests.benchmarks.overhead [--json FILE] [--steps N] [--torch-clip]

Two identical trainings take turns, step by step, in one process; the guard sits on one of them for half
of the run and then on the other, so that neither memory layout nor drift of the machine's speed can
favour one side. Other work on the machine only ever adds time, a sixth to single steps here: of the times of
each side the quickest quarter counts, taken apart for each place in a cycle of as many steps as the guard
collects records before it makes them, so that every cycle pays for its own. A ratio is that of ordinary
cycles, plus the share of those with a step measured in detail. One torch thread: on small virtual machines two
are slower and noisier.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

import gradguard as gg
from gradguard.testing import count_host_reads
from reference_trainer.settings import preset
from tests.benchmarks.ris import ris_training

DETAIL_EVERY = 50
LAG = 8
"""Records that the guard collects before it makes them, and so the steps of one cycle: its default."""


@dataclass(frozen=True)
class Training:
    """One training that can be stepped; ``step(guard)`` tells the guard its loss."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[gg.Guard | None], None]


def mlp300(*, fused: bool = False) -> Training:
    """Return the unfavourable case: 300 small tensors (150 layers of width 53), batch 32, AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(53, 53), nn.ReLU()) for _ in range(150)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    x = torch.randn(32, 53)

    def step(guard: gg.Guard | None) -> None:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.observe(loss=loss)

    return Training(model, optimizer, step)


def timed(work: Callable[[], None]) -> float:
    """Return the seconds ``work`` took."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def step_ratio(make: Callable[[], Training], *, steps: int) -> float:
    """Return step time with guard over step time without, over two halves of ``steps`` steps each."""
    pair = make(), make()
    for training in pair:
        for _ in range(3):
            training.step(None)
    halves = [one_half(pair[i], pair[1 - i], steps=steps) for i in (0, 1)]
    return math.sqrt(halves[0] * halves[1])


def one_half(guarded: Training, bare: Training, *, steps: int) -> float:
    """Return the ratio with the guard on ``guarded``: of ordinary steps, plus what detailed ones add."""
    ordinary = cycle_ratio(guarded, bare, steps=steps, detail_every=100 * steps)
    detailed = cycle_ratio(guarded, bare, steps=steps // 2, detail_every=LAG)
    return ordinary + max(0.0, detailed - ordinary) * LAG / DETAIL_EVERY


def cycle_ratio(guarded: Training, bare: Training, *, steps: int, detail_every: int) -> float:
    """Return the time of a cycle of ``LAG`` steps with guard over one without, the two taking turns.

    What is done once, such as looking at the whole model, is over before the first step that counts.
    """
    with_guard: list[float] = []
    without: list[float] = []
    with gg.watch(guarded.model, guarded.optimizer, detail_every=detail_every, lag=LAG) as guard:
        for index in range(2 * LAG + steps):
            turns = [
                (with_guard, lambda: guarded.step(guard)),
                (without, lambda: bare.step(None)),
            ]
            for times, work in turns if index % 2 else reversed(turns):
                times.append(timed(work))
    return quiet_cycle(with_guard[2 * LAG :]) / quiet_cycle(without[2 * LAG :])


def quiet_cycle(times: list[float]) -> float:
    """Return the time of ``LAG`` steps: at each place of the cycle the mean of the quickest quarter."""
    places = [sorted(times[place::LAG]) for place in range(LAG)]
    return sum(statistics.mean(place[: math.ceil(len(place) / 4)]) for place in places)


def memory_fraction(make: Callable[[], Training]) -> float:
    """Return the bytes of tensors that the guard holds after some steps over the bytes of parameters.

    Counted over every live tensor storage, before and after attaching.
    """
    training = make()
    training.step(None)
    before = live_bytes()
    guard = gg.watch(training.model, training.optimizer, detail_every=DETAIL_EVERY, lag=LAG)
    for _ in range(4):
        training.step(guard)
    extra = live_bytes() - before
    guard.detach()
    return extra / sum(p.numel() * p.element_size() for p in training.model.parameters())


def live_bytes() -> int:
    """Return the bytes of all tensor storages that are alive."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at every object wakes deprecated ones
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def host_reads_per_step(make: Callable[[], Training], *, steps: int = 20) -> float:
    """Return the host reads that the guard adds per step."""
    training = make()
    bare = count_host_reads(lambda: [training.step(None) for _ in range(steps)])
    with gg.watch(training.model, training.optimizer) as guard:
        guarded = count_host_reads(lambda: [training.step(guard) for _ in range(steps)])
    return (guarded - bare).total() / steps


def ris(*, clipped_by_torch: bool = False) -> Training:
    """Return the full RIS model at batch 64, as the overfit preset trains it."""
    return Training(*ris_training(preset("overfit"), clipped_by_torch=clipped_by_torch))


def main() -> None:
    """Measure and print; write the figures as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--steps", type=int, default=120, help="ordinary RIS steps per half (default 120)"
    )
    parser.add_argument(
        "--torch-clip", action="store_true", help="measure the RIS model with torch's clipping too"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "mlp300_ratio": step_ratio(mlp300, steps=3 * options.steps),
        "mlp300_fused_ratio": step_ratio(lambda: mlp300(fused=True), steps=3 * options.steps),
        "ris_ratio": step_ratio(ris, steps=options.steps),
        "memory_fraction": memory_fraction(ris),
        "host_reads_per_step": host_reads_per_step(mlp300),
    }
    if options.torch_clip:
        make = partial(ris, clipped_by_torch=True)
        figures["ris_torch_clip_ratio"] = step_ratio(make, steps=options.steps)
    limits = {"ris_ratio": 1.02, "mlp300_ratio": 1.10, "memory_fraction": 0.02}
    for name, value in figures.items():
        limit = f"   (at most {limits[name]})" if name in limits else ""
        print(f"{name:20s} {value:8.4f}{limit}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
