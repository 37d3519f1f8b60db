"""The covariance network: 93 parameter tensors, 16,339,075 parameters, every one in use.

Shapes and counts are those of the published model; these wires of it are mended. The grid head
gives angles that enter the loss. The spectral projection and fusion take part, and the heads read
the last of the three fusions. No input of the lag projection is identically zero. The slot of the
collapsed channel holds a beam map, which depends on the whole sensing matrix. The auxiliary
distance has a unit in which its last layer can learn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference_trainer.factors import joint_factor, spectrum, unpack_complex
from reference_trainer.features import (
    COUNT_FEATURES,
    LAG_FEATURES,
    SPECTRUM_FEATURES,
    count_features,
    lag_features,
    spectrum_features,
)
from reference_trainer.grid import AngleGrid

if TYPE_CHECKING:
    from reference_trainer.examples import NetworkInput

PARAMETER_TENSORS = 93
PARAMETERS = 16_339_075
GROUP_SIZES = {"backbone": 6_681_942, "head": 9_657_133}

SNAPSHOTS = 16
ANTENNAS = 16
ELEMENTS = 144
MAX_SOURCES = 5
WIDTH = 448
ATTENTION_HEADS = 8
FEED_FORWARD = 512
ENCODER_LAYERS = 4
COUNT_HIDDEN = 128
RANGE_UNIT_M = 5.0
"""Unit of the auxiliary distance before its softplus, about the middle of the distances: in metres
the last layer would have to grow tenfold, while the log of the distance asks for small changes."""

INPUT_SHAPES = {
    "snapshots": (SNAPSHOTS, ANTENNAS, 2),
    "beam_map": (SNAPSHOTS, ANTENNAS, 2),
    "codes": (SNAPSHOTS, ELEMENTS, 2),
    "snr_db": (),
}
"""Shape of each observation of one scene."""

HEAD_MODULES = (
    "angle_factor",
    "range_factor",
    "count_spectral",
    "grid_logits",
    "aux_angles",
    "aux_range",
)
"""The modules that train at the head's learning rate. The direct source count head is not among
them: the published counts have it in the backbone."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the network says about a batch of scenes; float32 and complex64 in any precision mode.

    Source slots are in the order of the data set (by azimuth).

    Attributes:
        angle_factor: [B, 144, 5] complex; see :func:`reference_trainer.factors.joint_factor`.
        range_factor: [B, 144, 5] complex.
        aux_azimuth_rad: [B, 5] azimuth of each slot.
        aux_elevation_rad: [B, 5] elevation of each slot.
        aux_range_m: [B, 5] distance of each slot, positive.
        grid_azimuth_rad: [B, 5] azimuth expected under the grid head's distribution.
        grid_elevation_rad: [B, 5] elevation, likewise.
        k_logits: [B, 5] unnormalised log-probabilities of 1..5 sources.
    """

    angle_factor: Tensor
    range_factor: Tensor
    aux_azimuth_rad: Tensor
    aux_elevation_rad: Tensor
    aux_range_m: Tensor
    grid_azimuth_rad: Tensor
    grid_elevation_rad: Tensor
    k_logits: Tensor


class SnapshotEncoder(nn.Module):
    """Convolutions over the snapshots, then self-attention among them and their mean."""

    def __init__(self, *, dropout: float) -> None:
        super().__init__()
        narrow = WIDTH // 2
        self.stem = nn.Conv1d(2 * ANTENNAS, narrow, kernel_size=5, padding=2)
        self.depthwise = nn.Conv1d(narrow, narrow, kernel_size=3, padding=1, groups=narrow)
        self.pointwise = nn.Conv1d(narrow, WIDTH, kernel_size=1)
        layer = nn.TransformerEncoderLayer(
            WIDTH, ATTENTION_HEADS, FEED_FORWARD, dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, ENCODER_LAYERS, enable_nested_tensor=False)

    def forward(self, snapshots: Tensor) -> Tensor:
        """Return [B, 448] from ``snapshots`` [B, 16, 16, 2]."""
        channels = nn.functional.gelu(self.stem(snapshots.flatten(2).mT))
        channels = nn.functional.gelu(self.pointwise(self.depthwise(channels)))
        with attention_kernel(channels.device):
            mean: Tensor = self.encoder(channels.mT).mean(dim=1)
        return mean


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """Choose how attention is computed: under autocast on a CPU as plain matrix products.

    On 16 snapshots the backward of torch's fused kernel for the CPU took six times as long in
    bfloat16, 174 ms of a step of 430 ms.
    """
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class CodeEncoder(nn.Module):
    """One convolution over the sequence of reflection codes, and its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2 * ELEMENTS, WIDTH // 2, kernel_size=5, padding=2)

    def forward(self, codes: Tensor) -> Tensor:
        """Return [B, 224] from ``codes`` [B, 16, 144, 2]."""
        return nn.functional.gelu(self.stem(codes.flatten(2).mT)).mean(dim=-1)


