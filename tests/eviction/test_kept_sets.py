"""Kept sets over several events equal those of the dense simulation, for every policy."""

import numpy as np
import pytest

from tests.eviction.cases import CASES, every_case
from tests.eviction.dense_event import Run, make_tokens
from tests.eviction.dense_simulation import DEFAULTS, Simulation
from zipage.eviction import registry

# Requests of different lengths in one launch; the third comes to its first event when the others come to their second.
SCHEDULE = [[96, 80, None], [80, 112, 112], [80, 96, 80], [112, 80, 80]]
REQUESTS = [make_tokens(seed, prompt_len=prompt) for seed, prompt in ((1, 24), (2, 70), (3, 5))]


def test_every_policy_is_in_the_table_and_the_simulation():
    evicting = {name for name in registry.POLICIES if registry.find(name).evicts}
    assert {case.policy for case in CASES} == evicting == set(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_definitions(name):
    options = registry.find(name).known_options()
    for option, value in DEFAULTS[name].items():
        if (name, option) != ("tova", "window"):
            assert options[option].default == value, option


@every_case
def test_kept_sets_equal_the_simulation(case):
    events = Run(SCHEDULE, recent=case.recent, protection=case.protection).generate(case.make(), REQUESTS)
    for i, tokens in enumerate(REQUESTS):
        simulation = Simulation(
            policy=case.policy,
            options=case.options,
            keys=tokens.keys.double().numpy(),
            values=tokens.values.double().numpy(),
            queries=tokens.queries.double().numpy(),
            hidden=tokens.hidden.double().numpy(),
            seed=tokens.seed,
            prompt_len=tokens.prompt_len,
            keep=64,
            recent=case.recent,
            protection=case.protection,
        )
        lengths = [row[i] for row in SCHEDULE if row[i] is not None]
        ours = [event[i] for event in events if i in event]
        for kept, expected in zip(ours, simulation.run(lengths), strict=True):
            for (layer, head), tokens_kept in expected.items():
                assert np.array_equal(kept[layer, head].numpy(), tokens_kept), (i, layer, head)
