"""The guard around a loop: what it records, what it refuses, what it survives, what it leaves behind."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import gradguard as gg
from gradguard.drift import DriftMeter
from gradguard.records import PathState, StepOutcome
from tests.gradguard.loops import batches, small_net


def setup(**options):
    """Return a small net and an SGD optimizer for it."""
    model = small_net()
    return model, torch.optim.SGD(model.parameters(), lr=0.1, **options)


def backward(model, batch):
    """Run forward and backward; return the loss."""
    loss = nn.functional.mse_loss(model(batch.x), batch.y)
    loss.backward()
    return loss


def hooks_of(model, optimizer):
    """Count every hook on the model, its parameters and the optimizer."""
    parameters = sum(
        len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) + len(p._backward_hooks or {})
        for p in model.parameters()
    )
    modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    steps = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return parameters, modules, steps


# --- what is recorded ------------------------------------------------------------------------------


def test_a_record_holds_what_one_step_did():
    """Norms, rates, counts and times of a plain step agree with hand computation."""
    model, optimizer = setup()
    data = batches(3)
    with gg.watch(model, optimizer, detail_every=2, strict=True) as guard:
        norms = []
        for batch in guard.batches(data):
            optimizer.zero_grad()
            loss = backward(model, batch)
            norms.append(float(gg.global_norm([p.grad for p in model.parameters()])))
            optimizer.step()
            guard.observe(loss=loss, terms={"mse": loss})
    assert [r.step for r in guard.log] == [0, 1, 2]
    assert [r.gradient_norm for r in guard.log] == pytest.approx(norms)
    for record in guard.log:
        assert record.outcome is StepOutcome.APPLIED
        assert (record.micro_steps, record.batches) == (1, 1)
        assert (record.nan_count, record.inf_count, record.nonfinite_tensors) == (0, 0, 0)
        assert record.terms == {"mse": record.loss}
        assert record.drift.update_norm == pytest.approx(0.1 * record.gradient_norm, rel=1e-4)
        assert record.learning_rates == (0.1,)
        assert record.loss_scale_before is record.found_inf is record.reason is None
        assert record.guard_s > 0
    assert all(r.parameters is not None for r in guard.log)  # the first three are detailed
    assert [r.wall_s is not None for r in guard.log] == [False, True, True]
    assert {p.path for p in guard.log[0].parameters} == {PathState.LIVE}


@pytest.mark.parametrize("when", ["before backward", "after backward", "after step"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_observed_losses_reach_the_step_they_belong_to(when, accumulation):
    """Wherever the loop calls observe, each step's loss is the mean over its own micro-steps."""
    model, optimizer = setup()
    with gg.watch(model, optimizer, strict=True) as guard:
        for index, batch in enumerate(batches(4 * accumulation)):
            value = torch.tensor(float(index))
            loss = nn.functional.mse_loss(model(batch.x), batch.y)
            if when == "before backward":
                guard.observe(loss=value)
            loss.backward()
            if when == "after backward":
                guard.observe(loss=value)
            if (index + 1) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()
            if when == "after step":
                guard.observe(loss=value)
    middle = (accumulation - 1) / 2
    assert [r.loss for r in guard.log] == [k * accumulation + middle for k in range(4)]
    assert {r.micro_steps for r in guard.log} == {accumulation}


def test_an_observed_tensor_may_be_written_afterwards():
    """The value at the time of the call counts, although the user adds to the tensor later."""
    model, optimizer = setup()
    with gg.watch(model, optimizer, strict=True) as guard:
        loss = backward(model, batches(1)[0]).detach().double()
        expected = float(loss)
        guard.observe(loss=loss, reported_loss=7.0)
        loss.add_(100.0)
        optimizer.step()
    assert guard.log[0].loss == pytest.approx(expected)
    assert guard.log[0].reported_loss == 7.0


def test_two_optimizers_have_records_of_their_own():
    """Alternating optimizers count their own steps, micro-steps and losses."""
    nets = nn.ModuleDict({"g": small_net(seed=1), "d": small_net(seed=2)})
    opts = {name: torch.optim.SGD(net.parameters(), lr=0.1) for name, net in nets.items()}
    with gg.watch(nets, opts, strict=True) as guard:
        for index, batch in enumerate(batches(6)):
            name = "g" if index % 3 == 0 else "d"
            opts[name].zero_grad()
            guard.observe(loss=backward(nets[name], batch), optimizer=name)
            opts[name].step()
    assert [r.optimizer for r in guard.log.for_optimizer("d")] == ["d"] * 4
    assert [r.step for r in guard.log.for_optimizer("g")] == [0, 1]
    assert all(r.micro_steps == 1 and r.loss is not None for r in guard.log)


def test_listeners_hear_every_record_in_order():
    """A subscriber gets each record once, also those that arrive at the end."""
    model, optimizer = setup()
    heard = []
    with gg.watch(model, optimizer, lag=4, strict=True) as guard:
        guard.subscribe(heard.append)
        for batch in batches(6):
            optimizer.zero_grad()
            backward(model, batch)
            optimizer.step()
    assert [r.step for r in heard] == list(range(6))
    assert heard == list(guard.log)


