"""Requests that sleep: every step, event, time and token is as if each request were looked at in every step."""

from collections import Counter
from dataclasses import asdict
from random import Random

import pytest

from tests.simulation.fixed_times import FixedTimes
from tests.tiny_models import save_tiny_model
from zipage import SamplingParams, SimulatedLLM

OPTIONS = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "block_size": 16,
    "num_blocks": 40,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "max_model_len": 400,
    "swap_space": 0.01,
}
REQUESTS = 40
BOUNDED = {"policy": "zipage", "budget_tokens": 48, "recent_tokens": 16}
CASES = {
    "full": {},
    "full, ample": {"num_blocks": 300, "enable_prefix_caching": False},
    "full, no overlap": {"async_scheduling": False},
    "bounded": BOUNDED,
    "bounded, ample": BOUNDED | {"num_blocks": 300, "enable_prefix_caching": False},
    "synchronous": BOUNDED | {"async_compression": False, "num_blocks": 24},
    "few slots": BOUNDED | {"slots": 4},
    "constrained": BOUNDED | {"slots": 4, "scheduling": "constrained"},
    "no queries": {"policy": "random", "budget_tokens": 48},
    "pressure": {"policy": "random", "budget_tokens": 48, "trigger": "pressure"},
}


@pytest.fixture(scope="module", name="folder")
def tiny_folder(tmp_path_factory):
    return str(save_tiny_model("qwen3", tmp_path_factory.mktemp("model")))


def served(folder, options: dict, seed: int, named: bool) -> tuple[list, ...]:
    """Requests that come and are withdrawn at random; `named`: every token is heard by name, so that nobody sleeps."""
    random, slept = Random(seed), 0
    slots = options.get("slots")
    options = OPTIONS | {name: value for name, value in options.items() if name != "slots"}
    llm = SimulatedLLM(folder, times=FixedTimes(), **options)
    if slots:
        of_scheduler = llm._core.scheduler.slots
        of_scheduler.num_slots, of_scheduler._free = slots, list(range(slots))
    steps, events, outputs, tokens, heard = [], [], [], [], Counter()
    llm.step_listeners.append(steps.append)
    llm.event_listeners.append(events.append)
    llm.tokens_listeners.append(tokens.append)
    if named:
        llm.token_listeners.append(lambda now, names: heard.update({now: len(names)}))
    shared = [random.randrange(3, 60) for _ in range(40)]
    for number in range(REQUESTS):
        prompt = shared[: random.randrange(40)] + [random.randrange(3, 60) for _ in range(random.randrange(1, 60))]
        params = SamplingParams(
            max_tokens=random.randrange(1, 250),
            ignore_eos=True,
            n=random.choice([1, 1, 1, 2]),
            repetition_penalty=random.choice([1.0] * 9 + [1.1]),
        )
        llm.add_request(prompt, params, str(number))
        for _ in range(random.randrange(25)):
            outputs += llm.step() if llm.has_unfinished_requests() else []
            slept = max(slept, llm._core.scheduler.num_asleep)
        if random.random() < 0.1:
            llm.abort(str(random.randrange(number + 1)))
    while llm.has_unfinished_requests():
        outputs += llm.step()
        if random.random() < 0.002:
            llm.abort(str(random.randrange(REQUESTS)))
        llm._core.scheduler.check_integrity()
    llm.shutdown()
    assert (slept > 0) == (not named and options.get("trigger") != "pressure")
    assert not named or heard == Counter({token.time: token.count for token in tokens})
    told = [(t.time, t.count, sorted(t.firsts), _counted(t.gaps)) for t in tokens]
    answers = [
        (o.request_id, asdict(o.metrics), [(c.token_ids, c.finish_reason, asdict(c.metrics)) for c in o.outputs])
        for o in outputs
    ]
    return [asdict(step) for step in steps], [asdict(event) for event in events], answers, told


def _counted(gaps: list[tuple[float, int]]) -> Counter:
    counted = Counter()
    for seconds, count in gaps:
        counted[round(seconds, 9)] += count
    return counted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_everything_is_as_if_nobody_slept(folder, options, seed):
    awake, asleep = (served(folder, options, seed, named) for named in (True, False))
    for expected, found in zip(awake, asleep, strict=True):
        assert found == expected
