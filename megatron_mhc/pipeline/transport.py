"""Which way boundaries travel: by copy engines within a host, by NCCL (or gloo) otherwise."""

import os
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_mhc.errors import UserError

from .agreement import gather
from .copy_tracks import CopyTracks
from .schedule_model import Schedule
from .tracks import Tracks

TRANSPORTS = ("auto", "copy", "nccl")
FEW_SMS = 2
AS_FAST = 0.95
"""Share of the speed with NCCL's own choice at which a transfer takes FEW_SMS only."""
_THIS_BOOT = Path("/proc/sys/kernel/random/boot_id")


class TransportRefused(UserError):
    """The transport that was asked for cannot be had here."""

    every_rank = True


def make_tracks(
    pp_group: ProcessGroup, wanted: str, schedule: Schedule, boundary
) -> CopyTracks | Tracks:
    """What boundaries are sent over; a collective of all ranks of the job.

    Args:
        wanted: one of TRANSPORTS; auto is copy where it can be had, else says why it is not.
        schedule: that of the pipeline.
        boundary: a PriorityStream or ProgramOrder.

    Raises:
        TransportRefused: on every rank, where "copy" was asked for and cannot be had.
    """
    on_gpus = torch.distributed.get_backend(pp_group) == "nccl"
    if wanted == "copy" or (wanted == "auto" and on_gpus):
        tracks = why = None
        try:
            tracks = _copies(pp_group, schedule, boundary)
        except (RuntimeError, OSError) as error:
            why = str(error)
        # All pipelines or none: NCCL's groups are made by all ranks of the job together.
        why = next(filter(None, gather(why)), None)
        if why is None:
            _say(f"mHC pipeline: transfers are {tracks.said}")
            return tracks
        if wanted == "copy":
            raise TransportRefused(f"--mhc-pipeline-transport copy: {why}; use auto or nccl")
        _say(f"mHC pipeline: transfers go over NCCL, not by copy engines: {why}")
    if on_gpus:
        return _fewest_sms(pp_group, wraps=schedule.chunks > 1)
    return Tracks(pp_group, wraps=schedule.chunks > 1)


def _fewest_sms(pp_group: ProcessGroup, wraps: bool) -> Tracks:
    """Tracks whose transfers take few SMs, where these move a boundary as fast as many do.

    An NCCL transfer holds its SMs until its peer has come, and compute beside it waits for them.
    NVLink needs as many as NCCL takes, the host's memory or a network may not.
    """
    tracks = {ctas: Tracks(pp_group, wraps, ctas) for ctas in (None, FEW_SMS)}
    speed = {ctas: track.speed() for ctas, track in tracks.items()}
    chosen = FEW_SMS if speed[FEW_SMS] >= AS_FAST * speed[None] else None
    for ctas, track in tracks.items():
        if ctas != chosen:
            track.close()
    _say(
        f"mHC pipeline: NCCL moves {speed[None]:.1f} GB/s with the SMs that it chooses, "
        f"{speed[FEW_SMS]:.1f} with {FEW_SMS} a transfer; {chosen or 'its own choice'} taken"
    )
    return tracks[chosen]


def _copies(pp_group: ProcessGroup, schedule: Schedule, boundary) -> CopyTracks:
    """Raises RuntimeError or OSError on every rank if one of them cannot."""
    why = None
    if torch.distributed.get_backend(pp_group) != "nccl":
        why = "stages are not on GPUs"
    elif os.environ.get("NCCL_P2P_DISABLE") == "1":
        why = "NCCL_P2P_DISABLE=1"
    everywhere = gather((why, _THIS_BOOT.read_text().strip()), pp_group)
    reasons = [reason for reason, _ in everywhere if reason]
    if reasons:
        raise RuntimeError(reasons[0])
    if len({host for _, host in everywhere}) > 1:
        raise RuntimeError("the stages of a pipeline are on several hosts")
    # Needs CUDA's driver, which a machine without a GPU does not have.
    from .copy_engine import CopyEngine

    engine, streams = CopyEngine(), (boundary.stream,)
    timeout = pp_group._get_backend(engine.device).options._timeout  # NCCL's
    return CopyTracks(pp_group, engine, schedule, streams, timeout.total_seconds())


def _say(line: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(line, flush=True)
