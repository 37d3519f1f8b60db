"""The records of a run in order, in memory and as JSON Lines.

One line is one JSON object: ``kind`` (``"step"``, ``"finding"`` or the name of a fact), ``schema`` (see
:data:`gradguard.records.SCHEMA_VERSION`) and the fields of the value. The JSON is strict: None is
``null`` and never 0.0, NaN and infinity are the strings of :data:`gradguard.codec.NONFINITE_NAMES`.
"""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from gradguard.codec import Codec, CodecError, codec_of
from gradguard.facts import (
    BatchReading,
    CopyReading,
    Fact,
    ForeignStep,
    LoadReading,
    LossReading,
    MetricReading,
    ModuleReading,
    ProbeReading,
    ReplicaReading,
    RunEnd,
    Setup,
    WeightsChanged,
)
from gradguard.findings import Finding
from gradguard.records import SCHEMA_VERSION, StepOutcome, StepRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

LogEntry = StepRecord | Finding | Fact
"""What one line of a saved run holds."""

F = TypeVar("F", bound=Fact)

_KINDS: Mapping[str, tuple[type, Codec]] = MappingProxyType(
    {
        kind: (entry, codec_of(entry))
        for kind, entry in (
            ("step", StepRecord),
            ("finding", Finding),
            ("setup", Setup),
            ("module", ModuleReading),
            ("batch", BatchReading),
            ("loss", LossReading),
            ("copy", CopyReading),
            ("load", LoadReading),
            ("weights", WeightsChanged),
            ("foreign", ForeignStep),
            ("replica", ReplicaReading),
            ("metric", MetricReading),
            ("probe", ProbeReading),
            ("end", RunEnd),
        )
    }
)
_NAMES: Mapping[type, str] = MappingProxyType({entry: kind for kind, (entry, _) in _KINDS.items()})

_OWN_KIND = "of_kind"


class RunLogError(ValueError):
    """A record that cannot be written, or text that does not hold a record."""


class UnreadableLineError(RunLogError):
    """A line that is no JSON object at all, as a write that was cut short leaves it."""


class RunLog:
    """The records of a run in the order they arrived, the facts beside them, and what was found.

    Iteration, ``len`` and indexing see the records. A slice is a RunLog of the records chosen;
    facts and findings belong to the whole run and stay behind.

    Args:
        records: records to begin with.
        findings: findings to begin with.
        facts: facts to begin with.
    """

    def __init__(
        self,
        records: Iterable[StepRecord] = (),
        findings: Iterable[Finding] = (),
        facts: Iterable[Fact] = (),
    ) -> None:
        self._records = list(records)
        self._findings = list(findings)
        self._facts = list(facts)

    @classmethod
    def from_jsonl(cls, text: str) -> RunLog:
        """Read what :meth:`to_jsonl` wrote.

        Raises:
            RunLogError: naming the line, for text of another schema, with a field that is unknown,
                missing or of the wrong type, or that is not JSON.
        """
        log = cls()
        for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
            try:
                log.add(from_line(line))
            except RunLogError as error:
                raise type(error)(f"line {number}: {error}") from None
        return log

    def to_jsonl(self) -> str:
        """Return records, findings and facts, one JSON object a line; empty for an empty log.

        Raises:
            RunLogError: for a record that holds something else than its annotations say.
        """
        return "".join(f"{to_line(entry)}\n" for entry in self._entries())

    def append(self, record: StepRecord) -> None:
        """Add the record of the newest attempt."""
        self._records.append(record)

    def add_finding(self, finding: Finding) -> None:
        """Add one finding."""
        self._findings.append(finding)

    def add_fact(self, fact: Fact) -> None:
        """Add one fact."""
        self._facts.append(fact)

    def add(self, entry: LogEntry) -> None:
        """Add a record, a finding or a fact."""
        if isinstance(entry, StepRecord):
            self.append(entry)
        elif isinstance(entry, Finding):
            self.add_finding(entry)
        else:
            self.add_fact(entry)

    @property
    def facts(self) -> tuple[Fact, ...]:
        """What was read beside the records so far, in the order of arrival."""
        return tuple(self._facts)

    def facts_of(self, kind: type[F]) -> tuple[F, ...]:
        """Return the facts of one kind, such as ``Setup``, in the order of arrival."""
        return tuple(fact for fact in self._facts if isinstance(fact, kind))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, in the order of arrival."""
        return tuple(self._findings)

    @property
    def last(self) -> StepRecord | None:
        """The newest record; None while there is none."""
        return self._records[-1] if self._records else None

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The names of the optimizers with a record, in the order of their first one."""
        return tuple(dict.fromkeys(record.optimizer for record in self._records))

    def count(self, outcome: StepOutcome) -> int:
        """Return how many attempts, of all optimizers, came to this outcome."""
        return sum(record.outcome is outcome for record in self._records)

    def streaks(self, outcome: StepOutcome) -> list[tuple[StepRecord, ...]]:
        """Return every longest unbroken row of attempts with this outcome, oldest first.

        Rows are taken per optimizer: when two of them step in turn, a good step of one does not end
        the row of the other.
        """
        running: dict[str, list[StepRecord]] = {}
        found: list[list[StepRecord]] = []
        for record in self._records:
            if record.outcome is not outcome:
                running.pop(record.optimizer, None)
            elif record.optimizer in running:
                running[record.optimizer].append(record)
            else:
                running[record.optimizer] = [record]
                found.append(running[record.optimizer])
        return [tuple(streak) for streak in found]

    def window(self, last_n: int) -> RunLog:
        """Return the newest ``last_n`` records, or all of them when there are fewer.

        Raises:
            ValueError: for a negative number.
        """
        if last_n < 0:
            raise ValueError(f"RunLog.window() got last_n={last_n}; pass 0 or more records")
        return RunLog(self._records[max(0, len(self._records) - last_n) :])

    def for_optimizer(self, name: str) -> RunLog:
        """Return the records of one optimizer; empty when it has none."""
        return RunLog(record for record in self._records if record.optimizer == name)

    def _entries(self) -> Iterator[LogEntry]:
        yield from self._records
        yield from self._findings
        yield from self._facts

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self._records)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...
    @overload
    def __getitem__(self, index: slice) -> RunLog: ...
    def __getitem__(self, index: int | slice) -> StepRecord | RunLog:
        if isinstance(index, slice):
            return RunLog(self._records[index])
        return self._records[index]

    def __repr__(self) -> str:
        return f"RunLog({len(self._records)} records, {len(self._findings)} findings)"


