"""What the checks before a training run answer, as plain values: ``PreflightReport`` and ``OverfitReport``."""

from __future__ import annotations

from dataclasses import dataclass

from gradguard.diagnosis import Diagnosis


class CheckFailedError(RuntimeError):
    """Something is wrong with what was checked; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer.

    Attributes:
        name: of the question, such as ``"optimizer"``.
        passed: None when it was not checked; the message says why.
        message: one sentence.
        place: name of the parameter, module or source line concerned; None where there is none.
    """

    name: str
    passed: bool | None
    message: str
    place: str | None = None

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"wrong"`` or ``"not checked"``."""
        if self.passed is None:
            return "not checked"
        return "ok" if self.passed else "wrong"

    def __str__(self) -> str:
        return f"{self.verdict:<11}  {self.name:<9}  {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightReport:
    """Answer of :func:`gradguard.preflight.preflight`.

    Attributes:
        checks: every question in order, with its answer.
        diagnosis: what the rules say of the steps that were taken; None when none was.
    """

    checks: tuple[Check, ...]
    diagnosis: Diagnosis | None = None

    @property
    def wrong(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.wrong

    @property
    def exit_code(self) -> int:
        """0 for ok, 1 when something is wrong."""
        return 0 if self.ok else 1

    def check(self, name: str) -> Check:
        """Return the check with this name.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        known = ", ".join(check.name for check in self.checks)
        raise KeyError(f"no check is called {name!r}; there are: {known}")

    def raise_if_wrong(self) -> None:
        """Raise if a check failed.

        Raises:
            CheckFailedError: with the sentence of every check that failed.
        """
        if not self.ok:
            raise CheckFailedError(
                "preflight: " + "; ".join(f"{one.name}: {one.message}" for one in self.wrong)
            )

    def __str__(self) -> str:
        return "\n".join([*map(str, self.checks), self.conclusion])

    @property
    def conclusion(self) -> str:
        """The whole in one sentence."""
        if self.ok:
            asked = sum(check.passed is not None for check in self.checks)
            return (
                f"ready to train: {asked} of {len(self.checks)} questions asked, nothing is wrong"
            )
        return f"not ready to train: {', '.join(check.name for check in self.wrong)} wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class OverfitReport:
    """Answer of :func:`gradguard.overfit.overfit_check`.

    Attributes:
        passed: whether the loss fell far enough.
        verdict: one sentence.
        first, last, best: loss of the first, the last and the best step; None when no step gave one.
        target: loss that had to be reached; None when it could not be set.
        floor: smallest loss that is possible.
        steps: steps taken.
        curve: pairs of step and loss, at most 64, the first and the last among them.
        diagnosis: what the rules say of the run when it failed; None when it passed or no step was taken.
    """

    passed: bool
    verdict: str
    first: float | None = None
    last: float | None = None
    best: float | None = None
    target: float | None = None
    floor: float = 0.0
    steps: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    diagnosis: Diagnosis | None = None

    @property
    def ok(self) -> bool:
        """Whether the batch was memorised."""
        return self.passed

    @property
    def fall(self) -> float | None:
        """Share of the way from the first loss to the floor that the best loss has gone; None if unknown."""
        if self.first is None or self.best is None or self.first <= self.floor:
            return None
        return (self.first - self.best) / (self.first - self.floor)

    @property
    def exit_code(self) -> int:
        """0 when it passed, 1 otherwise."""
        return 0 if self.passed else 1

    def raise_if_wrong(self) -> None:
        """Raise if the batch was not memorised.

        Raises:
            CheckFailedError: with the verdict.
        """
        if not self.passed:
            raise CheckFailedError(f"overfit check: {self.verdict}")

    def __str__(self) -> str:
        lines = [f"{'ok' if self.passed else 'wrong'}: {self.verdict}"]
        if self.diagnosis is not None:
            lines.append(str(self.diagnosis))
        return "\n".join(lines)
