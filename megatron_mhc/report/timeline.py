"""A picture of a step: what ran on which stream of which rank."""

from collections import defaultdict
from pathlib import Path

from matplotlib.patches import Patch

from .plots import plt, save
from .trace import Kernel

COLORS = {"compute": "#9db4d0", "merge": "#e4572e", "transfer": "#4c9f70"}
LONGEST_NAME = 24


def _draw_lanes(axes, kernels: list[Kernel], begin: float, end: float) -> None:
    """One row a lane, ranks above one another; times in ms from ``begin``."""
    bars: dict[tuple[int, str], dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        start, stop = max(kernel.start, begin), min(kernel.end, end)
        row = bars[kernel.rank, kernel.lane]  # a lane that is idle here keeps its row
        if start < stop:
            row[kernel.kind].append(((start - begin) / 1e3, (stop - start) / 1e3))
    lanes = sorted(bars, reverse=True)
    for row, lane in enumerate(lanes):
        for kind, spans in bars[lane].items():
            axes.broken_barh(spans, (row - 0.4, 0.8), color=COLORS[kind], linewidth=0)
    names = [f"rank {rank} {lane}"[:LONGEST_NAME] for rank, lane in lanes]
    axes.set_yticks(range(len(lanes)), names, fontsize=8)
    axes.set_xlim(0, (end - begin) / 1e3)
    axes.set_xlabel("ms", fontsize=8)


def draw_timelines(steps: dict[str, list[Kernel]], path: Path, zoom: float = 0.12) -> None:
    """The streams of profiled steps by name: each whole, and a part from its middle.

    Args:
        steps: name of a run to its kernels, of all ranks.
        zoom: the part's share of the step.
    """
    figure, axes = plt.subplots(2 * len(steps), 1, figsize=(15, 5.2 * len(steps)), squeeze=False)
    for index, (name, kernels) in enumerate(steps.items()):
        begin = min(kernel.start for kernel in kernels)
        end = max(kernel.end for kernel in kernels)
        middle, half = (begin + end) / 2, zoom * (end - begin) / 2
        whole, part = axes[2 * index, 0], axes[2 * index + 1, 0]
        _draw_lanes(whole, kernels, begin, end)
        whole.set_title(f"{name}: one step, {(end - begin) / 1e3:.0f} ms", fontsize=10)
        _draw_lanes(part, kernels, middle - half, middle + half)
        part.set_title(f"{name}: its middle", fontsize=10)
    figure.legend(
        handles=[Patch(color=color, label=kind) for kind, color in COLORS.items()],
        loc="upper right",
        fontsize=8,
    )
    figure.tight_layout()
    save(figure, path)
