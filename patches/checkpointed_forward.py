"""Megatron checkpoints one tensor between layers: no slot takes a deferred merge's four."""

from .record import Patch


def _build(original):
    def checkpointed_forward(block, **arguments):
        # Imported here: the patch records must load before Megatron does.
        from megatron_mhc import full_recompute
        from megatron_mhc.block import MHCTransformerBlock

        if isinstance(block, MHCTransformerBlock):
            return full_recompute.forward(block, **arguments)
        return original(block, **arguments)

    return checkpointed_forward


PATCH = Patch(
    name="checkpointed_forward",
    target="megatron.core.transformer.transformer_block:checkpointed_forward",
    reason="full recompute passes one tensor between layers, mHC the four of a deferred merge",
    tested={"0.19.2": "163861b4ad4fa9d4"},
    build=_build,
)
