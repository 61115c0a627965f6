"""Times block sizes of the mHC kernels on a GPU; the chosen ones are launch.CONFIGS.

python tools/sweep_kernels.py --channels 4096 --kernels aggregate_backward
"""

import argparse

# It also puts the checkout on the path.
from benchmark_kernels import make_inputs, make_steps
from kernel_timing import kernel_times
from triton.runtime.errors import OutOfResources

from megatron_mhc.command_line import at_least, check_gpu, run_tool
from megatron_mhc.kernels import launch, launch_backward, launch_reduce, launch_replay

TILES = ("BLOCK_T", "BLOCK_C", "num_warps", "STAGES", "maxnreg")
SWEEP = {
    "map": [(64, 64, 8, 3, None), (64, 64, 16, 3, 128), (32, 64, 8, 4, None), (32, 128, 8, 2, None),
            (16, 128, 8, 3, None)],
    "aggregate": [(1, 2048, 4), (1, 4096, 8), (1, 1024, 4)],
    "aggregate_backward": [(1, 2048, 4), (1, 4096, 8), (1, 1024, 4), (1, 2048, 4, None, 128),
                           (1, 2048, 4, None, 112), (1, 2048, 8), (1, 2048, 8, None, 80)],
    "replay": [(1, 1024, 4), (1, 512, 2), (1, 2048, 8), (1, 2048, 4), (1, 1024, 8)],
}  # fmt: skip
KERNELS = {"map": "merge_map", "replay": "merge_aggregate"}
PLANS = (launch.forward_plan, launch_backward.mapping_plan, launch_reduce.reduction,
         launch_replay.replay_plan)  # fmt: skip
REDUCE = [(128, 64), (128, 32), (256, 32), (256, 64)]


def show(label: str, inputs: dict, kernel: str, op: str = "post_pre") -> None:
    for plan in PLANS:
        plan.cache_clear()
    try:
        _, step = make_steps(op, inputs, "triton")
        times = kernel_times(step, 7)
    except OutOfResources as error:
        print(f"{label}: does not fit, {error}")
        return
    chosen = sum(time for name, time in times.items() if name.startswith(kernel))
    print(f"{label}: {kernel} {chosen:.1f} us, all {sum(times.values()):.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=at_least(1), default=8192)
    parser.add_argument("--channels", type=at_least(1), default=4096)
    choices = [*SWEEP, "reduce"]
    parser.add_argument("--kernels", nargs="+", choices=choices, default=choices)
    arguments = parser.parse_args()
    check_gpu()
    inputs = make_inputs(arguments.tokens, arguments.channels)
    for name, entries in SWEEP.items():
        if name not in arguments.kernels:
            continue
        chosen = launch.CONFIGS[name]
        for entry in entries:
            options = {key: value for key, value in zip(TILES, entry) if value is not None}
            launch.CONFIGS[name] = {"num_stages": 1} | options
            kernel = KERNELS.get(name, f"{name}_kernel")
            op = "replay_4" if name == "replay" else "post_pre"
            show(f"{name} {options}", inputs, kernel, op)
        launch.CONFIGS[name] = chosen
    for block, shares in REDUCE if "reduce" in arguments.kernels else ():
        launch_reduce.REDUCE_BLOCK, launch_reduce.REDUCE_SHARES = block, shares
        show(f"reduce {block} columns, {shares} shares", inputs, "reduce")


if __name__ == "__main__":
    run_tool(main)
