"""Attention sinks: heads whose queries attend mostly to token 0, and how little they write (Guo, Pai, Bai, Jiao, Jordan and Mei, "Active-Dormant
Attention Heads", 2024, section 2).

Of each head: its sink score, the attention that queries at positions 1 and later give to token 0, on average; and its value drain, the norm of token
0's value vector over the median of the other tokens' norms, on average over samples. A head above sink_score is a sink head. It is dormant if it is
above dormant_score and token 0's value is drained (below value_drain): only then it writes next to nothing; a head that gives everything to a token
with an ordinary value writes a constant.

Every family of transformers asks one table for its attention function. While a block is watched the table hands out one that calls the family's own,
returns what that returns, and calls it a second time with values that are 1 at token 0 and 0 elsewhere: what comes out is the attention given to
token 0, with the masks, windows, soft caps and sink logits of the family, and at the cost and memory of one more attention.

Shape suffixes: B samples, H query heads, K key and value heads, L tokens, D channels of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from .diagnosis import Attention, SinkHead, Thresholds


@dataclass(slots=True)
class AttentionMeter:
    """Measures the attention of the blocks that run while it watches, over any number of batches."""

    _score_H: dict[int, Tensor] = field(default_factory=dict)
    _drain_H: dict[int, Tensor] = field(default_factory=dict)
    _windows: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def watching(self, layer: int) -> Iterator[None]:
        """While the `with` lasts, whatever runs is block `layer`. What it computes is the same, bit for bit."""
        self._windows.setdefault(layer, 0)
        original = AttentionInterface.get_interface

        def get_interface(table: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return self._measured(layer, original(table, name, default))

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            AttentionInterface.get_interface = original  # type: ignore[method-assign]

    def result(self) -> Attention | None:
        """All heads of all layers watched, in the layers' order; None if no layer was, or one has an attention of its own that asks no table."""
        layers = sorted(self._windows)
        if not layers or 0 in self._windows.values():
            return None
        return Attention(
            score=tuple(tuple((self._score_H[layer] / self._windows[layer]).tolist()) for layer in layers),
            drain=tuple(tuple((self._drain_H[layer] / self._windows[layer]).tolist()) for layer in layers),
            windows=self._windows[layers[0]],
        )

    def _measured(self, layer: int, attend: Callable[..., Any]) -> Callable[..., Any]:
        def measured(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
            result = attend(module, query, key, value, attention_mask, *args, **kwargs)
            mask = attention_mask.float() if attention_mask is not None and attention_mask.is_floating_point() else attention_mask
            to_first = torch.zeros_like(value, dtype=torch.float32)
            to_first[:, :, 0] = 1
            shares_BLHD, _ = attend(module, query.float(), key.float(), to_first, mask, *args, **kwargs)
            self._add(layer, shares_BLHD[..., 0].transpose(1, 2), value)
            return result

        return measured

    def _add(self, layer: int, shares_BHL: Tensor, value_BKLD: Tensor) -> None:
        norm_BKL = value_BKLD.float().norm(dim=-1)
        median_BK = norm_BKL[..., 1:].median(-1).values
        drain_BK = torch.where(median_BK > 0, norm_BKL[..., 0] / median_BK, 1.0)
        group = shares_BHL.shape[1] // value_BKLD.shape[1]
        score_H = shares_BHL[..., 1:].mean(-1).sum(0)
        drain_H = drain_BK.repeat_interleave(group, 1).sum(0)
        self._score_H[layer] = self._score_H.get(layer, torch.zeros_like(score_H)) + score_H
        self._drain_H[layer] = self._drain_H.get(layer, torch.zeros_like(drain_H)) + drain_H
        self._windows[layer] = self._windows.get(layer, 0) + len(shares_BHL)


def sink_heads(attention: Attention, thresholds: Thresholds | None = None) -> tuple[SinkHead, ...]:
    """The heads whose sink score is above thresholds.sink_score, the highest score first."""
    limits = thresholds or Thresholds()
    heads = (
        SinkHead(layer=layer, head=head, score=score, drain=drain, dormant=score > limits.dormant_score and drain < limits.value_drain)
        for layer, (scores, drains) in enumerate(zip(attention.score, attention.drain, strict=True))
        for head, (score, drain) in enumerate(zip(scores, drains, strict=True))
        if score > limits.sink_score
    )
    return tuple(sorted(heads, key=lambda head: -head.score))
