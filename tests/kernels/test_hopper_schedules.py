"""The kernels in Gluon on a CPU: the same bits in every schedule, and none of many broken variants
of them passes for the kernel.
"""

from functools import partial

import pytest
import torch
from gluon_cpu import Deadlock
from kernel_checks import streams_inputs

from megatron_mhc.kernels import launch_backward_hopper, launch_post_pre_hopper
from megatron_mhc.kernels.workspace import tensor_of

NUMBERS = (20, 1e-6, 1e-6)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    """Blocks of 64 channels: a launch takes a fifth of the time."""
    monkeypatch.setattr(launch_post_pre_hopper, "BLOCK_C", 64)


def single_pass(merges=True, head=False, channels=136):
    """Ten tiles, for groups of three blocks."""
    torch.manual_seed(1)
    x, *merge, fn, scale, base = streams_inputs((150,), 4, channels, torch.bfloat16)
    mapping = (fn[:4], scale[:1], base[:4]) if head else (fn, scale, base)
    return launch_post_pre_hopper.post_pre_hopper(x, merge if merges else None, mapping, *NUMBERS)


def streams_gradient():
    """Three blocks of channels of ten tiles."""
    torch.manual_seed(1)
    tokens = 300
    x, f, _, _, fn, _, _ = streams_inputs((tokens,), 4, 136, torch.bfloat16)
    dx_next, du = torch.randn_like(x), torch.randn_like(f)
    arguments = x, f, fn, dx_next, du, torch.randn(tokens, 64)
    dx, df, shares = launch_backward_hopper.streams_backward_hopper(*arguments)
    # A block of channels that two programs share has one share more of dfn.
    dpost, dcomb, dfn = map(tensor_of, shares[:3])
    return dx, df, dpost, dcomb, dfn.nan_to_num(0.0)


