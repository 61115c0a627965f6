"""Checkpoints converted between Megatron and Hugging Face compute the same, to the bit on the way
back, and what cannot be converted is refused."""

import dataclasses
import json
import logging
import runpy
import shutil
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mhc import MHCConfig
from megatron_mhc.checkpoint_guard import check_checkpoint
from megatron_mhc.conversion import convert, megatron_folder, verify
from megatron_mhc.conversion.architecture import (
    _MEGATRON,
    ROPE_SCALING,
    Architecture,
    from_hugging_face,
    from_megatron,
)
from megatron_mhc.conversion.hugging_face_folder import INDEX, HuggingFaceFolder, Writer
from megatron_mhc.conversion.tensors import places
from megatron_mhc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

from training_runs import STEPS, saved_tensors, train  # noqa: E402

# Nothing of the vocabulary's padding, of the layers' number or of the groups is like another.
GROUPED = ["--group-query-attention", "--num-query-groups", "2", "--kv-channels", "16"]
LAYERS = ["--num-layers", "3", "--rotary-base", "20000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """--save folders of a plain and an mHC model, which has other settings than the default."""
    folder = tmp_path_factory.mktemp("trained")
    flags = {
        "plain": [],
        "mhc": ["--mhc", "--mhc-num-residual-streams", "3", "--mhc-sinkhorn-iterations", "7"],
        "bf16": ["--mhc", "--bf16", "--no-save-optim"],
    }
    for name, own in flags.items():
        run = train(*own, *GROUPED, *LAYERS, "--save", folder / name)
        assert run.code == 0, run.tail
    return {name: folder / name for name in flags}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> dict[str, convert.Converted]:
    folder = tmp_path_factory.mktemp("exported")
    return {name: convert.to_hugging_face(path, folder / name) for name, path in trained.items()}


def compare(made: convert.Converted) -> verify.Comparison:
    return verify.compare(made.megatron, made.hugging_face)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: HuggingFaceFolder(folder).read(name) for name in HuggingFaceFolder(folder).files}


def model_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = saved_tensors(folder, step)
    return {k: v for k, v in found.items() if not k.startswith(megatron_folder.NOT_WEIGHTS)}


@pytest.mark.parametrize("name", ["plain", "mhc", "bf16"])
def test_an_export_computes_what_was_trained(exported, name):
    assert compare(exported[name]).same
    report = json.loads((exported[name].hugging_face / convert.REPORT).read_text())
    listed = [own for line in report["tensors"] for own in line["hugging_face"]]
    assert sorted(listed) == sorted(weights(exported[name].hugging_face))


def test_a_checkpoint_of_several_ranks(tmp_path):
    """Queries and both halves of SwiGLU are divided over ranks, layers over stages."""
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    run = train("--mhc", *layout, *GROUPED, "--save", tmp_path / "trained", processes=4)
    assert run.code == 0, run.tail
    assert compare(convert.to_hugging_face(tmp_path / "trained", tmp_path / "hf")).same


def test_an_export_has_the_checkpoints_dtypes(exported):
    for name, tensor in weights(exported["bf16"].hugging_face).items():
        assert tensor.dtype == (torch.float32 if "hc" in name else torch.bfloat16), name


@pytest.mark.parametrize("name", ["plain", "mhc", "bf16"])
def test_the_way_back_has_the_same_bits(exported, trained, tmp_path, name):
    convert.to_megatron(exported[name].hugging_face, tmp_path / "back")
    expected = model_tensors(trained[name], STEPS)
    found = model_tensors(tmp_path / "back", 0)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_mappings_far_from_their_initial_values(exported, tmp_path):
    """A transposed comb, or pre and post exchanged, would show."""
    source = tmp_path / "scrambled"
    shutil.copytree(exported["mhc"].hugging_face, source)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if "hc" in name:
            tensor += torch.randn(tensor.shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    made = convert.to_megatron(source, tmp_path / "megatron")
    assert compare(made).same
    # The same, where it must not agree.
    for name, tensor in tensors.items():
        if name.endswith("hc.base"):
            n = made.model.mhc.num_streams
            tensor[2 * n :] = tensor[2 * n :].view(n, n).T.flatten().clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert not compare(made).same


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    # A head's channels times heads are not the hidden size, as in Mistral Nemo.
    sizes = CONFIG | {"num_key_value_heads": 1, "head_dim": 24, "sliding_window": None}
    model = MistralForCausalLM(MistralConfig(**sizes | {"model_type": "mistral"}))
    model.save_pretrained(tmp_path / "mistral")
    made = convert.to_megatron(tmp_path / "mistral", tmp_path / "megatron", MHCConfig())
    assert compare(made).same
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "mistral")
    assert not compare(made).same


def test_a_tied_embedding_is_the_output_layer_too(exported, tmp_path):
    source = tmp_path / "tied"
    shutil.copytree(exported["plain"].hugging_face, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        convert.to_megatron(source, tmp_path / "megatron")
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    made = convert.to_megatron(source, tmp_path / "megatron")
    assert made.model.tied
    assert compare(made).same
    report = json.loads((tmp_path / "megatron" / convert.REPORT).read_text())
    assert report["left_out"] == ["lm_head.weight"]
    back = convert.to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert "lm_head.weight" not in weights(tmp_path / "back")
    assert compare(back).same


def test_a_training_goes_on_from_an_import(exported, trained, tmp_path):
    """With streams that a plain Llama got, strictly, to the plain model's first loss."""
    made = convert.to_megatron(exported["plain"].hugging_face, tmp_path / "start", MHCConfig())
    assert compare(made).same
    # FLAGS have another number of layers and of a head's channels; the last one counts.
    printed = convert.words(made)
    flags = [*GROUPED, *LAYERS, "--hidden-dropout", "0", "--attention-dropout", "0"]
    plain = train(*flags, "--exit-interval", "1", "--pretrained-checkpoint", trained["plain"])
    mhc = train(*printed, "--exit-interval", "1")
    assert plain.code == mhc.code == 0, plain.tail + mhc.tail
    assert mhc.losses[1] == pytest.approx(plain.losses[1], rel=1e-5)
    assert plain.losses[1] < 4.8, "an untrained model's is ln 128"


@pytest.mark.parametrize(
    ("rows", "said"),
    [(128, None), (192, "the last 64 start from random values"), (120, "the last 8 are lost")],
)
def test_a_vocabulary_padded_otherwise_is_said(trained, rows, said):
    """Megatron loads it without a word, and new rows take part in the loss."""
    args = Namespace(load=str(trained["plain"]), rank=0, mhc=False, padded_vocab_size=rows)
    lines = check_checkpoint(args)
    assert len(lines) == (said is not None)
    if said:
        assert f"has 128 rows of vocabulary, this run {rows}: {said}" in lines[0]


def test_flags_of_a_model_are_those_it_was_trained_with(exported, trained):
    for made in exported.values():
        again = from_megatron(megatron_folder._arguments(made.model), "again")
        assert again.half == ("bf16" if "bf16" in str(made.hugging_face) else None)
        assert again == made.model


def test_settings_that_a_llama_lacks_are_megatrons(trained):
    """A renamed argument would be taken as not set."""
    checkpoint = megatron_folder.MegatronCheckpoint(trained["plain"], None)
    assert [name for name in _MEGATRON if not hasattr(checkpoint.args, name)] == []


def test_what_a_llama_lacks_is_refused(trained):
    checkpoint = megatron_folder.MegatronCheckpoint(trained["mhc"], None)
    checkpoint.args.qk_layernorm = True
    checkpoint.args.normalization = "LayerNorm"
    checkpoint.args.mhc_residual_mixing = "identity"
    with pytest.raises(UserError) as refusal:
        from_megatron(checkpoint.args, "--load x")
    assert str(refusal.value).splitlines() == [
        "--load x: only Llamas, plain or with mHC, are converted",
        "--normalization LayerNorm: a Llama has RMSNorm",
        "--qk-layernorm True: a Llama has none",
        "--mhc-residual-mixing identity: transformers has sinkhorn",
    ]


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


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
        from_hugging_face(CONFIG | change, "--hf x")


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
    model = from_hugging_face(config, "--hf x")
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


def test_large_models_are_written_in_shards(tmp_path):
    tensors = {f"t{i}": torch.randn(10) for i in range(5)}
    writer = Writer(tmp_path, shard_bytes=80)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
        INDEX,
    ]
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": 200}
    (tmp_path / "config.json").write_text("{}")
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, tensors[name])


