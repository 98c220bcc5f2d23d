"""What recurrent layers keep of running requests."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from zipage.models.delta_net_spec import DeltaNetSpec


class RecurrentStates:
    """One row of the batch, one row here: a request's state lies where its row is, from its first token on.

    Args:
        num_rows: most requests at a time.

    Attributes:
        conv: [L, num_rows, K - 1, channels] of `dtype`, the latest inputs of each convolution.
        state: float32 [L, num_rows, Hv, dk, dv].
    """

    def __init__(self, spec: DeltaNetSpec, num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        shape = len(spec.layers), num_rows
        self.conv = torch.zeros((*shape, *spec.conv_shape), dtype=dtype, device=device)
        self.state = torch.zeros((*shape, *spec.state_shape), dtype=torch.float32, device=device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.conv, self.state

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    def poison(self, rows: Iterable[int]) -> None:
        """Overwrite `rows` with NaN."""
        rows = list(rows)
        for x in self.tensors:
            x[:, rows] = float("nan")
