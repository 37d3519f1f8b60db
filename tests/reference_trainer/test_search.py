"""A search as such, on runs that are made up in no time: which trials run, how often, and what counts."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import optuna
import pytest
from optuna.trial import TrialState

from gradguard.engine import diagnose, find_rule
from gradguard.findings import Severity
from reference_trainer.averaging import warmed_up_decay
from reference_trainer.search import objective, storage, study
from reference_trainer.search.counting import counts, retried
from reference_trainer.search.errors import SearchError
from reference_trainer.search.locks import is_gone, signed_on
from reference_trainer.search.results import assignments_between, best_first, settings_of
from reference_trainer.search.run import search
from reference_trainer.search.space import SPACE, free_dimensions, starting_point, within_reach
from reference_trainer.search.storage import default_storage, opened
from reference_trainer.search.study import WORKER, opened_study
from reference_trainer.settings import as_mapping, config_keys, preset, with_overrides
from tests.reference_trainer.searches import EPOCHS, made_up_train, plan_in

if TYPE_CHECKING:
    from pathlib import Path

    from optuna.trial import FrozenTrial

    from reference_trainer.search.study import SearchPlan


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "train", made_up_train)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # after every trial: there is nothing to collect
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def facts(trials: tuple[FrozenTrial, ...]) -> list[tuple[object, ...]]:
    """Return what a search found, without names and times."""
    return [(trial.state, trial.value, trial.params, trial.intermediate_values) for trial in trials]


def all_trials(plan: SearchPlan) -> list[FrozenTrial]:
    """Return every trial of the study, interrupted ones too."""
    with opened(plan.storage) as kept:
        return optuna.load_study(study_name=plan.study, storage=kept).get_trials()


class Interrupted:
    """Trains until the trial with the given count, and is interrupted in it."""

    def __init__(self, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = at, error

    def __call__(self, *arguments: object, **options: object) -> None:
        """Train or raise."""
        self.left -= 1
        if self.left < 0:
            raise self.error
        made_up_train(*arguments, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    """Return what a search of 13 trials finds that nobody interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "train", made_up_train)
        patch.setattr(gc, "collect", lambda: 0)
        directory = tmp_path_factory.mktemp("whole")
        return facts(search(plan_in(directory, n_trials=13)))


@pytest.mark.parametrize("at", [0, 1, 11])
def test_an_interrupted_search_finds_what_an_uninterrupted_one_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: list[tuple[object, ...]],
    at: int,
) -> None:
    """Stopped in any trial and started again, a search runs the same trials in the same order, those
    that TPE chooses included, and none of them twice.
    """
    plan = plan_in(tmp_path, n_trials=13)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective, "train", Interrupted(at))
        search(plan)
    again = search(plan)
    assert facts(again) == whole
    assert [retried(trial) for trial in again if retried(trial)] == [[at]]
    assert len(all_trials(plan)) == 14
    assert facts(search(plan)) == whole


@pytest.mark.parametrize("journal", [False, True])
def test_searches_that_share_a_study_make_its_trials_once(tmp_path: Path, journal: bool) -> None:
    """Three at a time make n trials in all, each with numbers of its own, and each has its share."""
    plan = plan_in(tmp_path, n_trials=8, storage=None if journal else default_storage(tmp_path))
    both = threading.Barrier(3)

    def work() -> None:
        both.wait()
        search(plan)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trials = all_trials(plan)
    assert len(trials) == 8
    assert all(trial.state.is_finished() and trial.state is not TrialState.FAIL for trial in trials)
    assert len({tuple(trial.params.values()) for trial in trials}) == 8
    assert len({trial.user_attrs[WORKER] for trial in trials}) > 1


def test_more_trials_can_be_asked_for_later(tmp_path: Path) -> None:
    """The number of trials is a total: asking for more runs the rest, asking for fewer runs none."""
    few = search(plan_in(tmp_path, n_trials=3))
    more = search(plan_in(tmp_path, n_trials=5))
    assert facts(more)[:3] == facts(few)
    assert len(more) == len(search(plan_in(tmp_path, n_trials=2))) == 5


def test_the_first_trial_is_the_preset_itself(tmp_path: Path) -> None:
    """The search never does worse than where it started: trial 0 runs the base, but for a weight decay
    of 0, which no logarithm reaches.
    """
    plan = plan_in(tmp_path, n_trials=1)
    (first,) = search(plan)
    changed = assignments_between(plan.base, settings_of(first, plan.base))
    assert changed == ("optimization.weight_decay=1e-05",)


