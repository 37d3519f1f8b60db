"""How trials are chosen: TPE over all settings at once, the same choice again after a kill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.pruners import MedianPruner
from optuna.samplers import BaseSampler, TPESampler

from reference_trainer.search.counting import slot_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

_PEERS = 5
_UNJUDGED_SHARE = 4


class SlotSampler(BaseSampler):
    """TPE with a fresh seed for every slot, so that a choice depends on what came before alone.

    A sampler with one seed starts its random numbers anew in every process: a resumed search would
    repeat its first trials, and two processes would run the same ones.

    Args:
        seed: seed of the whole search.
        start: the numbers of the first trial.
    """

    def __init__(self, *, seed: int, start: Mapping[str, float]) -> None:
        self._seed, self._start = seed, dict(start)
        self._slot, self._tpe = 0, TPESampler(seed=seed, multivariate=True)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Find the slot of the trial and seed its choices."""
        self._slot = slot_of(study.get_trials(deepcopy=False), trial.number)
        words = np.random.SeedSequence((self._seed, self._slot)).generate_state(1)
        self._tpe = TPESampler(seed=int(words[0]), multivariate=True)
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return what TPE chooses together; nothing for the first trial."""
        return self._tpe.infer_relative_search_space(study, trial) if self._slot else {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return TPE's choice."""
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the starting point for the first trial, TPE's choice for the others."""
        if self._slot == 0 and param_name in self._start:
            return self._start[param_name]
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """Let TPE take note."""
        self._tpe.after_trial(study, trial, state, values)


def make_pruner(*, n_trials: int, epochs: int) -> MedianPruner:
    """Return the pruner: stops a trial that is worse than half of the finished ones at its epoch.

    A quarter of the epochs is left unjudged: the error of the covariance stays on a plateau until the
    predicted factors begin to overlap the true subspace, and says little before. A third of
    the trials, five at most, run to their end first.
    """
    return MedianPruner(
        n_startup_trials=max(1, min(_PEERS, n_trials // 3)),
        n_warmup_steps=max(1, epochs // _UNJUDGED_SHARE),
    )
