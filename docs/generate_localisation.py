r"""Writes the page of localisation from an evaluation and the runs it judged.

python -m reference_trainer evaluate runs/constant runs/iid --scenes 1000 --subset 1000 \
    --seed 1 --json found.json
python docs/generate_localisation.py found.json runs/constant runs/iid
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reference_trainer.localisation.cells import medians, number, percent, table
from reference_trainer.localisation.report import (
    Breakdown,
    EstimatorReport,
    NetworkReport,
    Report,
)
from reference_trainer.localisation.report_file import read_report
from reference_trainer.localisation.tables import markdown_tables

PAGE = Path(__file__).parent / "explanation" / "localisation.md"
MARK = "<!-- Everything below is written by docs/generate_localisation.py. -->\n"

SAMPLED = ("fitted_music", "field_music")
ANGLES = ("azimuth_deg", "elevation_deg")


def row(network: NetworkReport, key: str) -> EstimatorReport:
    """Return the estimator called ``key``."""
    return next(one for one in network.estimators if one.key == key)


def whole(network: NetworkReport, key: str) -> Breakdown:
    """Return the errors of an estimator on all scenes, number known.

    Raises:
        ValueError: it only ran on the subset.
    """
    errors = row(network, key).known.all
    if errors is None:
        raise ValueError(f"{key} was not measured on all scenes")
    return errors


def triple(part: Breakdown, *, high: bool = False) -> str:
    """Return the three medians."""
    return ", ".join(medians(part.high_snr if high else part.overall))


def ratios_to(network: NetworkReport, key: str) -> str:
    """Return the median errors of network-started ML over those of an estimator, on the subset."""
    mine = row(network, "ml_network").known.subset.overall
    other = row(network, key).known.subset.overall
    names = (*ANGLES, "range_m")
    return ", ".join(
        number(getattr(mine, name).median / getattr(other, name).median) for name in names
    )


def times_faster(network: NetworkReport, key: str) -> str:
    """Return how many times the processor time of network-started ML an estimator takes."""
    return number(
        row(network, key).cost.processor_s / row(network, "ml_network").cost.processor_s, 1
    )


def bins_won(network: NetworkReport, key: str, other: str) -> str:
    """Return in how many bins of SNR one estimator has smaller medians than another, by angle."""
    pairs = list(zip(whole(network, key).by_snr, whole(network, other).by_snr, strict=True))
    won = [
        sum(
            getattr(one.summary, angle).median < getattr(two.summary, angle).median
            for one, two in pairs
        )
        for angle in ANGLES
    ]
    return f"{won[0]} and {won[1]} of {len(pairs)}"


def accuracy(network: NetworkReport, key: str, *, subset: bool = False) -> str:
    """Return the share of scenes with the right number of sources."""
    counter = next(one for one in network.counters if one.key == key)
    counts = counter.subset if subset or counter.all is None else counter.all
    return percent(counts.overall.accuracy)


def efficiency(network: NetworkReport) -> str:
    """Return error over bound, over 0.6745, of network-started ML with one source."""
    single = whole(network, "ml_network").single_source
    if single is None:
        return "-"
    return ", ".join(number(value) for value in (single.azimuth, single.elevation, single.range))


def summary(report: Report) -> str:
    """Return what the networks reach, in one table."""
    lines = {
        "network-started ML: median azimuth, elevation (deg), range (m)": lambda n: triple(
            whole(n, "ml_network")
        ),
        "the same at 10 dB and more": lambda n: triple(whole(n, "ml_network"), high=True),
        "its medians over those of ML from scratch, same scenes": lambda n: ratios_to(
            n, "ml_scratch"
        ),
        "its medians over those of ML from scratch on our coarser grid": lambda n: ratios_to(
            n, "ml_scratch_coarse"
        ),
        "times faster than ML from scratch": lambda n: times_faster(n, "ml_scratch"),
        "times faster than ML from scratch on our coarser grid": lambda n: times_faster(
            n, "ml_scratch_coarse"
        ),
        "K = 1: median error over 0.67 of the bound": efficiency,
        "the same ML without the network": lambda n: triple(whole(n, "ml_field")),
        "bins of SNR in which the network improves ML, azimuth and elevation": lambda n: bins_won(
            n, "ml_network", "ml_field"
        ),
        "network + MUSIC (hybrid)": lambda n: triple(whole(n, "network_music")),
        "bins of SNR in which it beats MUSIC on the fitted covariance, azimuth and elevation": (
            lambda n: bins_won(n, "network_music", "fitted_music")
        ),
        "bins in which it beats MUSIC on the field estimate": lambda n: bins_won(
            n, "network_music", "field_music"
        ),
        "the hybrid without the network": lambda n: triple(whole(n, "refitted_music")),
        "bins in which the network improves the hybrid": lambda n: bins_won(
            n, "network_music", "refitted_music"
        ),
        "network alone + MUSIC": lambda n: triple(whole(n, "network_alone_music")),
        "number of sources right: K head": lambda n: accuracy(n, "head"),
        "MDL": lambda n: accuracy(n, "mdl"),
        "K head and BIC of the ML fits, on the subset": lambda n: (
            f"{accuracy(n, 'head', subset=True)}, {accuracy(n, 'bic', subset=True)}"
        ),
        "network paths and counts, number known and estimated, all scenes (s)": lambda n: number(
            n.network_paths_wall_s, 0
        ),
    }
    header = ["", *(network.symbols for network in report.networks)]
    return table(header, ([name, *map(cell, report.networks)] for name, cell in lines.items()))


def training(run: Path) -> list[str]:
    """Return what a run was: scenes, steps, minutes, and its evaluations at the end."""
    epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    ended = [step["ended_unix_s"] for step in steps if step.get("ended_unix_s")]
    config = json.loads((run / "run.json").read_text())["config"]
    best = min(epochs[1:], key=lambda epoch: epoch["held_out"]["covariance"])
    trained = epochs[-1]["epoch"] * config["scenes"]["train"]
    return [
        config["scenes"]["symbols"],
        f"{epochs[-1]['epoch']} of {config['optimization']['epochs']}",
        f"{epochs[-1]['steps_taken']:,}",
        f"{trained:,}",
        number((max(ended) - min(ended)) / 60, 1),
        f"{best['epoch']}",
        number(best["held_out"]["covariance"], 3),
        percent(best["held_out"]["source_count_accuracy"]),
        f"{config['scenes']['seed']} and {config['network']['seed']}",
    ]


def main() -> None:
    """Write what was measured below the mark of the page."""
    found, *runs = (Path(argument) for argument in sys.argv[1:])
    report = read_report(found)
    columns = [
        "symbols",
        "epochs",
        "steps",
        "fresh scenes",
        "minutes",
        "best epoch",
        "its held-out NMSE",
    ]
    columns += ["its K accuracy", "seeds of scenes and network"]
    text = "\n".join(
        [
            "## The runs\n",
            table(columns, map(training, runs)),
            "Minutes from the first optimizer step to the last, evaluations between them included.\n",
            "## In short\n",
            summary(report),
            markdown_tables(report),
        ]
    )
    before = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(f"{before}{MARK}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
