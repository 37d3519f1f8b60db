"""What is searched: a table of settings and their ranges.

Left out on purpose: loss weights whose term is not in the objective (the smallest would always win),
pairs of weights that act through their sum alone, and settings that change the amount of work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from reference_trainer.averaging import warmed_up_decay
from reference_trainer.search.errors import SearchError
from reference_trainer.settings import as_mapping
from reference_trainer.setup import steps_of

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from optuna.trial import BaseTrial

    from reference_trainer.config import Config

Scale = Literal["linear", "log", "complement"]


@dataclass(frozen=True, slots=True)
class Dimension:
    """One searched setting.

    Attributes:
        key: the setting, ``section.key``.
        low: smallest value.
        high: largest value.
        scale: what is drawn uniformly: the value ("linear"), its logarithm ("log"), or the logarithm
            of one minus the value ("complement").
    """

    key: str
    low: float
    high: float
    scale: Scale

    @property
    def name(self) -> str:
        """Name of the number that is drawn; for a complement it is not the setting itself."""
        return f"1 - {self.key}" if self.scale == "complement" else self.key

    @property
    def drawn_range(self) -> tuple[float, float]:
        """Smallest and largest number that is drawn."""
        if self.scale == "complement":
            return _rounded(1.0 - self.high), _rounded(1.0 - self.low)
        return self.low, self.high

    def suggest(self, trial: BaseTrial) -> str:
        """Draw a value for ``trial``; return it as ``key=value``, just as it is used."""
        low, high = self.drawn_range
        drawn = trial.suggest_float(self.name, low, high, log=self.scale != "linear")
        return f"{self.key}={self.value_of(drawn):.10g}"

    def value_of(self, drawn: float) -> float:
        """Return the setting for a drawn number, of which three digits count.

        Three are enough to find a good setting, and what is printed is then exactly what ran.
        """
        short = _rounded(drawn)
        return 1.0 - short if self.scale == "complement" else short

    def nearest(self, value: float) -> float:
        """Return the number to draw for the setting nearest to ``value`` in the range."""
        inside = min(max(value, self.low), self.high)
        return 1.0 - inside if self.scale == "complement" else inside


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


SPACE: tuple[Dimension, ...] = (
    Dimension("optimization.backbone_learning_rate", 1e-4, 3e-3, "log"),
    Dimension("optimization.head_learning_rate", 2e-4, 1e-2, "log"),
    Dimension("optimization.weight_decay", 1e-5, 0.1, "log"),
    Dimension("optimization.clip_norm", 0.1, 10.0, "log"),
    Dimension("optimization.warmup_fraction", 0.01, 0.3, "linear"),
    Dimension("optimization.averaging_decay", 0.8, 0.999, "complement"),
    Dimension("network.dropout", 0.0, 0.3, "linear"),
    Dimension("loss.alignment", 0.005, 0.5, "log"),
    Dimension("loss.aux_angles", 0.05, 5.0, "log"),
)
"""Every searched setting. The weight of the covariance term stays 1: only ratios of weights matter."""


def free_dimensions(config: Config, *, fixed: Container[str] = ()) -> tuple[Dimension, ...]:
    """Return the dimensions that are searched around ``config``.

    Args:
        config: the run of every trial, but for the searched settings.
        fixed: settings that are not searched.

    Raises:
        SearchError: none is left.
    """
    reachable = (within_reach(one, steps=steps_of(config)) for one in SPACE if one.key not in fixed)
    free = tuple(dimension for dimension in reachable if dimension is not None)
    if not free:
        raise SearchError(
            "every searched setting is fixed by --set, so there is nothing to search; leave at least "
            f"one open of {', '.join(dimension.key for dimension in SPACE)}"
        )
    return free


def within_reach(dimension: Dimension, *, steps: int) -> Dimension | None:
    """Return the part of a range that can make a difference in so many steps; None if there is none.

    The decay of the averaged weights warms up: a short run never reaches a high ceiling.
    """
    if dimension.key != "optimization.averaging_decay":
        return dimension
    reached = 1.0 - _rounded(1.0 - warmed_up_decay(steps, dimension.high))
    return replace(dimension, high=reached) if reached > dimension.low else None


def starting_point(config: Config, space: Iterable[Dimension]) -> dict[str, float]:
    """Return the numbers to draw so that a trial runs ``config`` itself, as near as the ranges allow."""
    tree = as_mapping(config)
    point = {}
    for dimension in space:
        section, key = dimension.key.split(".")
        value = float(tree[section][key])
        if not math.isfinite(value):
            raise SearchError(f"starting the search: {dimension.key} is {value}, expected a number")
        point[dimension.name] = dimension.nearest(value)
    return point
