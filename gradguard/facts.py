"""What rules need to know beside the step records: plain values, without torch.

Every fact carries the number of the optimizer step it belongs to: the step under way when it was read,
that is the number of attempts before it. "Not measured" is ``None`` and never ``0.0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the user intends; every field left None is not judged.

    Attributes:
        steps: optimizer steps of the whole run.
        micro_steps: backward passes per optimizer step.
        max_gradient_norm: threshold of the norm clipping.
        frozen: name prefixes of parameters that are frozen on purpose.
        floor: smallest loss that is possible, 0.0 for most; used to tell a plateau at the optimum.
        groups: by a name of your choice, the name prefixes of parameters that belong in one parameter group.
    """

    steps: int | None = None
    micro_steps: int | None = None
    max_gradient_norm: float | None = None
    frozen: tuple[str, ...] = ()
    floor: float | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterFacts:
    """One parameter of the model as it was when it was looked at.

    Attributes:
        name: dotted name in the model.
        shape: its shape.
        dtype: such as ``"float32"``.
        trainable: whether it requires grad.
        optimizer: name of the watched optimizer that holds it; None for none.
        group: index of the parameter group there.
        module: dotted path of the module that owns it; "" for the model itself.
        module_kind: class name of that module.
        rms: root mean square of its values; None when not measured (meta device).
        max_abs: largest magnitude.
        zero_fraction: share of values that are exactly 0.
        distinct_rows: share of distinct rows; None for fewer than two dimensions.
        nonfinite: whether it holds NaN or Inf.
        tied_to: other names of the same tensor.
        equal_to: name of another parameter with equal values that is a tensor of its own; None for none.
        foreign_hooks: tensor hooks on it that are not the guard's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    optimizer: str | None = None
    group: int | None = None
    module: str = ""
    module_kind: str = ""
    rms: float | None = None
    max_abs: float | None = None
    zero_fraction: float | None = None
    distinct_rows: float | None = None
    nonfinite: bool | None = None
    tied_to: tuple[str, ...] = ()
    equal_to: str | None = None
    foreign_hooks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFacts:
    """One module: its place, class and the settings that matter to a rule.

    Attributes:
        name: dotted path; "" for the model itself.
        kind: class name.
        training: its own mode.
        settings: numbers among p, momentum, eps, affine, track_running_stats, padding_idx, in_features,
            out_features, num_features, num_embeddings, inplace, bias (1.0 or 0.0 for switches).
    """

    name: str
    kind: str
    training: bool
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFacts:
    """One parameter group; switches are 1.0 or 0.0.

    Attributes:
        optimizer: name of the watched optimizer. index: of the group in it.
        kind: class name of the optimizer. parameters: how many the group holds.
        settings: lr, initial_lr, weight_decay, momentum, beta1, beta2, eps, maximize, fused, amsgrad.
    """

    optimizer: str
    index: int
    kind: str
    parameters: int
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerFacts:
    """One learning-rate scheduler that was found.

    Attributes:
        kind: class name.
        optimizer: name of the watched optimizer whose rates it changes; None for one that is not watched.
        settings: numbers among T_max, eta_min, step_size, gamma, total_steps, total_iters, T_0, T_mult, factor,
            patience, mode_max (1.0 for ReduceLROnPlateau(mode="max")), min_lr, max_lr, last_epoch, and
            shares_parameters (1.0 when its unwatched optimizer holds parameters of the model).
        planned_steps: calls of its ``step`` after which it has run its course; None when open.
    """

    kind: str
    optimizer: str | None
    settings: Mapping[str, float] = field(default_factory=dict)
    planned_steps: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The model and its optimizers, at attach and again whenever they have changed.

    Attributes:
        step: when.
        model: class name of the model.
        parameters: every parameter of the model once, by its first name.
        modules: every module.
        groups: every parameter group of every watched optimizer.
        schedulers: learning-rate schedulers found.
        unregistered: places of tensors or modules that are used by a module but not registered on it, such
            as ``"layers[0] (Linear in a list)"``.
        foreign: per optimizer, how many of its parameters do not belong to the model.
        foreign_same_shape: per optimizer, how many of these have the shape of a trainable parameter of the
            model that no watched optimizer holds: stale ones, most likely.
        scaler: whether an enabled loss scaler is watched.
        compiled: whether the model or a part of it is compiled.
        plan: what the user declared.
        rank: rank of this process; 0 alone.
        world: number of processes.
    """

    step: int
    model: str
    parameters: tuple[ParameterFacts, ...] = ()
    modules: tuple[ModuleFacts, ...] = ()
    groups: tuple[GroupFacts, ...] = ()
    schedulers: tuple[SchedulerFacts, ...] = ()
    unregistered: tuple[str, ...] = ()
    foreign: Mapping[str, int] = field(default_factory=dict)
    foreign_same_shape: Mapping[str, int] = field(default_factory=dict)
    scaler: bool = False
    compiled: bool = False
    plan: Plan | None = None
    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReading:
    """One module in one forward pass of a detailed step; its first, second, fourth, eighth... call is measured.

    Shares are over values (or units: the last dimension for Linear-like outputs, dimension 1 for
    convolution-like ones); batch statistics are over everything but the units.

    Attributes:
        step, module, kind: when and where; module "" is the model itself.
        calls: how often it was called in this step.
        training: its mode in the call.
        grad: whether the call recorded a graph.
        input_rms, output_rms: root mean square of the first floating input and output tensor.
        input_max, output_max, output_min: largest magnitude of the input, extremes of the output.
        input_nonfinite, output_nonfinite: 1 when NaN or Inf was seen (in a sample of the input, in all of
            the output), else 0.
        input_row_std, output_row_std: standard deviation over the batch, per feature, root mean square over
            the features: 0 when all rows are the same.
        zero_fraction: share of output values exactly 0.
        dead_fraction: share of output units that are 0 for the whole batch.
        saturated_fraction: for bounded activations, share of outputs within 1 % of a bound.
        constant_fraction: share of output units that do not vary over the batch at all.
        repeated_rows: share of output rows equal to another one of the batch although the inputs differ.
        rows_sum_to_one: share of output rows (last dimension, at least 2) that are probability vectors.
        statistics_shift: layers with running statistics: distance of the batch mean from the running
            mean, in running standard deviations, median over the features.
        statistics_ratio: median over features of batch variance over running variance.
        padding_fraction: Embedding with padding_idx: share of input indices equal to it.
        padding_interior: of these, the share with other indices on both sides in their row.
        masked_fraction: attention layers: share of masked positions in the key padding mask.
        masked_rms, kept_rms: attention layers: root mean square of the input at masked and at other positions.
    """

    step: int
    module: str
    kind: str
    calls: int = 1
    training: bool = True
    grad: bool = True
    input_rms: float | None = None
    input_max: float | None = None
    input_nonfinite: int | None = None
    input_row_std: float | None = None
    output_rms: float | None = None
    output_max: float | None = None
    output_min: float | None = None
    output_nonfinite: int | None = None
    output_row_std: float | None = None
    zero_fraction: float | None = None
    dead_fraction: float | None = None
    saturated_fraction: float | None = None
    constant_fraction: float | None = None
    repeated_rows: float | None = None
    rows_sum_to_one: float | None = None
    statistics_shift: float | None = None
    statistics_ratio: float | None = None
    padding_fraction: float | None = None
    padding_interior: float | None = None
    masked_fraction: float | None = None
    masked_rms: float | None = None
    kept_rms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchReading:
    """One tensor of one batch.

    Attributes:
        step: when.
        split: ``"train"`` for training forwards; the name given to ``guard.batches(loader, split=...)`` else.
        tensor: ``"inputs"`` or ``"targets"``, with ``"[1]"`` and so on for further tensors.
        source: ``"loader"`` (guard.batches), ``"forward"`` (argument of the model) or ``"observe"``.
        shape, dtype: of the tensor.
        rows: fingerprints of the first rows (at most 64); equal rows have equal fingerprints. None where
            the tensor has no rows.
        minimum, maximum, mean, std: over all (sampled) values; None for an empty tensor.
        nonfinite: count of NaN and Inf.
        zero_fraction: share of zeros.
        constant_features: share of features (all behind the rows) that are the same in all rows; None for
            fewer than two rows.
        feature_spread: largest over smallest standard deviation of the features (last dimension)
            that vary; None for fewer than two of them.
        feature_scale: largest over smallest root mean square of the features.
        top_share: integer tensors: share of the most common value; distinct: how many distinct values.
        top_value: that value.
        distinct: number of distinct values (sampled).
        sorted_rows: share of neighbouring rows in ascending order (targets of one number per row).
        ignored_fraction: integer targets: share equal to -100.
        input_correlation: targets: largest absolute Pearson correlation with a single input feature.
        shift_match: integer targets of the inputs' shape: share of positions where ``targets[:, i]`` equals
            ``inputs[:, i + shift]``, by shift as text ("-1", "0", "1", "2").
        input_equal: share of target values that occur verbatim in the same row of the inputs (floating ones).
    """

    step: int
    split: str
    tensor: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[float, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    std: float | None = None
    nonfinite: int | None = None
    zero_fraction: float | None = None
    constant_features: float | None = None
    feature_spread: float | None = None
    feature_scale: float | None = None
    top_share: float | None = None
    top_value: float | None = None
    distinct: int | None = None
    sorted_rows: float | None = None
    ignored_fraction: float | None = None
    input_correlation: float | None = None
    shift_match: Mapping[str, float] = field(default_factory=dict)
    input_equal: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNode:
    """One operation in the autograd graph of a loss.

    Attributes:
        name: without "Backward0", such as ``"LogSoftmax"``, ``"MseLoss"``, ``"Addmm"``.
        shape: of its output; None when torch does not say.
        depth: distance from the loss.
        dim: the dimension it works along, negative ones as they were given; None for none.
        reduction: losses: 0 none, 1 mean, 2 sum.
        ignore_index: NllLoss.
        follows: names of the nodes that feed it.
    """

    name: str
    depth: int
    shape: tuple[int, ...] | None = None
    dim: int | None = None
    reduction: int | None = None
    ignore_index: int | None = None
    follows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossReading:
    """The autograd graph of an observed loss on a detailed step.

    Attributes:
        step: when.
        name: ``"loss"``, ``"reported_loss"`` or ``"term:NAME"``.
        requires_grad: whether it has a graph at all.
        nodes: from the loss towards the model's output (at most 64, breadth first), ending there.
        output_shape: shape of the model's output tensor that was met; None when none was met.
        linear_layers: weight products (Addmm, Mm, Convolution...) met in the whole graph.
        nonlinearities: nonlinear operations met in the whole graph of the model.
        reached: how many trainable parameters it reaches; unreached: names of those it does not.
        opaque: whether an opaque node stands in the way, so that "unreached" may be wrong.
    """

    step: int
    name: str
    requires_grad: bool
    nodes: tuple[GraphNode, ...] = ()
    output_shape: tuple[int, ...] | None = None
    linear_layers: int | None = None
    nonlinearities: int | None = None
    reached: int = 0
    unreached: tuple[str, ...] = ()
    opaque: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReading:
    """A copy of the model (EMA, SWA, best checkpoint, teacher, target network) beside the live weights.

    Attributes:
        step: when.
        name: as given to ``guard.follow_copy``; ``"averaged"`` for ``watch(averaged=)``.
        role: ``"averaged"``, ``"snapshot"`` or ``"frozen"``.
        lag: norm of copy minus live over norm of live (sampled).
        live_moved: norm of live now minus live at attach over norm of live at attach.
        copy_moved: the same of the copy.
        changed: whether any sampled value of the copy changed since the last reading.
        buffers_differ: largest over floating buffers of |copy - live| / |live|; None without such buffers.
        live_buffers_moved: largest relative change of the live model's floating buffers since attach.
        shared_tensors: tensors of the copy that share memory with the live model.
        matched: share of the live names that the copy has.
        nonfinite: whether a sampled value of the copy is NaN or Inf.
    """

    step: int
    name: str
    role: str
    lag: float | None = None
    live_moved: float | None = None
    copy_moved: float | None = None
    changed: bool | None = None
    buffers_differ: float | None = None
    live_buffers_moved: float | None = None
    shared_tensors: int = 0
    matched: float = 1.0
    nonfinite: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReading:
    """One ``load_state_dict`` on the watched model or on one of its copies.

    Attributes:
        step: when. target: ``"model"`` or the name of the copy.
        expected: keys the module has. matched: those that were given.
        missing, unexpected: examples (up to 8).
        changed: share of the matched parameters whose values differ from before; None when not measured.
    """

    step: int
    target: str
    expected: int
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    changed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsChanged:
    """Parameters that changed between two optimizer steps, outside of any watched step.

    Attributes:
        step: before which step it was seen.
        parameters: names (up to 8); count: how many in all.
        after_load: whether a ``load_state_dict`` on the model explains all of them.
        loaded_before: whether weights had been loaded into these parameters before, which are now overwritten.
    """

    step: int
    parameters: tuple[str, ...]
    count: int
    after_load: bool = False
    loaded_before: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignStep:
    """A step of an optimizer that is not watched, on parameters of the model.

    Attributes:
        step: when. kind: class name. shared: how many of the model's parameters it holds.
        same_kind: whether it is of the class of a watched optimizer that has stopped stepping: made anew,
            most likely.
        count: how many such steps so far.
    """

    step: int
    kind: str
    shared: int
    same_kind: bool = False
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReading:
    """What one replica holds at a step, to be compared over ranks.

    Attributes:
        step: when. rank, world: who.
        parameters, buffers: fingerprints; equal tensors give equal numbers. buffers is None without any.
        gradients: fingerprint of the gradients the step was taken with.
        rows: fingerprints of the rows of the last training batch.
        local_norm: norm of the sampled gradient as this rank's own backward added it, before reduction.
        reduced_norm: norm of the same values at the step.
    """

    step: int
    rank: int
    world: int
    parameters: float
    buffers: float | None = None
    gradients: float | None = None
    rows: tuple[float, ...] = ()
    local_norm: float | None = None
    reduced_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricReading:
    """A number that the user reports, as given to ``guard.report``.

    Attributes:
        step: when. name, value: the number. split: of the data it was computed on.
        weights: ``"live"`` or the name of the copy it was computed with; None when not said.
    """

    step: int
    name: str
    value: float | None
    split: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReading:
    """What a probe that was armed for one step found: a cut path, a NaN's birth, a gradient's death.

    Attributes:
        step: when.
        kind: ``"cut"``, ``"nonfinite"``, ``"dead"``, ``"wrong backward"``, ``"eval differs"``,
            ``"loss at truth"``, ``"functions differ"`` or ``"at chance"``.
        parameter: name of the parameter concerned; None for none.
        op: name of the operation. reason: why, such as ``"detach"``, ``"nan"``, ``"inf"``.
        module: dotted path of the module it happened in. line: ``"file.py:48"``. source: text of that line.
        phase: ``"forward"`` or ``"backward"``.
        value: a number that goes with it.
    """

    step: int
    kind: str
    parameter: str | None = None
    op: str | None = None
    reason: str | None = None
    module: str | None = None
    line: str | None = None
    source: str | None = None
    phase: str | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnd:
    """The end of watching.

    Attributes:
        step: attempts of all optimizers. clean: left without an exception.
        micro_steps: backward passes since the last attempt.
        forwards: training forwards since the last attempt.
        batches: batches drawn from ``guard.batches`` in all; None when it was not used.
        error: class name of the exception that ended the run.
    """

    step: int
    clean: bool = True
    micro_steps: int = 0
    forwards: int | None = None
    batches: int | None = None
    error: str | None = None


Fact = (
    Setup
    | ModuleReading
    | BatchReading
    | LossReading
    | CopyReading
    | LoadReading
    | WeightsChanged
    | ForeignStep
    | ReplicaReading
    | MetricReading
    | ProbeReading
    | RunEnd
)
"""What a run log holds beside step records and findings."""
