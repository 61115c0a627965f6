"""How many layers make a recomputed block: the paper's eq. 20."""

import math
from collections.abc import Sequence

from .config import MHCConfig
from .errors import UserError

SUBLAYERS = 2
"""To a transformer layer: attention and MLP, each with a connection of its own."""


def residual_units(layers: int, block: int, n: int) -> int:
    """Memory of a stage's residual streams, n C ceil(L / L_r) + (n + 2) C L_r (eq. 20), over C.

    The first term is kept, the streams at the start of every block; the second is what one block's
    replay forms: X', u and the normalised u of each of its sublayers. Not counted are f and the
    coefficients of every sublayer, which are kept with any block size.

    Args:
        layers: transformer layers of the stage, L / 2.
        block: transformer layers to a block, L_r / 2.
        n: residual streams.
    """
    return n * math.ceil(layers / block) + (n + 2) * SUBLAYERS * block


def best_block_layers(layers: int, n: int) -> int:
    """The block size, in layers, that makes :func:`residual_units` least; the smaller of equals."""
    return min(range(1, layers + 1), key=lambda block: residual_units(layers, block, n))


def block_layers(mhc: MHCConfig, layers: int) -> int:
    """Layers to a block in a stage of ``layers``; a block never crosses a stage's end."""
    if mhc.recompute_layer_num is None:
        return best_block_layers(layers, mhc.num_streams)
    return min(mhc.recompute_layer_num, layers)


def describe_blocks(mhc: MHCConfig, stages: Sequence[int]) -> str:
    """What is recomputed, in one line for the start of a run.

    Args:
        mhc: with ``recompute``.
        stages: transformer layers of each (virtual) pipeline stage.

    Raises:
        UserError: blocks larger than every stage.
    """
    asked, largest = mhc.recompute_layer_num, max(stages)
    if asked is not None and asked > largest:
        raise UserError(
            f"--mhc-recompute-layer-num {asked}: a block ends with its pipeline stage, and the "
            f"largest has {largest} layers; use 1 to {largest}, or leave it out for "
            f"{best_block_layers(largest, mhc.num_streams)} (the paper's eq. 20)"
        )
    sizes = [
        f"N={block_layers(mhc, layers)} in a stage of {layers} layers"
        for layers in sorted(set(stages) - {0})
    ]
    why = "eq. 20" if asked is None else f"--mhc-recompute-layer-num {asked}"
    kept = ""
    if len(stages) > 1:
        kept = "; the last stage's last block is kept, its backward pass comes at once"
    return f"mHC recompute: blocks of {', '.join(sizes)} ({why}){kept}"
