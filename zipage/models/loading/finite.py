"""Weights must be numbers that the model's dtype can hold: what is not ends up in every token."""

from __future__ import annotations

import torch
from torch import Tensor


def check_finite(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    """See that each value of a weight is finite, in its own dtype and in the model's.

    Args:
        name: what errors call the tensor.
        dtype: of the model.

    Raises:
        ValueError: one is not; the message says which value, and how many there are.
    """
    if not tensor.numel() or torch.stack(tensor.aminmax()).to(dtype).isfinite().all():
        return
    values = tensor[~tensor.to(dtype).isfinite()]
    broken = values[~values.isfinite()]
    if len(broken):
        raise ValueError(
            f"{name} holds {broken[0].item()}: {len(broken)} of its {tensor.numel()} values are not finite; "
            "download the model again"
        )
    wider = "bfloat16" if values.bfloat16().isfinite().all() else "float32"
    raise ValueError(
        f"{name} holds {values[0].item():.3g}, which {str(dtype).removeprefix('torch.')} cannot: pass dtype={wider!r}"
    )
