"""Blocks of sliding layers: how many a request holds, and which prefixes are found."""

import pytest

from tests.scheduling.fabricated import make_request, make_rule, make_samples, make_scheduler
from tests.scheduling.fabricated_model import FabricatedModel
from zipage.scheduling.block_pool import BlockPool
from zipage.scheduling.sliding_blocks import SlidingBlocks
from zipage.sliding_table import most_blocks

SIZE = 4


def sliding_model(window: int, spare: int = 20, seqs: int = 4, **options) -> FabricatedModel:
    """A model that looks at every entry of a window."""
    caching = options.get("caching", True)
    pool = BlockPool(seqs * most_blocks(window, SIZE) + spare, SIZE, caching)
    sliding = SlidingBlocks(pool, window, seqs)
    return FabricatedModel(make_scheduler(block_size=SIZE, max_num_seqs=seqs, sliding=sliding, **options))


def served(model: FabricatedModel, *requests) -> None:
    for request in requests:
        model.scheduler.add(request)
    model.run()


@pytest.mark.parametrize("size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 15, 16, 17, 18, 40])
def test_a_window_lies_in_so_many_blocks(size, window):
    ends = range(window, window + 3 * size)
    assert most_blocks(window, size) == max((end - 1) // size - (end - window) // size + 1 for end in ends)


@pytest.mark.parametrize("rule", [None, make_rule()], ids=["full KV", "bounded"])
def test_a_request_that_decodes_holds_its_window_and_no_more(rule):
    model = sliding_model(window=9)
    request = make_request(prompt=3, max_tokens=60, rule=rule)
    served(model, request)
    assert request.peak_sliding_blocks == most_blocks(9, SIZE) == 3
    assert request.peak_blocks == (16 if rule is None else 3)
    assert model.scheduler.sliding.pool.num_used == 0


@pytest.mark.parametrize("longest", [1, 4, 5, 21])
def test_requests_as_long_as_can_be_fill_blocks_of_their_length_alone(longest):
    """Windows of 100 blocks, and none of them is kept."""
    seqs, each = 3, -(-longest // SIZE)
    sliding = SlidingBlocks(BlockPool(seqs * each, SIZE), 100 * SIZE, seqs, longest)
    assert sliding.per_request == each
    model = FabricatedModel(make_scheduler(block_size=SIZE, max_num_seqs=seqs, sliding=sliding))
    prompt = max(1, longest // 2)
    requests = [make_request(str(n), prompt=[n] * prompt, max_tokens=max(1, longest - prompt)) for n in range(5)]
    served(model, *requests)
    assert {request.peak_sliding_blocks for request in requests} <= {each, -(-max(1, longest - 1) // SIZE)}


def test_a_prompt_is_computed_in_chunks_as_long_as_spare_blocks_allow():
    model = sliding_model(window=5, spare=1, seqs=2)
    chunks = []
    schedule = model.scheduler.schedule

    def watched(now=0.0):
        batch = schedule(now)
        chunks.extend(chunk.num_tokens for chunk in batch.prefills)
        return batch

    model.scheduler.schedule = watched
    request = make_request(prompt=20, max_tokens=2)
    served(model, request)
    # The first chunk fills all of 2 + 1 blocks. Then one holds what is still seen, so that two are left.
    assert chunks == [12, 8]
    assert request.peak_sliding_blocks == 3


def test_a_prefix_is_found_where_its_window_is():
    model = sliding_model(window=6, spare=20)
    first, again, other, cut = (make_request(name, prompt, 2) for name, prompt in texts().items())
    served(model, first)
    assert first.cached_tokens == 0
    served(model, again, other)
    assert (again.cached_tokens, other.cached_tokens) == (36, 20)
    # The window before the last block goes; the blocks before it are as good as new.
    sliding, prefix_ids = model.scheduler.sliding, model.scheduler.pool.find_prefix(first.token_ids, 9)[1]
    sliding.pool.forget(sliding.pool.find_block(prefix_ids[8], first.token_ids[:0]))
    served(model, cut)
    assert cut.cached_tokens == 32


def texts() -> dict[str, list[int]]:
    prompt = list(range(100, 140))
    return {"first": prompt, "again": prompt, "other": prompt[:20] + [9] * 9, "cut": prompt}


def test_output_that_slid_away_crowds_no_prompt_out():
    model = sliding_model(window=6, spare=12, seqs=1)
    first = make_request("first", prompt=40, max_tokens=150)
    served(model, first)
    again = make_request("again", prompt=first.token_ids[:40].tolist(), max_tokens=2)
    longer = make_request("longer", prompt=[*first.token_ids, 7, 8], max_tokens=2)
    served(model, again)
    assert again.cached_tokens == 36
    served(model, longer)
    assert longer.cached_tokens == 188, "the window that a request ends with is found, as a conversation goes on"


@pytest.mark.parametrize("caching", [True, False])
def test_samples_share_the_window_of_their_prompt_while_it_is_held(caching):
    model = sliding_model(window=6, caching=caching, seqs=3)
    samples = make_samples(prompt=18, max_tokens=30, n=4)
    served(model, *samples)
    # The last sample enters once another has ended, and the window of the prompt's end is gone; its blocks may be left.
    assert [sample.cached_tokens for sample in samples] == [0, 17, 17, 16 if caching else 0]
    assert model.events["sliding_copies"] == 2


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="5 sliding blocks are too few for 2 requests of 3"):
        SlidingBlocks(BlockPool(5, SIZE), 9, 2)
