"""Pictures of runs; written aside and renamed, so that a viewer never sees half a file."""

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display in CI or on a cluster

import matplotlib.pyplot as plt  # noqa: E402

from .curves import COMPOSITE, LOSS, VALIDATION_LOSS, Curve, Run  # noqa: E402

FORWARD, BACKWARD = COMPOSITE


def _draw(axes, curve: Curve, **style) -> None:
    axes.plot(list(curve), list(curve.values()), **style)


def save(figure, path: Path) -> None:
    """Write a figure to ``path``, whole or not at all, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial.png")
    figure.savefig(aside, dpi=130)
    plt.close(figure)
    os.replace(aside, path)


def _draw_losses(axes, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        color = f"C{index}"
        _draw(axes, run.curve(LOSS), color=color, alpha=0.35, linewidth=1)
        validation = run.curve(VALIDATION_LOSS)
        _draw(axes, validation, color=color, marker="o", markersize=3, label=run.name)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="training (thin), validation")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_composite_gains(axes, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        if not run.curve(FORWARD):
            continue
        color = f"C{index}"
        _draw(axes, run.curve(FORWARD), color=color, label=f"{run.name}, forward")
        _draw(axes, run.curve(BACKWARD), color=color, linestyle="--", label=f"{run.name}, backward")
    axes.set(xlabel="step", ylabel="gain", title="composite gain over all layers")
    if max(run.max_gain() or 1 for run in runs) > 10:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.legend()
    axes.grid(alpha=0.3, which="both")


def draw_run(run: Run, path: Path) -> None:
    """Loss, gain per sublayer at the last logged step, and composite gain over training."""
    forward, backward = run.sublayers("forward_gain"), run.sublayers("backward_gain")
    figure, axes = plt.subplots(1, 3 if forward else 1, figsize=(17 if forward else 6, 4.5))
    if not forward:
        _draw_losses(axes, [run])
    else:
        _draw_losses(axes[0], [run])
        for curves, style in ((forward, "o-"), (backward, "s--")):
            last = [curve[max(curve)] for curve in curves.values()]
            label = "forward" if curves is forward else "backward"
            axes[1].plot(range(len(last)), last, style, label=label)
        step = max(next(iter(forward.values())))
        axes[1].set(ylabel="gain", title=f"gain per sublayer, step {step}")
        axes[1].set_xticks(range(len(forward)), list(forward), rotation=60, ha="right", fontsize=7)
        axes[1].ticklabel_format(axis="y", useOffset=False)
        axes[1].legend()
        axes[1].grid(alpha=0.3)
        _draw_composite_gains(axes[2], [run])
    figure.tight_layout()
    save(figure, path)


def draw_comparison(runs: list[Run], path: Path) -> None:
    """Losses and composite gains of several runs on the same axes."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.8))
    _draw_losses(axes[0], runs)
    _draw_composite_gains(axes[1], runs)
    figure.tight_layout()
    save(figure, path)
