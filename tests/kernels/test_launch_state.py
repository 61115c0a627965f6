"""Memory of launches: whose it is, and that every launch leaves it ready for the next one."""

import interpreter  # noqa: F401
import pytest
import torch
from gluon_cpu import Deadlock
from kernel_checks import streams_inputs

from megatron_mhc.kernels import launch_post_pre_hopper, launch_state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(launch_state, "_states", launch_state.OrderedDict())


def test_launches_of_a_shape_share_memory():
    first = launch_state.state_of((1, 2), 100, CPU)
    assert first.dtype == torch.int32
    assert first.shape == (100,)
    assert not first.any()
    first.fill_(7)
    assert launch_state.state_of((1, 3), 100, CPU) is not first
    assert launch_state.state_of((1, 2), 100, CPU) is first
    assert (first == 7).all()


def test_what_was_not_used_for_long_is_given_back():
    first, second = (launch_state.state_of((k,), 4, CPU) for k in range(2))
    for k in range(2, launch_state.KEPT + 1):
        assert launch_state.state_of((0,), 4, CPU) is first
        launch_state.state_of((k,), 4, CPU)
    assert launch_state.state_of((0,), 4, CPU) is first
    assert launch_state.state_of((1,), 4, CPU) is not second
    assert len(launch_state._states) == launch_state.KEPT


def test_memory_that_cannot_be_had_is_an_error():
    with pytest.raises(RuntimeError):
        launch_state.state_of((1,), 2**60, CPU)
    assert not launch_state._states


def test_a_launch_with_another_inference_mode_may_follow():
    with torch.inference_mode():
        state = launch_state.state_of((1,), 4, CPU)
    assert not state.is_inference()


def launches(count: int) -> list[torch.Tensor]:
    """Of eight tiles with a merge, eight without in the same memory, and two of a head, in turn."""
    torch.manual_seed(1)
    outputs = []
    for k in range(count):
        tokens, merges, head = ((120, True, False), (120, False, False), (20, True, True))[k % 3]
        x, *merge, fn, scale, base = streams_inputs((tokens,), 4, 136, torch.bfloat16)
        mapping = (fn[:4], scale[:1], base[:4]) if head else (fn, scale, base)
        arguments = x, merge if merges else None, mapping, 20, 1e-6, 1e-6
        outputs += launch_post_pre_hopper.post_pre_hopper(*arguments)
    return [output for output in outputs if output is not None]


@pytest.fixture
def alone(hopper_on_cpu, monkeypatch):
    """Six launches, each with memory of its own."""
    monkeypatch.setattr(launch_post_pre_hopper, "BLOCK_C", 64)
    own = lambda shape, words, device: torch.zeros(words, dtype=torch.int32)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(launch_post_pre_hopper, "state_of", own)
        hopper_on_cpu(0)
        return launches(6)


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_launch_leaves_its_memory_ready_for_the_next(hopper_on_cpu, alone, seed):
    hopper_on_cpu(seed, resident=(3, 5, None)[seed % 3])
    assert all(map(torch.equal, launches(6), alone))
    assert len(launch_state._states) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"    empty_mail(next_mail_ptr, mails, rank, G)\n": ""},
        {"gl.store(counts_ptr + TICKET, mark << MARKED)": "pass"},
        {"gl.store(counts_ptr + TICKET, mark << MARKED)": "gl.store(counts_ptr + TICKET, 0)"},
        {"gl.store(counts_ptr + DRAWN + (1 - mark) * LINE // 4, 0)": "pass"},
        {"bitcast=True) & -2) | mark": "bitcast=True) & -2) | 1"},
        {"bitcast=True) & -2) | mark": "bitcast=True) | mark)"},
    ],
    ids=[
        "mail left",
        "tickets left",
        "the same mark again",
        "draws left",
        "every share marked alike",
        "a share with its last bit",
    ],
)
def test_memory_that_is_not_ready_is_found(hopper_on_cpu, alone, changes):
    found = None
    for seed in range(3):
        hopper_on_cpu(seed, changes=changes)
        try:
            found = launches(6)
        except (Deadlock, AssertionError):
            return
        if not all(map(torch.equal, found, alone)):
            return
    pytest.fail("it passes")
