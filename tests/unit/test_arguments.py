"""The --mhc flags: defaults, and every refusal names the flag, the value and the remedy."""

import argparse

import pytest

from megatron_mhc import MHCConfig, environment
from megatron_mhc.errors import UserError


@pytest.fixture(scope="module")
def parser():
    environment.prepare()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mhc.arguments import add_mhc_args

    return add_mhc_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def validate(parser, *words: str) -> MHCConfig | None:
    from megatron_mhc.arguments import validate_mhc_args

    return validate_mhc_args(parser.parse_args(words))


def test_plain_mhc_flag_gives_the_papers_settings(parser):
    assert validate(parser, "--mhc") == MHCConfig(
        num_streams=4,
        sinkhorn_iterations=20,
        init_gating_factor=0.01,
        residual_mixing="sinkhorn",
        eps=1e-6,
        backend="auto",
    )


def test_every_setting_has_its_flag(parser):
    words = "--mhc --mhc-num-residual-streams 8 --mhc-sinkhorn-iterations 5 --mhc-eps 1e-5"
    words += " --mhc-residual-mixing identity --mhc-init-gating-factor 0.1 --mhc-backend torch"
    words += " --mhc-recompute --mhc-recompute-layer-num 3"
    expected = MHCConfig(8, 5, 0.1, "identity", 1e-5, "torch", True, 3)
    assert validate(parser, *words.split()) == expected


@pytest.mark.parametrize("words", [[], ["--mhc", "--mhc-num-residual-streams", "1"]])
def test_no_mhc_and_one_stream_are_the_plain_model(parser, words):
    assert validate(parser, *words) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mhc-eps 1e-6", r"--mhc-eps 1e-06: has no effect without --mhc"),
        ("--mhc-log-gain-interval 5", r"--mhc-log-gain-interval 5: has no effect without --mhc"),
        (
            "--mhc --mhc-num-residual-streams 0",
            r"--mhc-num-residual-streams 0: expected a whole number from 1 to 64",
        ),
        ("--mhc --mhc-sinkhorn-iterations 0", r"--mhc-sinkhorn-iterations 0: expected a whole"),
        ("--mhc --mhc-eps 0.5", r"--mhc-eps 0.5: expected 0 <= eps"),
        ("--mhc --mhc-init-gating-factor 7", r"--mhc-init-gating-factor 7.0: expected -1 to 1"),
        ("--mhc --mhc-log-gain-interval -1", r"--mhc-log-gain-interval -1: expected 0"),
        ("--mhc-recompute", r"--mhc-recompute: has no effect without --mhc; add --mhc"),
        (
            "--mhc --mhc-recompute-layer-num 2",
            r"--mhc-recompute-layer-num 2: has no effect without --mhc-recompute; add it",
        ),
        (
            "--mhc --mhc-recompute --mhc-recompute-layer-num 0",
            r"--mhc-recompute-layer-num 0: expected a number of layers, 1 or more",
        ),
        ("--mhc --bf16 --save runs", r"--save runs: does not .*add it \(on one GPU too\)"),
        ("--mhc --ckpt-format torch", r"--ckpt-format torch: does not work .*use torch_dist"),
        ("--mhc --optimizer-cpu-offload", r"--optimizer-cpu-offload: does not work with --mhc"),
        ("--mhc --use-precision-aware-optimizer", r"--use-precision-aware-optimizer: does not"),
        ("--mhc --inprocess-restart", r"--inprocess-restart: does not work with --mhc yet"),
        ("--mhc --distribute-saved-activations", r"--distribute-saved-activations: does not"),
        (
            "--mhc --pipeline-model-parallel-size 2 --mhc-log-gain-interval 5",
            r"--mhc-log-gain-interval 5: does not work .* layers only; use 0",
        ),
        ("--mhc-pipeline-overlap post", r"--mhc-pipeline-overlap post: has no effect without"),
        (
            "--mhc --mhc-pipeline-overlap none --mhc-pipeline-transport copy",
            r"--mhc-pipeline-transport copy: Megatron sends under --mhc-pipeline-overlap none",
        ),
        (
            "--mhc --mtp-num-layers 1",
            r"--mtp-num-layers 1: does not work with --mhc yet; leave it out with --mhc",
        ),
        ("--mhc --fp32-residual-connection", r"--fp32-residual-connection: does not work"),
        ("--mhc --cuda-graph-impl local", r"--cuda-graph-impl local: .*; use full_iteration, or"),
        (
            "--mhc --cuda-graph-impl full_iteration --pipeline-model-parallel-size 2",
            r"--pipeline-model-parallel-size 2: .* --cuda-graph-impl full_iteration .*; use 1",
        ),
        (
            "--mhc --cuda-graph-impl full_iteration --mhc-log-gain-interval 5",
            r"--mhc-log-gain-interval 5: does not .*--cuda-graph-impl full_iteration .*; use 0",
        ),
        (
            "--mhc --cuda-graph-impl full_iteration --num-experts 4",
            r"--num-experts 4: .* --cuda-graph-impl full_iteration",
        ),
        ("--mhc --optimizer-cuda-graph", r"--optimizer-cuda-graph: does not work with --mhc yet"),
        ("--mhc --transformer-impl inference_optimized", r"--transformer-impl inference_optimized"),
        (
            "--mhc --recompute-granularity selective --recompute-modules mla_up_proj mlp",
            r"--recompute-modules mla_up_proj: does not work with --mhc yet; use some of core_attn",
        ),
        (
            "--mhc --recompute-granularity selective --recompute-modules layernorm",
            r"--recompute-modules layernorm: .* use some of core_attn mlp moe shared_experts,",
        ),
        (
            "--mhc --mhc-recompute --overlap-moe-expert-parallel-comm",
            r"--mhc-recompute: does.* --overlap-moe-expert-parallel-comm cuts the graph",
        ),
        (
            "--mhc --mhc-log-gain-interval 5 --overlap-moe-expert-parallel-comm",
            r"--mhc-log-gain-interval 5: does.* --overlap-moe-expert-parallel-comm runs no layer's",
        ),
        ("--mhc --fine-grained-activation-offloading", r"--fine-grained-activation-offloading"),
        ("--mhc --use-megatron-fsdp", r"--use-megatron-fsdp: .*Megatron's own DDP"),
        ("--mhc --init-model-with-meta-device", r"--init-model-with-meta-device: does not"),
        ("--mhc --spec a b", r"--spec \['a', 'b'\]: .*brings its own"),
        ("--mhc --yaml-cfg x.yaml", r"--yaml-cfg x.yaml: "),
        ("--mhc --hybrid-layer-pattern M*", r"--hybrid-layer-pattern M\*: "),
        ("--mhc --experimental-attention-variant dsa", r"--experimental-attention-variant dsa"),
        ("--mhc --heterogeneous-layers-config-path x", r"--heterogeneous-layers-config-path x"),
        ("--mhc --use-torch-fsdp2", r"--use-torch-fsdp2: "),
    ],
)
def test_refusals_name_flag_value_and_remedy(parser, words, message):
    with pytest.raises(UserError, match=message):
        validate(parser, *words.split())


