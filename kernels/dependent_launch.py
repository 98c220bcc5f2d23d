"""Programmatic dependent launch: a kernel's programs start while the kernel ahead of it ends.

On Hopper and later a launch may say that it need not wait for the one before. Its programs then take multiprocessors
that fall idle, and `wait_for_inputs` holds each until all that was launched before has ended and is in memory. Every
program calls it first, before it reads, writes or returns: so whatever comes after a kernel may rely on all before it.
Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.linear_tiles import MOST_ROWS


def dependent_launch(x: Tensor) -> dict[str, bool]:
    """Options of a launch over `x` [T, ...], whose kernel takes DEPENDENT and passes it to `wait_for_inputs`.

    With more rows than `kernels.linear` has kernels for, products are cuBLAS's, which starts nothing early, and what
    follows it gained nothing by this (docs/log.md).
    """
    return _options(x.device) if len(x) <= MOST_ROWS else {"DEPENDENT": False}


@cache
def _options(device: torch.device) -> dict[str, bool]:
    if triton.knobs.runtime.interpret:
        return {"DEPENDENT": False}
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 90:
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Let the next kernel's programs start, and wait for the kernels before."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
