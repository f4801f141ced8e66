"""Shared by all tests: no network, and property tests that do not fail because the machine is busy."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

settings.register_profile("planish", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ)
settings.load_profile("planish")


@pytest.fixture
def pythons_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in text is Python's documentation alone: of a kind with what the test tokenizer is made of, so that few of its tokens are rare."""
    monkeypatch.setattr("planish.calib.data.documents.prose", list)
    monkeypatch.setattr("planish.calib.data.windows._BUILTIN_CHARACTERS", 1 << 12)
