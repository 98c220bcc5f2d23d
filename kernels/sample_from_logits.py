"""Draw tokens from logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.layout import check_index, check_rows


def sample_from_logits(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Draw a token a row: where the running sum of the probabilities passes u.

    Args:
        logits: [N, vocab], last dimension contiguous; float32, float16 or bfloat16.
        temperature: float32 [N], by which logits are divided; 0 takes the largest, of several the first.
        u: float64 [N], in (0, 1).

    Returns:
        int64 [N], never a token of probability 0; -1 for a row with NaN or +inf, or without a finite logit.
        Exponentials are float32, sums float64.

    Raises:
        ValueError: an argument's shape, dtype, device or layout is not as above.
    """
    _check(logits, temperature, u)
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            return _triton()(logits, temperature, u)
    return sample_from_logits_torch(logits, temperature, u)


def _check(logits: Tensor, temperature: Tensor, u: Tensor) -> None:
    """Check the arguments of `sample_from_logits`. Raises ValueError naming the argument, its value and the remedy."""
    rows = check_rows("logits", logits)[0]
    check_index("temperature", temperature, torch.float32, (rows,), logits.device, "logits")
    check_index("u", u, torch.float64, (rows,), logits.device, "logits")


def sample_from_logits_reference(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """`sample_from_logits`: where the running sum of exp(logit / temperature) passes the share u of its total."""
    tokens = []
    for row, divisor, share in zip(logits.float(), temperature, u):
        if not row.max().isfinite():
            tokens.append(torch.tensor(-1, device=logits.device))
            continue
        if divisor == 0:
            tokens.append((row == row.max()).nonzero()[0, 0])
            continue
        weights = ((row - row.max()) / divisor).exp()
        running = weights.double().cumsum(dim=0)
        passed = (running > share * running[-1]).nonzero()
        tokens.append(passed[0, 0] if len(passed) else weights.nonzero()[-1, 0])
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64)


def sample_from_logits_torch(logits: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """`sample_from_logits`, all rows at once."""
    greedy = temperature == 0
    largest, best = logits.max(dim=-1)
    probs = (logits.float() / temperature.masked_fill(greedy, 1.0)[:, None]).softmax(dim=-1)
    tokens = torch.where(greedy, best, invert(probs, u[:, None]).squeeze(1))
    return torch.where(largest.isfinite(), tokens, -1)


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index [N, 1] at which the running sum of `weights` [N, V] (>= 0) passes the share `u` [N, 1] of its total.

    Sums are float64: in float32 the tail of a large vocabulary would never be drawn. Runs on any device. A row with NaN
    gives an index that means nothing, but is one.
    """
    running = weights.cumsum(dim=-1, dtype=torch.float64)
    total = running[:, -1:]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target, right=True).clamp_(max=weights.shape[1] - 1)


@cache
def _triton() -> Callable:
    from kernels.sample_from_logits_triton import sample_from_logits_triton

    return sample_from_logits_triton
