"""Compression is for language models so far: a vision model ends in one clear message, and nothing is written."""

from pathlib import Path

import pytest
from helpers_front import SHORT, invoke, tree
from helpers_stored import saved
from tiny_models import VISION_FAMILIES, tiny_vision


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16-channel"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_compress_refuses_vision_models(tmp_path: Path, family: str, recipe: str) -> None:
    model = saved(tiny_vision(family), tmp_path / "model")
    before = tree(tmp_path)
    ran = invoke("compress", recipe, "--model", model, "--out", tmp_path / "new" / "out", *SHORT)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert f"a vision model ({family}), so planish cannot compress it" in line
    assert "planish inspect" in line
    assert tree(tmp_path) == before
