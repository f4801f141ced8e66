"""Every family's table against its tiny model: the right one is proven, wrong ones are caught, unknown models are refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, FAMILIES, RELATIVES, VISION_FAMILIES, block_calls, tiny, tokens
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from planish.calib.blocks import families, family
from planish.calib.blocks.experts import separate
from planish.calib.blocks.topology import BlockTopology, Host, Site, absorb, check_structure, exact_scale, prove, reader_weight, tie, topology
from planish.quant.errors import PlanishError

OFFSET_FAMILIES = ("gemma2", "gemma3_text", "nemotron")


def hosts(name: str) -> dict[str, str | None]:
    return {site.name: site.host.module if site.host else None for site in first(tiny(name)).sites}


def with_site(plan: BlockTopology, name: str, change: Callable[[Site], Site]) -> BlockTopology:
    return replace(plan, sites=tuple(change(site) if site.name == name else site for site in plan.sites))


def with_host(plan: BlockTopology, name: str, host: Host) -> BlockTopology:
    return with_site(plan, name, lambda site: replace(site, host=host))


def first(model: PreTrainedModel) -> BlockTopology:
    return topology(model.config).block(0)


def prove_first(model: PreTrainedModel, plan: BlockTopology) -> float:
    call = block_calls(model, topology(model.config).blocks, tokens())[0]
    return prove(call.block, plan, call.run, "block 0")


def uneven_scale(block: nn.Module, site: Site, seed: int) -> Tensor:
    channels = reader_weight(block.get_submodule(site.readers[0])).shape[1]
    return tie(site, torch.exp2(4 * torch.rand(channels, generator=torch.Generator().manual_seed(seed)) - 2))


def test_every_family_has_a_tiny_model() -> None:
    assert {*FAMILIES, *(name for name in RELATIVES if "-" not in name), *VISION_FAMILIES} == set(families.FAMILIES)


@pytest.mark.parametrize("name", CONFIGS | RELATIVES)
def test_prove_holds_on_every_block_and_leaves_it_as_it_was(name: str) -> None:
    model = tiny(name)
    plan = topology(model.config)
    calls = block_calls(model, plan.blocks, tokens())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(calls) == plan.block_count
    for index, call in enumerate(calls):
        assert prove(call.block, plan.block(index), call.run) < 4e-6
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS | RELATIVES)
def test_prove_holds_in_bfloat16(name: str) -> None:
    if name in ("qwen3_5_text", "qwen3_5_moe_text"):
        pytest.skip("its recurrence makes more of what a norm's rounding does than the bar allows; a run proves blocks in float32")
    error = prove_first(tiny(name).bfloat16(), first(tiny(name)))
    assert error < 0.03 if name in OFFSET_FAMILIES else error == 0


@pytest.mark.parametrize("name", CONFIGS | RELATIVES)
def test_all_sites_absorbed_at_once_keep_the_logits(name: str) -> None:
    model = tiny(name)
    plan = topology(model.config)
    with torch.no_grad():
        before = model(tokens()).logits
        for index, block in enumerate(model.get_submodule(plan.blocks).children()):
            for site in plan.block(index).sites:
                if site.host is not None:
                    absorb(block, site, uneven_scale(block, site, index))
        assert float((model(tokens()).logits - before).norm() / before.norm()) < 1e-5


@pytest.mark.parametrize("name", CONFIGS | RELATIVES)
def test_structure_is_checked_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(CONFIGS | RELATIVES)[name]))
    separate(model)
    plan = topology(model.config)
    for index, block in enumerate(model.get_submodule(plan.blocks).children()):
        check_structure(block, plan.block(index))


def test_hosts_follow_the_config() -> None:
    assert hosts("olmo2") == {"qkv": None, "o": "self_attn.v_proj", "gate_up": None, "down": "mlp.up_proj"}
    assert hosts("gemma2")["gate_up"] == "pre_feedforward_layernorm"
    assert hosts("opt") == {"qkv": "self_attn_layer_norm", "o": "self_attn.v_proj", "up": "final_layer_norm", "down": "fc1"}
    assert hosts("opt-gelu")["down"] is None
    assert hosts("opt-plain-norm") == {"qkv": None, "o": "self_attn.v_proj", "up": None, "down": "fc1"}
    assert hosts("opt-350m") == {"qkv": None, "o": "self_attn.v_proj", "up": None, "down": "fc1"}
    assert hosts("gpt2")["down"] is None
    assert hosts("gpt_neox")["down"] is None
    assert hosts("gpt_neox-serial")["down"] == "mlp.dense_h_to_4h"


def test_row_maps() -> None:
    sizes = family.Sizes(heads=4, kv_heads=2, head_dim=2, width=3)
    assert family.separate_v(sizes) == (0, 1, 0, 1, 2, 3, 2, 3)
    assert family.stacked_v(sizes) == (12, 13, 12, 13, 14, 15, 14, 15)
    assert family.interleaved_v(replace(sizes, kv_heads=4)) == (4, 5, 10, 11, 16, 17, 22, 23)
    assert family.separate_up(sizes) == (0, 1, 2)
    assert family.stacked_up(sizes) == (3, 4, 5)


GQA = family.Sizes(heads=4, kv_heads=2, head_dim=16, width=96)
MHA = family.Sizes(heads=4, kv_heads=4, head_dim=16, width=128)
WRONG_HOSTS = {
    "norm of another site": ("llama", "gate_up", Host(kind="norm", module="input_layernorm")),
    "gate for up": ("llama", "down", Host(kind="rows", module="mlp.gate_proj", index=family.separate_up(GQA))),
    "query heads dealt out in turns": (
        "llama",
        "o",
        Host(kind="rows", module="self_attn.v_proj", index=tuple(h % 2 * 16 + i for h in range(4) for i in range(16))),
    ),
    "k for v": ("qwen2", "o", Host(kind="rows", module="self_attn.k_proj", index=family.separate_v(GQA))),
    "q norm": ("olmo2", "qkv", Host(kind="norm", module="self_attn.q_norm")),
    "post norm": ("gemma2", "gate_up", Host(kind="norm", module="post_attention_layernorm", offset=1.0)),
    "no offset": ("gemma2", "qkv", Host(kind="norm", module="input_layernorm")),
    "an offset": ("qwen3", "qkv", Host(kind="norm", module="input_layernorm", offset=1.0)),
    "q rows": ("phi3", "o", Host(kind="rows", module="self_attn.qkv_proj", index=family.separate_v(GQA))),
    "gate rows": ("phi3", "down", Host(kind="rows", module="mlp.gate_up_proj", index=family.separate_up(GQA))),
    "not interleaved": ("gpt_neox", "o", Host(kind="rows", module="attention.query_key_value", index=family.stacked_v(MHA))),
    "interleaved": ("gpt2", "o", Host(kind="rows", module="attn.c_attn", index=family.interleaved_v(MHA))),
    "through gelu": ("opt-gelu", "down", Host(kind="rows", module="fc1", index=family.separate_up(MHA))),
    "norm on the stream": ("opt-350m", "up", Host(kind="norm", module="self_attn_layer_norm")),
}


@pytest.mark.parametrize("case", WRONG_HOSTS)
def test_prove_catches_a_wrong_host_and_restores_the_block(case: str) -> None:
    name, site, host = WRONG_HOSTS[case]
    model = tiny(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PlanishError, match=rf"{model.config.model_type}, block 0, site {site}: a scale .* by [0-9.e+-]+ of its size"):
        prove_first(model, with_host(first(model), site, host))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_massive_token_hides_nothing(dtype: torch.dtype) -> None:
    _, site, wrong = WRONG_HOSTS["query heads dealt out in turns"]
    model = tiny("llama").to(dtype)
    plan = topology(model.config)
    call = block_calls(model, plan.blocks, tokens())[1]
    call.args[0][:, 0] *= 1e5
    assert prove(call.block, plan.block(1), call.run) == 0
    with pytest.raises(PlanishError, match="site o"):
        prove(call.block, with_host(plan.block(1), site, wrong), call.run)


def test_a_wide_group_hides_nothing() -> None:
    model = tiny("llama", changes={"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 8})
    plan = first(model)
    rolled = tuple((i + 1) % 8 for _ in range(16) for i in range(8))
    assert prove_first(model, plan) == 0
    with pytest.raises(PlanishError, match="site o"):
        prove_first(model, with_host(plan, "o", Host(kind="rows", module="self_attn.v_proj", index=rolled)))


WRONG_SITES = {
    "no site reads self_attn.k_proj.weight": ("qkv", {"readers": ("self_attn.q_proj", "self_attn.v_proj")}),
    "site down: mlp.up_proj is listed twice": ("down", {"readers": ("mlp.down_proj", "mlp.up_proj")}),
    "site o: reader self_attn.out_proj is missing": ("o", {"readers": ("self_attn.out_proj",)}),
    "site o: reader input_layernorm is LlamaRMSNorm": ("o", {"readers": ("input_layernorm",)}),
    "site qkv: host ln_1 is missing": ("qkv", {"host": Host(kind="norm", module="ln_1")}),
    "site down: host input_layernorm is LlamaRMSNorm, not a norm of 96": ("down", {"host": Host(kind="norm", module="input_layernorm")}),
    "site o: host mlp is LlamaMLP": ("o", {"host": Host(kind="rows", module="mlp", index=tuple(range(64)))}),
    "site o: the row map gives 64 channels from rows 0 to 63": ("o", {"host": Host(kind="rows", module="self_attn.v_proj", index=tuple(range(64)))}),
}


@pytest.mark.parametrize("message", WRONG_SITES)
def test_structure_catches_a_wrong_table(message: str) -> None:
    name, changes = WRONG_SITES[message]
    model = tiny("llama")
    with pytest.raises(PlanishError, match=message):
        prove_first(model, with_site(first(model), name, lambda site: replace(site, **changes)))


def test_sites_in_another_order_are_caught() -> None:
    model = tiny("llama")
    plan = first(model)
    qkv, o, gate_up, down = plan.sites
    with pytest.raises(PlanishError, match=r"site o: self_attn.q_proj ran when self_attn.o_proj was due"):
        prove_first(model, replace(plan, sites=(o, qkv, gate_up, down)))
    merged = replace(qkv, readers=(*qkv.readers, "self_attn.o_proj"))
    with pytest.raises(PlanishError, match=r"site qkv: self_attn.o_proj receives another tensor"):
        prove_first(model, replace(plan, sites=(merged, gate_up, down)))


def test_a_block_that_does_not_run_is_caught() -> None:
    model = tiny("llama")
    plan = topology(model.config)
    call = block_calls(model, plan.blocks, tokens())[0]
    with pytest.raises(PlanishError, match=r"site qkv: self_attn.q_proj, .* did not run"):
        prove(call.block, plan.block(0), lambda block: call.args[0])


def test_a_weight_that_is_no_linear_layer_is_caught() -> None:
    model = tiny("llama")
    block = model.get_submodule("model.layers.0")
    block.register_parameter("experts", nn.Parameter(torch.zeros(2, 4, 4)))
    with pytest.raises(PlanishError, match=r"no site reads experts, shape \(2, 4, 4\)"):
        check_structure(block, first(model))


def test_tie_takes_the_largest_of_a_group() -> None:
    site = Site(name="o", readers=("o",), host=Host(kind="rows", module="v", index=(0, 1, 0, 1, 2, 3, 2, 3)))
    values = torch.tensor([1.0, 8, 3, 4, 5, 6, 7, 2])
    assert tie(site, values).tolist() == [3, 8, 3, 8, 7, 6, 7, 6]
    assert tie(replace(site, host=None), values) is values


def test_absorb_refuses_scales_that_are_none() -> None:
    model = tiny("llama")
    block = model.get_submodule("model.layers.0")
    qkv, o, _, _ = first(model).sites
    for site, scale, message in (
        (replace(qkv, host=None), torch.ones(64), "no host"),
        (qkv, torch.ones(63), "64 positive"),
        (qkv, torch.zeros(64), "64 positive"),
        (qkv, torch.full((64,), torch.nan), "64 positive"),
        (o, torch.arange(1.0, 65), "tie first"),
    ):
        with pytest.raises(ValueError, match=message):
            absorb(block, site, scale)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_exact_scale_makes_the_norm_exact_in_its_stored_dtype(name: str) -> None:
    model = tiny(name)
    plan = topology(model.config)
    call = block_calls(model, plan.blocks, tokens())[0]
    reference = call.run(call.block)
    site = first(model).sites[0]
    assert site.host is not None
    norm = call.block.get_submodule(site.host.module)
    assert isinstance(norm.weight, nn.Parameter)
    with torch.no_grad():
        norm.weight[0] = -site.host.offset  # a channel that is always 0 (but for a LayerNorm's bias)
    reference = call.run(call.block)
    scale = uneven_scale(call.block, site, 3)
    exact = exact_scale(call.block, site, scale, torch.bfloat16)
    assert exact[0] == scale[0]
    assert float((exact / scale - 1).abs().max()) < 0.05
    absorb(call.block, site, exact)
    with torch.no_grad():
        norm.weight.copy_(norm.weight.bfloat16())
    assert float((call.run(call.block) - reference).norm() / reference.norm()) < 1e-6
    assert exact_scale(call.block, first(model).sites[1], scale, torch.bfloat16) is scale


def test_addresses_are_of_the_blocks_readers_alone() -> None:
    plan = topology(tiny("llama").config)
    address = plan.address("model.layers.2.mlp.down_proj")
    assert address is not None
    assert (address[0], address[1].name) == (2, "down")
    assert not any(map(plan.address, ("2.mlp.down_proj", "other.2.mlp.down_proj", "model.layers.x.mlp.down_proj", "model.layers.2.mlp", "lm_head")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "codegen"}, r"model_type 'codegen': no table .* Add a Family to calib/blocks/families.py.* Supported: llama, mistral"),
        ({"model_type": "bert"}, "no table for this family"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "granitemoe"}, "mixture of experts"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv cuts"),
        ({"model_type": "dbrx"}, "no table for this family"),
        ({"model_type": "paligemma"}, "multimodal model around a gemma language model"),
        ({"model_type": "stablelm", "use_parallel_residual": True}, "read one norm"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification.*class LlamaForCausalLM"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention is true"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_models_that_planish_does_not_know(values: dict[str, object], message: str) -> None:
    with pytest.raises(PlanishError, match=message):
        topology(AutoConfig.for_model(**values))
