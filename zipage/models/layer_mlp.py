"""The MLP that a layer has."""

from __future__ import annotations

import torch
from torch import nn

from zipage.models.biased_sparse_mlp import BiasedSparseMLP
from zipage.models.mlp import GatedMLP
from zipage.models.shard import Shard
from zipage.models.sparse_mlp import SparseMLP
from zipage.models.spec import ModelSpec


def new_mlp(spec: ModelSpec, index: int, dtype: torch.dtype, device: torch.device, shard: Shard) -> nn.Module:
    """Of layer `index` of the model."""
    experts, options = spec.experts_of(index), {"dtype": dtype, "device": device}
    if experts is None:
        flags = {"bias": spec.mlp_bias, "fused": spec.fused_weights, "activation": spec.activation}
        return GatedMLP(spec.width, spec.mlp_width, **flags, shard=shard, **options)
    if experts.swiglu is None:
        return SparseMLP(spec.width, experts, shard=shard, **options)
    return BiasedSparseMLP(spec.width, experts, shard=shard, **options)
