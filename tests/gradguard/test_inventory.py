"""What a training loop consists of is read as it is, and left as it was."""

from __future__ import annotations

import cmath
import copy
import functools
import math
import weakref

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradguard.facts import Plan
from gradguard.inventory import read_setup
from gradguard.testing import training_fingerprint

KINDS = {
    "float32": lambda g: torch.randn(5, 3, generator=g),
    "float64": lambda g: torch.randn(4, generator=g, dtype=torch.float64),
    "float16": lambda g: torch.randn(7, 2, generator=g).half(),
    "bfloat16": lambda g: torch.randn(2, 3, 2, generator=g).bfloat16(),
    "complex64": lambda g: torch.randn(3, 2, generator=g, dtype=torch.complex64),
    "complex32": lambda g: torch.randn(3, 2, generator=g, dtype=torch.complex64).to(
        torch.complex32
    ),
    "float8": lambda g: torch.randn(6, 2, generator=g).to(torch.float8_e4m3fn),
    "int8": lambda g: torch.randint(-9, 9, (4, 4), generator=g, dtype=torch.int8),
    "bool": lambda g: torch.rand(4, 4, generator=g) > 0.5,
    "scalar": lambda g: torch.randn((), generator=g),
    "transposed": lambda g: torch.randn(5, 3, generator=g).t(),
    "repeated": lambda g: torch.randn(1, 3, generator=g).repeat(4, 1),
    "zeros": lambda _: torch.zeros(3, 2),
    "sparse": lambda g: torch.randn(4, 4, generator=g).relu().to_sparse(),
    "csr": lambda g: torch.randn(4, 4, generator=g).relu().to_sparse_csr(),
}


class Holder(nn.Module):
    """A module with the given parameters, and attributes that torch does not register."""

    def __init__(self, parameters=(), **attributes):
        super().__init__()
        for i, parameter in enumerate(parameters):
            self.register_parameter(f"p{i}", parameter)
        for name, value in attributes.items():
            object.__setattr__(self, name, value)


def setup_of(model, optimizers=None, **changes):
    """Read the setup of a model, by default without an optimizer."""
    options = {"step": 0, "scaler": False, "plan": None} | changes
    return read_setup(model, optimizers or {}, **options)


def parameters_of(model, optimizers=None, **changes):
    """Return the parameter facts by name."""
    return {one.name: one for one in setup_of(model, optimizers, **changes).parameters}


def as_rows(tensor):
    """Return the entries as nested tuples of Python numbers, by the slowest route."""
    dense = tensor.detach()
    dense = dense.to_dense() if dense.layout is not torch.strided else dense
    if dense.dtype is torch.float8_e4m3fn:
        dense = dense.float()
    if dense.dtype is torch.complex32:
        dense = dense.to(torch.complex64)
    return dense.resolve_conj().reshape(dense.shape[0] if dense.ndim else 1, -1).tolist()


# --- values of parameters ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_values_agree_with_python_arithmetic(kinds, seed):
    """Every mixture of dtypes and layouts gives the numbers that plain Python gives."""
    g = torch.Generator().manual_seed(seed)
    tensors = [nn.Parameter(KINDS[kind](g), requires_grad=False) for kind in kinds]
    facts = parameters_of(Holder(tensors))
    for i, tensor in enumerate(tensors):
        rows = as_rows(tensor)
        magnitudes = [abs(x) for row in rows for x in row]
        fact = facts[f"p{i}"]
        stored_nothing = tensor.layout is not torch.strided and not any(magnitudes)
        if stored_nothing:
            continue
        n = len(magnitudes)
        assert fact.rms == pytest.approx(math.hypot(*magnitudes) / math.sqrt(n), rel=1e-4)
        assert fact.max_abs == pytest.approx(max(magnitudes), rel=1e-4)
        assert fact.zero_fraction == pytest.approx(magnitudes.count(0) / n)
        assert fact.nonfinite is False
        if tensor.ndim < 2 or tensor.layout is not torch.strided:
            assert fact.distinct_rows is None
        else:
            assert fact.distinct_rows == len({tuple(row) for row in rows}) / len(rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, complex(math.nan, 1.0)])
def test_one_bad_value_among_many_is_seen(bad):
    """A single NaN or Inf makes a parameter non-finite and leaves its neighbour alone."""
    dtype = torch.complex64 if isinstance(bad, complex) else torch.float32
    values = torch.ones(50, 20, dtype=dtype)
    values[17, 3] = bad
    facts = parameters_of(Holder([nn.Parameter(values), nn.Parameter(torch.ones(3))]))
    assert facts["p0"].nonfinite is True
    assert not cmath.isfinite(facts["p0"].max_abs)
    assert facts["p1"].nonfinite is False


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_out_of_range_are_not_measured(size):
    """Where float32 squares overflow or vanish, rms is None and the rest is still right."""
    fact = parameters_of(Holder([nn.Parameter(torch.full((3,), size))]))["p0"]
    assert fact.rms is None
    assert fact.max_abs == pytest.approx(size)
    assert (fact.zero_fraction, fact.nonfinite) == (0.0, False)


