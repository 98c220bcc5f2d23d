"""Documents, batches and networks so small that tests can train on them."""

from __future__ import annotations

from functools import partial
from random import Random

import numpy as np
import pytest
import torch

from experiments.reasoner import network, packing, training
from experiments.reasoner.packing import to_document
from experiments.reasoner.tokenizer import build_tokenizer
from experiments.workloads import GENERATORS
from experiments.workloads.problem import Problem

CHAT = [
    {"role": "user", "content": "a=1"},
    {"role": "assistant", "content": "Answer: 1"},
    {"role": "user", "content": "b=2\nΩ"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(9216)


def documents(count: int, **options) -> list[tuple[np.ndarray, np.ndarray]]:
    options = {"steps": 8, "recalls": 1, "distance": (32, 96), "restatements": 0, "distractors": 0} | options
    return [to_document(problem) for problem in GENERATORS["chained_arithmetic"](seed=0, count=count, **options)]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def tiny_config():
    config = network_config()
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    config.layer_types = config.layer_types[:2]
    return config


network_config = network.build_config


@pytest.fixture
def tiny(monkeypatch):
    """Networks of two narrow layers, and batches that need not hold the longest document."""
    monkeypatch.setattr(network, "build_config", tiny_config)
    monkeypatch.setattr(training, "LONGEST", 512)
    monkeypatch.setattr(packing, "training_problem", short_problem)
    small = {"chained_arithmetic": {"steps": 8, "recalls": 0, "distractors": 0}}
    small |= {"program_trace": {"statements": 1, "iterations": 1}, "fragility": {"distances": (128,)}}
    families = {name: partial(make, **small[name]) for name, make in training.FAMILIES.items()}
    monkeypatch.setattr(training, "FAMILIES", families)


def short_problem(random: Random, progress: float) -> Problem:
    options = {"steps": 8, "recalls": 0, "distractors": 0}
    return next(iter(GENERATORS["chained_arithmetic"](random.randrange(1000), 1, split="train", **options)))
