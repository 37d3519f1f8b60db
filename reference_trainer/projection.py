"""Least squares with the symbols solved for: what is left to fit once the positions are given.

In every block the snapshots are ``A s + noise`` with unknown symbols s, linear, and steering
columns A that depend on the positions. The best symbols for given positions are ``A^+ y``, and
what is left, ``(I - A A^+) y``, depends on the positions alone ("variable projection"). All of it
follows from inner products of few columns; nothing here grows with the number of equations.

Axes: B scenes, S blocks, K sources; positions have 3 K coordinates, coordinate slow, source fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_LOADING = 1e-9
"""Share of a column's own energy added to its diagonal: two sources at one place stay solvable."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Projection:
    """The residual at given positions, and its slope and curvature with the symbols solved for.

    Attributes:
        residual: float64 ``[B]``, squared norm of what the sources do not explain.
        slope: float64 ``[B, 3 K]``, minus half the gradient of the residual.
        curvature: float64 ``[B, 3 K, 3 K]``, half the Gauss-Newton Hessian of the residual.
        symbols: complex128 ``[B, S, K]``, the best symbols.
    """

    residual: Tensor
    slope: Tensor
    curvature: Tensor
    symbols: Tensor

    def where(self, wanted: Tensor, other: Projection) -> Projection:
        """Return this projection for the scenes ``wanted`` (bool ``[B]``), and ``other`` elsewhere."""
        return Projection(
            residual=torch.where(wanted, self.residual, other.residual),
            slope=torch.where(wanted[:, None], self.slope, other.slope),
            curvature=torch.where(wanted[:, None, None], self.curvature, other.curvature),
            symbols=torch.where(wanted[:, None, None], self.symbols, other.symbols),
        )

    def select(self, index: Tensor) -> Projection:
        """Return some of the scenes, copied."""
        return Projection(
            residual=self.residual[index],
            slope=self.slope[index],
            curvature=self.curvature[index],
            symbols=self.symbols[index],
        )


def project(columns: Tensor, target: Tensor, energy: Tensor) -> Projection:
    """Return the residual with its slope and curvature.

    Args:
        columns: ``[B, S, 4 K, R]``: K received steering vectors, then their 3 K derivatives.
        target: what was received, complex128 ``[B, S, R]``.
        energy: squared norm of the snapshots, float64 ``[B]``.

    Sync: none on the CPU; on CUDA as ``torch.linalg.solve_ex``.
    """
    count = columns.shape[2] // 4
    wide = columns.to(torch.complex128)
    conjugate = wide.conj()
    inner = conjugate @ wide.mT
    matched = (conjugate @ target.unsqueeze(-1)).squeeze(-1)
    cross = inner[..., :count, count:]
    solved = _solve_loaded(
        inner[..., :count, :count], torch.cat((matched[..., :count, None], cross), dim=-1)
    )
    symbols, mixing = solved[..., 0], solved[..., 1:]
    unexplained = matched[..., count:] - (cross.mH @ symbols.unsqueeze(-1)).squeeze(-1)
    weight = symbols.repeat(1, 1, 3)
    explained = (matched[..., :count].conj() * symbols).real.sum(dim=(1, 2))
    return Projection(
        residual=energy - explained,
        slope=(weight.conj() * unexplained).real.sum(dim=1),
        curvature=information(inner[..., count:, count:] - cross.mH @ mixing, symbols),
        symbols=symbols,
    )


def information(orthogonal: Tensor, symbols: Tensor) -> Tensor:
    """Return ``Re sum_s diag(s)^H C_s diag(s)``, float64 ``[B, 3 K, 3 K]``.

    Args:
        orthogonal: C, inner products of the derivatives outside the span of the steering vectors,
            complex128 ``[B, S, 3 K, 3 K]``.
        symbols: s, complex128 ``[B, S, K]``.
    """
    weight = symbols.repeat(1, 1, 3)
    return (weight.conj().unsqueeze(-1) * orthogonal * weight.unsqueeze(-2)).real.sum(dim=1)


def _solve_loaded(matrix: Tensor, right: Tensor) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).real
    loading = torch.diag_embed(_LOADING * diagonal + torch.finfo(diagonal.dtype).tiny)
    solution: Tensor = torch.linalg.solve_ex(matrix + loading, right).result
    return solution