@pytest.mark.parametrize("shape", [(2_000, 600), (20_000, 2)])
def test_rows_of_a_large_parameter_are_compared_in_a_corner(shape):
    """Beyond a size, distinct rows are those of the first 256 rows."""
    values = torch.randn(shape)
    values[128:] = values[0]
    assert parameters_of(Holder([nn.Parameter(values)]))["p0"].distinct_rows == 0.5


@pytest.mark.parametrize(
    "parameter",
    [
        nn.Parameter(torch.empty(3, 2, device="meta")),
        nn.Parameter(torch.empty(0, 3)),
        nn.UninitializedParameter(),
    ],
    ids=["meta", "empty", "lazy"],
)
def test_parameters_without_values_are_not_measured(parameter):
    """Nothing is made up for a parameter that has no values, and others are still read."""
    facts = parameters_of(Holder([parameter, nn.Parameter(torch.ones(3))]))
    fact = facts["p0"]
    measured = (fact.rms, fact.max_abs, fact.zero_fraction, fact.distinct_rows, fact.nonfinite)
    assert measured == (None,) * 5
    assert facts["p1"].rms == pytest.approx(1.0)


def test_values_are_read_on_demand_only():
    """Without values no value is read, and all that needs none is still told."""
    net = nn.Linear(3, 2)
    fact = parameters_of(net, values=False)["weight"]
    assert (fact.rms, fact.nonfinite, fact.equal_to, fact.distinct_rows) == (None,) * 4
    assert (fact.shape, fact.dtype, fact.trainable) == ((2, 3), "float32", True)


def test_equal_parameters_name_each_other():
    """Copies are found, also in another memory layout; near copies, constants and vectors are not."""
    weight = torch.randn(3, 4)
    tensors = [
        weight,
        weight.t().contiguous().t(),
        weight + torch.eye(3, 4) * 1e-3,
        weight.flip(0),  # the same norm and extremes
        torch.zeros(3, 4),
        torch.zeros(3, 4),
        weight[0].clone(),
        weight[0].clone(),
        weight.double(),
    ]
    facts = parameters_of(Holder([nn.Parameter(one) for one in tensors]))
    equal = {name: fact.equal_to for name, fact in facts.items() if fact.equal_to}
    assert equal == {"p0": "p1", "p1": "p0"}


def test_shared_memory_is_no_copy():
    """Two parameters over the same memory are not called copies of one another."""
    weight = torch.randn(3, 4)
    facts = parameters_of(Holder([nn.Parameter(weight), nn.Parameter(weight)]))
    assert [fact.equal_to for fact in facts.values()] == [None, None]


# --- places of parameters ----------------------------------------------------------------------


def test_tied_parameters_appear_once_with_their_other_names():
    """A shared tensor is listed by its first name, and is no equal of itself."""
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2))
    net[1].weight = net[0].weight
    facts = parameters_of(net)
    assert list(facts) == ["0.weight", "2.weight", "2.bias"]
    assert facts["0.weight"].tied_to == ("1.weight",)
    assert facts["2.weight"].tied_to == ()
    assert facts["0.weight"].equal_to is None


