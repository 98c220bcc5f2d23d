"""Runs the kernels in Gluon that have a loading warp, as they are written, on numpy, with a thread for each role.

Triton's interpreter has no Gluon. This knows barriers, copies by the tensor memory accelerator, masks and the ends of
tensors, and what may be touched before `griddepcontrol.wait`. Of layouts, registers and races it knows nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from threading import Condition, Thread, local
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

SECONDS = 10
"""After which a thread that waits has found a deadlock."""

role = local()
"""Of a thread: `program` of `programs`, and whether it has `waited` for the kernels ahead."""


class Values(np.ndarray):
    """A tensor in registers, or a number, which assignments copy."""

    def to(self, dtype: type) -> Values:
        return self.astype(dtype).view(Values)

    def __iadd__(self, other: Any) -> Values:
        return self + other

    def __imul__(self, other: Any) -> Values:
        return self * other


def values(x: Any, dtype: type | None = None) -> Values:
    return np.asarray(x, dtype=dtype).view(Values)


class Pointer:
    """Into a tensor's elements, from its first to its last.

    Args:
        late: it may not be touched before the wait.
    """

    def __init__(self, array: np.ndarray, offset: Any = 0, *, late: bool = False) -> None:
        self.array, self.offset, self.late = array, np.asarray(offset), late
        self.dtype = SimpleNamespace(element_ty=array.dtype)

    @classmethod
    def to(cls, x: Tensor, *, late: bool = False) -> Pointer:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return cls(x.as_strided((last + 1,), (1,)).numpy(), late=late)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + np.asarray(offset), late=self.late)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and mask, of one shape. Fails where a place lies outside of the tensor."""
        assert role.waited or not self.late, "touched before the kernels ahead have ended"
        offsets, mask = np.broadcast_arrays(self.offset, mask)
        held = offsets[mask]
        assert ((held >= 0) & (held < len(self.array))).all(), f"{held} lie outside of {len(self.array)} elements"
        return offsets, mask


