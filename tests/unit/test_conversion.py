"""Trained models converted to Hugging Face compute the same; the way back has the same bits."""

import dataclasses
import json
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from converted import compare, weights
from safetensors.torch import load_file, save_file

from megatron_mhc import MHCConfig
from megatron_mhc.checkpoint_guard import check_checkpoint
from megatron_mhc.conversion import convert, megatron_folder, verify
from megatron_mhc.conversion.megatron_arguments import _MEGATRON, from_arguments, to_arguments
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
        again = from_arguments(to_arguments(made.model), "again")
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
        from_arguments(checkpoint.args, "--load x")
    assert str(refusal.value).splitlines() == [
        "--load x: only Llamas, plain or with mHC, are converted",
        "--normalization LayerNorm: a Llama has RMSNorm",
        "--qk-layernorm True: a Llama has none",
        "--mhc-residual-mixing identity: transformers has sinkhorn",
    ]


def test_a_checkpoint_with_other_tensors_is_refused(trained):
    checkpoint = megatron_folder.MegatronCheckpoint(trained["mhc"], None)
    model = from_arguments(checkpoint.args, "x")
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


def test_a_damaged_checkpoint_is_refused_by_a_training_too(trained, tmp_path):
    shutil.copytree(trained["plain"], tmp_path / "damaged")
    (tmp_path / "damaged" / f"iter_{STEPS:07d}" / ".metadata").write_bytes(b"x")
    args = Namespace(load=str(tmp_path / "damaged"), rank=0, mhc=False)
    with pytest.raises(UserError, match=rf"iter_{STEPS:07d}: a file of it is missing or damaged"):
        check_checkpoint(args)


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
