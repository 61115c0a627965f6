"""The gradient of the streams on Hopper against float64, and how its work is shared out."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch_backward_hopper
from megatron_mhc.kernels.launch_backward_hopper import streams_backward_hopper
from megatron_mhc.kernels.workspace import tensor_of


@pytest.mark.parametrize("multiprocessors", [2, 7])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (32, 64), (150, 136), (37, 264)])
def test_gradients_of_one_pass(hopper_on_cpu, tokens, channels, multiprocessors):
    """Sizes that end inside tiles; blocks of channels whole, in ranges and cut."""
    hopper_on_cpu(0, multiprocessors)
    n = 4
    x, f, post, comb, fn, _, _ = streams_inputs((tokens,), n, channels, torch.bfloat16)
    dx_next, du, dz = torch.randn_like(x), torch.randn_like(f), torch.randn(tokens, 24)
    pre, parts = torch.rand(tokens, n), torch.randn(tokens, 2)
    # What nobody has written is not looked at.
    numbers = torch.full((tokens, 64), float("nan"))
    numbers[:, 24:32] = 0
    numbers[:, :24] = dz
    numbers[:, 32:58] = torch.cat((post, comb.flatten(1), pre, parts), 1)
    dx, df, shares = streams_backward_hopper(x, f, fn, dx_next, du, numbers)
    dpost, dcomb, dfn = map(tensor_of, shares[:3])

    streams, output = x.double(), f.double()
    merged = post.double()[:, :, None] * output[:, None]
    merged = merged + torch.einsum("tio,tic->toc", comb.double(), streams)
    g = dx_next.double() + (dz.double() @ fn.double()).view(tokens, n, channels)
    g = g + pre.double()[:, :, None] * du.double()[:, None]
    g = g + parts.double().sum(1)[:, None, None] * merged
    exact = (
        torch.einsum("tio,toc->tic", comb.double(), g),
        torch.einsum("to,toc->tc", post.double(), g),
        torch.einsum("tk,tj->kj", dz.double(), merged.flatten(1)),
    )
    # Where a block of channels has fewer shares of d fn, the rest of them is nobody's.
    for ours, theirs in zip((dx, df, dfn.nan_to_num(0.0).sum(0)), exact):
        assert relative_error(ours, theirs) < 5e-3
    # Dot products of X and f with g, which is rounded to 8 bits, and of which dz @ fn is a product
    # of numbers cut to 11 bits.
    sources = torch.cat((streams, output[:, None]), 1)
    dots = torch.cat((dcomb.sum(0), dpost.sum(0)[:, None]), 1)
    missed = dots - torch.einsum("tic,toc->tio", sources, g)
    cut = (dz.abs() @ fn.abs()).view(tokens, n, channels).double() * 2**-9
    terms = torch.einsum("tic,toc->tio", sources.abs(), g.abs() * 2**-9 + 1.01 * cut)
    assert (missed.abs() <= terms + 1e-5).all()


def programs_of(cut, tiles, chunks):
    """Of every program (block, first tile, tiles) of its blocks, as the kernel's part_of says."""
    programs = []
    for program in range(cut.programs):
        if program < cut.ranges * chunks:
            first = program // chunks * cut.length
            steps = min(cut.length, tiles - first)
            programs.append([(program % chunks, first, steps)])
            continue
        begin = (program - cut.ranges * chunks) * cut.work
        end = min(begin + cut.work, chunks * cut.rest)
        parts = []
        while begin < end:
            block, tile = divmod(begin, cut.rest)
            steps = min(cut.rest - tile, end - begin)
            parts.append((block, cut.ranges * cut.length + tile, steps))
            begin += steps
        programs.append(parts)
    return programs


@pytest.mark.parametrize(
    ("tiles", "chunks"),
    [(256, 64), (256, 40), (128, 112), (1, 4), (4, 64), (256, 20), (5, 40), (256, 300), (1024, 5)],
)
@pytest.mark.parametrize("begin", [3, 5])
def test_hopper_programs_share_all_tiles(tiles, chunks, begin):
    """Each tile is one program's, no program is idle, and none takes much longer than the mean."""
    cut = launch_backward_hopper.cut_of(tiles, chunks, 132, begin)
    programs = programs_of(cut, tiles, chunks)
    taken = [
        (block, first + k) for parts in programs for block, first, n in parts for k in range(n)
    ]
    assert sorted(taken) == [(block, tile) for block in range(chunks) for tile in range(tiles)]
    assert all(parts and all(steps > 0 for *_, steps in parts) for parts in programs)
    longest = max(sum(begin + steps for *_, steps in parts) for parts in programs)
    mean = (len(taken) / 132) + begin
    assert longest * -(-len(programs) // 132) < 1.25 * mean + 2 * begin


@pytest.mark.parametrize(
    ("tiles", "chunks", "ranges", "length", "work"),
    # 8192 x 4096: two ranges, which leave 4 of 132 idle. 8192 x 2560: three, and 12 programs for a
    # rest. 4096 x 7168: one, and 20.
    [(256, 64, 2, 128, 1), (256, 40, 3, 80, 54), (128, 112, 1, 113, 84)],
)
def test_how_hopper_programs_are_cut(tiles, chunks, ranges, length, work):
    cut = launch_backward_hopper.cut_of(tiles, chunks, 132, 5)
    assert (cut.ranges, cut.length, cut.work) == (ranges, length, work)
