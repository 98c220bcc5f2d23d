"""Scores of entries from hidden states, made once when K and V are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cache_view import shared
from kernels.store_positions import store_positions
from kernels.store_predictions import store_predictions
from zipage.checks import shown
from zipage.eviction.policy import Policy
from zipage.models.spec import ModelSpec
from zipage.worker.kv_cache import KVCache


@dataclass(frozen=True, eq=False)
class EntryScorer:
    """A linear scorer of each layer and KV head: `x @ weight.T + bias`, x the input of the layer's attention.

    Attributes:
        weight: float32 [L, H, width].
        bias: float32 [L, H].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, policy: Policy, calibration: Mapping[str, Tensor], spec: ModelSpec) -> EntryScorer:
        """The scorer in a policy's calibration, of the heads of `spec`.

        Raises:
            ValueError: its arrays are not of the model's width.
        """
        weight, bias = (calibration[name].contiguous() for name in policy.calibration_arrays)
        wanted = spec.num_layers, spec.num_kv_heads, spec.width
        if tuple(weight.shape) != wanted or tuple(bias.shape) != wanted[:2]:
            raise ValueError(
                f"{policy.name}.calibration={shown(policy.calibration)}: weight {list(weight.shape)} and bias "
                f"{list(bias.shape)} are not of [layers, KV heads, width] = {list(wanted)}"
            )
        return cls(weight, bias)

    def into(self, cache: KVCache, slots: Tensor) -> Callable[[int, Tensor], None]:
        """What `Decoder.forward` shall call in each layer to score the tokens whose entries go to `slots`, int64 [T].

        Where heads hold unequal lengths, `slots` are those of each layer, token and head, int64 [L, T * H, 1].

        It neither waits for the device nor allocates there, so a CUDA graph can hold it.
        """
        if cache.tiled:
            state = cache.predictions.view(torch.int32)

            def observe_lines(layer: int, hidden: Tensor) -> None:
                # A kernel that stores numbers of four bytes by slots takes these as they are.
                numbers = (hidden.float() @ self.weight[layer].T + self.bias[layer]).view(torch.int32)
                store_positions(numbers.view(-1), state, slots[layer].view(1, -1, 1))

            return observe_lines
        of_heads = shared(slots, self.weight.shape[1])

        def observe(layer: int, hidden: Tensor) -> None:
            store_predictions(hidden, self.weight[layer], self.bias[layer], cache.predictions[layer], of_heads)

        return observe
