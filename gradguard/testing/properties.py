"""Ready-made properties for your own sanitizer or gate: three lines each in a test file.

    from gradguard.testing import changes_only_nan, never_hides_an_overflow

    test_my_sanitizer_hides_nothing = never_hides_an_overflow(my_sanitizer)
    test_my_sanitizer_changes_only_nan = changes_only_nan(my_sanitizer)

Each function returns a hypothesis test that pytest collects and that can also be called. A sanitizer is a
function that is given a list of parameters and works on their ``.grad``; a gate is anything that
``make_gate(optimizer)`` returns as a context manager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from gradguard.testing.neutrality import TrainingRun, assert_neutral, named_optimizers
from gradguard.testing.strategies import (
    DENSE_LAYOUTS,
    FLOAT_DTYPES,
    Layout,
    OverflowSequence,
    bits_of,
    gradients,
    overflow_sequences,
    parameter_with,
)
from gradguard.testing.twins import PLACES, OptimizerTwin, Place, ScalerTrainer

Sanitizer = Callable[..., object]
"""``sanitizer(parameters)``, in place on ``.grad``; its result is ignored."""

MakeGate = Callable[[Optimizer], AbstractContextManager[object]]
"""Attaches a gate to an optimizer; leaving the context takes it off."""

Property = Callable[[], None]
"""A hypothesis test without arguments."""


def never_hides_an_overflow(
    sanitizer: Sanitizer,
    *,
    with_scaler: bool = False,
    places: Sequence[Place] = PLACES,
    settings: hypothesis.settings | None = None,
) -> Property:
    """Return a test: whatever step a GradScaler alone skips, it also skips with the sanitizer.

    Two real training loops run side by side on the same gradients, one without the sanitizer and one that
    calls it before ``unscale_``, between ``unscale_`` and ``step``, or after ``step``. Overflows appear
    as Inf, as NaN alone and as both.

    Args:
        sanitizer: the function to judge.
        with_scaler: call it as ``sanitizer(parameters, scaler=scaler, optimizer=optimizer)``.
        places: where in the loop it may be called; limit this if yours belongs in one place.
        settings: hypothesis settings; None: :func:`property_settings`.
    """

    @hypothesis.given(sequence=overflow_sequences(), place=st.sampled_from(tuple(places)))
    def test_never_hides_an_overflow(sequence: OverflowSequence, place: Place) -> None:
        """A step that the scaler alone skips is skipped with the sanitizer too."""
        alone = ScalerTrainer.of(sequence)
        guarded = ScalerTrainer.of(sequence, sanitizer=sanitizer, with_scaler=with_scaler)
        for gradient in sequence.steps:
            scale = guarded.scaler.get_scale()
            must_skip = not alone.step(gradient).taken
            result = guarded.step(gradient, place)
            if must_skip and result.taken:
                raise AssertionError(
                    f"loss scale {scale:g}, gradient {_listed(gradient)}: the scaler alone skips this "
                    f"step; with the sanitizer {place} it takes it, moves the weight by "
                    f"{result.moved:.2g} and keeps the loss scale"
                )
            if must_skip != (not result.taken):
                return  # it made the scaler skip more: not hidden, but no longer comparable

    return _configured(test_never_hides_an_overflow, settings)


def changes_only_nan(
    sanitizer: Sanitizer,
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    layouts: Sequence[Layout] = DENSE_LAYOUTS,
    settings: hypothesis.settings | None = None,
) -> Property:
    """Return a test: every entry that is not NaN keeps its bits; complex entries by component.

    Dtype, shape and layout must stay too. NaN may become anything or stay.

    Args:
        sanitizer: the function to judge.
        dtypes: dtypes of the gradients; more in :mod:`gradguard.testing.strategies`.
        layouts: memory layouts of the gradients.
        settings: hypothesis settings; None: :func:`property_settings`.
    """

    @hypothesis.given(gradient=gradients(dtypes=dtypes, layouts=layouts))
    def test_changes_only_nan(gradient: Tensor) -> None:
        """Finite and infinite entries keep every bit."""
        before = _stored(gradient).clone()
        after = _sanitized(sanitizer, gradient)
        _compare(before, after, may_change=_is_nan(before), rule="only NaN may change")

    return _configured(test_changes_only_nan, settings)


def is_idempotent(
    sanitizer: Sanitizer,
    *,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    layouts: Sequence[Layout] = DENSE_LAYOUTS,
    settings: hypothesis.settings | None = None,
) -> Property:
    """Return a test: calling the sanitizer a second time changes no bit.

    Args: as for :func:`changes_only_nan`.
    """

    @hypothesis.given(gradient=gradients(dtypes=dtypes, layouts=layouts))
    def test_is_idempotent(gradient: Tensor) -> None:
        """Twice is the same as once."""
        parameter = parameter_with(gradient)
        sanitizer([parameter])
        once = _stored(_gradient_of(parameter)).clone()
        sanitizer([parameter])
        _compare(once, _stored(_gradient_of(parameter)), rule="a second call may change nothing")

    return _configured(test_is_idempotent, settings)


def is_neutral_on_clean_steps(
    sanitizer: Sanitizer,
    *,
    with_scaler: bool = False,
    dtypes: Sequence[torch.dtype] = FLOAT_DTYPES,
    layouts: Sequence[Layout] = DENSE_LAYOUTS,
    settings: hypothesis.settings | None = None,
) -> Property:
    """Return a test: where every gradient is finite, the sanitizer leaves no trace.

    No bit of a finite gradient changes, and a training run ends in the same weights, optimizer state,
    loss scale and random state as without it.

    Args: as for :func:`changes_only_nan` and :func:`never_hides_an_overflow`.
    """
    finite = gradients(dtypes=dtypes, layouts=layouts, kind="finite")

    @hypothesis.given(gradient_or_seed=finite | st.sampled_from(_SEEDS))
    def test_is_neutral_on_clean_steps(gradient_or_seed: Tensor | int) -> None:
        """Finite gradients stay as they are, and so does training, from any seed."""
        if isinstance(gradient_or_seed, Tensor):
            before = _stored(gradient_or_seed).clone()
            told = {"scaler": None, "optimizer": None} if with_scaler else {}  # there is none here
            after = _sanitized(sanitizer, gradient_or_seed, **told)
            _compare(before, after, rule="a finite gradient may not change")
        else:
            assert_neutral(
                lambda: _small_run(torch.optim.AdamW, with_scaler=with_scaler),
                lambda _: nullcontext(sanitizer),
                steps=3,
                seed=gradient_or_seed,
            )

    return _configured(test_is_neutral_on_clean_steps, settings)


def gate_is_neutral_on_clean_steps(
    make_gate: MakeGate, *, settings: hypothesis.settings | None = None
) -> Property:
    """Return a test: where nothing is wrong, training with the gate is bit-identical to without.

    Args:
        make_gate: attaches the gate to the optimizer it is given.
        settings: hypothesis settings; None: :func:`property_settings`.
    """

    @hypothesis.given(kind=st.sampled_from(_CLEAN_OPTIMIZERS), seed=st.sampled_from(_SEEDS))
    def test_gate_is_neutral_on_clean_steps(kind: type[Optimizer], seed: int) -> None:
        """Weights, optimizer state and random state are those of a run without the gate."""
        assert_neutral(
            lambda: _small_run(kind, with_scaler=False),
            lambda run: make_gate(_only_optimizer(run)),
            steps=3,
            seed=seed,
        )

    return _configured(test_gate_is_neutral_on_clean_steps, settings)


def gated_steps_are_whole(
    make_gate: MakeGate, *, settings: hypothesis.settings | None = None
) -> Property:
    """Return a test: under the gate a step is taken exactly as without it, or leaves no trace.

    No trace: parameters, optimizer state and gradients keep every bit. Which steps are vetoed is the
    gate's own affair. Steps hold finite, zero, huge, infinite and NaN gradients.

    Args:
        make_gate: attaches the gate to the optimizer it is given.
        settings: hypothesis settings; None: :func:`property_settings`.
    """

    @hypothesis.given(
        kind=st.sampled_from(tuple(OptimizerTwin.KINDS)),
        steps=st.lists(
            st.sampled_from((1.0, 0.0, float("nan"), float("inf"), 1e30)), min_size=1, max_size=4
        ),
    )
    def test_gated_steps_are_whole(kind: str, steps: list[float]) -> None:
        """A step is taken in full or not at all."""
        twin = OptimizerTwin.of(kind)
        with make_gate(twin.optimizer):
            for index, entry in enumerate(steps):
                changed = twin.step(entry)
                if changed:
                    raise AssertionError(
                        f"{kind}, gradients {_listed(steps[: index + 1])}: the last step was neither "
                        f"taken as without the gate nor left alone: {changed}"
                    )

    return _configured(test_gated_steps_are_whole, settings)


_SEEDS = (0, 1, 2)

_CLEAN_OPTIMIZERS: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.AdamW,
    torch.optim.Adagrad,
)


def property_settings(**changes: Any) -> hypothesis.settings:
    """Return the settings that the properties use by default, with ``changes``.

    They are those of the current hypothesis profile, but without a deadline, with one counterexample
    at a time, and without the search for the lines that explain it: the sentence does that.
    """
    phases = [phase for phase in hypothesis.Phase if phase is not hypothesis.Phase.explain]
    defaults = {"deadline": None, "report_multiple_bugs": False, "phases": phases}
    return hypothesis.settings(**(defaults | changes))


def _configured(test: Any, settings: hypothesis.settings | None) -> Property:
    configured: Property = (settings or property_settings())(test)
    return configured


def _small_run(kind: Callable[..., Optimizer], *, with_scaler: bool) -> TrainingRun:
    """Return a run with dropout, a buffer and only finite gradients."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
    optimizer = kind(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    options = {"scaler": scaler, "optimizer": optimizer} if with_scaler else {}

    def step(sanitizer: Any) -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 3)).pow(2).mean()).backward()
        if callable(sanitizer):
            sanitizer(list(model.parameters()), **options)
        scaler.step(optimizer)
        scaler.update()

    return TrainingRun(model=model, optimizers=optimizer, scaler=scaler, step=step)


