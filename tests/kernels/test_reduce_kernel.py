"""Sums of shares, whatever their number."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error

from megatron_mhc.kernels import launch_backward


def make(tokens, n, channels, count):
    x = torch.empty(tokens, n, channels)
    merge = (x[:, 0], torch.empty(tokens, n), torch.empty(tokens, n, n))
    mapping = (torch.empty(count, n * channels), torch.empty(3), torch.empty(count))
    return x, merge, mapping


def mapping_shares(n, count, programs):
    """Shares of d base and d scale; pre's are more."""
    rest = torch.randn(count - n + 2, programs)
    return launch_backward.MappingParts(torch.randn(n + 1, programs + 2), rest)


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_every_share_is_summed(parts):
    x, merge, mapping = make(5, 4, 8, 24)
    shares = [torch.randn(parts, *like.shape) for like in (*merge[1:], mapping[0])]
    mapping_parts = mapping_shares(4, 24, parts)
    shares_of = launch_backward.Shares(*shares, channels=8, ranges=parts, rest=0, work=1)
    ours = launch_backward.reduce(shares_of, mapping_parts, merge, mapping, x)
    pre, rest = (part.double().sum(1) for part in mapping_parts)
    exact = [share.double().sum(0) for share in shares]
    exact += [torch.cat([pre[4:], rest[20:]]), torch.cat([pre[:4], rest[:20]])]
    for a, b in zip(ours, exact):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("parts", [1, 17])
@pytest.mark.parametrize("count", [4, 24], ids=["head", "connection"])
def test_the_mappings_sums_are_added_in_one_addition(parts, count):
    x, _, (fn, _, base) = make(5, 4, 8, count)
    mapping = (fn, torch.empty(1 if count == 4 else 3), base)
    dfns, mapping_parts = torch.randn(parts, *fn.shape), mapping_shares(4, count, parts)
    shares = launch_backward.Shares(None, None, dfns, channels=8, ranges=parts, rest=0, work=1)
    sums = launch_backward.reduce(shares, mapping_parts, None, mapping, x)[2:]
    before = [torch.randn_like(total) for total in sums]
    # Views into one buffer, at whatever address.
    buffer = torch.cat([torch.zeros(1), *(tensor.flatten() for tensor in before)])
    views = buffer[1:].split([tensor.numel() for tensor in before])
    main_grads = tuple(view.view_as(tensor) for view, tensor in zip(views, before))
    returned = launch_backward.reduce(shares, mapping_parts, None, mapping, x, main_grads)
    assert returned == (None,) * 5
    for main_grad, start, total in zip(main_grads, before, sums):
        assert torch.equal(main_grad, start + total)
    assert buffer[0] == 0


@pytest.mark.parametrize("ranges", [0, 2])
@pytest.mark.parametrize(("rest", "work"), [(5, 3), (4, 7), (1, 2), (6, 2), (2, 1)])
def test_pieces_that_cross_blocks_of_channels(ranges, rest, work):
    """Every tile of the rest adds 1 to the share of its piece, and every range is a share of 1;
    shares that nobody wrote are not read.
    """
    n, channels, blocks, count = 4, 8, 4, 24
    x, _, mapping = make(5, n, channels * blocks, count)
    most = ranges + -(-(rest - 1) // work) + 1
    dfns = torch.full((most, count, n, blocks, channels), float("nan"))
    dfns[:ranges] = 1.0
    for tile in range(blocks * rest):
        block = tile // rest
        share = dfns[ranges + tile // work - block * rest // work, :, :, block]
        share.nan_to_num_(nan=0.0).add_(1.0)
    shares = launch_backward.Shares(None, None, dfns.flatten(2), channels, ranges, rest, work)
    mapping_parts = mapping_shares(n, count, 1)
    _, _, dfn, _, _ = launch_backward.reduce(shares, mapping_parts, None, mapping, x)
    assert torch.equal(dfn, torch.full_like(dfn, ranges + rest))
