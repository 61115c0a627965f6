"""The forward pass on Hopper in one pass, at every width it takes, against the two kernels."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton
from triton.language.extra.cuda import globaltimer

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import OPTIONS, pooled_error, streams_inputs

from megatron_mhc import kernels
from megatron_mhc.kernels import launch, launch_post_pre_hopper, launch_state, reference
from megatron_mhc.kernels.launch_post_pre_hopper import post_pre_hopper
from megatron_mhc.kernels.launch_replay import launch_replay

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@triton.jit
def hold_kernel(nanoseconds):
    begin = globaltimer()
    while globaltimer() - begin < nanoseconds:
        pass


NUMBERS = (20, 1e-6, 1e-6)


def inputs(tokens, channels, kind="post_pre", std=1.0):
    """x, (f, post, comb) or None, (fn, scale, base)."""
    x, *merge, fn, scale, base = streams_inputs((tokens,), 4, channels, torch.bfloat16, std, "cuda")
    mapping = (fn[:4], scale[:1], base[:4]) if kind.endswith("head") else (fn, scale, base)
    return x, tuple(merge) if kind.startswith("post") else None, mapping


def both(monkeypatch, *arguments):
    """Outputs of the single pass and of the two kernels."""
    single = post_pre_hopper(*arguments, *NUMBERS)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "serves_hopper", lambda x, f, n: False)
        return single, launch.forward(*arguments, *NUMBERS)


def in_float64(x, merge, mapping):
    """The differentiable outputs, by PyTorch."""
    wide = [t.double() for t in (x, *(merge or ()), *mapping)]
    x, merge, mapping = wide[0], wide[1:-3], wide[-3:]
    head = mapping[0].shape[0] == 4
    options = {"eps": 1e-6, "norm_eps": 1e-6} | ({} if head else {"iterations": 20})
    name = "mhc_" + ("post_" if merge else "") + ("head" if head else "pre")
    outputs = getattr(kernels, name)(x, *merge, *mapping, **options, backend="torch")
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("kind", ["post_pre", "pre", "post_head", "head"])
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [(1, 64), (17, 8), (333, 200), (1000, 264), (517, 1280), (2051, 2560), (129, 4096)]
    + [(4099, 4096), (63, 5120), (257, 7168), (65, 8192)],
)
def test_equals_the_two_kernels(monkeypatch, kind, tokens, channels):
    arguments = inputs(tokens, channels, kind)
    single, two = both(monkeypatch, *arguments)
    assert len(single) == len(two)
    for ours, theirs in zip(single, two):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous()
    if kind.startswith("post"):
        assert torch.equal(single[0], two[0])
    # m, r and pre, post, comb: products in 16 bits of fn.
    for ours, theirs in zip(single[-5:], two[-5:]):
        if ours.numel():
            assert pooled_error([(ours, theirs)]) < 1e-4
    if tokens * channels < 2**21:
        if kind == "post_head":  # the operator returns u alone
            single, two = single[1:], two[1:]
        for ours, theirs, exact in zip(single, two, in_float64(*arguments)):
            assert pooled_error([(ours, exact)]) < max(2e-5, 2 * pooled_error([(theirs, exact)]))


@pytest.mark.parametrize("kind", ["post_pre", "pre", "post_head"])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (517, 264), (2051, 4096)])
def test_streams_have_the_replays_bits(kind, tokens, channels):
    """X' and u of the pre that the launch itself returned."""
    x, merge, mapping = inputs(tokens, channels, kind)
    *x_next, u, _, _, pre, _, _ = post_pre_hopper(x, merge, mapping, *NUMBERS)
    ((replayed, replayed_u),) = launch_replay(x, [merge], [pre])
    assert torch.equal(u, replayed_u)
    if merge:
        assert torch.equal(x_next[0], replayed)


@pytest.mark.parametrize("std", [10.0, 100.0])
def test_extreme_logits(monkeypatch, std):
    single, two = both(monkeypatch, *inputs(257, 512, std=std))
    assert all(output.isfinite().all() for output in single)
    # Logits near 100 have errors that exp makes as many times larger.
    for ours, theirs in zip(single, two):
        assert pooled_error([(ours, theirs)]) < 1e-4 * std


def test_zeros(monkeypatch):
    x, merge, mapping = inputs(33, 512)
    x.zero_()
    merge[0].zero_()
    single, two = both(monkeypatch, x, merge, mapping)
    for ours, theirs in zip(single, two):
        assert ours.isfinite().all()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_nan_stays_with_its_token():
    x, merge, mapping = inputs(77, 1280)
    x[3, 2, 5] = float("nan")
    others = [token for token in range(77) if token != 3]
    clean = torch.where(x.isnan(), 0.0, x)
    for merged in (merge, None):
        found = post_pre_hopper(x, merged, mapping, *NUMBERS)
        expected = post_pre_hopper(clean, merged, mapping, *NUMBERS)
        for ours, theirs in zip(found, expected):
            assert torch.equal(ours[others], theirs[others])
            assert ours[3].isnan().any()


def test_no_nan_passes_for_a_share_that_is_missing():
    """All bits set, of which the last one of a share is not its own."""
    x, merge, mapping = inputs(40, 512)
    x.view(torch.int16)[7] = -1
    mapping[0].view(torch.int32)[2, 5] = -1
    for merged in (merge, None):
        u, _, _, pre, m, r = post_pre_hopper(x, merged, mapping, *NUMBERS)[-6:]
        assert u.isnan().all()
        assert pre[:, 2].isnan().all()
        assert m[:, 2].isnan().all()
        assert r[7].isnan()
        assert r[8:].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 1, 35])
