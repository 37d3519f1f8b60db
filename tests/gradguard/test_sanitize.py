"""What the sanitizer counts and writes: every dtype, layout and kind of gradient."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from gradguard.sanitize import SanitizeReport, persistent_nan, sanitize_gradients_
from gradguard.testing import (
    ALL_DTYPES,
    ALL_LAYOUTS,
    FLOAT8_DTYPES,
    bits_of,
    changes_only_nan,
    count_host_reads,
    gradients,
    is_idempotent,
    is_neutral_on_clean_steps,
    parameter_sets,
    parameter_with,
    property_settings,
)

NAN, INF = float("nan"), float("inf")
zero_nan = partial(sanitize_gradients_, scaler=None, policy="zero_nan", max_fraction=1.0)
report = partial(sanitize_gradients_, scaler=None)
every_kind = {"dtypes": ALL_DTYPES, "layouts": ALL_LAYOUTS}
more_examples = property_settings(max_examples=300)

test_zero_nan_changes_only_nan = changes_only_nan(zero_nan, **every_kind, settings=more_examples)
test_zero_nan_is_idempotent = is_idempotent(zero_nan, **every_kind)
test_zero_nan_is_neutral_on_clean_steps = is_neutral_on_clean_steps(zero_nan, **every_kind)


def stored(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient as a dense tensor."""
    if gradient.layout is torch.sparse_coo:
        return gradient.coalesce().values()
    return gradient if gradient.layout is torch.strided else gradient.values().detach()


def expected_bits(gradient: Tensor) -> Tensor:
    """Return the bits with those of every NaN replaced by zero bits, by way of Python floats."""
    bits = bits_of(stored(gradient)).clone()
    plain = stored(gradient).resolve_conj()
    reals = torch.view_as_real(plain.reshape(-1)) if plain.is_complex() else plain
    is_nan = [value != value for value in reals.reshape(-1).double().tolist()]
    bits[torch.tensor(is_nan, dtype=torch.bool)] = 0
    return bits


@more_examples
@given(gradients(**every_kind))
def test_every_nan_becomes_zero_and_nothing_else_changes(gradient: Tensor) -> None:
    """On every dtype and layout each NaN becomes +0 and every other bit stays, in the same tensor."""
    parameter = parameter_with(gradient)
    expected = expected_bits(gradient)
    zero_nan([parameter])
    assert parameter.grad is gradient
    assert torch.equal(bits_of(stored(gradient)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FLOAT8_DTYPES], ids=str)
def test_every_bit_pattern_of_the_small_dtypes(dtype: torch.dtype) -> None:
    """All patterns of the 8- and 16-bit dtypes: NaN becomes 0, the others keep every bit."""
    bits = torch.int8 if dtype.itemsize == 1 else torch.int16
    info = torch.iinfo(bits)
    gradient = torch.arange(info.min, info.max + 1, dtype=bits).view(dtype)
    expected = expected_bits(gradient)
    found = zero_nan([parameter_with(gradient)])
    assert torch.equal(gradient.view(bits), expected)
    assert found.zeroed == found.nan_count > 0


@given(parameter_sets(gradients(**every_kind)))
def test_reporting_counts_and_changes_nothing(parameters: list[nn.Parameter]) -> None:
    """The default policy counts NaN and Inf per parameter and writes nothing."""
    present = [p.grad for p in parameters if p.grad is not None]
    before = [bits_of(stored(g)).clone() for g in present]
    versions = [g._version for g in present]
    found = report(parameters)
    assert [bits_of(stored(g)).tolist() for g in present] == [b.tolist() for b in before]
    assert [g._version for g in present] == versions
    assert found.policy == "report"
    assert found.zeroed == 0
    assert found.refused is None
    values = [[float(v) for v in _reals(stored(g))] for g in present]
    assert [g.entries for g in found.gradients] == [len(v) for v in values]
    assert [g.nan_count for g in found.gradients] == [sum(x != x for x in v) for v in values]
    assert [g.inf_count for g in found.gradients] == [sum(abs(x) == INF for x in v) for v in values]


def _reals(values: Tensor) -> list[float]:
    flat = values.resolve_conj().reshape(-1)
    real: list[float] = (
        (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(-1).double().tolist()
    )
    return real


def test_the_flush_to_zero_mode_changes_no_subnormal() -> None:
    """With denormals flushed by the processor, subnormal gradients still keep their bits."""
    gradient = torch.tensor([NAN, 1e-45, -1e-40])
    expected = expected_bits(gradient)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        zero_nan([parameter_with(gradient)])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits_of(gradient), expected)


