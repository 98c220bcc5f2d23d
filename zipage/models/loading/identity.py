"""What tells one model from another: for files that were made of one and may be used with no other."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from zipage.models.loading.loader import open_model
from zipage.models.loading.weights import Weights
from zipage.models.shard import Piece
from zipage.models.spec import ModelSpec


def model_identity(model: str, *, load_format: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Sizes, rotary embedding, q-norm and a hash of the weights, as plain data.

    Args:
        model, load_format, seed: as `load_model`.

    Raises:
        FileNotFoundError, ValueError: as `load_model`, for what it finds before it reads weights.
    """
    spec, weights = open_model(model, load_format, torch.device("cpu"))
    return {
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "inv_freq": list(spec.inv_freq),
        "rope_attention_factor": float(spec.rope_attention_factor),
        "qk_norm": spec.qk_norm,
        "weights": f"drawn from seed {seed}" if weights is None else weights_hash(weights, spec),
    }


def weights_hash(weights: Weights, spec: ModelSpec) -> str:
    """sha256 of the name and shape of every tensor and of its first rows, as many as a head has dimensions.

    It reads a few hundred megabytes of a model of 8 B parameters. The rows are those of whole heads, which any format
    can give.
    """
    digest = hashlib.sha256()
    for name in sorted(weights.shapes):
        shape = weights.shapes[name]
        rows = Piece(0, 0, min(spec.head_dim, shape[0]), shape[0])
        digest.update(f"{name} {list(shape)} ".encode())
        digest.update(weights.read(name, rows).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
