"""Evaluation that runs in train mode.

Looks at: forward passes without a graph (torch.no_grad) while the model is in train mode and has dropout or
running statistics. Two signs tell an evaluation from passes that belong to the training: it comes now and
then, or from the second step on; teachers, pseudo-labels and re-computation come at every step from the
first. And nobody evaluates in eval mode in the same run: passes that refresh running statistics, or sample
dropout, come beside a proper evaluation. Limits: an evaluation before the first and after every step looks
like a teacher; forwards of another model (a teacher, an average) are not counted at all.

Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html (eval).
"""

from __future__ import annotations

from collections.abc import Iterator

from gradguard.evidence import Evidence
from gradguard.findings import Finding, Rule, Severity, Sight
from gradguard.records import StepRecord
from gradguard.rules._facts import layer
from gradguard.rules._modes import layers_with_mode, modes
from gradguard.rules._runs import run, setup, step
from gradguard.runlog import RunLog

RULE = Rule(
    code="GG802",
    slug="eval-in-train-mode",
    family="mode",
    severity=Severity.WARNING,
    summary="Evaluation runs in train mode: dropout is on, and its batches change the running statistics.",
    remedy="Call model.eval() before the evaluation and model.train() after it.",
    needs=(Sight.FORWARDS, Sight.SETUP),
)


def check(run: Evidence, *, windows: int = 2, forwards: int = 3) -> Iterator[Finding]:
    """Report evaluations in train mode: in two places, or in one of several forwards."""
    seen = modes(run)
    layers = [one.name for one in layers_with_mode(run) if True in seen.get(one.name, {True})]
    if not layers:
        return
    for records in run.by_optimizer.values():
        known = [r for r in records if r.window and r.window.without_grad_in_train is not None]
        # Dry runs and searches for a learning rate come before the first step.
        hits = [r for r in known[1:] if _in_train(r)]
        enough = len(hits) >= windows or sum(map(_in_train, hits)) >= forwards
        if not hits or not enough or not _is_evaluation(known, hits):
            continue
        total = sum(map(_in_train, hits))
        yield RULE.finding(
            f"{total} forward passes without a graph ran in train mode, the first of them before step "
            f"{hits[0].step}; {layers[0]} (and {len(layers) - 1} more) behaves differently then",
            place=layers[0],
            first_step=hits[0].step,
            last_step=hits[-1].step,
            evidence={"forwards": total, "evaluations": len(hits), "layers": len(layers)},
        )
        return  # the forwards are those of the model, whichever optimizer steps


def _in_train(record: StepRecord) -> int:
    return (record.window.without_grad_in_train or 0) if record.window else 0


def _is_evaluation(known: list[StepRecord], hits: list[StepRecord]) -> bool:
    if any(_in_eval(record) for record in known):
        return False
    if _in_train(known[0]) and len(hits) == len(known) - 1:
        return False
    paused = len(hits) < len(known) - known.index(hits[0])
    now_and_then = paused and 2 * len(hits) <= len(known)
    return now_and_then or (hits[0] is known[1] and not _in_train(known[0]))


def _in_eval(record: StepRecord) -> bool:
    """Whether there were forwards without a graph in eval mode as well."""
    window = record.window
    return bool(window and (window.forwards_without_grad or 0) > _in_train(record))


def _validated(number: int, forwards: int, *, in_train: int | None = None) -> StepRecord:
    window = {
        "forwards_without_grad": forwards,
        "without_grad_in_train": forwards if in_train is None else in_train,
    }
    return step(number, window=window)


def fires_on() -> RunLog:
    """Validation on four batches after every fifth step, without model.eval()."""
    records = [_validated(i, 4 if i and i % 5 == 0 else 0) for i in range(12)]
    return run(records, setup(modules=(layer("drop", "Dropout", p=0.1),)))


def silent_on() -> RunLog:
    """Pseudo-labels are made at every step from the first on, in train mode."""
    layers = (layer("drop", "Dropout", p=0.1),)
    return run([_validated(i, 1) for i in range(12)], setup(modules=layers))
