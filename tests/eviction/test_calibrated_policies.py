"""What policies that know the model's queries beforehand promise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen3Config

from tests.calibrations import MADE_UP
from tests.eviction.dense_event import dense_event
from tests.eviction.dense_simulation import Simulation
from tests.eviction.policy_runs import REQUESTS, kept, make, scores_of, with_keys
from zipage.models.rotary import rope_frequencies

ROPES = {
    "default": {},
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def other_queries(tokens):
    return replace(tokens, queries=torch.randn_like(tokens.queries), seed=tokens.seed + 1)


# q_filters


def test_q_filters_see_nothing_normal_to_the_filter():
    policy = make("q_filters", **MADE_UP)
    filters = dense_event(policy, REQUESTS, [80, 80]).calibration["filters"][:, :, None]
    noise = torch.randn(2, 2, 256, 32)
    normal = noise - (noise * filters).sum(dim=-1, keepdim=True) / filters.square().sum(dim=-1, keepdim=True) * filters
    changed = [with_keys(tokens, lambda keys: keys + normal) for tokens in REQUESTS]
    torch.testing.assert_close(scores_of(policy, changed), scores_of(policy), rtol=1e-4, atol=1e-4)
    assert torch.equal(kept(policy, changed), kept(policy))


# triattention


def rope(rope_type: str) -> tuple[torch.Tensor, float]:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    found = rope_frequencies(Qwen3Config(rope_parameters=parameters, max_position_embeddings=256), 32)
    return found.inv_freq, found.attention_factor


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("z", [False, True])
def test_triattention_is_the_long_form_under_every_rope(rope_type, z):
    policy = make("triattention", z=z, **MADE_UP)
    inv_freq, factor = rope(rope_type)
    assert (factor > 1.1) == (rope_type == "yarn")
    event = replace(dense_event(policy, REQUESTS, [80, 112], protection="sink:4"),
                    inv_freq=inv_freq.double(), rope_factor=factor)  # fmt: skip
    scores = policy.score(event)
    for row, (tokens, n) in enumerate(zip(REQUESTS, (80, 112), strict=True)):
        arrays = (x.double().numpy() for x in (tokens.keys, tokens.values, tokens.queries))
        simulation = Simulation(
            "triattention", {**MADE_UP, "z": z}, *arrays, seed=0, prompt_len=24, keep=64, recent=16,
            protection="sink:4", inv_freq=inv_freq.tolist(), rope_factor=factor,
        )  # fmt: skip
        simulation._grow(n)
        for layer, head in simulation.cache:
            long = np.array(simulation._triattention((layer, head), n))
            ours = scores[layer, row, head, :n].double().numpy() * (1.0 if z else factor)
            np.testing.assert_allclose(ours, long, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["q_filters", "triattention"])
def test_queries_seen_and_seeds_change_nothing(name):
    policy = make(name, **MADE_UP)
    assert torch.equal(kept(policy), kept(policy, [other_queries(tokens) for tokens in REQUESTS]))


def test_triattention_sees_time_pass():
    """The same keys rank otherwise once more tokens have come, but for z, which no common factor moves."""
    policy = make("triattention", **MADE_UP)
    event = dense_event(policy, REQUESTS, [80, 80])
    later = replace(event, logical_lens=event.logical_lens + 1000)
    assert not torch.allclose(policy.score(event), policy.score(later))


def test_triattention_of_equal_keys_is_a_tie():
    policy = make("triattention", **MADE_UP)
    tokens = with_keys(REQUESTS[0], torch.zeros_like)
    assert (scores_of(policy, [tokens]) == 0).all()
    assert (kept(policy, [tokens], schedule=[[96]]) == torch.arange(32, 96)).all()


# expected_attention


def test_expected_attention_is_the_mean_over_gaussian_queries():
    """At one position ahead, the mean of exp(q.K / sqrt(d)) over q ~ N(mu, C), turned to that position, is exp(z)."""
    policy = make("expected_attention", T=1, sink=0, vnorm=False, **MADE_UP)
    tokens = with_keys(REQUESTS[0], lambda keys: 0.3 * keys)
    event = dense_event(policy, [tokens], [80])
    mean, covariance = (event.calibration[name][1, 2].double() for name in ("mean", "covariance"))
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(32))
    queries = mean + torch.randn(200_000, 32, dtype=torch.float64) @ root.T
    turn = torch.exp(1j * 80 * event.inv_freq)
    pairs = torch.complex(*queries.chunk(2, dim=-1)) * turn
    queries = torch.cat((pairs.real, pairs.imag), dim=-1)
    keys = tokens.keys[1, 1, :80].double()
    sampled = (queries @ keys.T / 32**0.5).exp().mean(dim=0)
    # Of the second KV head's two query heads, the first alone.
    alone = {name: array.unflatten(1, (2, 2))[:, :, :1].flatten(1, 2) for name, array in event.calibration.items()}
    expected = policy.score(replace(event, group_size=1, calibration=alone))[1, 0, 1].double()
    torch.testing.assert_close(sampled / sampled.sum(), expected, rtol=0.05, atol=1e-4)


def test_expected_attention_of_pairs_is_that_of_a_covariance_in_blocks():
    full, pairs = (make("expected_attention", cov=cov, **MADE_UP) for cov in ("full", "pairs"))
    event = dense_event(full, REQUESTS, [80, 96])
    same = torch.arange(32) % 16
    blocks = event.calibration["covariance"] * (same[:, None] == same)
    event = replace(event, calibration=event.calibration | {"covariance": blocks})
    torch.testing.assert_close(full.score(event), pairs.score(dense_event(pairs, REQUESTS, [80, 96])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": "running"}, "one of file, window"),
        (
            {"stats": "window", **MADE_UP},
            "must be left out without stats=file",
        ),
        ({}, "give the calibration file"),
        ({"T": 0, **MADE_UP}, "at least 1"),
    ],
)
def test_options_of_expected_attention(options, message):
    with pytest.raises(ValueError, match=message):
        make("expected_attention", **options)
