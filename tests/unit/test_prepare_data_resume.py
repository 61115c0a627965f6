"""tools/prepare_data.py killed, continued, run again: the same bytes, nothing half-written."""

import os
import signal
import sys
from pathlib import Path

import numpy
import pytest

from megatron_mhc.data import UserError
from megatron_mhc.data.megatron_io import indexed_dataset
from megatron_mhc.data.partial import Partial
from tests.unit.prepared import FILES, build, contents, write_corpus

# Killed, continued, run again


def killed_at(step, corpus, prefix, **options):
    """Run in a child that dies before its step-th change to the disk; whether it died."""
    child = os.fork()
    if child == 0:
        steps = 0

        def count(event, arguments):
            nonlocal steps
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
            if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                steps += 1
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            sys.addaudithook(count)
            build(corpus, prefix, **options)
            code = 0
        finally:
            # Never back into pytest, which the parent runs.
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_at_any_step_then_continued(tmp_path, corpus, replacing):
    indexed_dataset()
    options = {"chunk_bytes": 1500}
    build(corpus, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    manifest = whole.pop(".json").replace(b"whole_", b"out_")
    old = {}
    if replacing:
        other = write_corpus(tmp_path / "other", 12, "other")
        build(other, tmp_path / "first" / "out")
        old = contents(tmp_path / "first" / "out")
        options["overwrite"] = True
    step = 0
    while True:
        step += 1
        prefix = tmp_path / str(step) / "out"
        prefix.parent.mkdir()
        for end, data in old.items():
            Path(f"{prefix}{end}").write_bytes(data)
        if not killed_at(step, corpus, prefix, **options):
            break
        left = contents(prefix)
        for data, index in [FILES[:2], FILES[2:]]:
            if data in left and index in left:
                pair = left[data], left[index]
                assert pair in [(whole[data], whole[index]), (old.get(data), old.get(index))]
        if ".json" in left:
            assert left in [{**whole, ".json": manifest}, old]
        build(corpus, prefix, **options)
        assert contents(prefix) == {**whole, ".json": manifest}
        assert sorted(path.name for path in prefix.parent.iterdir()) == sorted(
            f"out{end}" for end in [*FILES, ".json"]
        )
    assert step > 25


def test_continuing_does_not_write_done_chunks_again(tmp_path, corpus, monkeypatch):
    written = []
    builder = indexed_dataset().IndexedDatasetBuilder
    add_document = builder.add_document

    def add(self, tokens, lengths):
        if len(written) == 25:
            raise OSError("disk full")
        written.append(bytes(tokens[:-1].astype(numpy.uint8)))
        add_document(self, tokens, lengths)

    monkeypatch.setattr(builder, "add_document", add)
    with pytest.raises(OSError, match="disk full"):
        build(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    first, written[:] = list(written), []
    build(corpus, tmp_path / "out")
    assert len(first) == 25
    assert 15 < len(written) < 40


def test_rerun_does_nothing(tmp_path, corpus, main, capsys):
    command = [str(corpus), "--output-prefix", str(tmp_path / "out")]
    command += ["--validation-fraction", "0.3"]
    assert main(command) == 0
    assert "train with: --train-data-path " in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}
    assert len(times) == 5
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"already prepared: {tmp_path / 'out'}_train (")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")} == times


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_fraction": 0.2}, "validation fraction 0.3 then, 0.2 now"),
        ({"max_document_bytes": 16}, "max document bytes 262144 then, 16 now"),
        ("file", "source files 40 then, 41 now"),
        ("edit", "source digest"),
        ("damage", "out_valid.bin has 1 bytes, its manifest says"),
        ("missing", "out_train.idx is missing"),
    ],
)
def test_changed_run_is_refused_and_overwrite_rebuilds(tmp_path, corpus, change, message):
    build(corpus, tmp_path / "out")
    options = change if isinstance(change, dict) else {}
    if change == "file":
        (corpus / "new.txt").write_text("new")
    elif change == "edit":
        (corpus / "text000.txt").write_text("FILE 0 \n")
    elif change == "damage":
        (tmp_path / "out_valid.bin").write_text("x")
    elif change == "missing":
        (tmp_path / "out_train.idx").unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        build(corpus, tmp_path / "out", **options)
    assert "--overwrite" in str(caught.value)
    assert contents(tmp_path / "out") == before
    build(corpus, tmp_path / "out", overwrite=True, **options)
    build(corpus, tmp_path / "fresh", **options)
    rebuilt, fresh = contents(tmp_path / "out"), contents(tmp_path / "fresh")
    assert [rebuilt[end] for end in FILES] == [fresh[end] for end in FILES]


def test_overwrite_without_validation_removes_the_old_validation_pair(tmp_path, corpus):
    build(corpus, tmp_path / "out")
    build(corpus, tmp_path / "out", validation_fraction=0, overwrite=True)
    assert sorted(contents(tmp_path / "out")) == [".json", "_train.bin", "_train.idx"]


def test_two_runs_at_once_are_refused(tmp_path, corpus):
    first = Partial(str(tmp_path / "out.partial")).locked("out")
    with first, pytest.raises(UserError, match="another run is writing it"):
        build(corpus, tmp_path / "out")
    build(corpus, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {*FILES, ".json"}
