"""Memory of this machine's host."""

from __future__ import annotations

import os

GIB = 1024**3


def host_memory_bytes() -> int:
    """All that there is, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_swap_space(swap_space: float, num_devices: int) -> None:
    """Raise a ValueError where so many GiB for each device are more than this machine has: pages that nobody has
    written yet would be handed out all the same.
    """
    memory = host_memory_bytes() / GIB
    if swap_space * num_devices > memory:
        times = f" for each of {num_devices} devices" if num_devices > 1 else ""
        raise ValueError(
            f"swap_space={swap_space:g}: so many GiB{times} exceed this machine's memory, {memory:,.1f} GiB: "
            "lower swap_space"
        )