def test_parameters_know_module_optimizer_and_group():
    """Owner, class, optimizer, group and trainability are told for every parameter."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4)), nn.Linear(4, 2))
    net[2].requires_grad_(False)
    first = torch.optim.SGD([{"params": [net[0].weight]}, {"params": [net[0].bias]}], lr=0.1)
    second = torch.optim.Adam(net[1].parameters())
    facts = parameters_of(net, {"a": first, "b": second})
    places = {
        name: (fact.optimizer, fact.group, fact.module, fact.module_kind, fact.trainable)
        for name, fact in facts.items()
    }
    assert places == {
        "0.weight": ("a", 0, "0", "Linear", True),
        "0.bias": ("a", 1, "0", "Linear", True),
        "1.0.weight": ("b", 0, "1.0", "LayerNorm", True),
        "1.0.bias": ("b", 0, "1.0", "LayerNorm", True),
        "2.weight": (None, None, "2", "Linear", False),
        "2.bias": (None, None, "2", "Linear", False),
    }


def test_tensor_hooks_of_others_are_counted():
    """Hooks count while they are registered; those of this library do not."""
    net = nn.Linear(3, 2)
    handles = [net.weight.register_hook(lambda g: g) for _ in range(2)]

    def library_hook(grad):
        return grad

    library_hook.__module__ = "gradguard.anything"
    net.weight.register_hook(functools.partial(library_hook))
    facts = parameters_of(net)
    assert (facts["weight"].foreign_hooks, facts["bias"].foreign_hooks) == (2, 0)
    for handle in handles:
        handle.remove()
    assert parameters_of(net)["weight"].foreign_hooks == 0


@given(copies=st.integers(0, 3), stale=st.integers(0, 2))
def test_foreign_parameters_are_counted_and_compared(copies, stale):
    """Foreign parameters are those the model does not have; stale ones fit a place nobody holds."""
    net = nn.Linear(3, 2)
    strangers = [nn.Parameter(torch.zeros(11)) for _ in range(copies)]
    strangers += [nn.Parameter(net.weight.detach().clone()) for _ in range(stale)]
    optimizer = torch.optim.SGD([net.bias, *strangers], lr=0.1)
    setup = setup_of(net, {"main": optimizer})
    assert setup.foreign == {"main": copies + stale}
    assert setup.foreign_same_shape == {"main": stale}


def test_a_foreign_shape_that_is_held_is_not_stale():
    """A shape counts as stale only while a trainable parameter of that shape is left out."""
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD([*net.parameters(), nn.Parameter(torch.zeros(2, 3))], lr=0.1)
    assert setup_of(net, {"main": optimizer}).foreign_same_shape == {"main": 0}


# --- modules and groups ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), {"in_features": 3, "out_features": 2, "bias": 1}),
        (nn.Linear(3, 2, bias=False), {"in_features": 3, "out_features": 2, "bias": 0}),
        (nn.Dropout(0.25, inplace=True), {"p": 0.25, "inplace": 1}),
        (
            nn.BatchNorm1d(4, momentum=None, affine=False),
            {"num_features": 4, "eps": 1e-5, "affine": 0, "track_running_stats": 1, "bias": 0},
        ),
        (nn.Embedding(5, 3, padding_idx=0), {"num_embeddings": 5, "padding_idx": 0}),
        (nn.Embedding(5, 3), {"num_embeddings": 5}),
        (nn.GRU(3, 2), {"bias": 1}),
        (nn.ReLU(), {"inplace": 0}),
        (nn.Sequential(), {}),
    ],
)
def test_settings_of_a_module_are_numbers(module, expected):
    """Settings are those torch keeps, switches as 1 and 0; what is None is left out."""
    (facts,) = setup_of(module).modules
    assert facts.settings == pytest.approx(expected)
    assert (facts.name, facts.kind) == ("", type(module).__name__)


def test_every_module_is_listed_with_its_own_mode():
    """Modes may differ from that of the model."""
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    net[1].eval()
    found = [(one.name, one.kind, one.training) for one in setup_of(net).modules]
    assert found == [
        ("", "Sequential", True),
        ("0", "Dropout", True),
        ("1", "Sequential", False),
        ("1.0", "BatchNorm1d", False),
    ]


def test_settings_of_a_group_are_numbers():
    """Rates kept as tensors, pairs of betas and switches come as plain numbers."""
    net = nn.Linear(3, 2)
    groups = [{"params": [net.weight]}, {"params": [net.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.25), betas=(0.8, 0.95), maximize=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    first, second = setup_of(net, {"main": optimizer}).groups
    expected = {
        "lr": 0.25,
        "initial_lr": 0.25,
        "weight_decay": 0.01,
        "beta1": 0.8,
        "beta2": 0.95,
        "eps": 1e-8,
        "maximize": 1.0,
        "amsgrad": 0.0,
    }
    assert first.settings == pytest.approx(expected)
    assert second.settings == pytest.approx(expected | {"weight_decay": 0.0})
    assert (second.optimizer, second.index, second.kind, second.parameters) == (
        "main",
        1,
        "AdamW",
        1,
    )


def test_a_setting_that_is_no_number_is_left_out():
    """Adafactor's first eps is None and its second beta does not exist: neither is invented."""
    net = nn.Linear(3, 2)
    (group,) = setup_of(net, {"main": torch.optim.Adafactor(net.parameters(), lr=0.5)}).groups
    assert "eps" not in group.settings
    assert "beta1" not in group.settings
    assert group.settings["lr"] == 0.5


