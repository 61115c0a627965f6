"""What kernels call ``gl``: triton.experimental.gluon.language, by PyTorch."""

import re

import torch

from .machine import Machine, current, pause, wait
from .memory import Shared
from .values import UINT32, Pointers, Value, alike, forced, known, late

bfloat16, float32 = torch.bfloat16, torch.float32
int32, int64, uint32 = torch.int32, torch.int64, UINT32
constexpr = object
static_range = range
to_tensor = known


class pointer_type:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _layout(*_, **__) -> None:
    """Where elements lie is the compiler's concern."""


AutoLayout = BlockedLayout = DistributedLinearLayout = DotOperandLayout = _layout
NVMMADistributedLayout = NVMMASharedLayout = SliceLayout = SwizzledSharedLayout = _layout


def program_id(axis) -> Value:
    return known(current().block)


def num_programs(axis) -> Value:
    return known(current().machine.programs)


def arange(start, end, layout) -> Value:
    return known(torch.arange(start, end, dtype=int32))


def full(shape, value, dtype, layout) -> Value:
    dtype = int64 if dtype == UINT32 else dtype
    return Value(lambda: torch.as_tensor(forced(value)).to(dtype).expand(tuple(shape)).clone())


def zeros(shape, dtype, layout) -> Value:
    return full(shape, 0, dtype, layout)


exp, rsqrt = late(torch.exp), late(torch.rsqrt)
permute, reshape = late(torch.permute), late(torch.reshape)
sum, max = late(torch.sum), late(torch.amax)
join = late(lambda a, b: torch.stack((a, b), -1))
cdiv = late(lambda a, b: (a + b - 1) // b)


def split(value) -> tuple[Value, Value]:
    return value[..., 0], value[..., 1]


def broadcast(a, b) -> tuple[Value, Value]:
    both = late(torch.broadcast_tensors)(a, b)
    return Value(lambda: both.force()[0]), Value(lambda: both.force()[1])


def convert_layout(value, layout, assert_trivial=False) -> Value:
    return value


@late
def fma(a, b, c):
    """Rounded once."""
    return (a.double() * b.double() + c.double()).to(c.dtype)


@late
def where(condition, a, b):
    if isinstance(a, Pointers):
        assert a.dtype == b.dtype
        return Pointers(torch.where(condition, a.addresses, b.addresses), a.dtype)
    return torch.where(condition, *alike(a, b))


@late
def minimum(a, b):
    return torch.minimum(*alike(*map(torch.as_tensor, (a, b))))


@late
def maximum(a, b):
    return torch.maximum(*alike(*map(torch.as_tensor, (a, b))))


def load(pointer, mask=None, other=None, volatile=False, cache_modifier="") -> Value:
    memory = current().machine.memory
    if volatile:
        return memory.poll(pointer, mask, other)
    pause()
    return memory.load(pointer, mask, other, cached=cache_modifier != ".cg")


def store(pointer, value, mask=None, eviction_policy="") -> None:
    current().machine.memory.store(pointer, value, mask)


def atomic_add(pointer, value, sem, scope) -> Value:
    assert (sem, scope) == ("relaxed", "gpu")
    return current().machine.memory.add(pointer, value)


def allocate_shared_memory(dtype, shape, layout):
    return Shared(dtype, shape).tile


def thread_barrier() -> None:
    """Of the current warps."""
    warps = current()
    for pending in warps.loads:
        pending.barriered = True
    warps.loads.clear()
    warps.leaving.clear()
    warps.unbarriered.clear()
    pause()


def warp_specialize(parts, worker_num_warps, worker_num_regs) -> None:
    machine: Machine = current().machine
    assert len(parts) == len(worker_num_warps) + 1 == len(worker_num_regs) + 1
    workers = [
        machine.spawn(lambda part=part: part[0](*part[1]), count)
        for part, count in zip(parts[1:], worker_num_warps)
    ]
    function, arguments = parts[0]
    function(*arguments)
    wait(lambda: all(worker.dead for worker in workers))


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack) -> Value:
    statements = [part.strip() for part in re.split(r"[;\n]", asm)]
    names = [part.split()[0] for part in statements if part and not part.endswith(":")]
    names = tuple(name for name in names if name not in ("{", "}", ".reg", "mov.u32", "@!reached"))
    return INSTRUCTIONS[names](asm, *args)


def _wait_for(asm, address, least) -> Value:
    memory = current().machine.memory
    allocation = memory.at(int(address))
    place = allocation.place(int(address))
    least = int(forced(least))
    wait(lambda: int(allocation.flat[place]) >= least)
    return known(allocation.flat[place].clone())


def _publish(asm, address, value) -> Value:
    memory = current().machine.memory
    memory.release()
    memory.store(_pointer(address, int32), value, None).finish()
    return value


def _put(asm, address, value) -> Value:
    current().machine.memory.store(_pointer(address, int32), value, None)
    return known(0)


def _prefetch(asm, address) -> Value:
    for one in (forced(address).min(), forced(address).max()):
        current().machine.memory.at(int(one))
    return known(0)


def _prefetch_part(asm, address, size) -> Value:
    first, size = int(forced(address)), int(forced(size))
    assert size > 0
    assert first % 16 == size % 16 == 0
    allocation = current().machine.memory.at(first)
    assert first + size <= allocation.end, "out of bounds"
    return known(0)


def _pointer(address, dtype) -> Value:
    return Value(lambda: Pointers(forced(address), dtype))


def _exchange(asm, value) -> Value:
    """With lane ^ distance, where a warp is an index of the first dimension. It happens where it
    stands, so that what the value is made of is there.
    """
    distance = int(re.search(r"\$1, (\d+),", asm)[1])
    data, other = forced(value), torch.arange(32) ^ distance
    return known(data.reshape(-1, 32)[:, other].reshape(data.shape))


def _reciprocal(asm, value) -> Value:
    """The nearest; the hardware's may be its neighbour."""
    return 1 / value


def _two_floats(asm, pairs) -> Value:
    return pairs.to(float32)


INSTRUCTIONS = {
    ("shl.b32", "and.b32"): _two_floats,
    ("ld.acquire.gpu.global.s32", "setp.ge.s32"): _wait_for,
    ("st.release.gpu.global.u32",): _publish,
    ("prefetch.global.L2",): _prefetch,
    ("elect.sync", "@one"): _prefetch_part,
    ("st.relaxed.gpu.global.v2.u32",): _put,
    (
        "createpolicy.fractional.L2::evict_last.b64",
        "st.relaxed.gpu.global.L2::cache_hint.v2.u32",
    ): _put,
    ("shfl.sync.bfly.b32",): _exchange,
    ("rcp.approx.ftz.f32",): _reciprocal,
}
