"""A report as figures: PNG files drawn by matplotlib without a display."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from reference_trainer.errors import DataError
from reference_trainer.localisation.cells import measured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from reference_trainer.localisation.example import Example
    from reference_trainer.localisation.report import NetworkReport, Report
    from reference_trainer.metrics import SnrBin
    from reference_trainer.positions import Positions

_COORDINATES = ("azimuth_deg", "elevation_deg", "range_m")
_MARKERS = ("x", "+", "1")
_SMALLEST_SHARE = 1e-7  # an eigenvalue of 0 has no place on a logarithmic axis


def write_figures(report: Report, examples: Sequence[Example], directory: Path) -> tuple[Path, ...]:
    """Write four figures for every network of a report; return their paths.

    Args:
        report: what was measured.
        examples: a scene for each network, in their order.
        directory: made with its parents; files of the same names are replaced.

    Raises:
        DataError: a file could not be written.
    """
    written = []
    for place, (network, example) in enumerate(zip(report.networks, examples, strict=True), 1):
        figures = {
            "error-by-snr": error_by_snr(network),
            "spectrum": spectrum(example),
            "eigenvalues": eigenvalues(example),
            "confusion": confusion(network),
        }
        for name, figure in figures.items():
            path = directory / f"{name}-{place}-{network.symbols}.png"
            _save(figure, path)
            written.append(path)
    return tuple(written)


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise DataError(f"could not write {path}: {error.strerror or error}") from error


def error_by_snr(network: NetworkReport) -> Figure:
    """Return median errors against SNR, one line an estimator, beside the bound."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    for axes, coordinate in zip(figure.subplots(1, 3), _COORDINATES, strict=True):
        whole = None
        for one in network.estimators:
            if one.key == "true_music":  # its error is 0 but for rounding
                continue
            bins = measured(one.known).by_snr
            whole = one.known.all.by_snr if whole is None and one.known.all else whole
            _line(axes, bins, coordinate, "median", label=one.title, marker=".")
        bins = whole or network.estimators[0].known.subset.by_snr
        _line(axes, bins, coordinate, "median_bound", label="bound", color="black", linestyle="--")
        axes.set(yscale="log", xlabel="SNR (dB)", ylabel=_label(coordinate))
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.suptitle(f"symbols: {network.symbols}; number of sources known")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _label(coordinate: str) -> str:
    name, unit = coordinate.rsplit("_", 1)
    return f"median {name} error ({unit})"


def _line(axes: Axes, bins: tuple[SnrBin, ...], coordinate: str, part: str, **look: str) -> None:
    middle = [(bin_.low_db + bin_.high_db) / 2 for bin_ in bins]
    values = [getattr(getattr(bin_.summary, coordinate), part) for bin_ in bins]
    heights = [np.nan if value is None else max(value, 1e-6) for value in values]
    axes.plot(middle, heights, **look)  # type: ignore[arg-type]


def spectrum(example: Example) -> Figure:
    """Return the pseudo-spectrum of a scene with its true and its estimated sources."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    azimuth, elevation = example.azimuth_deg.numpy(), example.elevation_deg.numpy()
    mesh = axes.pcolormesh(azimuth, elevation, example.spectrum_db.numpy(), shading="nearest")
    figure.colorbar(mesh, label="pseudo-spectrum (dB), largest over the ranges")
    places = _places_deg(example.true)
    axes.plot(*places, "o", label="truth", markerfacecolor="none", color="white", markersize=12)
    for marker, (title, positions) in zip(_MARKERS, example.estimates.items(), strict=False):
        axes.plot(*_places_deg(positions), marker, label=title, color="red", markersize=9)
    axes.set(xlabel="azimuth (deg)", ylabel="elevation (deg)")
    axes.set_title(f"scene {example.index}: {len(places[0])} sources, {example.snr_db:.1f} dB")
    axes.legend(fontsize="small", facecolor="grey", labelcolor="white", framealpha=0.8)
    return figure


def _places_deg(positions: Positions) -> tuple[list[float], list[float]]:
    active = positions.active[0]
    azimuth = np.degrees(positions.azimuth_rad[0, active].double().numpy())
    elevation = np.degrees(positions.elevation_rad[0, active].double().numpy())
    return azimuth.tolist(), elevation.tolist()


def eigenvalues(example: Example) -> Figure:
    """Return the largest eigenvalues of the four covariances of a scene."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for title, values in example.eigenvalues.items():
        shares = values.double().numpy()
        heights = np.where(shares > _SMALLEST_SHARE, shares, np.nan)
        axes.plot(np.arange(1, len(heights) + 1), heights, marker="o", label=title)
    axes.set(yscale="log", xlabel="number of the eigenvalue", ylabel="share of the trace")
    count = int(example.true.num_sources[0])
    axes.set_title(f"scene {example.index}: {count} sources, {example.snr_db:.1f} dB")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def confusion(network: NetworkReport) -> Figure:
    """Return the true against the estimated number of sources, one panel a way to count."""
    count = len(network.counters)
    figure = Figure(figsize=(3.4 * count, 3.8), layout="constrained")
    for axes, one in zip(figure.subplots(1, count), network.counters, strict=True):
        summary = (one.all or one.subset).overall
        scenes = np.array(summary.confusion)[1:, 1:]
        shares = scenes / np.maximum(scenes.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", origin="lower")
        for (row, column), value in np.ndenumerate(scenes):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, str(value), ha="center", va="center", color=colour)
        ticks = range(len(scenes))
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set(xlabel="estimated", ylabel="true")
        axes.set_title(
            f"{one.title}: {summary.accuracy:.0%} of {summary.scenes}", fontsize="medium"
        )
    return figure
