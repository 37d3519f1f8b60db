"""Every way to lose the path to a parameter is named with its line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradguard as gg
from gradguard.explain import CutReason, as_facts, explain_paths
from tests.gradguard.explain.places import found, marked

# float() of a tensor in a graph: the warning is right, and this file is about such lines.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")

KINDS = {
    "detached": CutReason.DETACH,
    "data": CutReason.DATA,
    "written": CutReason.DATA,
    "no_grad": CutReason.NO_GRAD,
    "inference": CutReason.INFERENCE_MODE,
    "item": CutReason.ITEM,
    "as_float": CutReason.ITEM,
    "tolist": CutReason.TOLIST,
    "numpy": CutReason.NUMPY,
    "forced": CutReason.NUMPY,
    "argmax": CutReason.INTEGER,
    "long": CutReason.INTEGER,
    "compared": CutReason.INTEGER,
    "tensor": CutReason.REWRAPPED,
    "as_tensor": CutReason.REWRAPPED,
    "new_tensor": CutReason.REWRAPPED,
    "parameter": CutReason.REWRAPPED,
    "dropped": CutReason.NOT_IN_LOSS,
    "frozen": CutReason.FROZEN,
    "histogram": CutReason.NOT_DIFFERENTIABLE,
}


class Cuts(nn.Module):
    """One layer per kind of cut; ``live`` is the only one the loss reaches."""

    def __init__(self):
        super().__init__()
        for name in ("live", "unused", *KINDS):
            self.add_module(name, nn.Linear(2, 2))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        """Return a loss."""
        y = self.live(x)
        y = y + self.detached(x).detach()  # here: detached
        y = y + self.data(x).data  # here: data
        target = torch.zeros(3, 2)
        target.data.copy_(self.written(x))  # here: written
        with torch.no_grad():
            z = self.no_grad(x)  # here: no_grad
        with torch.inference_mode():
            inferred = self.inference(x)  # here: inference
        y = y + z + target + inferred.clone()
        y = y + self.item(x).sum().item()  # here: item
        y = y + float(self.as_float(x).sum())  # here: as_float
        y = y + self.tolist(x).tolist()[0][0]  # here: tolist
        values = self.numpy(x).detach().numpy() * 2  # here: numpy
        forced = self.forced(x).numpy(force=True)  # here: forced
        y = y + torch.from_numpy(np.float32(values) + forced)
        y = y + torch.arange(8.0)[self.argmax(x).argmax()]  # here: argmax
        y = y + self.long(x).long()  # here: long
        y = y + (self.compared(x) > 0)  # here: compared
        pieces = self.tensor(x).sum(), 1.0
        y = y + torch.tensor(pieces)  # here: tensor
        y = y + torch.as_tensor([self.as_tensor(x).sum(), 1.0])  # here: as_tensor
        y = y + x.new_tensor([self.new_tensor(x).sum()])  # here: new_tensor
        wrapped = nn.Parameter(self.parameter(x))  # here: parameter
        y = y + wrapped
        self.dropped(x)  # here: dropped
        y = y + self.frozen(x)  # here: frozen
        y = y + torch.histc(self.histogram(x), 2)  # here: histogram
        return y.square().mean()


@pytest.fixture(scope="module")
def explained():
    """Explanations of all parameters of ``Cuts``, by name."""
    model = Cuts()
    return {one.parameter: one for one in explain_paths(lambda: model(torch.ones(3, 2)), model)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cut_is_named_with_its_line(explained, kind):
    """Reason, file, line and source text are those of the operation that cut the path."""
    cut = explained[f"{kind}.weight"]
    assert (cut.reason, found(cut)) == (KINDS[kind], marked(kind))
    assert cut.source.split()[0] in str(cut)


def test_a_parameter_that_enters_no_operation_is_unused(explained):
    """There is no line to name, but a module."""
    cut = explained["unused.weight"]
    assert (cut.reason, cut.module, cut.line) == (CutReason.UNUSED, "unused", None)


def test_exactly_the_parameters_without_a_gradient_are_explained(explained):
    """The oracle is a real backward."""
    model = Cuts()
    model(torch.ones(3, 2)).backward()
    assert set(explained) == {name for name, p in model.named_parameters() if p.grad is None}


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x).detach()  # here: inner


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x).sum()


def test_the_module_is_the_one_being_called():
    """Both calls of one class are told apart by their dotted paths."""
    model = Outer()
    cuts = {one.parameter: one for one in explain_paths(lambda: model(torch.ones(3, 2)), model)}
    assert cuts["blocks.0.fc.weight"].module == "blocks.0"
    assert cuts["blocks.1.fc.bias"].module == "blocks.1"
    assert {found(one) for one in cuts.values()} == {marked("inner")}


def test_the_first_cut_on_the_way_is_named():
    """A path that is cut twice is cut where it is cut first."""
    model = nn.Linear(2, 2)

    def forward():
        hidden = model(torch.ones(3, 2)).detach()  # here: first
        return torch.tensor(hidden.tolist()).sum() + nn.Parameter(torch.zeros(()))

    assert {found(one) for one in explain_paths(forward, model)} == {marked("first")}


def test_logging_a_value_is_not_the_cut():
    """What is read for a log line, before or after, does not take the blame."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def forward():
        hidden = model[0](torch.ones(3, 2))
        hidden.mean().item()
        (hidden > 0).float().mean().item()
        hidden.detach().norm()
        with torch.no_grad():
            hidden = hidden * 2  # here: real
        return model[1](hidden).sum()

    assert {found(one) for one in explain_paths(forward, model)} == {marked("real")}


