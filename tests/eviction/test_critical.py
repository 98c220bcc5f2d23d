"""What the wrapper `critical` promises."""

from dataclasses import replace

import pytest
import torch

from tests.calibrations import MADE_UP
from tests.eviction.dense_event import dense_event
from tests.eviction.policy_runs import REQUESTS, kept, make
from zipage.eviction.policies.critical import Critical

BASES = {
    "snapkv": {"window": 8},
    "h2o": {"decay": 0.5},
    "tova": {},
    "morphkv": {"fuse": "max"},
    "expected_attention": {**MADE_UP, "vnorm": False},
}


@pytest.mark.parametrize("base", BASES)
def test_a_phi_of_one_keeps_what_the_base_keeps(base):
    assert torch.equal(kept(make("critical", base=base, phi=1.0, **BASES[base])), kept(make(base, **BASES[base])))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_values_of_one_length_keep_what_the_base_keeps(base, norm):
    same = [replace(tokens, values=tokens.values[:, :, :1].expand_as(tokens.values)) for tokens in REQUESTS]
    policy = make("critical", base=base, phi=0.0, norm=norm, **BASES[base])
    event = dense_event(policy, same, [80, 80])
    lengths = event.output_norms(torch.zeros_like(event.lens))
    event.output_norms = lambda starts: lengths[..., :1]  # equal but for rounding
    plain = dense_event(make(base, **BASES[base]), same, [80, 80])
    ranked = policy.score(event)[..., :64].argsort(dim=-1)
    assert torch.equal(ranked, make(base, **BASES[base]).score(plain)[..., :64].argsort(dim=-1))


def test_long_values_stay():
    """A value 1,000 times as long stays whatever the attention, but for the share that the base chooses."""
    values = REQUESTS[0].values.clone()
    values[:, :, 5:13] *= 1e6
    tokens = [replace(REQUESTS[0], values=values)]
    stay = kept(make("critical", phi=0.5), tokens, schedule=[[96]])[0, 0]
    assert all({*range(5, 13)} <= {*head.tolist()} for layer in stay for head in layer)
    only = kept(make("critical", phi=1.0), tokens, schedule=[[96]])[0, 0]
    assert any(not {*range(5, 13)} <= {*head.tolist()} for layer in only for head in layer)


def test_what_the_base_holds_above_all_stays_finite():
    policy = make("critical", base="expected_attention", phi=0.0, **MADE_UP)
    tokens = [replace(REQUESTS[0], values=1e6 * REQUESTS[0].values)]
    assert policy.score(dense_event(policy, tokens, [80])).isfinite().all()
    assert (kept(policy, tokens, schedule=[[80]], recent=0)[0, 0, ..., :4] == torch.arange(4)).all()


def test_few_free_entries_leave_the_base_no_choice():
    policy = make("critical", phi=0.9)
    event = dense_event(policy, REQUESTS[:1], [80], keep=17)
    assert (policy.score(event) < 1e30).all()  # floor(0.9 * 1) = 0


def test_options_that_are_not_its_own_are_the_bases():
    policy = make("critical", base="h2o", decay=0.25, phi=0.3)
    assert (policy.scorer.decay, policy.num_states, policy.num_queries) == (0.25, 2, 16)
    assert policy.label == ("CriticalKV (base=h2o, phi=0.3, norm=l1) of window-accumulated H2O (decay=0.25)")
    assert policy == make("critical", base="h2o", decay=0.25, phi=0.3)
    assert hash(policy) == hash(make("critical", base="h2o", decay=0.25, phi=0.3))
    assert policy != make("critical", base="h2o", phi=0.3)
    assert Critical() == make("critical")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"base": name}, f"critical.base='{name}': must be a policy whose scores are never negative")
          for name in ("zipage", "r_kv", "keydiff", "random", "critical", "page_attention", "full")),
        ({"base": "snapvk"}, "critical.base='snapvk': unknown policy 'snapvk'; did you mean 'snapkv'"),
        ({"base": 3}, "critical.base=3: must be a text"),
        ({"base": "expected_attention"}, "expected_attention.calibration: give the calibration file"),
        ({"decay": 0.5}, "policy 'critical' of 'snapkv': unknown option 'decay'"),
        ({"base": "h2o", "decay": 2}, r"h2o.decay=2.0: must be in \[0, 1\]"),
        ({"phi": 1.5}, r"critical.phi=1.5: must be in \[0, 1\]"),
        ({"eps": -1.0}, "critical.eps=-1.0: must be at least 0"),
        ({"norm": "max"}, "critical.norm='max': must be one of l1, l2"),
        ({"scorer": "h2o"}, "unknown option 'scorer'"),
    ],
)  # fmt: skip
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make("critical", **options)
