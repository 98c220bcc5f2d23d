"""What the engine gave back as the rows of a record (`experiments.records.schemas`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from experiments.graders import Grade, Grader, grade
from experiments.graders.ungraded import grade_none
from experiments.running.fidelity import Measured
from experiments.running.prompts import Prompt
from experiments.running.turns import AnswerReader, as_output, recall_distances
from experiments.workloads import Problem
from zipage import EventStats, RequestMetrics, RequestOutput, StepStats


def request_rows(
    problem: Problem,
    prompt: Prompt,
    output: RequestOutput,
    samples: int,
    grader: Grader,
    start: float,
    reader: AnswerReader | None = None,
) -> list[dict[str, Any]]:
    """One row for each of the `samples` answers to a problem; a refused prompt has as many. An error is graded 0.

    Args:
        start: host clock at the start of the run.
        reader: of a conversation's answers; needed where the prompt has follow-ups.
    """
    common = {"prompt_id": problem.id, "kind": problem.kind, "prompt": prompt.text, "gold": problem.gold}
    common |= {"difficulty": problem.difficulty, "expected_tokens": problem.expected_tokens}
    if problem.facts:
        common["fact_distances"] = [fact.distance for fact in problem.facts]
    zero = None if grader is grade_none else 0.0
    if output.error is not None and all(sample.error is None for sample in output.outputs):
        refused = {"output": "", "output_token_ids": [], "finish_reason": "error", "error": output.error, "grade": zero}
        if problem.facts:
            refused["facts_known"] = [False] * len(problem.facts)
        timings = _timings(output.metrics, start)
        return [common | {"sample_index": index} | refused | timings for index in range(samples)]
    rows = []
    for sample in output.outputs:
        answers = reader(prompt, sample.token_ids) if prompt.follow_ups else None
        text = sample.text if answers is None else as_output(answers)
        graded = Grade(zero) if sample.error is not None else grade(grader, text, problem.gold)
        answer = {
            "sample_index": sample.index,
            "output": text,
            "output_token_ids": sample.token_ids,
            "extracted": graded.extracted,
            "grade": graded.score,
            "place_grades": graded.places,
            "recall_grades": graded.recalls,
            "grader_error": graded.error,
            "finish_reason": sample.finish_reason,
            "error": sample.error,
            "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
        }
        if answers is not None:
            answer["answer_tokens"] = [one.end - one.begin for one in answers]
            answer["recall_distances"] = recall_distances(problem.gold, answers)
        if problem.facts:
            answer["facts_known"] = [fact.known(sample.text) for fact in problem.facts]
        rows.append(common | answer | _timings(sample.metrics, start))
    return rows


def fidelity(measured: Measured, prompt_id: str) -> dict[str, Any]:
    """The columns of a row that tell how close the policy stayed to full KV, or why that was not measured."""
    columns: dict[str, Any] = {"unmeasured": measured.own.unmeasured.get(prompt_id)}
    if (own := measured.own.fidelity.get(prompt_id)) is not None:
        columns |= {"token_divergences": [float(f"{x:.3g}") for x in own.divergences], "token_agrees": own.agrees}
        columns |= {"logprob": sum(own.logprobs), "full_logprob": sum(own.full_logprobs)}
    if measured.worked is None:
        return columns
    columns["worked_unmeasured"] = measured.worked.unmeasured.get(prompt_id)
    if (worked := measured.worked.fidelity.get(prompt_id)) is not None:
        columns |= {"worked_tokens": len(worked.logprobs), "worked_divergence": sum(worked.divergences)}
        columns |= {"worked_logprob": sum(worked.logprobs), "worked_full_logprob": sum(worked.full_logprobs)}
    return columns


def fidelity_counters(measured: Measured) -> dict[str, dict[str, Any]]:
    """Counters of the passes under the policy: over full KV's outputs, and over worked solutions where there are."""
    counters = {"counters": measured.own.counters}
    return counters if measured.worked is None else counters | {"worked_counters": measured.worked.counters}


def _timings(metrics: RequestMetrics, start: float) -> dict[str, Any]:
    return asdict(metrics) | {"arrival": metrics.arrival - start}


def step_rows(steps: Sequence[StepStats], start: float) -> list[dict[str, Any]]:
    """In order of time: those of several replicas come as they were heard of."""
    return [asdict(step) | {"time": step.time - start} for step in sorted(steps, key=lambda step: step.time)]


def event_rows(events: Sequence[EventStats], start: float) -> list[dict[str, Any]]:
    rows = []
    for event in events:
        row = {f.name: getattr(event, f.name) for f in fields(event)}  # asdict would copy the positions
        row |= {"prompt_id": row.pop("request_id"), "time": event.time - start}
        if event.kept_positions is not None:
            row |= {"kept_positions": event.kept_positions.ravel(), "kept_shape": event.kept_positions.shape}
        rows.append(row)
    return rows