# --- hidden tensors and modules ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"layers": [nn.Linear(2, 2)]}, ("layers[0] (Linear in a list)",)),
        ({"heads": {"a": nn.Linear(2, 2)}}, ("heads['a'] (Linear in a dict)",)),
        ({"pair": (None, nn.Linear(2, 2))}, ("pair[1] (Linear in a tuple)",)),
        ({"deep": [[(nn.Linear(2, 2),)]]}, ("deep[0][0][0] (Linear in a tuple)",)),
        ({"head": nn.Linear(2, 2)}, ("head (Linear in a plain attribute)",)),
        ({"scale": torch.ones(2, requires_grad=True)}, ("scale (tensor in a plain attribute)",)),
        ({"scales": [nn.Parameter(torch.ones(2))]}, ("scales[0] (Parameter in a list)",)),
        ({"drops": [nn.Dropout(0.5)]}, ("drops[0] (Dropout in a list)",)),
        ({"norms": [nn.BatchNorm1d(2, affine=False)]}, ("norms[0] (BatchNorm1d in a list)",)),
    ],
)
def test_hidden_tensors_and_modules_are_named(attributes, expected):
    """Whatever trains or depends on the mode is found where torch does not see it."""
    net = nn.Sequential(nn.Linear(2, 2), Holder(**attributes))
    assert setup_of(net).unregistered == tuple(f"1.{place}" for place in expected)


@pytest.mark.parametrize(
    "attributes",
    [
        {"activations": [nn.ReLU(), nn.InstanceNorm1d(2)]},
        {"teacher": [nn.Linear(2, 2).requires_grad_(False)]},
        {"cache": torch.ones(2, requires_grad=True) * 2},
        {"constant": torch.ones(2), "numbers": list(range(5_000))},
        {"too_deep": [[[[nn.Linear(2, 2)]]]]},
        {"proxy": weakref.proxy(nn.Linear(2, 2)), "text": "abc", "key": {(1, 2): None}},
    ],
)
def test_what_does_no_harm_is_not_named(attributes):
    """Activations, frozen teachers, intermediate results and dead proxies are no hidden layers."""
    assert setup_of(Holder([nn.Parameter(torch.ones(2))], **attributes)).unregistered == ()


def test_what_is_registered_elsewhere_is_not_hidden():
    """A list beside the registered layers, a way back to the model or to what contains it are fine."""
    net = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2), Holder())
    outer = nn.Sequential(net, nn.Linear(2, 2))
    net[2].shortcuts = [net[0], net[0].weight, {"model": net, "outer": outer}]
    assert setup_of(net).unregistered == ()


def test_a_hidden_module_is_named_once():
    """The same layer under two names is one finding."""
    layer = nn.Linear(2, 2)
    net = Holder([nn.Parameter(torch.ones(2))], first=[layer], second={"again": layer})
    assert setup_of(net).unregistered == ("first[0] (Linear in a list)",)


# --- the whole ---------------------------------------------------------------------------------


def test_what_is_handed_over_is_passed_on():
    """Step, scaler and plan are those given; class name and lone process are told."""
    plan = Plan(steps=10)
    setup = setup_of(nn.Linear(2, 2), step=7, scaler=True, plan=plan)
    assert (setup.step, setup.model, setup.scaler, setup.plan) == (7, "Linear", True, plan)
    assert (setup.rank, setup.world, setup.schedulers) == (0, 1, ())


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (3, 8)])
def test_rank_and_world_are_those_of_the_process_group(monkeypatch, rank, world):
    """With a process group, its rank and size are told."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    setup = setup_of(nn.Linear(2, 2))
    assert (setup.rank, setup.world) == (rank, world)


def test_compiled_models_are_recognised():
    """Compiling a part in place or wrapping the whole shows; a plain model does not."""
    plain, part = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    part[0].compile(backend="eager")
    wrapped = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    assert [setup_of(net).compiled for net in (plain, part, wrapped)] == [False, True, True]


def test_nothing_is_computed_to_find_out():
    """Attributes that compute, as those of a parametrization do, are not asked."""
    calls = []

    class Counting(nn.Module):
        def forward(self, value):
            calls.append(1)
            return value

    class Computing(nn.Linear):
        @property
        def eps(self):
            calls.append(1)
            return 0.0

    net = nn.Sequential(nn.Linear(3, 2), Computing(2, 2))
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(net[0], name, Counting())
    calls.clear()
    first, *_ = [one for one in setup_of(net).modules if one.name == "0"]
    assert not calls
    assert "bias" not in first.settings


@pytest.mark.parametrize("kind", ["plain", "spectral", "tied copy"])
def test_reading_changes_nothing(kind):
    """Parameters, gradients, buffers, optimizer and random state have the same bits afterwards."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
    if kind == "spectral":
        nn.utils.parametrizations.spectral_norm(net[0])
    if kind == "tied copy":
        net[3] = copy.deepcopy(net[0])
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    before = training_fingerprint(net, optimizer)
    versions = [parameter._version for parameter in net.parameters()]
    setup_of(net, {"main": optimizer})
    assert training_fingerprint(net, optimizer) == before
    assert [parameter._version for parameter in net.parameters()] == versions
