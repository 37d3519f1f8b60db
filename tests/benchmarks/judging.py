"""How long a judgement of a long run takes: the whole catalogue over a real log.

    python -m tests.benchmarks.judging [--json FILE] [--steps 10000]

A small model with a loader, a scheduler, terms and a validation split is trained under the guard, so that
nearly every rule has something to look at; then its log is judged, and judged again as it is read from disk.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradguard as gg

BATCHES = 100


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a smooth regression task."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 8, generator=generator)
        yield x, torch.tanh(x[:, :1] - x[:, 1:2])


def recorded(steps: int) -> gg.RunLog:
    """Return the log of a healthy run of so many steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with gg.watch(model, optimizer, plan=gg.Plan(steps=steps)) as guard:
        for epoch in range(steps // BATCHES):
            for x, y in guard.batches(batches(BATCHES, epoch)):
                fit = functional.mse_loss(model(x), y)
                size = model[0].weight.square().mean()
                loss = fit + 1e-4 * size
                guard.observe(loss=loss, terms={"fit": fit, "size": size}, targets=y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            with torch.no_grad():
                held = list(guard.batches(batches(2, 10**6), split="validation"))
                values = [functional.mse_loss(model(x), y) for x, y in held]
            guard.report("loss", torch.stack(values).mean(), split="validation", weights="live")
    return guard.log


def main() -> None:
    """Measure and print; write the figures as JSON when asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps (default 10000)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    log = recorded(options.steps)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        diagnosis = gg.diagnose(log)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    again = gg.RunLog.from_jsonl(log.to_jsonl())
    figures = {
        "steps": len(log),
        "judging_s": min(seconds),
        "reading_and_writing_s": time.perf_counter() - began,
        "rules": len(diagnosis.looked_at),
        "healthy": diagnosis.healthy and gg.diagnose(again).healthy,
    }
    for name, value in figures.items():
        print(f"{name:22s} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
