"""The one place where a fault of the guard is kept from the user's run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from gradguard.findings import GUARD_FAULT, Finding, Severity


class Boundary:
    """Runs the guard's own work so that a fault in it switches that part off and becomes a finding.

    Args:
        strict: raise faults instead (for tests).
        report: takes the finding.
    """

    def __init__(self, *, strict: bool, report: Callable[[Finding], None]) -> None:
        self._strict, self._report = strict, report
        self._broken: set[str] = set()
        self._depth, self._spent_s = 0, 0.0

    def protect(self, part: str, work: Callable[[], None]) -> None:
        """Run ``work``, unless ``part`` has had a fault."""
        if part in self._broken:
            return
        started_s = time.perf_counter()
        self._depth += 1
        try:
            work()
        except Exception as error:  # the boundary: becomes a finding, or is raised
            if self._strict:
                raise
            self._broken.add(part)
            self._report(_fault(part, error))
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._spent_s += time.perf_counter() - started_s

    def take_spent_s(self) -> float:
        """Return the seconds that work has taken since this was last asked."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s


def _fault(part: str, error: Exception) -> Finding:
    return Finding(
        code=GUARD_FAULT,
        severity=Severity.WARNING,
        message=f"the guard's part {part!r} raised {type(error).__name__} and switched itself "
        "off; the training run is not affected, its later readings are not measured",
        detail="".join(traceback.format_exception(error)),
    )
