"""What ranks compute together, over `torch.distributed`: NCCL between GPUs, gloo on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.linear import linear
from zipage.models.shard import PeerFailed

logger = logging.getLogger(__name__)

TWO_SHOT_DTYPES = (torch.bfloat16, torch.float32)
ALIGNMENT = 16
"""Bytes that a rank's part of a two-shot sum is a multiple of."""


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
    """`zipage.models.shard.Collectives` of the forward pass.

    Where the GPUs of a host can share memory (`reserve`), a rank writes its part of a product where the others read it;
    each sums a part of the rows, and all read the sums ("two-shot", PyTorch's).
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._size = dist.get_world_size(group)
        self._places: list[Tensor] = []

    def reserve(self, rows: int, width: int, dtype: torch.dtype) -> None:
        """Share memory for sums of up to [rows, width] of `dtype`, where the GPUs can. All ranks call it together."""
        if self._device.type != "cuda" or dtype not in TWO_SHOT_DTYPES:
            return
        import torch.distributed._symmetric_memory as symmetric_memory

        try:
            places = [symmetric_memory.empty(rows * width, dtype=dtype, device=self._device) for _ in range(2)]
            for place in places:
                symmetric_memory.rendezvous(place, group=self._group)
        except RuntimeError as error:
            logger.warning("sums go through NCCL, since the GPUs cannot share memory (%s)", str(error).split("\n")[0])
            return
        self._places = [place.view(rows, width) for place in places]

    def product(self, x: Tensor, weight: Tensor, place: int) -> Tensor:
        return linear(x, weight, out=self._room(place, (len(x), len(weight)), x.dtype))

    def part(self, x: Tensor, place: int) -> Tensor:
        out = self._room(place, x.shape, x.dtype)
        return x if out is None else out.copy_(x)

    def sum(self, part: Tensor, place: int) -> Tensor:
        return self._sum(part, self._is_in(part, place))

    def reduce(self, x: Tensor) -> Tensor:
        room = self._room(0, x.shape, x.dtype)
        return self._sum(x.contiguous(), False) if room is None else self._sum(room.copy_(x), True).clone()

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

    def _room(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Shared memory of that shape; None where there is none."""
        if not self._places or self._places[place].dtype != dtype or len(self._places[place]) < shape[0]:
            return None
        return self._places[place][: shape[0]]

    def _is_in(self, x: Tensor, place: int) -> bool:
        return bool(self._places) and x.data_ptr() == self._places[place].data_ptr()

    def _sum(self, x: Tensor, is_shared: bool) -> Tensor:
        """Over all ranks, in place."""
        even = x.numel() * x.itemsize % (ALIGNMENT * self._size) == 0 and x.numel() > 0
        if is_shared and even:
            torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._group.group_name)
        else:
            dist.all_reduce(x, group=self._group)
        return x


class HostCommunicator:
    """`BesideCollectives` of compressions, through host memory.

    Two streams whose kernels wait for other GPUs can come to wait for each other: a GPU that must be idle before it can
    go on, to load a kernel or to capture a graph, is not, as long as one of them waits. So only the forward pass has
    such kernels.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self._failed: int | None = None
        """A rank that has told that it failed, until this one comes to `fail`, whatever a policy does before."""

    def gather(self, x: Tensor) -> Tensor:
        own = x.cpu().contiguous()  # may fail, and must not between what ranks do together
        self.agree()
        return torch.stack(self._all(own)).to(x.device)

    def agree(self) -> None:
        if self._failed is None:
            self._failed = next((rank for rank, is_failed in enumerate(self._numbers(0)) if is_failed), None)
        if self._failed is not None:
            raise PeerFailed(f"rank {self._failed} failed")

    def fail(self, place: int) -> list[int]:
        if self._failed is None:
            self._numbers(1)  # the others are in `agree`, or here
        self._failed = None
        return self._numbers(place)

    def _numbers(self, own: int) -> list[int]:
        return [int(number) for number in self._all(torch.tensor(own))]

    def _all(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self._size)]
        dist.all_gather(parts, own, group=self._group)
        return parts
