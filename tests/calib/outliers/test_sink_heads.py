"""Sink heads: what is measured is what eager attention shows, in every family; and the blocks compute the same bits while they are watched."""

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, RELATIVES, block_calls, tiny, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from planish.calib.blocks.topology import topology
from planish.calib.outliers.diagnosis import Attention, Thresholds
from planish.calib.outliers.sink_heads import AttentionMeter, sink_heads

ROWS = list[list[float]]


def measure(model: PreTrainedModel, batches: list[Tensor]) -> Attention | None:
    """The blocks of a model run one by one and watched; they compute what they compute unwatched."""
    meter = AttentionMeter()
    for ids in batches:
        for layer, call in enumerate(block_calls(model, topology(model.config).blocks, ids)):
            expected = call.run(call.block)
            with meter.watching(layer):
                found = call.run(call.block)
            assert torch.equal(found, expected)
    return meter.result()


def textbook(model: PreTrainedModel, batches: list[Tensor]) -> tuple[ROWS, ROWS]:
    """Scores and drains of all heads by layer, window after window, from eager attention and the key-value cache."""
    model.set_attn_implementation("eager")
    scores, drains = [], []
    for window in torch.cat(batches):
        with torch.no_grad():
            out = model(window[None], output_attentions=True, use_cache=True)
        shares = [weights[0].float() for weights in out.attentions]  # each (heads, queries, keys)
        norms = [layer.values[0].float().norm(dim=-1) for layer in out.past_key_values.layers]  # each (kv heads, tokens)
        scores.append([[head[1:, 0].mean().item() for head in layer] for layer in shares])
        groups = [len(layer) // len(norm) for layer, norm in zip(shares, norms, strict=True)]
        ratios = [[(head[0] / head[1:].median()).item() for head in norm] for norm in norms]
        drains.append([[value for value in layer for _ in range(group)] for layer, group in zip(ratios, groups, strict=True)])
    return torch.tensor(scores).mean(0).tolist(), torch.tensor(drains).mean(0).tolist()


@pytest.mark.parametrize("family", CONFIGS | RELATIVES)
def test_like_eager_attention(family: str) -> None:
    """The window is longer than the text, for the cache keeps no more values than that."""
    model = tiny(family, changes={"sliding_window": 64} if "sliding_window" in (CONFIGS | RELATIVES)[family] else {})
    batches = [tokens(2, 24), tokens(1, 24, seed=5)]
    found, known = measure(model, batches), topology(model.config)
    if known.without_attention:
        assert found is None
        return
    assert found is not None
    score, drain = textbook(model, batches)
    assert found.windows == 3
    torch.testing.assert_close(torch.tensor(found.score), torch.tensor(score), rtol=1e-4, atol=1e-6)
    if known.has_cache:  # else it holds latents, and the textbook's values are none
        torch.testing.assert_close(torch.tensor(found.drain), torch.tensor(drain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gemma2"])
def test_behind_a_window_there_is_no_sink(family: str) -> None:
    """A window of 8 hides token 0 from most of 64 queries."""
    ids = tokens(1, 64)
    narrow, wide = (measure(tiny(family, changes={"sliding_window": window}), [ids]) for window in (8, 64))
    assert narrow is not None
    assert wide is not None
    assert sum(narrow.score[0]) < 0.9 * sum(wide.score[0])
    model = tiny(family, changes={"sliding_window": 8})
    torch.testing.assert_close(torch.tensor(narrow.score), torch.tensor(textbook(model, [ids])[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_in_bfloat16(family: str) -> None:
    exact, rounded = measure(tiny(family), [tokens()]), measure(tiny(family).to(torch.bfloat16), [tokens()])
    assert exact is not None
    assert rounded is not None
    torch.testing.assert_close(torch.tensor(rounded.score), torch.tensor(exact.score), rtol=0.1, atol=0.02)
    torch.testing.assert_close(torch.tensor(rounded.drain), torch.tensor(exact.drain), rtol=0.1, atol=0.02)


VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "dinov2": {"image_size": 28, "patch_size": 7, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@pytest.mark.parametrize("family", VISION)
def test_vision(family: str) -> None:
    """Attention that sees everything; token 0 is the class token."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **VISION[family])).eval()
    images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [b.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True) for b in model.get_submodule(blocks).children()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    meter = AttentionMeter()
    with torch.no_grad():
        for layer, (block, args, kwargs) in enumerate(calls):
            expected = block(*args, **kwargs)
            with meter.watching(layer):
                assert torch.equal(block(*args, **kwargs), expected)
        model.set_attn_implementation("eager")
        attentions = model(images, output_attentions=True).attentions
    found = meter.result()
    assert found is not None
    score = torch.stack([weights[:, :, 1:, 0].mean((0, 2)) for weights in attentions])
    torch.testing.assert_close(torch.tensor(found.score), score, rtol=1e-4, atol=1e-6)
    assert min(map(min, found.drain)) > 0
    assert found.windows == 2


def test_a_head_made_a_sink() -> None:
    """Every query of head 2 is made to look at token 0, whose value in that head is made small."""
    model = tiny("gpt2")
    attention = model.get_submodule("transformer.h.1.attn")
    width, head = 64, slice(32, 48)
    (_, call) = block_calls(model, "transformer.h", tokens(1, 24))
    normed = call.block.get_submodule("ln_1")(call.args[0])[0].detach()
    direction = normed[0] / normed[0].norm()
    weight, bias = attention.c_attn.weight.detach(), attention.c_attn.bias.detach()  # type: ignore[union-attr]
    with torch.no_grad():
        weight[:, :width][:, head] = 0
        bias[:width][head] = 10.0
        weight[:, width : 2 * width][:, head] = direction[:, None]
        values = weight[:, 2 * width :][:, head]
        values -= direction[:, None] * (direction @ values)
        bias[2 * width :][head] = 0
    found = measure(model, [tokens(1, 24)])
    assert found is not None
    (sink,) = sink_heads(found, Thresholds(sink_score=0.8))
    assert (sink.layer, sink.head, sink.dormant) == (1, 2, True)
    assert sink.score > 0.99
    assert sink.drain < 1e-4


def test_which_heads_are_listed() -> None:
    attention = Attention(score=((0.95, 0.29), (0.5, 0.99)), drain=((0.1, 0.1), (0.1, 0.8)), windows=1)
    heads = sink_heads(attention)
    assert [(head.layer, head.head, head.dormant) for head in heads] == [(1, 1, False), (0, 0, True), (1, 0, False)]
    assert [(head.score, head.drain) for head in heads] == [(0.99, 0.8), (0.95, 0.1), (0.5, 0.1)]
    assert [head.dormant for head in sink_heads(attention, Thresholds(value_drain=0.9))] == [True, True, False]


def test_a_model_that_does_not_look_at_values() -> None:
    """Values of a pruned head are all 0: nothing is drained there."""
    model = tiny("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.v_proj").weight.zero_()  # type: ignore[union-attr, operator]
    found = measure(model, [tokens()])
    assert found is not None
    assert found.drain[0] == (1.0,) * 4


def test_without_a_measurement() -> None:
    meter = AttentionMeter()
    assert meter.result() is None
    with meter.watching(0):
        nn.Linear(2, 2)
    assert meter.result() is None


def test_the_table_is_as_before_even_after_an_error() -> None:
    before = AttentionInterface.get_interface
    with AttentionMeter().watching(0):
        assert AttentionInterface.get_interface is not before
    assert AttentionInterface.get_interface is before
    with pytest.raises(ValueError, match="stop"), AttentionMeter().watching(0):
        raise ValueError("stop")
    assert AttentionInterface.get_interface is before
