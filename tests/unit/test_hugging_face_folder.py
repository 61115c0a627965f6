"""Folders of safetensors: what is read, written, refused, and that nothing half-done is left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from converted import CONFIG, compare, weights, write_llama
from safetensors.torch import load_file, save_file

from megatron_mhc import MHCConfig
from megatron_mhc.conversion import convert, verify
from megatron_mhc.conversion.architecture import Architecture
from megatron_mhc.conversion.hugging_face_folder import INDEX, Writer
from megatron_mhc.conversion.tensors import places
from megatron_mhc.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> convert.Converted:
    """A plain Llama that has been there and back, so that it has an index."""
    folder = tmp_path_factory.mktemp("made")
    convert.to_megatron(write_llama(folder / "llama"), folder / "megatron")
    return convert.to_hugging_face(folder / "megatron", folder / "back")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(made.hugging_face, tmp_path / "folder")
    return tmp_path / "folder"


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


def test_missing_and_foreign_tensors_are_named(folder, tmp_path):
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].pop("model.norm.weight")
    index["weight_map"] |= dict.fromkeys(["model.q_norm", "model.rotary_emb.inv_freq"], file)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError) as refusal:
        convert.to_megatron(folder, tmp_path / "out")
    assert str(refusal.value).splitlines()[1:] == [
        "model.norm.weight: not in the folder",
        "model.q_norm: has no place in a Llama",
    ]
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
def test_a_damaged_folder_is_one_line(folder, tmp_path, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"--hf {folder}: {message}"):
        convert.to_megatron(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, r"k_proj.weight: \(64, 64\), expected \(32, 64\)"),
        ({"intermediate_size": 80}, r"gate_proj.weight: \(96, 64\), expected \(80, 64\)"),
    ],
)
def test_tensors_of_another_shape_are_refused(folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        convert.to_megatron(folder, tmp_path / "out")


def test_other_dtypes_are_refused(folder, tmp_path):
    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"torch.float64, expected float32, bfloat16 or float16"):
        convert.to_megatron(folder, tmp_path / "out")


def test_what_transformers_cannot_load_is_one_line(made, folder):
    (folder / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(UserError, match=f"--verify: transformers cannot load {folder}: "):
        verify.compare(made.megatron, folder)


def test_a_refusal_leaves_nothing_behind(made, tmp_path):
    with pytest.raises(UserError, match="there is no .*config.json"):
        convert.to_megatron(tmp_path / "nowhere", tmp_path / "a" / "b" / "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="link: exists; give a new folder"):
        convert.to_hugging_face(made.megatron.parent, tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    convert.to_hugging_face(made.megatron.parent, tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()


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
