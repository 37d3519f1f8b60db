"""The operation that made the first NaN or Inf is named, in both directions."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradguard.explain import as_facts, locate_nonfinite
from tests.gradguard.explain.places import found, marked


class Net(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x)).sum()


def locate(function, **options):
    """Return the origin in ``function(linear(x))`` summed up."""
    model = Net(function)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    return locate_nonfinite(lambda: model(x), model, **options)


def _root(y):
    squares = (y * 0).square().sum(-1)
    return squares.sqrt()  # here: root


def _masked_root(y):
    squares = (y * 0).square().sum(-1)
    return squares.sqrt() * 0  # here: masked root


def _masked_log(y):
    bad = torch.log(y.relu())  # here: masked log
    return torch.where(y > 0, bad, 0.0)


def _log(y):
    return torch.log(y.relu())  # here: log


def _exp(y):
    big = torch.exp(y.abs() * 1e4)  # here: exp
    return big / (1 + big)


def _divide(y):
    rate = 1 / (y.detach() * 0)  # here: divide
    return torch.where(y > 1e9, y * rate, 0.0)


def _masked_rows(y):
    scores = y.masked_fill(torch.ones(3, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1)  # here: masked rows


def _written(y):
    out = torch.zeros(4, 3)
    out[1:] = torch.log(y[1:] * 0)  # here: written
    return out * 2


def _written_through_a_view(y):
    out = torch.zeros(12)
    out.view(4, 3).copy_(y / 0)  # here: view
    return out * 2


def _cross_entropy(y):
    return F.cross_entropy(y * 1e39, torch.tensor([0, 1, 2, 0]))  # here: cross entropy


CASES = [
    (_root, "root", "sqrt", "backward", "inf"),
    (_masked_root, "masked root", "sqrt", "backward", "nan"),
    (_masked_log, "masked log", "log", "backward", "nan"),
    (_log, "log", "log", "forward", "inf"),
    (_exp, "exp", "exp", "forward", "inf"),
    (_divide, "divide", "div", "forward", "inf"),
    (_masked_rows, "masked rows", "softmax", "forward", "nan"),
    (_written, "written", "log", "forward", "inf"),
    (_written_through_a_view, "view", "div", "forward", "inf"),
    (_cross_entropy, "cross entropy", "mul", "forward", "inf"),
]


@pytest.mark.parametrize(("function", "mark", "op", "phase", "value"), CASES)
def test_the_origin_is_named(function, mark, op, phase, value):
    """Operation, direction, value and line are those of the first one that was given finite numbers."""
    origin = locate(function)
    assert (origin.op, origin.phase, origin.value) == (op, phase, value)
    assert found(origin) == marked(mark)
    assert op in str(origin)
    assert value in str(origin)


@pytest.mark.parametrize(
    ("function", "named"), [(_root, "PowBackward0"), (_masked_root, "SqrtBackward0")]
)
def test_anomaly_mode_names_a_later_operation(function, named):
    """Where sqrt(0) makes Inf, torch's own tool names the square that makes NaN of it, one too late."""
    assert locate(function).op == "sqrt"
    model = Net(function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            torch.autograd.detect_anomaly(),
            pytest.raises(RuntimeError, match="returned nan") as raised,
        ):
            model(torch.ones(4, 3)).backward()
    assert named in str(raised.value)


def test_the_node_that_gets_finite_and_gives_nonfinite_is_the_oracle():
    """Differentiating one operation alone, at the values it had, gives the NaN that was reported."""
    at = torch.zeros(4, requires_grad=True)
    (alone,) = torch.autograd.grad(at.sqrt(), at, torch.zeros(4))
    assert alone.isnan().all()
    assert locate(_masked_root).value == "nan"


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.square(),
        lambda y: (
            y[:3].masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1) * y[:3]
        ),
        lambda y: (y[:3] + torch.full((3, 3), -torch.inf).triu(1)).softmax(-1) * y[:3],
        lambda y: torch.where(y > 0, y, torch.tensor(torch.inf)).min(),
    ],
)
def test_finite_losses_and_gradients_have_no_origin(function):
    """An Inf that was put there on purpose, as in a causal mask, is none either."""
    assert locate(function) is None


def test_only_the_forward_is_looked_at_on_request():
    """With ``backward=False`` a derivative is not reported, a value is."""
    assert locate(_masked_root, backward=False) is None
    assert locate(_log, backward=False).op == "log"


def test_a_parameter_that_is_not_finite_is_named():
    """The value was there before the forward pass began."""
    model = Net(lambda y: y * 2)
    with torch.no_grad():
        model.fc.bias[1] = torch.nan
    origin = locate_nonfinite(lambda: model(torch.ones(2, 3)), model)
    assert (origin.entered, origin.value, origin.op, origin.module) == (
        "fc.bias",
        "nan",
        "linear",
        "fc",
    )
    assert "came in with fc.bias" in str(origin)
    assert as_facts(3, [origin])[0].parameter == "fc.bias"


def test_a_batch_that_is_not_finite_is_named():
    """The input is told from what the model makes."""
    model = Net(lambda y: y * 2)
    x = torch.full((2, 3), torch.nan)
    origin = locate_nonfinite(lambda: model(x), model)
    assert (origin.entered, origin.op) == ("input", "linear")


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2  # here: custom

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 0


def test_a_custom_function_is_named_by_its_class():
    """The line is the one that made its output."""
    origin = locate(Broken.apply)
    assert (origin.op, origin.phase, found(origin)) == ("Broken", "backward", marked("custom"))


def test_a_loss_without_a_graph_has_no_backward():
    """A finite constant is finite."""
    assert locate_nonfinite(lambda: torch.ones(()), nn.Linear(1, 1)) is None


def test_a_forward_that_returns_no_tensor_is_refused():
    """The sentence says what came."""
    with pytest.raises(TypeError, match="as a tensor, got float"):
        locate_nonfinite(lambda: 1.0, nn.Linear(1, 1))


def test_the_reading_holds_operation_and_line():
    """What the rules get is what is printed."""
    origin = locate(_masked_root)
    (fact,) = as_facts(4, [origin])
    assert (fact.kind, fact.step, fact.op, fact.reason, fact.phase) == (
        "nonfinite",
        4,
        "sqrt",
        "nan",
        "backward",
    )
    assert fact.line == origin.line
