"""A training that was killed goes on as if it had not been, and never from a broken checkpoint."""

import re
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from training_runs import SAVE_INTERVAL, STEPS, Run, saved_tensors, train

TRACKER = "latest_checkpointed_iteration.txt"
KILLED_IN = {"training": 3, "shard": 4, "tracker": 4}
"""Where the kill hits (see kill_training.py) to the step."""
LAST_WHOLE = {"training": 2, "shard": 2, "tracker": 4}
"""Where the kill hits to the newest checkpoint that is whole after it."""
LOG_PRECISION = 1e-6
"""Losses are printed with 7 digits; that weights agree to the last bit is a test of its own."""
CHANGED = {
    "--mhc-num-residual-streams": ("2", "4"),
    "--mhc-residual-mixing": ("identity", "sinkhorn"),
    "--mhc-sinkhorn-iterations": ("5", "20"),
    "--mhc-eps": ("0.0001", "1e-06"),
}
"""Flag to the value now and the checkpoint's."""


@dataclass(frozen=True)
class Interrupted:
    """A training that was killed, and its continuation.

    Attributes:
        killed, resumed: the two runs.
        tracker: what the kill left in Megatron's file that names the newest checkpoint.
        sizes: iteration to the bytes of weights that the kill left.
        whole: iterations whose checkpoint had its last file.
    """

    killed: Run
    resumed: Run
    tracker: str
    sizes: dict[int, int]
    whole: list[int]


def interrupt(folder: Path, point: str) -> Interrupted:
    flags = ("--mhc", "--save", folder, "--load", folder)
    killed = train(*flags, through=("kill_training.py", point, KILLED_IN[point]))
    tracker = folder / TRACKER
    left = tracker.read_text() if tracker.is_file() else "none"
    shards = {int(path.parent.name[5:]): path.stat().st_size for path in folder.glob("*/*.distcp")}
    whole = sorted(int(path.parent.name[5:]) for path in folder.glob("*/metadata.json"))
    return Interrupted(killed, train(*flags), left, shards, whole)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def runs(folder):
    """Every training of this file by name, as futures: two at a time, one per core."""
    mhc, plain = folder / "uninterrupted", folder / "plain"

    def uninterrupted_and_others() -> dict[str, Run]:
        """The first run, and those that only read its checkpoint."""
        changed = [part for flag, (now, _) in CHANGED.items() for part in (flag, now)]
        # The gating factor is an initial value: it does not matter to a checkpoint.
        tp2 = ("--tensor-model-parallel-size", 2, "--mhc-init-gating-factor", 0.02)
        small = ("--eval-micro-batch-size", 1, "--eval-global-batch-size", 2)
        return {
            "uninterrupted": train("--mhc", "--save", mhc),
            "tp2": train("--mhc", "--load", mhc, *tp2, processes=2),
            "changed": train("--mhc", "--load", mhc, *changed),
            "other evaluation": train("--mhc", "--load", mhc, *tp2, *small, processes=2),
            "mhc to plain": train("--load", mhc),
            "pretrained": train("--mhc", "--pretrained-checkpoint", mhc, *changed),
            "no such step": train("--mhc", "--load", mhc, "--ckpt-step", 5),
            "evaluated": train("--mhc", "--load", mhc, "--skip-train"),
        }

    def in_bf16() -> Run:
        flags = ("--bf16", "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
        return train("--mhc", *flags, "--save", folder / "bf16", processes=2)

    def from_plain() -> dict[str, Run]:
        made = train("--save", plain, "--exit-interval", SAVE_INTERVAL)
        assert made.code == 0, made.tail
        start = ("--pretrained-checkpoint", plain, "--exit-interval", 1)
        return {
            "refused": train("--mhc", "--load", plain),
            "plain": train(*start),
            "mhc": train("--mhc", *start, "--dist-ckpt-strictness", "log_unexpected"),
        }

    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future] = {"reading": pool.submit(uninterrupted_and_others)}
        for point in LAST_WHOLE:
            futures[point] = pool.submit(interrupt, folder / point, point)
        futures["bf16"] = pool.submit(in_bf16)
        futures["from plain"] = pool.submit(from_plain)
        yield futures


@pytest.fixture(scope="module")
def uninterrupted(runs) -> Run:
    run = runs["reading"].result()["uninterrupted"]
    assert run.code == 0, run.tail
    assert list(run.losses) == list(range(1, STEPS + 1)), run.tail
    return run


@pytest.mark.parametrize("point", LAST_WHOLE)
def test_a_killed_training_goes_on_with_the_same_losses(runs, uninterrupted, point):
    run, last = runs[point].result(), LAST_WHOLE[point]
    assert run.killed.code == -signal.SIGKILL, run.killed.tail
    before = {step: uninterrupted.losses[step] for step in run.killed.losses}
    assert max(before) == KILLED_IN[point], run.killed.tail
    assert run.killed.losses == pytest.approx(before, rel=LOG_PRECISION), run.killed.tail

    assert run.resumed.code == 0, run.resumed.tail
    after = {step: loss for step, loss in uninterrupted.losses.items() if step > last}
    assert run.resumed.losses == pytest.approx(after, rel=LOG_PRECISION), run.resumed.tail


