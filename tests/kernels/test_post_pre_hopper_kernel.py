"""Who takes the single pass. What it computes: test_ops.py; its schedules:
test_hopper_schedules.py; what it compiles to: test_compiled_for_hopper.py.
"""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import streams_inputs

from megatron_mhc.kernels import launch, launch_post_pre_hopper


@pytest.mark.parametrize(
    ("multiprocessors", "channels", "taken"),
    [(132, 1280, True), (132, 2560, True), (132, 4096, True)]
    # Groups of 20, 24, 28 and 32 blocks; mostly padding; too narrow; six blocks for 1288 channels.
    + [(132, 5120, True), (132, 6144, True), (132, 7168, True), (132, 8192, True)]
    + [(132, 64, False), (132, 512, False), (132, 1288, True)]
    # 78 multiprocessors: four groups of 16 leave 14 idle, seven of 10 leave 8.
    + [(78, 4096, False), (78, 2560, True), (8, 4096, False)],
)
def test_the_single_pass_is_taken_where_it_pays(monkeypatch, multiprocessors, channels, taken):
    count = lambda device: multiprocessors  # noqa: E731
    monkeypatch.setattr(launch_post_pre_hopper, "multiprocessors", count)
    assert launch_post_pre_hopper.pays(channels, torch.device("cuda:0")) is taken


def noting(function, calls):
    def noted(*arguments):
        calls.append(function.__name__)
        return function(*arguments)

    return noted


@pytest.mark.parametrize("served", [True, False])
def test_forward_calls_it_with_a_mapping_and_tokens(monkeypatch, served):
    calls = []
    monkeypatch.setattr(launch, "serves_hopper", lambda x, f, n: served)
    for name in ("forward_plan", "split_weight"):
        monkeypatch.setattr(launch, name, noting(getattr(launch, name), calls))
    monkeypatch.setattr(launch_post_pre_hopper, "pays", lambda channels, *_: channels == 256)
    single = lambda *_: calls.append("one")  # noqa: E731
    monkeypatch.setattr(launch_post_pre_hopper, "post_pre_hopper", single)
    mapping = torch.zeros(24, 4 * 256), torch.ones(3), torch.zeros(24)
    x = torch.zeros(2, 4, 256, dtype=torch.bfloat16)
    merge = x[:, 0].contiguous(), torch.ones(2, 4), torch.ones(2, 4, 4)
    launch.forward(x, merge, mapping, 20)
    launch.forward(x, None, mapping, 20)
    assert calls == (["one"] * 2 if served else ["forward_plan", "split_weight"] * 2)
    calls.clear()
    launch.forward(x, merge, None)
    wide = torch.zeros(2, 4, 8, dtype=torch.bfloat16)
    launch.forward(wide, None, (torch.zeros(24, 32), *mapping[1:]), 20)
    launch.forward(x[:0], None, mapping, 20)
    assert "one" not in calls


NUMBERS = (20, 1e-6, 1e-6)


def test_nan_stays_with_its_token(hopper_on_cpu):
    """Whatever its bits."""
    hopper_on_cpu(0)
    x, *merge, fn, scale, base = streams_inputs((40,), 4, 264, torch.bfloat16)
    mapping = (fn, scale, base)
    expected = launch_post_pre_hopper.post_pre_hopper(x, merge, mapping, *NUMBERS)
    x[3, 2, 5] = float("nan")
    x.view(torch.int16)[7] = -1
    others = [token for token in range(40) if token not in (3, 7)]
    found = launch_post_pre_hopper.post_pre_hopper(x, merge, mapping, *NUMBERS)
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours[others], theirs[others])
        assert ours[3].isnan().any()
        assert ours[7].isnan().any()