def to_line(entry: LogEntry) -> str:
    """Return one entry as one line of strict JSON in ASCII, without the newline.

    Raises:
        RunLogError: for a value that is not what its annotation says, such as a tensor.
    """
    kind = _NAMES[type(entry)]
    try:
        fields = _KINDS[kind][1].encode(entry)
    except CodecError as error:
        raise RunLogError(
            f"cannot write {_named(entry)}: {error}; records hold plain Python values only"
        ) from None
    if "kind" in fields:  # the value's own field; the line's is what kind of value it is
        fields[_OWN_KIND] = fields.pop("kind")
    head = {"kind": kind, "schema": SCHEMA_VERSION}
    return json.dumps(head | fields, allow_nan=False, separators=(",", ":"))


def from_line(line: str) -> LogEntry:
    """Read one line that :func:`to_line` wrote.

    Raises:
        UnreadableLineError: for text that is no JSON object.
        RunLogError: for another schema or kind, and for a field that is unknown, missing or of the
            wrong type.
    """
    fields = _parse(line)
    schema, kind = fields.pop("schema", None), fields.pop("kind", None)
    if schema != SCHEMA_VERSION or isinstance(schema, bool):
        raise RunLogError(
            f"the entry has schema {schema!r}, this gradguard reads {SCHEMA_VERSION}; "
            f"use a gradguard of the version that wrote it"
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RunLogError(f"the entry is of kind {kind!r}; known are {', '.join(_KINDS)}")
    if _OWN_KIND in fields:
        fields["kind"] = fields.pop(_OWN_KIND)
    try:
        entry: LogEntry = _KINDS[kind][1].decode(fields)
    except CodecError as error:
        raise RunLogError(f"cannot read the {kind}: {error}") from None
    return entry


def _named(entry: LogEntry) -> str:
    if isinstance(entry, StepRecord):
        return f"step {entry.step} of optimizer {entry.optimizer!r}"
    if isinstance(entry, Finding):
        return f"finding {entry.code}"
    return f"a {type(entry).__name__} of step {entry.step}"


def _parse(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UnreadableLineError(f"not a line of JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UnreadableLineError("not a JSON object")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; a gradguard log writes it as the string {name!r}")
