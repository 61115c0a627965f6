"""An mHC model at its initial values computes what the plain Megatron model computes."""

import pytest
import torch

from megatron_mhc import MHCConfig
from tests.models import build_gpt, random_tokens


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("mixing", ["sinkhorn", "identity", "unconstrained"])
@pytest.mark.parametrize(("layers", "tolerance"), [(1, 1e-5), (12, 5e-5)])
def test_initial_logits_equal_the_plain_model(layers, tolerance, mixing):
    tokens, positions, _ = random_tokens()
    expected = build_gpt(None, num_layers=layers)(tokens, positions, None)
    logits = build_gpt(MHCConfig(residual_mixing=mixing), num_layers=layers)(
        tokens, positions, None
    )
    assert relative_error(logits, expected) < tolerance


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_any_number_of_streams_starts_as_the_plain_model(streams):
    tokens, positions, _ = random_tokens()
    expected = build_gpt(None)(tokens, positions, None)
    logits = build_gpt(MHCConfig(num_streams=streams))(tokens, positions, None)
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize(
    "variant",
    [
        {"normalization": "LayerNorm", "add_bias_linear": True},
        {"tied": True},
        {"num_query_groups": 4},
        {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_grouped_gemm": False},
    ],
    ids=["layernorm-bias", "tied", "multi-head", "gelu", "moe"],
)
def test_model_variants_start_as_their_plain_model(variant):
    """Logits, and the gradients of every parameter that the plain model has."""
    tokens, positions, labels = random_tokens()
    gradients = []
    for mhc in (None, MHCConfig()):
        model = build_gpt(mhc, **variant)
        loss = model(tokens, positions, None, labels=labels).mean()
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append((model(tokens, positions, None), loss, found))
    (expected, plain_loss, plain), (logits, loss, ours) = gradients
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(loss, plain_loss) < 1e-5
    assert len(plain) > 5
    for name, gradient in plain.items():
        assert relative_error(ours[name], gradient) < 1e-4, name


def test_streams_separate_from_the_first_step():
    """With rotated pre the streams get different gradients although they start equal."""
    tokens, positions, labels = random_tokens()
    model = build_gpt(MHCConfig())
    model(tokens, positions, None, labels=labels).mean().backward()
    base = model.decoder.layers[0].self_attention_hyper_connection.base.grad
    post = base[4:8]
    assert post.std() > 0.1 * post.abs().mean()
    for name, parameter in model.named_parameters():
        if "hyper" in name and not name.endswith("scale"):
            assert parameter.grad.abs().max() > 0, name


def test_dropout_acts_on_the_sublayer_output_alone():
    """All dropped: sublayers add nothing, the embedding passes through."""
    tokens, positions, _ = random_tokens()
    model = build_gpt(MHCConfig(), hidden_dropout=1.0 - 1e-9)
    model.train()
    for layer in model.decoder.layers:
        layer.hidden_dropout = 1.0
    model.embedding.embedding_dropout.p = 0.0
    logits = model(tokens, positions, None)
    h = model.embedding(tokens, positions)
    expected = model.output_layer(model.decoder.final_layernorm.forward(h))[0].transpose(0, 1)
    assert relative_error(logits, expected) < 1e-5