def test_missing_and_foreign_tensors_are_named(exported, tmp_path):
    source = tmp_path / "changed"
    shutil.copytree(exported["plain"].hugging_face, source)
    index = json.loads((source / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"] |= dict.fromkeys(["model.q_norm", "model.rotary_emb.inv_freq"], file)
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as refusal:
        convert.to_megatron(source, tmp_path / "out")
    assert str(refusal.value).splitlines()[1:] == [
        "model.norm.weight: not in the folder",
        "model.q_norm: has no place in a Llama",
    ]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_other_tensors_is_refused(trained):
    checkpoint = megatron_folder.MegatronCheckpoint(trained["mhc"], None)
    model = from_megatron(checkpoint.args, "x")
    checkpoint.shapes["decoder.layers.extra"] = checkpoint.shapes.pop("output_layer.weight")
    with pytest.raises(UserError) as refusal:
        checkpoint.check(dataclasses.replace(model, ffn=80), places(model))
    said = str(refusal.value)
    assert "output_layer.weight: not in the checkpoint" in said
    assert "decoder.layers.extra: has no place in a Llama" in said
    wider = dataclasses.replace(model, ffn=80)
    with pytest.raises(UserError, match=r"linear_fc1.weight: \(3, 128, 32\), expected \(3, 160, 3"):
        checkpoint.check(wider, places(wider))


def test_verification_builds_what_the_arguments_say(trained):
    """Not what the conversion made of them, which may have overlooked one."""
    checkpoint = megatron_folder.MegatronCheckpoint(trained["plain"], None)
    tokens = torch.arange(20).view(1, 20)
    expected = verify.logits(checkpoint.args, checkpoint.path, tokens)
    checkpoint.args.activation_func_clamp_value = 0.02
    changed = verify.logits(checkpoint.args, checkpoint.path, tokens)
    assert (changed - expected).norm() / expected.norm() > 1e-3


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path):
    for name, damage in (("__0_0.distcp", b""), (".metadata", b"x"), ("metadata.json", b"{}")):
        folder = tmp_path / name
        shutil.copytree(trained["plain"], folder)
        (folder / f"iter_{STEPS:07d}" / name).write_bytes(damage)
        with pytest.raises(UserError, match=rf"{STEPS:07d}: a file of it .* --ckpt-step: 2, 4$"):
            convert.to_hugging_face(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json: no JSON: "),
        ("config.json", "[]", "config.json: expected an object in it"),
        (INDEX, "{}", f"{INDEX}: expected a weight_map of file names in it"),
        (INDEX, '{"weight_map": {"a": null}}', f"{INDEX}: expected a weight_map of file names"),
        (INDEX, '{"weight_map": {"a": "."}}', f"{INDEX}: expected a weight_map of file names"),
        ("model-00001-of-00001.safetensors", "", "model-00001-of-00001.safetensors: "),
    ],
)
def test_a_damaged_folder_is_one_line(exported, tmp_path, name, content, message):
    source = tmp_path / "damaged"
    shutil.copytree(exported["plain"].hugging_face, source)
    (source / name).write_text(content)
    with pytest.raises(UserError, match=f"--hf {source}: {message}"):
        convert.to_megatron(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_groups_that_the_weights_do_not_have_are_refused(exported, tmp_path):
    source = tmp_path / "groups"
    shutil.copytree(exported["plain"].hugging_face, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(UserError, match=r"k_proj.weight: \(32, 32\), expected \(64, 32\)"):
        convert.to_megatron(source, tmp_path / "out")


def test_a_tensor_of_another_shape_is_refused(exported, tmp_path):
    source = tmp_path / "narrow"
    shutil.copytree(exported["plain"].hugging_face, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(UserError, match=r"gate_proj.weight: \(64, 32\), expected \(80, 32\)"):
        convert.to_megatron(source, tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_left(exported, trained, tmp_path):
    convert.to_hugging_face(trained["plain"], tmp_path / "out")
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(UserError, match="out: exists; give a new folder"):
        convert.to_hugging_face(trained["plain"], tmp_path / "out")
    with pytest.raises(UserError, match=r"no complete iteration 5 there; .*: 2, 4, 6$"):
        convert.to_hugging_face(trained["plain"], tmp_path / "new", step=5)
    with pytest.raises(UserError, match="has 3 streams already"):
        convert.to_megatron(exported["mhc"].hugging_face, tmp_path / "new", MHCConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_bytes() == before


def test_a_refusal_leaves_nothing_behind(trained, tmp_path):
    with pytest.raises(UserError, match="there is no .*config.json"):
        convert.to_megatron(tmp_path / "nowhere", tmp_path / "a" / "b" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link: exists; give a new folder"):
        convert.to_hugging_face(trained["plain"], tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    convert.to_hugging_face(trained["plain"], tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()


def test_other_dtypes_are_refused(exported, tmp_path):
    source = tmp_path / "double"
    shutil.copytree(exported["plain"].hugging_face, source)
    (file,) = source.glob("*.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"torch.float64, expected float32, bfloat16 or float16"):
        convert.to_megatron(source, tmp_path / "out")


def test_what_transformers_cannot_load_is_one_line(exported, tmp_path):
    source = tmp_path / "changed"
    shutil.copytree(exported["plain"].hugging_face, source)
    (source / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(UserError, match=f"--verify: transformers cannot load {source}: "):
        verify.compare(exported["plain"].megatron, source)


def test_a_damaged_checkpoint_is_refused_by_a_training_too(trained, tmp_path):
    shutil.copytree(trained["plain"], tmp_path / "damaged")
    (tmp_path / "damaged" / f"iter_{STEPS:07d}" / ".metadata").write_bytes(b"x")
    args = Namespace(load=str(tmp_path / "damaged"), rank=0, mhc=False)
    with pytest.raises(UserError, match=rf"iter_{STEPS:07d}: a file of it is missing or damaged"):
        check_checkpoint(args)


def test_initial_values_are_those_of_a_new_model():
    from tests.models import build_gpt

    expected = dict(build_gpt(MHCConfig(), num_layers=3).named_parameters())
    model = Architecture(3, 64, 160, 4, 2, 16, 128, 64, 1e-5, 1e4, None, False, None, MHCConfig())
    for place in places(model):
        if place.in_float32:
            name = place.key
            if place.layer is not None:
                name = name.replace("layers.", f"layers.{place.layer}.")
            assert torch.equal(convert._initial(model, place), expected[name]), name


class TestCommandLine:
    @pytest.fixture
    def call(self, monkeypatch, capsys):
        def called(*words) -> tuple[int, str, str]:
            name = "convert_checkpoint.py"
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            code = 0
            try:
                with warnings.catch_warnings():
                    runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
            except SystemExit as ended:
                code = ended.code
            finally:
                logging.disable(logging.NOTSET)
            return (code, *capsys.readouterr())

        return called

    def test_both_ways(self, call, trained, tmp_path):
        code, out, _ = call("to-hf", "--load", trained["mhc"], "--out", tmp_path / "hf", "--verify")
        assert code == 0
        assert "relative" in out
        assert "tensors, listed in conversion_report" in out
        back = ["to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "back", "--verify"]
        code, out, _ = call(*back)
        assert code == 0
        assert "relative" in out
        assert f"--pretrained-checkpoint {tmp_path / 'back'} --num-layers 3" in out
        assert "--mhc --mhc-num-residual-streams 3 --mhc-sinkhorn-iterations 7" in out

    def test_a_result_that_computes_something_else_is_an_error(self, call, trained, tmp_path):
        differs = verify.Comparison(64, 1.0, 0.5, 0.1)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(verify, "compare", lambda *_: differs)
            code, _, said = call(
                "to-hf", "--load", trained["plain"], "--out", tmp_path / "hf", "--verify"
            )
        assert code == 2
        assert "does not compute what it was made from" in said

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                "--mhc-eps 0.1",
                "--mhc-eps 0.1: has no effect without --mhc; add --mhc or leave it out",
            ),
            ("--mhc --mhc-eps 0.5", "--mhc-eps 0.5: expected 0 <= eps"),
            ("--mhc --mhc-num-residual-streams 1", "--mhc-num-residual-streams 1: is the plain"),
            ("", "there is no nowhere/config.json; give a folder of save_pretrained"),
        ],
    )
    def test_bad_input_is_one_line(self, call, words, message, tmp_path):
        code, _, said = call(
            "to-megatron", "--hf", "nowhere", "--out", tmp_path / "x", *words.split()
        )
        assert code == 2
        assert f"error: {message}" in said.replace("--hf nowhere: ", "")
        assert not (tmp_path / "x").exists()
