"""One request from the inside: where its answer left that of full KV, and what its heads still held there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from experiments.config.schema import WorkloadConfig
from experiments.records import load_events, load_requests, read_config
from experiments.workloads import load_problems

if TYPE_CHECKING:
    from experiments.workloads import Problem

KEYS = ["prompt_id", "sample_index"]
NEEDED = (*KEYS, "output", "output_token_ids")


def divergences(requests: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """Where each answer leaves the one to the same problem under full KV.

    Args:
        requests, full: of `load_requests`, from runs of the same problems with texts and tokens.

    Returns:
        One row for each sample that both have: `token`, the number of the first output token that differs, and the line
        of the answer that it stands in: `line` here, `full_line` under full KV. All three are null where none differs.

    Raises:
        ValueError: an archived copy without texts.
    """
    for rows in (requests, full):
        if lacking := [name for name in NEEDED if name not in rows]:
            raise ValueError(f"the record has no {', '.join(lacking)}: an archived copy leaves texts out")
    pairs = requests[list(NEEDED)].merge(full[list(NEEDED)], on=KEYS, suffixes=("", "_full"))
    rows = []
    for pair in pairs.itertuples(index=False):
        token = first_difference(pair.output_token_ids, pair.output_token_ids_full)
        character = first_difference(pair.output, pair.output_full)
        found = {"token": token, "line": None, "full_line": None}
        if character is not None:
            found |= {"line": _line(pair.output, character), "full_line": _line(pair.output_full, character)}
        rows.append({"prompt_id": pair.prompt_id, "sample_index": pair.sample_index} | found)
    table = pd.DataFrame(rows, columns=[*KEYS, "token", "line", "full_line"])
    return table.astype({"token": "Int64"})


def first_difference(ours, other) -> int | None:
    """The first place where two sequences differ, or where the shorter one ends; None where they are equal."""
    for place, (a, b) in enumerate(zip(ours, other)):
        if a != b:
            return place
    return None if len(ours) == len(other) else min(len(ours), len(other))


def _line(text: str, character: int) -> str:
    begin = text.rfind("\n", 0, character) + 1
    return text[begin:].partition("\n")[0]


def held(events: pd.DataFrame, positions: np.ndarray, length: int) -> np.ndarray | None:
    """Which layers and KV heads still hold the entries at `positions` when a sample has `length` tokens.

    Args:
        events: of one sample, from a run with `engine.trace_positions=true`.
        positions: token positions before `length`, int [P].
        length: logical length, of the prompt and the output so far.

    Returns:
        bool [layers, KV heads, P]; None if it was not compressed until then, so that all hold all.
    """
    past = events[(events["kind"] == "compress") & (events["num_tokens"] <= length)]
    if past.empty:
        return None
    last = past.sort_values("round").iloc[-1]
    if last["kept_positions"] is None:
        raise ValueError("the events hold no positions (run with engine.trace_positions=true)")
    kept = last["kept_positions"]
    later = positions >= last["num_tokens"] - 1  # the last token known at a compression has no entry yet
    return (kept[:, :, :, None] == positions).any(axis=2) | later


def facts_held(run: str | Path | pd.Series, prompt_id: str, sample_index: int = 0) -> pd.DataFrame:
    """The facts that a thought needs late, and what its heads held of each when it was needed.

    Args:
        run: with texts, of a generated workload and a model of one token a character, such as the reasoner.

    Returns:
        One row for each fact that the solution states: `line` and `text` as in `Fact`; `distance`, `known`; `first` and
        `last`, the token positions of its value where it was stated last; `needed`, the position where the thought
        writes it again; `stated`, whether the answer states it there as the solution does; `heads`, how many there are
        over all layers, or null where nothing tells; and of them those that hold its whole value (`whole`) and any
        token of it (`part`).

    Raises:
        ValueError: the problem is not in the run, or the tokens of its answer are not its characters.
    """
    requests = load_requests(run)
    found = requests[(requests["prompt_id"] == prompt_id) & (requests["sample_index"] == sample_index)]
    if found.empty:
        raise ValueError(f"the run holds no sample {sample_index} of {prompt_id}")
    request = found.iloc[0]
    if len(request["output_token_ids"]) - len(request["output"]) not in (0, 1):  # an end token has no text
        raise ValueError(f"{prompt_id}: its tokens are not its characters, so places in its text are no positions")
    problem = _problem(run, request)
    events = load_events(run)
    events = events[(events["prompt_id"] == prompt_id) & (events["sample_index"] == sample_index)]
    rows = []
    for fact, known in zip(problem.facts, request["facts_known"], strict=True):
        begin = fact.stated - len(problem.question)
        if begin < 0:  # it stands in the prompt
            continue
        end = begin + len(problem.solution[begin:].split(maxsplit=1)[0])
        positions = request["prompt_tokens"] + np.arange(begin, end)
        needed = int(request["prompt_tokens"]) + fact.needed - len(problem.question)
        row = {"line": fact.line, "text": fact.text, "distance": fact.distance, "known": bool(known)}
        row |= {"first": int(positions[0]), "last": int(positions[-1]), "needed": needed}
        row["stated"] = request["output"][begin:end] == problem.solution[begin:end]
        holds = held(events, positions, needed)
        if holds is not None:
            row |= {"heads": holds.shape[0] * holds.shape[1], "whole": int(holds.all(axis=2).sum())}
            row["part"] = int(holds.any(axis=2).sum())
        rows.append(row)
    names = ["line", "text", "distance", "known", "first", "last", "needed", "stated", "heads", "whole", "part"]
    return pd.DataFrame(rows, columns=names).astype(dict.fromkeys(names[-3:], "Int64"))


def _problem(run: str | Path | pd.Series, request: pd.Series) -> Problem:
    """The problem of a recorded sample, generated again."""
    config = WorkloadConfig(**read_config(run)["workload"])
    for problem in load_problems(config):
        if problem.id == request["prompt_id"] and problem.question in request["prompt"]:
            return problem
    raise ValueError(f"{request['prompt_id']}: its generator no longer makes the recorded question")
