"""What holds for every policy."""

import math

import pytest
import torch

from tests.eviction.cases import CASES, every_case
from tests.eviction.dense_event import DenseEvent, Run, dense_event, make_tokens, select
from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.eviction.policy import Policy
from zipage.eviction.protection import Protection, forced_mask

SCHEDULE = [[80, 96], [80, 112], [96, 80]]
REQUESTS = [make_tokens(11), make_tokens(12, prompt_len=60)]


@every_case
def test_keeps_k_distinct_entries_in_time_order_and_all_that_must_stay(case):
    policy = case.make()
    events = Run(SCHEDULE, recent=case.recent, protection=case.protection).generate(policy, REQUESTS)
    rule = Protection.parse(case.protection, policy.implied_protection)
    for i, tokens in enumerate(REQUESTS):
        protected = rule.length(tokens.prompt_len, 64, case.recent, policy.page)
        seen = 0
        for lens, event in zip(SCHEDULE, events, strict=True):
            seen += lens[i] - (64 if seen else 0)
            kept = event[i]
            assert kept.shape == (2, 2, 64)
            assert (kept.diff(dim=-1) > 0).all()
            assert (kept[..., :protected] == torch.arange(protected)).all()
            assert (kept[..., 64 - case.recent :] == torch.arange(seen - case.recent, seen)).all()


@every_case
def test_a_request_alone_equals_the_request_in_a_batch(case):
    policy = case.make()
    run = Run(SCHEDULE, recent=case.recent, protection=case.protection)
    together = run.generate(policy, REQUESTS)
    for i, tokens in enumerate(REQUESTS):
        alone = run.alone(i).generate(policy, [tokens])
        assert all(torch.equal(one[0], both[i]) for one, both in zip(alone, together, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if not case.make().all_layers], ids=str)
def test_layers_in_one_launch_equal_layers_in_strides(case):
    policy = case.make()
    requests = [make_tokens(seed, total=160, layers=10, heads=1) for seed in (21, 22)]
    options = {"schedule": [[80, 96], [80, 80]], "recent": case.recent, "protection": case.protection}
    whole = Run(**options).generate(policy, requests)
    strides = Run(**options, stride=8).generate(policy, requests)
    assert all(torch.equal(a[i], b[i]) for a, b in zip(whole, strides, strict=True) for i in (0, 1))


@every_case
@pytest.mark.parametrize("poison", [-math.inf, math.inf, 1e30, 0.0])
def test_padding_and_unscored_slots_reach_no_score(case, poison):
    policy = case.make()
    options = {"lens": [80, 112], "recent": case.recent, "protection": case.protection}
    expected = policy.score(dense_event(policy, REQUESTS, **options))
    clean = dense_event(policy, REQUESTS, **options, poison=poison)
    for entries in (clean.key_entries, clean.value_entries, *clean.state_entries):
        entries.nan_to_num_(nan=poison)
    assert torch.equal(policy.score(clean), expected)


@every_case
def test_one_entry_too_many_evicts_exactly_one(case):
    (event,) = Run([[65]], recent=case.recent, protection=case.protection).generate(case.make(), REQUESTS[:1])
    assert all(len(set(range(65)) - set(head.tolist())) == 1 for layer in event[0] for head in layer)


@every_case
def test_scores_are_a_function_of_the_seed(case):
    policy = case.make()
    one, two = (policy.score(dense_event(policy, REQUESTS, [80, 80], protection=case.protection)) for _ in range(2))
    assert torch.equal(one, two)


@every_case
def test_unknown_options_are_errors(case):
    with pytest.raises(ValueError, match="unknown option 'pool_wdth'"):
        registry.make(case.policy, {**case.options, "pool_wdth": 5})


@every_case
def test_declarations_hold(case):
    policy = case.make()
    event = dense_event(policy, REQUESTS, [80, 96], recent=case.recent, protection=case.protection)
    scores = policy.score(event)
    assert scores.dtype == torch.float32
    assert scores.shape == event.shape
    assert policy.state == (event.new_state is not None)
    if policy.state:
        assert event.new_state.shape == event.shape
    if policy.shared_heads:
        assert (scores == scores[:, :, :1]).all()
    if policy.shared_layers:
        assert (scores == scores[:1]).all()
    assert policy.scope == ("page" if policy.page > 1 else "token")
    assert policy.needs_queries == (policy.num_queries > 0)
    assert policy.paper.startswith("https://arxiv.org/abs/")
    assert policy.label.startswith(policy.variant)


def test_constant_scores_keep_what_must_stay_and_the_youngest():
    class Constant(Policy):
        name, variant, paper = "constant", "constant", ""

        def rank(self, event):
            return torch.zeros(())

    policy = Constant()
    (event,) = Run([[96]], protection="sink:3").generate(policy, REQUESTS[:1])
    expected = [0, 1, 2, *range(96 - 61, 96)]
    assert all(head.tolist() == expected for layer in event[0] for head in layer)


