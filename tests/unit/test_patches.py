"""Patch records: applied whole or not at all, refused on unknown source, undone to the letter."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from megatron_mhc import environment, patches
from megatron_mhc.patches.record import Patch, fingerprint


@pytest.fixture(autouse=True)
def _unpatched():
    environment.prepare()
    patches.undo()
    yield
    patches.undo()


def states() -> dict[str, str]:
    """Of the patches that are needed without a GPU, Transformer Engine and any flag of theirs."""
    rows = {row.patch.name: row.state for row in patches.status()}
    assert rows.pop("te_normalization") == rows.pop("layer_callables") == "skipped"
    return rows


def needed() -> list[Patch]:
    return [patch for patch in patches.PATCHES if patch.name in states()]


def test_every_patch_is_ready_on_the_tested_megatron():
    assert set(states().values()) == {"ready"}
    assert patches.megatron_version() in patches.PATCHES[0].tested


def test_apply_and_undo_leave_megatron_as_it_was():
    before = {patch.name: patch.current() for patch in needed()}
    patches.apply()
    assert set(states().values()) == {"applied"}
    for patch in needed():
        assert patch.current() is not before[patch.name]
    patches.undo()
    assert {patch.name: patch.current() for patch in needed()} == before


def test_the_patch_of_combined_1f1b_knows_the_installed_megatron():
    (patch,) = (patch for patch in patches.PATCHES if patch.name == "layer_callables")
    original = patch.current()
    patches.apply(flags=[patch.with_flag])
    assert patch.current() is not original
    patches.undo()
    assert patch.current() is original


def test_a_model_of_combined_1f1b_needs_its_patch_and_no_recompute():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc import MHCConfig, get_mhc_block_spec

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=2,
        expert_model_parallel_size=2,
        moe_token_dispatcher_type="alltoall",
        overlap_moe_expert_parallel_comm=True,
        add_bias_linear=False,
        bf16=True,
    )
    spec = get_gpt_layer_local_spec(num_experts=2)
    patches.apply()
    with pytest.raises(RuntimeError, match=r"layer_callables is not .*overlap-moe-expert"):
        get_mhc_block_spec(config, spec, MHCConfig(), pp_rank=0)
    patches.apply(flags=["--overlap-moe-expert-parallel-comm"])
    assert len(get_mhc_block_spec(config, spec, MHCConfig(), pp_rank=0).layer_specs) == 1
    with pytest.raises(ValueError, match=r"recompute=True with overlap_moe_expert_parallel_comm"):
        get_mhc_block_spec(config, spec, MHCConfig(recompute=True), pp_rank=0)


def test_applying_twice_patches_once():
    patches.apply()
    after_first = [patch.current() for patch in needed()]
    patches.apply()
    assert [patch.current() for patch in needed()] == after_first


def test_unknown_source_is_refused_and_nothing_is_patched(monkeypatch):
    from megatron.core.datasets import utils

    def compile_helpers():
        """Another version's function."""

    monkeypatch.setattr(utils, "compile_helpers", compile_helpers)
    with pytest.raises(patches.PatchRefused) as refusal:
        patches.apply()
    message = str(refusal.value)
    assert "megatron.core.datasets.utils:compile_helpers" in message
    assert patches.megatron_version() in message
    assert "--mhc-force-patches" in message
    assert fingerprint(compile_helpers) in message
    assert states()["transformer_block"] == "ready"
    assert states()["compile_helpers"] == "refused"
    assert "refused: compile_helpers" in patches.start_up_line()

    patches.apply(force=True)
    assert states()["compile_helpers"] == "applied"
    patches.undo()  # before monkeypatch puts the real function back


def test_start_up_line_says_what_was_applied_and_why_not(monkeypatch):
    patches.apply()
    line = patches.start_up_line()
    assert line.startswith(f"mHC patches on megatron-core {patches.megatron_version()}: applied: ")
    assert "compile_helpers" in line
    patches.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "cpu_initialize (a GPU is here)" in patches.start_up_line()


def test_require_names_the_missing_patch():
    with pytest.raises(RuntimeError, match="patch transformer_block is not applied"):
        patches.require("transformer_block")
    patches.apply()
    patches.require("transformer_block")


def test_a_patch_of_one_flag_waits_for_it(monkeypatch):
    patch = dataclasses.replace(patches.PATCHES[0], name="of_a_flag", with_flag="--mhc-recompute")
    monkeypatch.setattr(patches, "PATCHES", (patch,))
    patches.apply()
    assert "of_a_flag (for --mhc-recompute)" in patches.start_up_line()
    with pytest.raises(RuntimeError, match=r"apply\(flags=\['--mhc-recompute'\]\)"):
        patches.require("of_a_flag")
    patches.apply(flags=["--mhc-recompute"])
    assert "applied: of_a_flag" in patches.start_up_line()
    patches.undo()


def test_plain_models_keep_megatrons_block():
    """Only a spec of ours gets our block, so a plain teacher beside an mHC student stays plain."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_mhc import MHCConfig
    from megatron_mhc.block import MHCTransformerBlock
    from tests.models import build_gpt

    assert type(build_gpt(None).decoder) is TransformerBlock
    assert type(build_gpt(MHCConfig()).decoder) is MHCTransformerBlock


def test_compile_helpers_reports_a_wheel_without_its_extension(monkeypatch):
    from megatron.core.datasets import utils

    patches.apply()
    utils.compile_helpers()  # the wheel has it
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    with pytest.raises(RuntimeError, match="reinstall megatron-core from its wheel"):
        utils.compile_helpers()


def test_a_class_attribute_can_be_a_target():
    patch = Patch("t", "argparse:Namespace.__eq__", "a test", {}, lambda original: original)
    assert callable(patch.current())


def test_module_command_lists_every_patch():
    listing = subprocess.run(
        [sys.executable, "-m", "megatron_mhc.patches"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    for patch in patches.PATCHES:
        assert patch.name in listing
    assert "ready" in listing
