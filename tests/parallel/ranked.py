"""What an engine answers under many policies at once, and what each head kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.engine.compressed import make_llm, pause_now_and_then, random_prompts, tokens_of
from tests.eviction.cases import CASES, Case
from tests.tiny_models import VOCAB
from zipage import LLM, SamplingParams
from zipage.eviction import registry

LENGTHS = (5, 33, 70)
TOKENS = 50
OF_THEIR_OWN = ("lagkv", "q_filters", "triattention", "expected_attention", "kvzap", "critical", "lazy_eviction")
"""Policies that need options here, which a request can't give."""
TOKEN_POLICIES = [
    name for name in registry.POLICIES if name not in ("full", *OF_THEIR_OWN) and registry.make(name).scope == "token"
]
"""What an engine of policy `zipage` can serve beside its own."""
OWN_CASES = [next(case for case in CASES if case.policy == name) for name in OF_THEIR_OWN]


@dataclass(frozen=True)
class Answers:
    """Tokens of each request, and the positions kept by (request, round)."""

    tokens: list[list[int]]
    kept: dict[tuple[str, int], np.ndarray | None]

    def differences(self, other: Answers) -> list[str]:
        """In what they differ, one line each."""
        found = [
            f"tokens of request {i}" for i, (a, b) in enumerate(zip(self.tokens, other.tokens, strict=True)) if a != b
        ]
        if self.kept.keys() != other.kept.keys():
            return [*found, f"{len(self.kept)} and {len(other.kept)} compressions"]
        return found + [
            f"entries kept by {key}"
            for key, positions in self.kept.items()
            if not np.array_equal(positions, other.kept[key])
        ]


def engine(folder: Path, case: Case | None, **options) -> LLM:
    """Budgets bind, prompts come in chunks, and memory that holds nothing valid is NaN."""
    defaults = {
        "budget": 48, "dtype": "float32", "num_blocks": 160, "max_num_seqs": 32, "max_num_batched_tokens": 64,
        "trace_positions": case is not None, "async_scheduling": True,
    }  # fmt: skip
    return make_llm(folder, case, **defaults | options)


def answers(llm: LLM, policies: Sequence[str | None] = (None,), pauses: float = 0.0, **params) -> Answers:
    """Of the same prompts under each policy; `pauses`: share of requests that are paused now and then."""
    kept = {}

    def note(event) -> None:
        if event.kind == "compress":
            kept[event.request_id, event.round] = event.kept_positions

    llm.event_listeners.append(note)
    if pauses:
        pause_now_and_then(llm, share=pauses)
    given = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True} | params
    prompts = random_prompts(LENGTHS, VOCAB) * len(policies)
    options = [SamplingParams(policy=policy, **given) for policy in policies for _ in LENGTHS]
    outputs = llm.generate(prompts, options, use_tqdm=False)
    llm.event_listeners.remove(note)
    first = int(outputs[0].request_id.removeprefix("auto-"))
    numbered = {(f"{int(name.removeprefix('auto-')) - first}", t): positions for (name, t), positions in kept.items()}
    return Answers(tokens_of(outputs), numbered)
