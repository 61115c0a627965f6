"""Fixtures of the data preparation tests."""

import importlib.util

import pytest

from tests.unit.prepared import TOOL, write_corpus


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture(scope="module")
def main():
    """The command line's main function."""
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
