"""Data that is not there is said before anything is built."""

import json
from types import SimpleNamespace

import pytest

from megatron_mhc import environment
from megatron_mhc.errors import UserError


@pytest.fixture
def check(tmp_path):
    """refuse_missing_data of arguments, where the pair ``whole`` and half of ``half`` exist."""
    environment.prepare()
    from megatron_mhc.pretraining import refuse_missing_data

    for name in ("whole.bin", "whole.idx", "half.bin"):
        (tmp_path / name).touch()

    def checked(**given):
        names = ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path")
        names += ("valid_data_path", "test_data_path", "mock_data", "per_dataset_sequences_path")
        alone = {"rank": 0, "world_size": 1, "use_tp_pp_dp_mapping": False}
        alone |= {f"{kind}_parallel_size": 1 for kind in ("pipeline_model", "tensor_model")}
        alone |= {"context_parallel_size": 1, "create_attention_mask_in_dataloader": False}
        refuse_missing_data(SimpleNamespace(**{**dict.fromkeys(names), **alone, **given}))

    return checked


def test_what_is_there_is_taken(check, tmp_path):
    whole = str(tmp_path / "whole")
    check(mock_data=True)
    check(data_path=[whole])
    check(data_path=["30", whole, "70", whole])
    check(train_data_path=[whole], valid_data_path=[whole])
    check(data_path=["s3://bucket/data"])


@pytest.mark.parametrize(
    ("flag", "name", "missing"),
    [
        ("--data-path", "none", "none.bin"),
        ("--train-data-path", "half", "half.idx"),
        ("--valid-data-path", "none", "none.bin"),
    ],
)
def test_a_missing_file_is_named(check, tmp_path, flag, name, missing):
    prefixes = ["0.3", str(tmp_path / "whole"), "0.7", str(tmp_path / name)]
    argument = flag[2:].replace("-", "_")
    found = f"{flag} {tmp_path / name}: there is no {tmp_path / missing}; tools/prepare_data.py"
    with pytest.raises(UserError, match=found):
        check(**{argument: prefixes})


def test_a_file_of_prefixes_is_named(check, tmp_path):
    listed = tmp_path / "split.json"
    prefixes = {"train": [str(tmp_path / "whole")], "valid": [str(tmp_path / "half")], "test": None}
    listed.write_text(json.dumps(prefixes))
    with pytest.raises(UserError, match=f"--per-split-data-args-path {listed}: .*half.idx"):
        check(per_split_data_args_path=str(listed))
    listed.write_text(f"1 {tmp_path / 'half'}")
    with pytest.raises(UserError, match=f"--data-args-path {listed}: .*half.idx"):
        check(data_args_path=str(listed))


@pytest.mark.parametrize(
    "flag", ["--data-args-path", "--per-split-data-args-path", "--per-dataset-sequences-path"]
)
def test_a_file_of_prefixes_that_is_not_there_is_named(check, tmp_path, flag):
    listed = str(tmp_path / "none.json")
    with pytest.raises(UserError, match=f"{flag} {listed}: there is no such file"):
        check(**{flag[2:].replace("-", "_"): listed})


@pytest.mark.parametrize("text", ["{", '{"train": ["a"]}', '["a"]', '{"train": 5}'])
def test_a_file_of_other_contents_is_refused(check, tmp_path, text):
    listed = tmp_path / "split.json"
    listed.write_text(text)
    found = f"--per-split-data-args-path {listed}: expected JSON with train, valid and test"
    with pytest.raises(UserError, match=found):
        check(per_split_data_args_path=str(listed))


def test_an_empty_file_of_prefixes_is_refused(check, tmp_path):
    listed = tmp_path / "prefixes"
    listed.touch()
    with pytest.raises(UserError, match=f"^--data-args-path {listed}: expected prefixes"):
        check(data_args_path=str(listed))


@pytest.mark.parametrize(
    ("inner", "outer", "given"),
    [
        # Sixteen ranks: four stages of four in a row; pairs of tensor parallelism of each in turn.
        ([4, 11], [0, 3, 12, 15], {}),
        ([2, 5, 10, 13], [0, 7, 8, 15], {"use_tp_pp_dp_mapping": True}),
        ([], [0, 5, 15], {"create_attention_mask_in_dataloader": True}),
    ],
)
def test_inner_stages_need_no_files(check, tmp_path, inner, outer, given):
    parallel = {"pipeline_model_parallel_size": 4, "tensor_model_parallel_size": 2}
    given = {"world_size": 16, "data_path": [str(tmp_path / "none")], **parallel, **given}
    for rank in inner:
        check(rank=rank, **given)
    for rank in outer:
        with pytest.raises(UserError, match="--data-path .*: there is no .*none.bin"):
            check(rank=rank, **given)


def test_no_data_at_all_is_refused(check):
    with pytest.raises(UserError, match="--data-path: not given; .*tools/prepare_data.py.*--mock"):
        check()
