"""Prints how well the diagnosis does on the zoo: python -m tests.faults [--json FILE] [--seeds 3]."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from gradguard.findings import FAMILIES
from tests.faults import FAULTS, HEALTHY
from tests.faults.judging import Calm, Verdict, judge_fault, judge_healthy, score


def main() -> None:
    """Run every loop with every seed, print the figures by family and what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per loop (default 3)")
    parser.add_argument("--only", default="", help="loops whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    faults = [one for one in FAULTS if options.only in one.name]
    cases = [one for one in HEALTHY if options.only in one.name]
    verdicts = [judge_fault(one, seed) for one in faults for seed in seeds]
    calm = [judge_healthy(one, seed) for one in cases for seed in seeds]
    console = Console()
    console.print(by_family(verdicts))
    for line in complaints(verdicts, calm):
        console.print(line, highlight=False, markup=False)
    figures = asdict(score(verdicts, calm))
    for name, value in figures.items():
        console.print(f"{name:22s} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def by_family(verdicts: list[Verdict]) -> Table:
    """Return one row of figures per family."""
    table = Table("family", "faults", "detected", "cause named", "place named", "median steps")
    for family in FAMILIES:
        own = [one for one in verdicts if one.fault.family == family]
        if own:
            figures = score(own, [])
            shares = (figures.detected, figures.cause_named, figures.place_named)
            count = str(len({one.fault.name for one in own}))
            table.add_row(family, count, *(f"{s:.0%}" for s in shares), str(figures.median_steps))
    return table


def complaints(verdicts: list[Verdict], calm: list[Calm]) -> list[str]:
    """Return a line for everything that was missed, misnamed or invented."""
    lines = []
    for one in verdicts:
        roots = [(c.finding.code, c.finding.place) for c in one.diagnosis.causes]
        head = f"{one.fault.name} (seed {one.seed}), expected {'/'.join(one.fault.codes)}"
        if not one.detected:
            lines.append(f"MISSED    {head}")
        elif not one.cause_named:
            lines.append(f"MISNAMED  {head}: {roots}")
        elif one.place_named is False:
            lines.append(f"MISPLACED {head} at {one.fault.place}: {roots}")
        if not one.twin.healthy:
            lines.append(f"INVENTED  on the twin of {head}:\n{one.twin}")
    lines += [
        f"INVENTED  {other.case.name} (seed {other.seed}):\n{other.diagnosis}"
        for other in calm
        if not other.diagnosis.healthy
    ]
    return lines


if __name__ == "__main__":
    main()