def test_a_search_finds_the_least_value(tmp_path: Path) -> None:
    """Of 25 trials in three settings the best is far better than the best of the random ones and of
    the preset.
    """
    made_up = ("backbone_learning_rate", "clip_norm", "dropout")
    plan = plan_in(tmp_path, n_trials=25)
    space = tuple(one for one in plan.space if one.key.endswith(made_up))
    trials = search(replace(plan, space=space))
    floor = 1 / (1 + EPOCHS)  # what the made-up error keeps at its last epoch
    best, first = (best_first(some)[0].value - floor for some in (trials, trials[:10]))
    assert best < 0.5 * first


def test_a_trial_that_kills_its_process_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted three times, a trial is left alone and counts as one; the others still run."""
    plan = plan_in(tmp_path, n_trials=4)
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(objective, "train", Interrupted(0))
            search(plan)
    trials = search(plan)
    assert [trial.state is TrialState.FAIL for trial in trials] == [True, False, False, False]
    assert [trial.number for trial in trials] == [2, 3, 4, 5]
    assert sum(map(counts, all_trials(plan))) == 4


def test_a_trial_that_was_taken_over_is_lost_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that slept so long that another one took its trial leaves it to that one."""
    plan = plan_in(tmp_path, n_trials=3)
    taken: list[int] = []

    def sleep_over(*arguments: object, **options: object) -> None:
        if not taken:
            with opened(plan.storage) as kept:
                other = optuna.load_study(study_name=plan.study, storage=kept)
                (running,) = other.get_trials(states=(TrialState.RUNNING,))
                study.give_up(other, running.number)
                study.give_up(other, running.number)  # a third one, a moment later
            taken.append(running.number)
        made_up_train(*arguments, **options)

    monkeypatch.setattr(objective, "train", sleep_over)
    trials = search(plan)
    assert sorted(map(retried, trials)) == [[], [], taken]
    assert len(all_trials(plan)) == 4
    assert all(trial.state.is_finished() for trial in trials)


def left_running(plan: SearchPlan, worker: str | None) -> FrozenTrial:
    """Leave a trial behind that runs for ever, as a process of that name would that was killed."""
    with opened_study(plan) as shared:
        trial = optuna.Study.ask(shared)
        for dimension in plan.space:
            dimension.suggest(trial)
        if worker is not None:
            trial.set_user_attr(WORKER, worker)
        return trial.storage.get_trial(trial._trial_id)


@pytest.mark.parametrize(("worker", "taken"), [(None, True), ("elsewhere-1-abc", False)])
def test_whose_process_is_unknown_goes_on_elsewhere(
    tmp_path: Path, worker: str | None, taken: bool
) -> None:
    """A running trial that no process took is run again; one of an unknown process counts as running,
    until it is taken over on demand.
    """
    plan = plan_in(tmp_path, n_trials=2)
    left = left_running(plan, worker)
    trials = search(plan)
    running = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
    assert running == ([] if taken else [left.number])
    trials = search(replace(plan, take_over=True))
    assert len(trials) == 2
    assert all(trial.state.is_finished() for trial in trials)
    assert [trial.params for trial in trials if retried(trial)] == [left.params]