def test_top_takes_the_largest_and_the_higher_slot_of_a_tie():
    event = dense_event(registry.make("knorm"), REQUESTS, [80, 96])
    values = torch.randint(0, 5, event.shape).float()
    top = event.top(values, torch.tensor([7, 0]))
    assert not top[:, 1].any()
    expected = select(values[:, 0], torch.zeros(96, dtype=torch.bool), 7)
    assert torch.equal(top[:, 0].nonzero()[:, -1].view(2, 2, 7), expected)


def test_a_new_policy_takes_one_file(tmp_path, monkeypatch):
    (tmp_path / "my_policy.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from zipage.eviction.policy import Policy\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Oldest(Policy):\n"
        "    name: ClassVar[str] = 'oldest'\n"
        "    variant: ClassVar[str] = 'oldest'\n"
        "    paper: ClassVar[str] = ''\n"
        "    slope: float = 1.0\n\n"
        "    def rank(self, event):\n"
        "        return -self.slope * event.slots\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "POLICIES", dict(registry.POLICIES))
    policy = registry.make("my_policy:Oldest", {"slope": 2})
    (event,) = Run([[80]], recent=0).generate(policy, REQUESTS[:1])
    assert event[0][0, 0].tolist() == list(range(64))
    registry.register(type(policy))
    assert registry.make("oldest") == type(policy)()
    with pytest.raises(ValueError, match="taken"):
        registry.register(type("Other", (type(policy),), {}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zipge", {}, "did you mean 'zipage'"),
        ("no.such.module:Policy", {}, r"no module 'no' is installed, nor in /.+; name the folder"),
        ("zipage.nothing:Policy", {}, r"cannot be loaded: no module 'zipage.nothing' is installed, nor in "),
        ("zipage.eviction.policies.zipage:Nothing", {}, "cannot be loaded"),
        ("zipage.eviction.policies.zipage:Zipge", {}, "has no Zipge; did you mean Zipage"),
        ("examples.my_policy:MyPolcy", {}, "examples.my_policy has no MyPolcy; did you mean MyPolicy"),
        ("examples.my_policy:X", {}, "examples.my_policy has no X; its policies: MyPolicy"),
        ("zipage.checks:X", {}, "zipage.checks has no X; its policies: none"),
        ("zipage", {"alhpa": 1.0}, "did you mean alpha"),
        ("zipage", {"weight": 1.0}, "unknown option 'weight'"),
        ("zipage", {"lambda": 1.5}, r"zipage\.lambda=1\.5: must be in \[0, 1\]"),
        ("zipage", {"window": "16"}, "must be an integer"),
        ("zipage", {"global": 1}, "must be True or False"),
        ("zipage", {"pooling": "sometimes"}, "one of never, first, always"),
        ("zipage", {"pool_width": 4}, "odd"),
        ("zipage", {"redundancy": "lightning"}, "one of none, full, chunk"),
        ("zipage", {"tau": 0}, "positive"),
        ("snapkv", {"softmax": "some"}, "one of all, cut, group_cut"),
        ("h2o", {"accumulate": "step"}, "one of window"),
        ("tova", {"window": 16}, "unknown option"),
        ("knorm", {"window": 16}, "unknown option"),
        ("full", {"window": 16}, "unknown option"),
        ("vase", {"mode": "gauss"}, "one of attn, dkv"),
        ("random_shared", {"share": "none"}, "one of heads, all"),
        ("page_random", {"scope": "head"}, "native=False"),
        ("page_attention", {"page_size": 0}, "at least 1"),
    ],
)
def test_names_and_values_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        registry.make(name, options)


def test_full_never_evicts():
    policy = registry.make("full")
    assert not policy.evicts
    Budget(2, 16).check(policy, Protection("sink", 1000), recent=16)
    lens = torch.tensor([4], dtype=torch.int32)
    event = DenseEvent(
        num_layers=1,
        num_heads=1,
        group_size=1,
        head_dim=1,
        window=0,
        lens=lens,
        keep=lens,
        forced=forced_mask(lens, torch.tensor([0]), 0, 4),
        protected=torch.tensor([0]),
        carried=torch.tensor([0]),
        seeds=[0],
        rounds=[0],
        prompt_lens=[1],
        logical_lens=lens,
        inv_freq=torch.ones(1),
        key_entries=torch.zeros(1, 1, 1, 4, 1),
        value_entries=torch.zeros(1, 1, 1, 4, 1),
        query_entries=torch.zeros(1, 1, 0, 1, 1),
        state_entries=torch.zeros(1, 1, 1, 4),
    )
    with pytest.raises(RuntimeError, match="never evicts"):
        policy.score(event)
