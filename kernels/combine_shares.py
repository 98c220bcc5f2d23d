"""The end of decode attention in shares, in Gluon: what programs found of one line, put together."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def combine_shares(
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    sinks_ptr,
    row,
    head,
    begin,
    first,
    last,
    units,
    group,
    kv_heads,
    HEAD_DIM: gl.constexpr,
    GROUP: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """The parts that programs `first` to `last` computed of a line, rescaled to their common maximum and added."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, HEAD_DIM // 32], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    of_parts: gl.constexpr = gl.SliceLayout(2, layout)
    of_heads: gl.constexpr = gl.SliceLayout(0, layout)
    member_of_parts = gl.arange(0, GROUP, gl.SliceLayout(0, of_parts))
    member = gl.arange(0, GROUP, gl.SliceLayout(1, of_heads))
    dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, of_heads))
    acc = gl.zeros([GROUP, HEAD_DIM], gl.float32, of_heads)
    all_max = gl.full([GROUP], float("-inf"), gl.float32, gl.SliceLayout(1, of_heads))
    all_sum = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, of_heads))
    if sinks_ptr is not None:
        sinks = gl.load(sinks_ptr + head * group + member, mask=member < group, other=0.0)
        all_max = sinks.to(gl.float32) * 1.4426950408889634
        all_sum += 1.0
    programs = gl.minimum(gl.num_programs(0), units)
    for chunk in range(first, last + 1, CHUNK):
        program = chunk + gl.arange(0, CHUNK, gl.SliceLayout(1, of_parts))
        # A program's first line has its first place, another has its second.
        second = (program == first) & (first.to(gl.int64) * units // programs < begin)
        place = 2 * program + second.to(gl.int32)
        of_part = place[:, None] * group + member_of_parts[None, :]
        there = (program <= last)[:, None] & (member_of_parts < group)[None, :]
        part_max = gl.load(max_ptr + of_part, mask=there, other=float("-inf"), cache_modifier=".cg")
        part_sum = gl.load(sum_ptr + of_part, mask=there, other=0.0, cache_modifier=".cg")
        acc_ptrs = acc_ptr + of_part[:, :, None] * HEAD_DIM + gl.expand_dims(
            gl.expand_dims(gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1
        )  # fmt: skip
        part_acc = gl.load(acc_ptrs, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        chunk_max = gl.convert_layout(gl.max(part_max, 0), gl.SliceLayout(1, of_heads))
        new_max = gl.where(member < group, gl.maximum(all_max, chunk_max), 0.0)
        weights = gl.exp2(part_max - gl.convert_layout(new_max, gl.SliceLayout(0, of_parts))[None, :])
        shrink = gl.exp2(all_max - new_max)
        acc = acc * shrink[:, None] + gl.sum(part_acc * weights[:, :, None], 0)
        chunk_sum = gl.convert_layout(gl.sum(part_sum * weights, 0), gl.SliceLayout(1, of_heads))
        all_sum = all_sum * shrink + chunk_sum
        all_max = new_max
    held = member < group
    out = acc / gl.where(held, all_sum, 1.0)[:, None]
    heads = (row * kv_heads + head) * group + member
    gl.store(out_ptr + heads[:, None] * HEAD_DIM + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=held[:, None])
