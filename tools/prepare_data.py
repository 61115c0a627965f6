#!/usr/bin/env python3
"""Turn text into Megatron's .bin and .idx pairs; see docs/data.md."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mhc.data import Settings, UserError, prepare


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 when it cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("inputs", nargs="*", help="text files, .jsonl files, folders of them")
    add("--stdlib", action="store_true", help="take the text of Python's standard library")
    add("--output-prefix", required=True, help="writes PREFIX_train, PREFIX_valid, PREFIX.json")
    add(
        "--tokenizer",
        default=Settings.tokenizer,
        help="'bytes' (default), a Hugging Face tokenizer folder, or a SentencePiece .model file",
    )
    add(
        "--validation-fraction",
        type=float,
        default=Settings.validation_fraction,
        help="share of the documents for validation, 0 for none (default %(default)s)",
    )
    add(
        "--json-key",
        default=Settings.json_key,
        help="field of a .jsonl record that holds the text (default %(default)s)",
    )
    add(
        "--min-bytes",
        type=int,
        help="fewest bytes of text to accept (default 20000000 with --stdlib, else 1)",
    )
    add(
        "--max-document-bytes",
        type=int,
        default=Settings.max_document_bytes,
        help="cut longer texts into documents of at most this size (default %(default)s)",
    )
    add(
        "--chunk-bytes",
        type=int,
        default=Settings.chunk_bytes,
        help="text between two points a killed run can continue from (default %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace what is there under the prefix")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a wrong flag, 1 for a full disk."""
    options = vars(parse(arguments))
    options["inputs"] = tuple(options["inputs"])
    try:
        prepare(Settings(**options))
    except UserError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare_data: {error}; the same command continues from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: stopped; the same command continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
