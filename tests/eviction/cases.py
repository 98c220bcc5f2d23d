"""Every policy, with the options that make a difference: what drives the generic tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.calibrations import MADE_UP
from zipage.eviction import registry
from zipage.eviction.policy import Policy


@dataclass(frozen=True)
class Case:
    policy: str
    options: dict[str, Any] = field(default_factory=dict)
    recent: int = 16
    protection: str = "none"

    def make(self) -> Policy:
        return registry.make(self.policy, self.options)

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        extra = [options] if options else []
        extra += [f"r={self.recent}"] if self.recent != 16 else []
        extra += [self.protection] if self.protection != "none" else []
        return "-".join([self.policy, *extra])


SMALL_CHUNK = {"chunk": 32}

CASES = [
    Case("zipage", SMALL_CHUNK),
    Case("zipage", SMALL_CHUNK, protection="prompt"),
    Case("zipage", {"redundancy": "full"}),
    Case("zipage", {"redundancy": "none", "pooling": "never"}),
    Case("zipage", {"global": False, **SMALL_CHUNK}),
    Case("zipage", {"pooling": "always", "pool_width": 7, "lambda": 0.7, **SMALL_CHUNK}),
    Case("zipage", {"max_norm": True, "alpha": 0.95, "lambda": 0.5, "tau": 1.0, **SMALL_CHUNK}, protection="sink:4"),
    Case("zipage", {"lambda": 0.0, **SMALL_CHUNK}),
    Case("zipage", SMALL_CHUNK, recent=8),
    Case("snapkv"),
    Case("snapkv", recent=0),
    Case("snapkv", {"pooling": "first"}, protection="sink:4"),
    Case("snapkv", {"group": "max", "pooling": "never", "window": 8}),
    Case("snapkv", {"softmax": "cut", "pool_kind": "max"}),
    Case("snapkv", {"softmax": "group_cut", "pool_kind": "max", "pool_width": 7, "window": 8}),
    Case("h2o"),
    Case("h2o", {"decay": 0.5, "group": "max"}, recent=32),
    Case("tova"),
    Case("tova", recent=0),
    Case("tova", {"reduce": "group"}),
    Case("streaming"),
    Case("streaming", protection="prompt"),
    Case("r_kv"),
    Case("r_kv", {"lambda": 0.9, "pooling": "first"}, protection="prompt"),
    Case("g_kv"),
    Case("g_kv", {"alpha": 0.95, "lambda": 1.0}, recent=8),
    Case("morphkv"),
    Case("morphkv", {"fuse": "max", "window": 8}),
    Case("keydiff"),
    Case("keydiff", protection="prompt"),
    Case("knorm"),
    Case("knorm", recent=0),
    Case("vase"),
    Case("vase", protection="prompt"),
    Case("vase", {"mode": "dkv"}),
    Case("lagkv", {"partition": 8}),
    Case("lagkv", {"partition": 13, "sink": 0}, recent=0),
    Case("lagkv", {"partition": 5, "sink": 2, "cross": True}, protection="prompt"),
    Case("q_filters", MADE_UP),
    Case("q_filters", MADE_UP, protection="prompt"),
    Case("triattention", MADE_UP),
    Case("triattention", MADE_UP, protection="prompt"),
    Case("triattention", {**MADE_UP, "z": False}, recent=0),
    Case("triattention", {**MADE_UP, "scope": "shared"}, protection="sink:4"),
    Case("expected_attention", MADE_UP),
    Case("expected_attention", {**MADE_UP, "cov": "pairs", "sink": 0, "eps": 0.01, "T": 64}, protection="prompt"),
    Case("expected_attention", {**MADE_UP, "cov": "none", "vnorm": False}, recent=0),
    Case("expected_attention", {"stats": "window"}),
    Case("expected_attention", {"stats": "window", "window": 8, "cov": "pairs"}, protection="sink:4"),
    Case("kvzap", MADE_UP),
    Case("kvzap", MADE_UP, recent=0, protection="prompt"),
    Case("critical"),
    Case("critical", {"base": "h2o", "decay": 0.5, "phi": 0.3, "norm": "l2"}, recent=8),
    Case("critical", {"base": "tova", "phi": 0.0, "eps": 0.01}, protection="prompt"),
    Case("critical", {"base": "morphkv", "fuse": "max", "phi": 0.9}, protection="sink:4"),
    Case("critical", {"base": "expected_attention", **MADE_UP, "vnorm": False, "sink": 2}),
    Case("lazy_eviction", {"alpha": 0.01}),
    Case("lazy_eviction", {"alpha": 0.05, "window": 8}, recent=0, protection="sink:4"),
    Case("random"),
    Case("random", protection="prompt"),
    Case("random_shared"),
    Case("random_shared", {"share": "all"}),
    Case("page_attention", {"page_size": 16}),
    Case("page_attention", {"page_size": 4, "native": False}, protection="prompt"),
    Case("page_attention", {"page_size": 8, "native": False, "scope": "head", "agg": "max"}, protection="sink:4"),
    Case("page_random", {"page_size": 16}),
    Case("page_random", {"page_size": 4, "native": False, "scope": "head"}, protection="prompt"),
]

ONE_OF_EACH = list({case.policy: case for case in reversed(CASES)}.values())
"""The first case of each policy."""

every_case = pytest.mark.parametrize("case", CASES, ids=str)
