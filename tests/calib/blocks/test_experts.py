"""Experts as layers of their own compute what transformers' one tensor of them does, however tokens are dealt to them."""

import pytest
import torch
from tiny_models import MIXTURES, block_calls, tiny, tokens, whole
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from planish.calib.blocks.experts import Expert, Experts, Routes, routed_alike, routes_tokens, seeing_all, separate
from planish.calib.blocks.topology import topology
from planish.calib.walk.site_walk import site_inputs

T, D, INNER, E, K = 40, 16, 24, 5, 2


def experts(seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)
    made = Experts()
    for _ in range(E):
        layers = [nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False), nn.Linear(INNER, D, bias=False)]
        for layer in layers:
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=generator) / D**0.5, requires_grad=False)
        made.append(Expert(*layers, nn.SiLU()))  # type: ignore[arg-type]
    return made


def routed(seed: int = 1, used: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x, the experts of every token, all different, and their weights; experts from `used` on get none."""
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.stack([torch.randperm(used, generator=generator)[:K] for _ in range(T)])
    return torch.randn(T, D, generator=generator), index_TK, torch.rand(T, K, generator=generator)


def textbook(some: Experts, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """One token and one expert after the other, in float64."""
    out_TD = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            expert = some[int(index_TK[t, k])]
            gate, up, down = (getattr(expert, f"{name}_proj").weight.double() for name in ("gate", "up", "down"))
            inner_I = nn.functional.silu(gate @ x_TD[t].double()) * (up @ x_TD[t].double())
            out_TD[t] += weight_TK[t, k].double() * (down @ inner_I)
    return out_TD


@pytest.mark.parametrize("used", [E, 3, K])
def test_routed_and_all_are_the_textbook_s(used: int) -> None:
    some, call = experts(), routed(used=used)
    expected = textbook(some, *call)
    torch.testing.assert_close(some(*call).double(), expected, rtol=1e-5, atol=1e-5)
    with seeing_all(some):
        torch.testing.assert_close(some(*call).double(), expected, rtol=1e-5, atol=1e-5)
    assert not some.all_tokens


def test_no_token_at_all() -> None:
    x_TD, index_TK, weight_TK = (value[:0] for value in routed())
    assert experts()(x_TD, index_TK, weight_TK).shape == (0, D)


def test_who_sees_what() -> None:
    some, (x_TD, index_TK, weight_TK) = experts(), routed(used=3)
    seen: dict[int, int] = {}
    for number, expert in enumerate(some):
        expert.register_forward_pre_hook(lambda _module, inputs, number=number: seen.update({number: len(inputs[0])}))
    some(x_TD, index_TK, weight_TK)
    assert seen == {number: int((index_TK == number).sum()) for number in range(3)}
    with seeing_all(some):
        some(x_TD, index_TK, weight_TK)
    assert seen == dict.fromkeys(range(E), T)


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_apart_they_compute_what_transformers_does_together(family: str) -> None:
    apart = tiny(family)
    together = whole(apart)
    assert not any(isinstance(module, Experts) for module in together.modules())
    found, expected = apart(tokens()).logits, together(tokens()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with seeing_all(apart):
        torch.testing.assert_close(apart(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    weights = {name: value.clone() for name, value in together.state_dict().items()}
    separate(together)
    assert torch.equal(together(tokens()).logits, found)
    assert together.get_submodule("model.layers.1.mlp.experts.2").gate_proj.weight.data_ptr() != 0
    assert all(torch.equal(value, whole(together).state_dict()[name]) for name, value in weights.items())


def test_experts_of_unknown_families_are_left_alone() -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("dots1", **sizes, n_routed_experts=4, n_shared_experts=1))
    before = [name for name, _ in model.named_parameters()]
    separate(model)
    assert [name for name, _ in model.named_parameters()] == before


@torch.no_grad()
@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_s_site_sees_all_tokens(family: str) -> None:
    model = tiny(family)
    plan = topology(model.config)
    call = block_calls(model, plan.blocks, tokens())[1]  # in some the first has none
    with site_inputs(call.block, plan.block(1).sites) as inputs:
        call.run(call.block)
    seen = inputs.take()
    assert set(seen) == {site.name for site in plan.block(1).sites}
    assert {len(x_TC) for x_TC in seen.values()} == {tokens().numel()}


@torch.no_grad()
def test_routes_are_those_of_the_first_run() -> None:
    """Of experts that are tied, noise in the router decides: the output is another, but not with the same routes."""
    model = tiny("mixtral")
    call = block_calls(model, "model.layers", tokens())[0]
    (router,) = (module for module in call.block.modules() if routes_tokens(module))
    router.weight[1:] = router.weight[0]  # all tied: any noise decides
    noise = 1e-6 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0))
    expected = call.run(call.block)
    router.weight += noise
    assert (call.run(call.block) - expected).norm() > 1e-2 * expected.norm()
    router.weight -= noise
    routes = Routes()
    with routed_alike(call.block, routes):
        torch.testing.assert_close(call.run(call.block), expected)
        router.weight += noise
        torch.testing.assert_close(call.run(call.block), expected)
        assert 0 < routes.error < 1e-4
        router.weight *= 1.5  # which the output does not show then
        call.run(call.block)
        assert routes.error > 0.1
    assert not any(module._forward_hooks for module in call.block.modules())
    assert all(module.routes is None for module in call.block.modules() if isinstance(module, Experts))
