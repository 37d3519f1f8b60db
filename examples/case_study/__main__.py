"""Runs the published pipeline with each of its faults alone and with all, and prints the diagnosis.

Run: python -m examples.case_study [--only SLUG] [--epochs 3]
"""

from __future__ import annotations

import argparse
import sys

import torch

import gradguard as gg
from examples.case_study.faults import ALL, Fault, by_slug
from examples.case_study.pipeline import EPOCHS, run

ENOUGH = 14


def main(arguments: list[str] | None = None) -> int:
    """Print what the guard says; return 0 when at least 14 of the 17 faults are named when alone."""
    parser = argparse.ArgumentParser(prog="python -m examples.case_study", description=__doc__)
    parser.add_argument("--only", type=by_slug, help="one fault, by its name in the table")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of 8 batches")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # small batches: a second thread costs more than it brings
    if options.only is not None:
        print(run(frozenset((options.only,)), epochs=options.epochs))
        return 0
    print("without any fault:", first_line(run(frozenset(), epochs=options.epochs)))
    named = sum(alone(number, fault, options.epochs) for number, fault in enumerate(Fault, 1))
    print(f"\n{named} of {len(Fault)} faults are named when alone\n\nall of them at once:")
    print(run(ALL, epochs=3 * options.epochs))  # of which each takes one step
    return 0 if named >= ENOUGH else 1


def alone(number: int, fault: Fault, epochs: int) -> bool:
    """Run one fault alone and print whether a root cause names it."""
    diagnosis = run(frozenset((fault,)), epochs=epochs)
    named = is_named(fault, diagnosis)
    causes = ", ".join(
        f"{c.finding.code} {c.finding.place or ''}".strip() for c in diagnosis.causes
    )
    verdict = "named " if named else "MISSED"
    print(f"{number:2d} {verdict} {fault.slug:24s} {fault.value.what:52s} {causes or 'nothing'}")
    return named


def is_named(fault: Fault, diagnosis: gg.Diagnosis) -> bool:
    """Whether one of the root causes is a rule that names the fault."""
    return any(cause.finding.code in fault.value.codes for cause in diagnosis.causes)


def first_line(diagnosis: gg.Diagnosis) -> str:
    """Return the verdict without what was looked at."""
    return str(diagnosis).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
