"""What a run looks like on a console."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import gradguard as gg
from reference_trainer import cli
from reference_trainer.evaluation import Evaluation
from reference_trainer.model import CovarianceNetwork
from reference_trainer.results import EpochResult, RunStart, TrainingResult
from reference_trainer.settings import preset
from reference_trainer.terminal import TerminalView, quality_table

START = RunStart(
    tensors=93,
    parameters=16_339_075,
    live=92,
    dead=("grid_logits.weight",),
    device="cpu",
    precision="fp16",
    threads=1,
    thread_seconds={1: 0.75, 2: 2.25},
    memorised_scenes=256,
    held_out_scenes=128,
    planned_steps=2,
    directory=Path("runs/one"),
)
FULL_DISK = gg.Finding(code="GG002", severity=gg.Severity.ERROR, message="no space left")


def evaluation(loss: float) -> Evaluation:
    """Return an evaluation of that loss."""
    terms = {"prediction": loss / 2, "alignment": 0.25}
    return Evaluation(loss=loss, terms=terms, source_count_accuracy=0.5)


def epoch(number: int, memorised: float | None, held_out: float | None) -> EpochResult:
    """Return an epoch; a loss of None is one that was not evaluated."""
    return EpochResult(
        epoch=number,
        epochs=2,
        steps_taken=number,
        training_loss=3.0 if number else None,
        memorised=None if memorised is None else evaluation(memorised),
        held_out=None if held_out is None else evaluation(held_out),
    )


def record(step: int, outcome: gg.StepOutcome) -> gg.StepRecord:
    """Return the record of one attempt."""
    return gg.StepRecord(step=step, optimizer="optimizer", outcome=outcome, loss=2.5)


def result(*findings: gg.Finding) -> TrainingResult:
    """Return a run of two steps whose loss fell from 4 to 1 on what it memorised."""
    records = [record(0, gg.StepOutcome.SKIPPED_BY_SCALER), record(1, gg.StepOutcome.APPLIED)]
    return TrainingResult(
        start=START,
        epochs=(epoch(0, 4.0, 4.0), epoch(1, None, None), epoch(2, 1.0, 5.0)),
        live=evaluation(0.5),
        log=gg.RunLog(records, findings),
        model=CovarianceNetwork.__new__(CovarianceNetwork),
        wall_s=61.0,
    )


def shown(*, terminal: bool, width: int = 100) -> str:
    """Return what a whole run writes to a console."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, _environ={"TERM": "xterm"})
    finished = result()
    with TerminalView(console) as view:
        view.preparing(preset("overfit"))
        view.started(finished.start)
        for told in finished.log:
            view.step_ended(told)
        for one in finished.epochs:
            view.epoch_ended(one)
        view.epoch_ended(replace(finished.epochs[1], findings=(FULL_DISK,)))
    view.finished(finished)
    return file.getvalue()


def test_a_plain_console_gets_plain_lines() -> None:
    """In a file: what runs, one line a step and an epoch, findings at once, no control codes."""
    lines = shown(terminal=False).splitlines()
    assert lines[:6] == [
        "drawing 512 scenes, rehearsing one forward and backward pass ...",
        "93 tensors, 16,339,075 parameters, 92 live",
        "  no live gradient: grid_logits.weight",
        "256 scenes to memorise, 128 held out, none in both (fingerprints compared)",
        "fp16 on cpu, 1 thread (a pass takes 1: 0.75 s, 2: 2.25 s)",
        "recorded in runs/one",
    ]
    assert "SKIPPED_BY_SCALER" in lines[6]
    assert "APPLIED" in lines[7]
    assert lines[8:13] == [
        "epoch   0 of 2  memorised 4.0000 (NMSE 2.000)  held out 4.0000 (NMSE 2.000)",
        "epoch   1 of 2  training loss 3.0000",
        "epoch   2 of 2  training loss 3.0000  memorised 1.0000 (NMSE 0.500)  "
        "held out 5.0000 (NMSE 2.500)",
        "epoch   1 of 2  training loss 3.0000",
        "GG002 error: no space left",
    ]
    end = lines.index("61 s in all, setting up and evaluations included")
    assert lines[end + 1] == "nothing wrong found in 2 optimizer steps"
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_a_progress_bar_too() -> None:
    """On a terminal the same lines stand above a bar that counts the attempted steps."""
    text = shown(terminal=True)
    assert "optimizer steps" in text
    assert "2/2" in text
    assert "\x1b" in text
    assert "SKIPPED_BY_SCALER" in text


def test_both_sets_stand_side_by_side() -> None:
    """The table shows where the loss began and ended on either set, and the live weights."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(quality_table(result()))
    rows = [line.replace("│", " ").split() for line in capture.get().splitlines()]
    assert ["loss", "before", "4.0000", "4.0000"] in rows
    assert ["loss", "1.0000", "5.0000", "0.5000"] in rows
    assert ["fall", "75.0%", "-25.0%", "87.5%"] in rows
    assert ["power", "in", "true", "subspace", "75.0%", "75.0%", "75.0%"] in rows


def test_errors_found_by_the_guard_end_in_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that could not be recorded to its end is finished, and says so with its exit status."""
    monkeypatch.setattr(cli, "train_network", lambda *_, **__: result(FULL_DISK))
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--preset", "smoke"])
    assert left.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == "error: GG002: no space left\n"
    assert "Summary of the run" in captured.out
