"""The order of replays against Megatron's own table of its schedule, and what a wait does first."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import environment


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """Megatron can be imported only after environment.prepare()."""
    environment.prepare()
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    from megatron_mhc.pipeline.replays import ReplayedBefore, Replays

    return SimpleNamespace(
        ReplayedBefore=ReplayedBefore, Replays=Replays, get_schedule_table=get_schedule_table
    )


class Pass:
    """A forward pass whose backward the test runs."""

    def __init__(self, replays, chunk: int) -> None:
        self.waiting = True
        self.output = torch.ones(1, requires_grad=True) * 2
        replays.begin(chunk, self, self.output)

    def backward(self) -> None:
        self.waiting = False
        self.output.sum().backward()

    def replay(self) -> None:
        self.waiting = False


def orders(table, chunks: int) -> tuple[list, list]:
    """(chunk, micro-batch) of forward and backward passes, as the schedule takes them."""
    forward = [(chunk, micro_batch) for micro_batch, chunk in table]
    return forward, [(chunks - 1 - chunk, micro_batch) for chunk, micro_batch in forward]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("micro_batches", [2, 4, 5, 7])
@pytest.mark.parametrize("group", [2, 3, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_next_backward_pass_is_known(parts, chunks, group, micro_batches, stage):
    """Two stages; the second of two steps must not depend on the first."""
    replays = parts.Replays()
    replays.group = group
    forward, backward = orders(parts.get_schedule_table(micro_batches, chunks, group), chunks)
    ahead = min(len(forward), 2 * (1 - stage) + (chunks - 1) * group + 1)
    for _step in range(2):
        passes = {}
        to_run = iter(forward)

        def run(count, passes=passes, to_run=to_run):
            for _, key in zip(range(count), to_run):
                passes[key] = Pass(replays, key[0])

        run(ahead)
        for key in backward:
            assert replays.next() is passes[key], key
            passes[key].backward()
            run(1)
        assert replays.next() is None


def test_a_pass_that_has_not_run_is_not_taken_for_another(parts):
    replays = parts.Replays()
    replays.group = 2
    passes = [Pass(replays, chunk) for chunk in (0, 0, 1)]
    passes[-1].backward()
    assert replays.next() is None, "chunk 1 of the second micro-batch comes next"
    last = Pass(replays, 1)
    assert replays.next() is last


def test_one_pass_is_replayed_until_its_backward_pass_has_run(parts):
    replays = parts.Replays()
    passes = [Pass(replays, 0) for _ in range(2)]
    assert replays.replay_next()
    assert not replays.replay_next()
    assert [passed.waiting for passed in passes] == [False, True]
    passes[0].backward()
    assert replays.replay_next()
    assert not passes[1].waiting


def test_a_step_that_was_given_up_is_forgotten(parts):
    replays = parts.Replays()
    given_up = Pass(replays, 0)
    assert replays.next() is given_up
    del given_up.output
    passed = Pass(replays, 0)
    assert replays.next() is passed


def test_a_stage_that_does_not_recompute_replays_nothing(parts):
    assert not parts.Replays().replay_next()


def test_the_replay_is_launched_before_the_gradient_is_waited_for(parts):
    calls = []
    handle = SimpleNamespace(wait=lambda: calls.append("wait"))
    parts.ReplayedBefore(handle, lambda: calls.append("replay")).wait()
    assert calls == ["replay", "wait"]
