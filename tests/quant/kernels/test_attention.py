"""Attention in one pass, by AVX512-BF16 and by AVX2, against float64, held to torch's own error in the same type."""

import math

import pytest
import torch
from helpers_native import NO_AVX512, compiled
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from planish.quant.kernels.attention import attention, there
from planish.quant.kernels.native import Found, found

pytestmark = pytest.mark.skipif(not there(), reason="no compiler, or neither AVX512-BF16 nor AVX2 alone")
WIDE = bool(torch.cpu.get_capabilities().get("avx512_bf16"))


@pytest.fixture(scope="module", params=[pytest.param(WIDE, id="own"), *[pytest.param(False, id="AVX2")] * WIDE])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The passes of this processor; where it has AVX-512, those of AVX2, too."""
    return found() if request.param == WIDE else Found(compiled(tmp_path_factory.mktemp("passes"), *NO_AVX512), "for this test")


@pytest.fixture(autouse=True)
def computed_by(library: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planish.quant.kernels.attention.found", lambda: library)


def draw(batches: int, heads: int, tokens: int, width: int, seed: int) -> Tensor:
    """As a model has them: (batches, tokens, heads, width) in memory."""
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batches, tokens, heads, width, generator=g)).bfloat16().transpose(1, 2)


def twin(q: Tensor, k: Tensor, v: Tensor, scale: float, sees: Tensor) -> Tensor:
    """By the book, float64: (B, T, H, D). sees: (B or 1, T, S)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (scale * q.double() @ k.mT).masked_fill(~sees[:, None], -math.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64, 130])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (9, 3), (4, 1)])
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_causal(tokens: int, heads: int, groups: int, width: int) -> None:
    q, k, v = draw(2, heads, tokens, width, 0), draw(2, groups, tokens, width, 1), draw(2, groups, tokens, width, 2)
    y = attention(q, k, v, scale=0.11, causal=True)
    assert y is not None
    assert y.shape == (2, tokens, heads, width)
    expected = twin(q, k, v, 0.11, torch.ones(1, tokens, tokens, dtype=torch.bool).tril())
    torchs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.11, enable_gqa=True).transpose(1, 2)
    assert error(y, expected) <= 1.2 * error(torchs, expected) + 1e-4


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 77), (5, 64), (40, 129), (33, 300)])
@pytest.mark.parametrize("kind", ["all", "some", "one for all", "window", "room behind", "none"])
def test_masks(queries: int, keys: int, kind: str) -> None:
    q, k, v = draw(3, 4, queries, 64, 0), draw(3, 2, keys, 64, 1), draw(3, 2, keys, 64, 2)
    g = torch.Generator().manual_seed(3)
    some = torch.rand(3, queries, keys, generator=g) < 0.3
    window = torch.ones(3, queries, keys).triu(-2).tril(9).bool()
    masks = {
        "all": None,
        "some": some,
        "one for all": some[:1],
        "window": window,
        "room behind": window & (torch.arange(keys) < keys // 3),
        "none": some & False,
    }
    mask = masks[kind]
    y = attention(q, k, v, scale=0.2, mask_BTS=mask)
    assert y is not None
    sees = torch.ones(1, queries, keys, dtype=torch.bool) if mask is None else mask
    assert error(y, twin(q, k, v, 0.2, sees)) < 4e-3
    blind = ~sees.expand(3, -1, -1).any(-1)
    assert not y[blind].any()


def test_large_scores_strides_and_empty_inputs() -> None:
    q, k, v = draw(1, 2, 40, 64, 0), draw(1, 2, 80, 64, 1), draw(1, 2, 80, 64, 2)
    every = torch.ones(1, 40, 80, dtype=torch.bool)
    y = attention(q, k, v, scale=50.0, mask_BTS=every)
    assert y is not None
    assert error(y, twin(q, k, v, 50.0, every)) < 4e-3
    cut = attention(q[:, :, 1::2], k[:, :, ::2], v[:, :, ::2], scale=0.1)
    dense = attention(q[:, :, 1::2].contiguous(), k[:, :, ::2].contiguous(), v[:, :, ::2].contiguous(), scale=0.1)
    assert cut is not None
    assert dense is not None
    assert torch.equal(cut, dense)
    wide = torch.ones(1, 40, 99, dtype=torch.bool)
    masked = attention(q, k, v, scale=0.1, mask_BTS=wide[:, :, 7:87])
    assert masked is not None
    torch.testing.assert_close(masked, attention(q, k, v, scale=0.1))
    for tokens, keys in ((0, 80), (40, 0)):
        empty = attention(q[:, :, :tokens], k[:, :, :keys], v[:, :, :keys], scale=0.1)
        assert empty is not None
        assert empty.shape == (1, tokens, 2, 64)
        assert not empty.any()


def test_a_query_that_is_not_finite_spoils_its_own_outputs_only() -> None:
    q, k, v = draw(1, 2, 40, 64, 0), draw(1, 2, 40, 64, 1), draw(1, 2, 40, 64, 2)
    q[0, 1, 7, 3] = torch.nan
    y = attention(q, k, v, scale=0.1, causal=True)
    assert y is not None
    assert y.isnan().all(-1).nonzero().tolist() == [[0, 7, 1]]
    assert y.isnan().any(-1).sum() == 1
    k[0, 0, 30, 0] = torch.nan  # a key spoils those that see it
    y = attention(q, k, v, scale=0.1, causal=True)
    assert y is not None
    assert y[0, :, 0].isnan().any(-1).nonzero().flatten().tolist() == list(range(30, 40))


def test_where_it_does_not_apply() -> None:
    q = draw(1, 2, 8, 64, 0)
    given = {"scale": 0.1}
    assert attention(q, q, q, **given) is not None
    wide = q.float()
    assert attention(wide, wide, wide, **given) is None
    odd = draw(1, 2, 8, 48, 0)
    assert attention(odd, odd, odd, **given) is None
    assert attention(q, q, q, scale=0.0) is None
    assert attention(q, q, q.transpose(2, 3).contiguous().transpose(2, 3), **given) is None
    assert attention(q, draw(1, 3, 8, 64, 1), draw(1, 3, 8, 64, 1), **given) is None
    assert attention(q, q, q, mask_BTS=torch.zeros(1, 8, 8), **given) is None
    assert attention(q, q, q, mask_BTS=torch.ones(1, 8, 9, dtype=torch.bool), **given) is None
    assert attention(q.requires_grad_(), q, q, **given) is None
    with torch.no_grad():
        assert attention(q, q, q, **given) is not None


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_and_one_graph(masked: bool) -> None:
    q, k, v = draw(2, 4, 9, 64, 0), draw(2, 2, 9, 64, 1), draw(2, 2, 9, 64, 2)
    mask = torch.ones(1, 9, 9, dtype=torch.bool).tril() if masked else None
    torch.library.opcheck(torch.ops.planish.attention, (q, k, v, mask, 0.1, not masked))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, scale=0.1, causal=not masked, mask_BTS=mask), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q, k, v, scale=0.1, causal=not masked, mask_BTS=mask))
