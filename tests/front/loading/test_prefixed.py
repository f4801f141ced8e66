"""A model with a prefix is called as one without: caches of either kind, padding, going on with a cache, beams, speculation."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_compress import distance, ids, quick, source
from helpers_front import tree
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import planish
from planish.calib.compressed.stored import open_stored
from planish.eval.scores.score import score
from planish.quant.errors import PlanishError
from planish.walk.records import BlockRecord

FINE = ("scheme.weights.bits=8", "scheme.activations.bits=8", "solver=rtn")  # so that last bits move nothing
NEW = 6


def compressed(family: str, folder: Path) -> Path:
    planish.compress(
        quick("w4a4-best", "steps=[prefix: {tokens: [5, 7]}, hadamard]", *FINE), source(family, folder / "model", torch.float32), folder / "out"
    )
    return folder / "out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed("llama", tmp_path_factory.mktemp("prefixed"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return planish.load(checkpoint, device="cpu")


@torch.no_grad()
def grown(model: PreTrainedModel, token_ids: Tensor, count: int = NEW) -> Tensor:
    """Greedy, the whole text anew for every token."""
    for _ in range(count):
        token_ids = torch.cat([token_ids, model(token_ids, use_cache=False).logits[:, -1].argmax(-1)[:, None]], dim=1)
    return token_ids


def generate(model: PreTrainedModel, token_ids: Tensor, **options: Any) -> Tensor:
    found = model.generate(token_ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **options)  # type: ignore[operator]
    assert isinstance(found, Tensor)
    return found


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "speculating": {"prompt_lookup_num_tokens": 2},
    "in-chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_generates_what_whole_passes_say(way: str, model: PreTrainedModel) -> None:
    start = ids()[:1] if way == "speculating" else ids()
    assert torch.equal(generate(model, start, **WAYS[way]), grown(model, start))


@pytest.mark.parametrize("way", ["dynamic", "static"])
def test_padding_on_the_left_changes_nothing(way: str, model: PreTrainedModel) -> None:
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids()], dim=1), torch.cat([padding, torch.ones_like(ids())], dim=1)
    assert torch.equal(generate(model, padded, attention_mask=mask, **WAYS[way])[:, 3:], grown(model, ids()))


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda _model: DynamicCache(), lambda model: StaticCache(config=model.config, max_cache_len=64)])
def test_a_callers_own_cache_goes_on(make: Callable[[PreTrainedModel], Cache], model: PreTrainedModel) -> None:
    """Its length is the text's, and a copy of it is as good."""
    cache, whole = make(model), model(ids()).logits
    first = model(ids()[:, :10], past_key_values=cache).logits
    assert int(cache.get_seq_length()) == 10
    other = copy.deepcopy(cache)
    rest = model(ids()[:, 10:], past_key_values=cache).logits
    assert distance(torch.cat([first, rest], dim=1), whole) < 1e-3  # last bits move a code now and then
    assert torch.equal(generate(model, ids(), past_key_values=other), grown(model, ids()))
    if isinstance(cache, StaticCache):
        cache.reset()
        assert distance(model(ids(), past_key_values=cache).logits, whole) < 1e-3


