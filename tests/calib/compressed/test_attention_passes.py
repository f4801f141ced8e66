"""Attention modules with single passes in them against their own code."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from planish.calib.compressed import attention_passes
from planish.calib.compressed.attention_passes import attend, passes, put_passes
from planish.quant.kernels import native
from planish.quant.kernels.attention import there

needs_it = pytest.mark.skipif(not there(), reason="no compiler, or no AVX512-BF16")


@pytest.fixture(autouse=True)
def no_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def small(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """The same model twice, the second with passes."""
    monkeypatch.setattr(attention_passes, "wins", there)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=64, num_attention_heads=3, num_key_value_heads=1, head_dim=32, num_hidden_layers=2, vocab_size=50
    )
    plain = LlamaForCausalLM(config).bfloat16().eval()
    other = LlamaForCausalLM(config).bfloat16().eval()
    other.load_state_dict(plain.state_dict())
    for block in other.model.layers:
        put_passes(block.self_attn, torch.bfloat16)
    return plain, other


def far(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@needs_it
def test_a_model_with_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = small(monkeypatch)
    assert passes(other.model.layers[1].self_attn) == "rotary embedding in one pass, attention in one pass"
    assert passes(plain.model.layers[1].self_attn) == ""
    used: list[tuple[int, int]] = []
    real = attention_passes.attention
    monkeypatch.setattr(attention_passes, "attention", lambda q, k, v, **n: used.append((q.shape[2], k.shape[2])) or real(q, k, v, **n))
    ids = torch.arange(90).reshape(2, 45) % 50
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for given in ({}, {"attention_mask": mask}):
        assert far(other(ids, **given).logits[:, 6:], plain(ids, **given).logits[:, 6:]) < 0.02
    caches = [StaticCache(config=plain.config, max_cache_len=60) for _ in range(2)]
    for start, end in ((0, 40), (40, 45)):
        outs = [model(ids[:, start:end], past_key_values=cache, use_cache=True).logits for model, cache in zip((other, plain), caches, strict=True)]
        assert far(*outs) < 0.02
    outs = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None) for model in (other, plain)]
    assert torch.equal(*outs)
    assert {(45, 45), (40, 40), (5, 60), (1, 46)} <= set(used)
    other.set_attn_implementation("eager")
    used.clear()
    assert other(ids, output_attentions=True).attentions[0].shape == (2, 3, 45, 45)
    assert not used


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scaling": 0.3},
        {"is_causal": False},
        {"dropout": 0.0, "output_attentions": False, "cache": None},
        {"position_bias": torch.ones(1, 1, 8, 8, dtype=torch.bfloat16).triu()},
    ],
)
@pytest.mark.parametrize("masked", ["no", "bool", "float", "of heads"])
def test_attend_is_what_it_stands_for(given: dict[str, Any], masked: str) -> None:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True  # type: ignore[assignment]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, heads, 32, generator=g).bfloat16().transpose(1, 2) for heads in (4, 2, 2))
    seen = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    mask = {"no": None, "bool": seen, "float": torch.where(seen, 0.0, -1e9).bfloat16(), "of heads": seen.expand(2, 4, 8, 8)}[masked]
    y, weights = attend(module, q, k, v, mask, **given)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, **given)
    assert weights is None
    assert y.shape == expected.shape
    assert far(y, expected) < 0.01


def test_modules_of_other_kinds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_passes, "wins", lambda: False)
    for module in (nn.Linear(2, 2), GPT2Attention.__new__(GPT2Attention)):
        nn.Module.__init__(module) if isinstance(module, GPT2Attention) else None
        kind = type(module)
        put_passes(module, torch.bfloat16)
        assert type(module) is kind
    block = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=5)).model.layers[
        0
    ]
    put_passes(block.self_attn, torch.bfloat16)
    assert passes(block.self_attn) == ("rotary embedding in one pass" if native.found().library else "")
