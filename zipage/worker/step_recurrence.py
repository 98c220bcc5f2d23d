"""The recurrent layers of one step: what the model calls in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zipage.models.delta_net import recur
from zipage.scheduling.plan import StepPlan
from zipage.worker.recurrent_states import RecurrentStates


class StateChunk(NamedTuple):
    """A chunk of a request's text: tokens `begin` to `end` of the batch.

    Attributes:
        row: of the request's state.
        is_first: it begins the text, so that there is no state yet.
    """

    row: int
    begin: int
    end: int
    is_first: bool

    @classmethod
    def of(cls, plan: StepPlan) -> list[StateChunk]:
        """Those of a plan."""
        chunks, begin, n = [], plan.num_decodes, plan.num_decodes
        for row, count, position in zip(plan.rows[n:], plan.counts[n:], plan.positions[n:], strict=True):
            chunks.append(cls(int(row), begin, begin + int(count), position == 0))
            begin += int(count)
        return chunks


@dataclass(slots=True)
class StepRecurrence:
    """Takes each request's state one step, or a chunk, on.

    The batch is decodes (one token each) followed by chunks. Decodes go together; chunks one by one, and nothing of
    theirs may be part of a CUDA graph.

    Attributes:
        rows: int64 [decodes], of their states.
    """

    states: RecurrentStates
    rows: Tensor
    chunks: Sequence[StateChunk] = ()

    def __call__(self, layer: int, x: Tensor, decay: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
        """As `Decoder.forward` says."""
        spec, n = self.states.spec, len(self.rows)
        conv, state = (tensor[layer] for tensor in self.states.tensors)
        out = torch.empty((len(x), spec.num_value_heads, spec.value_dim), dtype=torch.float32, device=x.device)
        if n:
            tokens = (part[:n, None] for part in (x, decay, beta))
            before = (tensor.index_select(0, self.rows) for tensor in (conv, state))
            part, *after = recur(spec, *tokens, weight, *before)
            out[:n] = part[:, 0]
            conv.index_copy_(0, self.rows, after[0])
            state.index_copy_(0, self.rows, after[1])
        for row, begin, end, is_first in self.chunks:
            tokens = (part[None, begin:end] for part in (x, decay, beta))
            before = (torch.zeros_like(tensor[:1]) if is_first else tensor[row : row + 1] for tensor in (conv, state))
            part, *after = recur(spec, *tokens, weight, *before)
            out[begin:end] = part[0]
            conv[row], state[row] = after[0][0], after[1][0]
        return out