def test_no_tokens_and_any_strides(tokens):
    """Through the operator."""
    arguments = streams_inputs((tokens,), 4, 512, torch.bfloat16, device="cuda")
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t) for t in arguments]
    strided = [t.repeat_interleave(2, dim=0)[::2] for t in arguments]
    plain = kernels.mhc_post_pre(*arguments, **OPTIONS, backend="triton")
    for other in (shifted, strided):
        for a, b in zip(plain, kernels.mhc_post_pre(*other, **OPTIONS, backend="triton")):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "depth"), [("post_pre", 3), ("post_pre", 2), ("pre", 3)])
@pytest.mark.parametrize("channels", [4096, 2560])
def test_every_launch_has_the_same_bits(monkeypatch, channels, kind, depth):
    """Also with f two tiles deep, where every third launch read X' of which a part was already the
    X of a later tile, when slots were given back at once behind the loads from them.
    """
    monkeypatch.setitem(launch_post_pre_hopper.POST_PRE, "RF", depth)
    launch_post_pre_hopper.plan_of.cache_clear()
    arguments = inputs(8192, channels, kind)
    first = post_pre_hopper(*arguments, *NUMBERS)
    differing = torch.zeros(len(first), dtype=torch.int64, device="cuda")
    for _ in range(200):
        again = post_pre_hopper(*arguments, *NUMBERS)
        differing += torch.stack([(a != b).any() for a, b in zip(first, again)])
    launch_post_pre_hopper.plan_of.cache_clear()
    assert differing.tolist() == [0] * len(first)


@pytest.mark.parametrize("kind", ["post_pre", "pre"])
def test_launches_at_once_on_two_streams(kind):
    cases = [inputs(tokens, channels, kind) for tokens, channels in ((3001, 4096), (4099, 2560))]
    alone = [post_pre_hopper(*case, *NUMBERS) for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found = []
    for _ in range(20):
        for stream, case, expected in zip(streams, cases, alone):
            with torch.cuda.stream(stream):
                found.append((post_pre_hopper(*case, *NUMBERS), expected))
    torch.cuda.synchronize()
    for outputs, expected in found:
        for ours, theirs in zip(outputs, expected):
            assert torch.equal(ours, theirs)


def test_launches_of_many_shapes_in_turn():
    """More than keep their memory, twice: each has it as it needs it."""
    cases = [inputs(tokens, 1280) for tokens in range(100, 100 + 16 * (launch_state.KEPT + 2), 16)]
    alone = [post_pre_hopper(*case, *NUMBERS) for case in cases]
    for case, expected in zip(2 * cases, 2 * alone):
        assert all(map(torch.equal, post_pre_hopper(*case, *NUMBERS), expected))


def test_launches_of_two_threads_on_one_stream():
    cases = [inputs(2051, 4096) for _ in range(2)]
    alone = [post_pre_hopper(*case, *NUMBERS) for case in cases]

    def launch_often(case):
        return [post_pre_hopper(*case, *NUMBERS) for _ in range(40)]

    with ThreadPoolExecutor(2) as threads:
        for found, expected in zip(threads.map(launch_often, cases), alone):
            assert all(all(map(torch.equal, outputs, expected)) for outputs in found)


def test_a_cuda_graph_beside_other_launches():
    """Its launches, in two replays at once with eager ones of the same shape on a third stream."""
    case = inputs(2051, 4096)
    alone = post_pre_hopper(*case, *NUMBERS)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    captured = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            captured += [post_pre_hopper(*case, *NUMBERS) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    eager = []
    torch.cuda.synchronize()
    for _ in range(10):
        for outputs in captured:
            for output in outputs:
                output.view(torch.uint8).fill_(255)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager.append(post_pre_hopper(*case, *NUMBERS))
        torch.cuda.synchronize()
        for outputs in (*captured, eager[-1]):
            assert all(map(torch.equal, outputs, alone))


@pytest.mark.parametrize("held", [40, 125])
def test_beside_a_kernel_that_holds_multiprocessors(held):
    """125 held are too many for a group of 16: blocks that started wait until the others may."""
    case = inputs(2051, 4096)
    alone = post_pre_hopper(*case, *NUMBERS)
    holding = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(holding):
        hold_kernel[(held,)](20_000_000, num_warps=32)
    found = [post_pre_hopper(*case, *NUMBERS) for _ in range(3)]
    torch.cuda.synchronize()
    for outputs in found:
        for ours, theirs in zip(outputs, alone):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("std", [1.0, 10.0])
def test_sinkhorn_is_the_references(std):
    """With the hardware's reciprocals; row and column sums within twice what float32 misses."""
    x, _, (fn, scale, base) = inputs(8192, 1280, "pre", std)
    _, _, comb, _, m, _ = post_pre_hopper(x, None, (fn, scale, base), *NUMBERS)
    exact, theirs = (
        reference.sinkhorn((m[:, 8:].to(t) * scale[2] + base[8:]).view(-1, 4, 4), 20, 1e-6)
        for t in (torch.float64, torch.float32)
    )
    assert pooled_error([(comb, exact)]) < 1e-6 * std
    for dim in (1, 2):
        ours, torchs = ((found.double() - exact).sum(dim).norm() for found in (comb, theirs))
        assert ours < 2 * torchs