def test_a_machine_that_fell_silent_loses_its_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a database, the trial of a process on another machine is run again, with the same numbers,
    once its heartbeat is overdue; with a fresh heartbeat it is left alone.
    """
    monkeypatch.setattr(storage, "_HEARTBEAT_S", 1)
    monkeypatch.setattr(storage, "_GRACE_S", 2)
    plan = plan_in(tmp_path, n_trials=2, storage=default_storage(tmp_path))
    with pytest.warns(UserWarning, match="Heartbeat"):
        left = left_running(plan, "elsewhere-1-abc")
    with opened(plan.storage) as kept:
        kept.record_heartbeat(left._trial_id)
    assert [trial.state.is_finished() for trial in search(plan)] == [False, True]
    time.sleep(3.1)
    trials = search(replace(plan, n_trials=3))
    assert len(trials) == 3
    assert all(trial.state.is_finished() for trial in trials)
    assert [trial.params for trial in trials if retried(trial)] == [left.params]


def test_a_lock_tells_who_works(tmp_path: Path) -> None:
    """A process is gone when its lock file is there and free; who is unknown here is not gone."""
    with signed_on(tmp_path) as name:
        assert not is_gone(tmp_path, name)
    assert list(tmp_path.iterdir()) == []
    assert not is_gone(tmp_path, name)
    (tmp_path / f"{name}.lock").touch()
    assert is_gone(tmp_path, name)


def test_a_study_of_another_search_is_refused(tmp_path: Path) -> None:
    """Trials of other scenes, of other lengths or in other ranges have no common measure; where they
    run does not matter.
    """
    search(plan_in(tmp_path, n_trials=1))
    search(plan_in(tmp_path, "runtime.threads=2", n_trials=1))
    for changed, told in (
        ("scenes.seed=3", "scenes.seed = 0, not 3"),
        ("optimization.epochs=4", "optimization.epochs = 2, not 4"),
        ("loss.alignment=0.05", r"range of loss.alignment = 0.005 to 0.5 \(log\), not nothing"),
    ):
        with pytest.raises(SearchError, match=told):
            search(plan_in(tmp_path, changed, n_trials=1))


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_breaks_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    """Such a trial has no value and says why; it counts, and it is not run again."""
    monkeypatch.setattr(objective, "train", partial(made_up_train, error=error))
    trials = search(plan_in(tmp_path, n_trials=2))
    assert [(trial.state, trial.value) for trial in trials] == [(TrialState.FAIL, None)] * 2
    told = f"the training loss is {error} after epoch 0"
    assert {trial.user_attrs["broken"] for trial in trials} == {told}
    assert best_first(trials) == []


def test_an_error_of_the_guard_breaks_a_trial_and_a_warning_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the diagnosis holds an error, its message stands where the value would; a warning is kept
    with the diagnosis, beside the value.
    """
    logs = {name: find_rule(name).fires_on() for name in ("GG101", "GG105")}
    severities = [diagnose(log).worst for log in logs.values()]
    assert severities == [Severity.ERROR, Severity.WARNING]
    for name, log in logs.items():
        monkeypatch.setattr(objective, "train", partial(made_up_train, log=log))
        (trial,) = search(plan_in(tmp_path / name, n_trials=1))
        broken = name == "GG101"
        assert trial.state is (TrialState.FAIL if broken else TrialState.COMPLETE)
        assert (trial.value is None) == broken
        assert trial.user_attrs.get("broken", "").startswith(name) == broken
        assert name in trial.user_attrs["diagnosis"]


def test_what_is_printed_is_what_ran(tmp_path: Path) -> None:
    """The settings of a trial, pasted after the preset, give its configuration to the last bit."""
    plan = plan_in(tmp_path, n_trials=4)
    for trial in search(plan):
        ran = settings_of(trial, plan.base)
        pasted = assignments_between(preset("smoke"), ran)
        assert with_overrides(preset("smoke"), pasted) == ran


def test_every_dimension_is_a_setting_drawn_within_its_range() -> None:
    """The table names settings that exist, once each; both ends of every range are drawn and read
    back as themselves, and the preset's own value is drawn as the nearest one.
    """
    known = {key.name for key in config_keys()}
    assert len({one.key for one in SPACE}) == len(SPACE) == 9
    for one in SPACE:
        assert one.key in known
        assert one.low < one.high
        ends = [_value(one, drawn) for drawn in one.drawn_range]
        assert sorted(ends) == [one.low, one.high]
    config = preset("overfit")
    point = starting_point(config, SPACE)
    tree = as_mapping(config)
    for one in SPACE:
        section, key = one.key.split(".")
        expected = min(max(tree[section][key], one.low), one.high)
        assert one.value_of(point[one.name]) == pytest.approx(expected, abs=1e-12)


def _value(dimension: object, drawn: float) -> float:
    trial = optuna.trial.FixedTrial({dimension.name: drawn})
    key, value = dimension.suggest(trial).split("=")
    assert key == dimension.key
    return float(value)


def test_no_weight_is_searched_whose_term_cannot_help() -> None:
    """The weight of the source count is left alone: its term is not in the measure, so less would always
    win; so are weights that act only through their sum with another one or set the scale.
    """
    searched = {one.key for one in SPACE if one.key.startswith("loss.")}
    assert not searched & {"loss.source_count", "loss.covariance", "loss.prediction"}


@pytest.mark.parametrize("steps", [10, 36, 50, 400, 20_000])
def test_a_ceiling_that_is_never_reached_is_not_searched(steps: int) -> None:
    """The decay of the average is searched just where the run is long enough to notice."""
    decay = next(one for one in SPACE if one.key == "optimization.averaging_decay")
    cut = within_reach(decay, steps=steps)
    if cut is None:
        assert warmed_up_decay(steps, 1.0) <= decay.low + 1e-3
    else:
        assert cut.low < cut.high <= warmed_up_decay(steps, decay.high) + 1e-3


def test_a_search_with_nothing_left_to_search_is_refused() -> None:
    """Fixing all settings is an error that names them."""
    with pytest.raises(SearchError, match=r"nothing to search.*network\.dropout"):
        free_dimensions(preset("overfit"), fixed={one.key for one in SPACE})
