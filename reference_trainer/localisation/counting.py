"""The ways to tell how many sources there are: by the network, by eigenvalues, by the likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from reference_trainer.likelihood import fits_of_every_number, number_by_bic
from reference_trainer.localisation.hybrid import seen_by
from reference_trainer.order import count_sources, loaded_eigenvalues
from reference_trainer.sample_covariance import fitted_factor

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from reference_trainer.model import CovarianceNetwork
    from reference_trainer.order import Criterion
    from reference_trainer.physics import ScenePhysics
    from reference_trainer.scenes import Scenes

CounterKey = Literal["head", "mdl", "aic", "bic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """One way to count sources.

    Attributes:
        key: its name in reports.
        title: its name for readers.
        slow: whether it is only used on a subset of the scenes.
        count: returns the number of sources of every scene, int64 ``[B]``, at least 1.
    """

    key: CounterKey
    title: str
    slow: bool
    count: Callable[[ScenePhysics, Scenes], Tensor]


def counters(model: CovarianceNetwork) -> tuple[Counter, ...]:
    """Return every way to count, the network's first.

    Args:
        model: in evaluation mode, on the device of the scenes.
    """
    by_mdl = partial(_by_eigenvalues, criterion="mdl")
    by_aic = partial(_by_eigenvalues, criterion="aic")
    return (
        Counter(
            key="head",
            title="K head",
            slow=False,
            count=lambda _, scenes: seen_by(model, scenes).num_sources,
        ),
        Counter(key="mdl", title="MDL", slow=False, count=by_mdl),
        Counter(key="aic", title="AIC", slow=False, count=by_aic),
        Counter(key="bic", title="BIC of the ML fits", slow=True, count=_by_likelihood),
    )


def _by_eigenvalues(physics: ScenePhysics, scenes: Scenes, *, criterion: Criterion) -> Tensor:
    """Count on the fitted covariance: no other sample covariance here has a signal subspace."""
    return count_sources(
        loaded_eigenvalues(fitted_factor(physics, scenes)),
        snapshots=physics.snapshots,
        max_sources=physics.max_sources,
        criterion=criterion,
    )


def _by_likelihood(physics: ScenePhysics, scenes: Scenes) -> Tensor:
    return number_by_bic(physics, fits_of_every_number(physics, scenes))
