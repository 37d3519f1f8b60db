"""The command line: ``train``, ``resume`` a killed run, ``evaluate`` networks, write ``scenes``.

Exit status: 0 when all went well, 1 when a run ended with errors found by the guard, 2 when it could
not start or go on; then standard error says why, in one sentence.
"""

# No "from __future__ import annotations": typer reads the annotations.
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import Progress
from rich.rule import Rule
from rich.text import Text
from typer.core import TyperCommand

import gradguard as gg
from reference_trainer.config import PRESETS
from reference_trainer.data import training_physics
from reference_trainer.errors import ConfigError, TrainerError
from reference_trainer.localisation.hybrid import SAMPLE_SHARE
from reference_trainer.localisation.plan import Plan, device_of, split_of
from reference_trainer.localisation.run import evaluate_runs
from reference_trainer.processes import Processes, joined_processes
from reference_trainer.restore import find_run
from reference_trainer.results import TrainingResult
from reference_trainer.settings import as_mapping, config_keys, preset, with_overrides
from reference_trainer.setup import pick_device
from reference_trainer.stored_scenes import write_scenes
from reference_trainer.terminal import TerminalView
from reference_trainer.train import resume as resume_run
from reference_trainer.train import train as train_network

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train the RIS covariance network under the guard, resume a killed run, or evaluate one.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always leaves by ``SystemExit``.

    Args:
        arguments: what stands after the program's name; that of the process when None.
    """
    try:
        app(arguments)
    except (TrainerError, gg.RunDirectoryError, gg.GateCeilingError) as error:
        _complain(str(error))
        raise SystemExit(2) from None


def settings_help() -> Group:
    """Return every setting of a run: its key, its value in each preset and its meaning."""
    trees = {name: as_mapping(config) for name, config in PRESETS.items()}
    lines: list[RenderableType] = [Rule("Settings: --set KEY=VALUE", align="left")]
    for key in config_keys():
        section, _, name = key.name.partition(".")
        values = {preset_name: tree[section][name] for preset_name, tree in trees.items()}
        alike = len(set(values.values())) == 1
        told = f"{key.default}" if alike else ", ".join(f"{v} in {n}" for n, v in values.items())
        lines += [Text(f"{key.name}  [{told}]"), Padding(Text(key.meaning), (0, 0, 0, 4))]
    return Group(*lines)


class CommandWithSettings(TyperCommand):
    """A command whose help ends in the list of all settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the usual help, then the settings."""
        super().format_help(ctx, formatter)
        Console(highlight=False).print(settings_help())


@app.command(cls=CommandWithSettings)
def train(
    preset_name: Annotated[
        str, typer.Option("--preset", help=f"Where to start from: {' or '.join(PRESETS)}.")
    ] = "overfit",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeat for more."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="MODE", help="fp32, bf16 or fp16; precision.mode.")
    ] = None,
    init_scale: Annotated[
        str | None,
        typer.Option(metavar="SCALE", help="As 65536 or 2**16; precision.initial_loss_scale."),
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(metavar="N", help="Passes over the data; optimization.epochs.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A new directory; default runs/PRESET-DATE-TIME."),
    ] = None,
) -> None:
    """Train a network from scratch; records, evaluations and checkpoints go to the run directory.

    --precision, --init-scale and --epochs are short for --set and win over it.
    """
    short = {
        "precision.mode": precision,
        "precision.initial_loss_scale": init_scale,
        "optimization.epochs": epochs,
    }
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    config = with_overrides(preset(preset_name), [*(assignments or ()), *given])
    if init_scale is not None and config.precision.mode != "fp16":
        raise ConfigError(
            f"--init-scale {init_scale} has no effect in {config.precision.mode}: "
            "only fp16 scales the loss; add --precision fp16"
        )
    with joined_processes(pick_device(config.runtime.device)) as processes:
        directory = processes.agree(run_dir or _new_directory(preset_name))
        with _view(processes) as view:
            result = train_network(config, run_directory=directory, view=view, processes=processes)
        _finish(result, view)


@app.command()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run that was killed.")],
) -> None:
    """Go on with a run from its last saved state; it ends in the bits it would have ended in.

    A run of several processes goes on under torchrun with as many.
    """
    device = find_run(run_dir).config.runtime.device
    with joined_processes(pick_device(device)) as processes:
        with _view(processes) as view:
            result = resume_run(run_dir, view=view, processes=processes)
        _finish(result, view)


@app.command()
def scenes(
    directory: Annotated[Path, typer.Argument(help="A new directory.")],
    preset_name: Annotated[
        str, typer.Option("--preset", help=f"Where to start from: {' or '.join(PRESETS)}.")
    ] = "overfit",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeat for more."),
    ] = None,
) -> None:
    """Write the training scenes of a run to a directory, for scenes.source=disk.

    Only the settings of the section scenes matter; train --help lists them.
    """
    config = with_overrides(preset(preset_name), assignments or ()).scenes
    with Progress(*Progress.get_default_columns(), disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("scenes", total=config.train)
        write_scenes(
            directory,
            training_physics(config),
            seed=config.seed,
            split="train",
            count=config.train,
            written=lambda count: progress.update(task, completed=count),
        )
    Console().print(
        f"{config.train} scenes in {directory}; train on them with --set scenes.source=disk "
        f"--set scenes.directory={directory}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories or checkpoints, one for each network.")
    ],
    scenes: Annotated[int, typer.Option(help="Scenes to judge on.")] = 1000,
    subset: Annotated[
        int | None,
        typer.Option(help="The first of them, for ML from scratch; default 200, or all of fewer."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    split: Annotated[
        str, typer.Option(help="Where they come from: validation or test.")
    ] = "validation",
    share: Annotated[
        float, typer.Option(help="Share of the fitted covariance in the blend.")
    ] = SAMPLE_SHARE,
    threads: Annotated[
        int,
        typer.Option(help="torch's threads, of each worker; one is fastest where cores are few."),
    ] = 1,
    workers: Annotated[
        int, typer.Option(help="Batches of scenes at the same time; as many as there are cores.")
    ] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results here.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write figures here; needs matplotlib.")
    ] = None,
    losses: Annotated[
        bool, typer.Option(help="Evaluate the losses on both sets of the run as well.")
    ] = True,
) -> None:
    """Judge networks by their losses and by where they say the sources stand, beside the bound.

    A directory means its best checkpoint, or its last. No scene judged on was trained on.
    """
    plan = Plan(
        seed=seed,
        split=split_of(split),
        scenes=scenes,
        subset=min(200, scenes) if subset is None else subset,
        share=share,
        threads=threads,
        workers=workers,
        device=device_of(device).type,
    )
    evaluate_runs(runs, plan, json_file=json_file, figures=figures, losses=losses)


def _view(processes: Processes) -> TerminalView:
    """Return what shows the run; it draws nowhere in all processes but the first."""
    return TerminalView() if processes.leads else TerminalView(Console(file=StringIO()))


def _finish(result: TrainingResult, view: TerminalView) -> None:
    """Show the summary; leave with 1 if the guard found errors."""
    view.finished(result)
    errors = [f for f in result.log.findings if f.severity is gg.Severity.ERROR]
    for finding in errors:
        _complain(f"{finding.code}: {finding.message}")
    raise typer.Exit(1 if errors else 0)


def _new_directory(preset_name: str) -> Path:
    return Path("runs") / f"{preset_name}-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}"


def _complain(sentence: str) -> None:
    console = Console(stderr=True)
    console.print(f"error: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
