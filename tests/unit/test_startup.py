"""What the start-up line says of the model, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import MHCConfig, environment
from megatron_mhc.errors import UserError
from megatron_mhc.kernels import dispatch


@pytest.fixture(scope="module")
def model_line():
    environment.prepare()
    from megatron_mhc.startup import _model_line

    return _model_line


def arguments(dtype=torch.bfloat16, **fields):
    return SimpleNamespace(mhc=True, hidden_size=64, params_dtype=dtype, **fields)


def test_a_plain_model_is_named_plain(model_line):
    assert "off (no --mhc)" in model_line(SimpleNamespace(mhc=False), None)
    assert "off (--mhc-num-residual-streams 1)" in model_line(arguments(), None)


def test_the_line_names_the_kernels_that_will_serve(model_line, monkeypatch):
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    line = model_line(arguments(), MHCConfig())
    assert "4 residual streams, sinkhorn mixing with 20 iterations, kernels: triton" in line
    assert "kernels: torch" in model_line(arguments(torch.float16), MHCConfig())
    assert "kernels: torch" in model_line(arguments(), MHCConfig(num_streams=3))


@pytest.fixture
def start_on_hopper(monkeypatch):
    """parse_arguments there, with a value of CUDA_DEVICE_MAX_CONNECTIONS and further flags.

    The CPU's stand-in says Blackwell.
    """
    environment.prepare()
    from megatron_mhc.startup import parse_arguments

    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: hopper)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    flags = """--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64
        --max-position-embeddings 64 --micro-batch-size 2 --train-iters 4 --lr 1e-3 --mock-data
        --tokenizer-type NullTokenizer --vocab-size 257"""

    def start(value: str | None, further: str):
        if value:
            monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", value)
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *flags.split(), *further.split()])
        return parse_arguments()

    return start


@pytest.mark.parametrize("value", [None, "32"])
def test_one_connection_is_asked_for_by_name(start_on_hopper, value):
    found = f"CUDA_DEVICE_MAX_CONNECTIONS {value or 'is not set'}: with --tensor-model"
    with pytest.raises(UserError, match=f"{found}.*export CUDA_DEVICE_MAX_CONNECTIONS=1"):
        start_on_hopper(value, "--tensor-model-parallel-size 2")


@pytest.mark.parametrize(
    "flags",
    [
        "--use-torch-fsdp2 --ckpt-format torch_dist --untie-embeddings-and-output-weights",
        "--use-megatron-fsdp --ckpt-format fsdp_dtensor",
    ],
)
def test_fsdp_is_not_told_to_use_one_connection(start_on_hopper, flags):
    """Megatron refuses 1 there."""
    found = "CUDA_DEVICE_MAX_CONNECTIONS 1: .*-fsdp.* more than 1; unset it"
    with pytest.raises(UserError, match=found):
        start_on_hopper("1", f"{flags} --no-gradient-accumulation-fusion")


@pytest.mark.parametrize(
    ("settings", "dtype", "reason"),
    [
        ({"residual_mixing": "identity"}, torch.bfloat16, "residual_mixing='identity' has no"),
        ({"num_streams": 3}, torch.bfloat16, "n=3 is not one of 2, 4, 8"),
        ({}, torch.float16, "torch.float16 has no kernel"),
    ],
)
def test_triton_that_cannot_serve_is_refused_with_its_flag(model_line, settings, dtype, reason):
    with pytest.raises(UserError, match=f"--mhc-backend='triton': {reason}.*use backend='auto'"):
        model_line(arguments(dtype), MHCConfig(backend="triton", **settings))


def divided(implementation: str, backend: str):
    """Arguments of a run with two context-parallel ranks and an attention."""
    environment.prepare()
    from megatron.core.transformer.enums import AttnBackend

    return SimpleNamespace(
        context_parallel_size=2,
        transformer_impl=implementation,
        attention_backend=AttnBackend[backend],
    )


@pytest.mark.parametrize(
    ("implementation", "backend", "message"),
    [
        (
            "local",
            "auto",
            "--context-parallel-size 2: the attention of --transformer-impl local takes whole "
            "sequences only; use 1, or --transformer-impl transformer_engine, which needs a GPU",
        ),
        (
            "transformer_engine",
            "local",
            "--context-parallel-size 2: the attention of --attention-backend local takes whole "
            "sequences only; use 1, or leave --attention-backend out",
        ),
        (
            "transformer_engine",
            "unfused",
            "--context-parallel-size 2: the attention of --attention-backend unfused takes whole "
            "sequences only; use 1, or leave --attention-backend out",
        ),
    ],
)
def test_an_attention_of_whole_sequences_is_refused_at_the_start(
    implementation, backend, message, monkeypatch
):
    args = divided(implementation, backend)
    from megatron_mhc import startup

    monkeypatch.setattr(startup, "parse_and_validate_args", lambda extra_args_provider: args)
    with pytest.raises(UserError) as refusal:
        startup.parse_arguments()
    assert str(refusal.value) == message


def test_transformer_engines_attention_takes_divided_sequences():
    from megatron_mhc.context_parallel import refuse_undivided_attention

    assert refuse_undivided_attention(divided("transformer_engine", "auto")) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [8]),
        ({"pipeline_model_parallel_size": 2}, [4, 4]),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            [2, 2, 2, 2],
        ),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 3}, [3, 5]),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*3|t*5L"},
            [3, 5],
        ),
    ],
    ids=["one", "even", "virtual", "uneven", "layout"],
)
def test_layers_of_every_pipeline_stage(settings, expected):
    environment.prepare()
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc.startup import _stage_layers

    config = TransformerConfig(
        num_layers=8,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_dtype=torch.bfloat16,
        **settings,
    )
    assert _stage_layers(config) == expected


def test_the_factor_of_scaled_positions_reaches_the_model(monkeypatch):
    environment.prepare()
    from megatron_mhc import startup

    forgets = SimpleNamespace(rope_scaling=True, rope_scaling_factor=8.0)
    monkeypatch.setattr(startup, "gpt_config_from_args", lambda args: forgets)
    assert (
        startup._model_config(SimpleNamespace(rope_scaling_factor=32.0)).rope_scaling_factor == 32
    )


def test_what_megatron_refuses_is_one_line(monkeypatch):
    environment.prepare()
    from megatron_mhc import startup

    def refuses(extra_args_provider):
        raise AssertionError("--no-check-for-nan-in-loss-and-grad should be set")

    monkeypatch.setattr(startup, "parse_and_validate_args", refuses)
    with pytest.raises(UserError, match="^Megatron: --no-check-for-nan-in-loss-and-grad should be"):
        startup.parse_arguments()

    def asserts(extra_args_provider):
        save_interval = 0
        assert save_interval > 0

    monkeypatch.setattr(startup, "parse_and_validate_args", asserts)
    with pytest.raises(UserError, match=r"test_startup.py:\d+: assert save_interval > 0\)$"):
        startup.parse_arguments()
