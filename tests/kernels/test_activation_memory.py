"""The estimate of what mHC keeps, against what the Triton operators (interpreted) keep."""

import gc

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch

from megatron_mhc import MHCConfig, activation_memory
from megatron_mhc.activation_memory import Stage
from tests.live_memory import LiveMemory
from tests.stack import Stack

LAYERS, TOKENS, CHANNELS, STREAMS = 2, 32, 64, 4
# Sublayers that keep nothing of their own but their normalised input.
STAGE = Stage(LAYERS, TOKENS, hidden=CHANNELS, ffn=0, query=0, key_value=0, heads=0)


@pytest.mark.parametrize("block", [None, 1, 2])
def test_estimate_is_what_the_operators_keep(block):
    mhc = MHCConfig(backend="triton", recompute=block is not None)
    model = Stack(mhc, CHANNELS, 2 * LAYERS, 2 * (block or LAYERS))
    for weight in model.weights:
        weight.data = weight.data.bfloat16()
    with LiveMemory() as memory:
        memory.ignore(*model.parameters())
        h = torch.randn(TOKENS, CHANNELS, dtype=torch.bfloat16, requires_grad=True)
        before = memory.now
        out = model(h)
        gc.collect()  # Triton's interpreter leaves cycles that hold what it was given
        kept = memory.now - before
        if block is None:
            expected = activation_memory.mhc(STAGE, STREAMS)
        else:
            expected = activation_memory.recomputed(STAGE, STREAMS, block)
            model.in_flight.replay()
            gc.collect()
            replayed = memory.now - before - kept
            # The streams at the end are formed when the head asks, and here the norms' outputs are
            # replayed ahead, all at once.
            normalized = 2 * block * STAGE.normalized_bytes()
            end = STREAMS * STAGE.channel_bytes
            estimated = expected.transient - STAGE.backward_bytes() + normalized - end
            assert replayed == pytest.approx(estimated, rel=0.05)
    assert out.shape == h.shape
    assert kept == pytest.approx(expected.kept, rel=0.05)
