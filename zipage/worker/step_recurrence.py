"""The recurrent layers of one step: what the model calls in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.delta_gates import DeltaGates
from kernels.spans import Spans
from zipage.models.delta_net import recur
from zipage.worker.recurrent_states import RecurrentStates


@dataclass(slots=True)
class StepRecurrence:
    """Takes each request's state one step, or a chunk, on.

    Attributes:
        decodes: of the leading tokens, one each; -1 where a token is none.
        chunks: of prompts, in the whole batch; None: there are none.
    """

    states: RecurrentStates
    decodes: Spans
    chunks: Spans | None = None

    def __call__(self, layer: int, x: Tensor, gates: DeltaGates, weight: Tensor) -> Tensor:
        """As `Decoder.forward` says."""
        spec, n = self.states.spec, len(self.decodes.rows)
        kept = [tensor[layer] for tensor in self.states.tensors]
        mixed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out = torch.empty((len(x), spec.num_value_heads, spec.value_dim), dtype=torch.float32, device=x.device)
        if n:
            recur(spec, x[:n], gates.first(n), weight, *kept, self.decodes, mixed[:n], out[:n])
        if self.chunks is not None:
            recur(spec, x, gates, weight, *kept, self.chunks, mixed, out)
        return out
