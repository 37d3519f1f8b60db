"""What stands on the command line, turned into plain values or refused in one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from gradguard.engine import Selection, diagnose, find_rule, thresholds_of
from gradguard.runlog import RunLog


class CommandError(ValueError):
    """A command that cannot be carried out; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            CommandError: always.
        """
        raise CommandError(f"{message}; {self.prog} --help shows what can be given")


def selection_of(options: argparse.Namespace) -> Selection:
    """Return which rules the options choose, and their thresholds.

    Raises:
        CommandError: for an option without a name, a threshold that is no number its rule can use, and
            when no rule is left.
        UnknownRuleError: a code, slug or threshold that no rule has.
    """
    chosen = Selection(
        select=_names("--select", options.select),
        ignore=_names("--ignore", options.ignore),
        thresholds=dict(_threshold(text) for text in options.threshold),
    )
    nothing = diagnose(
        RunLog(), select=chosen.select, ignore=chosen.ignore, thresholds=chosen.thresholds
    )
    if not nothing.not_looked_at and not nothing.looked_at:
        raise CommandError("--select and --ignore leave no rule to judge; ignore fewer of them")
    return chosen


def _names(option: str, given: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a comma-separated option that may be given several times."""
    names: list[str] = []
    for text in given:
        found = [name.strip() for name in text.split(",") if name.strip()]
        if not found:
            raise CommandError(f"{option} got {text!r}; give codes, their beginnings or names")
        names += found
    return tuple(names)


def _threshold(text: str) -> tuple[str, float]:
    """Return one ``CODE.name=value``, checked against the kind of number that its rule takes."""
    key, equals, number = (part.strip() for part in text.partition("="))
    code, dot, name = key.partition(".")
    if not equals or not dot:
        raise CommandError(
            f"--threshold got {text!r}; give CODE.name=value, such as GG101.limit=12"
        )
    value = _finite(text, number)
    default: object = thresholds_of(find_rule(code)).get(
        name
    )  # an unknown name is refused by the engine
    if isinstance(default, int) and not value.is_integer():
        raise CommandError(
            f"--threshold got {text!r}; {key} is a whole number, {default} by default"
        )
    return key, value


def _finite(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise CommandError(f"--threshold got {text!r}; {number!r} is not a number") from None
    if not math.isfinite(value):
        raise CommandError(f"--threshold got {text!r}; give a finite number")
    return value
