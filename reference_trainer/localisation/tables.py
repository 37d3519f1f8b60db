"""A report as tables in Markdown, for the manual."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reference_trainer.localisation.cells import (
    DASH,
    bound_rows,
    bounds,
    measured,
    medians,
    number,
    percent,
    table,
)
from reference_trainer.localisation.report import HIGH_SNR_DB

if TYPE_CHECKING:
    from collections.abc import Callable

    from reference_trainer.localisation.report import (
        Breakdown,
        Conditions,
        Cost,
        CounterReport,
        Errors,
        EstimatorReport,
        NetworkReport,
        RankMeans,
        Report,
    )
    from reference_trainer.metrics import CountSummary, ErrorSummary

_ERROR_COLUMNS = (
    "scenes",
    "median azimuth, elevation (deg), range (m)",
    "error / bound",
    "RMSE",
    "within 1 / 2 / 5 deg",
    "missed",
    "false",
)


def markdown_tables(report: Report) -> str:
    """Return every table of a report, a section for each network."""
    sections = [_section(network, report.conditions) for network in report.networks]
    return "\n".join(sections)


def _section(network: NetworkReport, conditions: Conditions) -> str:
    parts = [
        (f"## Symbols: {network.symbols}", _introduction(network, conditions)),
        ("### Number of sources known", _errors(network, _known, _overall)),
        (
            "### Number of sources estimated",
            _errors(network, _estimated, _overall, counted=True),
        ),
        (f"### At least {HIGH_SNR_DB:g} dB, number known", _errors(network, _known, _high_snr)),
        (
            f"### The same {conditions.subset} scenes for all, number known",
            _on_subset(network),
        ),
        ("### Median azimuth and elevation (deg) by SNR, number known", _by_snr(network)),
        ("### Median azimuth and elevation (deg) by number of sources", _by_count(network)),
        ("### One source: median of error over bound, over 0.6745", _efficiency(network)),
        ("### Share of scenes with the right number of sources", _counting(network)),
        ("### Confusion: true number (rows) and estimated number", _confusions(network)),
        ("### What the rank of each covariance is worth: means", _ranks(network)),
        ("### Seconds a scene", _costs(network)),
    ]
    return "\n".join(f"{title}\n\n{body}" for title, body in parts)


def _introduction(network: NetworkReport, conditions: Conditions) -> str:
    origin, disjoint = network.origin, network.disjoint
    trained = origin.config["scenes"]
    source = {"memory": "the same", "disk": "the same", "fly": "fresh"}[trained["source"]]
    libraries = ", ".join(f"{name} {number}" for name, number in conditions.versions.items())
    return (
        f"The network: `{origin.checkpoint}` after {origin.epoch} epochs ({origin.steps_taken} steps) "
        f"of {trained['train']} scenes ({source} ones in every epoch, seed {trained['seed']}), network seed "
        f"{origin.config['network']['seed']}, weights {origin.weights[:12]}. "
        f"The scenes: the first {conditions.scenes} of split {conditions.split}, seed "
        f"{conditions.seed}; slow estimators run on the first {conditions.subset} of them. "
        f"{disjoint.reason[:1].upper()}{disjoint.reason[1:]}; the run was judged on {disjoint.watched} "
        f"of these scenes while it trained. Share of the fitted covariance in the blend: "
        f"{conditions.sample_share:g}. Device {conditions.device}, torch threads "
        f"{conditions.threads}, workers {conditions.workers}; {libraries}. "
        "The bound is the median of its root. Error / bound is the median of error over bound of "
        f"azimuth, elevation and range: 0.67 for an efficient estimator. {DASH}: not measured.\n"
    )


def _known(one: EstimatorReport) -> Errors | None:
    return one.known


def _estimated(one: EstimatorReport) -> Errors | None:
    return one.estimated


def _overall(part: Breakdown) -> ErrorSummary:
    return part.overall


def _high_snr(part: Breakdown) -> ErrorSummary:
    return part.high_snr


def _errors(
    network: NetworkReport,
    errors_of: Callable[[EstimatorReport], Errors | None],
    summary_of: Callable[[Breakdown], ErrorSummary],
    *,
    counted: bool = False,
) -> str:
    rows = []
    for one in network.estimators:
        errors = errors_of(one)
        if errors is not None:
            title = f"{one.title}, {one.counted_by}" if counted else one.title
            rows.append([title, *_error_cells(summary_of(measured(errors)))])
    for title, part in bound_rows(network):
        summary = summary_of(part)
        rows.append([title, str(summary.scenes), ", ".join(bounds(summary)), *[DASH] * 5])
    return table(["estimator", *_ERROR_COLUMNS], rows)


def _error_cells(summary: ErrorSummary) -> list[str]:
    coordinates = (summary.azimuth_deg, summary.elevation_deg, summary.range_m)
    within = (summary.within_1_deg, summary.within_2_deg, summary.within_5_deg)
    return [
        str(summary.scenes),
        ", ".join(medians(summary)),
        ", ".join(number(coordinate.median_over_bound) for coordinate in coordinates),
        ", ".join(number(coordinate.rmse) for coordinate in coordinates),
        " / ".join(percent(share) for share in within),
        str(summary.missed),
        str(summary.false),
    ]


def _on_subset(network: NetworkReport) -> str:
    """All estimators on the scenes of the slow ones, beside the first of them."""
    first = network.estimators[0]
    base = first.known.subset.overall
    rows = []
    for one in network.estimators:
        summary = one.known.subset.overall
        ratios = (
            _ratio(summary.azimuth_deg.median, base.azimuth_deg.median),
            _ratio(summary.elevation_deg.median, base.elevation_deg.median),
            _ratio(summary.range_m.median, base.range_m.median),
        )
        rows.append(
            [
                one.title,
                ", ".join(medians(summary)),
                ", ".join(number(ratio) for ratio in ratios),
                number(_ratio(first.cost.processor_s, one.cost.processor_s), 1),
            ]
        )
    header = ["estimator", "median azimuth, elevation (deg), range (m)"]
    return table([*header, f"ratio to {first.title}", "times faster (processor time)"], rows)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _by_snr(network: NetworkReport) -> str:
    bins = measured(network.estimators[0].known).by_snr
    header = ["estimator", *(f"{bin_.low_db:g} to {bin_.high_db:g} dB" for bin_ in bins)]
    rows = [
        [one.title, *(_angles(bin_.summary) for bin_ in measured(one.known).by_snr)]
        for one in network.estimators
    ]
    for title, part in bound_rows(network):
        rows.append([title, *(_angle_bounds(bin_.summary) for bin_ in part.by_snr)])
    return table(header, rows)


def _by_count(network: NetworkReport) -> str:
    parts = [measured(one.known) for one in network.estimators]
    counts = sorted({count for part in parts for count in part.by_count})

    def cells(part: Breakdown, cell: Callable[[ErrorSummary], str]) -> list[str]:
        return [cell(part.by_count[n]) if n in part.by_count else DASH for n in counts]

    rows = [
        [one.title, *cells(part, _angles)]
        for one, part in zip(network.estimators, parts, strict=True)
    ]
    rows += [[title, *cells(part, _angle_bounds)] for title, part in bound_rows(network)]
    return table(["estimator", *(f"K = {count}" for count in counts)], rows)


def _angles(summary: ErrorSummary) -> str:
    return f"{number(summary.azimuth_deg.median)}, {number(summary.elevation_deg.median)}"


def _angle_bounds(summary: ErrorSummary) -> str:
    azimuth, elevation = summary.azimuth_deg, summary.elevation_deg
    return f"{number(azimuth.median_bound)}, {number(elevation.median_bound)}"


def _efficiency(network: NetworkReport) -> str:
    rows = []
    for one in network.estimators:
        single = measured(one.known).single_source
        values = (None,) * 3 if single is None else (single.azimuth, single.elevation, single.range)
        rows.append([one.title, *(number(value) for value in values)])
    return table(["estimator", "azimuth", "elevation", "range"], rows)


def _counting(network: NetworkReport) -> str:
    def cells(one: CounterReport) -> list[str]:
        whole, subset = one.all, one.subset
        parts = (
            None if whole is None else whole.overall,
            None if whole is None else whole.high_snr,
            subset.overall,
            subset.high_snr,
        )
        return [DASH if part is None else _accuracy(part) for part in parts]

    high = f"{HIGH_SNR_DB:g} dB and more"
    header = ["counted by", "all scenes", high, "subset", f"subset, {high}"]
    return table(header, ([one.title, *cells(one)] for one in network.counters))


def _accuracy(summary: CountSummary) -> str:
    return f"{percent(summary.accuracy)} ({percent(summary.under)} under)"


def _confusions(network: NetworkReport) -> str:
    parts = []
    for one in network.counters:
        summary = (one.all or one.subset).overall
        counts = range(1, len(summary.confusion))
        header = [f"{one.title}, {summary.scenes} scenes", *map(str, counts)]
        rows = [[str(true), *(str(summary.confusion[true][n]) for n in counts)] for true in counts]
        parts.append(table(header, rows))
    return "\n".join(parts)


def _ranks(network: NetworkReport) -> str:
    header = ["covariance", "eigenvalues above 1e-6", "entropy rank", "participation ratio"]
    header += ["energy in the top K", "overlap with the true subspace", "chance"]
    return table(header, ([one.title, *_rank_cells(one.overall)] for one in network.covariances))


def _rank_cells(means: RankMeans) -> list[str]:
    return [
        number(means.count, 1),
        number(means.entropy_rank),
        number(means.participation_ratio),
        *(number(share, 3) for share in (means.energy_in_top, means.overlap, means.chance)),
    ]


def _costs(network: NetworkReport) -> str:
    def cells(cost: Cost) -> list[str]:
        return [number(cost.wall_s, 4), number(cost.processor_s, 4), str(cost.scenes)]

    rows = [[one.title, *cells(one.cost)] for one in network.estimators]
    rows += [[f"counting by {one.title}", *cells(one.cost)] for one in network.counters]
    whole = (
        f"All rows and counts of the network together, number known and estimated: "
        f"{network.network_paths_wall_s:.0f} s.\n"
    )
    return table(["what", "wall", "processor", "scenes"], rows) + "\n" + whole
