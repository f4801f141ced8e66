"""What the plugin does with vLLM's attention, without a server: run by vLLM's own interpreter, see test_vllm_plugin.py."""

from types import SimpleNamespace
from typing import Any

import torch
from transformers import Gemma3Config, LlamaConfig, MixtralConfig
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore[reportMissingImports]

from planish.calib.blocks.prefix import tensor_names
from planish.quant.errors import PlanishError
from planish.serving import vllm_config, vllm_prefix
from planish.serving.vllm_config import PlanishConfig
from planish.serving.vllm_ranks import own_rows

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
    return SimpleNamespace(impl=impl, attn_backend=backend, num_kv_heads=HEADS), checkpoint


def test_keys_of_the_prefix_are_stored_once() -> None:
    """Requests: a text from its start, one inside its prefix, one beyond it; three padded tokens. vLLM asks twice, then on another device."""
    stored = {name: torch.randn(1, HEADS, PREFIX, SIZE) for name in tensor_names(BLOCK)}
    written: list[tuple[torch.Tensor, ...]] = []
    layer, checkpoint = attention(stored, written)
    vllm_prefix.get_tensor_model_parallel_rank, vllm_prefix.get_tensor_model_parallel_world_size = lambda: 0, lambda: 1
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


def layer_of(kind: type, ranks: int, rank: int, copies: int = 1) -> Any:
    """One of vLLM's, without what makes it."""
    layer = object.__new__(kind)
    layer.__dict__ |= {"tp_size": ranks, "tp_rank": rank, "num_kv_head_replicas": copies}
    return layer


def test_ranks_compute_every_output_where_vllm_has_it() -> None:
    """q, k and v of 6 heads and 3 key-value heads over 3 ranks, of 6 and 2 over 6; gate and up over 2; o over 3, unevenly; a router on each."""
    assert [own_rows(layer_of(QKVParallelLinear, 3, rank), "qkv", [8, 4, 4], 48) for rank in (0, 2)] == [
        [range(8), range(24, 28), range(36, 40)],
        [range(16, 24), range(32, 36), range(44, 48)],
    ]
    cut = own_rows(layer_of(QKVParallelLinear, 6, 4, 3), "qkv", [4, 4, 4], 40)
    assert cut == [range(16, 20), range(28, 32), range(36, 40)]
    assert own_rows(layer_of(MergedColumnParallelLinear, 2, 1), "gate_up", [5, 5], 20) == [range(5, 10), range(15, 20)]
    assert [own_rows(layer_of(RowParallelLinear, 3, rank), "o", [7], 7) for rank in range(3)] == [[range(2)], [range(2, 4)], [range(4, 7)]]
    assert own_rows(layer_of(ReplicatedLinear, 2, 1), "router", [4], 4) == [range(4)]
    refused = ""
    try:
        own_rows(layer_of(MergedColumnParallelLinear, 2, 1), "gate_up", [5, 5], 24)
    except PlanishError as error:
        refused = str(error)
    assert "24 rows" in refused


def test_a_rank_s_part_of_the_prefix() -> None:
    """Six key-value heads over three ranks; two, each cached by two of four."""
    for heads, ranks, rank, mine, expected in ((6, 3, 1, 2, (2, 4)), (2, 4, 1, 1, (0, 1)), (2, 4, 2, 1, (1, 2)), (3, 1, 0, 3, (0, 3))):
        vllm_prefix.get_tensor_model_parallel_rank, vllm_prefix.get_tensor_model_parallel_world_size = lambda rank=rank: rank, lambda n=ranks: n
        found = vllm_prefix._own_heads(SimpleNamespace(num_kv_heads=mine), heads)
        assert (found.start, found.stop) == expected, (heads, ranks, rank)


def opened(model: Any, *names: str) -> PlanishConfig:
    """Of a checkpoint with these layers quantized, and others as parameters."""
    config = PlanishConfig({})
    whole = [name for name in names if name.endswith(".weight")]
    checkpoint = SimpleNamespace(config=model, packed=[name for name in names if name not in whole], tensors=whole)
    config.folder, vllm_config._opened = "", lambda _folder: checkpoint
    return config


def test_which_linears_a_layer_of_vllm_is() -> None:
    """By its own name; by those that vLLM says it merged; by those that it always merges."""
    config = opened(LlamaConfig(), "a.qkv_proj", "b.q", "b.k", "c.gate_proj", "c.up_proj.weight")
    for merged, prefix, expected in (
        ({"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, "a.qkv_proj", ["a.qkv_proj"]),
        ({"qk": ["q", "k"]}, "b.qk", ["b.q", "b.k"]),
        ({}, "c.gate_up_proj", ["c.gate_proj", "c.up_proj"]),
        ({}, "d.qkv_proj", "d.qkv_proj: no layer of the checkpoint. planish serves no speculative models."),
    ):
        config.packed_modules_mapping = merged
        try:
            found = config._linears(prefix)
        except PlanishError as error:
            found = str(error)
        assert found == expected, prefix


def test_layers_by_the_names_that_vllm_gives_them() -> None:
    """Of a model that takes images: its class and the one inside rename; what is not of the language model stays in full precision."""
    config = opened(Gemma3Config(), "model.language_model.layers.0.conv.in", "model.visual.fc.weight")
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."})
    )
    assert not config._linears("visual.fc")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={".conv.": ".short_conv."}))
    assert config._linears("language_model.model.layers.0.short_conv.in") == ["model.language_model.layers.0.conv.in"]
    refused = ""
    try:
        config._linears("language_model.model.layers.0.other")
    except PlanishError as error:
        refused = str(error)
    assert "no layer of the checkpoint" in refused


def test_experts_by_the_path_that_vllm_gives_them() -> None:
    """As files have it, and as vLLM's class of a model that takes images renames it."""
    config = opened(MixtralConfig(), "model.layers.0.mlp.experts.0.gate_proj")
    assert config._experts("model.layers.0.block_sparse_moe.experts") == "model.layers.0.mlp.experts"
    config = opened(Gemma3Config(), "model.language_model.layers.0.mlp.experts.0.gate_proj")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert config._experts("language_model.model.layers.0.mlp.experts") == "model.language_model.layers.0.mlp.experts"


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
            (False, "gpt_neox", "int", 8, None, False),
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
    for name, case in list(globals().items()):
        if name.startswith("test_"):
            case()
            print(f"{name} passed", flush=True)
