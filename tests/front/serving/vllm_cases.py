"""What the plugin does with vLLM's attention, without a server: run by vLLM's own interpreter, see test_vllm_plugin.py."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

from planish.calib.blocks.prefix import tensor_names
from planish.serving import vllm_config, vllm_prefix
from planish.serving.vllm_config import PlanishConfig

BLOCK = "model.layers.0"
NAME = f"{BLOCK}.self_attn.attn"
PREFIX, HEADS, SIZE = 3, 2, 4


class Builder:
    """Of metadata that do not say where requests begin, as FlashInfer's."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any) -> Any:
        return SimpleNamespace()


def attention(stored: dict[str, torch.Tensor], written: list[tuple[torch.Tensor, ...]]) -> tuple[Any, Any]:
    """A layer, and a checkpoint with a prefix for it."""
    backend = SimpleNamespace(forward_includes_kv_cache_update=False, get_builder_cls=lambda: Builder)
    impl = SimpleNamespace(do_kv_cache_update=lambda _owner, key, value, _cache, _slots: written.append((key, value)))
    checkpoint = SimpleNamespace(
        extension=SimpleNamespace(prefix=tuple(range(PREFIX))), tensors=stored, read=lambda names: {n: stored[n] for n in names}
    )
    return SimpleNamespace(impl=impl, attn_backend=backend), checkpoint


def test_keys_of_the_prefix_are_stored_once() -> None:
    """Requests: a text from its start, one inside its prefix, one beyond it; three padded tokens. vLLM asks twice, then on another device."""
    stored = {name: torch.randn(1, HEADS, PREFIX, SIZE) for name in tensor_names(BLOCK)}
    written: list[tuple[torch.Tensor, ...]] = []
    layer, checkpoint = attention(stored, written)
    vllm_prefix.store_prefix(layer, NAME, checkpoint)
    update = layer.impl.do_kv_cache_update
    with torch.device("meta"):
        vllm_prefix.store_prefix(layer, NAME, checkpoint)
    assert layer.impl.do_kv_cache_update is update

    counts, lengths = [5, 1, 2], [5, 3, 9]  # tokens of the step, and of each text with them
    places = SimpleNamespace(query_start_loc=torch.tensor([0, 5, 6, 8], dtype=torch.int32), seq_lens=torch.tensor(lengths, dtype=torch.int32))
    made = Builder().build(0, places)
    vllm_prefix.get_forward_context = lambda: SimpleNamespace(attn_metadata={NAME: made})
    step = [torch.randn(11, HEADS, SIZE) for _ in stored]
    update(None, *step, None, None)
    for ours, theirs, got in zip(stored.values(), step, written[0], strict=True):
        row = 0
        for count, length in zip(counts, lengths, strict=True):
            for position in range(length - count, length):
                torch.testing.assert_close(got[row], ours[0, :, position] if position < PREFIX else theirs[row], rtol=0, atol=0)
                row += 1
    places.query_start_loc, places.seq_lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
    made = Builder().build(0, places)  # the next step's places are its own
    update(None, *step, None, None)
    torch.testing.assert_close(written[1][0][:1], step[0][:1], rtol=0, atol=0)


def test_scores_of_given_tokens_are_refused() -> None:
    params = SimpleNamespace(prompt_logprob_token_ids=[[1]])
    request = SimpleNamespace(prompt_token_ids=[1, 2], prompt_embeds=None, resumable=False, sampling_params=params)
    refused = ""
    try:
        vllm_prefix._check_room(request, PREFIX, 100)
    except VLLMValidationError as error:
        refused = str(error)
    assert "prompt_logprob_token_ids" in refused
    params.prompt_logprob_token_ids = None
    vllm_prefix._check_room(request, PREFIX, 100)


def test_what_planish_takes_over() -> None:
    """W4A8 and narrower activations of compressed-tensors, and whatever the user asks for."""
    for weights, activations, layout, asked, taken in (
        (8, 8, "int-quantized", None, False),
        (8, 8, "int-quantized", "planish", True),
        (8, 8, "int-quantized", "compressed-tensors", False),
        (4, 8, "int-quantized", None, True),
        (4, 8, "pack-quantized", None, False),
        (4, 4, "int-quantized", None, True),
        (4, None, "pack-quantized", None, False),
        (4, None, "pack-quantized", "planish", True),
    ):
        inputs = None if activations is None else {"type": "int", "num_bits": activations}
        group = {"format": layout, "weights": {"type": "int", "num_bits": weights}, "input_activations": inputs}
        config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        found = PlanishConfig.override_quantization_method(config, asked)
        assert found == ("planish" if taken else None), (weights, activations, layout, asked)
    assert PlanishConfig.override_quantization_method({"quant_method": "gptq"}, None) is None


def test_where_products_of_bytes_are_wrong_integers_are_planish_s() -> None:
    """On a CPU that makes them wrong, of families that planish serves, unless the user asks for vLLM's."""
    kept = vllm_config.exact
    try:
        for right, family, kind, activations, asked, taken in (
            (False, "llama", "int", 8, None, True),
            (False, "llama", "int", None, None, True),
            (False, "llama", "float", 8, None, False),
            (False, "phi3", "int", 8, None, False),
            (False, "llama", "int", 8, "compressed-tensors", False),
            (True, "llama", "int", 8, None, False),
        ):
            vllm_config.exact = lambda right=right: right
            inputs = None if activations is None else {"type": kind, "num_bits": activations}
            group = {"format": "any", "weights": {"type": kind, "num_bits": 8}, "input_activations": inputs}
            config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
            found = PlanishConfig.override_quantization_method(config, asked, SimpleNamespace(model_type=family))
            assert found == ("planish" if taken else None), (right, family, kind, activations, asked)
    finally:
        vllm_config.exact = kept


if __name__ == "__main__":
    for case in (
        test_keys_of_the_prefix_are_stored_once,
        test_scores_of_given_tokens_are_refused,
        test_what_planish_takes_over,
        test_where_products_of_bytes_are_wrong_integers_are_planish_s,
    ):
        case()
        print(f"{case.__name__} passed", flush=True)
