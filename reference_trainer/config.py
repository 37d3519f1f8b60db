"""What a training run is made of: frozen dataclasses, validated once and saved with the run.

The ``Attributes`` of each section are also the command line's help: see ``settings.py``.
"""

# No "from __future__ import annotations": pydantic reads the annotations when a class is made.
import re
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from reference_trainer.loss import LossWeights
from reference_trainer.physics import SymbolModel

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
SceneSource = Literal["memory", "fly", "disk"]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_POWER_OF_TWO = re.compile(r"2\*\*(\d{1,2})")


def _read_power_of_two(value: object) -> object:
    """Accept ``2**24``: that is how people write loss scales."""
    match = _POWER_OF_TWO.fullmatch(value.strip()) if isinstance(value, str) else None
    return 2.0 ** int(match[1]) if match else value


LossScale = Annotated[float, BeforeValidator(_read_power_of_two), Field(ge=1.0, le=2.0**99)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Temperature = Annotated[float, Field(ge=0.01)]
LearningRate = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScenesConfig:
    """Which scenes are drawn.

    Attributes:
        seed: seed of every scene of both sets.
        train: number of scenes to train on.
        validation: number of held-out scenes.
        symbols: "constant": one symbol per source and scene; "iid": one per snapshot.
        min_range_m: distance of the nearest possible source in metres; the farthest is 10 m.
        source: where training scenes come from. "memory": the same ones every epoch, all drawn at
            first; "fly": fresh ones every epoch, never one twice; "disk": the same ones every epoch,
            from files written by the command scenes. Held-out scenes are drawn in each case.
        directory: where the command scenes has written them, for source "disk".
        element_jitter: training scenes displace every RIS element by up to this share of half a
            wavelength along both axes.
        code_bits_drop: training scenes quantise the RIS phases with up to this many of 3 bits less.
        curriculum_epochs: epochs in which fresh training scenes become as hard as held-out ones: their
            largest number of sources rises from 1, their lowest signal-to-noise ratio falls from 15 dB.
            0 draws from all of them at once.
    """

    seed: Seed = 0
    train: Count = 256
    validation: Count = 256
    symbols: SymbolModel = "constant"
    min_range_m: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    source: SceneSource = "memory"
    directory: str = ""
    element_jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    code_bits_drop: Annotated[int, Field(ge=0, le=2)] = 0
    curriculum_epochs: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.curriculum_epochs and self.source != "fly":
            raise ValueError(
                f"setting scenes.curriculum_epochs={self.curriculum_epochs} with "
                f"scenes.source={self.source}: only fresh scenes become harder from epoch to epoch; "
                "set scenes.source=fly"
            )
        if (self.source == "disk") != bool(self.directory):
            raise ValueError(
                f"setting scenes.source={self.source} with scenes.directory={self.directory!r}: "
                "give a directory for source disk, and for no other"
            )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class NetworkConfig:
    """What can be chosen about the network; its shape is fixed.

    Attributes:
        seed: seed of the initial weights, of dropout and of the order of the scenes.
        dropout: probability of dropout in the encoder, in training.
    """

    seed: Seed = 0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimizationConfig:
    """How the weights move.

    Attributes:
        epochs: passes over the training scenes.
        batch_scenes: scenes in one forward and backward pass.
        accumulation: passes whose gradients make one optimizer step.
        backbone_learning_rate: AdamW's learning rate of the backbone after warm-up.
        head_learning_rate: the same for the heads.
        weight_decay: AdamW's decoupled decay.
        clip_norm: largest global gradient norm; 0 clips nothing.
        warmup_fraction: share of the planned steps in which the learning rates rise.
        final_fraction: what the cosine leaves of the learning rates at the end.
        sample_blend: share of the receiver's own estimate in the covariance terms of the loss.
        averaging_decay: ceiling of the decay of the averaged weights; 0 follows the live ones.
        swa_fraction: last share of the planned steps in which the averaged weights are the plain mean
            of the live ones since its beginning (SWA), not a decaying one; 0 for none.
        patience: epochs without a smaller covariance NMSE of the held-out set after which training
            stops; best.pt keeps the best weights then. 0 never stops.
    """

    epochs: Count = 60
    batch_scenes: Count = 64
    accumulation: Count = 1
    backbone_learning_rate: LearningRate = 1e-3
    head_learning_rate: LearningRate = 4e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    warmup_fraction: Fraction = 0.1
    final_fraction: Fraction = 0.01
    sample_blend: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    averaging_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    swa_fraction: Fraction = 0.0
    patience: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SchedulesConfig:
    """What changes from epoch to epoch besides the learning rate; by default, nothing.

    Attributes:
        dropout_final_share: what is left of network.dropout in the last epoch; it falls linearly.
        temperature_start: softmax temperature of the grid head in the first epoch.
        temperature_end: the same after temperature_fraction of the epochs, along half a cosine.
        temperature_fraction: share of the epochs after which the temperature stays.
        structure_start: factor on the weights of eigengap, alignment, contrast and cross_gram in the
            first epoch.
        structure_rise: share of the epochs in which that factor rises to 1.
        structure_final: the factor in the last fifth of the epochs.
        blend_rise: share of the epochs, two of them at least, in which optimization.sample_blend rises
            from 0; 0, without blend_jitter, starts with all of it.
        blend_jitter: most by which the share then differs from optimization.sample_blend, either way,
            drawn for every epoch.
    """

    dropout_final_share: Fraction = 1.0
    temperature_start: Temperature = 0.15
    temperature_end: Temperature = 0.15
    temperature_fraction: Fraction = 0.6
    structure_start: Annotated[float, Field(ge=0.0)] = 1.0
    structure_rise: Fraction = 0.1
    structure_final: Annotated[float, Field(ge=0.0)] = 1.0
    blend_rise: Fraction = 0.0
    blend_jitter: Fraction = 0.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PrecisionConfig:
    """In which arithmetic the network runs.

    Attributes:
        mode: "fp32", "bf16" (autocast) or "fp16" (autocast and a gradient scaler).
        initial_loss_scale: where the gradient scaler starts in fp16; may be written 2**24.
        backoff_factor: what an overflow leaves of the loss scale. A quarter, where torch takes half,
            finds the level in half as many skipped steps and leaves room: gradients about double in
            the middle of a run.
        growth_interval: good steps after which the gradient scaler doubles its scale.
    """

    mode: Precision = "fp32"
    initial_loss_scale: LossScale = 2.0**16
    backoff_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    growth_interval: Count = 2000


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GuardConfig:
    """How the run is watched.

    Attributes:
        gate: veto steps on non-finite or vanishing gradients.
        lag: steps after which readings are copied to the host.
        detail_every: steps between two that are read parameter by parameter.
    """

    gate: bool = True
    lag: Count = 8
    detail_every: Count = 50


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RuntimeConfig:
    """Where the run runs, and how often it looks up.

    Attributes:
        device: "cpu", "cuda", or "auto": CUDA where there is one.
        threads: torch's threads; 0 times one step at 1 and at all, and takes the faster.
        evaluate_every: epochs between two evaluations on both sets; the last is always one.
        checkpoint_every: epochs between two checkpoints; the last is always one.
        state_every: attempted optimizer steps between two training states, from which a killed run
            is resumed; 262 MB each, the new one replaces the old. Each checkpoint brings one, too.
    """

    device: Device = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    evaluate_every: Count = 5
    checkpoint_every: Count = 20
    state_every: Count = 100


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """A whole run.

    Attributes:
        scenes: which scenes are drawn.
        network: what can be chosen about the network.
        loss: the weight of every loss term.
        optimization: how the weights move.
        schedules: what else changes from epoch to epoch.
        precision: in which arithmetic the network runs.
        guard: how the run is watched.
        runtime: where the run runs.
    """

    scenes: ScenesConfig = ScenesConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossWeights = LossWeights()
    optimization: OptimizationConfig = OptimizationConfig()
    schedules: SchedulesConfig = SchedulesConfig()
    precision: PrecisionConfig = PrecisionConfig()
    guard: GuardConfig = GuardConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        if not any(asdict(self.loss).values()):
            raise ValueError("every loss weight is 0: nothing to train; set one, loss.covariance=1")
        if self.optimization.epochs * self.scenes.train > 2**32:
            raise ValueError(
                f"setting {self.optimization.epochs} epochs of {self.scenes.train} scenes: more than "
                "the 2**32 scenes that a seed has; take fewer of either"
            )


PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "overfit": Config(),
        "production": Config(
            scenes=ScenesConfig(
                train=16_000,
                validation=512,
                source="fly",
                code_bits_drop=1,
                curriculum_epochs=4,
            ),
            loss=LossWeights(source_count=1.0, alignment=1.0, contrast=0.02),
            optimization=OptimizationConfig(
                epochs=27,
                head_learning_rate=2e-3,
                clip_norm=5.0,
                warmup_fraction=0.03,
                averaging_decay=0.995,
                swa_fraction=0.05,
                patience=8,
            ),
            schedules=SchedulesConfig(
                temperature_start=0.3, structure_start=0.2, structure_rise=0.2
            ),
            precision=PrecisionConfig(mode="bf16"),
            runtime=RuntimeConfig(evaluate_every=1, checkpoint_every=7, state_every=500),
        ),
        "smoke": Config(
            scenes=ScenesConfig(train=16, validation=8),
            optimization=OptimizationConfig(epochs=2, batch_scenes=8),
            runtime=RuntimeConfig(threads=1, evaluate_every=1, state_every=1),
        ),
    }
)
"""``overfit``: memorise 256 scenes, 240 steps; ``production``: learn from 432,000 fresh scenes, in an hour
on a core that multiplies matrices in bfloat16; ``smoke``: does everything run, in seconds."""
