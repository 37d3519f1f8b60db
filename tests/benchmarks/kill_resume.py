"""Kill -9 a run at random moments, resume it each time, and compare its bits with a whole run's.

    python -m tests.benchmarks.kill_resume [--kills N] [--seed N] [--set KEY=VALUE ...] [--keep DIR]

The run is the ``smoke`` preset. Each part is killed after a random share of the time that the whole run
takes, so that starts, steps, evaluations and the writing of files are hit alike; then, until it is
over, the run is resumed. Exit status 1 if live weights, averaged weights, optimizer state, random
state, checkpoint or recorded epochs differ in a single bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.reference_trainer.kills import finish, kill_after, same_bits, timed


def killed_run(
    directory: Path, settings: list[str], *, kills: int, whole_s: float, seed: int
) -> int:
    """Kill the run at most ``kills`` times, then let it end; return how often it was killed."""
    moments = random.Random(seed)
    for number in range(kills):
        delay_s = moments.uniform(0.0, whole_s)
        if not kill_after(directory, settings, delay_s):
            return number
        has = ", ".join(sorted(p.name for p in directory.iterdir())) if directory.exists() else ""
        print(f"  killed after {delay_s:5.2f} s, left: {has or 'nothing'}", flush=True)
    finish(directory, settings)
    return kills


def main() -> int:
    """Kill until enough; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    parser.add_argument("--keep", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        whole_s = timed(folder / "whole", options.settings)
        print(f"the whole run took {whole_s:.1f} s", flush=True)
        killed, rounds, differ = 0, 0, 0
        while killed < options.kills:
            run = folder / f"killed-{rounds}"
            killed += killed_run(
                run,
                options.settings,
                kills=options.kills - killed,
                whole_s=whole_s,
                seed=options.seed + rounds,
            )
            same = same_bits(run, folder / "whole")
            differ += not same
            rounds += 1
            print(f"{killed} kills in {rounds} runs: {'same bits' if same else 'DIFFERENT'}")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