def pre_gradient():
    """Three blocks of channels of five tiles."""
    torch.manual_seed(1)
    tokens = 300
    x, f, _, _, fn, _, _ = streams_inputs((tokens,), 4, 136, torch.bfloat16)
    numbers, planes = torch.randn(tokens, 64), torch.randn(tokens, 64).bfloat16()
    du = torch.randn_like(f)
    dx, shares = launch_backward_hopper.pre_backward_hopper(x, fn, du, numbers, planes)
    return dx, tensor_of(shares.dfn).nan_to_num(0.0)


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_single_pass_has_the_same_bits(hopper_on_cpu, merges, head):
    """Also where not all blocks run at a time, which wait for each other."""
    hopper_on_cpu(0)
    expected = single_pass(merges, head=head)
    for seed in range(1, 7):
        hopper_on_cpu(seed, resident=(3, 5, None)[seed % 3])
        for ours, theirs in zip(single_pass(merges, head=head), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rings", [{"RX": 2, "RF": 1, "RS": 1}, {"RX": 6, "RF": 2, "RS": 1}])
def test_rings_of_any_depth(hopper_on_cpu, monkeypatch, rings):
    hopper_on_cpu(0)
    expected = single_pass()
    for name, depth in rings.items():
        monkeypatch.setitem(launch_post_pre_hopper.POST_PRE, name, depth)
    for seed in range(1, 4):
        hopper_on_cpu(seed)
        for ours, theirs in zip(single_pass(), expected):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gradient", [streams_gradient, pre_gradient])
@pytest.mark.parametrize("multiprocessors", [2, 3, 4])
def test_gradient_of_the_streams_has_the_same_bits(hopper_on_cpu, gradient, multiprocessors):
    """By two programs, each with a block of channels and a half, by three, and by three and one for
    what they leave.
    """
    hopper_on_cpu(0, multiprocessors)
    expected = gradient()
    for seed in range(1, 11):
        hopper_on_cpu(seed, multiprocessors)
        for ours, theirs in zip(gradient(), expected):
            assert torch.equal(ours, theirs)


def is_found(hopper_on_cpu, run, seeds, multiprocessors, changes):
    """Whether a changed kernel ends in an error or differs in one of the first ``seeds``."""
    hopper_on_cpu(0, multiprocessors)
    expected = run()
    for seed in range(seeds):
        hopper_on_cpu(seed, multiprocessors, resident=(None, 3, 5)[seed % 3], changes=changes)
        try:
            found = run()
        except (Deadlock, AssertionError):
            return True
        if not all(map(torch.equal, found, expected)):
            return True
    return False


BARRIER = "        gl.thread_barrier()\n"
STORE_U = "        gl.store(at, u.to(gl.bfloat16), mask=(rows < tokens)[:, None] & inside)\n"
GIVE_BACK = BARRIER + "        arrive(empty.index(slot))\n"
SINGLE_PASS = {
    "X' replaced while it is copied out": {
        "            tma.store_wait(0)\n        gl.thread_barrier()": "        gl.thread_barrier()"
    },
    "copy of X' without a fence": {
        "            fence_async_shared()\n            tma": "            tma",
    },
    "pre told of without a barrier": {
        "        gl.thread_barrier()\n        arrive(pre_full": "        arrive(pre_full"
    },
    "sums replaced while they are read": {
        "                mbarrier.wait(sums_empty.index(sums_slot), ((k // RS) & 1) ^ 1)\n"
        "            for g": "                pass\n            for g"
    },
    "f replaced while it is merged": {
        "mbarrier.wait(f_empty.index(f_slot), ((k // RF) & 1) ^ 1)": "pass"
    },
    "X' given back before u is stored": {
        STORE_U: GIVE_BACK + STORE_U,
        GIVE_BACK + "        k": "        k",
    },
    "X' given back by one warp before others have read it": {
        GIVE_BACK + "        k": "        arrive(empty.index(slot))\n        k"
    },
    "X replaced while it is used": {
        "mbarrier.wait(empty.index(slot), ((k // RX) & 1) ^ 1)\n        if k": "if k"
    },
    "shares for pre polled once": {
        "        while missing:\n            product": "        if missing:\n            product"
    },
    "other shares polled once": {
        "while missing:\n            part": "if missing:\n            part"
    },
    "squares not polled": {"late_square & 1": "0 * late_square"},
    "groups by block, not by ticket": {
        "group = ticket // G": "group = gl.program_id(0) // G",
        "rank = ticket % G": "rank = gl.program_id(0) % G",
    },
    "more of a tile asked for than there is": {
        "gl.minimum(gl.minimum(PART, BYTES - first).to(gl.int64), end - at)": "(end - end + PART)"
    },
    "tiles of fewer numbers than are in work": {"% TILE_NUMBERS": "% 2"},
}


@pytest.mark.parametrize("broken", SINGLE_PASS)
def test_a_broken_single_pass_is_found(hopper_on_cpu, broken):
    assert is_found(hopper_on_cpu, single_pass, 40, 6, SINGLE_PASS[broken])


QUEUE = {
    "a tile queued in another's place": {
        "mbarrier.wait(queue_empty.index(queued % 2), ((queued // 2) & 1) ^ 1)": "pass"
    },
    "a place in the queue given back too early": {
        "    gl.thread_barrier()\n            arrive(queue_empty": "    arrive(queue_empty"
    },
}


@pytest.mark.parametrize("broken", [*QUEUE, None])
def test_a_broken_queue_is_found(hopper_on_cpu, broken):
    """Where one block forms the mappings of all tiles; and one that is not broken is not."""
    run = partial(single_pass, channels=64)
    seeds, changes = (40, QUEUE[broken]) if broken else (4, {})
    assert is_found(hopper_on_cpu, run, seeds, 1, changes) is bool(broken)


OWN_PRODUCT = "        sums = warpgroup_mma_wait(0, deps=(running,))\n"
READ = BARRIER + "        arrive(products_empty.index(0))\n"
GRADIENT = {
    "tiles replaced while they are read and copied out": {
        "        mbarrier.wait(g_empty.index(slot), ((step // 2) & 1) ^ 1)\n": ""
    },
    "dX and df given back before they are copied out": {"        tma.store_wait(0)\n": ""},
    "dX and df copied out before they are there": {
        "        mbarrier.wait(out_full.index(slot), (step // 2) & 1)\n": ""
    },
    "copy of dX without a fence": {
        "        fence_async_shared()\n        gl.thread_barrier()\n        arrive(out": BARRIER
        + "        arrive(out"
    },
    "copy of dX without a barrier": {BARRIER + "        arrive(out": "        arrive(out"},
    "dz @ fn replaced while it is read": {
        "mbarrier.wait(products_empty.index(0), (step & 1) ^ 1)": "pass"
    },
    "dz @ fn given back without a barrier": {READ: READ[len(BARRIER) :]},
    "hi and lo given back before they are multiplied": {
        OWN_PRODUCT + READ: READ + OWN_PRODUCT,
    },
    "X' used before it is there": {"mbarrier.wait(formed.index(0), step & 1)": "pass"},
    "X' one tile deep": {
        "merged_ring.index(step % 2)": "merged_ring.index(0)",
        "merged_ring.index(g_slot)": "merged_ring.index(0)",
    },
    "products of X' without a fence": {
        "            fence_async_shared()\n            gl.thread_barrier()\n": "    " + BARRIER
    },
    "products used before they are there": {
        "product = warpgroup_mma_wait(0, deps": "product = warpgroup_mma_wait(1, deps"
    },
    "du and dX' used before they are there": {
        "mbarrier.wait(g_full.index(g_slot), (step // 2) & 1)": "pass"
    },
    "a block's last share missing": {
        "if ((begin + step + 1) % window == 0) | (step == steps - 1):": "if step == steps - 1:"
    },
}


@pytest.mark.parametrize("broken", GRADIENT)
def test_a_broken_gradient_is_found(hopper_on_cpu, broken):
    assert is_found(hopper_on_cpu, streams_gradient, 40, 2, GRADIENT[broken])


OUT = "            tma.store_wait(0)\n            gl.thread_barrier()\n"
OWN = "            sums = warpgroup_mma_wait(0, deps=(running,))\n"
PRE_GRADIENT = {
    "tiles replaced while they are read": {
        "        mbarrier.wait(empty.index(slot), ((step // 2) & 1) ^ 1)\n": ""
    },
    "tiles used before they are there": {
        "mbarrier.wait(full.index(slot), (step // 2) & 1)": "pass"
    },
    "results replaced while they are copied out": {OUT: OUT[OUT.index("\n") + 1 :]},
    "results copied out and tiles given back without a barrier": {OUT: ""},
    "copy of dX without a fence": {
        "            fence_async_shared()\n            #": "            #"
    },
    "fn without a fence": {
        "        fence_async_shared()\n        gl.thread_barrier()\n\n": BARRIER + "\n",
    },
    "tiles given back beside other warps' products": {
        OWN: "",
        "            arrive(empty.index(slot))\n": OWN + "            arrive(empty.index(slot))\n",
    },
    "products used before they are there": {
        "warpgroup_mma_wait(2, deps=(product,))": "warpgroup_mma_wait(3, deps=(product,))"
    },
    "ends before its copies": {"done = until\n    tma.store_wait(0)": "done = until"},
}


@pytest.mark.parametrize("broken", PRE_GRADIENT)
def test_a_broken_gradient_of_pre_is_found(hopper_on_cpu, broken):
    assert is_found(hopper_on_cpu, pre_gradient, 40, 2, PRE_GRADIENT[broken])
