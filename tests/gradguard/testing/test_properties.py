"""The ready-made properties find what is wrong, and let through what is right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gradguard.testing import (
    PLACES,
    changes_only_nan,
    gate_is_neutral_on_clean_steps,
    gated_steps_are_whole,
    is_idempotent,
    is_neutral_on_clean_steps,
    never_hides_an_overflow,
    property_settings,
)

Parameters = list[nn.Parameter]
few = property_settings(max_examples=25, database=None, derandomize=True)


def leaves_everything(parameters: Parameters) -> None:
    """Do nothing."""


def masks_nan(parameters: Parameters) -> None:
    """Write 0 for NaN, in place, whenever it is called."""
    for parameter in parameters:
        parameter.grad.masked_fill_(parameter.grad.isnan(), 0.0)


def clips_values(parameters: Parameters) -> None:
    """Limit every entry to 1: this turns Inf into 1 and keeps NaN."""
    nn.utils.clip_grad_value_(parameters, 1.0)


def adds_one(parameters: Parameters) -> None:
    """Change everything."""
    for parameter in parameters:
        parameter.grad.add_(1.0)


def draws_noise(parameters: Parameters) -> None:
    """Draw from the global generator, without using what it drew."""
    torch.rand(1)


def doubles_the_precision(parameters: Parameters) -> None:
    """Replace the gradient by a flattened one on a parameter of another shape."""
    for parameter in parameters:
        flat = parameter.grad.flatten()
        parameter.grad = None
        parameter.data = flat.clone()
        parameter.grad = flat


def drops_the_gradient(parameters: Parameters) -> None:
    """Set every gradient to None."""
    for parameter in parameters:
        parameter.grad = None


test_doing_nothing_hides_nothing = never_hides_an_overflow(leaves_everything, settings=few)
test_doing_nothing_changes_only_nan = changes_only_nan(leaves_everything, settings=few)
test_doing_nothing_is_idempotent = is_idempotent(leaves_everything, settings=few)
test_doing_nothing_is_neutral = is_neutral_on_clean_steps(leaves_everything, settings=few)
test_masking_nan_changes_only_nan = changes_only_nan(masks_nan, settings=few)
test_masking_nan_after_unscaling_hides_nothing = never_hides_an_overflow(
    masks_nan, places=("between unscale_() and step()", "after step()"), settings=few
)

FAULTS = {
    "clipping hides Inf": (
        never_hides_an_overflow(clips_values),
        r"gradient \[-?inf\]: the scaler",
    ),
    "masking hides NaN": (
        never_hides_an_overflow(masks_nan),
        r"gradient \[nan\]: the scaler alone",
    ),
    "before an implicit unscale_": (
        never_hides_an_overflow(masks_nan, places=[PLACES[1]]),
        r"with the sanitizer before step\(\) without unscale_\(\) it takes it",
    ),
    "clipping changes Inf": (
        changes_only_nan(clips_values),
        r"entry 0 was .* \(bits 0x[0-9a-f]{8}\) and became -?1 \(bits 0x[3b]f800000\); only NaN",
    ),
    "adding is not idempotent": (is_idempotent(adds_one), "a second call may change nothing"),
    "adding is not neutral": (
        is_neutral_on_clean_steps(adds_one),
        "a finite gradient may not change|the training was changed: parameter",
    ),
    "noise is not neutral": (is_neutral_on_clean_steps(draws_noise), "torch random state"),
    "another shape": (changes_only_nan(doubles_the_precision), "and became"),
    "no gradient": (changes_only_nan(drops_the_gradient), r"removed the gradient: \.grad is None"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_explained(fault: str) -> None:
    """Each faulty sanitizer fails its property with one short sentence."""
    check, sentence = FAULTS[fault]
    with pytest.raises(AssertionError, match=sentence) as caught:
        check()
    assert len(str(caught.value)) < 300


def test_the_counterexample_of_an_overflow_is_minimal() -> None:
    """The sentence names one step with one entry, the scale, and what happens to the weight."""
    with pytest.raises(AssertionError) as caught:
        never_hides_an_overflow(clips_values, settings=few)()
    assert str(caught.value) == (
        "loss scale 65536, gradient [inf]: the scaler alone skips this step; with the sanitizer "
        "before unscale_() it takes it, moves the weight by 1.5e-05 and keeps the loss scale"
    )


def test_a_sanitizer_that_wants_the_scaler_is_given_it() -> None:
    """With with_scaler=True the sanitizer is told the scaler and the optimizer of its loop."""
    seen: list[tuple[type, type]] = []

    def wants_more(parameters: Parameters, *, scaler: object, optimizer: object) -> None:
        seen.append((type(scaler), type(optimizer)))

    never_hides_an_overflow(wants_more, with_scaler=True, settings=few)()
    assert set(seen) == {(torch.amp.GradScaler, torch.optim.SGD)}


class Gate:
    """Hides the gradients of a step that its verdict is against, as a sound gate does."""

    def __init__(self, optimizer: Optimizer, *, limit: float = 1e6) -> None:
        self.optimizer, self.limit = optimizer, limit
        self.hidden: list[tuple[nn.Parameter, torch.Tensor]] = []

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def vetoes(self) -> bool:
        return not all(p.grad.abs().max() < self.limit for p in self.parameters())

    def before(self, *_: object) -> None:
        if self.vetoes():
            self.hidden = [(p, p.grad) for p in self.parameters()]
            for parameter, _ in self.hidden:
                parameter.grad = None

    def after(self, *_: object) -> None:
        for parameter, gradient in self.hidden:
            parameter.grad = gradient
        self.hidden = []


class ZeroingGate(Gate):
    """Zeroes the gradients instead: momentum and weight decay still move the weights."""

    def before(self, *_: object) -> None:
        if self.vetoes():
            for parameter in self.parameters():
                parameter.grad.zero_()


class ForgetfulGate(Gate):
    """Does not put the gradients back."""

    def after(self, *_: object) -> None:
        self.hidden = []


class RescalingGate(Gate):
    """Multiplies every gradient, also where nothing is wrong."""

    def before(self, *_: object) -> None:
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


@contextmanager
def attached(gate: Gate) -> Iterator[None]:
    """Attach a gate's two hooks for the block."""
    handles = (
        gate.optimizer.register_step_pre_hook(gate.before),
        gate.optimizer.register_step_post_hook(gate.after),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


test_a_sound_gate_takes_steps_whole = gated_steps_are_whole(
    lambda optimizer: attached(Gate(optimizer)), settings=few
)
test_a_sound_gate_is_neutral = gate_is_neutral_on_clean_steps(
    lambda optimizer: attached(Gate(optimizer)), settings=few
)


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        (ZeroingGate, "the last step was neither taken as without the gate nor left alone: "),
        (ForgetfulGate, r"a \.grad is another tensor than before"),
        (RescalingGate, "neither taken as without the gate nor left alone: parameter first, gra"),
    ],
)
def test_unsound_gates_are_found(gate: type[Gate], sentence: str) -> None:
    """A gate that leaves a trace of a vetoed step, or changes a taken one, is found."""
    with pytest.raises(AssertionError, match=sentence):
        gated_steps_are_whole(lambda optimizer: attached(gate(optimizer)), settings=few)()


def test_a_gate_that_changes_clean_steps_is_found() -> None:
    """A gate that rescales clean gradients is not neutral."""
    with pytest.raises(AssertionError, match="the training was changed: parameter"):
        gate_is_neutral_on_clean_steps(
            lambda optimizer: attached(RescalingGate(optimizer)), settings=few
        )()


def test_pytest_collects_the_three_lines_of_a_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A test file of three lines is collected, run and reported by pytest."""
    (tmp_path / "test_mine.py").write_text(
        "from gradguard.testing import never_hides_an_overflow\n"
        "from torch.nn.utils import clip_grad_value_\n"
        "test_mine = never_hides_an_overflow(lambda parameters: clip_grad_value_(parameters, 1.0))\n"
    )
    pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)])
    printed = capsys.readouterr().out
    assert "1 failed" in printed
    assert "loss scale 65536, gradient [inf]: the scaler alone skips this step" in printed


def test_without_hypothesis_one_line_says_what_to_install() -> None:
    """Where hypothesis is missing, the import error names the extra to install."""
    code = "import sys; sys.modules['hypothesis'] = None; import gradguard.testing"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == (
        "ImportError: gradguard.testing needs hypothesis; "
        "install it with: pip install gradguard[testing]"
    )
