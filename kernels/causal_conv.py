"""A short causal convolution of each channel, in pieces of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import DTYPES, check_index, fail


def causal_conv(x: Tensor, before: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's own convolution of B pieces of sequences, and silu of it.

    It is a sum over the K taps, in float32 and rounded once before silu: a piece gives the same in any batch. Torch
    alone; nothing waits for the device.

    Args:
        x: [B, T, C], T tokens each; float32, float16 or bfloat16.
        before: [B, K - 1, C], of x's dtype: the inputs before them, zero before the beginning of a sequence.
        weight: [C, K], of x's dtype; the last tap is that of the token itself.

    Returns:
        [B, T, C], and [B, K - 1, C], what comes `before` the next piece; x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not as above.
    """
    if x.dim() != 3:
        fail("x", "shape", tuple(x.shape), "give [pieces, tokens, channels]")
    if x.dtype not in DTYPES:
        fail("x", "dtype", x.dtype, "use float32, float16 or bfloat16")
    taps = weight.shape[-1]
    check_index("weight", weight, x.dtype, (x.shape[2], taps), x.device, "x")
    check_index("before", before, x.dtype, (x.shape[0], taps - 1, x.shape[2]), x.device, "x")
    inputs, tokens = torch.cat((before, x), dim=1), x.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for tap, factors in enumerate(weight.float().unbind(1)):
        out.addcmul_(inputs[:, tap : tap + tokens].float(), factors)
    return F.silu(out.to(x.dtype)), inputs[:, tokens:]


def causal_conv_reference(x: Tensor, before: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`causal_conv`, by torch's convolution in float32."""
    inputs = torch.cat((before, x), dim=1)
    out = F.conv1d(inputs.float().mT, weight.float()[:, None], groups=x.shape[2]).mT
    return F.silu(out).to(x.dtype), inputs[:, x.shape[1] :]
