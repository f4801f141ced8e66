"""What a topology says of the residual stream: who writes it, who reads it, which norms stand on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_models import CONFIGS, MIXTURES, block_calls, tiny, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from planish.calib.blocks.topology import Topology, reader_weight, topology

POST_NORM = ("gemma2", "gemma3_text", "olmo2")
NORMALISED = ("opt-350m",)
ROTATABLE = tuple(name for name in CONFIGS if name not in (*POST_NORM, *NORMALISED, "opt-plain-norm"))


@contextmanager
def seen(root: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The last input and output of the modules, by path."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [root.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: calls.update({path: (args[0], out)})) for path in paths]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stream_begins_at_the_embeddings_and_ends_at_the_head(name: str) -> None:
    model = tiny(name)
    plan = topology(model.config)
    ends = tuple(path for path in (plan.norm, plan.head) if path)
    with seen(model, (*plan.embeddings, *ends)) as calls:
        first = block_calls(model, plan.blocks, tokens())[0]
    assert close(sum(calls[path][1] for path in plan.embeddings), first.args[0])
    if plan.norm:
        assert torch.equal(calls[plan.norm][1], calls[plan.head][0])
        assert ("RMS" in type(model.get_submodule(plan.norm)).__name__) == (plan.norm_kind == "rms")


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_add_their_writers_to_the_stream(name: str) -> None:
    model = tiny(name)
    plan = topology(model.config)
    if name in NORMALISED:
        assert plan.block(0).writers == plan.block(0).stream_readers == ()
        return
    mine = plan.block(0)
    writers = (mine.writers[0], "mlp") if name in MIXTURES else mine.writers  # what experts write counts as the router says
    for call in block_calls(model, plan.blocks, tokens()):
        before = call.args[0]
        with seen(call.block, (*writers, *mine.stream_readers)) as calls:
            after = call.run(call.block)
        written = [calls[path][1].reshape(before.shape) for path in writers]
        assert close(before + sum(written), after)
        for path in mine.stream_readers:
            x = calls[path][0].reshape(before.shape)
            assert torch.equal(x, before) or close(x, before + written[0])


@torch.no_grad()
def fold_norms(model: PreTrainedModel, plan: Topology) -> None:
    """Norms on the stream become RMSNorms without weights: their weights and biases go to their readers, LayerNorm's mean to the writers."""
    head = model.get_submodule(plan.head)
    assert plan.norm
    fold(model, plan.norm, [head], plan.norm_offset)
    for block in model.get_submodule(plan.blocks).children():
        for site in plan.block(0).sites:
            if site.host is not None and site.host.kind == "norm":
                fold(block, site.host.module, [block.get_submodule(path) for path in site.all_readers], plan.norm_offset)
        if plan.norm_kind == "layer":
            for path in plan.block(0).writers:
                writer = block.get_submodule(path)
                weight = reader_weight(writer)
                weight -= weight.mean(0)
                writer.bias -= writer.bias.mean()
    if plan.norm_kind == "layer":
        for path in plan.embeddings:
            weight = model.get_submodule(path).weight
            weight -= weight.mean(1, keepdim=True)


def fold(root: nn.Module, path: str, readers: list[nn.Module], offset: float) -> None:
    norm = root.get_submodule(path)
    for reader in readers:
        weight = reader_weight(reader)
        if getattr(norm, "bias", None) is not None:
            reader.bias = nn.Parameter(weight @ norm.bias + (0 if reader.bias is None else reader.bias))
        weight *= offset + norm.weight
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    root.set_submodule(path, nn.RMSNorm(norm.weight.shape[0], eps=eps, elementwise_affine=False))


@torch.no_grad()
def rotate(model: PreTrainedModel, plan: Topology, q_DD: Tensor) -> None:
    """The stream x becomes x @ q_DD."""
    for path in plan.embeddings:
        weight = model.get_submodule(path).weight
        weight.copy_(weight @ q_DD)
    for block in model.get_submodule(plan.blocks).children():
        for site in plan.block(0).sites:
            if site.host is not None and site.host.kind == "norm":
                for path in site.all_readers:
                    weight = reader_weight(block.get_submodule(path))
                    weight.copy_(weight @ q_DD)
        for path in plan.block(0).writers:
            writer = block.get_submodule(path)
            weight = reader_weight(writer)
            weight.copy_(q_DD.T @ weight)
            if writer.bias is not None:
                writer.bias.copy_(writer.bias @ q_DD)
    head = reader_weight(model.get_submodule(plan.head))
    head.copy_(head @ q_DD)


@pytest.mark.parametrize("name", ROTATABLE)
def test_a_rotated_stream_keeps_the_logits(name: str) -> None:
    model = tiny(name, changes={"tie_word_embeddings": False})
    plan = topology(model.config)
    q_DD = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        before = model(tokens()).logits
        fold_norms(model, plan)
        folded = model(tokens()).logits
        rotate(model, plan, q_DD)
        after = model(tokens()).logits
    assert close(folded, before)
    assert close(after, before)