def test_a_live_path_beside_a_cut_one_is_no_cut():
    """Reported are parameters without any path."""
    model = nn.Linear(2, 2)
    x = torch.ones(3, 2)
    assert explain_paths(lambda: (model(x) + model(x).detach()).sum(), model) == ()


def test_freezing_inside_of_the_forward_names_that_line():
    """A parameter that the forward pass freezes is frozen there."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def forward():
        model[0].requires_grad_(False)  # here: freeze
        return model(torch.ones(3, 2)).sum()

    cuts = explain_paths(forward, model)
    assert {one.reason for one in cuts} == {CutReason.FROZEN}
    assert {found(one) for one in cuts} == {marked("freeze")}
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_is_no_cut(reentrant):
    """What a checkpoint hides is decided by a real backward: cut parameters are still found."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("kept", "cut")})
    x = torch.ones(3, 2, requires_grad=True)

    def forward():
        y = checkpoint(model["kept"], x, use_reentrant=reentrant)
        return (y + model["cut"](x).detach()).sum()  # here: beside

    cuts = explain_paths(forward, model)
    assert [one.parameter for one in cuts] == ["cut.weight", "cut.bias"]
    assert {found(one) for one in cuts} == {marked("beside")}
    assert x.grad is None


def test_a_compiled_forward_is_explained_as_written():
    """Inside of a compiled function the same line is named, which still runs compiled afterwards."""
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        return model(x).detach().sum() + x.sum()  # here: compiled

    x = torch.ones(3, 2, requires_grad=True)
    compiled(x)
    assert {found(one) for one in explain_paths(lambda: compiled(x), model)} == {marked("compiled")}
    torch.testing.assert_close(compiled(x), model(x).sum() + x.sum())


def test_a_loss_that_is_a_number_or_constant_is_explained():
    """The cut is found even when no loss tensor is left, or one without a graph."""
    model = nn.Linear(2, 2)
    x = torch.ones(3, 2)
    for forward, reason in (
        (lambda: model(x).sum().item(), CutReason.ITEM),
        (lambda: model(x).sum().detach(), CutReason.DETACH),
        (lambda: x.sum(), CutReason.UNUSED),
    ):
        assert {one.reason for one in explain_paths(forward, model)} == {reason}


def test_a_forward_without_a_loss_is_refused():
    """The sentence says what was expected."""
    with pytest.raises(TypeError, match="must return the loss, got NoneType"):
        explain_paths(lambda: None, nn.Linear(2, 2))


def test_cuts_become_readings_for_the_rules():
    """One reading per parameter, with reason and line."""
    model = nn.Linear(2, 2)
    cuts = explain_paths(lambda: model(torch.ones(3, 2)).sum().detach(), model)
    facts = as_facts(7, cuts)
    assert [(f.step, f.kind, f.parameter, f.reason) for f in facts] == [
        (7, "cut", "weight", "detach"),
        (7, "cut", "bias", "detach"),
    ]
    assert [f.line for f in facts] == [one.line for one in cuts]


def test_custom_functions_in_the_graph_leave_gradients_alone():
    """The backward that looks behind them does not touch ``.grad``."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

    model = nn.Linear(2, 2)
    kept = model.weight.grad = torch.full((2, 2), 5.0)
    assert explain_paths(lambda: Twice.apply(model(torch.ones(3, 2))).sum(), model) == ()
    assert model.weight.grad is kept
    assert torch.equal(kept, torch.full((2, 2), 5.0))


def test_explanations_agree_with_reachability():
    """The trainable parameters explained are those that the path probe calls unreached."""
    model = Cuts()
    x = torch.ones(3, 2)
    names = {one.parameter for one in explain_paths(lambda: model(x), model)}
    reach = gg.reachable_parameters(model(x), model)
    assert names == {*reach.unreached, *reach.frozen}
