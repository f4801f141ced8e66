"""A checkpoint folder to open and to break, and a cache folder that is not the user's."""

from pathlib import Path

import pytest
from helpers_checkpoint import llama


@pytest.fixture(autouse=True)
def planish_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    if "demo" not in request.keywords:
        monkeypatch.setenv("PLANISH_CACHE", str(folder))
    return folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A tiny tied Llama in bfloat16, in several shards, with a tokenizer."""
    return llama(tmp_path / "model")
