"""What README and docs/ tell a reader to type works: every command in them is run by a test."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc import MHCConfig, environment, patches

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text()

# Commands whose test is elsewhere, by their beginning.
TESTED_ELSEWHERE = {
    "make test": "this run",
    "pip install": "test_packaging.py builds and imports the wheel; the rest was run by hand",
    "nvidia=": "by hand",
    "python -c": "by hand",
    "python -m megatron_mhc.patches": "test_patches.py",
    "python tools/prepare_data.py": "test_prepare_data*.py",
    "python tools/benchmark_pipeline.py --estimate": "test_pipeline_report.py",
    "python3 tools/benchmark_": "run on the H200; its output stands below the command",
    "python3 -m pytest tests/gpu": "run on the H200; its result stands below the command",
    "python3 tools/sweep_kernels.py": "run on the H200; its output stands below the command",
}
TESTED_HERE = {
    "make pretrain",
    "make compare",
    "torchrun",
    "bash examples/pretrain_cpu.sh",
    "bash examples/pretrain_node.sh",
    "sbatch examples/pretrain_slurm.sh",
    "python tools/diagnose.py",
    "python tools/convert_checkpoint.py",
    "python tools/estimate_memory.py",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands() -> list[str]:
    lines = [
        line
        for page in PAGES
        for block in blocks(page.read_text(), "console")
        for line in block.splitlines()
    ]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def run(command: list[str] | str, **environment_: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **environment_},
        shell=isinstance(command, str),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def make(target: str, folder: Path) -> str:
    settings = [f"DATA={folder / 'stdlib'}", f"RUN={folder}", "STEPS=4", f"PY={sys.executable}"]
    quiet = ["--no-print-directory", "-o", ".venv/.ready"]  # make test runs this inside make
    return run(["make", *quiet, target, *settings])


def test_every_command_has_its_test():
    assert len(commands()) > 8
    for command in commands():
        bare = re.sub(r"^(\w+=\S+ )+", "", command)
        known = [*TESTED_ELSEWHERE, *TESTED_HERE]
        assert any(text.startswith(name) for text in (command, bare) for name in known), command


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("pretrain")
    return folder, make("pretrain", folder)


def test_make_pretrain_ends_with_its_line(pretrained):
    folder, output = pretrained
    line = output.strip().splitlines()[-1]
    number = r"-?\d+\.\d{4}"
    pattern = (
        rf"mhc-pretrain: steps=4 train_loss_first={number} train_loss_last={number} "
        rf"val_loss={number} max_gain={number} checkpoint=(\S+) plot=(\S+)"
    )
    found = re.fullmatch(pattern, line)
    assert found, line
    assert (Path(found[1]) / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert Path(found[2]).read_bytes().startswith(b"\x89PNG")


def test_make_pretrain_again_reports_the_finished_run(pretrained):
    folder, output = pretrained
    again = make("pretrain", folder)
    assert "is finished" in again
    assert again.strip().splitlines()[-1] == output.strip().splitlines()[-1]


def test_diagnose_prints_and_draws_the_run(pretrained, tmp_path):
    folder, _ = pretrained
    plot = tmp_path / "gains.png"
    run_folder = str(folder / "pretrain" / "tensorboard")
    output = run([sys.executable, "tools/diagnose.py", run_folder, "--plot", str(plot)])
    assert "max composite gain" in output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_conversion_page_runs(pretrained, tmp_path, monkeypatch, capsys):
    folder, _ = pretrained
    page = (ROOT / "docs" / "conversion.md").read_text()
    made = {"runs/": f"{folder}/", "--out ": f"--out {tmp_path}/", "--hf ": f"--hf {tmp_path}/"}
    for command in [command for command in commands() if "convert_checkpoint" in command]:
        for given, here in made.items():
            command = command.replace(given, here)
        output = run(command)
        for said in (
            "54 tensors, listed in conversion_report.json",
            "logits of 64 tokens in float32",
        ):
            assert said in page
            assert said in output
    assert "train it with: --pretrained-checkpoint" in output
    (block,) = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert capsys.readouterr().out.startswith("import os\n")


def test_make_compare_draws_three_models_in_one_plot(tmp_path):
    output = make("compare", tmp_path)
    for name in ("plain", "unconstrained", "sinkhorn"):
        assert (tmp_path / "compare" / name / "tensorboard").is_dir()
        assert name in output
    assert (tmp_path / "compare" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_readme_torchrun_command():
    (command,) = [command for command in commands() if "torchrun" in command]
    assert "lm loss" in run(command, OMP_NUM_THREADS="1")


def test_cpu_launch_script_with_recompute():
    output = run(["bash", "examples/pretrain_cpu.sh", "--mhc-recompute"])
    assert "mHC recompute: blocks of N=1 in a stage of 2 layers (eq. 20)" in output
    assert "iteration       10/      10" in output


def test_memory_page_shows_what_the_tool_prints():
    page = (ROOT / "docs" / "memory.md").read_text()
    (command,) = [line for line in commands() if "estimate_memory.py" in line]
    rows = [line for line in run(command).splitlines() if re.match(r"│ +\d", line)]
    assert len(rows) == 2
    for row in rows:
        assert row.strip() in page


@pytest.fixture(scope="module")
def parser():
    environment.prepare()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mhc.arguments import add_mhc_args

    return add_mhc_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.mark.parametrize("fp8", ["", "tensorwise", "blockwise"])
@pytest.mark.parametrize("script", ["pretrain_node.sh", "pretrain_slurm.sh"])
def test_gpu_launch_scripts_give_flags_that_the_parser_takes(script, fp8, parser, tmp_path):
    from megatron_mhc.arguments import validate_mhc_args

    for name, body in {"scontrol": "echo host1", "srun": '"$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "host1", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    output = run(
        f"PATH={tmp_path}:$PATH bash examples/{script} --train-iters 7",
        **{**slurm, "TORCHRUN": "echo", "DATA": "d", "OUT": "o", "FP8": fp8},
    )
    words = shlex.split(output)
    flags = words[next(i for i, word in enumerate(words) if word.endswith("pretrain_gpt.py")) + 1 :]
    args = parser.parse_args(flags)
    assert validate_mhc_args(args) == MHCConfig()
    assert args.train_iters == 7
    assert (args.fp8_recipe == fp8) if fp8 else args.fp8 is None


@pytest.mark.parametrize(
    ("flags", "connections", "gains"),
    [
        ("", "32", True),
        ("--tensor-model-parallel-size 1", "32", True),
        ("--lr 1 --tensor-model-parallel-size=2", "1", True),
        ("--context-parallel-size 4", "1", True),
        ("--pipeline-model-parallel-size 16 --lr 1", "32", False),
    ],
)
def test_launch_scripts_do_what_parallelism_needs(flags, connections, gains, tmp_path):
    launcher = tmp_path / "torchrun"
    launcher.write_text('#!/bin/sh\necho "connections=$CUDA_DEVICE_MAX_CONNECTIONS $*"\n')
    launcher.chmod(0o755)
    output = run(
        f"env -u CUDA_DEVICE_MAX_CONNECTIONS bash examples/pretrain_node.sh {flags}",
        **{"TORCHRUN": str(launcher), "DATA": "d", "OUT": "o"},
    )
    assert f"connections={connections} " in output
    assert ("--mhc-log-gain-interval 100" in output) is gains


def test_launch_scripts_name_what_is_missing():
    done = subprocess.run(
        ["bash", "examples/pretrain_node.sh"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "set DATA to the prefix given to tools/prepare_data.py" in done.stderr


def test_flag_table_is_the_parsers(parser):
    from megatron_mhc.arguments import DEFAULTS

    rows = dict(re.findall(r"^\| `(--mhc[\w-]*)` \| (\S+) \|", README, flags=re.M))
    group = next(group for group in parser._action_groups if group.title == "mHC")
    expected = {}
    for action in group._group_actions:
        default = DEFAULTS.get(action.dest, action.default)
        words = {"False": "off", "None": "auto"}
        expected[action.option_strings[0]] = words.get(str(default), str(default))
    assert rows == expected


def test_readme_python_runs(monkeypatch):
    first, second = blocks(README, "python")
    names: dict = {}
    exec(first, names)
    assert names["h"].shape == (16, 2, 64)

    environment.prepare()
    from megatron.core.models.gpt import gpt_layer_specs as specs

    from megatron_mhc.block import MHCTransformerBlock
    from tests.models import build_gpt

    # Transformer Engine needs a GPU; tests/gpu has its turn.
    name = "get_gpt_layer_with_transformer_engine_spec"
    monkeypatch.setattr(specs, name, specs.get_gpt_layer_local_spec)
    names = {"config": build_gpt(None).config}
    exec(second, names)
    assert isinstance(names["model"].decoder, MHCTransformerBlock)


def test_the_kernels_page_runs():
    (block,) = blocks((ROOT / "docs/kernels.md").read_text(), "python")
    names: dict = {}
    exec(block, names)
    assert names["h"].shape == (32, 256)
    assert names["x"].shape == (32, 4, 256)


def test_the_patches_page_has_every_patch():
    rows = re.findall(r"^\| ([\w, ]+) \| `", (ROOT / "docs/patches.md").read_text(), flags=re.M)
    names = [name for row in rows for name in row.split(", ")]
    assert sorted(names) == sorted(patch.name for patch in patches.PATCHES)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
