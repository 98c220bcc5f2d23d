"""Random numbers that depend on nothing but their counters.

The SplitMix64 finaliser over mixed counters (Steele et al., OOPSLA 2014). Sampling draws by (seed, sample, token), and
eviction by (seed, stream, round, layer, head, slot): the same numbers whatever else is in the batch, however layers are
cut into launches, wherever the head lives, on every device and however often the request was preempted or paused. Few
keys are mixed on the host; only an eviction's last counter, the slot, is mixed on the device.
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


def uniform_rows(seeds: np.ndarray, *counters: np.ndarray) -> np.ndarray:
    """Uniform numbers in the open interval (0, 1), one for each row of seed and counters, all int64 [N].

    Returns:
        float64 [N].
    """
    return _unit(_mixed(*(values.astype(np.uint64) for values in (seeds, *counters))))


def normal(seeds: Sequence[int], stream: int, rounds: Sequence[int], count: int) -> np.ndarray:
    """Standard normal numbers (Box and Muller) that depend on (seed, stream, round, index) alone.

    Returns:
        float64 [R, count].
    """
    keys = _keys(seeds, stream, rounds, [0], [0])[0, :, 0].view(np.uint64)
    with np.errstate(over="ignore"):
        state = _mix_host(keys[:, None] + np.uint64(GOLDEN) * np.arange(1, 2 * count + 1, dtype=np.uint64))
    u = _unit(state)
    return np.sqrt(-2.0 * np.log(u[:, :count])) * np.cos(2.0 * np.pi * u[:, count:])


def _keys(
    seeds: Sequence[int], stream: int, rounds: Sequence[int], layers: Sequence[int], heads: Sequence[int]
) -> np.ndarray:
    """int64 [layers, R, heads]."""

    def words(values: Sequence[int], *shape: int) -> np.ndarray:
        return np.array([value % WORD for value in values], dtype=np.uint64).reshape(shape)

    state = _mixed(
        words(seeds, -1, 1), words([stream], 1), words(rounds, -1, 1), words(layers, -1, 1, 1), words(heads, -1)
    )
    return state.view(np.int64)


def _mixed(seeds: np.ndarray, *counters: np.ndarray) -> np.ndarray:
    """Each counter mixed into the state of those before it; uint64, in the shape that all broadcast to."""
    golden = np.uint64(GOLDEN)
    with np.errstate(over="ignore"):
        state = _mix_host(seeds + golden)
        for values in counters:
            state = _mix_host(state + golden * (values + np.uint64(1)))
    return state


def _unit(state: np.ndarray) -> np.ndarray:
    """The upper 52 bits of uint64 words as float64 in (0, 1)."""
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


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
