"""Reads loss scalers around their updates, for every optimizer that is on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch.amp import GradScaler

from gradguard.findings import SCALER_BYPASSED, Finding, Severity
from gradguard.scaler import UpdateWatch
from gradguard.stepwatch import OptimizerWatch


class ScalerUpdates:
    """Tells optimizer watches of ``scaler.update()``, and notices optimizers that a scaler was not asked about.

    Args:
        protect: the guard's boundary.
        report: takes a finding.
    """

    def __init__(
        self,
        *,
        protect: Callable[[str, Callable[[], None]], None],
        report: Callable[[Finding], None],
    ) -> None:
        self._protect, self._report = protect, report
        self._reported: set[str] = set()
        self._followed: list[UpdateWatch] = []

    def follow(self, scaler: GradScaler, watches: Sequence[OptimizerWatch]) -> None:
        """Read ``scaler`` around each of its updates."""
        self._followed.append(
            UpdateWatch(
                scaler, before=partial(self.begin, watches), after=partial(self.end, watches)
            )
        )

    def begin(self, watches: Sequence[OptimizerWatch]) -> None:
        """An update is about to happen. Sync: none."""
        self._protect("scaler", partial(self._begin, watches))

    def end(self, watches: Sequence[OptimizerWatch]) -> None:
        """An update has happened. Sync: none."""
        self._protect("scaler", partial(_end, watches))

    def close(self) -> None:
        """Stop following."""
        for one in self._followed:
            one.remove()
        self._followed = []

    def _begin(self, watches: Sequence[OptimizerWatch]) -> None:
        for watch in watches:
            if watch.stepped_without_scaler():
                self._report_bypass(watch.name)
            watch.before_update()

    def _report_bypass(self, optimizer: str) -> None:
        if optimizer in self._reported:
            return
        self._reported.add(optimizer)
        self._report(
            Finding(
                code=SCALER_BYPASSED,
                severity=Severity.ERROR,
                message=f"optimizer {optimizer!r} was stepped, but the watched GradScaler has not "
                "seen it in this iteration: call scaler.step(optimizer) instead of optimizer.step(), "
                "and pass watch() the scaler that this optimizer is stepped with (or a mapping from "
                "optimizer name to scaler, with None for an optimizer that has none)",
            )
        )


def _end(watches: Sequence[OptimizerWatch]) -> None:
    for watch in watches:
        watch.after_update()
