"""How to read the head of a loss: the operations between the model's output and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gradguard.facts import GraphNode, LossReading

# fmt: off
SAME_VALUES = frozenset((
    "View", "UnsafeView", "Reshape", "ReshapeAlias", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze",
    "Slice", "Select", "Index", "IndexSelect", "ToCopy", "Clone", "Alias", "AsStrided", "Contiguous",
    "Unbind", "Split", "SplitWithSizes", "Flip", "MaskedSelect"
))
"""Operations that hand values on as they are."""

PRODUCTS = frozenset((
    "Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "MkldnnConvolution", "CudnnConvolution",
    "Addmv", "Mv"
))
"""Weight products."""

STRAIGHT = SAME_VALUES | {
    "Expand", "Cat", "Stack", "Add", "Sub", "Neg", "Copy", "CopySlices", "Sum", "Mean", "Mul", "Div",
    "AccumulateGrad", "Roll", "Pad", "ConstantPadNd", "Embedding", "AvgPool2D", "NativeDropout",
    "FusedDropout", "Detach"
}
"""Operations that bend nothing; weight products are counted by themselves."""

REGRESSION = frozenset(("MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss"))
CLASSES = frozenset(("NllLoss", "NllLoss2D", "NllLossNd"))
# fmt: on


def below(reading: LossReading, node: GraphNode) -> Iterator[GraphNode]:
    """Yield the operations that feed this one, as far as they are known.

    Operations of one name at one depth cannot be told apart, and one that is reached on a shorter way
    stands there: those are left out.
    """
    for one in reading.nodes:
        if one.depth == node.depth + 1 and one.name in node.follows:
            yield one


def origin(reading: LossReading, node: GraphNode) -> frozenset[str]:
    """Return the names of the operations that made the values which ``node`` is given."""
    found: set[str] = set()
    front, depth = [node], 0
    while front and depth < 16:
        found.update(name for one in front for name in one.follows if name not in SAME_VALUES)
        front = [n for one in front for n in below(reading, one) if n.name in SAME_VALUES]
        depth += 1
    return frozenset(found)


def values_of(shape: tuple[int, ...] | None) -> int | None:
    """Return how many values a tensor of this shape has."""
    return None if shape is None else math.prod(shape)


def output_node(reading: LossReading) -> GraphNode | None:
    """Return the operation that made the model's output.

    Where the output was not met, because nothing kept it, the last weight product stands for it; None
    without any.
    """
    if reading.output_shape is not None:
        met = [one for one in reading.nodes if one.shape == reading.output_shape]
        return max(met, key=lambda one: one.depth) if met else None
    products = [one for one in reading.nodes if one.name in PRODUCTS]
    return min(products, key=lambda one: one.depth) if products else None


def output_shape(reading: LossReading) -> tuple[int, ...] | None:
    """Return the shape of the model's output, as far as it can be told; see :func:`output_node`."""
    if reading.output_shape is not None:
        return reading.output_shape
    node = output_node(reading)
    return node.shape if node else None


def head(reading: LossReading) -> list[GraphNode]:
    """Return the operations between the model's output and the loss; none if there is no telling."""
    last = output_node(reading)
    return [one for one in reading.nodes if one.depth < last.depth] if last else []


def bending(reading: LossReading) -> int:
    """Return how many operations between the model's output and the loss are not linear."""
    return sum(one.name not in STRAIGHT and one.name not in PRODUCTS for one in head(reading))
