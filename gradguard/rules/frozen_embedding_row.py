"""A token that is read as text and excluded from training as padding.

Looks at: embeddings with ``padding_idx``: how many of the positions that hold this index have other tokens on
both sides in their row. Padding stands at the ends of a row; a real token stands among others, and its row of
the table never gets a gradient. Limits: needs sequences; a table that is looked up one index at a time does
not show it.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html (padding_idx).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1009",
    slug="frozen-embedding-row",
    family="data",
    severity=Severity.WARNING,
    summary="The index that an embedding treats as padding is a token of the text: its row never learns.",
    remedy="Give padding an index of its own and pass that as padding_idx, or leave padding_idx out.",
    needs=(Sight.MODULES,),
)


def check(run: Evidence, *, readings: int = 2, share: float = 0.5) -> Iterator[Finding]:
    """Report every embedding whose padding index stands among other tokens."""
    found: dict[str, list[ModuleReading]] = {}
    for one in run.of(ModuleReading):
        if one.training and one.padding_interior is not None and one.padding_interior > share:
            found.setdefault(one.module, []).append(one)
    for module, seen in found.items():
        if len({one.step for one in seen}) < readings:
            continue
        interior = seen[0].padding_interior or 0.0
        yield RULE.finding(
            f"{interior:.0%} of the padding that {module!r} is given stands between other tokens: it is no "
            "padding, and that row of the table gets no gradient",
            place=module,
            first_step=seen[0].step,
            last_step=seen[-1].step,
            evidence={"interior": interior, "padding_fraction": seen[0].padding_fraction or 0.0},
        )


def _embedded(interior: float) -> RunLog:
    readings = [
        ModuleReading(
            step=number,
            module="embedding",
            kind="Embedding",
            padding_fraction=0.2,
            padding_interior=interior,
        )
        for number in range(3)
    ]
    return healthy(6, *readings)


def fires_on() -> RunLog:
    """Index 0 is a frequent word, and padding_idx."""
    return _embedded(0.9)


def silent_on() -> RunLog:
    """Padding at the end of every row."""
    return _embedded(0.0)
