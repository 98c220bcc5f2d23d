"""What the kernels for Hopper share, in Gluon, Triton's language for one kind of GPU."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 and later versions name these differently.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

HEAD_DIMS = (64, 128)
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether the GPU has Hopper's matrix instructions, which neither its predecessors nor its successors have."""
    return torch.cuda.get_device_capability(device)[0] == 9
