"""Where an answer left full KV, and what the heads held there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from experiments import records
from experiments.analysis.anatomy import divergences, facts_held, first_difference, held
from experiments.graders import get_grader
from experiments.records import schemas
from experiments.running import outcomes
from experiments.running.prompts import Prompt
from experiments.workloads import chained_arithmetic
from zipage import CompletionOutput, EventStats, RequestMetrics, RequestOutput

OPTIONS = {"count": 2, "steps": 12, "recalls": 1, "distance": [128, 192], "stated_once": 1.0}
LAYERS, HEADS = 2, 2


@pytest.mark.parametrize(
    ("ours", "other", "place"),
    [("abc", "abc", None), ("abc", "axc", 1), ("ab", "abc", 2), ("abc", "", 0), ("", "", None)],
)
def test_first_difference(ours, other, place):
    assert first_difference(ours, other) == place
    assert first_difference(other, ours) == place


def rows(*outputs: str) -> pd.DataFrame:
    tokens = [np.array([ord(letter) for letter in text]) for text in outputs]
    ids = [f"p{i}" for i in range(len(outputs))]
    return pd.DataFrame({"prompt_id": ids, "sample_index": 0, "output": outputs, "output_token_ids": tokens})


def test_divergence_names_the_token_and_the_line():
    found = divergences(rows("a=1\nb=2\nc=3", "same"), rows("a=1\nb=7 x\nc=4", "same"))
    assert found["token"].tolist() == [6, pd.NA]
    assert found.loc[0, ["line", "full_line"]].tolist() == ["b=2", "b=7 x"]
    assert found.loc[1, ["line", "full_line"]].isna().all()


def test_divergence_of_a_line_that_one_of_them_lacks():
    assert divergences(rows("a=1\n"), rows("a=1\nb=2"))[["line", "full_line"]].iloc[0].tolist() == ["", "b=2"]


def test_divergence_needs_texts():
    with pytest.raises(ValueError, match="has no output, output_token_ids"):
        divergences(rows("a").drop(columns=["output", "output_token_ids"]), rows("a"))


def compression(round: int, num_tokens: int, kept: list[list[list[int]]] | None) -> EventStats:
    positions = None if kept is None else np.array(kept, np.int32)
    return EventStats("compress", 1, 0.0, "p0", 0, round, num_tokens, 9, 4, 3, 2, kept_positions=positions)


def frame(*events: EventStats) -> pd.DataFrame:
    return pd.DataFrame([{name: getattr(event, name) for name in EventStats.__slots__} for event in events])


def test_held_reads_the_last_compression_before():
    events = frame(
        compression(0, 6, [[[0, 2, 4], [1, 2, 3]]]),
        compression(1, 9, [[[0, 4, 7], [2, 6, 7]]]),
    )
    positions = np.array([2, 5])
    assert held(events, positions, 5) is None
    assert held(events, positions, 6).tolist() == [[[True, True], [True, True]]]  # 5 had no entry yet
    assert held(events, positions, 8).tolist() == [[[True, True], [True, True]]]
    assert held(events, positions, 9).tolist() == [[[False, False], [True, False]]]


def test_held_needs_positions():
    with pytest.raises(ValueError, match="trace_positions"):
        held(frame(compression(0, 6, None)), np.array([1]), 7)


@pytest.fixture
def traced(tmp_path):
    """Two problems answered as their solutions say; in the first, two of four heads lose a token of its fact."""
    problems = list(chained_arithmetic.generate(seed=3, **OPTIONS))
    fact, prompt_tokens = problems[0].facts[0], len(problems[0].question) + 2
    stated, needed = (prompt_tokens + place - len(problems[0].question) for place in (fact.stated, fact.needed))
    everything = list(range(needed - 1))
    kept = [
        [[p for p in everything if p != stated], everything[:-1]],
        [everything[1:], everything[:stated] + everything[stated + 1 :]],
    ]
    event = compression(0, needed, kept)
    event.request_id = problems[0].id
    requests = []
    for problem in problems:
        sample = CompletionOutput(
            0, problem.solution, [1] * (len(problem.solution) + 1), "stop",
            metrics=RequestMetrics(prompt_tokens=prompt_tokens),
        )  # fmt: skip
        output = RequestOutput(problem.id, None, [1], [sample])
        prompt = Prompt(f"<u>{problem.question}<a>", [1] * prompt_tokens)
        requests += outcomes.request_rows(problem, prompt, output, 1, get_grader("number"), 0.0)
    folder = tmp_path / "run"
    with records.claim(folder) as staging:
        workload = {"name": "chained_arithmetic", "generator": "chained_arithmetic", "seed": 3, "options": OPTIONS}
        records.write_config(staging, {"workload": workload})
        records.write_json(staging / records.PROVENANCE, {})
        schemas.write_rows(staging / records.REQUESTS, requests, schemas.REQUEST_SCHEMA)
        schemas.write_rows(staging / records.EVENTS, outcomes.event_rows([event], 0.0), schemas.EVENT_SCHEMA)
        records.publish(staging, folder, {})
    return folder, problems, stated, needed


def test_facts_with_the_heads_that_held_them(traced):
    folder, problems, stated, needed = traced
    (row,) = facts_held(folder, problems[0].id).to_dict("records")
    assert (row["first"], row["last"], row["needed"]) == (stated, stated + 2, needed)
    assert row["distance"] == problems[0].facts[0].distance == needed - stated
    assert (row["known"], row["stated"]) == (True, True)
    assert (row["heads"], row["whole"], row["part"]) == (LAYERS * HEADS, 2, 4)


def test_facts_of_a_sample_that_was_never_compressed(traced):
    folder, problems, *_ = traced
    found = facts_held(folder, problems[1].id)
    assert found["known"].tolist() == [True]
    assert found[["heads", "whole", "part"]].isna().all(axis=None)


def test_facts_of_a_sample_that_is_not_there(traced):
    with pytest.raises(ValueError, match="no sample 1 of"):
        facts_held(traced[0], traced[1][0].id, 1)
