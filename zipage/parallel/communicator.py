"""What ranks compute together, over `torch.distributed`: NCCL between GPUs, gloo on a CPU."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

SYMMETRIC_DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes that a rank's part of a two-shot reduction is a multiple of."""


def join(rank: int, size: int, rendezvous: str, device: torch.device) -> None:
    """Become rank `rank` of `size`; waits for the others.

    Args:
        rendezvous: path of a file on this host that does not exist yet, the same for all ranks.
    """
    options = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": size}
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


class Communicator:
    """`zipage.models.shard.Collectives` of one group of ranks; each has a communicator of its own.

    Two communicators of a process may be used by two threads, each on its own stream.

    Sums that fit into `reserve` go through memory that the GPUs share (PyTorch's symmetric memory): each rank reads one
    part of all others' and sums it, then all read the sums ("two-shot"). For the few rows of a decode that takes less
    than half as long as NCCL does, and a product is written where the others read it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._size = dist.get_world_size(group)
        self._buffer: Tensor | None = None

    def reserve(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Share memory for sums of up to [rows, width] of `dtype`, where the GPUs can. All ranks call it together."""
        if self._device.type != "cuda" or dtype not in SYMMETRIC_DTYPES:
            return
        if width * dtype.itemsize % (ALIGNMENT * self._size):
            return
        import torch.distributed._symmetric_memory as symmetric_memory

        try:
            buffer = symmetric_memory.empty(rows * width, dtype=dtype, device=self._device)
            symmetric_memory.rendezvous(buffer, group=self._group)
        except RuntimeError as error:
            logger.warning("sums go through NCCL, since the GPUs cannot share memory (%s)", str(error).split("\n")[0])
            return
        self._buffer = buffer

    def reduce(self, x: Tensor) -> Tensor:
        shared = self._shared(x.shape, x.dtype)
        if shared is not None:
            return self._two_shot(shared.copy_(x))
        x = x.contiguous()
        dist.all_reduce(x, group=self._group)
        return x

    def reduce_product(self, x: Tensor, weight: Tensor) -> Tensor:
        shared = self._shared((len(x), len(weight)), x.dtype)
        if shared is not None:
            return self._two_shot(torch.mm(x, weight.t(), out=shared))
        return self.reduce(x @ weight.t())

    def gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty(self._size, *x.shape, dtype=x.dtype, device=x.device)
        if x.is_cuda:
            dist.all_gather_into_tensor(out, x, group=self._group)
        else:
            dist.all_gather(list(out), x, group=self._group)
        return out

    def broadcast(self, x: Tensor) -> None:
        dist.broadcast(x, group_src=0, group=self._group)

    def _shared(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Shared memory of that shape; None where there is none."""
        count = math.prod(shape)
        if self._buffer is None or self._buffer.dtype != dtype or not 0 < count <= len(self._buffer):
            return None
        if count * dtype.itemsize % (ALIGNMENT * self._size):
            return None
        return self._buffer[:count].view(shape)

    def _two_shot(self, shared: Tensor) -> Tensor:
        torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group.group_name)
        return shared
