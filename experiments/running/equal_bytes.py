"""Budgets of as many bytes: `policy.bytes_as=NAME` becomes a budget once the model's shape is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments.config.check import check
from experiments.config.schema import Experiment, engine_options
from experiments.errors import UsageError
from zipage import EngineConfig

MIB = 2**20


def with_budget(experiment: Experiment, model: Path) -> tuple[Experiment, str | None]:
    """The experiment with the largest budget whose request holds no more bytes than one of `policy.bytes_as`.

    That policy is taken at its default options, at the experiment's budget, interval, block size and dtype. Bytes are
    those of N_max blocks (keys, values, positions, scores) and a query slot. No weights are loaded.

    Args:
        model: where the model lies.

    Returns:
        The experiment as it is run and recorded, without `bytes_as`, and a line that says what was found; the
        experiment itself and None where it asks for no bytes.

    Raises:
        UsageError: there is no such policy, it never evicts, its memory holds not one block, or the budget that comes
            of it goes with the other options no more.
    """
    policy = experiment.policy
    if policy.bytes_as is None:
        return experiment, None
    asked = f"policy.bytes_as={policy.bytes_as}"
    from zipage import RequestMemory  # with torch, which most plans do without

    config = EngineConfig(**engine_options(experiment, str(model)))
    try:
        theirs, ours = RequestMemory.of(config, policy.bytes_as), RequestMemory.of(config)
        memory = theirs.bytes_of(policy.budget_tokens)
        budget = ours.budget_in(memory)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"{asked}: {error}") from error
    found = replace(experiment, policy=replace(policy, budget_tokens=budget, bytes_as=None))
    try:
        check(found)
    except UsageError as error:
        raise UsageError(f"{asked}: its bytes are a budget of {budget} here: {error}") from error
    return found, (
        f"{asked}: at {policy.budget_tokens} entries its requests hold up to {memory / MIB:.2f} MiB each; "
        f"{policy.name} holds {budget} entries in {ours.bytes_of(budget) / MIB:.2f} MiB"
    )
