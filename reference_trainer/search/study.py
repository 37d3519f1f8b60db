"""One study that several processes share, and that outlives any of them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from reference_trainer.search.counting import queue_again, started
from reference_trainer.search.errors import AllTrialsStartedError, SearchError
from reference_trainer.search.locks import exclusive, is_gone, signed_on
from reference_trainer.search.sampling import SlotSampler, make_pruner
from reference_trainer.search.space import Dimension, starting_point
from reference_trainer.search.storage import opened
from reference_trainer.settings import as_mapping

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

    from reference_trainer.config import Config

WORKER = "worker"
"""User attribute of a trial: the process that runs it."""

_WHAT = "what is searched"
_FREE_SECTIONS = ("guard", "runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """A whole search.

    Attributes:
        base: the run of every trial, but for the searched settings.
        space: the searched settings.
        n_trials: trials in all, those of earlier and of other processes included.
        directory: where the run directories of the trials go, and the locks of the processes.
        storage: where the study is kept: ``journal:FILE`` or a database URL.
        study: name of the study.
        seed: seed of the choice of trials.
        take_over: whether running trials of unknown processes are run again, too.
    """

    base: Config
    space: tuple[Dimension, ...]
    n_trials: int
    directory: Path
    storage: str
    study: str
    seed: int = 0
    take_over: bool = False


class SharedStudy(optuna.Study):
    """A study that hands out ``n_trials`` trials in all, each to one process.

    Choosing and taking a trial is one act under a lock: SQLite would let two processes take the same
    queued trial. Processes on other machines, which do not share the directory, are kept apart by
    their database alone, and may run one trial more at the very end.
    """

    def __init__(self, plan: SearchPlan, *, storage: BaseStorage, worker: str) -> None:
        sampler = SlotSampler(seed=plan.seed, start=starting_point(plan.base, plan.space))
        pruner = make_pruner(n_trials=plan.n_trials, epochs=plan.base.optimization.epochs)
        super().__init__(plan.study, storage, sampler=sampler, pruner=pruner)
        self._plan, self._worker = plan, worker
        self._take_over = plan.take_over

    def ask(self, fixed_distributions: dict[str, BaseDistribution] | None = None) -> Trial:
        """Take the next trial.

        Raises:
            AllTrialsStartedError: as many as were asked for have been taken.
        """
        with exclusive(_lock_path(self._plan)):
            self._queue_abandoned()
            if started(self.get_trials(deepcopy=False)) >= self._plan.n_trials:
                raise AllTrialsStartedError
            trial = super().ask(fixed_distributions)
            trial.set_user_attr(WORKER, self._worker)
        return trial

    def _queue_abandoned(self) -> None:
        take_over, self._take_over = self._take_over, False  # once: later ones are not ours to take
        for trial in self.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if take_over or self._is_abandoned(trial):
                give_up(self, trial.number)

    def _is_abandoned(self, trial: FrozenTrial) -> bool:
        """A trial without a name was taken by a process that died before the lock let go of it."""
        worker = trial.user_attrs.get(WORKER)
        return worker is None or is_gone(workers_directory(self._plan), worker)


def give_up(study: optuna.Study, number: int) -> None:
    """Fail a running trial whose process is gone, and queue it again."""
    try:
        failed = study.tell(number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):  # another process was faster: it queues it, too
        return
    queue_again(study, failed)


@contextmanager
def opened_study(plan: SearchPlan) -> Iterator[SharedStudy]:
    """Open the study of a plan, made anew if need be, and sign on to it until the block ends.

    Raises:
        SearchError: directory or storage cannot be used, or the study searches something else.
    """
    with ExitStack() as stack:
        try:
            plan.directory.mkdir(parents=True, exist_ok=True)
            worker = stack.enter_context(signed_on(workers_directory(plan)))
        except OSError as error:
            reason = error.strerror or error
            raise SearchError(f"could not use {plan.directory} for a search: {reason}") from error
        with exclusive(_lock_path(plan)):  # two processes must not make the tables at once
            storage = stack.enter_context(opened(plan.storage))
            made = optuna.create_study(
                study_name=plan.study, storage=storage, direction="minimize", load_if_exists=True
            )
            _require_same_search(made, plan)
        yield SharedStudy(plan, storage=storage, worker=worker)


def workers_directory(plan: SearchPlan) -> Path:
    """Return where the processes of a search hold their locks."""
    return plan.directory / "workers"


def _lock_path(plan: SearchPlan) -> Path:
    return plan.directory / "study.lock"


def _require_same_search(study: optuna.Study, plan: SearchPlan) -> None:
    """Compare with what the study was made for: trials of different searches have no common measure.

    Raises:
        SearchError: it was made for another run or other ranges; the message names the first.
    """
    now = dict(_searched(plan))
    before = study.user_attrs.get(_WHAT)
    if before is None:
        study.set_user_attr(_WHAT, now)
        return
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        raise SearchError(
            f"the study {plan.study!r} was made with {name} = {before.get(name, 'nothing')}, not "
            f"{now.get(name, 'nothing')}; repeat its settings, or give another --study or --directory"
        )


def _searched(plan: SearchPlan) -> Iterator[tuple[str, object]]:
    """Yield what makes trials comparable, as plain values; device and watch may differ."""
    for section, values in as_mapping(plan.base).items():
        if section not in _FREE_SECTIONS:
            yield from ((f"{section}.{key}", value) for key, value in values.items())
    for one in plan.space:
        yield f"range of {one.key}", f"{one.low:g} to {one.high:g} ({one.scale})"