class Fusion(nn.Module):
    """Mixes what is known so far with projected features of the predicted covariance."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.mix = nn.Linear(WIDTH + WIDTH // 4, WIDTH)

    def forward(self, state: Tensor, features: Tensor) -> Tensor:
        """Return [B, 448] from ``state`` [B, 448] and ``features`` [B, n]."""
        joined = torch.cat([state, self.projection(features).to(state.dtype)], dim=-1)
        return nn.functional.gelu(self.mix(joined))


class CovarianceNetwork(nn.Module):
    """Predicts a covariance (as factors), the sources' positions and their number.

    Args:
        dropout: probability in the encoder layers, in [0, 1).
        grid_temperature: divides the grid head's logits before the softmax, at least 0.01.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(self, *, dropout: float = 0.0, grid_temperature: float = 0.15) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"building the network: dropout is {dropout}, expected 0 <= p < 1")
        narrow, narrower = WIDTH // 2, WIDTH // 4
        self.snapshots = SnapshotEncoder(dropout=dropout)
        self.beams = nn.Linear(2 * SNAPSHOTS * ANTENNAS, narrow)
        self.codes = CodeEncoder()
        self.fusion = nn.Linear(WIDTH + 2 * narrow, WIDTH)
        self.lag_fusion = Fusion(nn.Linear(LAG_FEATURES, narrower))
        self.spectrum_fusion = Fusion(
            nn.Sequential(
                nn.Linear(SPECTRUM_FEATURES, narrower), nn.GELU(), nn.Linear(narrower, narrower)
            )
        )
        self.angle_factor = nn.Linear(WIDTH, 2 * ELEMENTS * MAX_SOURCES)
        self.range_factor = nn.Linear(WIDTH, 2 * ELEMENTS * MAX_SOURCES)
        self.count_direct = count_head(WIDTH)
        self.count_spectral = count_head(COUNT_FEATURES)
        self.count_scale = nn.Parameter(torch.ones(()))
        self.grid = AngleGrid(temperature=grid_temperature)
        self.grid_logits = nn.Linear(WIDTH, MAX_SOURCES * self.grid.cells)
        self.aux_angles = nn.Linear(WIDTH, 2 * MAX_SOURCES)
        self.aux_range = nn.Linear(WIDTH, MAX_SOURCES)

    def forward(self, observed: NetworkInput) -> Prediction:
        """Predict from a batch of observations.

        Complex numbers, transforms and eigenvalues are computed in single precision under autocast.

        Raises:
            ValueError: an observation has another shape than the network was built for.

        Sync: on CUDA one eigenvalue routine waits for the device.
        """
        _check_shapes(observed)
        state = self._encode(observed)
        angle = unpack_complex(self.angle_factor(state), MAX_SOURCES)
        ranged = unpack_complex(self.range_factor(state), MAX_SOURCES)
        with torch.autocast(state.device.type, enabled=False):
            lags = lag_features(angle)
            eigenvalues = spectrum(joint_factor(angle, ranged))
            spectral = spectrum_features(eigenvalues)
        state = self.spectrum_fusion(self.lag_fusion(state, lags), spectral)
        azimuth, elevation = self.grid(self.grid_logits(state))
        angles, distance_m = self._positions(state)
        return Prediction(
            angle_factor=angle,
            range_factor=ranged,
            aux_azimuth_rad=angles[..., :MAX_SOURCES],
            aux_elevation_rad=angles[..., MAX_SOURCES:],
            aux_range_m=distance_m,
            grid_azimuth_rad=azimuth,
            grid_elevation_rad=elevation,
            k_logits=self._count_logits(state, eigenvalues, observed.snr_db),
        )

    def _encode(self, observed: NetworkInput) -> Tensor:
        """Return [B, 448]: all that was observed, before anything was predicted."""
        beams = nn.functional.gelu(self.beams(observed.beam_map.flatten(1)))
        parts = [self.snapshots(observed.snapshots), beams, self.codes(observed.codes)]
        return nn.functional.gelu(self.fusion(torch.cat(parts, dim=-1)))

    def _positions(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxiliary angles [B, 10] and distances [B, 5], in single precision.

        In half precision the gradients of these biases, sums over a batch of like signs, overflow
        at a loss scale that suits all other tensors, and in the middle of a run.
        """
        with torch.autocast(state.device.type, enabled=False):
            state = state.float()
            distance_m = RANGE_UNIT_M * nn.functional.softplus(self.aux_range(state))
            return self.aux_angles(state), distance_m

    def _count_logits(self, state: Tensor, eigenvalues: Tensor, snr_db: Tensor) -> Tensor:
        """Return [B, 5]: the mean of what the state and the predicted spectrum say, scaled."""
        with torch.autocast(state.device.type, enabled=False):
            features = count_features(
                eigenvalues,
                snr_db,
                elements=ELEMENTS,
                snapshots=SNAPSHOTS,
                max_sources=MAX_SOURCES,
            )
        both: Tensor = self.count_spectral(features).float() + self.count_direct(state).float()
        return 0.5 * self.count_scale * both


def _check_shapes(observed: NetworkInput) -> None:
    for name, expected in INPUT_SHAPES.items():
        shape = tuple(getattr(observed, name).shape)
        if len(shape) != 1 + len(expected) or shape[1:] != expected:
            raise ValueError(
                f"running the covariance network: {name} has shape {shape}, expected a batch of "
                f"{expected}; it is built for {ANTENNAS} antennas, {SNAPSHOTS} snapshots and "
                f"{ELEMENTS} elements"
            )


def count_head(features: int) -> nn.Sequential:
    """Return a small classifier of the number of sources, initialised as published."""
    wide, last = nn.Linear(features, COUNT_HIDDEN), nn.Linear(COUNT_HIDDEN, MAX_SOURCES)
    for layer in (wide, last):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(layer.bias, 0.1)
    return nn.Sequential(nn.LayerNorm(features), wide, nn.ReLU(), last)


def parameter_groups(model: CovarianceNetwork) -> dict[str, list[nn.Parameter]]:
    """Return every parameter of ``model`` once, as the groups "backbone" and "head"."""
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
    for name, parameter in model.named_parameters():
        group = "head" if name.split(".")[0] in HEAD_MODULES else "backbone"
        groups[group].append(parameter)
    return groups
