"""Combined 1F1B takes layers apart by their class, and knows Megatron's own."""

from .record import Patch


def _build(original):
    def build_layer_callables(layer):
        # Imported here: the patch records must load before Megatron does.
        from megatron_mhc import combined_1f1b
        from megatron_mhc.layer import MHCTransformerLayer

        if isinstance(layer, MHCTransformerLayer):
            return combined_1f1b.layer_callables(layer)
        return original(layer)

    return build_layer_callables


PATCH = Patch(
    name="layer_callables",
    target="megatron.core.models.common.fine_grained_callables:build_layer_callables",
    reason="combined 1F1B never calls a layer's forward; it would run an mHC layer without streams",
    tested={"0.19.2": "5728dbb387fb3f11"},
    build=_build,
    with_flag="--overlap-moe-expert-parallel-comm",
)