def _only_optimizer(run: TrainingRun) -> Optimizer:
    (optimizer,) = named_optimizers(run.optimizers).values()
    return optimizer


def _sanitized(sanitizer: Sanitizer, gradient: Tensor, **options: Any) -> Tensor:
    """Call the sanitizer on one parameter and return the numbers it left, checking their frame."""
    parameter = parameter_with(gradient)
    frame = (gradient.dtype, gradient.layout, tuple(gradient.shape))
    sanitizer([parameter], **options)
    left = _gradient_of(parameter)
    got = (left.dtype, left.layout, tuple(left.shape))
    if got != frame:
        raise AssertionError(f"the gradient was {frame} (dtype, layout, shape) and became {got}")
    return _stored(left)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise AssertionError("the sanitizer removed the gradient: .grad is None")
    return parameter.grad


def _stored(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient as a dense tensor; COO after coalescing."""
    plain = gradient.detach()
    if plain.layout is torch.strided:
        return plain
    return (plain.coalesce() if plain.layout is torch.sparse_coo else plain).values().detach()


def _reals(values: Tensor) -> Tensor:
    """Return the real numbers of a dense tensor, flat, as float64 (for reading and printing)."""
    flat = values.resolve_conj().reshape(-1)
    return (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1).double()


def _is_nan(values: Tensor) -> Tensor:
    return _reals(values).isnan()


def _compare(before: Tensor, after: Tensor, *, rule: str, may_change: Tensor | None = None) -> None:
    old, new = bits_of(before), bits_of(after)
    wrong = old != new
    if may_change is not None:
        wrong &= ~may_change
    if not wrong.any():
        return
    at = int(wrong.nonzero()[0])
    raise AssertionError(
        f"{before.dtype} gradient {_listed(_reals(before).tolist())}: entry {at} was "
        f"{_shown(before, at)} and became {_shown(after, at)}; {rule}"
    )


def _shown(values: Tensor, at: int) -> str:
    bits = bits_of(values)[at]
    return f"{_reals(values)[at]:g} (bits 0x{int(bits) % (1 << 8 * bits.element_size()):x})"


def _listed(entries: Sequence[float]) -> str:
    return f"[{', '.join(f'{entry:g}' for entry in entries)}]"
