"""A Llama whose residual is manifold-constrained hyper-connections, for transformers >= 5.17.

tools/convert_checkpoint.py puts this file beside the weights that it exports, so that

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

finds it. The mappings are transformers' own of DeepSeek-V4, whose mathematics megatron-mhc trains;
everything else is its Llama.
"""

import torch
from transformers import initialization as init
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)


class MHCLlamaConfig(LlamaConfig):
    """A LlamaConfig with DeepSeek-V4's names for hyper-connections.

    Attributes:
        hc_mult: residual streams n. hc_sinkhorn_iters: Sinkhorn-Knopp iterations.
        hc_eps: added to pre and in Sinkhorn.
    """

    model_type = "mhc_llama"

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6


class MHCLlamaDecoderLayer(LlamaDecoderLayer):
    """Attention and MLP, each with a connection to the streams [b, s, n, C]."""

    def __init__(self, config: MHCLlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attn_hc = DeepseekV4HyperConnection(config)
        self.ffn_hc = DeepseekV4HyperConnection(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        streams = hidden_states
        post, comb, u = self.attn_hc(streams)
        f, _ = self.self_attn(hidden_states=self.input_layernorm(u), **kwargs)
        streams = _merge(streams, f, post, comb)
        post, comb, u = self.ffn_hc(streams)
        return _merge(streams, self.mlp(self.post_attention_layernorm(u)), post, comb)


def _merge(x: torch.Tensor, f: torch.Tensor, post: torch.Tensor, comb: torch.Tensor):
    """X'[o] = post[o] f + sum_i comb[i, o] X[i], summed in float32 as megatron-mhc does."""
    mixed = comb.transpose(-1, -2) @ x.float()
    return (post.unsqueeze(-1) * f.float().unsqueeze(-2) + mixed).to(x.dtype)


class MHCLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = MHCLlamaConfig
    _no_split_modules = ["MHCLlamaDecoderLayer"]
    _keep_in_fp32_modules_strict = ["attn_hc", "ffn_hc", "hc_head"]

    @torch.no_grad()
    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekV4HyperConnection | DeepseekV4HyperHead):
            for name, parameter in module.named_parameters():
                init.constant_(parameter, 0.01 if name.endswith("scale") else 0.0)


class MHCLlamaModel(MHCLlamaPreTrainedModel, LlamaModel):
    """LlamaModel between the embedding, n times, and the head that makes one stream again."""

    def __init__(self, config: MHCLlamaConfig) -> None:
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = torch.nn.ModuleList(MHCLlamaDecoderLayer(config, index) for index in layers)
        self.hc_head = DeepseekV4HyperHead(config)
        self.layers[0].register_forward_pre_hook(self._expand)
        self.norm.register_forward_pre_hook(self._collapse)
        self.post_init()

    def _expand(self, layer, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (embedding,) = inputs
        return (embedding.unsqueeze(2).expand(-1, -1, self.config.hc_mult, -1).contiguous(),)

    def _collapse(self, norm, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (streams,) = inputs
        return (self.hc_head(streams),)


class MHCLlamaForCausalLM(MHCLlamaPreTrainedModel, LlamaForCausalLM):
    """LlamaForCausalLM over the streams."""

    def __init__(self, config: MHCLlamaConfig) -> None:
        super().__init__(config)
        self.model = MHCLlamaModel(config)
        self.post_init()
