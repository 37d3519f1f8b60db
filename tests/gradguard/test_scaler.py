"""Reading a GradScaler: its private state, its copies, its subclasses, and the one wrapped method."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import gradguard as gg
from gradguard.records import StepOutcome
from tests.gradguard.loops import poison_gradients

PLAIN_UPDATE = GradScaler.update


def scaled_setup(*, scaler=None, **options):
    """Return a model with scaled gradients, its optimizer and its scaler."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    scaler = scaler or GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(2, 3)).sum()).backward()
    return model, optimizer, scaler


def test_torch_still_keeps_the_state_that_is_read_here():
    """Fails loudly when torch renames or reshapes the private state this library depends on."""
    _, optimizer, scaler = scaled_setup()
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    assert set(state) == {"stage", "found_inf_per_device"}
    assert state["stage"].name == "UNSCALED"
    assert [flag.shape for flag in state["found_inf_per_device"].values()] == [torch.Size(())]
    assert float(scaler._scale) == 8.0
    assert int(scaler._growth_tracker) == 0
    assert [s.name for s in type(state["stage"])] == ["READY", "UNSCALED", "STEPPED"]


def test_state_follows_the_protocol_and_leaves_no_stray_key():
    """ready, unscaled, stepped, ready; reading adds nothing to the scaler, which still pickles."""
    _, optimizer, scaler = scaled_setup()
    stages = [gg.scaler_stage(scaler, optimizer)]
    scaler.unscale_(optimizer)
    state = gg.scaler_state(scaler, optimizer)
    stages.append(state.stage)
    assert (state.loss_scale, state.found_inf, state.growth_tracker) == (8.0, 0.0, 0)
    scaler.step(optimizer)
    stages.append(gg.scaler_stage(scaler, optimizer))
    scaler.update()
    stages.append(gg.scaler_state(scaler, optimizer).stage)
    assert stages == ["ready", "unscaled", "stepped", "ready"]
    pickle.dumps(scaler)


def test_disabled_and_unused_scalers_have_nothing_to_say():
    """A disabled scaler is "disabled" with None everywhere; a fresh one has no scale yet."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    off = gg.scaler_state(GradScaler("cpu", enabled=False), optimizer)
    assert off == gg.ScalerState(enabled=False)
    fresh = gg.scaler_state(GradScaler("cpu"), optimizer)
    assert fresh.stage == "ready"
    assert fresh.loss_scale is None


@pytest.mark.parametrize("wrong", [None, 1.0, object()])
def test_something_that_is_no_scaler_is_refused(wrong):
    """A sentence says what came and what was expected."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"expected a torch\.amp\.GradScaler, got"):
        gg.scaler_state(wrong, optimizer)


def test_a_wrapped_optimizer_is_unwrapped():
    """A trainer's wrapper is watched through the optimizer it holds, whichever the scaler was given."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    for give_wrapper_to_scaler in (False, True):
        model, optimizer, scaler = scaled_setup()
        wrapper = Wrapper(optimizer)
        wrapper.param_groups, wrapper.step = optimizer.param_groups, optimizer.step
        with gg.watch(model, wrapper, scaler=scaler, strict=True) as guard:
            scaler.step(wrapper if give_wrapper_to_scaler else optimizer)
            scaler.update()
        assert [r.outcome for r in guard.log] == [StepOutcome.APPLIED]
        assert guard.log[0].found_inf == 0.0


def test_a_sharded_scaler_keeps_flags_of_shape_one():
    """The sharded scaler's flag has shape (1,) and is read all the same."""

    class ShapedLikeSharded(GradScaler):
        def unscale_(self, optimizer):
            super().unscale_(optimizer)
            flags = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
            for device, flag in flags.items():
                flags[device] = flag.reshape(1)

    model, optimizer, scaler = scaled_setup(scaler=ShapedLikeSharded("cpu", init_scale=8.0))
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        poison_gradients(model.parameters(), (torch.inf,))
        scaler.unscale_(optimizer)
        assert gg.scaler_state(scaler, optimizer).found_inf == 1.0
        scaler.step(optimizer)
        scaler.update(4.0)
    assert [(r.outcome, r.loss_scale_after) for r in guard.log] == [
        (StepOutcome.SKIPPED_BY_SCALER, 4.0)
    ]


