"""A folder of the small training job belongs to one training."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mhc.errors import UserError
from megatron_mhc.small_run import SmallRun
from tests.models import start_megatron


@pytest.fixture
def run(tmp_path) -> SmallRun:
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        (tmp_path / f"data_{name}").touch()
    return SmallRun(tmp_path / "run", tmp_path / "data", "sinkhorn", 500)


def test_the_same_training_may_go_on(run):
    run.claim()
    run.claim()
    assert sorted(path.name for path in run.folder.iterdir()) == ["run.json"]
    assert json.loads((run.folder / "run.json").read_text())["steps"] == 500


def test_a_moved_checkout_goes_on(run, tmp_path):
    run.claim()
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    replace(run, folder=moved / "run", data=moved / "data").claim()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"steps": 200}, "--steps 200: .* was begun with 500; give that, or another --run"),
        ({"mixing": "plain"}, "--mixing plain: .* was begun with sinkhorn"),
        ({"data": Path("/other")}, "--data /other: .* was begun with .*data; give that"),
    ],
)
def test_another_training_is_refused(run, changed, said):
    """Else its checkpoint would not load, or be reported as the other's."""
    run.claim()
    with pytest.raises(UserError, match=said):
        replace(run, **changed).claim()


@pytest.mark.parametrize("mixing", ["plain", "sinkhorn"])
def test_a_run_without_a_note_tells_by_its_checkpoint(run, mixing):
    """Those of earlier versions have none."""
    start_megatron()
    from megatron.core.dist_checkpointing import save

    checkpoints = run.folder / "checkpoints"
    saved = SimpleNamespace(
        mhc=mixing != "plain",
        mhc_residual_mixing=None if mixing == "plain" else mixing,
        train_iters=500,
        train_data_path=[f"{run.data}_train"],
    )
    (checkpoints / "iter_0000500").mkdir(parents=True)
    save({"args": saved}, str(checkpoints / "iter_0000500"))
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("500")
    with pytest.raises(UserError, match="--steps 200: .* was begun with 500"):
        replace(run, mixing=mixing, steps=200).claim()
    with pytest.raises(UserError, match=f"--mixing unconstrained: .* was begun with {mixing}"):
        replace(run, mixing="unconstrained").claim()
    replace(run, mixing=mixing).claim()
    assert (run.folder / "run.json").is_file()


def test_a_file_is_no_folder(run):
    run.folder.write_text("")
    for folder in (run.folder, run.folder / "plain"):
        with pytest.raises(UserError, match=f"--run {folder}: {run.folder} is a file, where"):
            replace(run, folder=folder).claim()


@pytest.mark.parametrize("note", ["{", "[]", '{"steps": 5}'])
def test_a_note_of_something_else_is_named(run, note):
    run.folder.mkdir()
    (run.folder / "run.json").write_text(note)
    with pytest.raises(UserError, match=f"--run {run.folder}: run.json there is not this job's"):
        run.claim()


def test_data_that_is_not_there_claims_no_folder(run):
    """Else the data that was meant would be refused there."""
    (run.data.parent / "data_valid.idx").unlink()
    found = f"--data {run.data}: there is no {run.data}_valid.idx; tools/prepare_data.py makes it"
    with pytest.raises(UserError, match=found):
        run.claim()
    assert not run.folder.exists()