def test_parameters_added_or_moved_later_are_followed():
    """A new group and parameters with new storage are measured from the next step on."""
    model, optimizer = setup()
    extra = nn.Parameter(torch.ones(3))
    with gg.watch(model, optimizer, strict=True) as guard:
        for stage in range(3):
            optimizer.zero_grad()
            if stage == 1:
                optimizer.add_param_group({"params": [extra], "lr": 0.5})
            if stage == 2:
                for p in model.parameters():
                    p.data = p.data.clone()
            if stage == 1:
                extra.sum().backward()
            else:
                backward(model, batches(1)[0])
            optimizer.step()
    assert [r.outcome for r in guard.log] == [StepOutcome.APPLIED] * 3
    assert [len(r.groups) for r in guard.log] == [1, 2, 2]
    assert guard.log[1].learning_rates == (0.1, 0.5)


def test_frozen_listeners_are_replaced():
    """Micro-steps are counted again after the parameters that were listened to stop training."""
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer, strict=True) as guard:
        for _ in range(3):
            optimizer.zero_grad()
            model[5](torch.ones(1, 2)).sum().backward()  # one layer of twenty takes part
            optimizer.step()
    assert [r.micro_steps for r in guard.log] == [None, 1, 1]


@pytest.mark.parametrize("drift", ["sampled", "exact", "off"])
def test_drift_modes(drift):
    """Sampled and exact agree on small nets; off measures nothing and says so with None."""
    model, optimizer = setup()
    with gg.watch(model, optimizer, drift=drift, strict=True) as guard:
        backward(model, batches(1)[0])
        optimizer.step()
    (record,) = guard.log
    assert record.outcome is StepOutcome.APPLIED
    if drift == "off":
        assert record.drift is None
        assert record.groups == ()
    else:
        assert record.drift.exact
        assert record.drift.update_norm == pytest.approx(0.1 * record.gradient_norm, rel=1e-4)


def test_step_was_taken_answers_at_once():
    """Taken, empty and skipped steps are told apart without waiting for the record."""
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    answers = []
    with gg.watch(model, optimizer, scaler=scaler, strict=True) as guard:
        for poison in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(
                nn.functional.mse_loss(model(torch.ones(2, 6)), torch.ones(2, 2))
            ).backward()
            if poison:
                next(model.parameters()).grad.view(-1)[0] = torch.inf
            scaler.step(optimizer)
            before = guard.step_was_taken()
            scaler.update()
            answers.append((before, guard.step_was_taken()))
    assert answers == [(True, True), (False, False), (True, True)]


def test_an_exception_inside_step_leaves_no_record_and_no_trace():
    """A step that raises is the user's error: it reaches the user, and the next step is recorded."""

    class Fragile(torch.optim.SGD):
        broken = True

        def step(self, closure=None):
            if self.broken:
                raise FloatingPointError("disk on fire")
            return super().step(closure)

    model = small_net()
    optimizer = Fragile(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer, strict=True) as guard:
        backward(model, batches(1)[0])
        with pytest.raises(FloatingPointError):
            optimizer.step()
        Fragile.broken = False
        optimizer.step()
    assert [(r.step, r.outcome) for r in guard.log] == [(0, StepOutcome.APPLIED)]


# --- misuse ----------------------------------------------------------------------------------------


def test_misuse_raises_at_once_with_a_sentence():
    """Every wrong argument names what came and what to do."""
    model, optimizer = setup()
    frozen = small_net().requires_grad_(requires_grad=False)
    cases = [
        (lambda: gg.watch(frozen, optimizer), "no trainable parameter"),
        (lambda: gg.watch(model, "adam"), "expected a torch.optim.Optimizer"),
        (lambda: gg.watch(model, {}), "empty mapping"),
        (lambda: gg.watch(model, optimizer, scaler=2.0), "expected a torch.amp.GradScaler"),
        (lambda: gg.watch(model, optimizer, drift="some"), "expected 'sampled', 'exact' or 'off'"),
        (lambda: gg.watch(model, optimizer, lag=0), "at least 1"),
    ]
    for call, sentence in cases:
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()
    with gg.watch(model, optimizer) as guard:
        for wrong in ({"loss": torch.ones(2)}, {"loss": "high"}, {"terms": {"a": None}}):
            with pytest.raises((TypeError, ValueError), match=r"guard\.observe"):
                guard.observe(**wrong)
        with pytest.raises(ValueError, match="known: \\['optimizer'\\]"):
            guard.observe(loss=1.0, optimizer="other")
    assert hooks_of(model, optimizer) == (0, 0, 0)


# --- calm ------------------------------------------------------------------------------------------