def test_the_real_sharded_scaler_shares_the_state_layout():
    """torch's ShardedGradScaler is a GradScaler whose update() the watch covers."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    assert issubclass(ShardedGradScaler, GradScaler)


def test_copies_of_a_watched_scaler_are_plain_scalers():
    """Deep copies and pickles of a watched scaler work, and updating them records nothing."""
    model, optimizer, scaler = scaled_setup()
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        scaler.step(optimizer)
        scaler.update()
        for twin in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
            assert twin.state_dict() == scaler.state_dict()
            optimizer.zero_grad()
            twin.scale(model(torch.ones(2, 3)).sum()).backward()
            twin.step(optimizer)
            twin.update()
        guard.flush()
    assert [r.found_inf for r in guard.log if r.found_inf is not None] == [0.0]


def test_update_is_put_back_when_the_last_watch_ends():
    """Two watches share one wrapper; after both are gone GradScaler.update is the original function."""
    model, optimizer, scaler = scaled_setup()
    first = gg.watch(model, optimizer, scaler=scaler)
    second = gg.watch(model, optimizer, scaler=scaler)
    assert GradScaler.update is not PLAIN_UPDATE
    first.detach()
    assert GradScaler.update is not PLAIN_UPDATE
    second.detach()
    second.detach()
    assert GradScaler.update is PLAIN_UPDATE


def test_a_subclass_that_calls_super_update_is_read_once():
    """One record per step although both classes' update() run, with the scale the outer one left."""

    class Chatty(GradScaler):
        def update(self, new_scale=None):
            super().update(new_scale)
            self._scale.fill_(32.0)

    original = Chatty.update
    model, optimizer, scaler = scaled_setup(scaler=Chatty("cpu", init_scale=8.0))
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        scaler.step(optimizer)
        scaler.update()
    assert [(r.loss_scale_before, r.loss_scale_after) for r in guard.log] == [(8.0, 32.0)]
    assert Chatty.update is original


def test_a_watched_scaler_can_be_garbage_collected():
    """The registry is weak: neither guard nor wrapper keeps the scaler alive."""
    model, optimizer, scaler = scaled_setup()
    guard = gg.watch(model, optimizer, scaler=scaler)
    gone = weakref.ref(scaler)
    del scaler
    gc.collect()
    assert gone() is None
    optimizer.step()
    guard.detach()
    assert GradScaler.update is PLAIN_UPDATE


def test_without_wrapping_the_user_calls_around_update():
    """wrap_update=False leaves torch alone; before_update() and after_update() do the same."""
    model, optimizer, scaler = scaled_setup()
    with gg.watch(model, optimizer, scaler=scaler, wrap_update=False, strict=True) as guard:
        assert GradScaler.update is PLAIN_UPDATE
        poison_gradients(model.parameters(), (torch.nan,))
        scaler.step(optimizer)
        guard.before_update()
        scaler.update()
        guard.after_update()
    (record,) = guard.log
    assert record.outcome is StepOutcome.SKIPPED_BY_SCALER
    assert (record.loss_scale_before, record.loss_scale_after) == (8.0, 4.0)


def test_stepping_past_the_scaler_is_a_finding():
    """optimizer.step() instead of scaler.step(optimizer): the step is recorded, the mistake is named."""
    model, optimizer, scaler = scaled_setup()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    other.param_groups[0]["params"][0].grad = torch.ones(1)
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        optimizer.step()
        scaler.step(other)
        scaler.update()
    assert [r.outcome for r in guard.log] == [StepOutcome.APPLIED]
    (finding,) = guard.findings
    assert finding.code == "GG003"
    assert "call scaler.step(optimizer)" in finding.message


