"""A model that is called as if nothing stood before its texts, while the prefix does: forward passes, and all that generate() does with its caches.

The prefix lies in the caches; positions and masks count from behind it. Outside of forward passes a cache's length is that of the text, for callers
cut their ids by it; inside, it is that of all keys, for masks are made by it.
"""

import inspect
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.utils.generic import ModelOutput

from ...quant.errors import PlanishError
from ..blocks.prefix import PrefixCache
from ..blocks.topology import topology


class _Prefixed(Cache):
    """Of a cache that begins with the prefix. filled: it is in there, known without asking a GPU for a length; running: while the model runs."""

    prefix_length = 0
    filled = False
    running = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the text; while the model runs, with the prefix."""
        whole: int = super().get_seq_length(layer_idx)  # type: ignore[no-untyped-call, unused-ignore]
        return whole if self.running or not whole else whole - self.prefix_length

    def reset(self) -> None:
        """Empty it."""
        super().reset()  # type: ignore[no-untyped-call, unused-ignore]
        self.filled = False

    @property
    def is_compileable(self) -> bool:
        """While the model runs, as without; else no: generate() would make the masks itself, and not for the prefix."""
        return self.running and super().is_compileable


class _PrefixedDynamic(_Prefixed, DynamicCache):
    """A DynamicCache with the prefix."""


class _PrefixedStatic(_Prefixed, StaticCache):
    """A StaticCache with the prefix, and room for it."""


def attach(model: PreTrainedModel, prefix: PrefixCache) -> None:
    """Let the prefix stand before whatever the model is called with, also by generate() and through its base model.

    Takes no cache, a DynamicCache, or a StaticCache of full attention; masks (B, L), not padded on the left where attention has a window.
    PlanishError for others.
    """
    body, kind = _body(model), cast(Any, type(model))
    signature, windowed = inspect.signature(body.forward), getattr(model.config.get_text_config(), "sliding_window", None) is not None

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(signature.bind(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        past: Any = named.get("past_key_values")
        batch = len(named["input_ids"] if named.get("inputs_embeds") is None else named["inputs_embeds"])
        if past is None:
            asked = named.get("use_cache")
            grows = model.config.get_text_config().use_cache if asked is None else asked
            past = DynamicCache() if grows else prefix
        if past is not prefix:
            begin(past, prefix, batch, model)
            past.running = True
        named["past_key_values"] = past
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise PlanishError("attention_mask: a model with a prefix takes one of shape (batch, tokens), 0 for padding, or none.")
            if windowed and not mask[:, 0].all():
                raise PlanishError(
                    "attention_mask: padding on the left would lie between prefix and text, and this model's attention windows count it. "
                    "Call the model with texts of one length."
                )
            named["attention_mask"] = nn.functional.pad(mask, (prefix.length, 0), value=1)
        if positions is not None:
            named["position_ids"] = positions + prefix.length
        return (), named

    def after(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        past = kwargs.get("past_key_values")
        if isinstance(past, _Prefixed):
            past.running = False
        elif isinstance(output, ModelOutput) and past is prefix:
            output["past_key_values"] = None  # the caller asked for no cache, and there is none of its tokens

    def prepare(self: PreTrainedModel, *args: Any, **kwargs: Any) -> dict[str, Any]:
        past, ids = kwargs.get("past_key_values"), args[0] if args else kwargs["input_ids"]
        if past is not None:
            begin(past, prefix, len(ids), self)
        inputs: dict[str, Any] = kind.prepare_inputs_for_generation(self, *args, **kwargs)
        return inputs

    body.register_forward_pre_hook(before, with_kwargs=True)
    body.register_forward_hook(after, with_kwargs=True, always_call=True)
    if model.can_generate():
        prepare.__signature__ = inspect.signature(kind.prepare_inputs_for_generation)  # type: ignore[attr-defined]
        model.prepare_inputs_for_generation = MethodType(prepare, model)  # type: ignore[method-assign, assignment, unused-ignore]


def _body(model: PreTrainedModel) -> nn.Module:
    """What holds the blocks: the whole model and the base model both call it."""
    path, base = topology(model.config).blocks.rpartition(".")[0], model.base_model_prefix
    return model.get_submodule(path if hasattr(model, base) else path.removeprefix(base).removeprefix("."))


def begin(cache: Cache, prefix: PrefixCache, batch: int, model: PreTrainedModel) -> None:
    """Put the prefix into an empty cache, in place, for its owner goes on with it, unless it has it. PlanishError: other kinds."""
    if not isinstance(cache, _Prefixed):
        _adopt(cache, prefix)
    assert isinstance(cache, _Prefixed)
    if not cache.filled:
        prefix.fill(cache, batch, model.device, model.dtype)
        cache.filled = True


def _adopt(cache: Cache, prefix: PrefixCache) -> None:
    """Make an empty cache one with a prefix. Its class changes, and not the object: whoever holds it is to see the same."""
    kinds: dict[type[Cache], type[_Prefixed]] = {DynamicCache: _PrefixedDynamic, StaticCache: _PrefixedStatic}
    kind = kinds.get(type(cache))
    if kind is None or cache.offloading:
        what = f"{'offloaded ' if kind else ''}{type(cache).__name__}"
        raise PlanishError(f"past_key_values is a {what}, but a model with a prefix takes a DynamicCache or StaticCache, or none.")
    if cache.get_seq_length():
        raise PlanishError("past_key_values: a model with a prefix takes an empty cache, or one that it has filled itself.")
    if kind is _PrefixedStatic:
        _make_room(cache, prefix.length)
    cache.__class__ = kind
    assert isinstance(cache, _Prefixed)
    cache.prefix_length = prefix.length


def _make_room(cache: Cache, length: int) -> None:
    for layer in cache.layers:
        if type(layer) is not StaticLayer:
            raise PlanishError(f"past_key_values has a {type(layer).__name__}, where the prefix has no room. Take a DynamicCache, or none.")
        if layer.is_initialized:
            raise PlanishError("past_key_values: this StaticCache has its tensors already, so the prefix has no room. Take a new one.")
        layer.max_cache_len += length
