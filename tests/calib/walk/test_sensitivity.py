"""What noise at a site costs, against one backward pass through the whole model."""

from pathlib import Path

import pytest
import torch
from helpers_compress import ids, source
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from planish.calib.files.checkpoint import open_checkpoint
from planish.calib.walk.runner import BlockRunner
from planish.calib.walk.sensitivity import Felt, sensitivities

FAMILIES = ("llama", "qwen2", "phi3", "gemma2", "gpt2", "gpt_neox", "gpt_neox-serial")


def run(folder: Path, batches: list[Tensor], seed: int = 0) -> tuple[BlockRunner, dict[int, dict[str, Felt]]]:
    runner = BlockRunner(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    return runner, dict(sensitivities(runner, batches, [runner.topology.block(index).sites for index in range(len(runner.blocks))], seed=seed))


def textbook(folder: Path, batches: list[Tensor], runner: BlockRunner) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """The whole model in one graph; the same tokens drawn; gradients kept at what each site's first reader is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    known, generator = runner.topology, torch.Generator().manual_seed(0)
    inputs: dict[tuple[int, str], list[Tensor]] = {}

    def keep(key: tuple[int, str], x: Tensor) -> None:
        x.retain_grad()
        inputs.setdefault(key, []).append(x)

    for index in range(known.block_count):
        for site in known.block(0).sites:
            module = model.get_submodule(f"{known.block_name(index)}.{site.readers[0]}")
            module.register_forward_pre_hook(lambda _module, given, key=(index, site.name): keep(key, given[0]))
    for batch in batches:
        logits = model(batch).logits.flatten(0, 1)
        drawn = torch.cat([torch.multinomial(some.detach().softmax(-1), 1, generator=generator)[:, 0] for some in pieces(logits, batch.shape[1])])
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {
        key: (torch.cat([x.detach().flatten(0, 1) for x in xs]), torch.cat([x.grad.square().sum(-1).flatten() for x in xs if x.grad is not None]))
        for key, xs in inputs.items()
    }


def pieces(logits: Tensor, length: int) -> list[Tensor]:
    """As the runner's head makes them: at most 32 tokens of one sample."""
    return [some for sample in logits.split(length) for some in sample.split(32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_one_backward_pass_through_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = source(family, tmp_path / "model", torch.float32)
    batches = [ids(2, 40), ids(1, 9)]
    runner, found = run(folder, batches)
    expected = textbook(folder, batches, runner)
    assert list(found) == list(reversed(range(len(runner.blocks))))
    for (index, name), (x_TC, squares_T) in expected.items():
        felt = found[index][name]
        torch.testing.assert_close(felt.x_TC, x_TC, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(felt.squares_T, squares_T, rtol=2e-3, atol=1e-4 * float(squares_T.max()))


def test_the_last_tokens_keys_matter_to_nobody_else(tmp_path: Path) -> None:
    """The first token's inputs are felt by all that follow; other draws are other numbers."""
    folder = source("llama", tmp_path / "model", torch.float32)
    _, found = run(folder, [ids(8, 32)])
    _, other = run(folder, [ids(8, 32)], seed=1)
    for index, sites in found.items():
        assert set(sites) == {"qkv", "o", "gate_up", "down"}
        assert not torch.equal(sites["qkv"].squares_T, other[index]["qkv"].squares_T)
        assert all(felt.squares_T.shape == (8 * 32,) and bool((felt.squares_T > 0).all()) for felt in sites.values())
