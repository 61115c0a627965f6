"""The gradient of the streams: merge, aggregation and mapping in one pass, against float64."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch_backward, launch_backward_hopper


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_one_pass(dtype, arrives):
    tokens, n, channels = 37, 4, 72
    x, f, post, comb, fn, _, _ = streams_inputs((tokens,), n, channels, dtype)
    dx_next = torch.randn_like(x) if arrives else None
    du = torch.randn_like(f)
    dz, pre = torch.randn(tokens, 24), torch.rand(tokens, n)
    coefficient = torch.randn(tokens)
    numbers = torch.zeros(tokens, 64)
    rows = (dz, torch.zeros(tokens, 8), post, comb.flatten(1), pre, coefficient[:, None])
    numbers[:, :57] = torch.cat(rows, 1)
    hi = dz.bfloat16()
    planes = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    planes[:, :24], planes[:, 32:56] = hi, (dz - hi.float()).bfloat16()
    dx, df, shares = launch_backward.streams_backward(
        x, (f, post, comb), fn, dx_next, du, numbers, planes
    )

    streams, output = x.double(), f.double()
    merged = post.double()[:, :, None] * output[:, None]
    merged = merged + torch.einsum("tio,tic->toc", comb.double(), streams)
    g = (dz.double() @ fn.double()).view(tokens, n, channels)
    g = g + pre.double()[:, :, None] * du.double()[:, None]
    g = g + coefficient.double()[:, None, None] * merged
    if arrives:
        g = g + dx_next.double()
    exact = (
        torch.einsum("tio,toc->tic", comb.double(), g),
        torch.einsum("to,toc->tc", post.double(), g),
        torch.einsum("tc,toc->to", output, g),
        torch.einsum("tic,toc->tio", streams, g),
        torch.einsum("tk,tj->kj", dz.double(), merged.to(dtype).double().flatten(1)),
    )
    tolerance = 5e-3 if dtype == torch.bfloat16 else 2e-6
    sums = (share.sum(0) for share in (shares.dpost, shares.dcomb, shares.dfn))
    for ours, theirs in zip((dx, df, *sums), exact):
        assert relative_error(ours, theirs) < tolerance


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
