"""An attention mask that hides the tokens and shows the padding.

Looks at: attention layers with a key padding mask. Where an embedding has a padding index, the share of
masked positions should be the share of padding and not its complement. Where the kept positions are (next to)
zero and the masked ones are not, the signal is hidden. Limits: shares near one half tell nothing; masks that
are applied by hand are not seen.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html (key_padding_mask: True
is ignored).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._runs import healthy
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG1008",
    slug="mask-inverted",
    family="data",
    severity=Severity.ERROR,
    summary="The mask is used with the opposite meaning: padding is attended to, tokens are not.",
    remedy="Invert it: True in key_padding_mask means that a position is ignored.",
    needs=(Sight.MODULES,),
)


def check(
    run: Evidence, *, readings: int = 2, near: float = 0.05, far: float = 0.25, quiet: float = 1e-3
) -> Iterator[Finding]:
    """Report every attention layer whose mask was the wrong way round in two steps or more."""
    padding: dict[int, list[float]] = {}
    masked: dict[str, list[ModuleReading]] = {}
    for one in run.of(ModuleReading):
        if one.padding_fraction is not None:
            padding.setdefault(one.step, []).append(one.padding_fraction)
        if one.masked_fraction is not None:
            masked.setdefault(one.module, []).append(one)
    for module, found in masked.items():
        wrong = [
            one
            for one in found
            if _hides_signal(one, quiet)
            or _is_complement(one, padding.get(one.step, []), near, far)
        ]
        if len(wrong) >= readings and len(wrong) >= 0.8 * len(found):
            yield _report(module, wrong, padding)


def _report(module: str, wrong: list[ModuleReading], padding: dict[int, list[float]]) -> Finding:
    first = wrong[0]
    measured = {
        "masked_fraction": first.masked_fraction,
        "masked_rms": first.masked_rms,
        "kept_rms": first.kept_rms,
    }
    shares = padding.get(first.step, [])
    of = f" although {shares[0]:.0%} of the tokens are padding" if shares else ""
    return RULE.finding(
        f"{module} masks {first.masked_fraction:.0%} of the positions{of}: it sees what it should ignore",
        place=module,
        first_step=first.step,
        last_step=wrong[-1].step,
        evidence={key: value for key, value in measured.items() if value is not None},
    )


def _hides_signal(one: ModuleReading, quiet: float) -> bool:
    """Whether all that is not zero is masked."""
    if one.masked_rms is None or one.kept_rms is None:
        return False
    return one.masked_rms > 1e-6 and one.kept_rms <= quiet * one.masked_rms


def _is_complement(one: ModuleReading, padding: list[float], near: float, far: float) -> bool:
    """Whether the share of masked positions is that of tokens, and of no embedding that of padding."""
    share = one.masked_fraction
    if share is None:
        return False
    right = any(abs(share - part) < far for part in padding)
    return not right and any(abs(share - (1 - part)) <= near for part in padding)


def _step(number: int, masked: float) -> tuple[ModuleReading, ModuleReading]:
    """Return an embedding with 20 % padding and an attention layer that masks ``masked``."""
    return (
        ModuleReading(step=number, module="embedding", kind="Embedding", padding_fraction=0.2),
        ModuleReading(
            step=number,
            module="encoder.attention",
            kind="MultiheadAttention",
            masked_fraction=masked,
            masked_rms=1.0,
            kept_rms=1.1,
        ),
    )


def fires_on() -> RunLog:
    """The mask is True for tokens."""
    return healthy(6, *(one for i in range(3) for one in _step(i, 0.8)))


def silent_on() -> RunLog:
    """The mask is True for padding."""
    return healthy(6, *(one for i in range(3) for one in _step(i, 0.2)))