def test_a_fault_inside_the_guard_becomes_a_finding(monkeypatch):
    """A broken meter does not reach the loop: the run goes on, the finding holds the traceback."""
    model, optimizer = setup()
    twin, twin_optimizer = setup()

    def broken(self, *, detailed):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(DriftMeter, "sums", broken)
    with gg.watch(model, optimizer) as guard:
        for batch in batches(3):
            for net, opt in ((model, optimizer), (twin, twin_optimizer)):
                opt.zero_grad()
                backward(net, batch)
                opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    (finding,) = guard.findings
    assert finding.code == "GG001"
    assert "'drift' raised ZeroDivisionError" in finding.message
    assert "planted" in finding.detail
    assert [r.drift for r in guard.log] == [None] * 3
    assert [r.outcome for r in guard.log] == [StepOutcome.APPLIED] * 3


def test_a_fault_in_a_listener_does_not_silence_the_others():
    """One listener raises once and is dropped; the rest hear everything."""
    model, optimizer = setup()
    heard = []
    with gg.watch(model, optimizer) as guard:
        guard.subscribe(lambda record: record.nonsense)
        guard.subscribe(heard.append)
        for batch in batches(3):
            backward(model, batch)
            optimizer.step()
    assert len(heard) == 3
    assert [f.code for f in guard.findings] == ["GG001"]


def test_strict_raises_instead(monkeypatch):
    """With strict=True the same fault reaches the caller."""
    model, optimizer = setup()
    monkeypatch.setattr(DriftMeter, "mark", lambda *_: 1 / 0)
    with gg.watch(model, optimizer, strict=True):
        backward(model, batches(1)[0])
        with pytest.raises(ZeroDivisionError):
            optimizer.step()


def test_a_full_disk_is_a_finding_and_the_records_stay_in_memory(tmp_path):
    """When the run directory cannot be written any more, training and the log in memory go on."""
    model, optimizer = setup()
    directory = gg.RunDirectory.create(tmp_path / "run")
    with gg.watch(model, optimizer, run=directory, lag=1) as guard:
        for index, batch in enumerate(batches(4)):
            backward(model, batch)
            optimizer.step()
            if index == 1:
                guard.flush()
                directory.close()  # stands for the disk: every later write fails
    assert len(guard.log) == 4
    assert [f.code for f in guard.findings] == ["GG002"]
    assert len(gg.read_run(tmp_path / "run").log) == 2


# --- no trace --------------------------------------------------------------------------------------


def test_detaching_leaves_no_trace():
    """After the block, however it ends, no hook is left anywhere."""
    model, optimizer = setup()
    with pytest.raises(KeyboardInterrupt), gg.watch(model, optimizer) as guard:
        assert hooks_of(model, optimizer)[2] == 2
        backward(model, batches(1)[0])
        optimizer.step()
        raise KeyboardInterrupt
    assert hooks_of(model, optimizer) == (0, 0, 0)
    assert len(guard.log) == 1
    guard.detach()


def test_few_hooks_are_there_between_detailed_steps():
    """Eight counters, two samples on three parameters and the model's own forward; parts on detailed steps."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gg.watch(model, optimizer):
        parameters, modules, _ = hooks_of(model, optimizer)
        assert modules == 1 + 31
        assert 0 < parameters <= 8 + 2 * 3
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert hooks_of(model, optimizer)[1] == 1
        assert not any(m._backward_hooks for m in model.modules())
    assert hooks_of(model, optimizer) == (0, 0, 0)


def test_the_guard_keeps_neither_model_nor_optimizer_alive():
    """A guard held in a notebook does not hold the weights."""
    model, optimizer = setup()
    guard = gg.watch(model, optimizer)
    backward(model, batches(1)[0])
    optimizer.step()
    gone = [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model[0].weight)]
    del model, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    guard.detach()
    assert len(guard.log) == 1


def test_a_detached_guard_is_garbage_while_its_optimizer_lives():
    """Nothing that outlives the block refers to the guard: not the optimizer, no registry, no hook."""
    model, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu")
    guard = gg.watch(model, optimizer, scaler=scaler, averaged=copy.deepcopy(model))
    scaler.scale(nn.functional.mse_loss(model(torch.ones(2, 6)), torch.ones(2, 2))).backward()
    scaler.step(optimizer)
    scaler.update()
    guard.detach()
    gone = weakref.ref(guard)
    del guard
    gc.collect()
    assert gone() is None


def test_watched_objects_copy_and_pickle():
    """Model and optimizer can be deep-copied and saved while watched; hooks on copies do nothing."""
    model, optimizer = setup()
    with gg.watch(model, optimizer) as guard:
        twin, twin_optimizer = copy.deepcopy(model), copy.deepcopy(optimizer)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, io.BytesIO())
        torch.save(model, io.BytesIO())
        parameters, _, steps = hooks_of(twin, twin_optimizer)
        assert (parameters, steps) == (0, 0)
        twin(torch.ones(2, 6)).sum().backward()
        backward(model, batches(1)[0])
        optimizer.step()
        guard.flush()
        assert guard.log[0].window.forwards == 1  # the twin's is not counted
