"""From the host to the device, without waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch import Tensor


def to_device(values: ArrayLike, device: torch.device, dtype: DTypeLike = None) -> Tensor:
    """`values` as a tensor on `device`; on a CPU it may share their memory.

    On CUDA the copy is queued on the current stream, from pinned memory: `torch.tensor(values, device=...)` waits until
    the device is through with everything before it, and a copy from pageable memory may.

    Args:
        dtype: None: that which numpy gives to `values`.
    """
    host = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
