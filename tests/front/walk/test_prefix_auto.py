"""prefix: auto through the whole compression: the tokens that are outliers stand before every text, none where none is one."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers_compress import VOCABULARY, quick, source, store
from helpers_text import build_tokenizer
from tiny_models import tiny

import planish
from planish.calib.compressed.stored import open_stored
from planish.calib.data.windows import start_token
from planish.compressing.reporting import plan_report
from planish.eval.verifying.probe import check_probe, read_probe

RECIPE = quick("w4a4-fast", "steps=[prefix: {tokens: auto}, hadamard]")


def planted(folder: Path) -> tuple[Path, int]:
    """A model in which the calibration text's most frequent token has a channel of its own, which the first norm makes large."""
    assert RECIPE.calibration is not None
    ids_NL = RECIPE.calibration.tokens(build_tokenizer())
    ((token, _),) = Counter(ids_NL[:, 1:].flatten().tolist()).most_common(1)
    model = tiny("llama", changes={"vocab_size": VOCABULARY})
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 0
        embedding[token] = 0
        embedding[token, 0] = 1
        model.get_submodule("model.layers.0.input_layernorm").weight[0] = 1000
    return store(model, folder), token


@pytest.mark.usefixtures("pythons_text")
def test_outlier_tokens_become_the_prefix(tmp_path: Path) -> None:
    model, token = planted(tmp_path / "model")
    result = planish.compress(RECIPE, model, tmp_path / "out")
    assert result.plan.prefix == (token, start_token(build_tokenizer()))
    assert plan_report(result.plan).prefix == result.plan.prefix
    named = planish.compress(quick("w4a4-fast", f"steps=[prefix: {{tokens: {list(result.plan.prefix)}}}, hadamard]"), model, tmp_path / "named")
    files = [(made.out / "model.safetensors").read_bytes() for made in (result, named)]
    assert files[0] == files[1]


def test_without_outliers_there_is_no_prefix(tmp_path: Path) -> None:
    result = planish.compress(RECIPE, source("llama", tmp_path / "model"), tmp_path / "out")
    assert result.plan.prefix == ()


def test_keys_and_values_are_rounded_to_what_is_stored(tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint in float32 arithmetic too: what is reloaded is what was measured."""
    model = source("llama", tmp_path / "model")
    result = planish.compress(quick("w4a4-fast", "steps=[prefix: {tokens: [5]}, cat: {block: 16}]"), model, tmp_path / "out", dtype=torch.float32)
    probe = read_probe(result.out)
    assert probe is not None
    assert check_probe(open_stored(result.out), probe).identical