def test_each_optimizer_may_have_its_own_scaler_or_none():
    """Two scalers and an optimizer without one: nothing is mixed up and no alarm is raised."""
    nets = nn.ModuleDict({name: nn.Linear(3, 1) for name in ("a", "b", "plain")})
    opts = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
    scalers = {
        name: GradScaler("cpu", init_scale=scale) for name, scale in (("a", 8.0), ("b", 32.0))
    }
    with gg.watch(nets, opts, scaler={**scalers, "plain": None}, strict=True) as guard:
        for name, optimizer in opts.items():
            scaler = scalers.get(name, GradScaler("cpu", enabled=False))
            scaler.scale(nets[name](torch.ones(2, 3)).sum()).backward()
            if name == "b":
                poison_gradients(nets[name].parameters(), (torch.inf,))
            scaler.step(optimizer)
            scaler.update()
    assert guard.findings == ()
    seen = {r.optimizer: (r.outcome, r.loss_scale_before, r.loss_scale_after) for r in guard.log}
    assert seen == {
        "a": (StepOutcome.APPLIED, 8.0, 8.0),
        "b": (StepOutcome.SKIPPED_BY_SCALER, 32.0, 16.0),
        "plain": (StepOutcome.APPLIED, None, None),
    }
    assert GradScaler.update is PLAIN_UPDATE
    with pytest.raises(ValueError, match=r"scalers are given for"):
        gg.watch(nets, opts, scaler={"c": None})


def test_an_unscaled_but_never_stepped_iteration_is_no_step():
    """unscale_() and update() without step() is the user's own skip: nothing was attempted."""
    model, optimizer, scaler = scaled_setup()
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        scaler.unscale_(optimizer)
        scaler.update()
    assert len(guard.log) == 0


def test_a_fused_step_without_gradients_is_reported_although_update_raises():
    """torch's own error reaches the user, and the empty step is on record."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        scaler.step(optimizer)
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.update()
    assert [r.outcome for r in guard.log] == [StepOutcome.NO_GRADIENT]


def test_loss_scale_history_is_exact():
    """Backoff and growth are in the records step by step, as the scaler went through them."""
    model, optimizer, _ = scaled_setup()
    scaler = GradScaler("cpu", init_scale=8.0, growth_interval=2)
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        for poisoned in (True, False, False, True, False):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            if poisoned:
                poison_gradients(model.parameters(), (torch.inf,))
            scaler.step(optimizer)
            scaler.update()
    history = [(r.loss_scale_before, r.loss_scale_after) for r in guard.log]
    assert history == [(8.0, 4.0), (4.0, 4.0), (4.0, 8.0), (8.0, 4.0), (4.0, 4.0)]


def test_schedulers_behave_as_without_a_guard():
    """Watching changes no warning: torch's own advice about scheduler order still comes, or does not."""

    def warnings_of(watch):
        model, optimizer, scaler = scaled_setup()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        guard = gg.watch(model, optimizer, scaler=scaler) if watch else None
        poison_gradients(model.parameters(), (torch.inf,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        if guard is not None:
            guard.detach()
        return [str(w.message) for w in caught]

    assert warnings_of(watch=True) == warnings_of(watch=False)


@pytest.mark.parametrize("asked", [False, True])
def test_a_question_by_object_is_noted(asked):
    """Asking the scaler's table by the optimizer itself leaves an entry, which the record counts."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    with gg.watch(model, optimizer, scaler=scaler) as guard:
        for _ in range(3):
            scaler.scale(model(torch.ones(2, 3)).sum()).backward()
            scaler.unscale_(optimizer)
            if asked:
                assert not scaler._per_optimizer_states[optimizer]["found_inf_per_device"]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert [record.window.scaler_strays for record in guard.log] == [int(asked)] * 3
    assert ("GG108" in {cause.finding.code for cause in guard.diagnosis().causes}) is asked
