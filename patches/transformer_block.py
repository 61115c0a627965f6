"""GPTModel names TransformerBlock outright: no slot takes the class of its decoder."""

from .record import Patch


def _build(original):
    def transformer_block(config, spec, *args, **kwargs):
        # Imported here: the patch records must load before Megatron does.
        from megatron_mhc.block import MHCBlockSubmodules, MHCTransformerBlock

        kind = MHCTransformerBlock if isinstance(spec, MHCBlockSubmodules) else original
        return kind(config, spec, *args, **kwargs)

    return transformer_block


PATCH = Patch(
    name="transformer_block",
    target="megatron.core.models.gpt.gpt_model:TransformerBlock",
    reason="GPTModel hard-codes its decoder's class; a spec of MHCBlockSubmodules gets ours",
    tested={"0.19.2": "e39d6c4463153be6"},
    build=_build,
)