@torch.no_grad()
def test_beams_are_scored_behind_the_prefix(model: PreTrainedModel) -> None:
    found = model.generate(  # type: ignore[operator]
        ids(), num_beams=3, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    new = found.sequences[:, ids().shape[1] :]
    logprobs = model(found.sequences).logits.log_softmax(-1)[:, ids().shape[1] - 1 : -1].gather(2, new[..., None])[..., 0]
    torch.testing.assert_close(found.sequences_scores * NEW, logprobs.sum(1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_base_model_has_it_too(model: PreTrainedModel) -> None:
    hidden = model.base_model(ids()).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(ids()).logits)


@torch.no_grad()
def test_other_caches_and_masks_are_refused(model: PreTrainedModel) -> None:
    filled = DynamicCache()
    filled.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    for cache, words in (
        (Cache(layers=[]), "takes a DynamicCache or StaticCache"),
        (DynamicCache(offloading=True), "is a offloaded DynamicCache"),
        (filled, "takes an empty cache"),
    ):
        with pytest.raises(PlanishError, match=words):
            model(ids(), past_key_values=cache)
    with pytest.raises(PlanishError, match="attention_mask"):
        model(ids(), attention_mask=torch.ones(2, 1, 24, 24))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "qwen3", "phi3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Positions of their own, windows: cached and padded as whole passes say, and those as planish's evaluation; or refused."""
    out = compressed(family, tmp_path)
    model = planish.load(out, device="cpu")
    logits = model(ids(), use_cache=False).logits.log_softmax(-1)
    nll = -logits[:, :-1].gather(2, ids()[:, 1:, None]).mean()
    assert abs(float(nll) - score(open_stored(out), ids(), dtype=torch.float32).nll) < 1e-5
    expected = grown(model, ids())
    assert torch.equal(generate(model, ids()), expected)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded, mask = torch.cat([padding, ids()], dim=1), torch.cat([padding, torch.ones_like(ids())], dim=1)
    if family == "gemma2":
        with pytest.raises(PlanishError, match="windows count it"):
            generate(model, padded, attention_mask=mask)
        with pytest.raises(PlanishError, match="StaticSlidingWindowLayer"):
            generate(model, ids(), cache_implementation="static")
    else:
        assert torch.equal(generate(model, padded, attention_mask=mask)[:, 3:], expected)


ABSORBED = "smooth: {strength: 0.5}, permute: {block: 4}, rotate: {at: value}"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_its_values_follow_what_the_rows_of_v_absorb(family: str, tmp_path: Path) -> None:
    """The block stays what it was, the model is that with the prefix's tokens in its text, and a run that goes on ends in the same bytes."""
    model = source(family, tmp_path / "model", torch.float32)
    recipe = quick("w4a4-best", f"steps=[prefix: {{tokens: [5, 7]}}, {ABSORBED}]", *FINE)
    done = planish.compress(recipe, model, tmp_path / "out")
    assert all(block.equivalence < 1e-5 for block in done.blocks)
    found, original = planish.load(tmp_path / "out"), planish.load(model)
    before = torch.tensor([[5, 7]]).expand(2, -1)
    assert distance(found(ids()).logits, original(torch.cat([before, ids()], 1)).logits[:, 2:]) < 0.1
    with pytest.raises(KeyboardInterrupt):
        planish.compress(recipe, model, tmp_path / "again", callbacks=[Stopping()])
    planish.compress(recipe, model, tmp_path / "again")
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


class Stopping(planish.Callback):
    """Interrupts behind the first block."""

    def on_block(self, record: BlockRecord) -> None:
        raise KeyboardInterrupt


@torch.no_grad()
@pytest.mark.parametrize("beside", ["", ", low_rank: {rank: 4}", ", svdquant: {rank: 4}", ", super_weight"])
def test_static_scales_stand_behind_it(beside: str, tmp_path: Path) -> None:
    """Neither a prefix nor what runs beside the codes changes inputs after their range was seen."""
    model = source("llama", tmp_path / "model", torch.float32)
    static = ("scheme.activations={bits: 8, symmetric: false, granularity: tensor, dynamic: false}", *FINE[::2])
    recipe = quick("w4a4-best", f"steps=[prefix: {{tokens: [5, 7]}}{beside}]", *static)
    done = planish.compress(recipe, model, tmp_path / "out")
    assert not any(site.made_dynamic for block in done.blocks for site in block.sites.values())
    found, original = planish.load(tmp_path / "out"), planish.load(model)
    before = torch.tensor([[5, 7]]).expand(2, -1)
    assert distance(found(ids()).logits, original(torch.cat([before, ids()], 1)).logits[:, 2:]) < 0.1
    assert torch.equal(generate(found, ids()), grown(found, ids()))
