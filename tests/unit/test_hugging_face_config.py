"""Which config.json is a Llama's, and what is said of the others."""

import pytest
import torch
from converted import CONFIG

from megatron_mhc.conversion.hugging_face_config import ROPE_SCALING, from_config
from megatron_mhc.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3"}, "model_type qwen3: expected one of llama, mistral, mhc_llama"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window 8: expected null"),
        ({"attention_bias": True}, "attention_bias True: expected no bias"),
        ({"hidden_act": "gelu"}, "hidden_act gelu: expected silu"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type yarn: expected default or llama3"),
        ({"is_causal": False}, "is_causal False: expected true"),
        ({"vocab_size": None}, "vocab_size null: expected a whole number, 1 or more"),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters and rope_scaling: expected one of them",
        ),
        ({"rope_scaling": ROPE_SCALING}, "factor None: expected a llama3 rope's, above 0"),
        ({"model_type": "mhc_llama"}, "hc_mult null: expected a number"),
        ({"num_key_value_heads": "2"}, 'num_key_value_heads "2": expected a whole number'),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads 3: does not divide num_attention_heads 4",
        ),
        ({"num_attention_heads": 4.0}, r"num_attention_heads 4\.0: expected a whole number"),
        ({"max_position_embeddings": None}, "max_position_embeddings null: expected a whole"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps 1e-6: expected a number above 0"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings None: expected a boolean"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]: expected an object"),
        ({"rope_theta": None}, "rope_theta null: --rotary-base takes whole numbers above 0"),
        ({"rope_scaling": {**ROPE_SCALING, "factor": 0}}, "factor 0: expected a llama3 rope's"),
        ({"quantization_config": {"bits": 8}}, "quantization_config: expected weights"),
        ({"model_type": "mistral"}, "sliding_window 4096: expected null"),
        (
            {"model_type": "mhc_llama", "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 0.5},
            "hc_eps 0.5: expected 0 <= eps",
        ),
        ({"rope_theta": 1.5}, "rope_theta 1.5: --rotary-base takes whole numbers"),
        (
            {"rope_scaling": {**ROPE_SCALING, "factor": 8, "low_freq_factor": 2.0}},
            "low_freq_factor 2.0: expected 1.0, which Megatron has in its code",
        ),
    ],
)
def test_configs_that_are_no_llamas_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_config(CONFIG | change, "--hf x")


@pytest.mark.parametrize("form", ["transformers 4", "transformers 5"])
def test_scaled_positions_are_the_same_in_both(form):
    """Llama 3.1's; frequencies of both, since few tokens show nothing of the longest waves."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {**ROPE_SCALING, "factor": 32.0}
    config = CONFIG | {"head_dim": 64}
    if form == "transformers 4":
        config |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    else:
        config |= {"rope_parameters": {**scaling, "rope_theta": 500000.0}}
    model = from_config(config, "--hf x")
    assert (model.rope_base, model.rope_scaling) == (500000.0, 32.0)
    assert model.flags()["rope-scaling-factor"] == 32.0
    ours = RotaryEmbedding(
        64,
        rotary_percent=1.0,
        rotary_base=int(model.rope_base),
        rope_scaling=True,
        rope_scaling_factor=model.rope_scaling,
        use_cpu_initialization=True,
    )
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config))
    torch.testing.assert_close(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
