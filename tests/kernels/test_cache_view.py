"""A view's strides: 0 where layers and heads share tables and lengths."""

import torch

from kernels.cache_view import CacheView, groups, look_up, once, shared
from kernels.paged_decode import paged_decode_reference
from tests.kernels.paged import make_paged

TABLES = torch.tensor([[3, 1, 0], [2, 0, 0]], dtype=torch.int32)
LENS = torch.tensor([40, 16], dtype=torch.int32)


def test_what_is_shared_is_not_copied():
    caches = torch.zeros(2, 4, 5, 3, 16, 8)
    view = CacheView.shared(*caches, TABLES, LENS)
    assert view.block_tables.shape == (4, 2, 3, 3)
    assert view.lens.shape == (4, 2, 3)
    assert view.block_tables.stride() == (0, 3, 0, 1)
    assert view.lens.stride() == (0, 1, 0)
    assert view.block_tables.data_ptr() == TABLES.data_ptr()
    assert view.width == 48
    assert not view.heads_differ
    assert view.head_groups() == [slice(0, 3)]
    assert once(view.block_tables).shape == (1, 2, 1, 3)


def test_layers_of_a_view():
    caches = torch.randn(2, 4, 5, 3, 16, 8)
    lens = torch.arange(24, dtype=torch.int32).view(4, 2, 3)
    view = CacheView(*caches, shared(TABLES, 3, 4), lens)
    assert view.heads_differ
    assert view.head_groups() == [slice(0, 1), slice(1, 2), slice(2, 3)]
    for one, many in zip(view.layer(2), view.layers(1, 3)):
        assert torch.equal(one, many[1])
    assert torch.equal(view.layer(2).lens, lens[2])


def test_lines_are_of_the_heads_that_share_them():
    caches = torch.zeros(2, 2, 5, 3, 16, 8)
    lines = [line[:4] for line in CacheView.shared(*caches, TABLES, torch.tensor([40, 0])).lines()]
    assert lines == [(0, 0, slice(0, 3), 40), (1, 0, slice(0, 3), 40)]
    lens = torch.arange(12, dtype=torch.int32).view(2, 2, 3)
    found = {}
    for layer, row, heads, length, table in CacheView(*caches, shared(TABLES, 3, 2), lens).lines():
        assert torch.equal(table, TABLES[row])
        found[layer, row, heads.start] = length
    assert found == {(i // 6, i // 3 % 2, i % 3): i for i in range(1, 12)}


def test_what_is_expanded_is_one_group_and_looked_up_alike():
    x = torch.arange(6).view(2, 3)
    expanded = shared(x, 4, 5)
    assert [groups(expanded, dim) for dim in (0, 2)] == [[slice(0, 5)], [slice(0, 4)]]
    assert groups(expanded, 1) == [slice(0, 1), slice(1, 2)]
    index = torch.tensor([4, 1]), torch.tensor([1, 0]), torch.tensor([3, 3]), torch.tensor([2, 0])
    for each in (expanded, expanded.contiguous(), expanded[:, 1:][..., 1:]):
        places = [i % size for i, size in zip(index, each.shape)]
        assert torch.equal(look_up(each, *places), each[tuple(places)])


def test_one_head_never_differs():
    assert not CacheView(*torch.zeros(2, 5, 1, 16, 8), TABLES[:, None], LENS[:, None]).heads_differ


def test_a_head_as_a_request_of_its_own():
    view = make_paged([(20, 0, 33), (16, 5, 1)], 16, 3, 8, torch.float32)
    q = torch.randn(2, 6, 8)
    by_head = paged_decode_reference(q.view(6, 2, 8), view.by_head(), 0.3)
    assert torch.equal(by_head.view(2, 6, 8), paged_decode_reference(q, view, 0.3))