class Shared:
    """Shared memory, full of NaN."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def index(self, i: int) -> Any:
        return self.array[i] if isinstance(self.array, list) else Shared(self.array[i])

    def slice(self, first: int, length: int, dim: int) -> Shared:
        assert dim == 0
        return Shared(self.array[first : first + length])

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.array.transpose(order))

    def load(self, layout: Any) -> Values:
        return values(self.array.copy())

    def store(self, x: Values) -> None:
        self.array[...] = x


class Barrier:
    """As an mbarrier: a phase ends when all have arrived and all bytes have."""

    changed, failed = Condition(), False

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def take(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0
            if self.pending == self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            ended = self.changed.wait_for(lambda: self.phase != phase or Barrier.failed, SECONDS)
            assert ended, "nothing comes"
            assert not Barrier.failed, "another thread has failed"


class Descriptor:
    """Of rows [n, d]. Before the wait a copy finds `before`, what the rows held until the kernels ahead wrote."""

    def __init__(self, rows: Tensor, before: Tensor, copied: int) -> None:
        self.rows, self.before = rows.numpy(), before.numpy()
        self.block_type = SimpleNamespace(shape=[copied, rows.shape[1]])
        self.dtype = SimpleNamespace(primitive_bitwidth=32)
        self.early = 0
        """Copies before the wait."""

    def copy(self, at: Sequence[int], barrier: Barrier, target: Shared, pred: Any = True) -> None:
        if pred:
            first, count = int(at[0]), self.block_type.shape[0]
            assert 0 <= first <= len(self.rows) - count
            target.array[...] = (self.rows if role.waited else self.before)[first : first + count]
            self.early += not role.waited
            barrier.take(0, -target.array.nbytes)


def _load(pointer: Pointer, mask: Any = True, other: float = 0, cache_modifier: str = "") -> Values:
    places, mask = pointer.places(mask)
    found = np.full(places.shape, other, pointer.array.dtype)
    found[mask] = pointer.array[places[mask]]
    return values(found)


def _store(pointer: Pointer, x: Any, mask: Any = True) -> None:
    x, mask = np.broadcast_arrays(x, np.broadcast_to(mask, np.broadcast_shapes(pointer.offset.shape, np.shape(mask))))
    places, mask = pointer.places(mask)
    pointer.array[places[mask]] = x[mask]


def _atomic_add(pointer: Pointer, x: int, **kinds: str) -> Values:
    before = _load(pointer)
    _store(pointer, before + x)
    return before


def _assembly(code: str, *args: Any, **kinds: Any) -> None:
    if "griddepcontrol.wait" in code:
        role.waited = True
    assert role.waited, "later kernels may start before this one has waited"


def _multiply(a: Values, b: Shared, acc: Values, use_acc: bool = True, is_async: bool = False) -> Values:
    return values(np.asarray(a) @ b.array) + (acc if use_acc else 0)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    return Shared([Barrier() for _ in range(shape[0])] if layout == "barriers" else np.full(shape, np.nan, np.float32))


def _specialize(parts: Sequence[tuple[Callable, tuple]], warps: Any, registers: Any) -> None:
    errors, mine = [], vars(role).copy()

    def run(part: Callable, args: tuple) -> None:
        vars(role).update(mine)
        try:
            part(*args)
        except BaseException as error:
            errors.append(error)
            with Barrier.changed:
                Barrier.failed = True
                Barrier.changed.notify_all()

    threads = [Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _nothing(*args: Any) -> None:
    pass


LANGUAGE = SimpleNamespace(
    int32=np.int32, int64=np.int64, float32=np.float32, load=_load, store=_store, atomic_add=_atomic_add,
    arange=lambda first, end, layout: values(np.arange(first, end)), static_range=range,
    zeros=lambda shape, dtype, layout: values(np.zeros(shape, dtype)),
    full=lambda shape, x, dtype, layout: values(np.full(shape, x, dtype)),
    where=lambda mask, x, y: values(np.where(mask, x, y).astype(np.result_type(x, y))),
    maximum=lambda x, y: values(np.maximum(x, y)), minimum=lambda x, y: values(np.minimum(x, y)),
    max=lambda x, axis: values(np.asarray(x).max(axis)), sum=lambda x, axis: values(np.asarray(x).sum(axis)),
    exp2=lambda x: values(np.exp2(x)), cdiv=lambda x, y: -(-x // y), convert_layout=lambda x, layout: x,
    expand_dims=lambda x, axis: values(np.expand_dims(x, axis)), inline_asm_elementwise=_assembly,
    program_id=lambda axis: values(role.program), num_programs=lambda axis: values(role.programs),
    allocate_shared_memory=_allocate, warp_specialize=_specialize, BlockedLayout=_nothing, SliceLayout=_nothing,
    DotOperandLayout=_nothing, NVMMADistributedLayout=_nothing,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_nothing),
)  # fmt: skip
BARRIERS = SimpleNamespace(
    MBarrierLayout=lambda: "barriers", init=Barrier.init, wait=Barrier.wait,
    arrive=lambda barrier, count=1, pred=True: barrier.take(count if pred else 0, 0),
    expect=lambda barrier, size, pred=True: barrier.take(1, size) if pred else None,
)  # fmt: skip


def run_programs(
    module: ModuleType, kernel: str, programs: int, *args: Any, waited: bool = True, **options: Any
) -> None:
    """Run all programs of a module's kernel, one after another. `waited`: so have they when they begin."""
    names = vars(module) | {
        "gl": LANGUAGE, "mbarrier": BARRIERS, "load_tile": Descriptor.copy, "barrier": _nothing,
        "fence_async_shared": _nothing, "warpgroup_mma": _multiply,
        "warpgroup_mma_wait": lambda count, deps: deps,
    }  # fmt: skip
    for name, x in names.items():
        if isinstance(x, JITFunction):
            names[name] = FunctionType(x.fn.__code__, names, name)
        elif isinstance(x, gl.constexpr):
            names[name] = x.value
    Barrier.failed = False
    for program in random.Random(programs).sample(range(programs), programs):
        vars(role).update(program=program, programs=programs, waited=waited)
        with np.errstate(all="ignore"):
            names[kernel](*args, **options)