def test_pipeline_stages_overlap_unless_told_otherwise(parser):
    from megatron_mhc.arguments import validate_mhc_args

    for words, expected in ([], "post"), (["--mhc-pipeline-overlap", "none"], "none"):
        args = parser.parse_args(["--mhc", "--pipeline-model-parallel-size", "4", *words])
        assert validate_mhc_args(args) == MHCConfig()
        assert args.mhc_pipeline_overlap == expected


def test_all_refusals_come_in_one_message(parser):
    with pytest.raises(UserError) as refusal:
        validate(parser, "--mhc", "--mtp-num-layers", "1", "--spec", "a", "b")
    assert len(str(refusal.value).splitlines()) == 2


def test_every_refused_flag_is_one_of_megatrons(parser):
    from megatron_mhc.incompatible import INCOMPATIBLE

    known = {option for action in parser._actions for option in action.option_strings}
    assert {row.flag for row in INCOMPATIBLE} <= known


def test_a_whole_iteration_can_be_a_graph(parser):
    assert validate(parser, "--mhc", "--cuda-graph-impl", "full_iteration") == MHCConfig()


def test_refused_features_are_fine_without_mhc(parser):
    assert validate(parser, "--pipeline-model-parallel-size", "2", "--mtp-num-layers", "1") is None


def test_help_can_be_printed(parser):
    assert "--mhc-sinkhorn-iterations" in parser.format_help()


def test_without_training_nothing_is_saved(parser):
    bf16 = ("--mhc", "--bf16", "--save", "here")
    with pytest.raises(UserError, match="--save here: does not work with --mhc yet"):
        validate(parser, *bf16)
    assert validate(parser, *bf16, "--skip-train") == MHCConfig()


def test_a_checkpoint_that_is_not_on_a_disk_is_not_looked_at(parser):
    from megatron_mhc.checkpoint_guard import check_checkpoint

    args = parser.parse_args(["--mhc", "--load", "msc://bucket/run", "--ckpt-step", "5"])
    (line,) = check_checkpoint(args)
    assert line == "mHC: msc://bucket/run is not on a disk; its mHC settings are not checked"
