"""A gated delta rule's constants, and its gates: what it forgets of its state, and how much it writes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import check_index

CHUNK = 64
"""Tokens that are computed together."""
EPS = 1e-6
"""Added to the squared length of a query or key."""


class DeltaGates(NamedTuple):
    """Decay and beta before their functions, as Mamba2 (arXiv:2405.21060) has them:

        decay = -exp(decay_log) * softplus(a + decay_bias),   beta = sigmoid(b)

    Attributes:
        a, b: [T, Hv], last dimension contiguous; float32, float16 or bfloat16.
        decay_log, decay_bias: float32 [Hv].
    """

    a: Tensor
    b: Tensor
    decay_log: Tensor
    decay_bias: Tensor

    def check(self, tokens: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise a ValueError that names what is not as above, its value and the remedy."""
        for name, x in (("a", self.a), ("b", self.b)):
            check_index(name, x, dtype, (tokens, heads), device, "q")
        for name, x in (("decay_log", self.decay_log), ("decay_bias", self.decay_bias)):
            check_index(name, x, torch.float32, (heads,), device, "q")

    def first(self, tokens: int) -> DeltaGates:
        """Of the first tokens."""
        return self._replace(a=self.a[:tokens], b=self.b[:tokens])

    def computed(self) -> tuple[Tensor, Tensor]:
        """decay, at most 0, and beta: float32 [T, Hv]."""
        return -self.decay_log.exp() * F.softplus(self.a.float() + self.decay_bias), self.b.float().sigmoid()