@pytest.mark.parametrize("point", LAST_WHOLE)
def test_it_ends_with_the_same_weights_and_optimizer(runs, uninterrupted, folder, point):
    """Bit by bit, also in the checkpoint whose first save was killed."""
    runs[point].result()
    for step in range(2 * SAVE_INTERVAL, STEPS + 1, SAVE_INTERVAL):
        expected = saved_tensors(folder / "uninterrupted", step)
        found = saved_tensors(folder / point, step)
        assert sum("hyper" in name for name in expected) == 3 * 3 * 3, "weight and two moments"
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (step, name)


def test_a_kill_while_weights_are_written_leaves_the_last_checkpoint(runs):
    run = runs["shard"].result()
    assert run.tracker == "2"
    assert run.whole == [2]
    assert 0 < run.sizes[4] < run.sizes[2], "the file was to be cut off"


def test_an_emptied_tracker_is_repaired_aloud(runs, folder):
    run = runs["tracker"].result()
    assert run.tracker == ""
    assert run.whole == [2, 4]
    (line,) = re.findall(r"mHC: .*cut off.*", run.resumed.log)
    assert str(folder / "tracker" / TRACKER) in line
    assert line.endswith("resuming from the last complete checkpoint, 4")


def test_other_mhc_settings_are_refused(runs, folder):
    run = runs["reading"].result()["changed"]
    assert run.code == 2, run.tail
    assert f"--load {folder / 'uninterrupted'}" in run.log
    for flag, (now, saved) in CHANGED.items():
        assert f"{flag} {now}: iter_0000006 was made with {saved}\n" in run.log, run.tail
    assert not run.losses


def test_a_pretrained_checkpoint_is_looked_at_too(runs, folder):
    run = runs["reading"].result()["pretrained"]
    assert run.code == 2, run.tail
    assert f"--pretrained-checkpoint {folder / 'uninterrupted'}" in run.log
    assert "--mhc-sinkhorn-iterations 5: iter_0000006 was made with 20" in run.log, run.tail


def test_a_step_that_is_not_there_is_named(runs, folder):
    run = runs["reading"].result()["no such step"]
    assert run.code == 2, run.tail
    said = "--ckpt-step 5 names iter_0000005, which is not there; complete iterations: 2, 4, 6"
    assert f"--load {folder / 'uninterrupted'}: {said}" in run.log, run.tail


def test_skip_train_evaluates_the_checkpoint(runs):
    trained, run = (runs["reading"].result()[name] for name in ("uninterrupted", "evaluated"))
    assert run.code == 0, run.tail
    assert not run.losses
    assert run.validation_loss == pytest.approx(trained.validation_loss, rel=LOG_PRECISION)
    assert "on test set | lm loss value" in run.log


def test_a_plain_checkpoint_is_refused_with_mhc(runs):
    run = runs["from plain"].result()["refused"]
    assert run.code == 2, run.tail
    assert "iter_0000002 was made without --mhc, this run is with" in run.log, run.tail
    assert "--pretrained-checkpoint with --dist-ckpt-strictness log_unexpected" in run.log


def test_mhc_starts_where_a_plain_model_stands(runs):
    """Its mappings have their initial values, with which it computes what the plain one does."""
    plain, mhc = (runs["from plain"].result()[name] for name in ("plain", "mhc"))
    assert plain.code == mhc.code == 0, mhc.tail
    assert "is a plain model's; mappings start from initial values" in mhc.log
    assert mhc.losses[1] == pytest.approx(plain.losses[1], rel=1e-5)
    assert mhc.losses[1] < 0.99 * runs["reading"].result()["uninterrupted"].losses[1]


def test_an_mhc_checkpoint_is_refused_without_mhc(runs):
    run = runs["reading"].result()["mhc to plain"]
    assert run.code == 2, run.tail
    assert "iter_0000006 was made with --mhc, this run is without; add --mhc" in run.log, run.tail


def test_tensor_parallel_2_loads_what_1_saved(runs, uninterrupted):
    run = runs["reading"].result()["tp2"]
    assert run.code == 0, run.tail
    assert not run.losses, "the training was over: it only evaluates"
    assert run.validation_loss == pytest.approx(uninterrupted.validation_loss, rel=1e-5)


def test_evaluation_may_have_other_micro_batches(runs, uninterrupted):
    run = runs["reading"].result()["other evaluation"]
    assert run.code == 0, run.tail
    assert run.validation_loss == pytest.approx(uninterrupted.validation_loss, rel=0.1)


def test_a_bf16_model_saves_every_parameters_own_state(runs, folder):
    """Of float32 mappings too, which an optimizer lists before the others of their group."""
    run = runs["bf16"].result()
    assert run.code == 0, run.tail
    saved = saved_tensors(folder / "bf16", STEPS)
    weights = {name: tensor for name, tensor in saved.items() if name.startswith("decoder.")}
    assert sum("hyper" in name for name in weights) == 3 * 3
    for name, weight in weights.items():
        master = saved[f"optimizer.state.param.{name}"]
        assert master.shape == saved[f"optimizer.state.exp_avg.{name}"].shape == weight.shape
        assert torch.equal(master.to(weight.dtype), weight), name
        assert weight.dtype == (torch.float32 if "hyper" in name else torch.bfloat16)
