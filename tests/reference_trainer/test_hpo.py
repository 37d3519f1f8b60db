"""The search on real runs of the full network: pruning, kills, company, and broken trials."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import optuna
import pytest
import torch
from optuna.trial import TrialState

import gradguard as gg
from reference_trainer import session
from reference_trainer.data import draw_data
from reference_trainer.evaluation import evaluate
from reference_trainer.reporting import SilentView
from reference_trainer.search import cli
from reference_trainer.search.counting import counts, retried
from reference_trainer.search.objective import DIAGNOSIS, UNTRAINED, measure
from reference_trainer.search.results import best_first
from reference_trainer.search.run import search
from reference_trainer.search.space import SPACE
from reference_trainer.search.storage import default_storage, opened
from reference_trainer.search.study import WORKER
from reference_trainer.settings import preset, with_overrides
from reference_trainer.setup import assemble
from reference_trainer.train import train
from tests.benchmarks.ris import torch_clipping
from tests.reference_trainer.searches import EPOCHS, TINY, plan_in

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.trial import FrozenTrial

    from reference_trainer.config import Config
    from reference_trainer.data import DataSets
    from reference_trainer.results import EpochResult
    from reference_trainer.setup import Parts

TRIALS = 6
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[FrozenTrial, ...]]:
    """Return the directory and the trials of a whole search."""
    directory = tmp_path_factory.mktemp("search")
    plan = plan_in(directory, n_trials=TRIALS, storage=default_storage(directory))
    return directory, search(plan)


def tiny(*assignments: str) -> Config:
    """Return a run of a few scenes."""
    return with_overrides(preset("smoke"), [*TINY, "runtime.evaluate_every=1", *assignments])


def command(directory: Path, *arguments: str, n_trials: int) -> list[str]:
    """Return the command of the search that ``plan_in`` plans."""
    settings = [word for one in TINY for word in ("--set", one)]
    numbers = ["--n-trials", str(n_trials), "--epochs-per-trial", str(EPOCHS)]
    where = ["--preset", "smoke", "--study", "study", "--directory", str(directory)]
    start = [sys.executable, "-m", "reference_trainer.hpo"]
    return [*start, *numbers, *where, *settings, *arguments]


def all_trials(directory: Path) -> list[FrozenTrial]:
    """Return every trial of the study in a directory."""
    with opened(default_storage(directory)) as storage:
        return optuna.load_study(study_name="study", storage=storage).get_trials()


def test_a_short_search_prunes_and_ends_with_a_best_trial(
    searched: tuple[Path, tuple[FrozenTrial, ...]],
) -> None:
    """Of six trials one at least is pruned, after reports of every epoch up to there; the others ran to
    their end, and their value is the last report.
    """
    _, trials = searched
    states = [trial.state for trial in trials]
    assert len(trials) == TRIALS
    assert states.count(TrialState.PRUNED) >= 1
    assert states.count(TrialState.COMPLETE) >= 2
    assert set(states) == {TrialState.PRUNED, TrialState.COMPLETE}
    for trial in trials:
        epochs = sorted(trial.intermediate_values)
        assert epochs == list(range(1, 1 + len(epochs)))
        assert (epochs[-1] == EPOCHS) == (trial.state is TrialState.COMPLETE)
        assert trial.value == trial.intermediate_values[epochs[-1]]
        assert 0.0 <= trial.user_attrs["source count accuracy"] <= 1.0


def test_every_trial_starts_from_the_same_number(
    searched: tuple[Path, tuple[FrozenTrial, ...]],
) -> None:
    """Before the first step the measure is the same bit for bit in every trial, however its losses are
    weighed: same scenes, same initial weights, no weight in the measure.
    """
    _, trials = searched
    assert len({trial.params["loss.aux_angles"] for trial in trials}) == TRIALS
    assert len({trial.user_attrs[UNTRAINED] for trial in trials}) == 1
    assert len({trial.value for trial in trials}) == TRIALS


def test_no_loss_weight_is_in_the_measure() -> None:
    """The same network under other loss weights and another blend: another loss, the same measure."""
    seen = []
    for assignments in (
        (),
        ("loss.prediction=3", "loss.alignment=0", "optimization.sample_blend=0.3"),
    ):
        config = tiny(*assignments)
        parts = assemble(config, CPU)
        data = draw_data(config.scenes, device=CPU)
        seen.append(evaluate(parts.model, data.held_out, parts.objective, batch_scenes=4))
    assert measure(seen[0]) == measure(seen[1])
    assert seen[0].loss != seen[1].loss


def test_every_trial_is_watched_and_leaves_its_records(
    searched: tuple[Path, tuple[FrozenTrial, ...]],
) -> None:
    """Each trial has a run directory that can be judged again with the same diagnosis, pruned ones
    too; weights are not kept.
    """
    directory, trials = searched
    for trial in trials:
        run = directory / "trials" / f"{trial.number:04d}"
        read = gg.read_run(run)
        assert read.problems == ()
        assert len(read.log) == max(trial.intermediate_values)
        assert str(gg.diagnose(read.log)) == trial.user_attrs[DIAGNOSIS]
        assert trial.user_attrs[DIAGNOSIS].startswith("nothing wrong found")
    assert not list(directory.rglob("*.pt"))


def test_a_killed_search_goes_on_where_it_was(
    tmp_path: Path, searched: tuple[Path, tuple[FrozenTrial, ...]]
) -> None:
    """Killed with -9 in its second trial, the same command runs that trial again, not the first one, and
    ends with the trials of a search that nobody killed.
    """
    with subprocess.Popen(
        command(tmp_path, n_trials=2),
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        _wait_until(lambda: _is_in_trial(tmp_path, 1), process)
        process.send_signal(signal.SIGKILL)
    before = all_trials(tmp_path)
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]
    again = search(plan_in(tmp_path, n_trials=2, storage=default_storage(tmp_path)))
    assert again[0] == before[0]
    assert [retried(trial) for trial in again] == [[], [1]]
    assert [trial.number for trial in again] == [0, 2]
    _, uninterrupted = searched
    for trial, other in zip(again, uninterrupted, strict=False):
        assert trial.params == other.params
        for epoch, value in trial.intermediate_values.items():
            assert value == pytest.approx(other.intermediate_values.get(epoch, value), rel=1e-4)


def _is_in_trial(directory: Path, number: int) -> bool:
    """Whether an epoch of a trial is over."""
    epochs = directory / "trials" / f"{number:04d}" / "epochs.jsonl"
    return epochs.exists() and epochs.read_text().count("\n") > 1


def _wait_until(condition: object, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    raise AssertionError("the search did not get that far in time")


def test_two_processes_share_one_study(tmp_path: Path) -> None:
    """Started together, they make three trials, not six, and none twice; both end well."""
    processes = [
        subprocess.Popen(
            command(tmp_path, n_trials=3),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert [err for _, err in told] == ["", ""]
    trials = all_trials(tmp_path)
    assert len(trials) == 3
    assert all(trial.state.is_finished() and counts(trial) for trial in trials)
    assert len({tuple(trial.params.values()) for trial in trials}) == 3
    assert len({trial.user_attrs[WORKER] for trial in trials}) == 2


def test_scenes_full_of_nan_break_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate vetoes every step until its ceiling ends the run: the trial has no value but the gate's
    word and the guard's diagnosis, it counts, and it is not run again.
    """

    def poisoned(*arguments: object, **options: object) -> DataSets:
        data = draw_data(*arguments, **options)
        data.memorised.observed.snapshots.fill_(torch.nan)
        return data

    monkeypatch.setattr(session, "draw_data", poisoned)
    settings = ("optimization.batch_scenes=1", "guard.lag=1", "scenes.train=11")
    plan = plan_in(tmp_path, *settings, n_trials=1)
    (trial,) = search(plan)
    assert (trial.state, trial.value) == (TrialState.FAIL, None)
    assert trial.user_attrs["broken"].startswith(
        "StepGate vetoed too many optimizer steps: 11 in a row"
    )
    assert "error GG" in trial.user_attrs[DIAGNOSIS]
    assert search(plan) == (trial,)


