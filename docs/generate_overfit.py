"""Prints the table of epochs of the overfit page: python docs/generate_overfit.py RUN_60 RUN_100."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PUBLISHED_VALIDATION = (
    1.954220, 1.902692, 1.883437, 1.868573, 1.835492, 1.795977, 1.763915,
    1.723132, 1.690471, 1.665885, 1.638465, 1.619946, 1.612540, 1.609770,
)  # fmt: skip
SHOWN = (0, *range(1, 15), 20, 30, 40, 50, 60, 70, 80, 90, 100)


def epochs(run: Path) -> dict[int, dict[str, object]]:
    """Return the lines of ``epochs.jsonl`` by epoch."""
    lines = (run / "epochs.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["epoch"]: entry for entry in map(json.loads, lines)}


def cell(entry: dict[str, object] | None, part: str) -> str:
    """Return loss and NMSE of one set, or a dash where it was not evaluated."""
    seen = entry.get(part) if entry else None
    return f"{seen['loss']:.3f} ({seen['covariance']:.3f})" if isinstance(seen, dict) else "-"


def main() -> None:
    """Print the table."""
    short, long = (epochs(Path(argument)) for argument in sys.argv[1:3])
    runs = "memorised, 60 | held out, 60 | memorised, 100 | held out, 100"
    print(f"| epoch | steps | published validation loss | {runs} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for epoch in SHOWN:
        one, other = short.get(epoch), long.get(epoch)
        steps = next(e["steps_taken"] for e in (one, other) if e)
        known = 1 <= epoch <= len(PUBLISHED_VALIDATION)
        published = f"{PUBLISHED_VALIDATION[epoch - 1]:.3f}" if known else "-"
        cells = [cell(e, part) for e in (one, other) for part in ("memorised", "held_out")]
        print(f"| {epoch} | {steps} | {published} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