def test_clean_gradients_are_not_touched() -> None:
    """Only gradients that hold NaN are written: the others keep their version counter."""
    clean, dirty, infinite = torch.ones(3), torch.tensor([NAN, 1.0]), torch.tensor([INF])
    zero_nan([parameter_with(g) for g in (clean, dirty, infinite)])
    assert (clean._version, dirty._version, infinite._version) == (0, 1, 0)


def test_neighbours_in_a_shared_buffer_are_left_alone() -> None:
    """A gradient that is a view of a bucket (as under DDP) leaves the rest of the bucket as it is."""
    bucket = torch.full((3, 4), NAN)
    parameter = parameter_with(bucket[:, 1:3])
    zero_nan([parameter])
    assert parameter.grad.untyped_storage().data_ptr() == bucket.untyped_storage().data_ptr()
    assert bucket.isnan().sum() == 6
    assert torch.equal(bucket[:, 1:3], torch.zeros(3, 2))


def test_duplicates_of_a_sparse_gradient_are_added_first() -> None:
    """Inf and -Inf at one index are a NaN of the sum: it is found and zeroed, in the same tensor."""
    gradient = torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 2, 1]]), torch.tensor([INF, -INF, NAN, 2.0]), (3,)
    )
    parameter = parameter_with(gradient)
    found = zero_nan([("embedding", parameter)])
    assert parameter.grad is gradient
    assert gradient.to_dense().tolist() == [0.0, 2.0, 0.0]
    assert (found.nan_count, found.inf_count, found.entries) == (2, 0, 3)


def test_conjugated_gradients_are_written_through() -> None:
    """A lazily conjugated gradient is sanitized by component, and keeps the conjugated view."""
    memory = torch.tensor([complex(NAN, 1.0), complex(2.0, NAN)])
    parameter = parameter_with(memory.conj())
    zero_nan([parameter])
    assert parameter.grad.is_conj()
    assert parameter.grad.tolist() == [complex(0.0, -1.0), complex(2.0, -0.0)]


def test_jagged_gradients_are_covered() -> None:
    """A jagged nested gradient is sanitized through its values."""
    parts = [torch.tensor([NAN, 1.0]), torch.tensor([INF])]
    parameter = nn.Parameter(torch.nested.nested_tensor(parts, layout=torch.jagged))
    parameter.grad = parameter.detach().clone()
    assert zero_nan([parameter]).zeroed == 1
    assert parameter.grad.values().tolist() == [0.0, 1.0, INF]


@pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True will create a reference"
)
def test_gradients_with_a_graph_keep_it() -> None:
    """After backward(create_graph=True) the sanitizer adds nothing to the graph."""
    weight = nn.Parameter(torch.tensor([NAN, 2.0]))
    (weight**3).sum().backward(create_graph=True)
    zero_nan([weight])
    (second,) = torch.autograd.grad(weight.grad[1], weight)
    assert second[1] == 12.0


