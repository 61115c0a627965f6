"""What kernels import from gluon.language.nvidia.hopper: barriers, bulk copies, matrix products."""

from types import SimpleNamespace

import torch
from torch import Tensor

from .language import known, thread_barrier
from .machine import Job, current, pause, wait
from .memory import Tile
from .values import Value, forced, late


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes are there."""

    def __init__(self, arrivals: int) -> None:
        self._arrivals = self._missing = arrivals
        self._bytes = self.phase = 0

    def arrive(self, expected: int = 0) -> None:
        assert self._missing, "one arrival too many"
        self._missing -= 1
        self._bytes += expected
        self._flip()

    def landed(self, count: int) -> None:
        self._bytes -= count
        self._flip()

    def _flip(self) -> None:
        if not self._missing and not self._bytes:
            self._missing, self.phase = self._arrivals, self.phase ^ 1


def _barrier(tile: Tile) -> Barrier:
    return tile.shared.barriers[int(tile.places)]


def _init(barrier: Tile, count: int) -> None:
    barrier.shared.barriers[int(barrier.places)] = Barrier(count)


def _wait(barrier: Tile, phase, pred=True) -> None:
    found, phase = _barrier(barrier), int(forced(phase))
    if pred:
        wait(lambda: found.phase != phase)


def _expect(barrier: Tile, bytes: int, pred=True) -> None:
    """One arrival, by one thread."""
    warps = current()
    assert not warps.unbarriered, "no barrier between a store and its arrival"
    assert not (warps.several and warps.loads), "no barrier between all warps' loads and an arrival"
    assert not warps.leaving, "no barrier between a wait for a product and an arrival"
    pause()
    if pred:
        _barrier(barrier).arrive(bytes)


def _arrive(barrier: Tile, count: int = 1, pred=True) -> None:
    """Around it the compiler puts barriers of all threads."""
    thread_barrier()
    if pred:
        _barrier(barrier).arrive()
    thread_barrier()


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: None, init=_init, wait=_wait, expect=_expect, arrive=_arrive
)


def _box(descriptor, coordinates) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a tile lies within its tensor, and what of the tile does."""
    outer, inner = [], []
    for first, size, length in zip(coordinates, descriptor.block_shape, descriptor.shape):
        first = int(forced(first))
        assert first >= 0
        count = max(0, min(size, length - first))
        outer.append(slice(first, first + count))
        inner.append(slice(0, count))
    return tuple(outer), tuple(inner)


def _tensor(descriptor) -> Tensor:
    return descriptor.base.detach().as_strided(descriptor.shape, descriptor.strides)


def _copy_in(descriptor, coordinates, barrier: Tile, result: Tile, pred=True) -> None:
    outer, inner = _box(descriptor, coordinates)
    found = _barrier(barrier)
    assert list(result.places.shape) == list(descriptor.block_shape)

    def action() -> None:
        data = torch.zeros(descriptor.block_shape, dtype=descriptor.base.dtype)
        data[inner] = _tensor(descriptor)[outer]
        result.shared.write(result.places, data)
        found.landed(data.nbytes)

    if pred:
        current().machine.start(Job(action))
    pause()


def _copy_out(descriptor, coordinates, source: Tile) -> None:
    assert not source.meets(current().unbarriered), "no barrier between a store and its copy"
    outer, inner = _box(descriptor, coordinates)

    def action() -> None:
        data = source.shared.read(source.places)
        _tensor(descriptor)[outer] = data[inner]

    warps = current()
    warps.copies.append(warps.machine.start(Job(action)))
    pause()


def _store_wait(pendings: int) -> None:
    """One thread waits; after it the compiler puts a barrier of all."""
    pause()
    copies = current().copies
    while len(copies) > pendings:
        copies.pop(0).finish()
    thread_barrier()


tma = SimpleNamespace(
    async_copy_global_to_shared=_copy_in,
    async_copy_shared_to_global=_copy_out,
    store_wait=_store_wait,
)


def fence_async_shared() -> None:
    for tile in current().unfenced:
        tile.shared.unfenced[tile.places] = False
    current().unfenced.clear()


def _operand(side: Tile | Value) -> Tensor:
    """bfloat16 as it is, float32 as tf32: without its last 13 bits."""
    data = side.shared.read(side.places) if isinstance(side, Tile) else forced(side)
    if data.dtype == torch.float32:
        return (data.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return data.float()


class Product(Value):
    """Of a matrix product under way, there only after a wait for it."""

    __slots__ = ("job",)

    def __init__(self, job: Job, results: list[Tensor]) -> None:
        self.job = job
        super().__init__(lambda: results[0] if job.done else self._early())

    def _early(self) -> None:
        raise AssertionError("a product is used before it is waited for")


def warpgroup_mma_init(value: Value) -> Value:
    return value


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False) -> Value:
    warps = current()
    assert is_async
    operands = [side for side in (a, b) if isinstance(side, Tile)]
    for side in operands:
        assert not side.meets(warps.unbarriered), "no barrier between a store and its product"
    before = warps.products[-1][0] if warps.products else None
    results = []

    def action() -> None:
        if before:
            before.finish()
        product = _operand(a) @ _operand(b)
        results.append(forced(acc) + product if use_acc else product)

    job = warps.machine.start(Job(action))
    warps.products.append((job, operands))
    pause()
    return Product(job, results)


def warpgroup_mma_wait(num_outstanding, deps) -> Value | tuple[Value, ...]:
    """A warp waits for what its own four have multiplied; the others may be at theirs still."""
    pause()
    warps = current()
    while len(warps.products) > num_outstanding:
        job, operands = warps.products.pop(0)
        job.finish()
        warps.leaving += operands
    done = tuple(known(forced(value)) for value in deps)
    return done[0] if len(done) == 1 else done


@late
def mma_v2(a, b, acc):
    assert a.dtype == b.dtype == torch.bfloat16
    return torch.baddbmm(acc, a.float(), b.float())
