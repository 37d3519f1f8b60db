"""Running statistics that do not describe what a normalisation is given.

Looks at: the momentum of layers with running statistics, and the distance between their running mean and
variance and those of the batches they are given, in training forwards and in evaluations. Young statistics
are silent: they begin at 0 and 1, and are judged only when less than ``young`` of that is left after the
steps so far. So is a comparison of the two modes that the user told. A momentum near 1 keeps the last batch
only, and one of 0 nothing at all (torch counts the other way round than other libraries). Limits: batches of
several kinds in turn (real and made-up ones) are judged in evaluations only; statistics that lag a little are
not seen.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html (momentum).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.facts import ModuleFacts, ModuleReading, ProbeReading
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.rules._facts import module
from gradguard.rules._modes import is_batch_norm
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG804",
    slug="batchnorm-statistics-bad",
    family="mode",
    severity=Severity.WARNING,
    summary="The running statistics of a normalisation do not describe its activations: eval mode will differ.",
    remedy="Use a momentum of about 0.1 (torch: the weight of the new batch), train in train mode on batches "
    "like those of the evaluation, or refresh the statistics before it.",
    needs=(Sight.MODULES, Sight.SETUP),
)


def check(
    run: Evidence,
    *,
    shift: float = 3.0,
    ratio: float = 10.0,
    young: float = 0.05,
    momentum: float = 0.9,
    readings: int = 2,
    differs: float = 0.5,
) -> Iterator[Finding]:
    """Report layers with such a momentum, and those whose statistics are far off once they are settled."""
    seen: dict[str, list[ModuleReading]] = {}
    for one in run.of(ModuleReading):
        if one.statistics_shift is not None and one.statistics_ratio is not None:
            seen.setdefault(one.module, []).append(one)
    learns = {name for name, several in seen.items() if any(one.training for one in several)}
    for facts in run.setup.modules if run.setup else ():
        several = seen.get(facts.name, [])
        if not is_batch_norm(facts) or not several:
            continue
        weight = facts.settings.get("momentum")
        if weight is not None and weight >= momentum and facts.name in learns:
            yield _finding(facts, several, f"a momentum of {weight:g} keeps the last batch only")
            continue
        settled = [one for one in several if _is_settled(one, facts, young, facts.name in learns)]
        # Statistics that are never updated need not be far off to be wrong.
        far = (shift / 3, ratio / 4) if weight == 0.0 and facts.name in learns else (shift, ratio)
        off = [one for one in settled if _is_off(one, *far)]
        if len(off) >= readings and 2 * len(off) >= len(settled):
            yield _finding(facts, off, _words(off[0], weight))
    yield from _compared(run, young, differs)


def _compared(run: Evidence, young: float, differs: float) -> Iterator[Finding]:
    """Report what the user found by comparing the modes, once the statistics are settled."""
    norms = [one for one in (run.setup.modules if run.setup else ()) if is_batch_norm(one)]
    for probe in run.of(ProbeReading):
        if probe.kind != "eval differs" or probe.value is None or probe.value <= differs:
            continue
        old = [one for one in norms if _left(one, probe.step) < young]
        if old and len(old) == len(norms):
            yield RULE.finding(
                f"outputs in eval mode differ by {probe.value:.2g} of their size from those in train mode, and "
                f"the model has {len(norms)} layers with running statistics ({norms[0].name} ...)",
                place=probe.op or norms[0].name,
                first_step=probe.step,
                evidence={"difference": probe.value, "layers": len(norms)},
            )
            return


def _is_settled(one: ModuleReading, facts: ModuleFacts, young: float, learns: bool) -> bool:
    """Whether the statistics have had the time to become those of the batches."""
    weight = facts.settings.get("momentum")
    if one.training and one.calls > 1:
        return False
    if not learns or weight == 0.0:
        return True
    return _left(facts, one.step) < young


def _left(facts: ModuleFacts, step: int) -> float:
    """Return how much of the initial statistics is left after so many steps."""
    weight = facts.settings.get("momentum")
    return 1 / (step + 1) if weight is None else (1 - weight) ** step


def _is_off(one: ModuleReading, shift: float, ratio: float) -> bool:
    # In training the reading comes after the update, which takes the batch into account already.
    near = (one.statistics_shift or 0.0) <= shift
    like = 1 / ratio <= (one.statistics_ratio or 0.0) <= ratio
    return not (near and like)  # NaN is neither


def _words(one: ModuleReading, weight: float | None) -> str:
    frozen = " (a momentum of 0 never updates them)" if weight == 0.0 else ""
    return (
        f"the mean of a batch is {one.statistics_shift:.2g} running standard deviations off, and its variance "
        f"{one.statistics_ratio:.2g} times the running one{frozen}"
    )


def _finding(facts: ModuleFacts, several: list[ModuleReading], words: str) -> Finding:
    return RULE.finding(
        f"{facts.name}: {words}",
        place=facts.name,
        first_step=several[0].step,
        last_step=several[-1].step,
        evidence={
            "shift": several[0].statistics_shift or 0.0,
            "ratio": several[0].statistics_ratio or 0.0,
            "momentum": facts.settings.get("momentum", -1.0),
        },
    )


def _norm(**settings: float) -> ModuleFacts:
    usual = {"momentum": 0.1, "eps": 1e-5, "affine": 1.0, "track_running_stats": 1.0}
    return ModuleFacts(name="norm", kind="BatchNorm1d", training=True, settings=usual | settings)


def _read(number: int, shift: float, ratio: float, **changes: bool) -> ModuleReading:
    return module(
        number, "norm", "BatchNorm1d", statistics_shift=shift, statistics_ratio=ratio, **changes
    )


def fires_on() -> RunLog:
    """The batches of the evaluation are on another scale than those of the training."""
    training = [_read(i, 0.1, 1.1) for i in (0, 1, 2)]
    evaluation = [_read(i, 9.0, 140.0, training=False, grad=False) for i in (50, 100)]
    records = [step(i) for i in range(120)]
    return run(records, setup(modules=(_norm(),)), *training, *evaluation)


def silent_on() -> RunLog:
    """Young statistics that are far off, and settled ones that lag a little."""
    readings = [_read(0, 14.0, 40.0), _read(1, 9.0, 30.0), _read(2, 7.0, 20.0)]
    later = [_read(i, 0.4, 1.7) for i in (50, 100)]
    records = [step(i) for i in range(120)]
    return run(records, setup(modules=(_norm(),)), *readings, *later)
