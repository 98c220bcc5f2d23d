"""What bounds the cache of a request, from what it asks for."""

from __future__ import annotations

from contextlib import suppress

from zipage.config import EngineConfig
from zipage.eviction import registry
from zipage.eviction.policy import Policy
from zipage.eviction.rule import EvictionRule
from zipage.sampling_params import SamplingParams

AMPLE = 2**20
"""A budget that no policy finds too small."""


def served_policies(config: EngineConfig) -> list[str]:
    """Names of the registered policies that a request of an engine may choose, given the budget that they need."""
    rules, found = Rules(config), []
    for name in registry.POLICIES:
        with suppress(ValueError):
            rules.of(SamplingParams(policy=name, budget_tokens=AMPLE), 1)
            found.append(name)
    return found


class Rules:
    """One policy object for each policy that requests name.

    Args:
        config: of the engine. What its policy keeps in the cache decides which policies a request may name.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._own = config.make_policy()
        self._policies = {None: self._own, config.policy: self._own, "full": None}

    def of(self, params: SamplingParams, prompt_len: int) -> EvictionRule | None:
        """The rule of a request; None for full KV.

        Raises:
            ValueError: the engine can't serve its policy or budget; the message names the option and what to change.
        """
        if params.policy not in self._policies:
            self._policies[params.policy] = self._make_policy(params.policy)
        policy = self._policies[params.policy]
        if policy is None:
            return None
        budget = params.budget_tokens or self._config.budget_tokens
        rule = self._config.rule(policy, budget, prompt_len, params.protection)
        policy.check_budget(keep=rule.keep, protected=rule.protected)
        return rule

    def _make_policy(self, name: str) -> Policy | None:
        if ":" in name and name not in registry.POLICIES:
            raise ValueError(
                f"SamplingParams.policy={name!r}: must be the name of a registered policy; a request imports nothing"
            )
        policy, own = registry.make(name), self._own
        if not policy.evicts:
            return None
        size = self._config.tensor_parallel_size
        if size > 1 and registry.location(type(policy)) is None:
            raise ValueError(
                f"SamplingParams.policy={name!r}: it is defined in the program itself, which the processes of "
                f"tensor_parallel_size={size} do not run: put it into a module"
            )
        needs = {
            "the entries' positions": own is None,
            "a calibration file": bool(policy.calibration_arrays),
            "rotary pairs": policy.needs_rotary_pairs and not (own and own.needs_rotary_pairs),
            "scores of hidden states": policy.predicts,
            "norms of projected values": policy.output_norm not in (None, own and own.output_norm),
            "scores": policy.num_states > (own.num_states if own else 0),
            f"{policy.num_queries} queries a request": policy.num_queries > (own.num_queries if own else 0),
        }
        lacks = [what for what, is_missing in needs.items() if is_missing]
        if lacks:
            raise ValueError(
                f"SamplingParams.policy={name!r}: needs {' and '.join(lacks)}, for which an engine of policy "
                f"{self._config.policy!r} reserves no memory: start one of policy {name!r}"
            )
        try:
            policy.check(block_size=self._config.block_size, recent=self._config.recent_tokens)
        except ValueError as error:
            raise ValueError(f"SamplingParams.policy={name!r}: does not go with this engine: {error}") from error
        return policy