def test_distributed_gradients_are_read_by_shard() -> None:
    """Of a DTensor gradient this rank's shard is counted and written in place."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch was built without distributed support")
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parameter = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)]))
        shard = torch.tensor([NAN, 1.0, INF])
        parameter.grad = DTensor.from_local(shard, mesh, [Shard(0)])
        found = zero_nan([("weight", parameter)])
    finally:
        dist.destroy_process_group()
    assert (found.nan_count, found.inf_count, found.zeroed) == (1, 1, 1)
    assert shard.tolist() == [0.0, 1.0, INF]


def test_shared_parameters_are_treated_once() -> None:
    """A parameter given under two names is counted once, under the first."""
    shared = parameter_with(torch.tensor([NAN, 1.0]))
    found = zero_nan([("encoder", shared), ("decoder", shared)])
    assert [(g.name, g.zeroed) for g in found.gradients] == [("encoder", 1)]


def test_a_norm_that_overflows_is_no_infinity() -> None:
    """Huge finite entries whose norm overflows float32 are counted as what they are: finite."""
    found = zero_nan([parameter_with(torch.full((4,), 1e30))])
    assert (found.nan_count, found.inf_count) == (0, 0)


def test_parameters_without_gradient_are_left_out() -> None:
    """A parameter without gradient does not appear in the report; none at all is no error."""
    assert report([nn.Parameter(torch.ones(2))]).gradients == ()


@pytest.mark.parametrize(("limit", "is_refused"), [(0.25, False), (0.24, True), (0.0, True)])
def test_a_large_share_of_nan_is_refused(limit: float, is_refused: bool) -> None:
    """Above max_fraction of all entries nothing is written, and the report says why."""
    dirty, clean = torch.tensor([NAN, 1.0]), torch.ones(2)
    found = zero_nan(
        [("a", parameter_with(clean)), ("b", parameter_with(dirty))], max_fraction=limit
    )
    assert bool(dirty.isnan().any()) == is_refused
    assert found.zeroed == (0 if is_refused else 1)
    if is_refused:
        assert found.refused is not None
        assert found.refused.startswith("1 of 4 gradient entries are NaN (first: b), more than")


def test_host_reads_are_as_documented() -> None:
    """One host read on a clean step, two when a gradient is not finite, written or not."""
    clean, dirty = parameter_with(torch.ones(2)), parameter_with(torch.tensor([NAN, 1.0]))
    assert count_host_reads(lambda: zero_nan([clean])).total() == 1
    assert count_host_reads(lambda: report([clean, dirty])).total() == 2
    assert count_host_reads(lambda: zero_nan([clean, dirty])).total() == 2


def test_persistent_nan_names_what_no_back_off_cured() -> None:
    """Only parameters with NaN in every one of the last reports are named."""

    def reports(*patterns: tuple[float, float]) -> list[SanitizeReport]:
        return [
            report(
                [("a", parameter_with(torch.tensor([x]))), ("b", parameter_with(torch.tensor([y])))]
            )
            for x, y in patterns
        ]

    history = reports((1.0, NAN), (NAN, NAN), (NAN, 1.0), (NAN, NAN))
    assert persistent_nan(history, steps=3) == ("a",)
    assert persistent_nan(history, steps=4) == ()
    assert persistent_nan(history, steps=5) == ()
    assert persistent_nan(history, steps=1) == ("a", "b")
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        persistent_nan(history, steps=0)


def test_the_report_is_frozen() -> None:
    """A report is a fact and cannot be edited."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        report([parameter_with(torch.ones(1))]).refused = "no"


MISUSE = {
    "unknown policy": ({"policy": "zero"}, ValueError, r"unknown policy 'zero'; known: \('report'"),
    "share above 1": ({"max_fraction": 1.5}, ValueError, "a share from 0 to 1, got 1.5"),
    "share NaN": ({"max_fraction": NAN}, ValueError, "a share from 0 to 1, got nan"),
    "model": ({"parameters": nn.Linear(1, 1)}, TypeError, "got one Linear; pass model.named"),
    "one tensor": (
        {"parameters": torch.ones(2)},
        TypeError,
        "expected several parameters, got one",
    ),
    "groups": ({"parameters": [{"params": []}]}, TypeError, r"parameters\[0\] is a dict"),
    "used up": ({"parameters": iter(())}, ValueError, "got no parameters; was a generator used up"),
    "same name": (
        {"parameters": [("w", nn.Parameter(torch.ones(1))), ("w", nn.Parameter(torch.ones(1)))]},
        ValueError,
        "two parameters are called 'w', and the report could not tell them apart",
    ),
    "no scaler": ({"scaler": "amp"}, TypeError, "expected a torch.amp.GradScaler, got str"),
}
UNREADABLE = {
    "meta": (lambda: torch.ones(1, device="meta"), "gradient on the meta device: no values"),
    "integers": (lambda: torch.ones(1).long(), "dtype torch.int64, which has no NaN or no zero"),
    "fp8 scales": (lambda: torch.ones(1).to(torch.float8_e8m0fnu), "dtype torch.float8_e8m0fnu"),
    "mkldnn": (lambda: torch.ones(1).to_mkldnn(), "gradient of layout torch._mkldnn; known: torch"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_explained(case: str) -> None:
    """Bad input gets one sentence: what came, what was expected, what to do."""
    change, error, sentence = MISUSE[case]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    good = {"parameters": [nn.Parameter(torch.ones(1))], "scaler": None, "optimizer": optimizer}
    with pytest.raises(error, match=sentence):
        sanitize_gradients_(**(good | change))


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_gradients_are_refused_by_name(case: str) -> None:
    """A gradient without readable values or without a zero is refused with its name and kind."""
    make, sentence = UNREADABLE[case]
    weight = make()
    weight.grad = make()
    with pytest.raises(
        TypeError, match=f"weight has a {sentence}|weight has a gradient of {sentence}"
    ):
        zero_nan([("weight", weight)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padded_nested_gradients_are_refused_by_name() -> None:
    """A nested gradient of the old strided layout has no single block of values: refused."""
    weight = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], requires_grad=True)
    (weight * 2).to_padded_tensor(0).sum().backward()
    with pytest.raises(TypeError, match="weight has a gradient of layout nested; known: torch"):
        zero_nan([("weight", weight)])
