"""Block by block is the whole model: the same logits for every family, with sliding windows shorter than the text, post-norms and projections."""

from pathlib import Path

import pytest
import torch
from helpers_stored import saved
from tiny_models import CONFIGS, tiny, tokens
from torch import Tensor, nn

from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk import runner as runner_module
from planish.calib.walk.runner import BlockRunner

CPU = torch.device("cpu")


def logits_by_block(runner: BlockRunner, batches: list[Tensor]) -> list[Tensor]:
    started = list(runner.start(batches))
    hidden = [h for h, _ in started]
    for index in range(runner.topology.block_count):
        block = runner.load_block(index)
        hidden = [call.run(block, index, h) for h, (_, call) in zip(hidden, started, strict=True)]
        runner.release_block(index)
    with runner.head() as head:
        return [torch.stack([torch.cat(list(head.logits(h_LD))) for h_LD in h]) for h in hidden]


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_block_by_block_is_the_model(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    runner = BlockRunner(open_checkpoint(saved(model, tmp_path / "model")), torch.float32, CPU)
    batches = [tokens(2, 24), tokens(3, 11, seed=2), tokens(1, 24, seed=3)]
    for ids, found in zip(batches, logits_by_block(runner, batches), strict=True):
        expected = model(ids).logits
        assert found.dtype is torch.float32
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert all(parameter.is_meta for parameter in runner.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_window_matters_here(family: str) -> None:
    """The test above would pass without the masks if the window were not shorter than the text: it is."""
    narrow, wide = tiny(family), tiny(family, changes={"sliding_window": 64})
    assert narrow.config.sliding_window == 8
    assert not torch.allclose(narrow(tokens()).logits[:, -1], wide(tokens()).logits[:, -1], rtol=1e-3)


@torch.no_grad()
def test_masks_differ_by_layer_where_the_model_says_so(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny("gemma3_text"), tmp_path / "model")), torch.float32, CPU)
    ((_, call),) = runner.start([tokens()])
    masks = [kwargs["attention_mask"] for _, kwargs in call.extra]
    assert masks[0] is not None
    assert masks[1] is None or not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@torch.no_grad()
def test_batches_of_one_shape_share_their_call(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny("llama"), tmp_path / "model")), torch.float32, CPU)
    calls = [call for _, call in runner.start([tokens(2, 9), tokens(2, 9, seed=5), tokens(1, 9), tokens(2, 9)])]
    assert calls[0] is calls[1] is calls[3]
    assert calls[2] is not calls[0]


@torch.no_grad()
def test_logits_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gemma2")
    runner = BlockRunner(open_checkpoint(saved(model, tmp_path / "model")), torch.float32, CPU)
    monkeypatch.setattr(runner_module, "HEAD_TOKENS", 7)
    (found,) = logits_by_block(runner, [tokens(1, 24)])
    torch.testing.assert_close(found, model(tokens(1, 24)).logits, rtol=1e-4, atol=1e-5)
    with runner.head() as head:
        assert [len(piece) for piece in head.logits(torch.zeros(24, 64))] == [7, 7, 7, 3]


@torch.no_grad()
def test_dtypes_and_release(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny("llama").to(torch.bfloat16), tmp_path / "model")), torch.bfloat16, CPU)
    block = runner.load_block(1)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.bfloat16}
    assert runner.block_name(1) == "model.layers.1"
    assert {parameter.dtype for parameter in runner.load_block(2, torch.float32).parameters()} == {torch.float32}
    runner.release_block(1)
    assert all(parameter.is_meta for parameter in block.parameters())
    ((hidden, _),) = runner.start([tokens(1, 5)])
    assert hidden.dtype is torch.bfloat16


@torch.no_grad()
def test_the_model_is_whole_again_after_an_error(tmp_path: Path) -> None:
    runner = BlockRunner(open_checkpoint(saved(tiny("opt-350m"), tmp_path / "model")), torch.float32, CPU)
    before = dict(runner.model.named_modules())
    with pytest.raises(IndexError):
        list(runner.start([tokens(1, 5) + 10_000]))
    assert dict(runner.model.named_modules()) == before
    with pytest.raises(ValueError, match="stop"), runner.head():
        raise ValueError("stop")
    assert all(parameter.is_meta for parameter in runner.model.parameters())
    assert isinstance(runner.model.get_submodule(runner.topology.blocks), nn.ModuleList)
