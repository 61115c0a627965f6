"""The kernels in Gluon again and again, for so many seconds: prints how many calls there were and
how many of them had other bits than the first.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import OPTIONS, streams_inputs

from megatron_mhc import kernels

ROUND = 50  # calls between two looks at what they gave


def make_call(channels: int, merges: bool):
    """Forward and backward of one application, 4099 tokens."""
    x, f, post, comb, *mapping = streams_inputs((4099,), 4, channels, torch.bfloat16, device="cuda")
    function = kernels.mhc_post_pre if merges else kernels.mhc_pre
    leaves = [t.requires_grad_() for t in ((x, f, post, comb) if merges else (x,)) + (*mapping,)]
    weights = [torch.randn_like(output) for output in function(*leaves, **OPTIONS)]

    def call():
        outputs = function(*leaves, **OPTIONS, backend="triton")
        return [*outputs, *torch.autograd.grad(outputs, leaves, weights)]

    return call


def main(seconds: float) -> None:
    calls = [make_call(channels, merges) for channels in (2560, 4096) for merges in (True, False)]
    firsts = [call() for call in calls]
    torch.cuda.synchronize()
    begin, count, differing = time.monotonic(), 0, 0
    while time.monotonic() - begin < seconds:
        for call, first in zip(calls, firsts):
            found = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(ROUND):
                pairs = zip(call(), first)
                found += torch.stack([(ours != theirs).any() for ours, theirs in pairs]).any()
            count, differing = count + ROUND, differing + int(found)
    print(f"{differing} of {count} differ")


if __name__ == "__main__":
    main(float(sys.argv[1]))