def test_a_run_that_is_pruned_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a view raises comes out of ``train`` as it is, and nothing stays on model and optimizer."""
    kept: list[Parts] = []

    def keep(*arguments: object) -> Parts:
        kept.append(assemble(*arguments))
        return kept[-1]

    class Pruning(SilentView):
        def epoch_ended(self, result: EpochResult) -> None:
            """Prune after the first epoch."""
            if result.epoch == 1:
                raise optuna.TrialPruned("enough")

    monkeypatch.setattr(session, "assemble", keep)
    with pytest.raises(optuna.TrialPruned, match="enough"):
        train(tiny(), view=Pruning())
    (parts,) = kept
    assert not parts.optimizer._optimizer_step_pre_hooks
    assert not parts.optimizer._optimizer_step_post_hooks
    assert not any(p._post_accumulate_grad_hooks for p in parts.model.parameters())
    modules = list(parts.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_no_searched_setting_is_dead() -> None:
    """Each searched setting on its own, from one end of its range to the other, changes the measure after a
    few steps; that of the averaging is shown by ``within_reach``.
    """
    lows = {one.key: one.low for one in SPACE}
    data = draw_data(tiny("scenes.train=1", "scenes.validation=1").scenes, device=CPU)

    def error(changed: dict[str, float]) -> float:
        settings = [f"{key}={value}" for key, value in {**lows, **changed}.items()]
        parts = assemble(tiny("optimization.epochs=3", *settings), CPU)
        for _ in range(3):
            parts.objective(parts.model, data.memorised).loss.backward()
            torch_clipping(list(parts.model.parameters()), parts.clip_norm)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
            parts.schedule.step()
            parts.averaged.update()
        averaged = parts.averaged.module
        return measure(evaluate(averaged, data.held_out, parts.objective, batch_scenes=1))

    base = error({})
    searched = [one for one in SPACE if one.key != "optimization.averaging_decay"]
    moved = {one.key: error({one.key: one.high}) for one in searched}
    assert [key for key, value in moved.items() if value == base] == []
    assert len(set(moved.values())) == len(moved)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process; return exit status, output and error output."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_command_ends_with_settings_to_paste(
    capsys: pytest.CaptureFixture[str], searched: tuple[Path, tuple[FrozenTrial, ...]]
) -> None:
    """Over a finished study: the counts, the best trials, and a command whose settings are those of the
    best one.
    """
    directory, trials = searched
    arguments = command(directory, n_trials=TRIALS)[3:]
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    assert re.search(r"6 trials: \d complete, \d pruned\n", out)
    assert "\x1b" not in out
    best = best_first(trials)[0]
    pasted = shlex.split(out[out.index("python -m reference_trainer train") :].replace("\\\n", ""))
    assert pasted[:6] == ["python", "-m", "reference_trainer", "train", "--preset", "smoke"]
    assert pasted[6::2] == ["--set"] * (len(pasted[6:]) // 2)
    config = with_overrides(preset("smoke"), pasted[7::2])
    chosen = with_overrides(tiny(f"optimization.epochs={EPOCHS}"), best.user_attrs["settings"])
    assert config == chosen


def test_help_explains_every_option_and_range(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--help`` lists the options and every searched setting with its range."""
    monkeypatch.setenv("COLUMNS", "140")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    options = ("n-trials", "epochs-per-trial", "preset", "set", "seed", "directory", "storage")
    for option in (*options, "study", "take-over"):
        assert f"--{option} " in out
    for one in SPACE:
        assert re.search(rf"{one.key} +│ {one.low:g} +│ {one.high:g} ", out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "nothing"], "known are overfit, production, smoke"),
        (["--set", "optimization.epoch=3"], "did you mean 'optimization.epochs'"),
        (["--set", "network.dropout=2"], "setting network.dropout: got '2'"),
        (["--storage", "study"], "give journal:FILE or a database URL"),
        (["--storage", "nosuch://host/name"], "could not open the storage nosuch://host/name: "),
        (["--storage", "postgresql://me:secret@nowhere/name"], "postgresql://me:***@nowhere/name"),
        (["--storage", "sqlite:////no/such/study.db"], "unable to open database file"),
        (["--storage", "journal:/no/such/file"], "the journal /no/such/file"),
        (["--directory", "/dev/null/study"], "could not use /dev/null/study for a search"),
    ],
)
def test_a_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], told: str
) -> None:
    """Status 2, nothing on standard output, and one sentence with what came, without passwords."""
    where = ["--directory", str(tmp_path), "--preset", "smoke"]
    status, out, err = run(capsys, *where, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_a_file_that_is_no_database_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A foreign file in the place of the study is refused and left as it is."""
    path = tmp_path / "study.db"
    path.write_bytes(b"precious" * 100)
    status, _, err = run(capsys, "--preset", "smoke", "--directory", str(tmp_path))
    assert status == 2
    assert "file is not a database" in err
    assert path.read_bytes() == b"precious" * 100


def test_a_search_without_a_whole_trial_ends_with_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """From a loss scale that never comes down every step is skipped: such a trial is broken, and where
    all are there is nothing to recommend.
    """
    scaler = ("mode=fp16", "initial_loss_scale=2**99", "backoff_factor=0.99")
    settings = [word for one in scaler for word in ("--set", f"precision.{one}")]
    status, out, err = run(capsys, *command(tmp_path, *settings, n_trials=1)[3:])
    assert (status, err) == (1, "")
    assert "trial 0: broken: no optimizer step was taken in 2 epochs" in out
    assert "1 trials: 1 broken" in out
    assert "python -m" not in out


@pytest.mark.parametrize(("missing", "extra"), [("optuna", "hpo"), ("typer", "trainer")])
def test_without_an_extra_one_line_says_what_to_install(missing: str, extra: str) -> None:
    """Where a library of an extra is missing, the command names it and exits with 1."""
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = ['hpo']; "
        "runpy.run_module('reference_trainer.hpo', run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == (
        f'error: the search needs {missing}; install it with: pip install "gradguard[{extra}]"\n'
    )
