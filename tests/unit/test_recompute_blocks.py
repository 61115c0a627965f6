"""How many layers make a block: the paper's eq. 20, and what is said of it."""

import pytest

from megatron_mhc import MHCConfig
from megatron_mhc.errors import UserError
from megatron_mhc.recompute_blocks import (
    best_block_layers,
    block_layers,
    describe_blocks,
    residual_units,
)


def test_eq_20_by_hand():
    """16 layers are 32 sublayers: 8 blocks of 4 keep 32 C, and a replay forms 24 C."""
    assert residual_units(layers=16, block=2, n=4) == 4 * 8 + 6 * 4
    assert best_block_layers(16, 4) == 2


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("layers", [1, 2, 7, 16, 30, 61])
def test_the_best_is_near_the_papers_square_root(layers, n):
    best = best_block_layers(layers, n)
    units = [residual_units(layers, block, n) for block in range(1, layers + 1)]
    assert units[best - 1] == min(units)
    sublayers = 2 * layers
    root = (n * sublayers / (n + 2)) ** 0.5  # L_r*, in sublayers
    assert abs(2 * best - root) <= 2 + root / 4


def test_a_block_is_no_larger_than_its_stage():
    assert block_layers(MHCConfig(recompute=True, recompute_layer_num=8), 5) == 5
    assert block_layers(MHCConfig(recompute=True), 16) == 2


def test_the_line_names_every_kind_of_stage():
    line = describe_blocks(MHCConfig(recompute=True), [16, 16, 3, 0])
    assert line == (
        "mHC recompute: blocks of N=1 in a stage of 3 layers, N=2 in a stage of 16 layers (eq. 20)"
        "; the last stage's last block is kept, its backward pass comes at once"
    )
    asked = MHCConfig(recompute=True, recompute_layer_num=4)
    assert describe_blocks(asked, [8]).endswith(
        "N=4 in a stage of 8 layers (--mhc-recompute-layer-num 4)"
    )


def test_a_block_that_no_stage_has_is_refused():
    message = r"--mhc-recompute-layer-num 9: .* largest has 8 layers; use 1 to 8, or .* for 2 "
    with pytest.raises(UserError, match=message):
        describe_blocks(MHCConfig(recompute=True, recompute_layer_num=9), [8, 4])
