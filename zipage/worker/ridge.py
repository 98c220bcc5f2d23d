"""Linear regression from sums, which need no sample to be kept."""

from __future__ import annotations

import torch
from torch import Tensor


class RidgeSums:
    """Sums over samples in float64, of several regressions on inputs of one width.

    Args:
        num: L, of the regressions.
        width: of an input.
        outputs: H, of each regression.
    """

    def __init__(self, num: int, width: int, outputs: int, device: torch.device) -> None:
        options = {"dtype": torch.float64, "device": device}
        self._inputs = torch.zeros(num, width + 1, width + 1, **options)
        self._products = torch.zeros(num, width + 1, outputs, **options)
        self._squares = torch.zeros(num, outputs, **options)

    def add(self, index: int, x: Tensor, y: Tensor) -> None:
        """Samples of regression `index`: inputs x [T, width], outputs y [T, H]."""
        x, y = x.double(), y.double()
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        self._inputs[index] += x.mT @ x
        self._products[index] += x.mT @ y
        self._squares[index] += y.square().sum(dim=0)

    @property
    def counts(self) -> Tensor:
        """Samples of each regression, [L]."""
        return self._inputs[:, -1, -1]

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """Weight [L, H, width] and bias [L, H] that minimise squared errors and `penalty` times the squared weights."""
        penalties = torch.full((self._inputs.shape[1],), penalty, dtype=torch.float64, device=self._inputs.device)
        penalties[-1] = 0.0
        found = torch.linalg.solve(self._inputs + penalties.diag(), self._products).mT
        return found[..., :-1], found[..., -1]

    def r2(self, weight: Tensor, bias: Tensor) -> Tensor:
        """R^2 of predictions of these samples, [L, H]: 1 - squared errors / squares about the mean."""
        solution = torch.cat((weight, bias[..., None]), dim=-1).mT.double()
        explained = (solution * (2 * self._products - self._inputs @ solution)).sum(dim=1)
        about_mean = self._squares - self._products[:, -1].square() / self.counts[:, None]
        return 1 - (self._squares - explained) / about_mean
