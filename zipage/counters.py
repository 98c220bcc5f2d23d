"""Random numbers that depend on nothing but their counters.

The SplitMix64 finaliser over mixed counters (Steele et al., OOPSLA 2014), as in `zipage.worker.sampler`. A number is a
function of (seed, stream, round, layer, head, slot): the same whatever else is in the batch, however layers are cut
into launches, wherever the head lives and however often the request was paused. The few keys are mixed on the host;
only the last counter, the slot, is mixed on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from zipage.transfer import to_device

GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
WORD = 2**64


def uniform(
    seeds: Sequence[int],
    stream: int,
    rounds: Sequence[int],
    layers: Sequence[int],
    heads: Sequence[int],
    counters: Tensor,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seeds, rounds: of each of R requests; any integers.
        stream: which user of random numbers this is.
        layers, heads: their numbers in the whole model.
        counters: int64 [N], the last counter.

    Returns:
        float32 [len(layers), R, len(heads), N]: odd multiples of 2**-24, so never 0 or 1.
    """
    keys = to_device(_keys(seeds, stream, rounds, layers, heads), counters.device)
    state = _mix_device(keys[..., None] + (counters + 1) * _signed(GOLDEN))
    return (_shift(state, 41).float() + 0.5) * 2.0**-23


def normal(seeds: Sequence[int], stream: int, rounds: Sequence[int], count: int) -> np.ndarray:
    """Standard normal numbers (Box and Muller) that depend on (seed, stream, round, index) alone.

    Returns:
        float64 [R, count].
    """
    keys = _keys(seeds, stream, rounds, [0], [0])[0, :, 0].view(np.uint64)
    with np.errstate(over="ignore"):
        state = _mix_host(keys[:, None] + np.uint64(GOLDEN) * np.arange(1, 2 * count + 1, dtype=np.uint64))
    u = ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return np.sqrt(-2.0 * np.log(u[:, :count])) * np.cos(2.0 * np.pi * u[:, count:])


def _keys(
    seeds: Sequence[int], stream: int, rounds: Sequence[int], layers: Sequence[int], heads: Sequence[int]
) -> np.ndarray:
    """int64 [layers, R, heads]."""
    golden = np.uint64(GOLDEN)

    def words(values: Sequence[int]) -> np.ndarray:
        return np.array([(value + 1) % WORD for value in values], dtype=np.uint64)

    with np.errstate(over="ignore"):
        state = _mix_host(np.array([seed % WORD for seed in seeds], dtype=np.uint64) + golden)
        state = _mix_host(state + golden * words([stream]))
        state = _mix_host(state + golden * words(rounds))
        state = _mix_host(state + golden * words(layers)[:, None])
        state = _mix_host(state[..., None] + golden * words(heads))
    return state.view(np.int64)


def _mix_host(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FACTORS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(FACTORS[1])
    return x ^ (x >> np.uint64(31))


def _mix_device(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(FACTORS[0])
    x = (x ^ _shift(x, 27)) * _signed(FACTORS[1])
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch has no arithmetic on uint64, and int64's shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - WORD if word >= WORD // 2 else word
