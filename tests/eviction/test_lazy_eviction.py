"""What `lazy_eviction` promises."""

import math

import pytest
import torch

from tests.eviction.dense_event import DenseEvent, Run, dense_event, make_tokens
from tests.eviction.policy_runs import REQUESTS, kept, make
from zipage.eviction.policies.lazy_eviction import LazyEviction


def attending(period: int, monkeypatch) -> None:
    """In place of the model's: step c attends to entry 0 where `period` divides it, and to nothing else."""

    def attended(self, threshold):
        steps = self.logical_lens - torch.tensor(self.prompt_lens) - self.window + 1
        hits = torch.zeros(1, *self.shape, dtype=torch.int32)
        for q in range(self.window):
            hits[0, :, :, :, 0] += ((steps + q) % period == 0).int()[:, None] << q
        return hits

    monkeypatch.setattr(DenseEvent, "attended", attended)


@pytest.mark.parametrize("period", [1, 2, 5, 16])
def test_attention_every_so_many_steps_is_the_longest_wait(period, monkeypatch):
    """Each window follows on the one before, as where w tokens come between two compressions."""
    attending(period, monkeypatch)
    policy, tokens = make("lazy_eviction"), make_tokens(5, prompt_len=64)
    seen = []
    score = LazyEviction.rank

    def noted(self, event):
        scores = score(self, event)
        (_, mri), now = event.new_states, int(event.logical_lens[0]) - 64
        seen.append((now, scores[0, 0, 0, 0].item(), mri[0, 0, 0, 0].item(), scores[0, 0, 0, 1].item()))
        return scores

    monkeypatch.setattr(LazyEviction, "rank", noted)
    Run([[80]] * 6, protection="none", recent=0).generate(policy, [tokens])
    assert [now for now, *_ in seen] == [16, 32, 48, 64, 80, 96]
    for now, found, mri, other in seen:
        assert mri == period
        late = now % period
        expected = 2 / (1 + math.exp(min(80, 1 + late / (period + 1e-5)))) + 2 / (1 + math.exp(period - 1))
        assert found == pytest.approx(expected, rel=1e-9)
        assert other < 1e-30


def test_entries_that_nobody_attends_to_go_by_age():
    """A window of the prompt's queries counts no step."""
    tokens = [make_tokens(9, prompt_len=96)]
    assert (kept(make("lazy_eviction"), tokens, schedule=[[96]]) == torch.arange(32, 96)).all()


def test_new_entries_have_waited_since_the_step_before_their_own():
    policy = make("lazy_eviction", alpha=1.0)
    event = dense_event(policy, REQUESTS[:1], [80])  # a prompt of 24
    policy.score(event)
    last, mri = event.new_states
    assert last[0, 0, 0, :80].tolist() == [0.0] * 24 + [float(i) for i in range(56)]
    assert (mri == 0).all()


def test_steps_are_not_observed():
    with pytest.raises(ValueError, match=r"lazy_eviction.observe='step': must be window: decode attention keeps no"):
        make("lazy_eviction", observe="step")
    with pytest.raises(ValueError, match=r"lazy_eviction.alpha=0.0: must be in \(0, 1\]"):
        make("lazy_eviction", alpha=0.0)
