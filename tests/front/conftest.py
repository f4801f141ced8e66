"""A tiny model with a tokenizer, the command line in this process, and a cache folder that is not the user's."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers_front import Ran, invoke
from helpers_text import build_tokenizer
from tiny_models import tiny


@pytest.fixture(autouse=True)
def planish_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "demo" not in request.keywords:
        monkeypatch.setenv("PLANISH_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama in bfloat16, in several shards, with a tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny("llama", changes={"vocab_size": 400}).to(torch.bfloat16)
    model.config.dtype = model.dtype
    model.save_pretrained(folder, max_shard_size="60KB")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def planish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ran]:
    """Runs the command line in this process, in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return invoke
