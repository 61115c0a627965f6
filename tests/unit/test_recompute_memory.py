"""What recompute drops is gone, comes back once, and goes when backward is done with it."""

import gc

import pytest
import torch

from megatron_mhc import (
    HyperConnection,
    HyperHead,
    MHCConfig,
    kernels,
    recompute,
    recompute_sublayer,
)
from megatron_mhc.saved_tensors import saved_between
from tests.live_memory import LiveMemory
from tests.models import build_gpt, random_tokens, scramble_mappings
from tests.stack import NormLinear, Stack

TOKENS, CHANNELS, STREAMS = 64, 32, 4
UNIT = TOKENS * CHANNELS * 4
"""Bytes of C channels of every token, float32."""


def stack(recomputed: bool, sublayers: int = 6, block: int = 3) -> Stack:
    torch.manual_seed(0)
    model = Stack(MHCConfig(recompute=recomputed), CHANNELS, sublayers, block)
    scramble_mappings(model)
    return model


def entry() -> torch.Tensor:
    return torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5))


def test_a_stack_has_the_same_gradients():
    grads = []
    for recomputed in (False, True):
        model, h = stack(recomputed), entry().requires_grad_()
        model(h).square().sum().backward()
        grads.append([h.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*grads):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("block", [2, 3, 6])
def test_only_block_starts_and_sublayer_outputs_are_kept(block):
    """n C for every block; C, pre, post and comb for every sublayer."""
    sublayers = 6
    model = stack(True, sublayers, block)
    with LiveMemory() as memory:
        memory.ignore(*model.parameters())
        out = model(entry().requires_grad_())
        out_and_entry = 2 * UNIT
        small = 4 * TOKENS * (2 * STREAMS + STREAMS**2)
        blocks = sublayers // block
        expected = STREAMS * UNIT * blocks + (UNIT + small) * sublayers
        assert memory.now - out_and_entry == pytest.approx(expected, rel=0.01)
        del out


def test_a_replayed_block_holds_streams_and_inputs_alone():
    """X, u and its normalised form of each sublayer; not the many steps of PyTorch's mappings,
    which are for one sublayer at a time."""
    sublayers = 6
    model = stack(True, sublayers, block=sublayers)
    with LiveMemory() as memory:
        memory.ignore(*model.parameters())
        out = model(entry().requires_grad_())
        before = memory.now
        model.in_flight.replay()
        first = STREAMS * UNIT  # is kept
        expected = (STREAMS + 2) * UNIT * sublayers - first
        assert memory.now - before == pytest.approx(expected, rel=0.01)
        del out


def test_memory_falls_as_the_backward_pass_goes():
    """Nothing is left of a block once it was passed, nor of the graph at the end."""
    model = stack(True)
    with LiveMemory() as memory:
        memory.ignore(*model.parameters())
        h = entry().requires_grad_()
        before = memory.now
        loss = model(h).sum()
        loss.backward()
        gradients = sum(parameter.numel() * 4 for parameter in model.parameters()) + UNIT
        del loss
        gc.collect()
        assert memory.now - before <= gradients + 1024


def test_a_forward_pass_without_its_backward_leaves_nothing():
    model = stack(True)
    with LiveMemory() as memory:
        memory.ignore(*model.parameters())
        h = entry().requires_grad_()
        before = memory.now
        loss = model(h).sum()
        assert memory.now > before
        del loss
        assert memory.now == before


def test_a_second_backward_pass_finds_everything():
    model, h = stack(True), entry()
    loss = model(h).square().sum()
    first = torch.autograd.grad(loss, model.parameters(), retain_graph=True)
    second = torch.autograd.grad(loss, model.parameters())
    for a, b in zip(first, second):
        assert torch.equal(a, b)


def test_parameters_stay_the_objects_they_are():
    """Megatron's linear layers mark the weight that comes out of the graph."""
    u, weight = entry().requires_grad_(), torch.nn.Parameter(torch.eye(CHANNELS))
    (v,), (stand_in,) = recompute.run(lambda u: (u * 2,), [u], [None])
    with recompute_sublayer.sublayer(v, stand_in) as discard_input:
        f = NormLinear.apply(v, weight)
        discard_input(f)
    assert f.grad_fn.saved_tensors[1] is weight


def test_saved_tensors_come_in_the_same_order():
    x, weight = entry().requires_grad_(), torch.nn.Parameter(torch.ones(CHANNELS))

    def shapes():
        y = (torch.sigmoid(x) * weight).softmax(-1)
        return [tuple(tensor.shape) for tensor, *_ in saved_between([y], [x])]

    assert shapes() == shapes()
    assert shapes()


def test_a_function_that_changes_is_caught():
    calls = []

    def fickle(x):
        calls.append(1)
        return (x.sigmoid() if len(calls) == 1 else x.sigmoid().tanh(),)

    x = entry().requires_grad_()
    (y,), _ = recompute.run(fickle, [x], [None])
    with pytest.raises(RuntimeError, match="does not do the same thing twice"):
        y.sum().backward()


def test_a_norm_of_something_else_is_left_alone():
    x = entry().requires_grad_()
    (u,), (stand_in,) = recompute.run(lambda x: (x * 2,), [x], [None])
    with recompute_sublayer.sublayer(u, stand_in) as discard_input:
        q = u + 1
        recompute_sublayer.report_norm(torch.tanh, q, torch.tanh(q))
        f = q.square()
        discard_input(f)
    f.sum().backward()
    assert torch.equal(x.grad, 4 * (2 * x.detach() + 1))


class TestReplayAhead:
    """What a pipeline calls before it waits for the gradient."""

    def model(self, **settings):
        mhc = MHCConfig(recompute=True, **settings)
        model = build_gpt(mhc, num_layers=4)
        scramble_mappings(model)
        return model

    def watch(self, monkeypatch):
        """pre of every mapping by its connection, and the lists of pre that were replayed."""
        mapped, replayed = {}, []
        replay = kernels.mhc_replay

        def noting(map_streams):
            def noted(self, *tensors):
                outputs = map_streams(self, *tensors)
                mapped.setdefault(self, outputs[-1].data_ptr())
                return outputs

            return noted

        def noted_replay(x, merges, pres, **options):
            replayed.append([pre.data_ptr() for pre in pres])
            return replay(x, merges, pres, **options)

        monkeypatch.setattr(HyperConnection, "_map", noting(HyperConnection._map))
        monkeypatch.setattr(HyperHead, "_collapse", noting(HyperHead._collapse))
        monkeypatch.setattr(kernels, "mhc_replay", noted_replay)
        return mapped, replayed

    def test_the_last_block_is_replayed_before_the_backward_pass(self, monkeypatch):
        torch.manual_seed(0)
        tokens, positions, labels = random_tokens()
        expected = self.model(recompute_layer_num=2)
        expected(tokens, positions, None, labels=labels).mean().backward()

        model = self.model(recompute_layer_num=2)
        assert not model.decoder.replay_ahead()
        mapped, replayed = self.watch(monkeypatch)
        loss = model(tokens, positions, None, labels=labels).mean()
        assert model.decoder.replay_ahead()
        pres = [
            mapped[connection]
            for layer in model.decoder.layers
            for connection in (layer.self_attention_hyper_connection, layer.mlp_hyper_connection)
        ]
        last_block = [*pres[4:], mapped[model.decoder.hyper_head]]
        assert replayed == [last_block]
        assert not model.decoder.replay_ahead()
        loss.backward()
        assert replayed == [last_block, pres[:4]]
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters()):
            assert torch.equal(ours.grad, theirs.grad), name

    def test_forward_passes_are_replayed_in_their_order(self, monkeypatch):
        model = self.model(recompute_layer_num=4)
        tokens, positions, labels = random_tokens()
        _, replayed = self.watch(monkeypatch)
        losses = [model(tokens, positions, None, labels=labels).mean() for _ in range(3)]
        for done in (1, 2, 3):
            assert model.decoder.replay_ahead()
            assert len(replayed) == done
            losses[done - 1].backward()
            assert len(replayed) == done
        assert not model.decoder.replay_ahead()
        assert len({tuple(pres) for pres in replayed}) == 3
