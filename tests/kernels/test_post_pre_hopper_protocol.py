"""Random schedules of post_pre_hopper_kernel: no deadlock, nothing lost or overwritten."""

import random

import pytest
from protocol import MUTATIONS, Deadlock, Launch


def draw_case(seed):
    """A small launch; often fewer blocks run at a time than there are, but always a whole group."""
    draw = random.Random(seed)
    G, groups = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3))
    tiles = draw.choice((1, 2, 7, 23))
    return {
        "seed": seed,
        "G": G,
        "groups": groups,
        "resident": draw.choice((G, G * groups, max(G, G * groups - 1))),
        "tiles": tiles,
        "RX": draw.choice((2, 3, 5, 6)),
        "RF": draw.choice((1, 2, 3)),
        "RS": draw.choice((1, 2)),
        "long_ones": draw.randrange(tiles // 2 + 1),
        "merge": draw.random() < 0.7,
        "head": draw.random() < 0.2,
    }


def test_every_schedule_ends_with_every_tile_done():
    for seed in range(300):
        Launch(**draw_case(seed)).run()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_protocol_is_found(mutation):
    """What the test above would say of a kernel without one of its rules."""
    found = None
    for seed in range(300):
        try:
            Launch(**draw_case(seed), mutation=mutation).run()
        except (Deadlock, AssertionError) as error:
            found = type(error)
            break
    assert found
    assert found is Deadlock or mutation != "groups by block"
