"""The example policy of docs/policies.md: the text is the file, and the file works."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from tests.eviction.dense_event import Run, dense_event, make_tokens
from zipage.eviction import registry

ROOT = Path(__file__).parents[2]
REQUESTS = [make_tokens(31), make_tokens(32)]


def test_readme_shows_the_file():
    source = (ROOT / "examples" / "my_policy.py").read_text(encoding="utf-8")
    assert f"```python\n{source}```\n" in (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def test_found_by_place_and_once_imported_by_name():
    with pytest.raises(ValueError, match="unknown policy 'my_policy'"):
        registry.make("my_policy")
    policy = registry.make("examples.my_policy:MyPolicy", {"power": 2})
    assert registry.make("my_policy", {"power": 2.0}) == policy
    assert policy.label == "value-weighted attention (power=2.0)"
    with pytest.raises(ValueError, match=r"my_policy\.power=-1\.0: must be at least 0"):
        registry.make("my_policy", {"power": -1})


def test_ranks_by_attention_and_values():
    policy = importlib.import_module("examples.my_policy").MyPolicy(power=2.0)
    event = dense_event(policy, REQUESTS, [80, 96])
    scores = policy.score(event)
    attention = event.attention("all", group="mean", window="mean")
    for row, n in enumerate((80, 96)):
        lengths = event.value_entries[:, row, :, :n].norm(dim=-1)
        assert torch.allclose(scores[:, row, :, :n], attention[:, row, :, :n] * lengths.square())
        assert (scores[:, row, :, n:] == -math.inf).all()


def test_runs_over_several_events():
    policy = registry.make("examples.my_policy:MyPolicy")
    schedule = [[80, 96], [80, 112], [96, 80]]
    for event in Run(schedule, protection="sink:4").generate(policy, REQUESTS):
        for kept in event.values():
            assert kept.shape == (2, 2, 64)
            assert (kept.diff(dim=-1) > 0).all()
            assert (kept[..., :4] == torch.arange(4)).all()
