import numpy as np
import pytest
import torch
from scipy.stats import kstest

from tests.eviction import dense_simulation
from zipage import counters


def test_uniform_equals_its_definition():
    seeds, rounds = [3, -1, 2**70 + 5], [0, 7, 1]
    u = counters.uniform(seeds, 5, rounds, range(2, 4), range(1, 3), torch.arange(9) // 2)
    assert u.shape == (2, 3, 2, 9)
    assert u.dtype == torch.float32
    for layer in range(2):
        for row in range(3):
            for head in range(2):
                expected = [
                    dense_simulation.uniform(seeds[row] % 2**64, 5, rounds[row], layer + 2, head + 1, slot // 2)
                    for slot in range(9)
                ]
                assert u[layer, row, head].tolist() == expected


def test_uniform_is_uniform_in_every_counter():
    n = 20_000
    steps, zero = list(range(n)), [0]
    draws = [
        counters.uniform(steps, 1, [0] * n, zero, zero, torch.tensor(zero)),
        counters.uniform([0] * n, 1, steps, zero, zero, torch.tensor(zero)),
        counters.uniform(zero, 1, zero, steps, zero, torch.tensor(zero)),
        counters.uniform(zero, 1, zero, zero, steps, torch.tensor(zero)),
        counters.uniform(zero, 1, zero, zero, zero, torch.arange(n)),
        torch.cat([counters.uniform(zero, stream, zero, zero, zero, torch.tensor(zero)) for stream in range(2000)]),
    ]
    for u in draws:
        u = u.flatten().double().numpy()
        assert 0 < u.min() < u.max() < 1
        assert kstest(u, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))


@pytest.mark.parametrize("word", [0, 2**64 - 1, 2**63, 2**41 - 1])
def test_the_ends_stay_inside(word):
    state = torch.tensor([word - 2**64 if word >= 2**63 else word])
    u = (counters._shift(state, 41).float() + 0.5) * 2.0**-23
    assert 0 < u < 1


def test_normal_is_normal_and_a_function_of_its_counters():
    x = counters.normal([1, 2], 4, [0, 3], 5000)
    assert x.shape == (2, 5000)
    assert all(kstest(row, "norm").pvalue > 1e-4 for row in x)
    assert abs(np.corrcoef(x)[0, 1]) < 0.06
    assert np.array_equal(counters.normal([2], 4, [3], 5000), x[1:])
