"""The command ``evaluate``: loads networks, judges them, shows and writes what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from rich.console import Console

from reference_trainer.errors import ConfigError, DataError
from reference_trainer.localisation.example import example_of
from reference_trainer.localisation.judging import judge
from reference_trainer.localisation.report_file import write_report
from reference_trainer.localisation.subject import checkpoint_in, load_subject
from reference_trainer.localisation.terminal import (
    counts_table,
    errors_table,
    estimated_table,
    progress_on,
)
from reference_trainer.restore import evaluate_checkpoint
from reference_trainer.terminal import TerminalView

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from reference_trainer.localisation.example import Example
    from reference_trainer.localisation.plan import Plan
    from reference_trainer.localisation.report import Report

    WriteFigures = Callable[[Report, Sequence[Example], Path], tuple[Path, ...]]


def evaluate_runs(
    paths: Sequence[Path],
    plan: Plan,
    *,
    json_file: Path | None = None,
    figures: Path | None = None,
    losses: bool = True,
) -> Report:
    """Judge the networks in ``paths``, show the main tables and return everything.

    What can go wrong at once goes wrong before anything is measured.

    Args:
        paths: run directories or checkpoints.
        plan: what to judge them on.
        json_file: where the report is written to; None for nowhere.
        figures: directory of the figures; None for none.
        losses: whether to evaluate the losses on both sets of each run as well.

    Raises:
        CheckpointError: a checkpoint is missing, torn, foreign or of another version.
        ConfigError: a configuration does not fit this version or machine, or matplotlib is missing.
        DataError: a network was trained on a scene it would be judged on, or a file cannot be
            written.
    """
    write_figures = None if figures is None else figure_writer()
    subjects = [load_subject(path, device=torch.device(plan.device)) for path in paths]
    if json_file is not None:
        _make_room(json_file)
    view = TerminalView()
    if losses:
        for path in paths:
            view.epoch_ended(evaluate_checkpoint(checkpoint_in(path)))
    console = view.console
    many = f"{len(subjects)} network{'s' if len(subjects) > 1 else ''}"
    _say(console, f"judging {many} on {plan.scenes} scenes, ML from scratch on {plan.subset} ...")
    with progress_on(console) as told:
        report = judge(subjects, plan, told=told)
    for network in report.networks:
        console.print(errors_table(network), estimated_table(network), counts_table(network))
        _say(console, f"not trained on: {network.disjoint.reason}")
    if json_file is not None:
        write_report(json_file, report)
        _say(console, f"written: {json_file}")
    if figures is not None and write_figures is not None:
        examples = [example_of(subject, plan) for subject in subjects]
        for path in write_figures(report, examples, figures):
            _say(console, f"written: {path}")
    return report


def figure_writer() -> WriteFigures:
    """Return what writes figures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from reference_trainer.localisation.figures import write_figures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError(
            "drawing figures needs matplotlib; install it with: pip install gradguard[figures]"
        ) from None
    return write_figures


def _make_room(path: Path) -> None:
    """Make the directory of a file that will be written after minutes of work."""
    if path.is_dir():
        raise DataError(f"cannot write the report to {path}: it is a directory; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"could not make {path.parent}: {error.strerror or error}") from error


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
