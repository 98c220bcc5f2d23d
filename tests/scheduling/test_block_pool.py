from array import array

import pytest

from zipage.scheduling.block_pool import ROOT, BlockPool


def test_allocate_gives_all_or_nothing():
    pool = BlockPool(4, 16)
    first = pool.allocate(3)
    assert len(set(first)) == 3
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(1, reserve=1) is None
    pool.free(first)
    assert pool.num_free == 4
    pool.check_integrity([])


def test_freeing_twice_is_an_error():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(RuntimeError, match="freed more often"):
        pool.free(blocks)


def test_shared_block_stays_until_the_last_holder_frees_it():
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.allocate(0, shared=blocks)
    pool.free(blocks)
    assert pool.num_used == 1
    pool.check_integrity([blocks])
    pool.free(blocks)
    assert pool.num_used == 0


def fill(pool, chain, tokens):
    blocks = pool.allocate(len(tokens) // pool.block_size)
    parent = ROOT
    for i, block in enumerate(blocks):
        parent = pool.register(block, parent, tokens[i * pool.block_size : (i + 1) * pool.block_size])
        chain.append(parent)
    return blocks


def test_prefix_is_found_while_used_and_after_freeing_until_reused():
    pool = BlockPool(4, 2)
    tokens = array("i", [5, 6, 7, 8])
    blocks = fill(pool, [], tokens)
    assert pool.find_prefix(tokens, 2)[0] == blocks
    assert pool.find_prefix(array("i", [5, 6, 9, 9]), 2)[0] == blocks[:1]
    assert pool.find_prefix(array("i", [7, 8, 5, 6]), 2)[0] == []
    pool.free(blocks)
    assert pool.allocate(0, shared=pool.find_prefix(tokens, 2)[0]) == blocks
    pool.check_integrity([blocks])
    pool.free(blocks)
    held = pool.allocate(3)
    assert pool.find_prefix(tokens, 2)[0] == blocks[:1], "the end of a prefix goes before its beginning"
    pool.free(held)


def test_colliding_hashes_are_told_apart():
    tokens = array("i", [5])
    assert hash((-1, tokens.tobytes())) == hash((-2, tokens.tobytes()))
    pool = BlockPool(2, 1)
    first, second = pool.allocate(2)
    assert pool.register(first, -1, tokens) != pool.register(second, -2, tokens)


def test_same_block_after_different_prefixes_is_told_apart():
    pool = BlockPool(8, 2)
    first = fill(pool, [], array("i", [1, 2, 9, 9]))
    second = fill(pool, [], array("i", [3, 4, 9, 9]))
    assert pool.find_prefix(array("i", [1, 2, 9, 9]), 2)[0] == first
    assert pool.find_prefix(array("i", [3, 4, 9, 9]), 2)[0] == second


def test_orphan_of_a_reused_parent_is_never_found():
    pool = BlockPool(3, 2)
    blocks = fill(pool, [], array("i", [1, 2, 3, 4]))
    pool.free(blocks[:1])
    pool.allocate(2)
    assert pool.find_prefix(array("i", [1, 2, 3, 4]), 2)[0] == []


def test_equal_content_keeps_one_entry_and_one_chain():
    pool = BlockPool(4, 2)
    chain_a, chain_b = [], []
    first = fill(pool, chain_a, array("i", [1, 2, 3, 4]))
    fill(pool, chain_b, array("i", [1, 2, 3, 4]))
    assert chain_a == chain_b
    assert pool.find_prefix(array("i", [1, 2, 3, 4]), 2) == (first, chain_a)
    assert pool.num_cached == 2


def test_caching_off_finds_nothing():
    pool = BlockPool(4, 2, enable_prefix_caching=False)
    fill(pool, [], array("i", [1, 2]))
    assert pool.find_prefix(array("i", [1, 2]), 1) == ([], [])
