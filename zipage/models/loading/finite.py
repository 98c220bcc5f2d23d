"""Weights must be numbers that the model's dtype can hold: what is not ends up in every token."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; where the tensor lies, without a copy."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def refuse_values(tensor: Tensor, name: str, dtype: torch.dtype) -> NoReturn:
    """Say which value of a weight is not finite, in its own dtype or in the model's.

    Args:
        tensor: as it was read.
        name: what errors call it.
        dtype: of the model.

    Raises:
        ValueError: always.
    """
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
