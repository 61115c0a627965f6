"""tools/prepare_data.py and megatron_mhc.data: what is read back, and what a kill leaves."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mhc.data import Settings, UserError, prepare, stdlib_text
from megatron_mhc.data.documents import read_span, spans_of
from megatron_mhc.data.megatron_io import indexed_dataset
from megatron_mhc.data.progress import progress
from megatron_mhc.data.sources import find_sources
from tests.unit.prepared import EOD, FILES, TOOL, build, contents, documents, quiet, write_corpus

# What is read back


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    texts=st.lists(st.binary(min_size=1, max_size=90), min_size=1, max_size=5),
    limit=st.integers(16, 100),
    chunk=st.integers(20, 200),
)
def test_bytes_come_back(texts, limit, chunk):
    texts = [text.replace(b"\0", b"\n") for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        for index, text in enumerate(texts):
            Path(folder, f"{index}.txt").write_bytes(text)
        prefix = Path(folder, "out")
        build(folder, prefix, validation_fraction=0, max_document_bytes=limit, chunk_bytes=chunk)
        back = documents(f"{prefix}_train")
    assert all(document[-1] == EOD and 1 < len(document) <= limit + 1 for document in back)
    assert b"".join(bytes(document[:-1]) for document in back) == b"".join(texts)


def test_one_document_a_file_in_sorted_order(tmp_path):
    for name in ["b/z.txt", "a.txt", "b/a.txt", "c.txt"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    build(tmp_path / "in", tmp_path / "out", validation_fraction=0)
    texts = [bytes(document[:-1]).decode() for document in documents(tmp_path / "out_train")]
    assert texts == ["a.txt", "c.txt", "b/a.txt", "b/z.txt"]
    dataset = indexed_dataset().IndexedDataset(str(tmp_path / "out_train"))
    assert dataset.index.dtype is numpy.uint16
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_same_files_from_a_copy_made_in_another_order(tmp_path, corpus):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in sorted(corpus.iterdir(), reverse=True):
        (copy / path.name).write_bytes(path.read_bytes())
    build(corpus, tmp_path / "one")
    build(copy, tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert [one[end] for end in FILES] == [two[end] for end in FILES]


def test_splits_are_disjoint_complete_and_keep_equal_texts_together(tmp_path, corpus):
    write_corpus(corpus / "again")
    manifest = build(corpus, tmp_path / "out")
    pairs = [documents(tmp_path / f"out_{split}") for split in ("train", "valid")]
    train, valid = ([bytes(document[:-1]) for document in pair] for pair in pairs)
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(p.read_bytes() for p in corpus.rglob("*.txt"))
    assert 0.1 < len(valid) / len(train + valid) < 0.5
    assert manifest["documents"] == {"train": len(train), "valid": len(valid)}
    assert manifest["tokens"]["train"] == sum(map(len, pairs[0]))
    assert manifest["text_bytes"]["valid"] == sum(map(len, valid))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_long_file_is_cut_at_line_starts(tmp_path, suffix):
    lines = [json.dumps({"text": f"é{index}" * (index % 9)}) for index in range(200)]
    path = tmp_path / f"long{suffix}"
    path.write_text("".join(f"{line}\n" for line in lines))
    (source,) = find_sources([str(path)], lambda path: False).sources
    spans = list(spans_of(source, 300))
    data = path.read_bytes()
    assert len(spans) > 10
    assert b"".join(data[span.start : span.end] for span in spans) == data
    assert all(data[span.end - 1 : span.end] == b"\n" for span in spans)
    read = [text for span in spans for _, text in read_span(span, 1000, "text", {})]
    expected = data if suffix == ".txt" else "".join(json.loads(x)["text"] for x in lines).encode()
    assert b"".join(read) == expected


def test_jsonl_takes_the_key_and_counts_bad_records(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"body": "one"}\n\n{"body": 3}\nnot json\n{"body": "\\ud800"}\n{"body": "é"}\n'
    )
    manifest = build(path, tmp_path / "out", validation_fraction=0, json_key="body")
    assert documents(tmp_path / "out_train") == [[*b"one", EOD], [*"é".encode(), EOD]]
    assert manifest["skipped"] == {"bad JSON record": 3}


@pytest.mark.timeout(30)
def test_folder_with_loops_pipes_binaries_and_own_outputs(tmp_path):
    corpus = write_corpus(tmp_path / "in", 10)
    for name in ("loop", "other loop"):
        (corpus / name).symlink_to(corpus)
    (corpus / "gone.txt").symlink_to(corpus / "nowhere")
    (corpus / "twice.txt").symlink_to(corpus / "text001.txt")
    (corpus / ".hidden").write_text("hidden")
    (corpus / "data.bin").write_bytes(b"text\0")
    os.mkfifo(corpus / "pipe")
    manifest = build(corpus, corpus / "out")
    expected = {"binary": 1, "not a regular file": 1, "reached twice": 1, "unreadable": 1}
    assert manifest["skipped"] == expected
    assert sum(manifest["documents"].values()) == 10
    before = contents(corpus / "out")
    build(corpus, corpus / "out")
    assert contents(corpus / "out") == before


# Tokenizers


def hugging_face(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["line of text\n"] * 9, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def sentence_piece(folder, **options):
    import sentencepiece

    folder.mkdir(exist_ok=True)
    with open(folder / "tiny.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["file 0 1 2 3 4 5 6 7 8 9", "line of text"] * 50),
            model_writer=stream,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return folder / "tiny.model"


@pytest.mark.parametrize("case", ["bytes", "huggingface", "huggingface in Python", "sentencepiece"])
def test_tokenizer_is_the_one_its_flags_give_megatron(tmp_path, corpus, case):
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config.training_config import TokenizerConfig
    from transformers import ByT5Tokenizer

    kind, name = case.split()[0], "bytes"
    if case == "huggingface":
        name = hugging_face(tmp_path / "hf", eos_token="<end>")
    elif case == "huggingface in Python":
        name = tmp_path / "byt5"
        ByT5Tokenizer().save_pretrained(name)
    elif kind == "sentencepiece":
        name = sentence_piece(tmp_path / "sp")
    (corpus / "latin.txt").write_bytes("é".encode("latin-1") * 30)
    manifest = build(corpus, tmp_path / "out", tokenizer=str(name))

    flags = manifest["tokenizer_flags"]
    values = {k[2:].replace("-", "_"): v for k, v in zip(flags[::2], flags[1::2], strict=True)}
    megatron = build_tokenizer(TokenizerConfig(**values, pad_vocab_size=False))
    assert manifest["tokenizer"] == kind
    assert (megatron.vocab_size, megatron.eod) == (manifest["vocab_size"], manifest["eod_id"])
    assert manifest["skipped"] == ({} if kind == "bytes" else {"not UTF-8": 1})
    tokens = documents(tmp_path / "out_train") + documents(tmp_path / "out_valid")
    assert max(map(max, tokens)) < megatron.vocab_size
    assert all(document[-1] == megatron.eod for document in tokens)
    if kind != "bytes":
        texts = [path.read_text() for path in corpus.glob("text*.txt")]
        # ByT5 ends each text by itself.
        ids = [megatron.tokenize(text) for text in texts]
        expected = sorted([*i[: -1 if i[-1] == megatron.eod else None], megatron.eod] for i in ids)
        assert sorted(tokens) == expected


# Errors


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "nothing to read"),
        ("nowhere", "input '{}/nowhere': no such file or folder"),
        ("empty", "found 0 bytes of text in {}/empty"),
        ("empty.txt", "passed over: 1 empty"),
        ("binary", "passed over: 1 binary"),
        ("in --min-bytes 9999", "--min-bytes asks for 9999"),
        ("in --tokenizer nowhere", "--tokenizer {}/nowhere: no such file or folder"),
        ("in --tokenizer in", "--tokenizer {}/in: no Hugging Face tokenizer could be loaded"),
        ("in --tokenizer in/text000.txt", "no SentencePiece model could be loaded"),
        ("in --tokenizer no-eos", "no end-of-sequence token to end documents with"),
        ("latin --tokenizer hf", "no text is left of the inputs: skipped {{'not UTF-8': 1}}"),
        ("in --validation-fraction 1", "--validation-fraction 1.0: must be 0 or more, below 1"),
        ("in --validation-fraction 1e-9", "left none of 3 documents for validation"),
        ("in --max-document-bytes 3", "--max-document-bytes 3: must be 16 to"),
        ("in --chunk-bytes 0", "--chunk-bytes 0: must be 1 or more"),
        ("in/a.jsonl --json-key body", "--json-key 'body': no text under it"),
        ("in/a.jsonl --json-key body", "its keys are: text"),
        ("bad.jsonl", "the first line is not JSON"),
        ("in --output-prefix in", "--output-prefix '{}/in' is a folder"),
        ("in --output-prefix empty.txt/out", "out.partial cannot be made (Not a directory)"),
        ("in --output-prefix taken", "taken_train.bin is there without a manifest"),
        ("in --output-prefix other --overwrite", "other.json is not a manifest of this tool"),
        ("in --output-prefix theirs", "theirs.partial holds files that are not this tool's"),
    ],
)
def test_error_names_the_flag_and_writes_nothing(tmp_path, main, capsys, command, message):
    corpus = write_corpus(tmp_path / "in", 2)
    (corpus / "a.jsonl").write_text('{"text": "some"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"\0")
    (tmp_path / "latin").write_bytes(b"\xe9\n")
    (tmp_path / "bad.jsonl").write_text("text\n")
    (tmp_path / "taken_train.bin").write_text("x")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "theirs.partial").mkdir()
    (tmp_path / "theirs.partial" / "thesis").touch()
    if "hf" in command:
        hugging_face(tmp_path / "hf", eos_token="<end>")
    if "no-eos" in command:
        hugging_face(tmp_path / "no-eos")
    before = sorted(tmp_path.rglob("*"))
    words = command.split()
    if "--output-prefix" not in words:
        words += ["--output-prefix", "out"]
    paths = [str(tmp_path / w) if w[0].isalpha() and w != "body" else w for w in words]
    assert main(paths) == 2
    assert message.format(tmp_path) in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_sentencepiece_without_end_token_is_refused(tmp_path, corpus):
    model = sentence_piece(tmp_path / "sp", eos_id=-1)
    with pytest.raises(UserError, match="train the model with an eos_id of 0 or more"):
        build(corpus, tmp_path / "out", tokenizer=str(model))


def test_source_that_changes_while_read_is_refused(tmp_path, corpus):
    (source, *_) = find_sources([str(corpus)], lambda path: False).sources
    (span,) = spans_of(source, 1000)
    reading = read_span(span, 1000, "text", {})
    next(reading)
    (corpus / source.name).write_text("another text")
    with pytest.raises(UserError, match="changed while it was being read"):
        list(reading)


# The standard library and the command line


def test_stdlib_gives_20_megabytes_of_text(tmp_path):
    manifest = prepare(Settings(str(tmp_path / "out"), stdlib=True), say=quiet)
    assert sum(manifest["text_bytes"].values()) >= 20_000_000
    assert manifest["settings"]["source_bytes"] == sum(manifest["text_bytes"].values())
    text = b"".join(bytes(d[:50]) for d in documents(tmp_path / "out_train") if max(d[:50]) < 256)
    assert {b"class", b"import", b"def"} <= set(text.split())


def test_stdlib_takes_installed_modules_only_when_there_is_too_little():
    few = stdlib_text.find_stdlib(1)
    names = [source.name for source in few.sources]
    assert not [name for name in names if name.startswith("installed/")]
    assert {"stdlib/argparse.py", "topics/lambda", "doc/builtins"} <= set(names)
    builtins = few.sources[names.index("doc/builtins")].text
    assert b"builtins.len\n\nReturn the number of items" in builtins
    more = stdlib_text.find_stdlib(few.size + 1_000_000)
    assert few.size + 1_000_000 <= more.size < few.size + 3_000_000
    assert few.digest() == stdlib_text.find_stdlib(1).digest()


def test_stdlib_says_when_it_falls_short(tmp_path, main, capsys):
    command = ["--stdlib", "--min-bytes", "900000000000", "--output-prefix", str(tmp_path / "o")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--stdlib of CPython 3" in error
    assert "--min-bytes asks for 900000000000" in error


def test_plain_progress_counts_only_this_run_for_the_speed(monkeypatch, capsys):
    times = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with progress(total=8_000_000, done=4_000_000) as advance:
        advance(1_000_000)
        advance(1_000_000)
    assert capsys.readouterr().out == "6.0 of 8.0 MB (75%), 0.4 MB/s\n"


def test_progress_bar_on_a_terminal(monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setenv("TERM", "xterm")
    with progress(total=8_000_000, done=4_000_000) as advance:
        advance(2_000_000)
    assert "6.0/8.0 MB" in shown.getvalue()


def test_works_from_a_bare_checkout_without_a_gpu(tmp_path, corpus):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run(
        [sys.executable, TOOL, corpus, "--output-prefix", "new/out", "--validation-fraction=0.3"],
        cwd=tmp_path,
        env={**env, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("prepared: new/out_train (")
    assert sum(len(documents(tmp_path / f"new/out_{s}")) for s in ("train", "valid")) == 40
