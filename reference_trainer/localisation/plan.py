"""What networks are judged on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from reference_trainer.config import Device
from reference_trainer.errors import ConfigError
from reference_trainer.localisation.hybrid import SAMPLE_SHARE
from reference_trainer.scenes import Split
from reference_trainer.setup import pick_device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to judge networks on.

    Attributes:
        seed: of the scenes.
        split: of the scenes.
        scenes: number of scenes.
        subset: the first of them, for the slow estimators.
        share: of the fitted covariance in the blend.
        threads: torch's threads, of each worker.
        workers: batches of scenes worked on at the same time; results do not depend on it.
        device: where everything runs.

    Raises:
        ConfigError: a field is out of its bounds; the message names it.
    """

    seed: int = 0
    split: Split = "validation"
    scenes: int = 1000
    subset: int = 200
    share: float = SAMPLE_SHARE
    threads: int = 1
    workers: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("scenes", "subset", "threads", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"judging networks: {name} is {getattr(self, name)}; expected at least 1"
                )
        if self.subset > self.scenes:
            raise ConfigError(
                f"judging networks: a subset of {self.subset} of {self.scenes} scenes; take a smaller "
                "--subset or more --scenes"
            )
        if not 0.0 <= self.share < 1.0:
            raise ConfigError(
                f"judging networks: the share of the sample covariance is {self.share}; expected 0 "
                "to less than 1"
            )
        if self.seed < 0:
            raise ConfigError(f"judging networks: the seed is {self.seed}; expected 0 or more")


def split_of(name: str) -> Split:
    """Return the split called ``name``.

    Raises:
        ConfigError: there is none.
    """
    for known in get_args(Split):
        if name == known:
            split: Split = known
            return split
    raise ConfigError(
        f"judging networks: the split is {name!r}; expected {' or '.join(get_args(Split))}"
    )


def device_of(name: str) -> torch.device:
    """Return the device called ``name``: cpu, cuda, or the better one for auto.

    Raises:
        ConfigError: there is none of that name, or not here.
    """
    for known in get_args(Device):
        if name == known:
            return pick_device(known)
    raise ConfigError(
        f"judging networks: the device is {name!r}; expected {' or '.join(get_args(Device))}"
    )
