"""Small corpora, and what tools/prepare_data.py made of them, for its tests."""

from pathlib import Path

from megatron_mhc.data import Settings, prepare
from megatron_mhc.data.megatron_io import indexed_dataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_data.py"
EOD = 256
FILES = ["_train.bin", "_train.idx", "_valid.bin", "_valid.idx"]


def quiet(line):
    """Swallows what the tool says."""


def write_corpus(folder, number=40, mark=""):
    """Text files of a few lines each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        text = f"file {index} {mark}\n" + "line of text\n" * (index % 7)
        (folder / f"text{index:03d}.txt").write_text(text)
    return folder


def build(corpus, prefix, **options):
    """Prepare with small chunks and a validation share that leaves both pairs documents."""
    options = {"validation_fraction": 0.3, "chunk_bytes": 700, **options}
    return prepare(Settings(str(prefix), (str(corpus),), **options), say=quiet)


def documents(pair):
    """Token lists of a pair."""
    dataset = indexed_dataset().IndexedDataset(str(pair))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(prefix):
    """Bytes of the published files that are there, by suffix."""
    paths = {end: Path(f"{prefix}{end}") for end in [*FILES, ".json"]}
    return {end: path.read_bytes() for end, path in paths.items() if path.exists()}
