"""The results of tools/benchmark_pipeline.py as a table, beside what the paper model says."""

from .pipeline_estimate import MODES, Cluster

COLUMNS = (
    "link",
    "GB/s",
    "stages x chunks",
    "case",
    "channels",
    "ms / step",
    "over plain",
    "pipeline cost",
    "compute ms",
    "bubble ms",
    "exposed ms",
    "on paper",
    "peak GiB",
)
"""compute, bubble and exposed are of the slower rank; exposed is idle time beyond the bubble.

channels is NCCL_MAX_P2P_NCHANNELS; the case nccl@N limits its own communicators to N.
"""


def _find(results: list[dict], **wanted) -> dict | None:
    found = [r for r in results if all(r[name] == value for name, value in wanted.items())]
    return found[-1] if found else None


def overhead(result: dict, results: list[dict]) -> float | None:
    """Step time over the plain model's in the same division and on the same link, less 1."""
    where = {name: result[name] for name in ("link", "stages", "chunks")}
    plain = _find(results, mode="plain", **where)
    return result["step_ms"] / plain["step_ms"] - 1 if plain else None


def pipeline_cost(result: dict, results: list[dict]) -> float | None:
    """What mHC costs in stages beyond what it costs on one GPU, in parts of the plain step."""
    recompute = "+recompute" if "+recompute" in result["mode"] else ""
    single = _find(results, mode=f"none{recompute}", stages=1)
    alone = overhead(single, results) if single else None
    staged = overhead(result, results)
    if result["mode"].startswith("plain") or result["stages"] == 1 or None in (alone, staged):
        return None
    return staged - alone


def on_paper(result: dict, settings: dict) -> float | None:
    """Exposed ms that the paper model predicts from the measured compute time and bandwidth."""
    if result["mode"] not in MODES or result["stages"] == 1 or "compute_ms" not in result:
        return None
    passes = settings["micro_batches"] * result["chunks"]
    return Cluster(
        stages=result["stages"],
        chunks=result["chunks"],
        micro_batches=settings["micro_batches"],
        channels=settings["hidden"],
        streams=settings["streams"],
        tokens=settings["length"] * settings["micro_batch"],
        link=result["link_gb_s"],
        group=settings["group"],
        forward_ms=max(result["compute_ms"]) / passes / 3,
    ).exposed_ms(result["mode"])


def rows(results: list[dict], settings: dict) -> list[list[str]]:
    """One row a result, of :data:`COLUMNS`; "-" where something was not measured."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:+.2f} %"

    def slowest(values: list[float] | None) -> str:
        return "-" if values is None else f"{max(values):.1f}"

    return [
        [
            result["link"],
            "-" if result["link_gb_s"] is None else f"{result['link_gb_s']:.1f}",
            f"{result['stages']} x {result['chunks']}",
            result["mode"],
            str(result["p2p_channels"] or "-"),
            f"{result['step_ms']:.1f}",
            percent(overhead(result, results)),
            percent(pipeline_cost(result, results)),
            slowest(result.get("compute_ms")),
            slowest(result.get("bubble_ms")),
            slowest(result.get("exposed_ms")),
            "-" if (paper := on_paper(result, settings)) is None else f"{paper:.1f}",
            slowest(result["peak_gib"]),
        ]
        for result in results
    ]


def markdown(results: list[dict], settings: dict) -> str:
    """The table for a page of docs/benchmarks."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(results, settings)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
