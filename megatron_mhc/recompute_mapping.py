"""Streams X' and sublayer inputs u: dropped, and formed again from the kept mappings.

pre, post and comb, n * n + 2 n float32 numbers a token, stay, so that the replay is the merges and
the aggregations alone. All sublayers of a block are formed by one call of ``mhc_replay``.
"""

from collections.abc import Callable, Sequence
from typing import Self

from torch import Tensor

from megatron_mhc import kernels

from .discarded import Discarded, Known
from .recompute import Mapped, Replay, call_again, discard_known, now


class MappingReplay(Replay):
    """x and u of one sublayer.

    Args:
        x: the streams before the merge. merge: f, post and comb, or none of them.
        pre: [..., n].
        backend: "triton" or "torch", the one that served the forward pass.
    """

    def __init__(
        self, x: Tensor | Discarded, merge: Sequence[Tensor], pre: Tensor, backend: str
    ) -> None:
        super().__init__([x, pre, *merge])
        self._backend = backend

    @classmethod
    def form_all(cls, replays: Sequence[Self]) -> None:
        # Only the first one's streams are there yet.
        first = replays[0].given()
        rest = [replay._inputs[1:] for replay in replays]
        formed = kernels.mhc_replay(
            first[0],
            [tuple(merge) or None for _, *merge in rest],
            [pre for pre, *_ in rest],
            backend=replays[0]._backend,
        )
        made = now([first[0], *(tensor for tensors in rest for tensor in tensors)])
        for replay, tensors in zip(replays, formed):
            replay._finish(tensors, *made)


def run_mapping(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    stand_ins: Sequence[Discarded | None],
    backend: str,
) -> tuple[Sequence[Tensor], Mapped]:
    """Map streams, and discard x and u and all that is large of what autograd saved of them.

    Args:
        function: gives x, u, what is small, and last pre of ``tensors``.
        tensors: streams (x,), or a pending merge (x, f, post, comb).
        stand_ins: of each of them, None of what is kept.
        backend: "triton" or "torch", the one that serves the call.

    Returns:
        What the function gives but pre; the stand-ins for x and u.
    """
    outputs = function(*tensors)
    pre = outputs[-1]
    x, *merge = tensors
    replay = MappingReplay(stand_ins[0] or x, merge, pre, backend)
    mapped = Mapped(replay.result(0), replay.result(1))
    known = Known()
    small = [None] * (len(outputs) - len(mapped))
    for tensor, stand_in in zip([*outputs, *tensors], [*mapped, *small, *stand_ins]):
        known.add(tensor, stand_in)
    unknown, count = discard_known(outputs, tensors, known)
    if unknown:  # PyTorch's steps of the mapping: called again, for one sublayer at a time
        call_again(function, tensors, stand_ins).discard_unknown(outputs, unknown, count)
    return outputs[:-1], mapped
