"""The command line of the search.

Exit status: 0 when a trial ran to its end, 1 when none did, 2 when the search could not start or go
on; then standard error says why, in one sentence.
"""

# No "from __future__ import annotations": typer reads the annotations.
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import optuna
import typer
from optuna.exceptions import OptunaError
from rich.console import Console
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError
from typer.core import TyperCommand

import gradguard as gg
from reference_trainer.config import PRESETS, Config
from reference_trainer.errors import TrainerError
from reference_trainer.search.results import assignments_between, best_first, settings_of
from reference_trainer.search.run import search
from reference_trainer.search.space import SPACE, free_dimensions
from reference_trainer.search.storage import default_storage
from reference_trainer.search.study import SearchPlan
from reference_trainer.search.terminal import SearchTerminal
from reference_trainer.settings import config_keys, preset, with_overrides

DEFAULT_PRESET = "production"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always leaves by ``SystemExit``.

    Args:
        arguments: what stands after the program's name; that of the process when None.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the view tells it in a line
    try:
        app(arguments)
    except (TrainerError, gg.RunDirectoryError) as error:
        _leave(str(error))
    except (OptunaError, SQLAlchemyError) as error:
        reason = str(error).partition("\n")[0]
        _leave(f"the storage of the study failed: {reason}; repeat the command to go on")


def space_table() -> Table:
    """Return what is searched: setting, range and meaning."""
    meanings = {key.name: key.meaning for key in config_keys()}
    table = Table("searched setting", "from", "to", "drawn", "meaning", show_edge=False)
    drawn = {"linear": "evenly", "log": "log-evenly", "complement": "1 - it, log-evenly"}
    for one in SPACE:
        table.add_row(one.key, f"{one.low:g}", f"{one.high:g}", drawn[one.scale], meanings[one.key])
    return table


class CommandWithSpace(TyperCommand):
    """A command whose help ends in the list of what is searched."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the table."""
        super().format_help(ctx, formatter)
        Console(highlight=False).print(space_table())


@app.command(cls=CommandWithSpace)
def hpo(
    n_trials: Annotated[
        int,
        typer.Option(min=1, help="Trials in all, those of earlier and other processes included."),
    ] = 50,
    epochs_per_trial: Annotated[
        int, typer.Option(min=1, help="Epochs of every trial; optimization.epochs.")
    ] = 100,
    preset_name: Annotated[
        str, typer.Option("--preset", help=f"Where trials start from: {' or '.join(PRESETS)}.")
    ] = DEFAULT_PRESET,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Fix one setting in every trial; a searched one is then not searched. Repeat for more.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the choice of trials.")
    ] = 0,
    directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For run directories and locks; default runs/STUDY."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="WHERE",
            help="journal:FILE or a database URL such as postgresql://user@host/name, for several "
            "machines; default: study.db (SQLite) in the directory.",
        ),
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the study; default hpo-PRESET.")
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Run again what seems to be running elsewhere: when another machine died.",
        ),
    ] = False,
) -> None:
    """Search for good settings: TPE chooses, a median rule prunes, the guard watches every trial.

    A trial is judged by its covariance error on held-out scenes, in which no loss weight takes part.
    The same command again goes on where a search ended, however it ended; run it in several
    processes to share the work.
    """
    name = study or f"hpo-{preset_name}"
    where = directory or Path("runs") / name
    start = preset(preset_name)
    chosen = with_overrides(
        start, [*(assignments or ()), f"optimization.epochs={epochs_per_trial}"]
    )
    fixed = {one.partition("=")[0].strip() for one in assignments or ()}
    plan = SearchPlan(
        base=evaluated_every_epoch(chosen),
        space=free_dimensions(chosen, fixed=fixed),
        n_trials=n_trials,
        directory=where,
        storage=storage or default_storage(where),
        study=name,
        seed=seed,
        take_over=take_over,
    )
    with SearchTerminal(plan) as view:
        trials = search(plan, view=view)
    best = best_first(trials)
    paste = command_lines(preset_name, settings_of(best[0], chosen)) if best else ()
    view.finished(trials, paste=paste)
    raise typer.Exit(0 if best else 1)


def evaluated_every_epoch(config: Config) -> Config:
    """Return ``config`` with what the pruner needs, and no checkpoint before the end."""
    last = f"runtime.checkpoint_every={config.optimization.epochs}"
    return with_overrides(config, ["runtime.evaluate_every=1", last])


def command_lines(preset_name: str, config: Config) -> tuple[str, ...]:
    """Return the lines of a command that trains ``config``, ready to paste into a shell."""
    changed = assignments_between(preset(preset_name), config)
    first = f"python -m reference_trainer train --preset {preset_name}"
    lines = [first, *(f"  --set {one}" for one in changed)]
    return (*(f"{line} \\" for line in lines[:-1]), lines[-1])


def _leave(sentence: str) -> None:
    console = Console(stderr=True)
    console.print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(2) from None
