"""Global and shared memory."""

import torch
from torch import Tensor

from .machine import Job, current, pause, wait
from .values import Pointers, Value, forced


class Allocation:
    """A tensor's memory. writers: the block that wrote an element in this launch, or -1."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.flat = tensor.detach().view(-1)
        self.begin = tensor.data_ptr()
        self.end = self.begin + tensor.nbytes
        self.writers = torch.full(self.flat.shape, -1, dtype=torch.int32)

    def place(self, address: Tensor | int) -> Tensor | int:
        return (address - self.begin) // self.flat.itemsize


class Memory:
    """Global memory: what a launch was given. version: how often it was written."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.allocations = {tensor.data_ptr(): Allocation(tensor) for tensor in tensors}
        self.version = 0

    def at(self, address: int) -> Allocation:
        for allocation in self.allocations.values():
            if allocation.begin <= address < allocation.end:
                return allocation
        raise AssertionError("out of bounds")

    def load(self, pointer: Value, mask, other, cached: bool) -> Value:
        """cached: perhaps by the multiprocessor, which does not see what others write."""
        pointers, inside = self._resolve(pointer, mask)
        data = torch.zeros(inside.shape, dtype=pointers.dtype)
        if other is not None:
            data[...] = forced(other)
        for job in current().stores:  # a thread sees its own
            job.finish()
        for allocation, here, places in self._parts(pointers, inside):
            if cached:
                writers = allocation.writers[places]
                known = (writers == -1) | (writers == current().block)
                assert known.all(), "the multiprocessor may have an old value"
            data[here] = allocation.flat.view(pointers.dtype)[places]
        return Value(lambda: data)

    def poll(self, pointer: Value, mask, other) -> Value:
        """Read again and again: the second time only after somebody has written something. Then
        what the same warps poll beside it is read again, too.
        """
        warps, first = current(), int(forced(pointer).addresses.flatten()[0])
        if first in warps.polled:
            seen = warps.polled[first]
            wait(lambda: self.version != seen)
            warps.polled.clear()
        warps.polled[first] = self.version
        return self.load(pointer, mask, other, cached=False)

    def store(self, pointer: Value, value, mask) -> Job:
        """Seen by others some time later."""
        pause()
        pointers, inside = self._resolve(pointer, mask)
        value = torch.as_tensor(forced(value))
        assert not value.dim() or value.dtype == pointers.dtype
        value = value.to(pointers.dtype).expand(inside.shape)
        warps = current()
        parts = self._parts(pointers, inside)

        def action() -> None:
            for allocation, here, places in parts:
                allocation.flat.view(pointers.dtype)[places] = value[here]
                allocation.writers[places] = warps.block
                self.version += 1

        job = warps.machine.start(Job(action))
        warps.stores = [old for old in warps.stores if not old.done] + [job]
        return job

    def add(self, pointer: Value, value) -> Value:
        """Atomically; what was there before."""
        pause()
        address = int(forced(pointer).addresses)
        allocation = self.at(address)
        place = allocation.place(address)
        before = allocation.flat[place].clone()
        allocation.flat[place] += int(value)
        self.version += 1
        return Value(lambda: before)

    def release(self) -> None:
        """Everything that the current warps stored is seen from now on."""
        pause()
        for job in current().stores:
            job.finish()

    def _parts(self, pointers: Pointers, inside: Tensor) -> list[tuple]:
        """By allocation: which elements are there, and their indices into its ``flat``."""
        parts = []
        while inside.any():
            allocation = self.at(int(pointers.addresses[inside][0]))
            assert allocation.flat.itemsize == pointers.dtype.itemsize
            here = inside & (pointers.addresses >= allocation.begin)
            here &= pointers.addresses < allocation.end
            parts.append((allocation, here, allocation.place(pointers.addresses[here])))
            inside = inside & ~here
        return parts

    def _resolve(self, pointer: Value, mask) -> tuple[Pointers, Tensor]:
        pointers = forced(pointer)
        inside = torch.as_tensor(True if mask is None else forced(mask))
        shape = torch.broadcast_shapes(pointers.shape, inside.shape)
        return Pointers(pointers.addresses.expand(shape), pointers.dtype), inside.expand(shape)


class Shared:
    """An allocation of shared memory. unfenced: of each element, whether a bulk copy or a matrix
    product might not see what was last stored there.
    """

    def __init__(self, dtype: torch.dtype, shape: list[int]) -> None:
        count = torch.Size(shape).numel()
        kind = float("nan") if dtype.is_floating_point else -(2**30)
        self.flat = torch.full((count,), kind, dtype=dtype)
        self.unfenced = torch.zeros(count, dtype=torch.bool)
        self.loads: list[Load] = []
        self.barriers: dict = {}
        self.tile = Tile(self, torch.arange(count).view(shape))

    def read(self, places: Tensor) -> Tensor:
        """By a bulk copy or a matrix product."""
        assert not self.unfenced[places].any(), "no fence after a store"
        return self.flat[places]

    def write(self, places: Tensor, data: Tensor, warps=None) -> None:
        """By warps, or by a bulk copy. Loads that are not over have the new data, unless it is from
        their own warps or there was a barrier between.
        """
        self.loads = [load for load in self.loads if load.pending]
        if warps:
            for load in self.loads:
                if load.warps is warps or load.barriered:
                    load.value.force()
        self.flat[places] = data
        self.unfenced[places] = warps is not None


class Load:
    """A load from shared memory that happens when its value is needed. barriered: its warps have
    been at a barrier since.
    """

    def __init__(self, shared: Shared, places: Tensor) -> None:
        self.warps, self.barriered, self.pending = current(), False, True
        self._shared, self._places = shared, places
        self.value = Value(self._read)
        shared.loads.append(self)
        self.warps.loads.append(self)

    def _read(self) -> Tensor:
        self.pending = False
        return self._shared.flat[self._places]


class Tile:
    """A view of shared memory: ``places`` of its allocation."""

    def __init__(self, shared: Shared, places: Tensor) -> None:
        self.shared, self.places = shared, places

    def index(self, k) -> "Tile":
        assert 0 <= int(k.__index__()) < len(self.places)
        return Tile(self.shared, self.places[k.__index__()])

    def slice(self, start, length, dim=0) -> "Tile":
        return Tile(self.shared, self.places.narrow(dim, start, length))

    def permute(self, order) -> "Tile":
        return Tile(self.shared, self.places.permute(order))

    def _reinterpret(self, dtype, shape, layout) -> "Tile":
        """[N, T, B] as [T, N * B], as rows of 128 bytes lie in either."""
        n, t, b = self.places.shape
        assert dtype == self.shared.flat.dtype
        assert list(shape) == [t, n * b]
        assert b * dtype.itemsize == 128
        return Tile(self.shared, self.places.permute(1, 0, 2).reshape(t, n * b))

    def meets(self, tiles: list["Tile"]) -> bool:
        """Whether one of ``tiles`` has an element of it."""
        return any(
            tile.shared is self.shared and torch.isin(self.places, tile.places).any()
            for tile in tiles
        )

    def load(self, layout) -> Value:
        pause()
        return Load(self.shared, self.places).value

    def store(self, value) -> None:
        pause()
        data, warps = forced(value), current()
        assert data.dtype == self.shared.flat.dtype
        assert data.shape == self.places.shape
        assert not self.meets(warps.leaving), "no barrier after the wait for a product"
        self.shared.write(self.places, data, warps)
        warps.unbarriered.append(self)
        warps.unfenced.append(self)
