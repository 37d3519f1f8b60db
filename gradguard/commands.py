"""The commands of the command line: ``check`` runs, list the ``rules``, ``explain`` one of them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from rich.console import Console, Group, RenderableType
from rich.text import Text

from gradguard.arguments import CommandError, Parser, selection_of
from gradguard.findings import Severity
from gradguard.judging import Judged, judge
from gradguard.pages import every_rule, find_page
from gradguard.views import wording
from gradguard.views.diagnosis import diagnosis_view
from gradguard.views.json_form import json_form, rules_form
from gradguard.views.rule_page import page_view, rules_view
from gradguard.views.sarif import sarif_form

__all__ = ["CommandError", "parse"]

HEALTHY, FOUND, UNUSABLE = 0, 1, 2
"""Exit statuses: nothing found, something found, no judgement or not of all."""

FAIL_ON: Mapping[str, frozenset[Severity]] = MappingProxyType(
    {
        "error": frozenset({Severity.ERROR}),
        "warning": frozenset({Severity.ERROR, Severity.WARNING}),
        "never": frozenset(),
    }
)
"""Which severities make ``check`` leave with status 1."""

_STANDARD_OUTPUT = "-"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line; ``command`` is the function to call with them.

    Raises:
        CommandError: for arguments that make no command.
        SystemExit: after ``--help`` and ``--version``.
    """
    parser = Parser(
        prog="gradguard",
        description="Tell the truth about every optimizer step of a recorded training run.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gradguard {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _check_parser(commands)
    _rules_parser(commands)
    _explain_parser(commands)
    return parser.parse_args(argv)


def _check_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "check",
        help="judge recorded runs",
        description="Judge recorded runs: what is wrong, since when, how it is known, what to change.",
        epilog="Exit status: 0 healthy, 1 something found, 2 a run that cannot be judged to its end.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory")
    for option, told in (
        ("--select", "judge only these codes, beginnings of codes, names"),
        ("--ignore", "leave these out"),
    ):
        parser.add_argument(option, action="append", default=[], metavar="A,B", help=told)
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="CODE.name=VALUE",
        help="set a threshold of a rule; may be given several times",
    )
    for form in ("json", "sarif"):
        parser.add_argument(
            f"--{form}",
            nargs="?",
            const=_STANDARD_OUTPUT,
            metavar="FILE",
            help=f"write the judgement as {form.upper()} to FILE; without FILE, instead of the text",
        )
    parser.add_argument(
        "--fail-on",
        choices=tuple(FAIL_ON),
        default="warning",
        help="the least severity that gives exit status 1 (default: %(default)s)",
    )
    parser.set_defaults(command=check)


def _rules_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("rules", help="list all rules", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(command=rules)


def _explain_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser("explain", help="show the page of one rule", allow_abbrev=False)
    parser.add_argument("rule", metavar="CODE", help="its code or its name")
    parser.set_defaults(command=explain)


def check(options: argparse.Namespace) -> int:
    """Judge runs, show or write the judgement, and return the exit status of the worst run.

    Raises:
        CommandError: for options that cannot be followed and a file that cannot be written.
        UnknownRuleError: a code, slug or threshold that no rule has.
    """
    if options.json == options.sarif == _STANDARD_OUTPUT:
        raise CommandError("--json and --sarif both go to standard output; give one of them a FILE")
    judged = judge(options.runs, selection_of(options))
    _write_forms(options, judged)
    if _STANDARD_OUTPUT not in (options.json, options.sarif):
        for number, one in enumerate(_shown(judged)):
            _show(one, apart=number > 0)
    statuses = [_status(run, FAIL_ON[options.fail_on]) for run in judged]
    for run, status in zip(judged, statuses, strict=True):
        for error in _errors(run) if status == UNUSABLE else ():
            sys.stderr.write(f"error: {wording.one_line(error)}\n")
    return max(statuses)


def rules(options: argparse.Namespace) -> int:
    """List every rule."""
    if options.json:
        pages = [find_page(rule.code) for rule in every_rule()]
        _write(_STANDARD_OUTPUT, rules_form(pages, version=_version()))
    else:
        _show(rules_view(every_rule()))
    return HEALTHY


def explain(options: argparse.Namespace) -> int:
    """Show the page of one rule.

    Raises:
        UnknownRuleError: there is none of this name.
    """
    _show(page_view(find_page(options.rule)))
    return HEALTHY


def _status(judged: Judged, failing: frozenset[Severity]) -> int:
    if judged.error is not None or judged.diagnosis is None:
        return UNUSABLE
    if judged.diagnosis.worst in failing:
        return FOUND
    # What a torn log has lost is not known to be healthy.
    return UNUSABLE if judged.problems else HEALTHY


def _errors(judged: Judged) -> tuple[str, ...]:
    """Return why a run cannot be judged, or not to its end."""
    return judged.problems if judged.error is None else (judged.error,)


def _shown(judged: Sequence[Judged]) -> list[Group]:
    """Return what there is to tell of every run: its problems, and what was found in it."""
    known = {rule.code: rule for rule in every_rule()}
    told = []
    for one in judged:
        found = one.diagnosis
        if found is None or (one.error is not None and not found.findings):
            continue
        head = Text(wording.one_line(one.name), style="bold")
        problems = [Text(f"note: {wording.one_line(problem)}") for problem in one.problems]
        told.append(Group(head, *problems, diagnosis_view(found, rules=known)))
    return told


def _write_forms(options: argparse.Namespace, judged: Sequence[Judged]) -> None:
    known = every_rule()
    forms: tuple[tuple[str | None, Callable[[], dict[str, object]]], ...] = (
        (options.json, lambda: json_form(judged, version=_version())),
        (options.sarif, lambda: sarif_form(judged, known, version=_version())),
    )
    for target, form in forms:
        if target is not None:
            _write(target, form())


def _write(target: str, form: dict[str, object]) -> None:
    """Write a JSON value to a file or to standard output.

    Raises:
        CommandError: when the file cannot be written.
    """
    text = json.dumps(form, allow_nan=False, indent=2) + "\n"
    if target == _STANDARD_OUTPUT:
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="ascii")
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(
            f"cannot write {target}: {reason}; give --json or --sarif a FILE"
        ) from None


def _show(content: RenderableType, *, apart: bool = False) -> None:
    """Print to standard output, with question marks for what it cannot write."""
    console = Console(file=sys.stdout, highlight=False)
    with console.capture() as captured:
        console.print(content)
    encoding = console.encoding
    text = captured.get().encode(encoding, "replace").decode(encoding)
    lines = [line.rstrip() for line in text.splitlines()]  # rich fills tables up to the width
    sys.stdout.write("\n" * apart + "\n".join(lines) + "\n")


def _version() -> str | None:
    """Return the version of the installed package; None where it runs from a folder."""
    try:
        return version("gradguard")
    except PackageNotFoundError:
        return None
