import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zipage.eviction import registry
from zipage.eviction.budget import Budget
from zipage.eviction.protection import Protection, forced_mask


def test_budget_rounds_up_to_blocks():
    budget = Budget.from_tokens(2048, 256)
    assert (budget.max_blocks, budget.keep, budget.peak) == (9, 2048, 2304)
    assert Budget.from_tokens(2049, 256).max_blocks == 10
    assert Budget.from_tokens(1, 16) == Budget(2, 16)
    for bad in (lambda: Budget.from_tokens(0, 16), lambda: Budget(1, 16)):
        with pytest.raises(ValueError, match="at least"):
            bad()


def test_an_interval_rounds_up_to_blocks_beside_those_kept():
    budget = Budget.from_tokens(1000, 64, 128)
    assert budget == Budget(18, 64, 2)
    assert (budget.kept_blocks, budget.keep, budget.peak) == (16, 1024, 1152)
    assert Budget.from_tokens(1000, 64, 129).interval_blocks == 3
    assert Budget.from_tokens(1000, 64, 1) == Budget.from_tokens(1000, 64)
    for bad in (lambda: Budget.from_tokens(64, 16, 0), lambda: Budget(3, 16, 3), lambda: Budget(3, 16, 0)):
        with pytest.raises(ValueError, match="at least"):
            bad()


def test_protection_is_read():
    assert Protection.parse("none") == Protection()
    assert Protection.parse("sink:4") == Protection("sink", 4)
    assert Protection.parse("prompt") == Protection("prompt")
    assert Protection.parse("none", "sink:4") == Protection("sink", 4)
    assert Protection.parse("prompt", "sink:4") == Protection("prompt")
    for bad in ("sink", "sink:", "sink:0", "sink:-1", "prompts", ""):
        with pytest.raises(ValueError, match="none, prompt or sink:N"):
            Protection.parse(bad)


def test_a_prompt_is_protected_as_far_as_the_budget_holds_it():
    prompt = Protection("prompt")
    assert prompt.length(20, keep=64, recent=16) == 20
    assert prompt.length(47, keep=64, recent=16) == 47
    assert prompt.length(48, keep=64, recent=16) == 64 - 16 - 1
    assert not prompt.prompt_truncated(47, keep=64, recent=16)
    assert prompt.prompt_truncated(48, keep=64, recent=16)
    assert Protection("sink", 4).length(2, keep=64, recent=16) == 4
    assert not Protection("sink", 4).prompt_truncated(500, keep=64, recent=16)
    assert Protection().length(500, keep=64, recent=16) == 0


def test_a_protected_prompt_leaves_a_page_free():
    prompt = Protection("prompt")
    assert prompt.length(500, keep=64, recent=16, page=16) == 32
    assert prompt.length(500, keep=64, recent=17, page=16) == 16
    assert prompt.length(20, keep=64, recent=16, page=16) == 20
    assert prompt.prompt_truncated(33, keep=64, recent=16, page=16)


@pytest.mark.parametrize(
    ("protection", "keep", "recent", "page"),
    [
        (Protection(), 16, 16, 1),
        (Protection(), 16, 17, 1),
        (Protection(), 16, -1, 1),
        (Protection("sink", 49), 64, 16, 1),
        (Protection(), 16, 8, 16),
        (Protection("sink", 4), 32, 16, 16),
    ],
)
def test_what_must_stay_leaves_a_choice(protection, keep, recent, page):
    with pytest.raises(ValueError, match="recent"):
        protection.check(keep, recent, page)


def test_the_smallest_choices_are_allowed():
    Protection().check(17, 16)
    Protection("sink", 48).check(64, 16)
    Protection("sink", 4).check(48, 16, 16)
    Protection("prompt").check(32, 16, 16)


def test_must_mask():
    lens = torch.tensor([5, 8], dtype=torch.int32)
    mask = forced_mask(lens, torch.tensor([1, 6]), 3, 9)
    assert mask.int().tolist() == [[1, 0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]]
    assert forced_mask(lens, torch.tensor([0, 2]), 0, 8).sum(-1).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("name", "options", "recent", "message"),
    [
        ("snapkv", {"window": 17}, 32, "do not fit a block"),
        ("morphkv", {}, 15, "recent_tokens=15 is less than window=16"),
        ("r_kv", {}, 7, "less than window=8"),
        ("vase", {}, 8, "less than window"),
        ("snapkv", {"softmax": "cut"}, 8, "less than window"),
        ("page_random", {}, 16, "page_size=256 is not the block_size=16"),
        ("page_random", {"page_size": 32, "native": False}, 16, "must divide"),
        ("knorm", {}, 64, "leaves nothing"),
    ],
)
def test_policy_and_run_go_together(name, options, recent, message):
    with pytest.raises(ValueError, match=message):
        Budget(5, 16).check(registry.make(name, options), Protection(), recent)


@pytest.mark.parametrize(
    ("name", "protection", "tokens", "message"),
    [
        ("knorm", "none", 8, "budget_tokens=8, rounded up to 16 entries in blocks of 16, leaves nothing to choose "
         "beside recent_tokens=16: raise budget_tokens above 16 or lower recent_tokens"),
        ("knorm", "none", 16, "budget_tokens=16 leaves nothing to choose beside recent_tokens=16: raise "),
        ("knorm", "sink:20", 20, "budget_tokens=20, rounded up to 32 entries in blocks of 16, is less than "
         "protection=sink:20 and recent_tokens=16 together: "),
        ("page_random", "sink:4", 20, "budget_tokens=20, rounded up to 32 entries in blocks of 16, holds only pages of "
         "16 that must stay (recent_tokens=16, protection=sink:4): "),
    ],
)  # fmt: skip
def test_a_budget_that_is_too_small_is_named_as_it_was_given(name, protection, tokens, message):
    policy = registry.make(name, {"page_size": 16} if name == "page_random" else {})
    with pytest.raises(ValueError, match="budget_tokens") as caught:
        Budget.from_tokens(tokens, 16).check(policy, Protection.parse(protection), 16)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "options", "recent"),
    [("snapkv", {}, 0), ("zipage", {}, 8), ("vase", {"mode": "dkv"}, 0), ("page_random", {"page_size": 16}, 16)],
)
def test_policy_and_run_that_go_together(name, options, recent):
    Budget(5, 16).check(registry.make(name, options), Protection(), recent)


def test_names_budgets_and_protection_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import zipage.eviction.registry, zipage.eviction.budget; "
        "from zipage.eviction.protection import Protection; Protection.parse('prompt').check(64, 16)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)
